"""How the commands decode: the runner, and the format of the weights.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from flashar_pl.decoding import Engine
    from flashar_pl.models import GridModel

Runner = Literal["auto", "eager", "compiled", "graphs", "compiled-graphs"]
"""Those of `flashar_pl.decoding.RUNNERS`."""
WeightFormat = Literal["plain", "packed", "int8", "fp8"]
"""Those of `flashar_pl.decoding.prepare`."""


def build_engine(model: GridModel, runner: Runner = "auto", weight_format: WeightFormat = "plain") -> Engine:
    """An engine of a model for inference. Raises ValueError where the device cannot run it."""
    from flashar_pl.decoding import Engine

    return Engine(prepare_weights(model, weight_format), runner)


def prepare_weights(model: GridModel, weight_format: WeightFormat) -> GridModel:
    """The model itself ("plain"), or a copy with weights in another format."""
    if weight_format == "plain":
        return model
    from flashar_pl.decoding.prepare import prepare

    return prepare(model, weight_format)


def parse_variants(runners: str, weight_formats: str) -> list[tuple[Runner, WeightFormat]]:
    """Every combination of runners and formats of weights, each a list separated by commas. Raises ValueError."""
    found = []
    for name, text, known in (("runner", runners, Runner), ("weight_format", weight_formats, WeightFormat)):
        words = list(dict.fromkeys(word.strip() for word in text.split(",")))
        for word in words:
            if word not in get_args(known):
                expected = ", ".join(get_args(known))
                raise ValueError(f"{name} is {word!r}; expected one of {expected}, or several separated by commas.")
        found.append(words)
    return [(runner, weights) for weights in found[1] for runner in found[0]]  # type: ignore[misc]
