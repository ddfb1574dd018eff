"""GenEval's rules case by case against the official scripts (tests/golden/metrics/geneval.json)."""

import json
from pathlib import Path

import pytest

from flashar_pl.metrics.geneval import (
    COLORS,
    Detection,
    Settings,
    box_iou,
    keep_detections,
    relative_position,
    score_image,
    summarise,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics" / "geneval.json").read_text())


def settings_of(options: list[str]) -> Settings:
    pairs = (option.split("=") for option in options)
    return Settings(**{name: (int if name == "max_objects" else float)(value) for name, value in pairs})


def read(case: dict) -> tuple[dict[str, list[Detection]], dict[tuple, str]]:
    detections, colors = {}, {}
    for name, rows in case["detections"].items():
        detections[name] = [Detection(tuple(row[:4]), row[4]) for row in rows]
        colors |= {(name, tuple(row[:4])): row[5] for row in rows}
    return detections, colors


def as_sets(reason: str) -> list[set[str]]:
    """Lines as sets of words: the original joins a Python set, in an order of its own."""
    return [set(line.split()) for line in reason.split("\n")]


@pytest.mark.parametrize("name", GOLDEN["options"])
def test_every_case_and_the_summary(name):
    settings, results = settings_of(GOLDEN["options"][name]), []
    for case in GOLDEN["cases"]:
        detections, colors = read(case)
        expected, metadata = case["results"][name], case["metadata"]
        correct, reason = score_image(
            detections,
            metadata,
            lambda name, found, colors=colors: [colors[name, detection.box] for detection in found],
            settings,
        )
        kept = {key: len(found) for key, found in keep_detections(detections, metadata["tag"], settings).items()}
        assert (correct, as_sets(reason)) == (expected["correct"], as_sets(expected["reason"])), case["note"]
        assert kept == expected["kept"], case["note"]
        results.append((metadata, correct))
    summary, expected = summarise(results), GOLDEN["summary"][name]
    assert {task: list(counts) for task, counts in summary.tasks.items()} == expected["tasks"]
    assert summary.overall == pytest.approx(expected["overall"], abs=5e-6)
    assert (summary.images, summary.prompts) == (expected["total_images"], expected["total_prompts"])
    assert f"{summary.image_mean:.2%}" == expected["pct_images"]
    assert f"{summary.prompt_mean:.2%}" == expected["pct_prompts"]
    assert summary.image_mean != pytest.approx(summary.overall, abs=1e-3)


def test_relations_and_overlaps():
    for case in GOLDEN["relative_position"]:
        assert relative_position(case["a"], case["b"]) == set(case["relations"])
        assert box_iou(case["a"], case["b"]) == pytest.approx(case["iou"], rel=1e-5, abs=1e-7)


def test_colour_is_asked_only_where_it_counts():
    """The colour classifier is the slow part: a clause that already fails on its count must not call it."""
    metadata = {"tag": "colors", "include": [{"class": "dog", "count": 2, "color": "red"}]}

    def forbidden(name, found):
        raise AssertionError("called")

    assert score_image({"dog": [Detection((0, 0, 5, 5), 0.9)]}, metadata, forbidden) == (
        False,
        "expected dog>=2, found 1",
    )


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"color": "mauve"}, "colour is 'mauve'"),
        ({"position": ["under", 0]}, "relation is 'under'"),
        ({"position": ["above", 1]}, "refers to clause 1"),
    ],
)
def test_bad_metadata_is_named(clause, message):
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, **clause}]
    with pytest.raises(ValueError, match=message):
        score_image({}, {"tag": "position", "include": include}, lambda name, found: [COLORS[0]] * len(found))
