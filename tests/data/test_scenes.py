"""The embedded scenes: what is drawn is what the checker finds."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashar_pl.data import scenes
from flashar_pl.data.scenes import COLORS, SHAPES, TASKS, Thing, check_scene, draw_codes, find_things
from flashar_pl.data.shards import Manifest, ShardReader, verify
from flashar_pl.tokenizers import build_tokenizer

SMALL = {"train": 24, "validation": 12, "test": 18}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "scenes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SIZES", SMALL)
        scenes.tokenize_scenes(out)
    return out


def test_the_checker_passes_ground_truth() -> None:
    random = np.random.default_rng(0)
    for task in TASKS * 40:
        prompt = scenes.draw_prompt(random, task)
        assert scenes.task_of(prompt) == task
        assert scenes.to_prompt(scenes.to_features(prompt)) == prompt
        verdict = check_scene(draw_codes(scenes.draw_scene(random, prompt)), prompt)
        assert (verdict.correct, verdict.exact, verdict.torn) == (True, True, False), prompt


CIRCLE, SQUARE = Thing("circle", "red", 1, 1), Thing("square", "blue", 1, 5)


@pytest.mark.parametrize(
    ("prompt", "things", "correct", "exact"),
    [
        (("", "circle", "", "", ""), [CIRCLE], True, True),
        (("", "circle", "", "", ""), [CIRCLE, SQUARE], True, False),  # GenEval forgives more objects
        (("", "triangle", "", "", ""), [CIRCLE], False, False),
        (("red", "circle", "", "", ""), [CIRCLE], True, True),
        (("blue", "circle", "", "", ""), [CIRCLE], False, False),
        (("", "circle", "two", "", ""), [CIRCLE, Thing("circle", "green", 5, 1)], True, True),
        (("", "circle", "two", "", ""), [CIRCLE], False, False),
        (("", "circle", "two", "", ""), [CIRCLE, *(Thing("circle", "red", 5, c) for c in (1, 5))], False, False),
        (("", "circle", "and", "", "square"), [CIRCLE, SQUARE], True, True),
        (("", "circle", "and", "", "triangle"), [CIRCLE, SQUARE], False, False),
        (("", "circle", "left of", "", "square"), [CIRCLE, SQUARE], True, True),
        (("", "square", "left of", "", "circle"), [CIRCLE, SQUARE], False, False),
        (("", "circle", "above", "", "square"), [CIRCLE, SQUARE], False, False),
        (("", "circle", "above", "", "square"), [CIRCLE, Thing("square", "blue", 5, 1)], True, True),
        (("red", "circle", "and", "blue", "square"), [CIRCLE, SQUARE], True, True),
        (("blue", "circle", "and", "red", "square"), [CIRCLE, SQUARE], False, False),
    ],
)  # fmt: skip
def test_verdicts(prompt: scenes.Prompt, things: list[Thing], correct: bool, exact: bool) -> None:
    """A wrong count, colour, place or shape is a miss; the order of words matters."""
    verdict = check_scene(draw_codes(things), prompt)
    assert (verdict.correct, verdict.exact, verdict.torn) == (correct, exact, False)


@given(st.integers(0, 3), st.integers(0, 72), st.integers(0, 6), st.integers(0, 6))
def test_an_object_with_one_other_cell_is_torn(quarter: int, other: int, row: int, column: int) -> None:
    codes = draw_codes([Thing("triangle", "green", row, column)])
    cell = row + quarter // 2, column + quarter % 2
    whole = codes[cell] == other
    codes[cell] = other
    things, torn = find_things(codes)
    assert (len(things), torn) == ((1, False) if whole else (0, True))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(SHAPES), st.sampled_from([*COLORS]))))
def test_what_is_drawn_is_found(drawn: list[tuple[int, int, str, str]]) -> None:
    """Objects that touch are still told apart."""
    cells = {(r, c): Thing(shape, color, 2 * r, 2 * c) for r, c, shape, color in drawn}
    things, torn = find_things(draw_codes(list(cells.values())))
    assert not torn
    assert set(things) == set(cells.values())


@given(st.integers(0, 2**63))
def test_objects_never_touch(seed: int) -> None:
    random = np.random.default_rng(seed)
    things = scenes.draw_scene(random, scenes.draw_prompt(random, "counting"))
    for one, two in product(things, things):
        assert one is two or max(abs(one.row - two.row), abs(one.column - two.column)) >= scenes.APART


def test_every_code_has_its_own_picture() -> None:
    tokenizer = build_tokenizer({"kind": "scenes"})
    codes = torch.arange(73 * 4).remainder(73).view(1, 4, 73)
    assert torch.equal(tokenizer.encode(tokenizer.decode(codes)), codes)
    assert torch.equal(tokenizer.encode_float(tokenizer.decode_float(codes)), codes)
    assert build_tokenizer(tokenizer.config()).vocabulary == 73


def test_shards(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed decides every byte; a sample belongs to its prompt; tasks are equally many."""
    assert verify(shards).samples == SMALL
    manifest = Manifest.load(shards)
    for split in SMALL:
        got = ShardReader(manifest, split).read(np.arange(SMALL[split]))
        prompts = [scenes.to_prompt(features) for features in got.features]
        assert all(check_scene(codes, prompt).exact for codes, prompt in zip(got.codes, prompts, strict=True))
        assert [scenes.task_of(prompt) for prompt in prompts] == [*TASKS] * (SMALL[split] // 6)
    monkeypatch.setattr(scenes, "SIZES", SMALL)
    again = scenes.tokenize_scenes(tmp_path / "again")
    assert again.fingerprint("test") == manifest.fingerprint("test")
    assert scenes.tokenize_scenes(tmp_path / "other", seed=1).fingerprint("test") != manifest.fingerprint("test")
