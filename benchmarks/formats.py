"""What formats of weights change on held-out images: paired differences of the NLL, and equal codes.

    python benchmarks/formats.py --checkpoint runs/demo/flashar/checkpoints/last.ckpt --data data/digits \
        --out benchmarks/results/formats_demo.json

Per format: NLL in nats per image, its change against the plain weights with the standard error of paired differences,
how often the likeliest code is the same under teacher forcing, and the share of equal codes in images that are drawn
greedily and at random from equal seeds. Float32, without guidance.

Shapes: N images, H x W grid, V codes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.checkpoints.opening import open_checkpoint
from flashar_pl.commands.score import held_out
from flashar_pl.console import versions
from flashar_pl.data.shards import Manifest
from flashar_pl.decoding import generate
from flashar_pl.decoding.prepare import WEIGHT_FORMATS, prepare
from flashar_pl.files import write_json
from flashar_pl.models import GridModel
from flashar_pl.options import DeviceOptions, ModelOptions

BATCH = 50


@torch.no_grad()
def measured(model: GridModel, batches: list[Any], plan: str) -> dict[str, Tensor]:
    """NLL (N,) float64, likeliest codes and codes drawn in two ways (N, H, W)."""
    found: dict[str, list[Tensor]] = {"nll": [], "first": [], "greedy": [], "drawn": []}
    for number, batch in enumerate(batches):
        condition, grid = model.backbone.condition_of(batch), tuple(batch.codes.shape[1:])
        logits = model(batch.codes, condition, model.make_plan(plan, *grid)).fused.double()  # (B, H, W, V)
        nll = F.cross_entropy(logits.movedim(-1, 1), batch.codes, reduction="none").flatten(1).sum(1)
        drawn = {"greedy": {"greedy": True}, "drawn": {"seeds": number * BATCH}}
        for name, codes in {"nll": nll, "first": logits.argmax(-1)}.items():
            found[name].append(codes.cpu())
        for name, options in drawn.items():
            found[name].append(generate(model, condition, grid, plan, **options).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--plan", default="diagonal")
    parser.add_argument("--images", type=int, default=200, help=f"of the test split, a multiple of {BATCH}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", required=True, help="JSON file to write")
    asked = parser.parse_args()
    source = open_checkpoint(ModelOptions(asked.checkpoint), DeviceOptions(asked.device, "fp32"))
    manifest = Manifest.load(asked.data)
    batches = list(held_out(manifest, "test", BATCH, asked.images, None, source.model.device))
    rows: list[dict[str, Any]] = []
    exact: dict[str, Tensor] = {}
    for form in WEIGHT_FORMATS:
        model = prepare(source.model, form)
        found = measured(model, batches, asked.plan)
        exact = exact or found
        change = found["nll"] - exact["nll"]
        same = {f"same_{name}": float((found[name] == exact[name]).double().mean()) for name in found if name != "nll"}
        rows.append(
            {
                "format": form,
                "nll": float(found["nll"].mean()),
                "nll_change": float(change.mean()),
                "nll_change_error": float(change.std()) / len(change) ** 0.5,
                **same,
                "bytes": size_of(source.model if form == "packed" else model),
            }
        )
        print(rows[-1], flush=True)
    facts = source.facts()
    result = {
        "images": len(exact["nll"]),
        "plan": asked.plan,
        "cfg_scale": 1.0,
        "split": "test",
        "data": {"name": manifest.name, "fingerprint": manifest.fingerprint("test")},
        "dtype": "fp32",
        "device": asked.device,
        "versions": versions(),
        "rows": rows,
        "checkpoint": {name: facts[name] for name in ("kind", "parameters", "model", "grid", "tokenizer")},
    }
    write_json(asked.out, result)


def size_of(model: GridModel) -> int:
    """Bytes of weights; a packed copy has as many as the plain weights."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


if __name__ == "__main__":
    main()
