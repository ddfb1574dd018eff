"""The study of the scenes, Table 3 at our scale: train, draw, check, and one page of results.

    python benchmarks/scenes.py  # make study-scenes; given again it continues

Trains the runs of a sweep file, two at a time on one thread each, evaluates every run by `flashar evaluate scenes`, and
writes scenes.json, the tables in scenes.md (made from the JSON alone, between two comments) and scenes.png. Differences
of rows are paired by prompt and run, with intervals over prompts and both levels of seeds (docs/evaluation.md).

Shapes: N test prompts, 8 x 8 grid.
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashar_pl.commands.demo import LAST, Stage
from flashar_pl.commands.evaluate_scenes import share
from flashar_pl.commands.score import held_out
from flashar_pl.commands.sweep import FINISHED, RASTER, finished, prepared, read_sweep, run_stage
from flashar_pl.data.scenes import TASKS, Prompt, check_scene, entry_of, find_things, to_prompt
from flashar_pl.data.shards import Manifest
from flashar_pl.files import write_json, write_text
from flashar_pl.metrics.intervals import difference
from flashar_pl.pictures import save_png, sheet
from flashar_pl.text_files import read_yaml
from flashar_pl.tokenizers import build_tokenizer
from flashar_pl.tokenizers.scenes import QUARTERS

FREE = ["--branch-layer", "3", "--plan"]
METHODS: dict[str, tuple[str, list[str]]] = {
    "raster": (RASTER, []),
    "raster, trained on": ("longer", []),
    "FlashAR": ("flashar", []),
    "BlockDiffusion": ("blockdiff", []),
    "training-free, diagonal": (RASTER, [*FREE, "diagonal"]),
    "training-free, limited": (RASTER, [*FREE, "limited"]),
}
"""Row -> the folder of its runs, and further options of `flashar evaluate scenes`."""
SHOWN, COLUMNS, ENLARGED, FRAME = 12, 6, 3, 200
LOOKED = ("edge", "inside", "clash", "surplus")
COUNTED = ("torn", *LOOKED, "exact")
PAIRS = (
    ("FlashAR", "raster"),
    ("raster, trained on", "raster"),
    ("FlashAR", "raster, trained on"),
    ("FlashAR", "BlockDiffusion"),
)
"""Rows whose differences are shown, the second taken from the first."""
COMPARED = ("nats", "correct", *COUNTED)
Values = dict[tuple[str, str], dict[str, np.ndarray]]
"""Seeds of pre-training and of adaptation -> what is compared, of every prompt (N,)."""
BEGIN, END = "<!-- tables: benchmarks/scenes.py -->\n", "<!-- end -->\n"
DATA = "data/scenes"


def evaluations(root: Path, runs: Iterable[Stage]) -> dict[str, list[Stage]]:
    """Row -> the evaluation of each of its runs."""
    found: dict[str, list[Stage]] = {}
    places = [stage.path for stage in runs]
    for name, (folder, words) in METHODS.items():
        for place in [each for each in places if each.parent.name == folder]:
            out = root / "evaluate" / "_".join([folder, *words[-1:], place.name])
            asked = ["evaluate", "scenes", "--checkpoint", str(place / LAST), "--data", DATA, "--out", str(out), *words]
            found.setdefault(name, []).append(Stage(out.name, 0, asked, out, "scenes.json"))
    return found


def run_all(stages: Iterable[Stage], workers: int) -> None:
    """Run those stages that are not finished, some at a time."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run_stage, [stage for stage in stages if not finished(stage)]))


def look(codes: np.ndarray, prompt: Prompt) -> dict[str, bool]:
    """What codes (8, 8) show: an object that begins in the last row or column, where it cannot be whole ("edge"); torn
    without one ("inside"); two objects that begin side by side on one diagonal, where not both can be whole ("clash");
    more whole objects than the prompt asks for ("surplus")."""
    begins, (things, torn) = codes % QUARTERS == 1, find_things(codes)
    edge = bool(begins[-1].any() or begins[:, -1].any())
    return {
        "edge": edge,
        "inside": torn and not edge,
        "clash": bool((begins[1:, :-1] & begins[:-1, 1:]).any()),
        "surplus": len(things) > sum(each["count"] for each in entry_of(prompt)["include"]),
    }


