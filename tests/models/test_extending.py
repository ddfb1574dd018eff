"""docs/extending.md, run as it is written: a backbone that this package has never seen."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashar_pl.backbones import LlamaGen, build_backbone, register_backbone, registry
from flashar_pl.checkpoints.weights import load_model

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    known = dict(registry.FAMILIES)
    yield
    registry.FAMILIES.clear()
    registry.FAMILIES.update(known)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    assert names["codes"].shape == (2, 6, 8)
    assert names["losses"][-1] < names["losses"][0] - 0.5
    model, again = names["model"].eval(), names["again"]
    with torch.no_grad():
        logits = [each.double()(names["codes"], names["classes"]).fused for each in (model, again)]
    torch.testing.assert_close(*logits)
    registry.FAMILIES.pop("mine")
    with pytest.raises(ValueError, match=r"backbone kind is 'mine'.*register_backbone"):
        load_model("mine")


def test_a_kind_has_one_meaning() -> None:
    class Other(LlamaGen):
        kind = "other"

    assert register_backbone(register_backbone(Other)) is Other
    Other.kind = "llamagen"
    with pytest.raises(ValueError, match="'llamagen' is taken"):
        register_backbone(Other)
    with pytest.raises(ValueError, match="expected one of llamagen, emu35"):
        build_backbone({"kind": "gpt"})
