"""`flashar classifier`, `plot`, `report`, `demo`."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from command_toys import tiny_backbone
from PIL import Image

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import save_model
from flashar_pl.commands import demo as demo_module
from flashar_pl.commands.plot import by_seed, find_runs, on_axis, read_scalars
from flashar_pl.commands.report import check_bounds
from flashar_pl.console import Missed
from flashar_pl.models import FlashAR

# --- classifier ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, shards) -> str:
    from flashar_pl.commands.classifier import classifier

    return str(classifier(data=shards, out=str(tmp_path_factory.mktemp("judge") / "classifier"), epochs=2))


def test_classifier_learns_and_refuses(run, refused, classifier, shards, work):
    code, out, err = run("classifier", "--data", shards, "--out", "c", "--epochs", 4)
    assert code == 0, err
    assert float(out.split("accuracy ")[1].split()[0]) > 0.8
    assert sorted(p.name for p in Path("c").iterdir()) == ["classifier.json", "classifier.safetensors"]
    assert "c exists" in refused("classifier", "--data", shards, "--out", "c")
    assert "flashar tokenize digits" in refused("classifier", "--data", "none", "--out", "d")


# --- plot ----------------------------------------------------------------------------------------------------------


def write_events(directory: Path, points: int = 20, **tags: float) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory)) as writer:
        for step in range(points):
            for tag, value in tags.items():
                writer.add_scalar(tag.replace("__", "/"), value + step, step)


def test_every_point_is_read(tmp_path):
    """Guards the event reader's default, which keeps 10,000 points of a tag and drops the rest at random."""
    write_events(tmp_path / "run", 10_500, train__loss=0.0)
    steps, values = read_scalars(tmp_path / "run")["train/loss"]
    assert steps == list(range(10_500))
    assert values[-1] == 10_499


def test_a_continued_run_keeps_the_last_value_of_a_step(tmp_path):
    write_events(tmp_path / "run", 3, train__loss=0.0)
    import time

    time.sleep(1.1)  # event files are named by the second
    write_events(tmp_path / "run", 2, train__loss=100.0)
    assert read_scalars(tmp_path / "run")["train/loss"] == ([0, 1, 2], [100.0, 101.0, 2.0])


def test_plot_draws_a_panel_per_quantity(run, work):
    write_events(Path("runs/a"), train__loss=2.0, val__nll=70.0, lr__backbone=0.1, lr__gate=0.2)
    write_events(Path("runs/b"), train__loss=3.0, val__gate_mean=0.5)
    assert list(find_runs(["runs"])) == ["a", "b"]
    code, out, err = run("plot", "runs", "--out", "curves.png")
    assert code == 0, err
    assert "4 panels of 2 runs" in out  # loss, nll, gate, learning rate
    width, height = Image.open("curves.png").size
    assert width > 1000
    assert height > 500


def test_plot_shows_runs_side_by_side(run, work):
    """What differs between ablations is in one table, what does not differ or only looks at a run is not."""
    for name, fusion, looks in (("a", "gate", 8), ("b", "average", 9)):
        write_events(Path("runs") / name, 8, train__loss=2.0, val__nll=70.0)
        model = f"model: {{flashar: {{fusion: {fusion}, branch_layer: 3}}, validation: {{samples: {looks}}}}}"
        Path("runs", name, "config.yaml").write_text(f"{model}\ntrainer: {{default_root_dir: runs/{name}}}\n")
    write_events(Path("runs/c"), 3, train__loss=2.0)
    code, out, err = run("plot", "runs")
    assert code == 0, err
    lines = [line.split() for line in out.replace("|", " ").splitlines()]
    assert lines[0] == ["run", "steps", "val/nll", "flashar.branch_layer", "flashar.fusion"]
    assert lines[2:5] == [["a", "7", "77", "3", "gate"], ["b", "7", "77", "3", "average"], ["c", "2", "-", "-", "-"]]


def test_the_axis_of_a_plot():
    """Where a validation stands between and after the logged steps; stage 2 begins after the last step of stage 1."""
    found = {
        "train/device_hours": ([10, 20], [1.0, 3.0]),
        "train/stage": ([10, 13, 20], [1.0, 2.0, 2.0]),
        "val/fid": ([0, 15, 40], [9.0, 8.0, 7.0]),
    }
    placed = on_axis("a", found, "gpu-hours")
    assert placed.curves["val/fid"] == ([0, 15, 40], [0.0, 2.0, 6.0], [9.0, 8.0, 7.0])
    assert placed.switch == pytest.approx([1.4])
    assert on_axis("a", found, "step").switch == [12]
    with pytest.raises(ValueError, match=r"run a has no curve train/epochs.*expected --axis step"):
        on_axis("a", found, "epoch")


