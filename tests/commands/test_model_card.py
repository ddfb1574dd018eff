"""The model card that `flashar convert` writes, with and without an evaluation."""

import json
from pathlib import Path

import torch
from command_toys import tiny_backbone
from evaluate_toys import evaluation, save_classifier

from flashar_pl.checkpoints.weights import load_model
from flashar_pl.models import FlashAR


def test_an_exported_directory_says_what_it_is_and_what_to_fill_in(run, work, flashar_model):
    assert run("convert", flashar_model, "--out", "ours")[0] == 0
    assert sorted(p.name for p in Path("ours").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = Path("ours/README.md").read_text()
    total = sum(p.numel() for p in load_model(flashar_model).model.parameters())
    assert f"| parameters | {total:,} |" in card
    assert "| branch_layer | 1 |" in card
    assert "| grid | 8 x 8 codes |" in card
    assert "| backbone num_classes | 10 |" in card
    assert "license: FILL IN" in card
    assert card.count("FILL IN |") == 4
    assert "FlashAR.from_pretrained(DIRECTORY)" in card
    assert "FILL IN: not measured yet" in card
    assert type(FlashAR.from_pretrained("ours")) is FlashAR


def test_metrics_and_how_they_were_measured(run, refused, work, flashar_model, raster_model, shards, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    words = evaluation(flashar_model, shards, save_classifier(work / "classifier"))
    assert run(*words, "--cfg-scale", 1.5, "--metrics", "fid,is", "--out", "eval")[0] == 0
    report = json.loads(Path("eval/evaluation.json").read_text())
    assert run("convert", flashar_model, "--out", "ours", "--report", "eval/evaluation.json")[0] == 0
    card = Path("ours/README.md").read_text()
    assert f"| fid | {report['metrics']['fid']:.6g} |" in card
    assert "| cfg_scale | 1.5 |" in card
    assert f"| checkpoint_sha256 | {report['samples']['checkpoint_sha256']} |" in card
    assert '"split": "test"' in card
    assert str(work) not in card
    base = ("convert", raster_model, "--out", "more", "--report")
    assert "measured on another model" in refused(*base, "eval/evaluation.json")
    assert "no report at nothing.json" in refused(*base, "nothing.json")
    Path("other.json").write_text('{"command": "score"}')
    assert "no report of flashar evaluate" in refused(*base, "other.json")
    Path("broken.json").write_text("{")
    assert "is not JSON" in refused(*base, "broken.json")
    assert "--to official does not write" in refused(*base, "eval/evaluation.json", "--to", "official")
    assert not Path("more").exists()


def test_the_run_that_wrote_the_weights_is_shown(run, work):
    from flashar_pl.checkpoints.description import Description
    from flashar_pl.checkpoints.weights import save_model
    from flashar_pl.models import RasterAR

    model = RasterAR(tiny_backbone())
    save_model("trained", model, Description(model.config(), training={"step": 1234, "stage": 2}))
    assert run("convert", "trained", "--out", "ours")[0] == 0
    card = Path("ours/README.md").read_text()
    assert '"step": 1234' in card
    assert "| grid | not known |" in card
    torch.save({"model": tiny_backbone(condition="text", caption_dim=12).to_official()}, "t2i.pt")
    assert run("convert", "t2i.pt", "--n-head", 2, "--out", "text")[0] == 0
    assert "--text-features captions.npz" in Path("text/README.md").read_text()
