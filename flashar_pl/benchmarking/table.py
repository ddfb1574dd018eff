"""Speed-ups, Markdown table and drawing of `flashar benchmark`."""

from __future__ import annotations

from typing import Any

from flashar_pl import console
from flashar_pl.decoding.build import EXACT

PLAIN = "plain raster"
"""Name of the rows of `flashar_pl.benchmarking.plain`."""
COLUMNS = (
    "plan", "runner", "weights", "batch", "ms/image", "IQR", "images/s", "ms/step", "steps", "peak MiB",
    "memory floor ms", "FLOP floor ms", "floor reached", "GEMM-only ms", "x GEMM-only", "repeats",
)  # fmt: skip


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every parallel plan, batch size, runner and format of weights: against the raster plan of the same engine,
    against the plain raster decoder, the ratio of steps, and the ratio of the matrix products alone; None where a row
    is missing. Where auto took another format for the raster plan, the fastest raster row with exact weights counts."""
    found = []
    strong_at = {_engine(row): row for row in rows if row["plan"] == "raster"}
    plain_at = {row["batch"]: row for row in rows if row["plan"] == PLAIN}
    for row in (row for row in rows if row["plan"] not in ("raster", PLAIN)):
        strong, slow = strong_at.get(_engine(row)) or _exact(row, rows), plain_at.get(row["batch"])
        reference = strong or slow
        found.append(
            {name: row[name] for name in ("plan", "runner", "weight_format", "batch")}
            | {
                "over_raster": strong and strong["seconds"] / row["seconds"],
                "over_plain_raster": slow and slow["seconds"] / row["seconds"],
                "steps": reference and reference["steps"] / row["steps"],
                "gemm_only": strong and strong["gemm_s"] / row["gemm_s"],
            }
        )
    return found


def _engine(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows that are compared have in common."""
    return row["runner"], row["weight_format"], row["batch"]


def _exact(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest raster row of the same runner and batch size whose format changes no weight, for a row of such."""
    same = [
        other
        for other in rows
        if (other["plan"], other["runner"], other["batch"]) == ("raster", row["runner"], row["batch"])
        and {other["weight_format"], row["weight_format"]} <= set(EXACT)
    ]
    return min(same, key=lambda other: other["seconds"], default=None)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        *(row["plan"], row["runner"], row["weight_format"], str(row["batch"])),
        *(f"{row['ms_per_image']:.2f}", f"{row['spread_s'] / row['seconds']:.1%}", f"{row['images_per_s']:.2f}"),
        *(f"{row['ms_per_step']:.2f}", str(row["steps"])),
        f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] else "unknown",
        *(f"{1e3 * row['bandwidth_floor_s']:.2f}", f"{1e3 * row['flop_floor_s']:.2f}", f"{row['share_of_floor']:.0%}"),
        "-" if row["gemm_s"] is None else f"{1e3 * row['gemm_s']:.2f}",
        "-" if row["over_gemm"] is None else f"{row['over_gemm']:.2f}",
        str(row["time"]["repeats"]),
    ]


def table(result: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    threads = f", {result['threads']} thread(s)" if result["threads"] else ""
    clock = "processor time" if result["clock"] == "cpu" else "wall time"
    parts = [
        f"{result['device']}{threads}; {result['command']['dtype']}, grid {result['grid'][0]}x{result['grid'][1]}, "
        f"guidance {result['command']['cfg_scale']}; medians of {clock}; floors and GEMM-only per batch.",
        console.table(COLUMNS, [_cells(row) for row in result["rows"]]),
    ]
    if result["speedups"]:
        header = ("plan", "runner", "weights", "batch", "over raster", "over plain raster", "steps", "GEMM-only")
        keys = ("over_raster", "over_plain_raster", "steps", "gemm_only")
        lines = [
            [
                each["plan"],
                each["runner"],
                each["weight_format"],
                str(each["batch"]),
                *("-" if each[k] is None else f"{each[k]:.2f}x" for k in keys),
            ]
            for each in result["speedups"]
        ]
        parts.append("Speed-up:\n\n" + console.table(header, lines))
    once = [f"{row['plan']} at batch {row['batch']}" for row in result["rows"] if row["time"]["repeats"] == 1]
    if once:
        parts.append(f"Measured once only: {'; '.join(once)}.")
    causes: dict[str, list[str]] = {}
    for row in result["failed"]:
        cause = f"with runner {row['runner']}, {row['weight_format']} weights: {row['cause']}"
        causes.setdefault(cause, []).append(f"{row['plan']} at batch {row['batch']}")
    parts += [f"FAILED: {', '.join(rows)} {cause}" for cause, rows in causes.items()]
    return "\n\n".join(parts) + "\n"
