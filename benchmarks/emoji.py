"""The study of a tokenizer in the loop: emoji drawings, a VQ trained here, raster, FlashAR, and pixels again.

    python benchmarks/emoji.py  # make study-emoji; given again it continues

Every step is a command a user would type. Writes emoji.json and emoji.png, which docs/results/emoji.md shows.

Shapes: n samples, m training images, H x W grid.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flashar_pl.commands.demo import Stage
from flashar_pl.commands.sweep import FINISHED, finished, run_stage
from flashar_pl.data.shards import Manifest, ShardReader
from flashar_pl.evaluate.quality import split_images
from flashar_pl.files import write_json
from flashar_pl.metrics.classifier import ClassifierFeatures

PICTURES, DATA, ROOT = Path("data/emoji_png"), Path("data/emoji"), Path("runs/emoji")
PLANS = {"raster": "raster", "flashar": "diagonal"}
CLASSES, FEW, MANY = 9, 1, 11
"""Classes; images of each whose time is compared, so that the start of the process is not counted."""
COPIED = 0.9
"""A sample with so large a share of a training image's codes, each in its place, counts as a copy of it."""
TIMES = ROOT / "times.json"


def stages() -> list[Stage]:
    """All commands in their order."""
    best = {name: f"{ROOT}/{name}/checkpoints/best.ckpt" for name in PLANS}
    tokenise = ["tokenize", "images", str(PICTURES), "--out", str(DATA), "--workers", "1", "--image-size", "32"]
    found = [
        Stage("shards", 0, [*tokenise, "--downsample", "4", "--steps", "1200"], DATA, "test-000000.tar"),
        Stage("classifier", 0, ["classifier", "--data", str(DATA), "--out", str(ROOT / "classifier")],
              ROOT / "classifier"),
    ]  # fmt: skip
    for name in PLANS:
        words = ["fit", "--config", f"experiments/emoji_{name}.yaml", "--trainer.default_root_dir", str(ROOT / name)]
        found.append(Stage(name, 0, words, ROOT / name, FINISHED))
    words = ["report", "--data", str(DATA), "--classifier", str(ROOT / "classifier"), "--out", str(ROOT / "report")]
    words += [word for name in PLANS for word in (f"--{name}", best[name])]
    found.append(Stage("report", 0, [*words, "--samples", "500", "--seeds", "0,1"], ROOT / "report"))
    words = [
        "compare",
        *(f"{name}={path}" for name, path in best.items()),
        "--data",
        str(DATA),
        "--out",
        str(ROOT / "compare"),
    ]
    found.append(Stage("compare", 0, words, ROOT / "compare"))
    for name in PLANS:
        for many in (FEW, MANY):
            out = ROOT / f"drawn_{name}_{many}"
            words = ["generate", "--checkpoint", best[name], "--classes", f"0-{CLASSES - 1}", "--out", str(out)]
            found.append(Stage(out.name, 0, [*words, "--num-images", str(many), "--batch-size", "1"], out))
    return found


def run(stage: Stage) -> dict[str, float]:
    """Run a stage; its seconds of processor and of wall time."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    run_stage(stage)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": round(cpu, 2), "wall_s": round(time.monotonic() - started, 2)}


def copies(drawn: np.ndarray, training: np.ndarray) -> dict[str, float]:
    """The largest share of equal codes that each of some images (n, H, W) has with a training image (m, H, W): its
    mean over the n, and how many of them are copies."""
    near = np.array([(training == each).mean(axis=(1, 2)).max() for each in drawn])  # (n,)
    return {"nearest": float(near.mean()), "copies": float((near >= COPIED).mean())}


def codes_of(manifest: Manifest, split: str) -> np.ndarray:
    """All codes of a split, (m, H, W)."""
    reader = ShardReader(manifest, split)
    return reader.read(np.arange(len(reader))).codes


def result(times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What the page shows."""
    report, manifest = json.loads((ROOT / "report" / "report.json").read_text()), Manifest.load(DATA)
    training = codes_of(manifest, "train")
    rows = report["rows"]
    for name, plan in PLANS.items():
        settings = json.loads((ROOT / f"drawn_{name}_{MANY}" / "settings.json").read_text())
        assert settings["settings"]["plan"] == plan
        more, few = times[f"drawn_{name}_{MANY}"], times[f"drawn_{name}_{FEW}"]
        pixels = {kind: (more[kind] - few[kind]) / (CLASSES * (MANY - FEW)) for kind in ("cpu_s", "wall_s")}
        drawn = np.load(ROOT / f"drawn_{name}_{MANY}" / "codes.npy")
        rows[name] |= {"with_pixels": pixels, "against_training": copies(drawn, training)}
    return {
        "pictures": json.loads((PICTURES / "about.json").read_text()),
        "tokenizer": json.loads((DATA / "tokenizer" / "tokenizer.json").read_text()),
        "grid": list(manifest.grid),
        "test_against_training": copies(codes_of(manifest, "test"), training),
        "accuracy_on_test": ClassifierFeatures.load(ROOT / "classifier").accuracy(*split_images(manifest, "test")),
        "rows": rows,
        "difference": json.loads((ROOT / "compare" / "compare.json").read_text())["rows"]["flashar"]["difference"],
        "settings": report["settings"],
        "trained": {name: json.loads((ROOT / name / FINISHED).read_text())["versions"] for name in PLANS},
        "versions": report["versions"],
        "times": times,
        "commands": [["flashar", *stage.words] for stage in stages()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where emoji.json and emoji.png go")
    asked = parser.parse_args()
    if not PICTURES.exists():
        draw = [sys.executable, Path(__file__).with_name("emoji_pictures.py"), "--out", PICTURES]
        if code := subprocess.run(draw).returncode:  # it has said why
            raise SystemExit(code)
    times = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    for stage in stages():
        if not finished(stage):
            times[stage.title] = run(stage)
            write_json(TIMES, times)
    found = result(times)
    write_json(asked.out / "emoji.json", found)
    Image.open(ROOT / "report" / "samples.png").quantize(256).save(asked.out / "emoji.png", optimize=True)
    print(f"wrote {asked.out}/emoji.json and emoji.png")


if __name__ == "__main__":
    main()
