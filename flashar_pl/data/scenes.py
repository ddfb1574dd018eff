"""The second embedded data set, text to image: drawn objects, prompts of GenEval's six tasks, and an exact checker.

A prompt has five places: colour and shape of a first object, a link, colour and shape of a second. Text features hold
its words as one-hot vectors, side by side.

Shapes: n scenes, 8 x 8 grid, T = 5 places of a prompt, C = 31 words over all places.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashar_pl.data.manifest import ConditionSpec, Manifest
from flashar_pl.data.order import stream
from flashar_pl.data.writer import ShardWriter
from flashar_pl.metrics.geneval import Detection, relative_position, score_image
from flashar_pl.metrics.geneval_entries import RELATIONS
from flashar_pl.tokenizers.scenes import COLORS, PATCH, QUARTERS, SHAPES, VOCABULARY, first_code

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's six, under its names."""
GRID = (8, 8)
SIZES = {"train": 40_000, "validation": 600, "test": 1_200}
"""Scenes of each split, as many of every task."""
APART = 3
"""Cells between the corners of two objects, along one axis at least: they never touch."""
NUMBERS = {"two": 2, "three": 3, "four": 4}
LINKS = ("", *NUMBERS, "and", *RELATIONS)
PLACES = (("", *COLORS), ("", *SHAPES), LINKS, ("", *COLORS), ("", *SHAPES))
"""The words of every place of a prompt; "" = none."""
WIDTH = sum(len(words) for words in PLACES)
TRIES = 64
BLOCK, SHARD_BLOCKS = 100, 50

Prompt = tuple[str, str, str, str, str]
"""A word for each of `PLACES`."""


@dataclass(frozen=True)
class Thing:
    """One object: its shape, its colour, and the cell of its top left quarter."""

    shape: str
    color: str
    row: int
    column: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """In pixels, as GenEval counts them: (x1, y1, x2, y2), the ends belong to it."""
        x, y = self.column * PATCH, self.row * PATCH
        return x, y, x + 2 * PATCH - 1, y + 2 * PATCH - 1


def draw_prompt(random: np.random.Generator, task: str) -> Prompt:
    """A prompt of a task, every one of which is equally likely; of two objects shapes and colours differ."""
    first, second = (SHAPES[i] for i in random.permutation(len(SHAPES))[:2])
    color, other = (list(COLORS)[i] for i in random.permutation(len(COLORS))[:2])
    if task == "single_object":
        return "", first, "", "", ""
    if task == "two_object":
        return "", first, "and", "", second
    if task == "counting":
        return "", first, str(random.choice(list(NUMBERS))), "", ""
    if task == "colors":
        return color, first, "", "", ""
    if task == "position":
        return "", first, str(random.choice(RELATIONS)), "", second
    assert task == "color_attr", task
    return color, first, "and", other, second


def task_of(prompt: Prompt) -> str:
    """The task that `draw_prompt` drew a prompt for."""
    color, _, link, _, second = prompt
    if not second:
        return "counting" if link else "colors" if color else "single_object"
    return "position" if link in RELATIONS else "color_attr" if color else "two_object"


def entry_of(prompt: Prompt) -> dict[str, Any]:
    """A prompt as an entry of GenEval's: the text, and what an image must show."""
    color, shape, link, other, second = prompt
    one, two = f"{color} {shape}".strip(), f"{other} {second}".strip()
    count = NUMBERS.get(link, 1)
    first: dict[str, Any] = {"class": shape, "count": count} | ({"color": color} if color else {})
    entry: dict[str, Any] = {"tag": task_of(prompt), "prompt": f"a {one}", "include": [first]}
    if link in NUMBERS:
        entry |= {"prompt": f"{link} {one}s", "exclude": [{"class": shape, "count": count + 1}]}
    elif second:
        clause = {"class": second, "count": 1} | ({"color": other} if other else {})
        entry["prompt"] = f"a {one} {link} a {two}"
        if link in RELATIONS:  # the first object lies there as seen from the second
            entry["include"] = [clause, first | {"position": [link, 0]}]
        else:
            entry["include"] = [first, clause]
    return entry


