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
from flashar_pl.metrics.geneval_entries import read_entries

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


DOG = {"class": "dog", "count": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 3}, '"prompt" is 3; expected text'),
        ({"tag": None}, '"tag" is None; expected text'),
        ({"include": {"class": "dog"}}, '"include" is .* expected a list of clauses'),
        ({"include": [DOG, 0]}, 'include clause 1: got 0; expected "class", "count"'),
        ({"include": [{"class": "cup"}]}, "include clause 0: got {'class': 'cup'}; expected \"class\", \"count\""),
        ({"include": [{**DOG, "count": "2"}]}, "\"count\" is '2'; expected a whole number"),
        ({"include": [{**DOG, "count": True}]}, '"count" is True; expected a whole number'),
        ({"include": [{**DOG, "class": "tvs"}]}, "class is 'tvs'; expected one of COCO's"),
        ({"include": [{**DOG, "colour": "red"}]}, "no more than class, color, count, position"),
        ({"include": [DOG, {**DOG, "position": ["above"]}]}, "position.*expected .relation, number"),
        ({"include": [DOG, {**DOG, "position": ["above", "0"]}]}, "position.*expected .relation, number"),
        ({"exclude": ["class"]}, "exclude clause 0: got 'class'"),
        ({"exclude": [{**DOG, "count": [3]}]}, 'exclude clause 0: "count"'),
        ({"exclude": [{**DOG, "color": "red"}]}, "exclude clause 0: .*no more than class, count"),
    ],
)
def test_a_wrong_entry_is_refused_where_it_stands(change, message, tmp_path):
    """Before any image, with file and line; not after all of them, as a miss or a KeyError."""
    good = {"tag": "t", "prompt": "a dog", "include": [DOG]}
    file = tmp_path / "prompts.jsonl"
    file.write_text("\ufeff" + json.dumps(good) + "\n\n" + json.dumps(good | {"prompt": "a\u2028dog"}) + "\n")
    assert [entry["prompt"] for entry in read_entries(file)] == ["a dog", "a\u2028dog"]
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(ValueError, match=rf"prompts\.jsonl, line 2: .*{message}"):
        read_entries(file)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"tag": NaN}', "9" * 5000, '"\ud800', "\x00", "3"])
def test_a_line_that_is_no_entry(line, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(line.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1: "):
        read_entries(file)


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "tvs"}, "include clause 1: class is 'tvs'"),
        ({"color": "mauve"}, "colour is 'mauve'"),
        ({"position": ["under", 0]}, "relation is 'under'"),
        ({"position": ["above", 1]}, "refers to clause 1"),
    ],
)
def test_bad_metadata_is_named(clause, message):
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, **clause}]
    with pytest.raises(ValueError, match=message):
        score_image({}, {"tag": "position", "include": include}, lambda name, found: [COLORS[0]] * len(found))
