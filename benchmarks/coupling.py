"""What `flashar evaluate scenes` found with and without `--coupling systematic`, and which objects share a diagonal.

    python benchmarks/coupling.py eval/*/ --out docs/results/coupling.json

Each directory is one that the command wrote. Two objects that begin on one diagonal fit if they are three rows apart or
more, as in all training images; otherwise they overlap or touch. Prints the table of docs/results/beyond.md.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from flashar_pl.data.scenes import APART
from flashar_pl.tokenizers.scenes import QUARTERS


def pairs(codes: np.ndarray) -> tuple[bool, bool]:
    """Whether two objects of codes (8, 8) begin on one diagonal as they may, and whether two do as they may not."""
    begins = np.argwhere(codes % QUARTERS == 1).tolist()
    rows = [abs(a[0] - b[0]) for a, b in itertools.combinations(begins, 2) if sum(a) == sum(b)]
    return any(apart >= APART for apart in rows), any(apart < APART for apart in rows)


def row(folder: Path) -> dict[str, Any]:
    """One evaluation."""
    result = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    found = np.array([pairs(codes) for codes in np.load(folder / "codes.npy")])
    kept = {name: result[name] for name in ("torn", "exact", "correct", "data", "versions")}
    kept |= {name: result["settings"][name] for name in ("plan", "coupling", "seed", "batch_size")}
    training = result["checkpoint"]["training"]
    trained = {"training_steps": training.get("step"), "nll": result["likelihood"]["nll_nats_per_image"]}
    return {
        "name": folder.name,
        **trained,
        "legal": float(found[:, 0].mean()),
        "illegal": float(found[:, 1].mean()),
    } | kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", required=True)
    asked = parser.parse_args()
    rows = [row(folder) for folder in asked.folders]
    for each in rows:
        shares = [each["torn"]["share"], each["exact"]["share"], each["legal"], each["illegal"]]
        print("|", each["name"], "|", " | ".join(f"{share:.3f}" for share in shares), "|")
    Path(asked.out).write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