def test_seeds_are_one_line_and_other_settings_are_not():
    own = {"model.lr": 1, "trainer.default_root_dir": "x"}
    settings = {
        "a": own | {"seed_everything": 0}, "b": own | {"seed_everything": 1, "trainer.default_root_dir": "y"},
        "c": own | {"model.lr": 2}, "d": {}, "e": {},
    }  # fmt: skip
    assert by_seed(settings) == {"a (2 seeds)": ["a", "b"], "c": ["c"], "d": ["d"], "e": ["e"]}


def test_plot_of_seeds_with_a_baseline(run, refused, work):
    """A result that is older than the run says its step, and what evaluate measured is a curve of the run."""
    from torch.utils.tensorboard import SummaryWriter

    for seed in (0, 1):
        place = Path(f"runs/s{seed}")
        with SummaryWriter(str(place)) as writer:
            for step in range(4):
                writer.add_scalar("train/fused", 2.0 + seed, step)
                writer.add_scalar("train/epochs", step / 4, step)
            writer.add_scalar("val/nll", 71.0, 1)
        (place / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{flashar: {{branch_layer: 3}}}}\n")
    Path("runs/s0/evaluation").mkdir()
    entries = [{"step": 2, "metrics": {"fid": 9.0}}, {"step": 3, "metrics": {"fid": 8.0, "is": 1.5}}]
    Path("runs/s0/evaluation/checkpoints.json").write_text(json.dumps({"checkpoints": entries}))
    write_events(Path("base"), 3, val__nll=60.0)
    code, out, err = run("plot", "runs", "--baseline", "base", "--axis", "epoch", "--out", "curves.png")
    assert code == 0, err
    assert "4 panels of 2 runs" in out  # losses, nll, fid and is of evaluate
    rows = {line.split()[1]: [cell.strip() for cell in line.split("|")[2:]] for line in out.splitlines()[2:4]}
    assert rows["s0"][:3] == ["3", "71 (step 1)", "8"]
    assert rows["s1"][:3] == ["3", "71 (step 1)", "-"]
    assert Image.open("curves.png").size[0] > 1000
    assert "--baseline runs holds 2 runs (s0, s1)" in refused("plot", "base", "--baseline", "runs", "--out", "x.png")


def test_plot_bad_input(refused, work, monkeypatch):
    write_events(Path("empty"), other=1.0)
    Path("there.png").write_text("mine")
    assert "no TensorBoard event files below nowhere" in refused("plot", "nowhere")
    assert "none of the known quantities" in refused("plot", "empty")
    assert "there.png exists" in refused("plot", "empty", "--out", "there.png")
    assert Path("there.png").read_text() == "mine"
    assert ".png, .pdf or .svg" in refused("plot", "empty", "--out", "there.doc")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install 'flashar-pl[demo]'" in refused("plot", "empty")


# --- report --------------------------------------------------------------------------------------------------------


def test_report_measures_every_row_and_draws(run, raster_model, flashar_model, classifier, shards, work):
    words = ("--raster", raster_model, "--flashar", flashar_model, "--scratch", flashar_model, "--data", shards)
    more = ("--classifier", classifier, "--samples", 20, "--seeds", "0,1", "--timed-images", 1)
    code, out, err = run("report", *words, *more, "--out", "report", "--check")
    assert code == 1, err  # untrained models: the numbers are there, the bounds are missed
    assert "bounds missed: raster NLL" in err
    assert sorted(p.name for p in Path("report").iterdir()) == ["gate.png", "report.json", "report.md", "samples.png"]
    values = json.loads(Path("report/report.json").read_text())
    rows = values["rows"]
    assert list(rows) == ["raster", "flashar", "training_free", "training_free_average", "scratch"]
    assert [row["steps"] for row in rows.values()] == [64, 15, 15, 15, 15]
    assert rows["flashar"]["nll_nats_per_image"] == rows["scratch"]["nll_nats_per_image"]
    assert rows["flashar"]["per_seed"] == rows["scratch"]["per_seed"]
    assert rows["raster"]["per_seed"]["fid"][0] != rows["raster"]["per_seed"]["fid"][1]
    assert rows["raster"]["fid"] == statistics.mean(rows["raster"]["per_seed"]["fid"])
    assert rows["raster"]["speed_up"] == 1
    for key, plan in (("training_free", "limited"), ("training_free_average", "diagonal")):
        _, scored, _ = run("score", "--checkpoint", raster_model, "--data", shards, "--plan", plan, "--branch-layer", 1)
        assert rows[key]["nll_nats_per_image"] == pytest.approx(json.loads(scored)["nll_nats_per_image"])
    assert np.array(values["gate_map"]).shape == (8, 8)
    assert np.array(values["gate_map"])[0, 1:].tolist() == [1.0] * 7  # first row: horizontal head only
    text = Path("report/report.md").read_text()
    assert text in out
    assert "latency" in text
    assert "MISSED: raster NLL" in text


