"""GenEval's scoring rules: does an image show the objects, counts, colours and positions its prompt asks for.

Pure functions over detections (Ghosh et al., 2023; the released scripts' behaviour, thresholds included). Detector and
colour classifier are the caller's.

Shapes: boxes are (x1, y1, x2, y2) in pixels, y downwards, float32 as the detector gives them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashar_pl.metrics.geneval_entries import CLASS_NAMES, COLORS, RELATIONS, check_clauses
from flashar_pl.metrics.intervals import mean_of, share

COUNTING = "counting"


@dataclass(frozen=True)
class Detection:
    """One detected object: box (4,) in pixels and score in [0, 1]."""

    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True)
class Settings:
    """Thresholds of the official script."""

    threshold: float = 0.3
    """A detection counts if its score is above this."""
    counting_threshold: float = 0.9
    """The same for prompts of the task "counting"."""
    max_objects: int = 16
    """Best detections kept per class."""
    max_overlap: float = 1.0
    """A box with IoU >= this with a better one of its class is dropped; 1 keeps all."""
    position_threshold: float = 0.1
    """Share of both boxes' sizes by which centres must differ."""


DEFAULT_SETTINGS = Settings()
Detections = Mapping[str, Sequence[Detection]]
ColorsOf = Callable[[str, Sequence[Detection]], Sequence[str]]


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes whose end pixels belong to them (hence + 1)."""
    first, second = np.asarray(a, np.float32), np.asarray(b, np.float32)

    def area(box: np.ndarray) -> float:
        return float(max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0))

    shared = area(np.concatenate([np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])]))
    union = area(first) + area(second) - shared
    return shared / union if union else 0.0


def relative_position(a: Sequence[float], b: Sequence[float], position_threshold: float = 0.1) -> set[str]:
    """Where box a lies seen from box b: a subset of `RELATIONS`, empty for centres too close to tell.

    The offset of the centres is shortened on each axis by `position_threshold` times the summed sizes of the boxes; an
    axis counts where what is left exceeds half the length of the whole offset.
    """
    corners = np.asarray([a, b], np.float32).reshape(2, 2, 2)  # (box, corner, axis)
    centres = corners.mean(axis=1)  # (box, axis)
    sizes = np.abs(np.diff(corners, axis=1))[:, 0]  # (box, axis)
    offset = centres[0] - centres[1]  # (axis,)
    rest = np.maximum(np.abs(offset) - position_threshold * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(rest) < 1e-3):
        return set()
    x, y = rest / np.linalg.norm(offset)
    marks = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, mark in zip(RELATIONS, marks) if mark}


def keep_detections(
    detections: Detections, tag: str, settings: Settings = DEFAULT_SETTINGS
) -> dict[str, list[Detection]]:
    """The detections that count, best first, by class; classes without any are left out."""
    limit = np.float32(settings.counting_threshold if tag == COUNTING else settings.threshold)
    kept: dict[str, list[Detection]] = {}
    for name, found in detections.items():
        scores = np.array([detection.score for detection in found], dtype=np.float32)
        best = [found[i] for i in np.argsort(scores)[::-1] if scores[i] > limit][: settings.max_objects]
        chosen: list[Detection] = []
        for candidate in best:
            overlaps = (box_iou(better.box, candidate.box) for better in chosen)
            if settings.max_overlap == 1 or all(overlap < settings.max_overlap for overlap in overlaps):
                chosen.append(candidate)
        if chosen:
            kept[name] = chosen
    return kept


def score_image(
    detections: Detections,
    metadata: Mapping[str, Any],
    colors_of: ColorsOf,
    settings: Settings = DEFAULT_SETTINGS,
    classes: Collection[str] = CLASS_NAMES,
) -> tuple[bool, str]:
    """Whether an image satisfies its prompt, and the reasons why not, one a line.

    Args:
        detections: all detections by class name.
        metadata: the prompt's entry: "tag", "include" and optional "exclude", lists of {"class", "count"} with optional
            "color" and "position" = [relation, number of an earlier include clause].
        colors_of: (class name, detections) -> one colour of `COLORS` per detection; called only where a colour counts.
        classes: names that clauses may have.

    Raises:
        ValueError: see `check_clauses`.
    """
    check_clauses(metadata, classes)
    kept = keep_detections(detections, metadata["tag"], settings)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # objects of each satisfied clause, None for a failed one
    for clause in metadata.get("include", ()):
        found = kept.get(clause["class"], [])[: clause["count"]]
        reason = _include_failure(clause, found, groups, colors_of, settings)
        if reason:
            reasons.append(reason)
        groups.append(None if reason else found)
    for clause in metadata.get("exclude", ()):
        count = len(kept.get(clause["class"], ()))
        if count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return not reasons, "\n".join(reasons)


def _include_failure(
    clause: Mapping[str, Any],
    found: list[Detection],
    groups: list[list[Detection] | None],
    colors_of: ColorsOf,
    settings: Settings,
) -> str:
    """The first way in which a clause fails: count, then colour, then position; empty text where it holds."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        wanted, colors = clause["color"], list(colors_of(name, found))
        if colors.count(wanted) < count:
            seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            return f"expected {wanted} {name}>={count}, found {colors.count(wanted)} {wanted}; and {seen}"
    if "position" in clause:
        relation, target = clause["position"]
        targets = groups[target]
        if targets is None:
            return f"no target for {name} to be {relation}"
        for one in found:
            for other in targets:
                seen_relations = relative_position(one.box, other.box, settings.position_threshold)
                if relation not in seen_relations:
                    listed = " and ".join(sorted(seen_relations))
                    return f"expected {name} {relation} target, found {listed} target"
    return ""


@dataclass(frozen=True)
class Summary:
    """GenEval's result. Published tables mix `overall` and `image_mean`: always say which."""

    tasks: dict[str, tuple[int, int]]
    """Task -> correct images, images."""
    overall: float
    """Mean over tasks, each with equal weight (the official score)."""
    image_mean: float
    """Share of correct images."""
    prompt_mean: float
    """Share of prompts with at least one correct image."""
    standard_errors: dict[str, float | None]
    """Of each task and of "overall"; None = one prompt. Prompts are what is drawn, not images: `intervals.share`."""
    images: int
    prompts: int


def summarise(results: Iterable[tuple[Mapping[str, Any], bool]]) -> Summary:
    """Of (metadata, correct) pairs, one or more images; prompts are told apart by their whole metadata."""
    tasks: dict[str, tuple[int, int]] = {}
    prompts: dict[tuple[str, str], list[bool]] = {}
    for metadata, correct in results:
        right, total = tasks.get(metadata["tag"], (0, 0))
        tasks[metadata["tag"]] = (right + bool(correct), total + 1)
        prompts.setdefault((metadata["tag"], json.dumps(metadata, sort_keys=True)), []).append(bool(correct))
    shares = {tag: share([own for (other, _), own in prompts.items() if other == tag]) for tag in tasks}
    errors = {name: each.standard_error for name, each in shares.items()}
    images = sum(total for _, total in tasks.values())
    return Summary(
        tasks=tasks,
        overall=sum(right / total for right, total in tasks.values()) / len(tasks),
        image_mean=sum(right for right, _ in tasks.values()) / images,
        prompt_mean=sum(map(any, prompts.values())) / len(prompts),
        standard_errors={**errors, "overall": mean_of(list(shares.values())).standard_error},
        images=images,
        prompts=len(prompts),
    )
