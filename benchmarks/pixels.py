"""What decoding to pixels in bfloat16 changes, and what it takes: PSNR and FID against float32, on a CPU or a GPU.

    python benchmarks/pixels.py --out benchmarks/results/pixels_cpu.json

- trained: a small VQ of VQ-16's architecture, trained here on the left parts of scikit-learn's two photographs, decodes
  codes of the right parts in both dtypes. FID by a classifier trained on the left parts to tell which way up they are.
- published sizes, random weights drawn so that activations neither die out nor explode: time of an image, and PSNR of
  outputs that are scaled to a standard deviation of half the range, as images have.

Shapes: n pictures of S x S pixels.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from flashar_pl.benchmarking.measure import Timing, circumstances, clock, clock_name, cpu_threads
from flashar_pl.benchmarking.pixels import RANDOM
from flashar_pl.decoding.samples import decode_all
from flashar_pl.devices import find_device
from flashar_pl.files import write_json
from flashar_pl.metrics.classifier import train_classifier
from flashar_pl.metrics.distribution import frechet_distance, frechet_standard_error
from flashar_pl.tokenizers.small_vq import psnr, small_spec, train_small_vq

SIDE, PARTS = 64, 256
"""Of the squares, and how many of each side of a photograph."""
DTYPES = ("fp32", "bf16")


def photographs() -> tuple[Tensor, Tensor]:
    """Parts (n, 3, S, S) uint8 of the left two thirds, and of the rest."""
    numbers = torch.Generator().manual_seed(0)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for picture in load_sample_images().images:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # (1, 3, h, w)
        cut = pixels.shape[-1] * 2 // 3
        for part, into in zip((pixels[..., :cut], pixels[..., cut:]), sides, strict=True):
            found = []
            for _ in range(PARTS):
                top = int(torch.randint(part.shape[-2] - SIDE + 1, (1,), generator=numbers))
                left = int(torch.randint(part.shape[-1] - SIDE + 1, (1,), generator=numbers))
                found.append(part[0, :, top : top + SIDE, left : left + SIDE])
            into.append(torch.stack(found))
    return torch.cat(sides[0]), torch.cat(sides[1])


def trained(device: torch.device, steps: int) -> dict[str, Any]:
    """PSNR and FID of both dtypes."""
    known, real = photographs()
    tokenizer = train_small_vq(known, small_spec(8, 1024, 32), steps).to(device)
    classifier = train_classifier(known, None, epochs=6)
    codes = torch.cat([tokenizer.encode(part.to(device)) for part in real.split(64)])
    images = {}
    for name in DTYPES:
        tokenizer.decode_in(name)
        images[name] = decode_all(tokenizer, codes)
    features = {name: rows_of(classifier, part) for name, part in {**images, "real": real}.items()}
    moments = features["real"].mean(0).numpy(), torch.cov(features["real"].T).numpy()
    change = (images["bf16"].int() - images["fp32"].int()).abs()
    return {
        "pictures": len(real),
        "side": SIDE,
        "steps": steps,
        "psnr_to_real": {name: psnr(images[name], real) for name in DTYPES},
        "psnr_bf16_to_fp32": psnr(images["bf16"], images["fp32"]),
        "levels_changed": {"mean": float(change.double().mean()), "most": int(change.max())},
        "fid_to_real": {name: frechet_distance(features[name], features["real"]) for name in DTYPES},
        "fid_standard_error": frechet_standard_error(features["fp32"], *moments),
        "fid_bf16_to_fp32": frechet_distance(features["bf16"], features["fp32"]),
    }


def rows_of(classifier: Any, images: Tensor) -> Tensor:
    """Features (n, D) float64."""
    with torch.no_grad():
        return torch.cat([classifier(part).double() for part in images.split(64)])


def published(kind: str, side: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time of an image of S x S pixels in both dtypes, and PSNR."""
    torch.manual_seed(0)
    build, spec = RANDOM[kind]
    with device:
        tokenizer = build(spec)
    for parameter in tokenizer.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    grid = side // tokenizer.downsample
    codes = torch.randint(tokenizer.vocabulary, (1, grid, grid))
    seconds, outputs = {}, {}
    for name in DTYPES:
        tokenizer.decode_in(name)
        timing = Timing()
        for _ in range(repeats + 1):
            clock(partial(decode_all, tokenizer, codes), device, timing)
        timing.wall.pop(0), timing.cpu.pop(0)  # the first makes the rounded copy
        seconds[name] = timing.summary()
        outputs[name] = tokenizer.decode_float(codes.to(device)).double()
    error = (outputs["bf16"] - outputs["fp32"]).square().mean() / outputs["fp32"].var() * 0.5**2
    clocked = f"{clock_name(device)}_s"
    return {
        "kind": kind,
        "side": side,
        "seconds": seconds,
        "speedup": seconds["fp32"][clocked] / seconds["bf16"][clocked],
        "psnr_bf16_to_fp32": float(10 * (2**2 / error).log10()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=600, help="of the training of the small VQ")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", default="vq16:256", help="KIND:SIDE of published tokenizers")
    parser.add_argument("--out", required=True, help="JSON file to write")
    asked = parser.parse_args()
    device = find_device(asked.device)
    sizes = [(kind, int(side)) for kind, side in (each.split(":") for each in asked.sizes.split(","))]
    with cpu_threads(device, 1):
        result = {
            **circumstances(device, 1),
            "trained": trained(device, asked.steps),
            "published": [published(kind, side, device, asked.repeats) for kind, side in sizes],
        }
    write_json(asked.out, result)
    print(result)


if __name__ == "__main__":
    main()
