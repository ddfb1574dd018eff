"""`flashar report run`: curves, numbers, checks and pictures of training runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

GOOD = {
    "train/loss": lambda s: 10.0 - s,
    "train/fused": lambda s: 9.0 - s,
    "train/horizontal": lambda s: 11.0 - s / 2,
    "train/vertical": lambda s: 12.0 - s,
    "train/stage": lambda s: 1.0 if s < 3 else 2.0,
    "train/tokens_per_second": lambda s: 100.0,
    "val/nll": lambda s: 80.0 - s if s in (4, 7) else None,
    "val/gate_mean": lambda s: 0.4 if s in (4, 7) else None,
}


def write_run(place: Path, steps: range, **changes) -> None:
    with SummaryWriter(str(place)) as writer:
        for step in steps:
            for tag, value in (GOOD | changes).items():
                if (at := value(step)) is not None:
                    writer.add_scalar(tag, at, step)


def test_a_run_that_was_killed_and_continued(run, work):
    """Its two event files are one curve: the later values of the steps that were trained twice, no step missing."""
    write_run(Path("runs/a"), range(6), **{"train/loss": lambda s: 100.0 - s})
    time.sleep(1.1)  # event files are named by the second
    write_run(Path("runs/a"), range(3, 8))
    (Path("runs/a/samples")).mkdir()
    Image.new("RGB", (4, 4)).save("runs/a/samples/val_step_0000005.png")
    code, out, err = run("report", "run", "runs/a", "--out", "report")
    assert code == 0, err
    assert {p.name for p in Path("report").iterdir()} == {
        "report.md", "report.json", "curves.png", "val_samples.png",
    }  # fmt: skip
    values = json.loads(Path("report/report.json").read_text())
    assert values["curves"]["a"]["train/loss"] == {
        "step": list(range(8)),
        "value": [100.0, 99.0, 98.0, 7.0, 6.0, 5.0, 4.0, 3.0],
    }
    facts = values["runs"]["a"]
    assert (facts["fits"], facts["steps"], facts["second_stage_after"]) == (2, 8, [3, 3])
    assert (facts["best_nll"], facts["best_nll_at_step"], facts["tokens_per_second"]) == (73.0, 8, 100.0)
    assert all(check["met"] for check in facts["checks"])
    assert Path("report/report.md").read_text() in out
    assert "| 8 | 3.0000 | 2.0000 | 7.5000 | 5.0000 | 73.0000 | 0.4000 |" in out
    assert Image.open("report/curves.png").size[0] > 1000


@pytest.mark.parametrize(
    ("tag", "bad", "said"),
    [
        ("train/loss", lambda s: float("nan") if s == 5 else 10.0 - s, "1 training losses are no numbers"),
        ("train/loss", lambda s: 10.0 + s, "train/loss falls"),
        ("train/vertical", lambda s: 12.0 + (s if s < 3 else -s), "train/vertical falls in stage 1"),
        ("val/gate_mean", lambda s: 0.999, "val/gate_mean 0.999"),
        ("val/nll", lambda s: 80.0 + s, "val/nll ends near its best"),
    ],
)
def test_what_goes_wrong_is_said(run, work, tag, bad, said):
    write_run(Path("runs/a"), range(8), **{tag: bad})
    code, out, err = run("report", "run", "runs/a", "--out", "report")
    assert code == 0, err
    assert any(said in line for line in out.splitlines() if line.startswith("- LOOK: ")), out


def test_few_steps_say_nothing_about_the_fused_loss(run, work):
    """Guards a LOOK after a few steps of every run: the mixture starts above the better head and falls below later."""
    for steps, said in ((range(0, 80, 10), False), (range(0, 400, 50), True)):
        place = Path(f"runs/{len(steps)}_{steps[-1]}")
        write_run(place, steps, **{"train/fused": lambda s: 1000.0})
        code, out, err = run("report", "run", place, "--out", f"report{steps[-1]}")
        assert code == 0, err
        assert ("LOOK: train/fused ends below both heads" in out) is said
    assert "stage 2 after 1 to 10 steps" in Path("report70/report.md").read_text(), "logged every tenth step"


def test_a_raster_run_has_no_losses_of_heads(run, work):
    """Guards a LOOK about a vertical loss that is 0 because there is no vertical head."""
    write_run(Path("runs/a"), range(0, 400, 50), **{"train/vertical": lambda s: 0.0})
    code, out, err = run("report", "run", "runs/a", "--out", "report")
    assert code == 0, err
    assert "train/fused" not in out


def test_runs_side_by_side(run, work):
    """What differs between ablations is in one table, what does not differ is not."""
    for name, fusion, root in (("a", "gate", "runs/a"), ("b", "average", "runs/b")):
        write_run(Path("runs") / name, range(8))
        model = f"model: {{flashar: {{fusion: {fusion}, branch_layer: 3}}, lora: null}}"
        Path("runs", name, "config.yaml").write_text(f"{model}\ntrainer: {{default_root_dir: {root}}}\n")
    code, out, err = run("report", "run", "runs", "--out", "report")
    assert code == 0, err
    table = out.split("## Side by side")[1].split("##")[0].strip().splitlines()
    assert table[0] == "| run | steps | val/nll | val/gate_mean | flashar.fusion |"
    assert table[2:] == ["| a | 8 | 73 | 0.4 | gate |", "| b | 8 | 73 | 0.4 | average |"]


def test_samples_are_shown_with_their_prompts(run, work):
    write_run(Path("runs/a"), range(8))
    write_run(Path("runs/b"), range(4))
    Path("drawn").mkdir()
    images = [{"label": f"prompt{i // 2}", "prompt": f"a cup {i // 2}", "seed": i} for i in range(4)]
    settings = {"plan": "diagonal", "cfg_scale": 5.0, "seed": 0}
    values = {"command": "generate", "settings": settings, "images": images, "checkpoint": {"path": "models/a"}}
    Path("drawn/settings.json").write_text(json.dumps(values))
    Image.new("RGB", (4, 4)).save("drawn/grid.png")
    code, out, err = run("report", "run", "runs", "--out", "report", "--samples", "drawn")
    assert code == 0, err
    assert "## a\n" in out
    assert "## b\n" in out
    assert "- a cup 0\n- a cup 1\n" in out
    assert Path("report/samples.png").read_bytes() == Path("drawn/grid.png").read_bytes()


def test_wrong_input_is_refused(refused, work):
    write_run(Path("runs/a"), range(2))
    with SummaryWriter("other") as writer:
        writer.add_scalar("x", 1.0, 0)
    assert "no TensorBoard event files below nowhere" in refused("report", "run", "nowhere", "--out", "r")
    assert "has logged no training loss" in refused("report", "run", "other", "--out", "r")
    assert "no settings.json in runs" in refused("report", "run", "runs/a", "--out", "r", "--samples", "runs")
    Path("settings.json").write_text("{}")
    assert "not written by flashar generate" in refused("report", "run", "runs/a", "--out", "r", "--samples", ".")
    Path("r").mkdir()
    assert "r exists" in refused("report", "run", "runs/a", "--out", "r")
    assert not list(Path("r").iterdir())
