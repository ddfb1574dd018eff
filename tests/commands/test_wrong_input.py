"""Mistakes on the command line that once were a traceback, an unclear message, or nothing at all."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from flashar_pl import console, files


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", "18"], "top_k is 18; expected 0 (off) to 17"),
        (["--device", "tpu"], "device is 'tpu'; expected auto, cpu, cuda, cuda:N or mps"),
        (["--device", "mps"], "built without Apple's GPUs (Metal); use --device cpu"),
        (["--n-head", "3"], "--n-head is for official files of unpublished sizes"),
        (["--grid", "1000x1000"], "1,000,000 codes; expected at most 65,536"),
        (["--seed", "99999999999999999999"], "seed is 99999999999999999999; expected a whole number of 64 bits"),
    ],
)
def test_generate_says_what_is_wrong(words, message, refused, flashar_model, work):
    assert message in refused("generate", "--checkpoint", flashar_model, "--classes", "3", *words, "--out", "samples")
    assert not Path("samples").exists()


def test_damaged_files_and_wrong_kinds_are_said_in_plain_words(refused, flashar_model, work):
    """Guards torch's messages about archives and opcodes, and a tokenizer error that names no file."""
    whole = Path(flashar_model, "model.safetensors").read_bytes()
    Path("text.pt").write_text("hello")
    torch.save({"a": torch.zeros(1000)}, "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:1000])
    assert "cut.pt is damaged or cut off" in refused("convert", "cut.pt", "--out", "model")
    assert "it is no torch file, or a part of one" in refused("convert", "text.pt", "--out", "model")
    words = ("generate", "--checkpoint", flashar_model, "--classes", "3", "--tokenizer", "vq16:whole.pt", "--out", "s")
    assert "error: whole.pt: " in refused(*words)
    assert Path(flashar_model, "model.safetensors").read_bytes() == whole


def test_a_tokenizer_that_is_not_there_is_said(run, flashar_model, work):
    code, _, err = run("convert", flashar_model, "--tokenizer", "vq16:nowhere.pt", "--out", "model")
    assert code == 0
    assert "note: nothing is at nowhere.pt now" in err


def test_another_grid_and_an_idle_option_are_said(run, flashar_model, work):
    code, _, err = run(
        *("generate", "--checkpoint", flashar_model, "--classes", 3, "--num-images", 1, "--grid", "4x6"),
        *("--cfg-interval", 3, "--out", "samples"),
    )
    assert code == 0, err
    assert "note: drawn on 4x6 codes; the model was trained on 8x8" in err
    assert "note: --cfg-interval does nothing without guidance" in err
    assert json.loads(Path("samples/settings.json").read_text())["settings"]["grid"] == [4, 6]
    assert min(Image.open("samples/grid.png").size) == 64


def test_an_output_that_cannot_be_written_is_refused_before_the_work(refused, flashar_model, shards, work):
    """Guards scores that are computed and then lost."""
    Path("file").write_text("")
    for out in ("file/scores.json", "/proc/scores.json"):
        message = refused("score", "--checkpoint", flashar_model, "--data", shards, "--out", out)
        assert f"the scores cannot be written to {out}" in message
    assert files.require_new("new folder/deeper/scores.json", "scores") == Path("new folder/deeper/scores.json")
    assert not Path("new folder").exists()


def test_progress_is_said_where_there_is_no_terminal(capsys, monkeypatch):
    """Guards long commands that write nothing into a log until they end."""
    monkeypatch.setattr(console, "LINE_EVERY", -1.0)
    with console.progress_bar(3, "steps") as advance:
        advance(1)
        advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("1 of 3 steps, ")
