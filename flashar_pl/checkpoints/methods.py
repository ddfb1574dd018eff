"""Which method a state dict belongs to, told by names that no other has."""

from __future__ import annotations

from collections.abc import Iterable

LLAMAGEN, NAR = "LlamaGen", "NAR or LlamaGen-FlashAR"
MARKS = {
    "PAR": "spe_tok_embeddings.",
    "BlockDiffusion": "t_embedder.",
    NAR: "medusa_output.",
    "VAR": "word_embed.",
    "multi-scale VQ (VAR's tokenizer)": "quantize.quant_resi.",
    "VQ or IBQ tokenizer": "quant_conv.",
    "FlashAR (of flashar-pl)": "dual_head.",
    "PAR (of flashar-pl)": "learnable.",
    "BlockDiffusion (of flashar-pl)": "time.",
    "VAR (of flashar-pl)": "backbone.word_embed.",
    "raster (of flashar-pl)": "backbone.blocks.",
    "Emu3.5": "model.embed_tokens.",
    "Hugging Face": "embed_tokens.",
    LLAMAGEN: "cls_embedding.",
}
"""Method -> begin of a name; the first that is found counts."""


def method_of(keys: Iterable[str]) -> str | None:
    """The method whose weights have these names, after what wrappers leave behind is gone; None = not known."""
    names = list(keys)
    return next((method for method, mark in MARKS.items() if any(name.startswith(mark) for name in names)), None)


def check_method(keys: Iterable[str], expected: str, unknown: bool = False) -> None:
    """ValueError that names the method found, unless that is `expected`, or with `unknown` none."""
    names = list(keys)
    found = method_of(names)
    if found == expected or (unknown and found is None):
        return
    if found is None:
        example = f" (names such as {', '.join(sorted(names)[:2])})" if names else ", it is empty"
        raise ValueError(f"not a {expected} checkpoint{example}; expected names such as {MARKS[expected]}*.")
    raise ValueError(f"the checkpoint holds {found} weights; expected {expected}.")
