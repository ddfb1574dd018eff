"""Codes of a diagonal that see one another, on the embedded scenes: likelihood and torn images.

    python benchmarks/intra.py --data data/scenes --raster runs/scenes/raster/checkpoints/last.ckpt \
        --flashar runs/scenes/flashar/checkpoints/last.ckpt --out docs/results/intra.json

Trains an `IntraHead` on a frozen FlashAR model, and then one to which the codes of the diagonal are hidden. One head
serves every number of groups. Scores the test images and draws one image for each of their first prompts.

    python benchmarks/intra.py --cost 3 --out docs/results/intra_cost.json
"""

import argparse
import math
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from time import process_time
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flashar_pl.backbones.condition import Condition
from flashar_pl.checkpoints.description import build_model
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.commands.evaluate_scenes import count
from flashar_pl.commands.score import held_out, image_nll
from flashar_pl.data.batches import Batch
from flashar_pl.data.scenes import to_prompt
from flashar_pl.data.shards import Manifest
from flashar_pl.decoding import Engine
from flashar_pl.files import write_json
from flashar_pl.models.base import GridModel
from flashar_pl.models.flashar import FlashAR
from flashar_pl.models.intra import IntraHead
from flashar_pl.models.lora import adapt

GROUPS = (1, 2, 4, 64)


def with_head(path: str, seed: int) -> FlashAR:
    """A FlashAR model with a new head that trains alone."""
    plain = load_model(path).model
    torch.manual_seed(seed)
    plain.dual_head.intra = IntraHead(plain.backbone.dim, 2, alone=True)
    adapt(plain, None)
    return plain


def shuffled(manifest: Manifest, images: int, seed: int) -> Iterator[tuple[Tensor, Condition]]:
    """Batches of 64 training images, in random order."""
    parts = list(held_out(manifest, "train", 1000, images, None, "cpu"))
    condition, codes = Condition.cat([part.condition for part in parts]), torch.cat([part.codes for part in parts])
    for some in torch.randperm(images, generator=torch.Generator().manual_seed(seed)).split(64):
        yield codes[some], condition.rows(some.tolist())


def train(model: FlashAR, batches: Iterable[tuple[Tensor, Condition]], steps: int, lr: float) -> float:
    """AdamW with a cosine; CPU-seconds."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    started = process_time()
    model.train()
    for codes, condition in batches:
        optimiser.zero_grad()
        model.loss(codes, condition)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        rates.step()
    model.eval()
    return process_time() - started


BLIND: dict[str, Any] = {
    "_turns": lambda head, held: torch.zeros(held.shape, dtype=torch.int64),
    "tell": lambda head, known, cells, x: known,
}
"""What makes an `IntraHead` see no code."""


def measure(
    model: GridModel, test: list[Batch], images: int, seeds: int, scored: bool = True, **sampling: Any
) -> dict[str, Any]:
    """Nats per test image, and what images of the first prompts show."""
    condition = Condition.cat([batch.condition for batch in test]).rows(range(images))
    prompts = [to_prompt(features) for features in condition.features.numpy()]
    engine, drawn = Engine(model, "eager"), []
    for seed in range(seeds):
        for first in range(0, images, 200):
            rows = condition.rows(range(first, first + 200))
            drawn.append(engine.generate(rows, (8, 8), model.plan_name, seeds=1000 * seed + first, **sampling))
    found = count(torch.cat(drawn), prompts * seeds)
    result = {
        name: {key: found[name][key] for key in ("count", "images", "share")} for name in ("torn", "exact", "correct")
    }
    if scored:
        nll = image_nll(model, test, model.plan_name)
        result["nll"] = float(nll.mean())
    return result


def cost(repeats: int) -> list[dict[str, Any]]:
    """One image of 16 x 16 codes with random weights of LlamaGen-L's shape, by groups: 1e9 multiplications in matrix
    products, the shortest CPU-seconds of one thread, and both relative to one group."""
    config = {"kind": "flashar", "backbone": {"preset": "llamagen-l"}, "branch_layer": 23, "intra": {}}
    model = build_model(config).eval()
    head = model.dual_head.intra
    assert head is not None
    engine, labels, times = Engine(model, "eager"), torch.tensor([7]), {groups: [] for groups in GROUPS[:3]}
    for _ in range(repeats):
        for groups, found in times.items():
            head.groups, started = groups, process_time()
            engine.generate(labels, (16, 16), seeds=0)
            found.append(process_time() - started)
    rows: list[dict[str, Any]] = []
    for groups, found in times.items():
        head.groups = groups
        with FlopCounterMode(display=False) as counter:
            engine.generate(labels, (16, 16), seeds=0)
        row = {"groups": groups, "gmac": counter.get_total_flops() / 2e9, "cpu_s": min(found)}
        first = rows[0] if rows else row
        rows.append(row | {"gmac_ratio": row["gmac"] / first["gmac"], "cpu_ratio": row["cpu_s"] / first["cpu_s"]})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("--data", "--raster", "--flashar"):
        parser.add_argument(name)
    parser.add_argument("--cost", type=int, metavar="REPEATS", help="measure the cost alone, with random weights")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1, help="images of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the head and its training")
    parser.add_argument("--out", required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    if asked.cost is not None:
        write_json(Path(asked.out), {"commit": commit, "torch": torch.__version__, "rows": cost(asked.cost)})
        return
    manifest = Manifest.load(asked.data)
    test = list(held_out(manifest, "test", 200, None, None, "cpu"))
    raster = measure(load_model(asked.raster).model.eval(), test, asked.images, asked.seeds)
    print("raster", raster["nll"], raster["torn"], raster["exact"]["share"], flush=True)
    result = {"commit": commit, "steps": asked.steps, "lr": asked.lr, "seed": asked.seed, "raster": raster, "rows": []}
    batches = list(shuffled(manifest, 64 * asked.steps, asked.seed))
    plain: dict[str, Any] = {}
    for hidden in (False, True):
        with mock.patch.multiple(IntraHead, **BLIND) if hidden else nullcontext():
            model = with_head(asked.flashar, asked.seed)
            head = model.dual_head.intra
            assert head is not None
            seconds = train(model, batches, asked.steps, asked.lr)
            for groups in (2,) if hidden else GROUPS:
                head.groups = groups
                found = measure(model, test, asked.images, asked.seeds)
                plain = plain or found
                row = {"groups": groups, "hidden": hidden, "train_cpu_s": round(seconds, 1), **found}
                row["gap_closed"] = (plain["nll"] - found["nll"]) / (plain["nll"] - raster["nll"])
                result["rows"].append(row)
                print(row, flush=True)
                if groups == 1:
                    row = measure(model, test, asked.images, asked.seeds, False, coupling="systematic")
                    result["rows"].append({"groups": 1, "coupling": "systematic", **row})
                    print(row, flush=True)
                write_json(Path(asked.out), result)


if __name__ == "__main__":
    main()
