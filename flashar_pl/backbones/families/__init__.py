"""Published decoders by `model_type` of their config.json: a table, one short file each."""

from __future__ import annotations

from flashar_pl.backbones.families import chameleon, emu3, janus, llama
from flashar_pl.backbones.families.base import Family, Values
from flashar_pl.console import closest

KNOWN: dict[str, Family] = {
    name: family
    for module in (emu3, janus, chameleon, llama)
    for family in module.FAMILIES
    for name in family.model_types
}


def family_of(config: Values) -> Family:
    """The family of a config.json. Raises ValueError for one that is not known."""
    name = config.get("model_type")
    if name not in KNOWN:
        raise ValueError(f"model_type in config.json is {name!r}; {closest(str(name), KNOWN)}")
    return KNOWN[name]
