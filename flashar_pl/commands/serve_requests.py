"""What may be asked of a server: the JSON of a request, checked, as conditions and settings of a model."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Any

from flashar_pl.checkpoints.opening import Source, check_top_k
from flashar_pl.commands.serve_worker import Request
from flashar_pl.console import versions
from flashar_pl.decoding.prompts import Wanted, ask, is_emu
from flashar_pl.options import Subject, TextOptions

if TYPE_CHECKING:
    from flashar_pl.sampling import SamplingSettings

NUMBER = ((int, float), "a number")
SAMPLING: dict[str, tuple[tuple[type, ...], str]] = {
    "cfg_scale": NUMBER, "cfg_interval": ((int, NoneType), "a whole number or null"), "temperature": NUMBER,
    "top_k": ((int,), "a whole number"), "top_p": NUMBER, "greedy": ((bool,), "true or false"),
}  # fmt: skip
"""Types of the sampling options, and their names."""
LARGEST = 2**31
"""Numbers are smaller: an integer of any length is legal JSON, and no float or tensor holds it."""
LONGEST = 4096
"""Bytes of a prompt: a longer one would take the memory that the images of all who wait need."""
IGNORED = ("model", "user")
"""What clients of OpenAI's API send and nothing here depends on."""


@dataclass(frozen=True)
class Service:
    """What requests may ask of one checkpoint."""

    source: Source
    grid: tuple[int, int]
    plan: str
    """Where a request does not say it."""
    settings: SamplingSettings
    """Likewise."""
    most: int
    """Images of one request."""
    assets: str | None
    """Directory with the vocabulary of prompts."""

    def __post_init__(self) -> None:
        backbone = self.source.model.backbone.config_dict()
        if backbone.get("condition", "class") != "class":
            raise ValueError(
                f"{self.source.path} takes text features, which no request can hold; use flashar generate."
            )

    @property
    def by_class(self) -> bool:
        """Whether images are asked for by class; otherwise by prompt."""
        return not is_emu(self.source)

    @property
    def plans(self) -> tuple[str, ...]:
        """Those that the model can run."""
        return ("diagonal", "raster") if self.source.model.dual_head.vertical is not None else ("raster",)

    def facts(self) -> dict[str, Any]:
        """For the page and for clients."""
        return {
            "checkpoint": self.source.path,
            "conditions": "class" if self.by_class else "prompt",
            "classes": self.source.model.backbone.config_dict()["num_classes"] if self.by_class else None,
            "grid": list(self.grid),
            "plans": {name: self.source.model.make_plan(name, *self.grid).n_steps for name in self.plans},
            "defaults": {"plan": self.plan, **asdict(self.settings)},
            "most_images": self.most,
            "versions": versions(),
        }

    def example(self) -> dict[str, Any]:
        """A request that draws something."""
        return {"class": 0} if self.by_class else {"prompt": "a photograph of a lighthouse on a cliff at sunset"}

    def ask(self, body: dict[str, Any], n: int, guided: bool) -> Wanted:
        """Conditions of n images. Raises ValueError where the model wants another kind."""
        expected, other = ("class", "prompt") if self.by_class else ("prompt", "class")
        if body.get(other) is not None or body.get(expected) is None:
            raise ValueError(f'this model is asked by "{expected}"; got {json.dumps(body)[:200]}.')
        value = body[expected]
        if self.by_class:
            if type(value) is not int or not 0 <= value < LARGEST:
                raise ValueError(f'"class" is {value!r}; expected a whole number of at least 0.')
            if body.get("negative_prompt") is not None:
                raise ValueError('"negative_prompt" is for models that are asked by "prompt"; leave it out.')
            return ask(self.source, self.grid, n, guided, Subject(classes=[value]))
        for key in ("prompt", "negative_prompt"):
            given = body.get(key)
            if given is not None and (not isinstance(given, str) or len(given.encode()) > LONGEST):
                raise ValueError(f'"{key}" is {str(given)[:60]!r}; expected text of at most {LONGEST} bytes.')
        text = TextOptions(self.assets, negative_prompt=body.get("negative_prompt"))
        return ask(self.source, self.grid, n, guided, Subject(prompt=[value]), text)

    def request(self, body: dict[str, Any]) -> Request:
        """What the JSON of a request asks for. Raises ValueError where it is wrong."""
        known = ("prompt", "class", "negative_prompt", "n", "seed", "plan", "response_format", *SAMPLING, *IGNORED)
        unknown = [key for key in body if key not in known]
        if unknown:
            raise ValueError(f'no field "{unknown[0]}"; expected some of {", ".join(known)}.')
        if body.get("response_format", "b64_json") != "b64_json":
            raise ValueError(f'"response_format" is {body["response_format"]!r}; expected "b64_json".')
        n, seed = body.get("n", 1), body.get("seed")
        seed = random.randrange(2**31) if seed is None else seed
        if type(n) is not int or not 1 <= n <= self.most:
            raise ValueError(f'"n" is {n!r}; expected 1 to {self.most}.')
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f'"seed" is {seed!r}; expected a whole number of at least 0 and below 2^63.')
        plan = self.plan if body.get("plan") is None else body["plan"]
        if plan not in self.plans:
            raise ValueError(f'"plan" is {plan!r}; expected one of {", ".join(self.plans)}.')
        given = {key: body[key] for key in SAMPLING if key in body}
        for key, value in given.items():
            kinds, expected = SAMPLING[key]
            if type(value) not in kinds or not abs(value or 0) < LARGEST:  # so written, NaN is refused too
                raise ValueError(f'"{key}" is {value!r}; expected {expected}.')
        settings = replace(self.settings, **given)
        check_top_k(self.source.model, settings.top_k)
        wanted = self.ask(body, n, settings.guided)
        return Request(wanted.condition, wanted.unconditional, plan, settings, [seed + i for i in range(n)])
