"""`flashar evaluate`: FID, sFID, Inception Score, precision, recall and KID of a checkpoint's samples."""

from __future__ import annotations

from functools import partial
from typing import Any

from flashar_pl.evaluate.options import EvaluateOptions, Evaluation
from flashar_pl.options import EngineOptions, ModelOptions, RankOptions, SamplingSettings


def evaluate(
    options: EvaluateOptions,
    model: ModelOptions,
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

    Example:
        flashar evaluate --checkpoint c2i_B_256.pt --grid 16x16 --tokenizer vq16:vq_ds16_c2i.pt --plan raster
          --cfg-scale 2.0 --labels random --reference VIRTUAL_imagenet256_labeled.npz
          --features weights-inception-2015-12-05-6726825d.pth --dtype bf16 --out eval/llamagen-b
        flashar evaluate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --reference data/digits --split test
          --features runs/demo/classifier --num-samples 1000 --out eval/digits
    """
    import torch

    from flashar_pl.evaluate.run import evaluate_on_rank
    from flashar_pl.ranks import run_on_ranks

    asked = Evaluation(options, model, sampling, engine)
    result = run_on_ranks(partial(evaluate_on_rank, asked, torch.get_num_threads()), ranks, engine.device)
    if result is not None:
        print("\n".join(f"{name:<10} {value:.6g}" for name, value in result["metrics"].items()))
        for name, reason in result["left_out"].items():
            print(f"{name:<10} left out: {reason}")
        print(f"wrote {options.out}/evaluation.json")
    return result
