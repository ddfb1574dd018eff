"""NaN and infinity never pass as results: work stops, names them, and writes nothing."""

import math
from pathlib import Path

import pytest
import torch
from command_toys import tiny_backbone

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import save_model
from flashar_pl.files import write_json
from flashar_pl.metrics.classifier import ClassifierFeatures
from flashar_pl.metrics.extractor import extract_features
from flashar_pl.models import RasterAR


@pytest.fixture
def broken_model(work: Path) -> str:
    model = RasterAR(tiny_backbone())
    with torch.no_grad():
        next(model.parameters())[3, 0] = math.nan  # one code's embedding: images without that code are unharmed
    note = Description(model.config(), grid=(8, 8), tokenizer={"kind": "pixels", "levels": 17})
    save_model(work / "broken", model, note)
    return "broken"


def test_score_of_a_broken_model(refused, broken_model, shards) -> None:
    said = refused("score", "--checkpoint", broken_model, "--data", shards, "--limit", 40, "--out", "score.json")
    assert "the raster likelihood of image 37 of the split is nan; the model's weights are broken" in said
    assert not Path("score.json").exists()


def test_json_holds_finite_numbers_only(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"fid": 1.0})
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"result\.json cannot be written: rows\.1\.fid is {value}; JSON holds"):
            write_json(path, {"rows": [{"fid": 2.0}, {"fid": value}]})
    assert path.read_text() == '{\n  "fid": 1.0\n}\n'


def test_features_of_a_broken_classifier() -> None:
    classifier = ClassifierFeatures((8, 8), 4)
    with torch.no_grad():
        next(classifier.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="features of ClassifierFeatures are NaN or infinite; its weights are broken"):
        extract_features(classifier, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
