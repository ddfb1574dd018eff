"""Published decoders by what their config.json says: a table, one short file each."""

from __future__ import annotations

from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.families import chameleon, emu3, glm_image, janus, llama, mammothmoda2, x_omni
from flashar_pl.backbones.families.base import Family, Values

KNOWN: dict[str, Family] = {}
"""By `model_type`."""
ARCHITECTURES: dict[str, Family] = {}
"""By the first of `architectures`, which wins."""
PRESETS: dict[str, DecoderConfig] = {}
"""Published sizes, for measurements with random weights. A checkpoint is read with its own config.json."""
NOT_THESE = {
    "multi_modality": "it is Janus as its authors saved it; use the transformers version, such as Janus-Pro-1B-hf",
    "mammothmoda2_qwen3_vl": "its published code has not been followed; MammothModa2-Preview is read",
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "1 is added to its norms' weights, and embeddings are scaled"),
    "granite": "its embeddings, residual branches, attention and logits are scaled",
    "minicpm": "its embeddings, residual branches and logits are scaled",
    "smollm3": "some of its layers have no RoPE",
}
"""Models whose model_type is known to be none of these families, though some have tensors of Llama's names, and why."""


def register_family(family: Family) -> Family:
    """Let this process read another family. Raises ValueError where one of its names is taken."""
    for table, names in ((KNOWN, family.model_types), (ARCHITECTURES, family.architectures)):
        for name in names:
            if table.setdefault(name, family) is not family:
                raise ValueError(f"a family {name!r} is known already; expected another name.")
    PRESETS.update(family.published)
    return family


for _module in (emu3, janus, chameleon, glm_image, mammothmoda2, x_omni, llama):
    for _family in _module.FAMILIES:
        register_family(_family)


def find_family(values: Values) -> Family | None:
    """The family of a config.json; None = not known."""
    stated = values.get("architectures")
    first = stated[0] if isinstance(stated, list | tuple) and stated else None
    return ARCHITECTURES.get(str(first)) or KNOWN.get(str(values.get("model_type")))
