"""How the commands decode: the runner, and the format of the weights.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashar_pl.options import EngineOptions, WeightFormat

if TYPE_CHECKING:
    from flashar_pl.checkpoints.opening import Source
    from flashar_pl.decoding import Engine
    from flashar_pl.models import GridModel

PACKED_WIDTH = 256
"""Narrower models are slower packed in float32 (docs/log.md)."""
EXACT = ("auto", "plain", "packed")
"""Formats that change no value of the weights. Which of them auto becomes depends on the memory that is free."""


def build_engine(source: Source, options: EngineOptions, plan: str) -> Engine:
    """An engine of a checkpoint for inference. Raises ValueError where the device cannot run it.

    plan: what it is for; see `choose_format`. It runs any other, too.

    `source.model` becomes the model that the engine runs, so that nothing holds the weights in their former format.
    """
    from flashar_pl.decoding import Engine
    from flashar_pl.decoding.prepare import prepare

    source.model = prepare(source.model, choose_format(source.model, options, plan))
    return Engine(source.model, options.runner)


def choose_format(model: GridModel, options: EngineOptions, plan: str) -> WeightFormat:
    """What "auto" stands for: the fastest format that changes no value, by measurement (docs/performance.md).

    That is packed on a CPU, where a second copy of the weights fits, and plain elsewhere. Packed weights cannot be
    compiled; in float32 they are slower for the few rows of a raster step, and in narrow models.
    """
    if options.weight_format != "auto":
        return options.weight_format
    from flashar_pl.devices import available_memory
    from flashar_pl.layers.packed import unsupported

    parameters = list(model.parameters())
    dtype = parameters[0].dtype
    if model.device.type != "cpu" or unsupported(dtype) is not None or "compiled" in options.runner:
        return "plain"
    if dtype.itemsize > 2 and (plan == "raster" or model.backbone.dim < PACKED_WIDTH):
        return "plain"
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return "packed" if 2 * size < available_memory(model.device) else "plain"
