"""Backbones by their kind: the families of this package, and those of a user.

A configuration names a kind, never what to import. An import path comes from the user alone.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from flashar_pl.backbones.base import Backbone
from flashar_pl.backbones.decoder import Decoder
from flashar_pl.backbones.emu35 import Emu35
from flashar_pl.backbones.llamagen import LlamaGen
from flashar_pl.console import closest
from flashar_pl.numerics import without_memory

FAMILIES: dict[str, type[Backbone]] = {each.kind: each for each in (LlamaGen, Emu35, Decoder)}
DEFAULT = LlamaGen.kind
"""Of a configuration that names neither a kind nor a preset."""


def register_backbone(backbone: type[Backbone]) -> type[Backbone]:
    """Let this process read configurations and checkpoints of another backbone, by its `kind`.

    Raises:
        ValueError: another class has this kind.
    """
    if FAMILIES.setdefault(backbone.kind, backbone) is not backbone:
        raise ValueError(f"backbone kind {backbone.kind!r} is taken; expected another name than {', '.join(FAMILIES)}.")
    return backbone


def import_backbone(path: str) -> type[Backbone]:
    """The backbone at an import path such as mine.models.Backbone, registered.

    Raises:
        ValueError: no such module or name, or no concrete backbone.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"backbone class {path!r} cannot be imported: {error}. Expected MODULE.CLASS, its folder on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Backbone)) or found.__abstractmethods__:
        raise ValueError(f"{path} is no backbone; expected a concrete subclass of flashar_pl.backbones.Backbone.")
    return register_backbone(found)


def family(kind: str) -> type[Backbone]:
    """The class of a kind. Raises ValueError for one that this process does not know."""
    if kind not in FAMILIES:
        raise ValueError(
            f"backbone kind is {kind!r}; expected one of {', '.join(FAMILIES)}, or one of your own, named by "
            "--backbone-class or flashar_pl.backbones.register_backbone."
        )
    return FAMILIES[kind]


def presets() -> dict[str, type[Backbone]]:
    """The families of all published sizes, by their names."""
    return {name: each for each in FAMILIES.values() for name in each.published}


def home_of(name: str) -> str | None:
    """Where published weights of this file name are; None = not known."""
    pairs = [pair for each in FAMILIES.values() for pair in each.homes.items()]
    return next((home for pattern, home in pairs if re.fullmatch(pattern, name)), None)


def examples() -> dict[str, dict[str, Any]]:
    """Configurations of tiny backbones, one of each family that has one."""
    return {kind: {"kind": kind, **each.example} for kind, each in FAMILIES.items() if each.example}


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration {"kind": KIND, ...} from one that may name a published size, {"preset": NAME, ...}.

    Raises:
        ValueError: an unknown kind, preset or option; a missing option.
    """
    options = dict(config)
    kind, name = options.pop("kind", None), options.pop("preset", None)
    if name is not None:
        if name not in presets():
            raise ValueError(f"no preset {name!r}; {closest(name, presets())}")
        owner = presets()[name]
        return {"kind": owner.kind, **owner.preset(name, **options)}
    kind = DEFAULT if kind is None else kind
    family(kind).check_options(options)
    return {"kind": kind, **options}


def build_backbone(config: dict[str, Any]) -> Backbone:
    """The backbone that a configuration describes, with new weights. Raises ValueError as `complete` does."""
    options = complete(config)
    owner = family(options.pop("kind"))
    return owner(**options) if owner.config_type is None else owner(owner.config_type(**options))


def describe_backbone(config: dict[str, Any]) -> Backbone:
    """The same without memory for weights: it answers for itself."""
    with without_memory():
        return build_backbone(config)
