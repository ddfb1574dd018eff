"""Raster order against diagonals of all frames on the moving digits: steps, and likelihood by direction.

    python benchmarks/video.py --data data/moving_digits --raster runs/video/raster/checkpoints/last.ckpt \
        --flashar runs/video/flashar/checkpoints/last.ckpt --commit HASH --out docs/results/video.json

Several adaptations may be given. Differences from the raster model are paired over the test videos.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashar_pl.backbones.condition import Batch
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.commands.score import held_out, image_nll, summary
from flashar_pl.data.digits import CLASSES
from flashar_pl.data.moving_digits import DIRECTIONS
from flashar_pl.data.shards import Manifest
from flashar_pl.decoding import generate
from flashar_pl.files import write_json
from flashar_pl.models.base import GridModel
from flashar_pl.pictures import save_png, sheet
from flashar_pl.tokenizers import build_tokenizer

DIGITS = (3, 8)


def rows_of(nll: Tensor, base: Tensor, direction: Tensor) -> dict[str, Any]:
    """Nats of a video by direction and over all, with the paired difference from `base` in nats and per cent."""
    found = {}
    for number, name in enumerate([*DIRECTIONS, "all"]):
        own = direction == number if name != "all" else torch.ones_like(direction, dtype=torch.bool)
        gap = summary(nll[own] - base[own], 1)
        found[name] = {
            "nll": float(nll[own].mean()),
            "gap": gap["nll_nats_per_image"],
            "gap_standard_error": gap["standard_error"],
            "gap_percent": 100 * gap["nll_nats_per_image"] / float(base[own].mean()),
        }
    return found


def strips(codes: Tensor, manifest: Manifest) -> Tensor:
    """Videos (n, 24, 6) as pictures (n, 3, 6, 28): their frames from left to right, each with white on its right."""
    tokenizer = build_tokenizer(manifest.tokenizer)
    frames = tokenizer.decode(codes.flatten(0, 1).view(len(codes) * manifest.frames, -1, codes.shape[2]))
    return torch.cat([*pad(frames, (0, 1), value=255).unflatten(0, (len(codes), -1)).unbind(1)], dim=-1)


def draw(models: list[GridModel], test: list[Batch], manifest: Manifest, path: str) -> None:
    """A PNG: two digits in every direction, real ones above those that each model draws with the same seeds."""
    classes = torch.tensor([CLASSES * d + digit for digit in DIGITS for d in range(len(DIRECTIONS))])
    codes, labels = (torch.cat(part) for part in zip(*((batch.codes, batch.condition.ids) for batch in test)))
    real = codes[[int((labels == c).nonzero()[0]) for c in classes]]
    blocks = [("real", strips(real, manifest))]
    for model in models:
        drawn = generate(model, classes, manifest.grid, model.plan_name, seeds=0)
        steps = model.make_plan(None, *manifest.grid).n_steps
        blocks.append((f"{model.plan_name}\n{steps} steps", strips(drawn, manifest)))
    save_png(sheet(blocks, list(DIRECTIONS)), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--raster", required=True)
    parser.add_argument("--flashar", nargs="+", required=True)
    parser.add_argument("--commit", required=True, help="of the code that trained the models")
    parser.add_argument("--out", required=True)
    parser.add_argument("--picture", help="PNG of the raster model's and the last adaptation's videos")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    manifest = Manifest.load(asked.data)
    test = list(held_out(manifest, "test", 64, None, None, "cpu"))
    direction = torch.cat([batch.condition.ids[slice(None) if batch.valid is None else batch.valid] for batch in test])
    direction, base, rows, models = direction // CLASSES, None, [], []
    for path in (asked.raster, *asked.flashar):
        model = load_model(path).model.eval()
        nll = image_nll(model, test, model.plan_name)
        base = nll if base is None else base
        models.append(model)
        row = {"checkpoint": Path(path).parts[-3], "steps": model.make_plan(None, *manifest.grid).n_steps}
        rows.append(
            row | {"delay": model.delay if model.frames else None, "by_direction": rows_of(nll, base, direction)}
        )
        print(rows[-1], flush=True)
    about = {"commit": asked.commit, "torch": torch.__version__, "videos": len(direction)}
    write_json(Path(asked.out), {**about, "data": manifest.fingerprint("test"), "rows": rows})
    if asked.picture is not None:
        draw([models[0], models[-1]], test, manifest, asked.picture)


if __name__ == "__main__":
    main()
