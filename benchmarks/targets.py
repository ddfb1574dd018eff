"""Which targets the committed results meet: a Markdown table of target, found, met or missed.

    python benchmarks/targets.py                      # benchmarks/results
    python benchmarks/targets.py --results elsewhere

Rounded weights (int8, fp8) change what is drawn and count for no target. Of several runners the fastest counts; on a
CPU each format of weights has lines of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashar_pl.console import table

EXACT = ("plain", "packed")
"""Formats of weights that change no value."""
OVER_GEMM, SHARE = 1.35, 0.85
"""CPU: the whole job over its matrix products at most; speed-up over the ratio of the matrix products at least."""


@dataclass(frozen=True)
class Target:
    """A bound on one number of the best row of a plan, with guidance, on a GPU."""

    name: str
    preset: str
    grid: tuple[int, int]
    plan: str
    field: str
    """Of a row."""
    bound: float
    stretch: float | None = None
    batch: int | None = 1
    """None = the best of all."""
    most: bool = True
    """Whether the bound is the largest value allowed; else the smallest."""


L, XXL, EMU = ("llamagen-l", (16, 16)), ("llamagen-xxl", (16, 16)), ("emu35-34b", (32, 32))
GPU = (
    Target("LlamaGen-L, batch 1, diagonal, ms", *L, "diagonal", "ms_per_image", 15, 9),
    Target("LlamaGen-XXL, batch 1, diagonal, ms", *XXL, "diagonal", "ms_per_image", 35),
    Target("LlamaGen-L, batch 1, raster, ms", *L, "raster", "ms_per_image", 90),
    Target("LlamaGen-L, best batch, diagonal, images/s", *L, "diagonal", "images_per_s", 1000, batch=None, most=False),
    Target("Emu3.5-34B, 32 x 32, diagonal, ms", *EMU, "diagonal", "ms_per_image", 1600, 1200),
    Target("Emu3.5-34B, 32 x 32, raster, ms", *EMU, "raster", "ms_per_image", 22000),
)


def read_results(results: Path, cpu: bool) -> list[dict[str, Any]]:
    """All decoding results of CPUs, or of GPUs."""
    found = [json.loads(file.read_text()) for file in sorted(results.glob("decode_*/results.json"))]
    return [result for result in found if (result["threads"] is not None) == cpu]


def line(name: str, found: float, bound: float, most: bool, stretch: float | None = None, note: str = "") -> list[str]:
    """Cells of one target."""
    met = found <= bound if most else found >= bound
    missed_by = abs(found / bound - 1)
    verdict = "met" if met else f"MISSED by {missed_by:.0%}"
    if met and stretch is not None:
        verdict += ", stretch met" if found <= stretch else f", stretch {stretch:g} not"
    return [name, f"{'<=' if most else '>='} {bound:g}", f"{found:.4g}", verdict, note]


def gpu_lines(results: Path) -> list[list[str]]:
    """One line for each GPU target; "not measured" where no result has it."""
    lines = []
    for target in GPU:
        command = {"preset": target.preset, "dtype": "bf16", "checkpoint": None}
        rows = [
            row
            for result in read_results(results, cpu=False)
            if command.items() <= result["command"].items() and tuple(result["grid"]) == target.grid
            for row in result["rows"]
            if row["plan"] == target.plan and row["weight_format"] in EXACT and target.batch in (None, row["batch"])
            if result["command"]["cfg_scale"] != 1
        ]
        if not rows:
            sign = "<=" if target.most else ">="
            lines.append([target.name, f"{sign} {target.bound:g}", "-", "not measured", ""])
            continue
        choose: Callable[..., dict[str, Any]] = min if target.most else max
        best = choose(rows, key=lambda row: row[target.field])
        note = f"{best['runner']}, {best['weight_format']}, batch {best['batch']}"
        lines.append(line(target.name, best[target.field], target.bound, target.most, target.stretch, note))
    return lines


def cpu_lines(results: Path) -> list[list[str]]:
    """Whole job over matrix products, and speed-up over their ratio: LlamaGen-B, one thread, one guided image."""
    lines = []
    for result in read_results(results, cpu=True):
        command = result["command"]
        if (command["preset"], result["threads"], result["grid"]) != ("llamagen-b", 1, [16, 16]):
            continue
        dtype = result["command"]["dtype"]
        for row in result["rows"]:
            if row["over_gemm"] is not None and row["weight_format"] in EXACT and row["batch"] == 1:
                name = f"CPU {dtype}, {row['plan']}, time / GEMM-only"
                lines.append(line(name, row["over_gemm"], OVER_GEMM, True, None, _engine(row)))
        for each in result["speedups"]:
            if each["gemm_only"] and each["weight_format"] in EXACT and each["batch"] == 1:
                name = f"CPU {dtype}, {each['plan']}, speed-up over raster / GEMM-only ratio"
                lines.append(line(name, each["over_raster"] / each["gemm_only"], SHARE, False, None, _engine(each)))
    return lines


def _engine(row: dict[str, Any]) -> str:
    return f"{row['runner']}, {row['weight_format']}"


def target_table(results: Path) -> str:
    """The table of all targets."""
    return table(("target", "bound", "found", "verdict", "with"), [*cpu_lines(results), *gpu_lines(results)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    print(target_table(parser.parse_args().results))
