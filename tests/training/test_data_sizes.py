"""Sizes of a model that its shards give."""

from pathlib import Path

import pytest

from flashar_pl.training.data_sizes import with_data_sizes
from flashar_pl.training.words import Words

OPTIONS = "model.backbone.options"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    from flashar_pl.data.digits import tokenize_digits

    path = tmp_path_factory.mktemp("sizes") / "digits"
    tokenize_digits(path)
    return str(path)


def sizes(tmp_path: Path, yaml: str, *words: str) -> tuple[object, object]:
    (tmp_path / "c.yaml").write_text(yaml)
    found = with_data_sizes(Words.read(["--config", str(tmp_path / "c.yaml"), *words]))
    return found.given(f"{OPTIONS}.vocab_size"), found.given(f"{OPTIONS}.num_classes")


def test_missing_sizes_are_those_of_the_shards_and_given_ones_win(tmp_path, shards):
    yaml = "model: {backbone: {options: {dim: 64}}}\n"
    assert sizes(tmp_path, yaml, "--data.shards", shards) == (17, 10)
    assert sizes(tmp_path, f"{yaml}data: {{class_path: CodesDataModule, init_args: {{shards: {shards}}}}}") == (17, 10)
    given = f"model: {{backbone: {{options: {{dim: 64, num_classes: 12}}}}}}\ndata: {{shards: {shards}}}\n"
    assert sizes(tmp_path, given) == (17, 12)
    assert sizes(tmp_path, given, f"--{OPTIONS}.vocab_size", "20") == (20, 12)


def test_published_models_and_missing_shards_are_left_alone(tmp_path, shards):
    assert sizes(tmp_path, "model: {backbone: {preset: llamagen-b}}", "--data.shards", shards) == (None, None)
    assert sizes(tmp_path, "model: {backbone: {kind: emu35}}", "--data.shards", shards) == (None, None)
    assert sizes(tmp_path, "model: {backbone: {options: {dim: 64}}}", "--data.shards", "nowhere") == (None, None)
