"""`flashar evaluate scenes`: whether images of the embedded scenes show what their prompts ask for.

Shapes: N prompts of a split, T places of a prompt, C words, 8 x 8 grid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flashar_pl.commands.score import DataOptions, check_data, held_out, image_nll, summary
from flashar_pl.console import progress_bar, table, versions
from flashar_pl.evaluate.options import BATCH_SIZE, batch_size
from flashar_pl.files import new_directory, require_new, write_json
from flashar_pl.options import CodeOptions, ModelOptions, SamplingSettings, as_settings

if TYPE_CHECKING:
    from torch import Tensor

    from flashar_pl.backbones.condition import Batch, Condition
    from flashar_pl.checkpoints.opening import Source
    from flashar_pl.data.scenes import Prompt
    from flashar_pl.data.shards import Manifest
    from flashar_pl.decoding.samples import SampleSet

SHOWN = 24
"""Images of the picture, four of each task."""


def evaluate_scenes(
    images: DataOptions,
    model: ModelOptions,
    sampling: SamplingSettings = SamplingSettings(),
    engine: CodeOptions = CodeOptions(),
    *,
    out: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw one image for each prompt of a split of the embedded scenes, and check them exactly.

    An image is correct by GenEval's rules, exact if it also shows nothing else, torn if any part of it is no whole
    object. Writes scenes.json with these counts, the likelihood of the split's own images, forwards of an image and
    processor seconds of drawing it, codes.npy and nll.npy (nats of each of the split's images), and samples.png.
    Shares come with a 95 % interval (Wilson); the overall score is the mean over the six tasks.

    Example:
        flashar evaluate scenes --checkpoint runs/scenes/flashar/checkpoints/last.ckpt --data data/scenes
          --out eval/scenes

    Args:
        out: directory to make; it must not exist.
        seed: of the first image; image i uses seed + i.
    """
    from flashar_pl.checkpoints.opening import check_plan, open_checkpoint
    from flashar_pl.data.shards import Manifest
    from flashar_pl.decoding.samples import SampleSet

    target = require_new(out, "results")
    manifest = Manifest.load(images.data)
    if manifest.name != "scenes":
        raise ValueError(f"{images.data} holds {manifest.name!r}; expected what `flashar tokenize scenes` writes.")
    source = open_checkpoint(model, engine)
    check_data(source.model, manifest, source.grid, source.tokenizer)
    plan, total = check_plan(source.model, engine.plan, manifest.grid), images.number(manifest)
    size = batch_size(engine, BATCH_SIZE, total)
    source.model.to(source.device)  # where it is to be rounded, it is scored first, as it is
    batches = list(held_out(manifest, images.split, size, images.limit, None, source.model.device))
    asked, prompts = read_prompts(batches, total, images.limit)
    with progress_bar(2 * total, "images") as advance:
        nll = image_nll(source.model, batches, plan, advance)  # (N,)
        samples = SampleSet(asked, manifest.grid, plan, sampling.of(None), size, seed)
        codes, cost = draw(source, engine, samples, advance)  # (N, 8, 8)
    result = {
        **count(codes, prompts),
        "likelihood": summary(nll, codes[0].numel()),
        **cost,
        "settings": as_settings(images, model, sampling, engine) | {"plan": plan, "batch_size": size, "seed": seed},
        "data": {"name": manifest.name, "fingerprint": manifest.fingerprint(images.split)},
        "checkpoint": source.facts(),
        "versions": versions(),
    }
    write(target, result, codes, nll, manifest)
    print(f"{report(result)}\nwrote {Path(out) / 'scenes.json'}")
    return result


