"""`flashar score formats` compares formats of weights on held-out images."""

from __future__ import annotations

import copy
import importlib.util
import json
import weakref
from pathlib import Path

import pytest
import torch

from flashar_pl.layers.packed import unsupported

needs_packing = pytest.mark.skipif(unsupported(torch.float32) is not None, reason="torch without oneDNN")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@needs_packing
def test_packed_weights_change_nothing_and_plain_nll_is_that_of_score(
    run, flashar_model, shards, tmp_path: Path
) -> None:
    """Guards padding (5 images in batches of 4), seeds, and the cross entropy, against `flashar score`."""
    base = ("--checkpoint", flashar_model, "--data", shards, "--limit", 5, "--batch-size", 4)
    out = tmp_path / "formats.json"
    code, printed, err = run("score", "formats", *base, "--formats", "packed", "--cfg-scale", 2, "--out", out)
    assert code == 0, err
    assert "| packed" in printed
    result = json.loads(out.read_text())
    plain, packed = result["rows"]
    assert result["images"] == 5
    assert [packed[name] for name in ("same_first", "same_greedy", "same_drawn")] == [1, 1, 1]
    assert abs(packed["nll_change"]) < 1e-3
    assert packed["bytes"] == plain["bytes"]
    expected = json.loads(run("score", *base)[1])["nll_nats_per_image"]
    assert plain["nll"] == pytest.approx(expected, rel=1e-5)


@needs_torchao
def test_quantised_weights_differ_a_little_and_are_smaller(run, flashar_model, shards, tmp_path: Path) -> None:
    """Guards a report of the plain weights under another name."""
    out = tmp_path / "formats.json"
    words = ("--limit", 4, "--formats", "int8,fp8", "--out", out)
    code, _, err = run("score", "formats", "--checkpoint", flashar_model, "--data", shards, *words)
    assert code == 0, err
    plain, *others = json.loads(out.read_text())["rows"]
    assert [row["format"] for row in others] == ["int8", "fp8"]
    for row in others:
        assert row["bytes"] < plain["bytes"]
        assert row["nll_change"] != 0
        assert 0.1 < row["same_first"] < 1 or row["format"] == "int8"


def test_one_copy_of_the_weights_at_a_time(run, flashar_model, shards, monkeypatch) -> None:
    """Guards memory: beside the plain weights stands one copy, not the last one too."""
    copies: list[weakref.ref] = []

    def prepared(model, name):
        assert all(each() is None for each in copies)
        made = copy.deepcopy(model)
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr("flashar_pl.decoding.prepare.prepare", prepared)
    words = ("--limit", 2, "--formats", "int8,fp8")
    code, _, err = run("score", "formats", "--checkpoint", flashar_model, "--data", shards, *words)
    assert code == 0, err
    assert len(copies) == 2


def test_bad_input(refused, flashar_model, shards) -> None:
    """Guards messages."""
    base = ("score", "formats", "--checkpoint", flashar_model, "--data", shards)
    assert "expected one of packed, int8, fp8" in refused(*base, "--formats", "plain")
    assert "expected 1 or more" in refused(*base, "--limit", 0)
    assert "manifest.json" in refused(*base[:-1], "nowhere")
