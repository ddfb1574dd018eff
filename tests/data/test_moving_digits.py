"""The embedded videos."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashar_pl.data.digits import load_digits
from flashar_pl.data.manifest import Manifest, check_frames
from flashar_pl.data.moving_digits import DIRECTIONS, FRAMES, SIDE, tokenize_moving_digits
from flashar_pl.data.shards import ShardReader


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    out: Path = tmp_path_factory.mktemp("moving") / "data"
    tokenize_moving_digits(out)
    return Manifest.load(out)


def test_digits_move_as_their_class_says(manifest: Manifest) -> None:
    """Guards the direction and the splits: what a frame shows is where the next one has it, one pixel further."""
    assert {split: manifest.samples(split) for split in manifest.splits} == {
        "train": 5600, "validation": 400, "test": 1188,
    }  # fmt: skip
    reader = ShardReader(manifest, "test")
    got = reader.read(np.arange(len(reader)))
    videos = got.codes.reshape(-1, FRAMES, SIDE, SIDE)
    assert (got.labels % 10 == load_digits()[1][got.ids // 4]).all()
    for number, (y, x) in enumerate(DIRECTIONS.values()):
        own = videos[got.labels // 10 == number]
        assert len(own) == 297
        moved = np.roll(own[:, :-1], (y, x), axis=(2, 3))
        inside = np.s_[:, :, max(y, 0) : SIDE + min(y, 0), max(x, 0) : SIDE + min(x, 0)]
        np.testing.assert_array_equal(own[:, 1:][inside], moved[inside])
        assert (own[:, 1:] != own[:, :-1]).any((1, 2, 3)).mean() > 0.99


def test_frames_are_in_the_manifest_and_asked_for(manifest: Manifest) -> None:
    """Guards against a model of images, or of other frames, that trains on videos without a word."""
    assert manifest.frames == 4
    assert "frames" not in replace(manifest, frames=1).stored(Path(manifest.root))
    for frames in (None, 4):
        check_frames(manifest, frames)
    with pytest.raises(ValueError, match=r"draws images, .* hold videos of 4 frames: expected .*\.video\.frames 4\."):
        check_frames(manifest, 1)
    with pytest.raises(ValueError, match=r"draws videos of 2 frames, .* hold images: leave out model.flashar.video\."):
        check_frames(replace(manifest, frames=1), 2)
    with pytest.raises(ValueError, match="5 frames in 24 rows"):
        replace(manifest, frames=5)
