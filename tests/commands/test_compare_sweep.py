"""`flashar compare`, `flashar sweep`: seeds are read from the runs, differences are paired, finished runs are kept."""

import json
import multiprocessing
import shlex
from pathlib import Path
from typing import IO

import pytest

from flashar_pl import locks
from flashar_pl.commands import sweep as module
from flashar_pl.commands.compare import Run, find_rows, read_run, read_speeds
from flashar_pl.commands.demo import move_aside
from flashar_pl.commands.sweep import finished, read_sweep, sweep
from flashar_pl.training.run_directory import LOCK

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "experiments" / "ablations").glob("*.yaml"))


def test_models_are_compared_on_the_same_images(run, raster_model, flashar_model, shards, work):
    Path("speed.json").write_text(json.dumps({"rows": [
        {"plan": plan, "batch": batch, "seconds": seconds, "ms_per_image": 1e3 * seconds, "images_per_s": 1 / seconds,
         "runner": "eager", "weight_format": "plain", "time": {}}
        for plan, batch, seconds in (("raster", 1, 0.001), ("diagonal", 8, 0.001), ("diagonal", 1, 0.004))
    ]}))  # fmt: skip
    code, out, err = run(
        *("compare", f"raster={raster_model}", f"flashar={flashar_model}", "--data", shards, "--limit", 6),
        *("--speed", "flashar=speed.json", "--out", "found", "--batch-size", 6),
    )
    assert code == 0, err
    found = json.loads(Path("found/compare.json").read_text())
    rows = found["rows"]
    code, _, err = run("score", "--checkpoint", flashar_model, "--data", shards, "--limit", 6, "--out", "score.json")
    assert code == 0, err
    score = json.loads(Path("score.json").read_text())
    assert rows["flashar"]["nll"]["value"] == pytest.approx(score["nll_nats_per_image"], rel=1e-12)
    assert rows["flashar"]["nll"]["standard_error"] == pytest.approx(score["standard_error"], rel=1e-6)
    apart = rows["flashar"]["difference"]
    assert apart["value"] == pytest.approx(rows["flashar"]["nll"]["value"] - rows["raster"]["nll"]["value"])
    assert apart["paired"] == "images"
    assert apart["standard_error"] < rows["flashar"]["nll"]["standard_error"] + rows["raster"]["nll"]["standard_error"]
    assert rows["flashar"]["speed"]["images_per_s"] == pytest.approx(250)  # of its plan, one image at a time
    assert (rows["raster"]["steps"], rows["flashar"]["steps"]) == (64, 15)
    assert "| flashar" in out
    assert Path("found/compare.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=x.ckpt"], "name two rows or more"),
        (["a=x.ckpt", "a=y.ckpt"], "no x.ckpt; expected a checkpoint, a run, or a directory of runs"),
    ],
)
def test_rows_that_are_none_are_refused(words, message, work):
    with pytest.raises(ValueError, match=message):
        find_rows(words)


def test_runs_of_a_row_differ_in_their_seeds(work, monkeypatch):
    """Guards a row of two settings, whose spread would pass for that of seeds, and best.ckpt before last.ckpt."""
    for name in ("a/p0a0", "a/p0a1", "b/one"):
        (Path(name) / "checkpoints").mkdir(parents=True)
        (Path(name) / "checkpoints" / "last.ckpt").touch()
    (Path("a/p0a1/checkpoints/best.ckpt")).touch()
    monkeypatch.setattr("flashar_pl.commands.compare.read_run", lambda path: Run(str(path), "p", "0", [1, 2], None))
    with pytest.raises(ValueError, match="row a holds 2 runs with seed 0 from p"):
        find_rows(["a", "b"])
    monkeypatch.setattr(
        "flashar_pl.commands.compare.read_run", lambda path: Run(str(path), "p", path.parts[1], [1, 2], None)
    )
    rows = find_rows(["a", "other=b"])
    assert [row.name for row in rows] == ["a", "other"]
    assert [Path(run.checkpoint).name for run in rows[0].runs] == ["last.ckpt", "best.ckpt"]


FILE = """
out: runs/s
pretraining: {config: experiments/demo_raster.yaml, seeds: [0, 3]}
adaptation:
  config: experiments/demo_flashar.yaml
  seeds: [0, 1]
  set: {trainer.max_steps: 4}
  variants: {paper: {}, average: {model.flashar.fusion: average}}
scratch: {config: experiments/demo_scratch.yaml, seeds: [5], variants: {scratch: {model.optimiser.lr: 0.001}}}
compare: {data: data/digits, reference: paper, out: runs/s/compare}
"""


def test_a_path_that_a_strangers_run_names_is_not_opened(work, monkeypatch):
    """Guards `compare` on somebody's checkpoint: its init_from may name any file of this machine."""
    run, named = Path("theirs/checkpoints/last.ckpt"), Path("mine.ckpt")
    run.parent.mkdir(parents=True)
    for path in (run, named):
        path.touch()
    opened, own = [], [None, {"model": {"init_from": "other.ckpt"}}, {"model": {"init_from": str(named)}}]
    settings = {"model.init_from": str(named), "seed_everything": 3}
    monkeypatch.setattr("flashar_pl.commands.compare._settings", lambda path: opened.append(path) or (settings, 5))
    monkeypatch.setattr("flashar_pl.training.stored_config.own_config", lambda path: own.pop(0))
    assert [read_run(run).tokens for _ in range(3)] == [[None, 5], [None, 5], [5, 5]]
    assert opened == [run, run, run, named], "the third time this user's own run names it"