def read_prompts(batches: list[Batch], total: int, limit: int | None) -> tuple[Condition, list[Prompt]]:
    """The prompts of a split, as conditions and as what they ask for. ValueError where a limit leaves none of some
    task: the mean over tasks would be another one."""
    from flashar_pl.backbones.condition import Condition, TextFeatures
    from flashar_pl.data.scenes import TASKS, task_of, to_prompt

    condition = Condition.cat([batch.condition for batch in batches]).rows(range(total))  # padding stands at the end
    assert isinstance(condition, TextFeatures)
    prompts = [to_prompt(features) for features in condition.features.cpu().numpy()]
    if missing := [task for task in TASKS if task not in map(task_of, prompts)]:
        raise ValueError(
            f"--limit {limit} leaves no prompt of {', '.join(missing)}: tasks come in turn, and a limit takes every "
            "n-th prompt; expected another one, or none."
        )
    return condition, prompts


def draw(
    source: Source, engine: CodeOptions, samples: SampleSet, advance: Callable[[int], Any]
) -> tuple[Tensor, dict[str, float]]:
    """Codes (N, 8, 8), and what one image took: forwards, or calls of a block, and processor seconds."""
    from flashar_pl.decoding.build import build_engine
    from flashar_pl.decoding.samples import draw_codes

    runner = build_engine(source, engine, samples.plan)
    started = time.process_time()
    codes = draw_codes(runner, samples, advance)
    seconds = time.process_time() - started
    steps = source.model.make_plan(samples.plan, *samples.grid).n_steps * getattr(source.model, "steps", 1)
    forwards = fmean(runner.forwards[: samples.n]) if runner.forwards else steps
    return codes, {"forwards": forwards, "cpu_s_per_image": seconds / samples.n}


def count(codes: Tensor, prompts: list[Prompt]) -> dict[str, Any]:
    """Shares of codes (N, 8, 8) that show their prompts: by task, exact, torn; overall is the mean over tasks."""
    from flashar_pl.data.scenes import check_scene, entry_of
    from flashar_pl.metrics.geneval import summarise

    verdicts = [check_scene(each, prompt) for each, prompt in zip(codes.numpy(), prompts, strict=True)]
    entries = [entry_of(prompt) for prompt in prompts]
    found = summarise((entry, verdict.correct) for entry, verdict in zip(entries, verdicts, strict=True))
    n = len(verdicts)
    return {
        "tasks": {task: share(*counts) for task, counts in found.tasks.items()},
        "overall": found.overall,
        "correct": share(sum(verdict.correct for verdict in verdicts), n),
        "exact": share(sum(verdict.exact for verdict in verdicts), n),
        "torn": share(sum(verdict.torn for verdict in verdicts), n),
    }


def write(target: Path, result: dict[str, Any], codes: Tensor, nll: Tensor, manifest: Manifest) -> None:
    """The directory of results: codes (N, 8, 8), nll (N,)."""
    import numpy as np

    from flashar_pl.data.encode import decoder_of
    from flashar_pl.decoding.samples import decode_all
    from flashar_pl.pictures import save_png, tile

    with new_directory(target, "results") as folder:
        np.save(folder / "codes.npy", codes.numpy())
        np.save(folder / "nll.npy", nll.numpy())
        save_png(tile(decode_all(decoder_of(manifest), codes[:SHOWN]), 6), folder / "samples.png")
        write_json(folder / "scenes.json", result)


def share(k: int, n: int) -> dict[str, float]:
    """k of n with its interval."""
    from flashar_pl.metrics.intervals import wilson

    low, high = wilson(k, n)
    return {"count": k, "images": n, "share": k / n, "low": low, "high": high}


def report(result: dict[str, Any]) -> str:
    """The result as a table."""
    named = {**result["tasks"], **{name: result[name] for name in ("correct", "exact", "torn")}}
    rows = [
        [
            name,
            f"{each['share']:.3f}",
            f"{each['low']:.3f} to {each['high']:.3f}",
            f"{each['count']} of {each['images']}",
        ]
        for name, each in named.items()
    ]
    nats = result["likelihood"]
    rows += [
        ["mean over tasks", f"{result['overall']:.3f}", "", ""],
        ["nats per image", f"{nats['nll_nats_per_image']:.3f}", f"+- {nats['standard_error']:.3f}", ""],
    ]
    return table(["", "share", "95 %", ""], rows)
