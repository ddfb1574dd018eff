"""The study of the emoji: which drawings there are, their splits, what counts as a copy; needs no emoji font."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageFont

from flashar_pl.data.pictures import split_pictures

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
NAMES = """\
# group: Smileys & Emotion
# subgroup: face-smiling
0041                 ; fully-qualified     # A E1.0 grinning face
0042                 ; unqualified         # B E1.0 not this one
# group: People & Body
0043                 ; fully-qualified     # C E1.0 man judge
0044                 ; fully-qualified     # D E1.0 man judge: dark skin tone
0045 0046            ; fully-qualified     # EF E4.0 flag: Saint Barthélemy/St. B.
0041                 ; fully-qualified     # A E1.0 the same drawing again
0020                 ; fully-qualified     # _ E1.0 nothing
"""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"study_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    return script("emoji_pictures")


@pytest.fixture
def drawn(pictures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Draws the list above with letters for emoji, each split in turn."""
    letters = ImageFont.load_default(40)
    monkeypatch.setattr(pictures.ImageFont, "truetype", lambda path, size: letters)
    monkeypatch.setattr(pictures.features, "check", lambda name: True)
    splits = iter(["train", "val", "test", "train", "train"])
    monkeypatch.setattr(pictures, "split_of", lambda name: next(splits))
    one_group = NAMES.replace("# group: People & Body\n", "")
    (tmp_path / "names.txt").write_text(one_group, encoding="utf-8")

    def draw() -> Path:
        pictures.write_pictures(tmp_path / "out", tmp_path / "names.txt", tmp_path / "names.txt")
        return tmp_path / "out"

    return draw


def test_unicodes_list_is_read(pictures: ModuleType) -> None:
    """Without skin tones and unqualified forms, a sequence as one text."""
    found = list(pictures.read_names(NAMES))
    assert found[0] == ("A", "grinning face", "smileys")
    assert [each.name for each in found[1:3]] == ["man judge", "flag: Saint Barthélemy/St. B."]
    assert found[2].text == "EF"
    assert {each.group for each in found[1:]} == {"people"}


def test_persons_of_one_drawing_are_in_one_split(pictures: ModuleType) -> None:
    """Otherwise a judge is tested on that differs from a trained one in the hair only."""
    jobs = ("judge", "pilot", "cook", "singer", "teacher", "farmer", "astronaut", "vampire", "zombie", "elf")
    assert all(pictures.split_of(f"man {job}") == pictures.split_of(f"woman {job}") for job in jobs)
    splits = [pictures.split_of(f"flag: {number}") for number in range(1000)]
    assert {name: splits.count(name) // 40 for name in ("val", "test")} == {"val": 1, "test": 2}


def test_the_folder_is_one_that_tokenize_images_reads(pictures: ModuleType, drawn: Callable[[], Path]) -> None:
    folder = drawn()
    sources, _ = split_pictures(str(folder))
    assert {split: len(source) for split, source in sources.items()} == {"train": 1, "validation": 1, "test": 1}
    about = json.loads((folder / "about.json").read_text())
    assert about["left_out"] == {"unknown": 1, "repeated": 1}
    picture = Image.open(folder / "test" / "smileys" / "flag Saint Barthélemy St. B..png")
    assert picture.size == (pictures.SIDE, pictures.SIDE)
    dark = np.argwhere(np.asarray(picture.convert("L")) < 128)  # in the middle of a white square
    assert np.abs(dark.mean(0) - pictures.SIDE / 2).max() < 4


def test_a_missing_font_is_one_line_that_says_what_to_install(pictures: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*none\.ttf; apt-get install fonts-noto-color-emoji"):
        pictures.write_pictures(tmp_path / "out", tmp_path / "none.ttf", SCRIPTS)
    assert not (tmp_path / "out").exists()


def test_copies_of_training_images_are_counted() -> None:
    training = np.stack([np.zeros((4, 5), np.int64), np.ones((4, 5), np.int64)])
    drawn = np.ones((2, 4, 5), np.int64)
    drawn[0, 0, :2] = 7  # 18 of 20 equal: a copy; 15 of 20: none
    drawn[1, 1] = 7
    assert script("emoji").copies(drawn, training) == {"nearest": pytest.approx(0.825), "copies": 0.5}


def test_the_study_ends_with_the_line_of_the_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing font is no traceback of the script that asked for the pictures, and nothing is trained."""
    study = script("emoji")
    monkeypatch.setattr(study, "PICTURES", tmp_path / "none")
    monkeypatch.setattr(study.subprocess, "run", lambda words, **given: study.subprocess.CompletedProcess(words, 1))
    monkeypatch.setattr(study, "run_stage", lambda stage: pytest.fail("trained"))
    monkeypatch.setattr("sys.argv", ["emoji.py"])
    with pytest.raises(SystemExit, match="1"):
        study.main()