def test_report_refuses_swapped_checkpoints(refused, raster_model, flashar_model, classifier, shards, work):
    base = ("report", "--data", shards, "--classifier", classifier, "--out", "report")
    swapped = refused(*base, "--raster", flashar_model, "--flashar", raster_model)
    assert "is a flashar model; expected a raster model" in swapped
    assert "classifier.json is missing" in refused(
        "report", "--data", shards, "--classifier", "none", "--out", "r", "--raster", "x", "--flashar", "y"
    )
    assert not list(work.iterdir())


@pytest.mark.slow
def test_the_dial_has_a_row_for_each_number_of_groups(
    run, refused, raster_model, flashar_model, classifier, shards, work
):
    """A row that forgets its number of groups shows the checkpoint's own, and the dial is flat."""
    model = FlashAR(tiny_backbone(), 1, intra={"groups": 2})
    torch.nn.init.normal_(model.dual_head.intra.out.weight)  # new, it adds nothing
    save_model("own", model, Description(model.config(), grid=(8, 8), tokenizer={"kind": "pixels", "levels": 17}))
    words = ("report", "--raster", raster_model, "--data", shards, "--classifier", classifier, "--samples", 5)
    words += ("--timed-images", 1, "--out", "report")
    assert "model.flashar.intra" in refused(*words, "--flashar", flashar_model, "--dial", "1,2,64")
    assert "dial is 'two'; expected numbers" in refused(*words, "--flashar", "own", "--dial", "two")
    assert "seeds is 'x'; expected numbers" in refused(*words, "--flashar", "own", "--seeds", "x")
    code, out, err = run(*words, "--flashar", "own", "--dial", "1,2,64,2")
    assert code == 0, err
    assert "wrote report/: dial.png, gate.png, report.json, report.md, samples.png" in out
    rows = json.loads(Path("report/report.json").read_text())["rows"]
    assert list(rows)[4:] == ["lossless", "groups_1", "groups_2", "groups_64"]
    nll = {key: row["nll_nats_per_image"] for key, row in rows.items()}
    assert nll["groups_2"] == nll["flashar"]
    assert len({nll["groups_1"], nll["groups_2"], nll["groups_64"]}) == 3
    assert nll["lossless"] == nll["raster"]
    assert rows["lossless"]["per_seed"]["fid"] == rows["raster"]["per_seed"]["fid"]  # the same images
    assert 1 < rows["lossless"]["forwards"] <= 64
    assert Path("report/dial.png").read_bytes().startswith(b"\x89PNG")


GOOD = {
    "raster": {"nll_nats_per_image": 72.0, "accuracy": 0.94, "steps": 64, "speed_up": 1.0},
    "flashar": {"nll_nats_per_image": 73.5, "accuracy": 0.93, "steps": 15, "speed_up": 2.4},
    "training_free": {"nll_nats_per_image": 105.0, "accuracy": 0.3, "steps": 15, "speed_up": 2.4},
    "scratch": {"nll_nats_per_image": 81.0, "accuracy": 0.6, "steps": 15, "speed_up": 2.4},
}


@pytest.mark.parametrize(
    ("row", "key", "bad"),
    [
        ("raster", "nll_nats_per_image", 76.0),
        ("raster", "accuracy", 0.87),
        ("flashar", "nll_nats_per_image", 76.1),
        ("flashar", "accuracy", 0.87),
        ("flashar", "steps", 16),
        ("flashar", "speed_up", 1.49),
        ("training_free", "nll_nats_per_image", 86.9),
        ("scratch", "nll_nats_per_image", 76.4),
    ],
)
def test_each_bound_can_be_missed(row, key, bad):
    assert all(bound["met"] for bound in check_bounds(GOOD))
    found = {name: dict(values) for name, values in GOOD.items()}
    found[row][key] = bad
    assert not all(bound["met"] for bound in check_bounds(found))


# --- demo ----------------------------------------------------------------------------------------------------------


def leave(stage):
    """The file that marks a stage as done."""
    (stage.path / stage.last).parent.mkdir(parents=True, exist_ok=True)
    (stage.path / stage.last).touch()


@pytest.fixture
def staged(work, monkeypatch):
    """A demo whose sub-processes only leave the files that mark them as done; yields their command lines."""
    calls: list[list[str]] = []

    class Finished:
        def __init__(self, stage):
            calls.append(stage.words)
            leave(stage)

        def wait(self) -> int:
            return 0

        poll = wait

    monkeypatch.setattr(demo_module, "start", Finished)
    return calls


