"""Somebody's pictures: which go to which split."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from own_pictures import make_pictures
from PIL import Image

from flashar_pl.data.pictures import assign, split_pictures


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("own") / "photos", each=10)


def test_equal_files_are_never_in_two_splits():
    """Guards against held-out images that the model was trained on: people have copies, in two classes too."""
    hashes = [f"{i % 40:03d}" for i in range(120)]
    labels = [i % 3 for i in range(120)]
    splits = assign(hashes, labels, ("validation", "test"))
    assert all(len({splits[i], splits[i + 40], splits[i + 80]}) == 1 for i in range(40))
    assert [int((splits == name).sum()) for name in ("train", "validation", "test")] == [108, 6, 6]


def test_splits_are_spread_over_the_classes_and_a_rare_one_stays_in_training():
    hashes = [f"{i:03d}" for i in range(202)]
    labels = [0] * 100 + [1] * 100 + [2, 3]
    splits = assign(hashes, labels, ("validation", "test"))
    assert splits[200:].tolist() == ["train", "train"]
    for split in ("validation", "test"):
        assert abs(int((splits[:100] == split).sum()) - 5) <= 1
    backwards = assign(hashes[::-1], labels[::-1], ("validation", "test"))
    assert backwards[::-1].tolist() == splits.tolist(), "depends on the order of the files"


def test_a_folder_is_cut_by_content_not_by_name(photos, tmp_path):
    splits, how = split_pictures(photos)
    assert how == "26 train, 2 validation, 2 test (by content)"
    assert splits["train"].class_names == ("bee", "cup", "owl")
    assert splits["train"].account.left_out == {"hidden": 1, "not named as an image": 1, "in other splits": 4}
    held_out = {splits["test"].read(i)[0] for i in range(2)}
    for path in sorted(photos.glob("*/*")):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name / f"renamed{path.name}")
    renamed = split_pictures(tmp_path)[0]["test"]
    assert {renamed.read(i)[0] for i in range(2)} == held_out


def test_given_splits_are_taken_and_missing_ones_cut_from_train(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "train")
    (tmp_path / "val").mkdir()
    shutil.move(tmp_path / "train" / "cup", tmp_path / "val" / "cup")
    shutil.copytree(tmp_path / "val" / "cup", tmp_path / "train" / "cup")
    splits, how = split_pictures(tmp_path)
    assert how == "28 train, 10 validation, 2 test (as the folders, test cut from train by content)"
    assert splits["validation"].read(0)[1] == 1, "a class has another number there"
    (tmp_path / "val" / "cup").rename(tmp_path / "val" / "yak")
    with pytest.raises(ValueError, match="folders that the training pictures lack: yak"):
        split_pictures(tmp_path)


def test_pictures_without_classes_are_one(photos):
    splits, _ = split_pictures(photos / "bee")
    assert (splits["train"].class_names, splits["train"].condition.num_classes) == (("bee",), 1)
    splits, _ = split_pictures(photos, one_class=True)
    assert splits["train"].class_names == ("photos",)
    assert sum(map(len, splits.values())) == 30


def test_what_cannot_be_split_is_said(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        split_pictures(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no pictures"):
        split_pictures(tmp_path)
    (tmp_path / "two").mkdir()
    for name, colour in (("0", 1), ("1", 2), ("copy", 1)):
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(tmp_path / "two" / f"{name}.png")
    with pytest.raises(ValueError, match="two holds 3 pictures: 2 different ones; expected 3 or more, for train"):
        split_pictures(tmp_path / "two")
    assert np.unique(assign(["a", "b", "c"], [0, 0, 0], ("validation", "test"))).tolist() == [
        "test", "train", "validation",
    ]  # fmt: skip
