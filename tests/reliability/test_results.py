"""Files behind results answer every damaged copy with values or one line: GenEval's entries, references."""

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from flashar_pl.decoding.prompts import read_text_features
from flashar_pl.decoding.samples import Drawn
from flashar_pl.evaluate.parts import PartFolder
from flashar_pl.metrics.classifier import CONFIG_FILE, ClassifierFeatures
from flashar_pl.metrics.extractor import Features
from flashar_pl.metrics.geneval import score_image
from flashar_pl.metrics.geneval_entries import read_entries
from flashar_pl.metrics.reference import load_reference
from tests.reliability.containers import inside_zip
from tests.reliability.mutate import Target, short

DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 2, "color": "red"}
ENTRIES = [
    {"tag": "colors", "include": [DOG, CAT], "prompt": "a dog and two red cats"},
    {"tag": "position", "include": [DOG, {**CAT, "position": ["left of", 0]}], "prompt": "two red cats left of a dog"},
    {"tag": "counting", "include": [CAT], "exclude": [{**DOG, "count": 3}], "prompt": "no dogs"},
]


def read_and_score(data: bytes) -> None:
    """An entry that was read can be scored: what is wrong with it must be found in reading."""
    entries = read_entries("it.jsonl", data)
    try:
        for entry in entries:
            score_image({}, entry, lambda name, found: ["red"] * len(found))
    except ValueError as error:
        raise AssertionError("an entry that was read cannot be scored") from error


def read_reference(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        Path(file.name).write_bytes(data)
        load_reference(file.name)


def moments() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(3), sigma=np.eye(3), n=9, features=np.ones((4, 3), np.float32))
    return buffer.getvalue()


def read_features(ending: str) -> Callable[[bytes], object]:
    def read(data: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=f".{ending}") as file:
            Path(file.name).write_bytes(data)
            read_text_features(file.name)

    return read


def feature_files() -> dict[str, list[bytes]]:
    features, mask = np.ones((2, 3, 4), np.float32), np.array([[0, 1, 1], [1, 1, 1]], bool)
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, features)
    np.savez(npz, features=features, mask=mask)
    tensors = {"features": torch.from_numpy(features), "mask": torch.from_numpy(mask)}
    return {"npy": [npy.getvalue()], "npz": [npz.getvalue()], "safetensors": [save(tensors)]}


def classifier() -> bytes:
    ClassifierFeatures((4, 4), 2, 3).save(FOLDER / "classifier")
    return (FOLDER / "classifier" / CONFIG_FILE).read_bytes()


def read_classifier(data: bytes) -> None:
    """Weights that a configuration does not fit."""
    (FOLDER / "classifier" / CONFIG_FILE).write_bytes(data)
    ClassifierFeatures.load(FOLDER / "classifier")


FOLDER = Path(tempfile.mkdtemp())
FEATURES = feature_files()
CLASSIFIER = classifier()
TARGETS = [
    Target("geneval", read_and_score, ["\n".join(map(json.dumps, ENTRIES)).encode()]),
    Target("reference", read_reference, [moments()]),
    *(
        Target(f"reference, {name}", *inside_zip(moments(), name, read_reference))
        for name in ("mu.npy", "features.npy")
    ),
    *(Target(f"text features, {name}", read_features(name), good) for name, good in FEATURES.items()),
    Target("classifier", read_classifier, [CLASSIFIER]),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_are_read_or_refused(target):
    short(target, 150)


@pytest.mark.parametrize(
    "sizes", [{"poolings": 10**9}, {"num_features": 10**12}, {"image_size": [10**6, 10**6]}], ids=str
)
def test_sizes_of_a_classifier_are_compared_before_memory_is_asked_for(sizes):
    """A billion poolings were built one by one until the memory was gone."""
    with pytest.raises(ValueError, match="classifier"):
        read_classifier(json.dumps(json.loads(CLASSIFIER) | sizes).encode())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_damaged_part_of_an_evaluation_is_drawn_again(tmp_path):
    """Only its header was read: flipped features went into the distance without a word."""
    folder = PartFolder(tmp_path / "e")
    folder.open({"seed": 0}, 1)
    features = Features(torch.ones(2, 3))
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    folder.write(Drawn(0, torch.arange(2), torch.zeros(2, 4, 4, dtype=torch.int64), images, features), images=True)
    assert folder.has(0)
    flip(folder.file(0), -1)
    assert not folder.has(0)
    with pytest.raises(ValueError, match="is damaged"):
        folder.read(0)


def test_a_damaged_classifier_is_refused(tmp_path):
    folder = ClassifierFeatures((4, 4), 2, 3).save(tmp_path / "c")
    flip(folder / "classifier.safetensors", -2)
    with pytest.raises(ValueError, match=r"classifier\.safetensors is damaged"):
        ClassifierFeatures.load(folder)
