"""The time from codes to pixels, beside that of the codes.

Shapes: B images, H x W grid.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashar_pl.benchmarking.measure import Timing, clock, clock_name, repeats_for
from flashar_pl.decoding.samples import decode_all
from flashar_pl.models import GridModel
from flashar_pl.options import PixelDtype, parse_tokenizer
from flashar_pl.tokenizers import IBQ, VQ16, Tokenizer, build_tokenizer
from flashar_pl.tokenizers.ibq import IBQ_SPEC
from flashar_pl.tokenizers.vq16 import VQ_PRESETS

RANDOM = {kind: (VQ16, spec) for kind, spec in VQ_PRESETS.items()} | {"ibq": (IBQ, IBQ_SPEC)}
"""Published sizes that need no file: time does not depend on the weights."""


def pixel_tokenizer(text: str, model: GridModel, device: torch.device, dtype: PixelDtype | None) -> Tokenizer:
    """The image tokenizer that is measured: a name of `RANDOM`, or as of --tokenizer elsewhere, for a model's codes.

    Raises ValueError for one that does not exist, has no decoder or not in this dtype, or has other codes.
    """
    if text in RANDOM:
        kind, spec = RANDOM[text]
        with device:
            tokenizer: Tokenizer = kind(spec)
    else:
        if ":" not in text and not Path(text).expanduser().is_dir():  # no file, directory or JSON object either
            raise ValueError(
                f"pixels is {text!r}; expected {', '.join(RANDOM)}, a directory, or KIND:VALUE such as vq16:FILE."
            )
        tokenizer = build_tokenizer(parse_tokenizer(text) or {}).to(device)
    tokenizer.check_decodes("leave out --pixels")
    model.use_tokenizer(tokenizer)
    tokenizer.decode_in(dtype)
    return tokenizer


def add_pixels(
    rows: list[dict[str, Any]], tokenizer: Tokenizer, grid: tuple[int, int], device: torch.device, repeats: int | None
) -> dict[str, Any]:
    """Measures the decoding of each batch size to uint8 images in the machine's memory, as `flashar generate` does it.

    Every row gets "pixels_s", for its batch. Returns what was measured and, by batch size, the
    clocks' summaries.
    """
    times, name = {}, clock_name(device)
    for batch in dict.fromkeys(row["batch"] for row in rows):
        codes = torch.randint(tokenizer.vocabulary, (batch, *grid), generator=torch.Generator().manual_seed(0))
        warm_up, timing, decode = Timing(), Timing(), partial(decode_all, tokenizer, codes)
        for _ in range(2):
            clock(decode, device, warm_up)
        for _ in range(repeats_for(getattr(warm_up, name)[-1], repeats)):
            clock(decode, device, timing)
        times[batch] = timing.summary()
    for row in rows:
        row["pixels_s"] = times[row["batch"]][f"{name}_s"]
    return {"tokenizer": tokenizer.config(), "decode_dtype": tokenizer.decode_dtype, "times": times}