def test_a_run_that_trains_is_not_moved_aside(work):
    """Guards two sweeps on one directory: the second moved a run that had no checkpoint yet from under the first."""
    run = Path("runs/a")
    run.mkdir(parents=True)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(take_lock, (str(run / LOCK),))
        with pytest.raises(ValueError, match="runs/a is in use by process 7; wait for it"):
            move_aside(run, "unfinished")
    move_aside(run, "unfinished")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a.unfinished-1"]


def take_lock(path: str) -> None:
    """Hold a run's lock until this process ends."""
    held.append(open(path, "a+"))  # noqa: SIM115
    locks.take(held[-1], alone=True)
    held[-1].write("process 7\n")
    held[-1].flush()


held: list[IO[str]] = []


def test_runs_of_a_file(work):
    Path("s.yaml").write_text(FILE)
    asked = read_sweep(Path("s.yaml"))
    runs = {str(stage.path): stage.words for stage in asked.runs()}
    assert len(runs) == 2 + 2 * 2 * 2 + 1
    words = runs["runs/s/average/p3a1"]
    settings = dict(zip(words[1::2], words[2::2], strict=True))
    assert settings["--seed_everything"] == settings["--data.seed"] == "301"  # another draw for every pre-trained model
    assert settings["--model.init_from"] == "runs/s/raster/p3/checkpoints/last.ckpt"
    assert settings["--model.flashar.fusion"] == "average"
    assert settings["--trainer.max_steps"] == "4"
    assert next(iter(runs)) == "runs/s/raster/p0"
    assert "--model.init_from" not in runs["runs/s/scratch/s5"]
    assert shlex.join(asked.summary().words) == (
        "compare runs/s/raster runs/s/paper runs/s/average runs/s/scratch --data data/digits --reference paper "
        "--out runs/s/compare"
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", [file.name for file in SWEEPS])
def test_every_file_asks_for_what_the_commands_take(file, capsys, work):
    """Guards a wrong option in a run that begins hours later."""
    sweep(f"experiments/ablations/{file}", dry_run=True)
    assert "flashar fit --config" in capsys.readouterr().out


def test_finished_runs_are_left_alone_and_a_stopped_one_continues(work, monkeypatch, capsys):
    Path("s.yaml").write_text(FILE)
    monkeypatch.setattr(module, "check_options", lambda runs, summary: None)
    done, fail = [], ["runs/s/average/p0a0"]

    def run_process(stage):
        if str(stage.path) in fail:
            return 1
        done.append(str(stage.path))
        stage.path.mkdir(parents=True)
        return 0

    monkeypatch.setattr(module, "run_process", run_process)
    with pytest.raises(ValueError, match="`flashar fit` of average/p0a0 ended with exit code 1"):
        sweep("s.yaml")
    assert done == ["runs/s/raster/p0", "runs/s/paper/p0a0"]
    fail.clear()
    Path("runs/s/average/p0a0").mkdir(parents=True)  # stopped before its first checkpoint
    sweep("s.yaml")
    assert len(done) == len(set(done)) == 12  # 11 runs and the comparison
    assert Path("runs/s/average/p0a0.unfinished-1").is_dir()
    sweep("s.yaml")
    assert len(done) == 12
    assert json.loads(Path("runs/s/raster/p0/sweep.json").read_text())["versions"]["torch"]
    changed = FILE.replace("lr: 0.001", "lr: 0.002")
    Path("s.yaml").write_text(changed)
    with pytest.raises(ValueError, match=r"runs/s/scratch/s5 holds the run .*0\.001.* the file asks for .*0\.002"):
        sweep("s.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("adaptation:", "adaption:", "has no adaption; did you mean adaptation"),
        ("seeds: [0, 3]", "seeds: 3", "pretraining: seeds is 3; expected whole numbers"),
        ("paper: {}", "raster: {}", "variant 'raster'; expected letters, digits"),
        ("paper: {}", "paper: 3", "variant paper is 3; expected options such as"),
        ("seeds: [5], variants: {scratch: {model.optimiser.lr: 0.001}}", "seeds: [5]", "scratch: expected variants"),
        ("out: runs/s\n", "", "needs out"),
    ],
)
def test_a_file_that_is_wrong_is_refused(old, new, message, work):
    Path("s.yaml").write_text(FILE.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_sweep(Path("s.yaml"))


def test_a_run_with_other_options_is_not_taken_for_finished(work):
    Path("s.yaml").write_text(FILE)
    stage = next(iter(read_sweep(Path("s.yaml")).runs()))
    assert not finished(stage)
    stage.path.mkdir(parents=True)
    (stage.path / "sweep.json").write_text(json.dumps({"words": stage.words}))
    assert finished(stage)


@pytest.mark.parametrize(
    "wrong", [{"seconds": "a"}, {"ms_per_image": "x"}, {"images_per_s": [1]}, {"batch": "1"}], ids=str
)
def test_speeds_are_numbers(tmp_path: Path, wrong: dict) -> None:
    """A list in place of a number ended in a TypeError when everything was measured."""
    row = {"plan": "diagonal", "batch": 1, "seconds": 1.0, "ms_per_image": 4.0, "images_per_s": 250.0}
    row |= {"runner": "eager", "weight_format": "plain", "time": "now"}
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"rows": [row]}))
    assert read_speeds([f"a={path}"], ["a"]) == {"a": [row]}
    path.write_text(json.dumps({"rows": [row | wrong]}))
    with pytest.raises(ValueError, match=r"speed\.json has other rows"):
        read_speeds([f"a={path}"], ["a"])
