"""Speed-ups, Markdown table and drawing of `flashar benchmark`."""

from __future__ import annotations

from typing import Any

from flashar_pl import console
from flashar_pl.decoding.build import EXACT

PLAIN = "plain raster"
"""Name of the rows of `flashar_pl.benchmarking.plain`."""
ENGINE = ("runner", "weight_format", "batch")
"""What rows that are compared like for like have in common."""
PIXELS = ("pixels ms/image", "with pixels ms/image")
"""Further columns, where pixels were measured."""
COLUMNS = (
    "plan", "runner", "weights", "batch", "ms/image", "IQR", "images/s", "ms/step", "steps", "peak MiB",
    "memory floor ms", "FLOP floor ms", "floor reached", "GEMM-only ms", "x GEMM-only", "repeats",
)  # fmt: skip


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every parallel plan, batch size, runner and format of weights: against the fastest raster row, the raster row
    of the same engine, the plain raster decoder, the ratio of steps, and the ratio of the matrix products alone (of the
    same engine, else the fastest); None where a row is missing."""
    found = []
    alike_at = {tuple(row[name] for name in ENGINE): row for row in rows if row["plan"] == "raster"}
    plain_at = {row["batch"]: row for row in rows if row["plan"] == PLAIN}
    for row in (row for row in rows if row["plan"] not in ("raster", PLAIN)):
        rivals = [other for other in rows if other["plan"] == "raster" and other["batch"] == row["batch"]]
        exact = [other for other in rivals if other["weight_format"] in {*EXACT, row["weight_format"]}]
        fastest = min(exact, key=lambda other: other["seconds"], default=None)  # as exact, or rounded as the row
        alike, slow = alike_at.get(tuple(row[name] for name in ENGINE)), plain_at.get(row["batch"])
        strong = alike or fastest
        reference = strong or slow
        found.append(
            {name: row[name] for name in ("plan", *ENGINE)}
            | {
                "over_raster": fastest and fastest["seconds"] / row["seconds"],
                "like_for_like": alike and alike["seconds"] / row["seconds"],
                "over_plain_raster": slow and slow["seconds"] / row["seconds"],
                "steps": reference and reference["steps"] / row["steps"],
                "gemm_only": strong and strong["gemm_s"] / row["gemm_s"],
                "over_raster_with_pixels": fastest and _with_pixels(fastest, row),
            }
        )
    return found


def _with_pixels(slow: dict[str, Any], fast: dict[str, Any]) -> float | None:
    """The speed-up of codes and pixels together; None where pixels were not measured."""
    pixels = fast.get("pixels_s")
    return None if pixels is None else (slow["seconds"] + pixels) / (fast["seconds"] + pixels)


def doubts(rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> list[str]:
    """What in a result cannot be: a row below its floor, a speed-up above the ratio of steps."""
    found = [
        f"DOUBT: {row['plan']}, {row['weight_format']} weights, batch {row['batch']} reaches "
        f"{row['share_of_floor']:.0%} of its floor: its weights came from a cache, or the rates of this machine were "
        "measured while others used it."
        for row in rows
        if row["share_of_floor"] > 1
    ]
    return found + [
        f"DOUBT: {each['plan']}, {each['weight_format']} weights, batch {each['batch']} is {each['over_raster']:.2f} "
        f"times as fast as raster in {1 / each['steps']:.3f} of its steps: the raster row is not this machine's best. "
        "Measure --weight-formats plain,packed."
        for each in ratios
        if each["over_raster"] is not None and each["over_raster"] > each["steps"]
    ]


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
        *(f"{1e3 * (row['pixels_s'] + s) / row['batch']:.2f}" for s in (0, row["seconds"]) if "pixels_s" in row),
    ]


def _mean(row: dict[str, Any], clock: str) -> str:
    mean, error, images = row["time"][f"{clock}_mean_s"], row["time"][f"{clock}_standard_error_s"], row["batch"]
    each = console.plus_minus(1e3 * mean / images, None if error is None else 1e3 * error / images, ".2f")
    name = f"{row['plan']} {row['runner']} {row['weight_format']} batch {images}"
    return f"{name} {each} ms/image, {images / mean:.2f} images/s"


def table(result: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    threads = f", {result['threads']} thread(s)" if result["threads"] else ""
    clock = "processor time" if result["clock"] == "cpu" else "wall time"
    parts = [
        f"{result['device']}{threads}; {result['command']['dtype']}, grid {result['grid'][0]}x{result['grid'][1]}, "
        f"guidance {result['command']['cfg_scale']}; medians of {clock}; floors and GEMM-only per batch.",
        console.table(COLUMNS + (PIXELS if result.get("pixels") else ()), [_cells(row) for row in result["rows"]]),
        "means, ± standard error: " + "; ".join(_mean(row, result["clock"]) for row in result["rows"]),
    ]
    if result["speedups"]:
        header: tuple[str, ...] = (
            "plan", "runner", "weights", "batch",
            "over fastest raster", "like for like", "over plain raster", "steps", "GEMM-only",
        )  # fmt: skip
        keys: tuple[str, ...] = ("over_raster", "like_for_like", "over_plain_raster", "steps", "gemm_only")
        if result.get("pixels"):
            header, keys = (*header, "with pixels"), (*keys, "over_raster_with_pixels")
        lines = [
            [str(each[name]) for name in ("plan", *ENGINE)]
            + ["-" if each[name] is None else f"{each[name]:.2f}x" for name in keys]
            for each in result["speedups"]
        ]
        parts.append("Speed-up:\n\n" + console.table(header, lines))
    once = [f"{row['plan']} at batch {row['batch']}" for row in result["rows"] if row["time"]["repeats"] == 1]
    if once:
        parts.append(f"Measured once only: {'; '.join(once)}.")
    parts += doubts(result["rows"], result["speedups"])
    causes: dict[str, list[str]] = {}
    for row in result["failed"]:
        cause = f"with runner {row['runner']}, {row['weight_format']} weights: {row['cause']}"
        causes.setdefault(cause, []).append(f"{row['plan']} at batch {row['batch']}")
    parts += [f"FAILED: {', '.join(rows)} {cause}" for cause, rows in causes.items()]
    return "\n\n".join(parts) + "\n"
