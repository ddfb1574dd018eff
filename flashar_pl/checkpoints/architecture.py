"""Whether the weights in a file belong to the architecture of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig

NOT_ARCHITECTURE = {
    "dropout",
    "unconditional_prompt",
    "token_dropout",
    "attn_dropout",
    "resid_dropout",
    "ffn_dropout",
    "condition_dropout",
    "multiple_of",
    "ffn_dim_multiplier",
    "backbone",
}
"""Fields that may differ between a file and the run that starts from it."""


def check_same(what: str, found: dict[str, Any], expected: dict[str, Any], path: str | Path) -> None:
    """ValueError naming the fields in which the config `found` at `path` differs from the `expected` one.

    what: which config, for the message, such as "backbone".
    """
    found, expected = _resolved(found), _resolved(expected)
    different = [
        f"{key} {found.get(key)!r} (this run: {expected.get(key)!r})"
        for key in sorted(found.keys() | expected.keys())
        if key not in NOT_ARCHITECTURE and found.get(key) != expected.get(key)
    ]
    if different:
        raise ValueError(f"{path} holds another {what}: {'; '.join(different)}.")


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    """The config with defaults and derived sizes filled in, so that equal models compare equal."""
    if config.get("kind") != LlamaGen.kind:
        return config
    values = LlamaGenConfig(**{key: value for key, value in config.items() if key != "kind"})
    unused = ("caption_dim", "caption_positions") if values.condition == "class" else ("num_classes",)
    resolved = {
        **config,
        **asdict(values),
        "ffn_dim": values.feed_forward_dim,
        "n_kv_head": values.n_kv_head or values.n_head,
    }
    return {key: value for key, value in resolved.items() if key not in unused}
