"""The study of the scenes: what it counts, and that its page says what its JSON holds."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from flashar_pl.commands.evaluate_scenes import share
from flashar_pl.data.scenes import TASKS, Thing, draw_codes

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
        own = {"tasks": {task: share(count, 10) for task in TASKS}, "overall": count / 10, "forwards": 15}
        own |= {name: share(count, 10) for name in study.COUNTED}
        return own | {"likelihood": {"nll_nats_per_image": float(count)}, "cpu_s_per_image": 0.001}

    row = study.pooled([run(2), run(5)])
    assert row["torn"] == share(7, 20)
    assert row["tasks"]["counting"] == share(7, 20)
    assert (row["overall"], row["nll_nats_per_image"]) == (pytest.approx(0.35), 3.5)
    assert "| it | 2 | 15 | 1.0 | 3.50 | 35.0 (18.1 to 56.7) | 35.0" in study.page({"rows": {"it": row}})


def test_tables_are_put_in_place_of_the_old_ones(study) -> None:
    assert study.insert("", "new\n") == study.BEGIN + "new\n" + study.END
    assert study.insert(f"a\n{study.BEGIN}old\n{study.END}b\n", "new\n") == f"a\n{study.BEGIN}new\n{study.END}b\n"


def test_every_run_of_the_sweep_is_evaluated(study) -> None:
    runs = list(study.read_sweep(ROOT / "experiments" / "ablations" / "scenes.yaml").runs())
    found = study.evaluations(Path("out"), runs)
    assert {stage.words[3] for own in found.values() for stage in own} == {f"{r.path}/{study.LAST}" for r in runs}
    outs = [stage.path for own in found.values() for stage in own]
    assert len(outs) == len(set(outs)) == len(runs) + 2  # the raster model three times