def by_prompt(stage: Stage, prompts: list[Prompt]) -> dict[str, np.ndarray]:
    """What is compared, of every prompt (N,)."""
    codes = np.load(stage.path / "codes.npy")
    seen = [vars(check_scene(each, prompt)) | look(each, prompt) for each, prompt in zip(codes, prompts, strict=True)]
    shown = {name: np.array([float(each[name]) for each in seen]) for name in COMPARED[1:]}
    return {"nats": np.load(stage.path / "nll.npy"), **shown}


def seeds_of(stage: Stage) -> tuple[str, str]:
    """Those of pre-training and of adaptation of an evaluated run, which its folder names: p0a1, p0."""
    found = re.search(r"(p\d+)(a\d+)?$", stage.path.name)
    assert found is not None, stage.path
    return found[1], found[2] or ""


def budget(run: Path) -> dict[str, int]:
    """What a training run was given."""
    asked = read_yaml(run / "config.yaml")
    return {"steps": asked["trainer"]["max_steps"], "batch_size": asked["data"]["batch_size"]}


def measured(stage: Stage, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the page needs of one evaluation."""
    found = json.loads((stage.path / "scenes.json").read_text())
    run = Path(found["settings"]["checkpoint"]).parents[1]
    return {
        "run": str(run),
        "seeds": seeds_of(stage),
        "commits": {
            "training": json.loads((run / FINISHED).read_text())["versions"].get("commit"),
            "evaluation": found["versions"].get("commit"),
        },
        "post_training": None if run.parent.name == RASTER else budget(run),
        "command": ["flashar", *stage.words],
        **{name: found[name] for name in ("tasks", "overall", "exact", "torn", "likelihood", "forwards")},
        **{name: share(int(values[name].sum()), len(values[name])) for name in LOOKED},
        "cpu_s_per_image": found["cpu_s_per_image"],
        "batch_size": found["settings"]["batch_size"],
    }


def paired(ours: Values, other: Values) -> Iterator[dict[str, Any]]:
    """Mean differences with their intervals: over the raster models that both have, then for each of these alone, where
    the interval holds for that one model."""
    both = sorted({p for p, _ in ours} & {p for p, _ in other})
    for models in (both, *([p] for p in both if len(both) > 1)):
        shown: dict[str, Any] = {"raster_models": models}
        for name in COMPARED:
            sides = [{seeds: own[name] for seeds, own in side.items() if seeds[0] in models} for side in (ours, other)]
            apart, how = difference(*sides)
            shown |= {"paired": how, name: apart.estimate.plain() | {"levels": apart.levels}}
        yield shown


def pooled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of a row together: counts are added, other numbers averaged."""
    add = lambda shares: share(sum(each["count"] for each in shares), sum(each["images"] for each in shares))  # noqa: E731
    mean = lambda values: float(np.mean(list(values)))  # noqa: E731
    return {
        "tasks": {task: add([run["tasks"][task] for run in runs]) for task in TASKS},
        **{name: add([run[name] for run in runs]) for name in COUNTED},
        "nll_nats_per_image": mean(run["likelihood"]["nll_nats_per_image"] for run in runs),
        **{name: mean(run[name] for run in runs) for name in ("overall", "forwards", "cpu_s_per_image")},
        "runs": runs,
    }


def page(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    tables = [_shares(result["rows"]), _tasks(result["rows"]), _pairs(result["pairs"])]
    return "\n\n".join("\n".join(lines) for lines in tables) + "\n"


def _interval(each: dict[str, float]) -> str:
    return f"{100 * each['share']:.1f} ({100 * each['low']:.1f} to {100 * each['high']:.1f})"


def _shares(rows: dict[str, Any]) -> list[str]:
    """What is seen in the images, each raster model's own share in brackets."""
    lines = [f"| | runs | steps x batch | forwards | CPU ms | nats | {' | '.join(f'{each} %' for each in COUNTED)} |"]
    lines.append("|---|" + "---:|" * (5 + len(COUNTED)))
    for name, row in rows.items():
        models = list(dict.fromkeys(run["seeds"][0] for run in row["runs"]))
        given = row["runs"][0]["post_training"]
        steps = f"{given['steps']} x {given['batch_size']}" if given else "none"
        numbers = [f"{len(row['runs'])}", steps, f"{row['forwards']:.0f}", f"{1e3 * row['cpu_s_per_image']:.1f}"]
        numbers.append(f"{row['nll_nats_per_image']:.2f}")
        for seen in COUNTED:
            own = [np.mean([run[seen]["share"] for run in row["runs"] if run["seeds"][0] == p]) for p in models]
            numbers.append(f"{100 * row[seen]['share']:.1f} ({', '.join(f'{100 * each:.1f}' for each in own)})")
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return lines


def _tasks(rows: dict[str, Any]) -> list[str]:
    """GenEval's score, with intervals over images."""
    lines = [f"| | mean of tasks % | {' | '.join(TASKS)} |", "|---|" + "---:|" * 7]
    for name, row in rows.items():
        tasks = " | ".join(_interval(row["tasks"][task]) for task in TASKS)
        lines.append(f"| {name} | {100 * row['overall']:.1f} | {tasks} |")
    return lines


def _pairs(pairs: list[dict[str, Any]]) -> list[str]:
    """Differences, with intervals over prompts and both levels of seeds; shares in points of a hundred."""
    lines = [f"| | raster model | nats | {' | '.join(f'{each} %' for each in COMPARED[1:])} |"]
    lines.append("|---|---:|" + "---:|" * len(COMPARED))
    for pair in pairs:
        cells = [", ".join(pair["raster_models"])]
        for name in COMPARED:
            low, high = pair[name]["interval_95"]
            scale, digits = (1, 2) if name == "nats" else (100, 1)
            value, low, high = (f"{scale * each:+.{digits}f}" for each in (pair[name]["value"], low, high))
            cells.append(f"{value} ({low} to {high})")
        lines.append(f"| {pair['ours']} minus {pair['other']} | {' | '.join(cells)} |")
    return lines


def insert(text: str, tables: str) -> str:
    """A page with its tables in place of those between the comments; they come last where there are none."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + tables + END + rest.partition(END)[2]


def picture(stages: dict[str, list[Stage]], prompts: list[Prompt], manifest: Manifest) -> torch.Tensor:
    """The first prompts, one line for each row's first run: (3, h, w) uint8."""
    tokenizer = build_tokenizer(manifest.tokenizer)
    blocks = []
    for name, (stage, *_) in stages.items():
        images = tokenizer.decode(torch.from_numpy(np.load(stage.path / "codes.npy")[:SHOWN]))
        enlarged = images.repeat_interleave(ENLARGED, -2).repeat_interleave(ENLARGED, -1)
        for side in (0, -1):
            enlarged[..., side, :] = enlarged[..., side] = FRAME
        blocks.append((name.replace(", ", "\n"), enlarged))
    return sheet(blocks, [entry_of(prompt)["prompt"] for prompt in prompts[:SHOWN]], COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sweep", default="experiments/ablations/scenes.yaml")
    parser.add_argument("--out", default="docs/results", help="where scenes.json, scenes.md, scenes.png go")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--finished", action="store_true", help="train nothing: the runs that are there")
    asked = parser.parse_args()
    sweep = read_sweep(Path(asked.sweep))
    runs = [stage for stage in sweep.runs() if not asked.finished or finished(stage)]
    stages = evaluations(Path(sweep.out), runs)
    run_all(prepared(sweep), 1)
    run_all([stage for stage in runs if stage.path.parent.name == RASTER], asked.workers)
    run_all([stage for stage in runs if stage.path.parent.name != RASTER], asked.workers)
    run_all([stage for own in stages.values() for stage in own], asked.workers)
    manifest = Manifest.load(DATA)
    batches = held_out(manifest, "test", 100, None, None, "cpu")
    prompts = [to_prompt(each) for batch in batches for each in batch.condition.features.numpy()]
    values = {name: {seeds_of(stage): by_prompt(stage, prompts) for stage in own} for name, own in stages.items()}
    rows = {
        name: pooled([measured(stage, values[name][seeds_of(stage)]) for stage in own]) for name, own in stages.items()
    }
    pairs = [
        {"ours": ours, "other": other, **each}
        for ours, other in PAIRS
        if {ours, other} <= values.keys()
        for each in paired(values[ours], values[other])
    ]
    out = Path(asked.out)
    result = {
        "sweep": asked.sweep,
        "split": "test",
        "prompts": len(prompts),
        "shown": [entry_of(prompt)["prompt"] for prompt in prompts[:SHOWN]],
        "rows": rows,
        "pairs": pairs,
    }
    write_json(out / "scenes.json", result)
    text = out / "scenes.md"
    write_text(text, insert(text.read_text(encoding="utf-8") if text.exists() else "", page(result)))
    save_png(picture(stages, prompts, manifest), out / "scenes.png")
    print(page(result))


if __name__ == "__main__":
    main()
