"""How the commands decode: the runner, and the format of the weights.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flashar_pl.options import CodeOptions, Runner, WeightFormat

if TYPE_CHECKING:
    from flashar_pl.checkpoints.opening import Source
    from flashar_pl.decoding import Engine
    from flashar_pl.models import GridModel

PACKED_WIDTH = 256
"""Narrower models are slower packed in float32 (docs/log.md), and are not measured."""
ROWS = {"raster": 2}
"""Rows of a step of one guided image; other plans have about as many as `flashar_pl.layers.packed.ROWS`."""
EXACT = ("auto", "plain", "packed")
"""Formats that change no value of the weights. Which of them auto becomes depends on the memory that is free."""


def build_engine(source: Source, options: CodeOptions, plan: str) -> Engine:
    """An engine of a checkpoint for inference. Raises ValueError where the device cannot run it.

    plan: what it is for; see `choose_format`. It runs any other, too.

    `source.model` becomes the model that the engine runs, so that nothing holds the weights in their former format.
    """
    from flashar_pl.decoding import Engine
    from flashar_pl.decoding.prepare import prepare

    speculation = options.speculation(plan)
    if source.model.reads_tokenizer:
        source.matching_tokenizer(options.device)
    source.model = prepare(source.model, choose_format(source.model, options, plan), source.device)
    return Engine(source.model, options.runner, *speculation)


def choose_format(model: GridModel, options: CodeOptions, plan: str) -> WeightFormat:
    """What "auto" stands for: the fastest format that changes no value (docs/performance.md).

    On a CPU where a second copy of the weights fits: packed or plain, by a measurement of less than a second that is
    made once a machine. Elsewhere plain. Not every runner reads packed weights.
    """
    if options.weight_format != "auto":
        return options.weight_format
    from flashar_pl.decoding.prepare import has_blocks
    from flashar_pl.devices import available_memory
    from flashar_pl.layers import packed
    from flashar_pl.layers.measured import packed_pays

    parameters = list(model.parameters())
    dtype = parameters[0].dtype
    possible = has_blocks(model) and not model.shared and packed.unsupported(dtype) is None
    if model.device.type != "cpu" or not possible or not packs(options.runner):
        return "plain"
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if 2 * size >= available_memory(model.device):
        return "plain"
    if model.backbone.dim < PACKED_WIDTH:
        return "packed" if dtype.itemsize <= 2 else "plain"
    n_out, n_in = max(
        (weight.shape for weight in model.backbone.blocks[0].parameters() if weight.dim() == 2), key=math.prod
    )
    return "packed" if packed_pays(n_in, n_out, dtype, ROWS.get(plan, packed.ROWS)) else "plain"


def packs(runner: Runner) -> bool:
    """Whether a runner can read packed weights."""
    return "compiled" not in runner and runner != "fused"