def test_demo_runs_the_commands_a_user_would_type(run, refused, staged):
    code, out, err = run("demo")
    assert code == 0, err
    assert [words[0] for words in staged] == ["tokenize", "classifier", "fit", "fit", "plot", "report"]
    assert staged[2] == ["fit", "--config", "experiments/demo_raster.yaml"]
    assert staged[3] == ["fit", "--config", "experiments/demo_flashar.yaml"]
    assert "--check" in staged[5]
    assert "left in all" in out
    for name in (
        "report.md",
        "report.json",
        "samples.png",
        "gate.png",
        "convergence.png",
        "tensorboard --logdir runs/demo",
    ):
        assert name in out.split("files:")[1]
    assert "--overwrite" in refused("demo")


def test_full_demo_adds_the_contrast_and_reuses_what_is_there(run, staged):
    assert run("demo")[0] == 0
    staged.clear()
    code, _, err = run("demo", "--full")
    assert code == 0, err
    assert [words[0] for words in staged] == ["fit", "plot", "report"]
    assert staged[0] == ["fit", "--config", "experiments/demo_scratch.yaml"]
    assert "--scratch" in staged[2]
    assert staged[2][-1] == "0,1"


def test_demo_moves_unfinished_and_old_results_aside(run, staged):
    Path("runs/demo/raster").mkdir(parents=True)
    Path("runs/demo/raster/half").touch()
    assert run("demo")[0] == 0
    assert Path("runs/demo/raster.unfinished-1/half").exists()
    assert run("demo", "--overwrite")[0] == 0
    assert Path("runs/demo.old-1/report").exists()
    assert Path("runs/demo/report").exists()


def test_demo_elsewhere_overrides_every_place(run, staged):
    assert run("demo", "--out", "o", "--data", "d")[0] == 0
    words = " ".join(staged[3])
    for part in (
        "--trainer.default_root_dir o/flashar",
        "--model.init_from o/raster/checkpoints/last.ckpt",
        "--model.validation.features o/classifier",
        "--data.shards d",
    ):
        assert part in words
    assert "init_from" not in " ".join(staged[2])


def test_demo_reports_a_failed_stage_and_a_missed_bound(run, refused, staged, monkeypatch):
    monkeypatch.setattr(demo_module, "run_process", lambda stage: 2)
    assert "`flashar tokenize` ended with exit code 2" in refused("demo")

    def missed(stage):
        leave(stage)
        return int(stage.words[0] == "report")

    monkeypatch.setattr(demo_module, "run_process", missed)
    code, out, err = run("demo")
    assert code == 1
    assert "a bound was missed" in err
    assert "files:" in out
    with pytest.raises(Missed):
        demo_module.demo(out="runs/second", data="data/digits")


def test_the_demo_yamls_name_the_places_the_demo_expects():
    """Guards the one fact told twice: a default run needs no overrides."""
    import yaml

    root = Path(__file__).parents[2]
    for stage in demo_module.plan_stages(Path(demo_module.OUT), demo_module.DATA, full=True)[2:5]:
        config = yaml.safe_load((root / stage.words[2]).read_text())
        assert config["trainer"]["default_root_dir"] == str(stage.path)
        assert config["data"]["shards"] == demo_module.DATA
        assert config["model"]["validation"]["features"] == f"{demo_module.OUT}/classifier"
        callback = config["trainer"]["callbacks"][0]["init_args"]
        assert callback["filename"] == "last"
        if stage.path.name == "flashar":
            assert config["model"]["init_from"] == f"{demo_module.OUT}/raster/{demo_module.LAST}"


def test_recipes_are_found_outside_a_checkout(work):
    """Beside the package or in it; a file of the current directory comes first, and no other name is looked for."""
    from flashar_pl.recipes import find_recipe
    from flashar_pl.training.words import read_configuration

    name = "experiments/demo_raster.yaml"
    own = Path(__file__).parents[2] / name
    assert find_recipe(name) == own
    assert read_configuration(name)["trainer"]["default_root_dir"] == "runs/demo/raster"
    for other in ("experiments/none.yaml", "other/demo_raster.yaml", "experiments/../pyproject.toml"):
        assert find_recipe(other) == Path(other)
    Path("experiments").mkdir()
    Path(name).write_text("seed_everything: 3")
    assert read_configuration(name) == {"seed_everything": 3}


def test_the_recipes_travel_in_the_wheel():
    import tomllib

    wheel = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]
    assert wheel["wheel"]["force-include"] == {"experiments": "flashar_pl/experiments"}
