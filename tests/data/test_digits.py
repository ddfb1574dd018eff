"""The embedded data set."""

import sys
from pathlib import Path

import numpy as np
import pytest

from flashar_pl.data.digits import load_digits, split_digits, tokenize_digits
from flashar_pl.data.shards import ShardReader, verify


def test_digits_shards(tmp_path: Path) -> None:
    manifest = tokenize_digits(tmp_path / "digits")
    found = verify(tmp_path / "digits")
    assert found.samples == {"train": 1400, "validation": 100, "test": 297}
    assert (manifest.grid, manifest.vocabulary, manifest.crops) == ((8, 8), 17, 1)
    assert manifest.tokenizer == {"kind": "pixels", "levels": 17}
    assert manifest.condition.num_classes == 10
    assert len(manifest.block_sizes("train")) >= 4 * len(manifest.shards("train")) >= 12
    codes, labels = load_digits()
    ids = []
    for split in ("train", "validation", "test"):
        reader = ShardReader(manifest, split)
        got = reader.read(np.arange(len(reader)))
        np.testing.assert_array_equal(got.codes, codes[got.ids])
        np.testing.assert_array_equal(got.labels, labels[got.ids])
        ids += got.ids.tolist()
    assert sorted(ids) == list(range(1797))
    with pytest.raises(ValueError, match="exists; the shards would overwrite it"):
        tokenize_digits(tmp_path / "digits")


def test_splits_are_balanced_shuffled_and_follow_the_seed() -> None:
    _, labels = load_digits()
    parts = split_digits(labels)
    share = np.bincount(labels) / len(labels)
    for part in parts.values():
        assert np.abs(np.bincount(labels[part]) - share * len(part)).max() < 1.5
        runs = (np.diff(labels[part]) == 0).mean()
        assert runs < 0.2, "classes must not stand in a row"
    np.testing.assert_array_equal(parts["test"], split_digits(labels, 0)["test"])
    assert set(parts["test"]) != set(split_digits(labels, 1)["test"])


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'flashar-pl\[demo\]'"):
        tokenize_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []
