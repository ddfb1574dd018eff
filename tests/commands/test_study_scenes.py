"""The study of the scenes: what it counts, and that its page says what its JSON holds."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from flashar_pl.commands.evaluate_scenes import share
from flashar_pl.data.scenes import TASKS, Thing, draw_codes
from flashar_pl.files import json_text

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("scenes_study", ROOT / "benchmarks" / "scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_beginnings_side_by_side_on_a_diagonal_clash(study) -> None:
    def seen(codes: np.ndarray, *prompt: str) -> set[str]:
        return {name for name, found in study.look(codes, prompt).items() if found}

    codes = draw_codes([Thing("circle", "red", 1, 3), Thing("square", "blue", 5, 0)])
    assert seen(codes, "", "circle", "", "", "") == {"surplus"}
    assert seen(codes, "", "circle", "and", "", "square") == set()
    codes[2, 2] = codes[5, 0]  # a square begins below left of where the circle does
    assert seen(codes, "", "circle", "and", "", "square") == {"clash", "inside"}
    other = np.zeros((8, 8), np.int64)
    other[1, 3] = other[2, 4] = 1  # two diagonals apart: the second could see the first
    assert seen(other, "", "circle", "", "", "") == {"inside"}
    other[2, 7] = 1
    assert seen(other, "", "circle", "", "", "") == {"edge"}


def test_runs_of_a_row_are_added_up(study) -> None:
    def run(count: int) -> dict:
        own = {
            "seeds": (f"p{count}", ""),
            "tasks": {task: share(count, 10) for task in TASKS},
            "overall": count / 10,
            "forwards": 15,
            "post_training": {"steps": 300, "batch_size": 64},
        }
        own |= {name: share(count, 10) for name in study.COUNTED}
        return own | {"likelihood": {"nll_nats_per_image": float(count)}, "cpu_s_per_image": 0.001}

    row = study.pooled([run(2), run(5)])
    assert row["torn"] == share(7, 20)
    assert row["tasks"]["counting"] == share(7, 20)
    assert (row["overall"], row["nll_nats_per_image"]) == (pytest.approx(0.35), 3.5)
    shown = study.page({"rows": {"it": row}, "pairs": []})
    assert "| it | 2 | 300 x 64 | 15 | 1.0 | 3.50 | 35.0 (20.0, 50.0) | 35.0" in shown
    assert "| it | 35.0 | 35.0 (18.1 to 56.7) | 35.0" in shown


def test_rows_are_paired_by_prompt_and_run(study) -> None:
    """Raster models that differ by far more than what is done with them does: unpaired, nothing would be seen."""
    random = np.random.default_rng(0)
    raster = {
        (p, ""): {name: 10 * n + random.normal(size=50) for name in study.COMPARED} for n, p in enumerate(("p0", "p1"))
    }
    ours = {
        (p, a): {name: each + 1 + 0.1 * n for name, each in own.items()}
        for (p, _), own in raster.items()
        for n, a in enumerate(("a0", "a1"))
    }
    found = list(study.paired(ours, raster))
    assert [each["raster_models"] for each in found] == [["p0", "p1"], ["p0"], ["p1"]]
    assert (found[0]["paired"], found[0]["torn"]["value"]) == ("pretraining", pytest.approx(1.05))
    del ours["p1", "a1"]
    assert next(study.paired(ours, raster))["torn"]["value"] == pytest.approx((1.05 + 1) / 2)
    again = {seeds: {name: each - 1 for name, each in own.items()} for seeds, own in ours.items()}
    for own in again.values():
        own |= {name: each + random.normal(scale=0.05, size=50) for name, each in own.items()}  # intervals have a width
    other, *alone = study.paired(ours, again)
    assert (other["paired"], other["nats"]["levels"]["pretraining"]["seeds"], len(alone)) == ("runs", 2, 2)
    low, high = other["nats"]["interval_95"]
    assert 0.7 < low < other["nats"]["value"] < high < 1.3
    (only,) = study.paired({("p1", "a0"): ours["p1", "a0"]}, raster)
    assert only["raster_models"] == ["p1"]
    shown = study.page({"rows": {}, "pairs": [{"ours": "it", "other": "that", **other}]})
    assert f"| it minus that | p0, p1 | {other['nats']['value']:+.2f} ({low:+.2f} to {high:+.2f}) | +" in shown
    assert study.seeds_of(study.Stage("", 0, [], Path("raster_limited_p1"))) == ("p1", "")
    assert study.seeds_of(study.Stage("", 0, [], Path("flashar_p1a0"))) == ("p1", "a0")


def test_a_share_that_no_prompt_changes_can_be_written(study) -> None:
    """Neither of two rows tears an image: the error of the difference is 0, with no finite degrees of freedom."""
    rows = [{("p1", a): dict.fromkeys(study.COMPARED, np.zeros(4))} for a in ("a0", "")]
    (only,) = study.paired(*rows)
    assert only["torn"]["interval_95"] == [0, 0]
    assert json.loads(json_text(only, "it")) == only


def test_tables_are_put_in_place_of_the_old_ones(study) -> None:
    assert study.insert("", "new\n") == study.BEGIN + "new\n" + study.END
    assert study.insert(f"a\n{study.BEGIN}old\n{study.END}b\n", "new\n") == f"a\n{study.BEGIN}new\n{study.END}b\n"


def test_every_run_of_the_sweep_is_evaluated(study) -> None:
    runs = list(study.read_sweep(ROOT / "experiments" / "ablations" / "scenes.yaml").runs())
    found = study.evaluations(Path("out"), runs)
    assert {stage.words[3] for own in found.values() for stage in own} == {f"{r.path}/{study.LAST}" for r in runs}
    outs = [stage.path for own in found.values() for stage in own]
    assert len(outs) == len(set(outs)) == len(runs) + 2 * 2  # each raster model three times
