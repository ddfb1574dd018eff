"""Chameleon (Meta, 2024), Anole and Lumina-mGPT: codes are tokens in any order; each head's query and key are normed.

Lumina-mGPT tells the size and ends rows with a token. Its files have Chameleon's model_type and are told apart by
`architectures`.
"""

from __future__ import annotations

from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.families.base import Family, Values, code_settings, text_settings
from flashar_pl.templates import Template

DEFAULTS = {
    "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
CODE, IMAGE_BEGIN = "IMGIMG", "<racm3:break>"
"""Names in `vocabulary_map`; that of code 12 is IMGIMGBCZ: its digits as letters A to J, then Z."""
START, TURN, ROW_END = "<s>", "<reserved08706>", "<reserved08799>"
SIZE_UNIT = 32
"""Pixels of which Lumina-mGPT counts the sides; n of them are the token <reserved08800 + n>."""
LUMINA: Values = {"usual_grid": (48, 48), "cfg_scale": 4.0, "unconditional_prompt": ()}
DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def read_chameleon(values: Values) -> DecoderConfig:
    """Codes from `vocabulary_map`, unless config.json has `visual_token_offset`; `swin_norm` puts norms afterwards."""
    names = values.get("vocabulary_map") or {}
    codes = {int(name[len(CODE) : -1].translate(DIGITS)): id for name, id in names.items() if name.startswith(CODE)}
    return DecoderConfig(
        **text_settings(values, "chameleon", DEFAULTS),
        **{"boi_token_id": names.get(IMAGE_BEGIN), **code_settings(values, codes)},
        qk_norm="layer",
        norm_place="after" if values.get("swin_norm") else "before",
    )


def read_lumina(values: Values) -> DecoderConfig:
    """The same, and the row end."""
    row_end = (values.get("vocabulary_map") or {}).get(ROW_END)
    return read_chameleon({"eol_token_id": row_end, **values})


def prompt(text: str, height: int, width: int) -> str:
    """The text alone."""
    return f"{START}{text}"


def image(height: int, width: int) -> str:
    """The size is not told."""
    return IMAGE_BEGIN


def lumina_prompt(text: str, height: int, width: int) -> str:
    """The question that Lumina-mGPT was trained to answer with an image."""
    size = f"{width * 16}x{height * 16}"
    return f"{START}Generate an image of {size} according to the following prompt:\n{text}{TURN}"


def lumina_image(height: int, width: int) -> str:
    """The size in tokens of their own. Raises ValueError for one that has none."""
    sides = [side * 16 / SIZE_UNIT for side in (height, width)]
    if not all(side.is_integer() for side in sides):
        raise ValueError(f"grid is {height}x{width}; Lumina-mGPT draws even numbers of codes, such as 48x48.")
    return IMAGE_BEGIN + "".join(f"<reserved{8800 + int(side):05d}>" for side in sides)


FAMILIES = (
    Family(
        ("chameleon",),
        read_chameleon,
        template=Template(prompt, image, (START, IMAGE_BEGIN)),
        usual={"usual_grid": (32, 32)},
    ),
    Family(
        ("lumina_mgpt",),
        read_lumina,
        architectures=("ChameleonXLLMXForConditionalGeneration",),
        template=Template(lumina_prompt, lumina_image, (START, TURN, IMAGE_BEGIN), null=""),
        usual=LUMINA,
        published={
            "lumina-mgpt-7b": DecoderConfig(
                **text_settings({}, "lumina_mgpt", DEFAULTS), qk_norm="layer", visual_token_offset=4,
                num_visual_codes=8192, boi_token_id=8197, eol_token_id=8803, model_type="lumina_mgpt", **LUMINA,
            ),
        },
    ),
)  # fmt: skip
