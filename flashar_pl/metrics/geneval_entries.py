"""GenEval's prompt entries: what an image of a prompt must show, checked before anything is drawn or scored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flashar_pl.text_files import parse_json, read_lines

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
CLASS_NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""COCO's 80 classes in its order, with GenEval's names."""
CLAUSES = {"include": {"class", "count", "color", "position"}, "exclude": {"class", "count"}}
"""Lists of an entry, and what their clauses may hold; "class" and "count" always."""


def read_entries(path: str | Path, content: bytes | None = None) -> list[dict[str, Any]]:
    """The entries of a file, one a line. Raises ValueError with file and line for one that `check_entry` refuses.

    content: as in `read_lines`.
    """
    entries = []
    for number, line in read_lines(path, content):
        entry = parse_json(line, path, number)
        try:
            entries.append(check_entry(entry))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return entries


def check_entry(entry: Any) -> dict[str, Any]:
    """`entry`, if it is {"tag", "prompt", "include", and optional "exclude"}. ValueError for what is wrong with it."""
    if not isinstance(entry, dict) or not {"tag", "prompt", "include"} <= entry.keys():
        raise ValueError('expected a JSON object with "tag", "prompt" and "include".')
    for key in ("tag", "prompt"):
        if not isinstance(entry[key], str):
            raise ValueError(f'"{key}" is {_short(entry[key])}; expected text.')
    check_clauses(entry)
    return entry


def check_clauses(entry: Mapping[str, Any], classes: Collection[str] = CLASS_NAMES) -> None:
    """ValueError for a clause that cannot be scored: a misspelt one would count as a miss of the image."""
    for kind, known in CLAUSES.items():
        clauses = entry.get(kind, [])
        if not isinstance(clauses, list):
            raise ValueError(f'"{kind}" is {_short(clauses)}; expected a list of clauses.')
        for number, clause in enumerate(clauses):
            try:
                _check_clause(clause, number, known, classes)
            except ValueError as error:
                raise ValueError(f"{kind} clause {number}: {error}") from error


def _check_clause(clause: Any, number: int, known: set[str], classes: Collection[str]) -> None:
    if not isinstance(clause, dict) or not {"class", "count"} <= clause.keys() <= known:
        raise ValueError(
            f'got {_short(clause)}; expected "class", "count" and no more than {", ".join(sorted(known))}.'
        )
    count = clause["count"]
    if type(count) is not int or count < 1:
        raise ValueError(f'"count" is {_short(count)}; expected a whole number from 1.')
    if clause["class"] not in classes:
        listed = "COCO's, as GenEval spells them" if classes is CLASS_NAMES else ", ".join(classes)
        raise ValueError(f"class is {_short(clause['class'])}; expected one of {listed}.")
    if "color" in clause and clause["color"] not in COLORS:
        raise ValueError(f"colour is {_short(clause['color'])}; expected one of {', '.join(COLORS)}.")
    if "position" in clause:
        _check_position(clause["position"], number)


def _check_position(position: Any, number: int) -> None:
    if not isinstance(position, list) or len(position) != 2 or type(position[1]) is not int:
        raise ValueError(f'"position" is {_short(position)}; expected [relation, number of an earlier include clause].')
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"relation is {_short(relation)}; expected one of {', '.join(RELATIONS)}.")
    if not 0 <= target < number:
        raise ValueError(f"it refers to clause {target}; expected one before it.")


def _short(value: Any) -> str:
    return repr(value)[:80]
