"""Lossless decoding of a checkpoint: forwards of an image, codes of a forward, whether the images are raster's.

    python benchmarks/lossless.py runs/demo/flashar/checkpoints/last.ckpt --out docs/results/lossless.json

Every row draws the same images by the raster plan too and counts those that differ in any code. The Gumbel row puts the
sampler's uniform aside for Gumbel noise made from it, in both plans, to compare how often guesses are right.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from flashar_pl.backbones import TextFeatures
from flashar_pl.data.scenes import TASKS, draw_prompt, to_features
from flashar_pl.decoding import Engine
from flashar_pl.options import SamplingSettings
from flashar_pl.sampling import filter_logits

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided 2": {"cfg_scale": 2.0},
    "top-k 8, top-p 0.9": {"top_k": 8, "top_p": 0.9},
    "guided 2, top-k 8, top-p 0.9": {"cfg_scale": 2.0, "top_k": 8, "top_p": 0.9},
}


def gumbel(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """`sampling.choose` with Gumbel noise, a function of the uniform and the code."""
    kept = filter_logits(logits, settings.temperature, settings.top_k, settings.top_p).double()
    code = torch.arange(kept.shape[-1], dtype=torch.float64)
    noise = (((uniform[..., None] * 9973.0 + code * 78.233 + 1.0).sin() * 43758.5453) % 1.0).clamp(1e-12, 1 - 1e-12)
    return (kept - (-noise.log()).log()).argmax(-1)


def draw(engine: Engine, plan: str, images: int, together: int, grid: tuple[int, int], **sampling: Any) -> Tensor:
    takes, parts = engine.model.backbone.conditioning, []
    for first in range(0, images, together):
        asked: Any = torch.arange(first, first + together) % takes.size
        if takes.kind == "text":  # the embedded scenes, all tasks in turn
            random = np.random.default_rng(first)
            prompts = [draw_prompt(random, TASKS[i % len(TASKS)]) for i in range(together)]
            asked = TextFeatures(torch.from_numpy(np.stack([to_features(prompt) for prompt in prompts])).float())
        parts.append(engine.generate(asked, grid, plan, seeds=first, **sampling))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--rows", default="sampling,drafters,noise")
    parser.add_argument("--double", action="store_true", help="weights and activations in float64")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--out", required=True)
    asked = parser.parse_args()
    from flashar_pl.checkpoints.opening import open_checkpoint
    from flashar_pl.options import ComputeOptions, ModelOptions

    source = open_checkpoint(ModelOptions(asked.checkpoint), ComputeOptions("cpu"))
    assert source.grid is not None
    if asked.double:
        source.model.double()
    rows: list[dict[str, Any]] = []

    def row(name: str, images: int, drafter: Any, window: int, batch: int, **sampling: Any) -> None:
        engine, slow = Engine(source.model, "eager", drafter, window), Engine(source.model, "eager")
        started = time.process_time()
        expected = draw(slow, "raster", images, batch, source.grid, **sampling)
        between = time.process_time()
        found = draw(engine, "lossless", images, batch, source.grid, **sampling)
        ended = time.process_time()
        forwards = torch.tensor(engine.forwards, dtype=torch.float64)
        rows.append({
            "sampling": name, "dtype": "float64" if asked.double else "float32",
            "drafter": drafter, "window_rows": window, "batch": batch, "images": images,
            "different_images": int((found != expected).flatten(1).any(1).sum()),
            "forwards": float(forwards.mean()), "forwards_most": int(forwards.max()),
            "codes_per_forward": expected[0].numel() / float(forwards.mean()),
            "raster_s": between - started, "lossless_s": ended - between,
        })  # fmt: skip
        print(json.dumps(rows[-1], allow_nan=False), flush=True)

    if "sampling" in asked.rows:
        for name, sampling in SETTINGS.items():
            row(name, asked.images, "above", 2, asked.batch, **sampling)
    if "windows" in asked.rows:
        for window in (1, 2, 4, 8):
            row("plain", asked.images, "above", window, asked.batch)
    if "drafters" in asked.rows:
        for drafter, window in itertools.product(("above", "vertical"), (1, 2, 4, 8)):
            row("plain", asked.images, drafter, window, asked.batch)
    if "noise" in asked.rows:
        places = [mock.patch(f"flashar_pl.decoding.{name}.choose", gumbel) for name in ("lossless", "loop")]
        with places[0], places[1]:
            for window in (2, 8):
                row("Gumbel noise", asked.images, "above", window, asked.batch)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "command": f"python {' '.join(sys.argv)}",
        "commit": commit,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "grid": list(source.grid),
        "rows": rows,
    }
    Path(asked.out).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
