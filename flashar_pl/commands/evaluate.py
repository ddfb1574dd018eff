"""`flashar evaluate`: FID, sFID, Inception Score, precision, recall and KID of a checkpoint's samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from flashar_pl.console import plus_minus, table
from flashar_pl.evaluate.options import EvaluateOptions, Evaluation, MeasuredModelOptions
from flashar_pl.options import EngineOptions, RankOptions, SamplingSettings


def evaluate(
    options: EvaluateOptions,
    model: MeasuredModelOptions,
    sampling: SamplingSettings = SamplingSettings(),
    engine: EngineOptions = EngineOptions(),
    ranks: RankOptions = RankOptions(),
) -> dict[str, Any] | None:
    """Draw samples of a class-conditional checkpoint and compare them with real images.

    Sample i has seed + i and its own class, in batches of one fixed shape: the number of devices changes nothing.
    A run that was stopped continues when the same command is given again. Runs on every visible GPU, on --devices
    processes, or under torchrun or SLURM (several machines need a shared --out). Writes evaluation.json with every
    setting, hash and version, grid.png, codes.npy, and with --save-npz samples.npz for the ADM evaluator. Until it is
    finished, --out also holds the features, 20 KB for each sample with the Inception network. What the numbers mean,
    and how to get them wrong: docs/evaluation.md.

    With --run each kept checkpoint of a training run is measured, into a directory of its own below --out, and those
    that are measured already are not again. checkpoints.json has all metrics by step; `flashar plot RUN` draws them.

    Example:
        flashar evaluate --checkpoint c2i_B_256.pt --grid 16x16 --tokenizer vq16:vq_ds16_c2i.pt --plan raster
          --cfg-scale 2.0 --labels random --reference VIRTUAL_imagenet256_labeled.npz
          --features weights-inception-2015-12-05-6726825d.pth --dtype bf16 --out eval/llamagen-b
        flashar evaluate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --reference data/digits --split test
          --features runs/demo/classifier --num-samples 1000 --out eval/digits
        flashar evaluate --run runs/demo/flashar --reference data/digits --features runs/demo/classifier
          --num-samples 1000
    """
    import torch

    from flashar_pl.checkpoints.repositories import located
    from flashar_pl.evaluate.run import evaluate_on_rank
    from flashar_pl.evaluate.run_checkpoints import evaluate_checkpoints
    from flashar_pl.ranks import run_on_ranks

    if bool(model.checkpoint) == bool(options.run):
        raise ValueError(f"--checkpoint and --run are {'both' if options.run else 'not'} given; expected one of them.")
    if options.out is None and options.run is None:
        raise ValueError("--out is missing; expected a directory for the results.")
    if options.run is None:
        model = located(model)  # once, before there are ranks
    asked = Evaluation(options, model, sampling, engine)
    work = evaluate_on_rank if options.run is None else evaluate_checkpoints
    result = run_on_ranks(partial(work, asked, torch.get_num_threads()), ranks, engine.device)
    if result is not None and options.run is not None:
        print(table_of(result["checkpoints"]))
        print(f"wrote {result['out']}/checkpoints.json")
    elif result is not None:
        for name, value in result["metrics"].items():
            error = result.get("standard_errors", {}).get(name)  # an evaluation of an earlier version has none
            print(f"{name:<10} {plus_minus(value, error, '.6g', '.2g')}")
        for name, reason in result["left_out"].items():
            print(f"{name:<10} left out: {reason}")
        print(f"wrote {options.out}/evaluation.json")
    return result


def table_of(entries: list[dict[str, Any]]) -> str:
    """One row for each checkpoint."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["metrics"]))
    rows = [
        [Path(entry["checkpoint"]).name, f"{entry['step']:,}"]
        + [f"{entry['metrics'][name]:.5g}" if name in entry["metrics"] else "-" for name in names]
        for entry in entries
    ]
    return table(["checkpoint", "step", *names], rows)