def draw_scene(random: np.random.Generator, prompt: Prompt) -> list[Thing]:
    """Objects that a prompt asks for: what it leaves open is uniform over all that is legal."""
    color, shape, link, other, second = prompt
    named = [(shape, color)] * NUMBERS.get(link, 1) + ([(second, other)] if second else [])
    colors = [given or str(random.choice(list(COLORS))) for _, given in named]
    while True:
        cells = random.integers(0, np.array(GRID) - 1, (TRIES, len(named), 2))  # (tries, objects, axis)
        apart = abs(cells[:, :, None] - cells[:, None]).max(-1) >= APART  # (tries, objects, objects)
        legal = (apart | np.eye(len(named), dtype=bool)).all((1, 2))
        for chosen in cells[legal].tolist():
            things = [Thing(kind[0], color, *cell) for kind, color, cell in zip(named, colors, chosen, strict=True)]
            if link not in RELATIONS or link in relative_position(things[0].box, things[1].box):
                return things


def draw_codes(things: Sequence[Thing]) -> np.ndarray:
    """Codes (8, 8) of a scene."""
    codes = np.zeros(GRID, np.int64)
    for thing in things:
        quarters = first_code(SHAPES.index(thing.shape), list(COLORS).index(thing.color)) + np.arange(QUARTERS)
        codes[thing.row : thing.row + 2, thing.column : thing.column + 2] = quarters.reshape(2, 2)
    return codes


def find_things(codes: np.ndarray) -> tuple[list[Thing], bool]:
    """The whole objects of codes (8, 8), and whether any other cell is not empty: a torn object, or a part of one."""
    found, left = [], codes.copy()
    for row, column in zip(*np.nonzero(codes % QUARTERS == 1), strict=True):  # top left quarters
        window = left[row : row + 2, column : column + 2]
        if window.shape == (2, 2) and (window.ravel() == codes[row, column] + np.arange(QUARTERS)).all():
            shape, color = divmod(int(codes[row, column] - 1) // QUARTERS, len(COLORS))
            found.append(Thing(SHAPES[shape], list(COLORS)[color], int(row), int(column)))
            window[:] = 0
    return found, bool(left.any())


@dataclass(frozen=True)
class Verdict:
    """What the checker says of one image."""

    correct: bool
    """By GenEval's rules, on exact detections."""
    exact: bool
    """Correct, with no object more and nothing torn."""
    torn: bool
    """Whether it shows anything that is no whole object."""


def check_scene(codes: np.ndarray, prompt: Prompt) -> Verdict:
    """Compare codes (8, 8) with a prompt."""
    things, torn = find_things(codes)
    boxes = {thing.box: thing for thing in things}
    detections: dict[str, list[Detection]] = {}
    for thing in things:
        detections.setdefault(thing.shape, []).append(Detection(thing.box, 1.0))
    colors_of = lambda _, seen: [boxes[each.box].color for each in seen]  # noqa: E731
    correct, _ = score_image(detections, entry_of(prompt), colors_of, classes=SHAPES)
    wanted = NUMBERS.get(prompt[2], 1) + bool(prompt[4])
    return Verdict(correct, correct and not torn and len(things) == wanted, torn)


def to_features(prompt: Prompt) -> np.ndarray:
    """Text features (5, 31) float16 of a prompt: every row holds all its words, as those of a text encoder do."""
    found = np.concatenate([np.equal(words, word) for word, words in zip(prompt, PLACES, strict=True)])
    return np.tile(found.astype(np.float16), (len(PLACES), 1))


def to_prompt(features: np.ndarray) -> Prompt:
    """The prompt of text features (5, 31), the inverse of `to_features`."""
    places = np.split(features[0], np.cumsum([len(words) for words in PLACES])[:-1])
    return tuple(words[int(place.argmax())] for words, place in zip(PLACES, places, strict=True))  # type: ignore


def tokenize_scenes(out: str | os.PathLike[str], seed: int = 0) -> Manifest:
    """Write scenes as code shards to a new directory: 40,000 train, 600 validation, 1,200 test, tasks in turn.

    Raises:
        ValueError: `out` exists.
    """
    with ShardWriter(
        out,
        name="scenes",
        tokenizer={"kind": "scenes"},
        grid=GRID,
        vocabulary=VOCABULARY,
        condition=ConditionSpec("text-features", length=len(PLACES), width=WIDTH),
        block=BLOCK,
        shard_blocks=SHARD_BLOCKS,
    ) as writer:
        for number, (split, n) in enumerate(SIZES.items()):
            random = np.random.default_rng(stream(seed, number))
            for start in range(0, n, BLOCK):
                ids = np.arange(start, min(start + BLOCK, n))
                prompts = [draw_prompt(random, TASKS[i % len(TASKS)]) for i in ids]
                codes = np.stack([draw_codes(draw_scene(random, prompt)) for prompt in prompts])
                writer.write(split, codes, ids=ids, features=[to_features(prompt) for prompt in prompts])
    return writer.manifest
