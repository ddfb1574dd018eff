"""GenEval's images in its official folder layout, and their score; every rank draws and scores its share.

    OUT/00000/metadata.jsonl            the prompt's line of the prompt file
    OUT/00000/samples/0000.png          its images

Shapes: n images in all, B images drawn together.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashar_pl.checkpoints.opening import Source, open_checkpoint
from flashar_pl.console import versions
from flashar_pl.decoding.build import build_engine
from flashar_pl.decoding.request import DrawRequest
from flashar_pl.decoding.samples import SampleSet, draw
from flashar_pl.evaluate.identity import SETTINGS, check_settings, path_digest, tokenizer_identity
from flashar_pl.evaluate.options import GENEVAL_BATCH_SIZE, GenEval, batch_size
from flashar_pl.files import require_new, write_json, write_text
from flashar_pl.metrics import geneval_images
from flashar_pl.metrics.geneval import DEFAULT_SETTINGS, keep_detections, score_image, summarise
from flashar_pl.metrics.geneval_entries import read_entries
from flashar_pl.options import SampleOptions, ShapeOptions
from flashar_pl.pictures import save_png
from flashar_pl.ranks import Rank
from flashar_pl.text_files import read_json

RESULTS, SUMMARY = "results.jsonl", "geneval.json"


def geneval_on_rank(asked: GenEval, threads: int, rank: Rank) -> dict[str, Any] | None:
    """One rank's work; the first rank returns what geneval.json holds, None where nothing is scored.

    threads: of every rank on a CPU; the last bit of a sum depends on their number.
    """
    torch.set_num_threads(threads)
    out, options = Path(asked.options.out), asked.options
    if options.detector is not None:
        rank.first(lambda: require_new(out / SUMMARY, "scores"))
    if options.prompts is not None:
        draw_images(asked, read_prompts(options.prompts), rank)
    rank.barrier()
    if options.detector is None or options.clip is None:
        return None
    return score_images(out, options.detector, options.clip, rank)


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """GenEval's prompt entries. Raises ValueError for no such file, or an entry that cannot be drawn and scored."""
    if not Path(path).is_file():
        raise ValueError(
            f"no prompts at {path}; expected evaluation_metadata.jsonl from github.com/djghosh13/geneval (prompts/)."
        )
    entries = read_entries(path)
    if not entries:
        raise ValueError(f"{path} holds no prompts.")
    return entries


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_images(asked: GenEval, entries: list[dict[str, Any]], rank: Rank) -> None:
    """Draw this rank's share of the images that are not there yet."""
    out, every = Path(asked.options.out), asked.options.num_images
    source = open_checkpoint(asked.model, replace(asked.engine, device=str(rank.device)))
    decoder = source.matching_tokenizer(str(rank.device), asked.engine.pixel_dtype)
    samples = prompt_samples(asked, source, [entry["prompt"] for entry in entries])
    rank.first(lambda: _open(asked, source, entries, samples, decoder.decode_dtype))
    files = [out / f"{i // every:05d}" / "samples" / f"{i % every:04d}.png" for i in range(samples.n)]
    engine = build_engine(source, asked.engine, samples.plan)
    rank.say(f"drawing {samples.n:,} images of {len(entries):,} prompts into {out}")
    todo = [batch for batch in rank.share(samples.batches) if not all(files[i].exists() for i in samples.wanted(batch))]
    with rank.progress(len(todo) * samples.batch_size, "images") as advance:
        for drawn in draw(engine, decoder, samples, todo):
            for i, image in zip(drawn.index.tolist(), drawn.images.cpu()):
                if not files[i].exists():
                    save_png(image, files[i])
            advance(samples.batch_size)


def prompt_samples(asked: GenEval, source: Source, prompts: list[str]) -> SampleSet:
    """The numbered images of all prompts. Raises ValueError for a model or prompt assets that do not fit."""
    draw, every = SampleOptions(prompts, num_images=1, seed=asked.options.seed), asked.options.num_images
    request = DrawRequest.of(source, draw, asked.sampling, ShapeOptions(), asked.text, asked.engine.plan)
    return request.samples(batch_size(asked.engine, GENEVAL_BATCH_SIZE, len(prompts) * every), every)


def _open(asked: GenEval, source: Source, entries: list[dict[str, Any]], samples: SampleSet, decode_dtype: str) -> None:
    """Make the folders, or check that those there are of the same images."""
    out, config = Path(asked.options.out), source.need_tokenizer()
    if decode_dtype != config.get("decode_dtype", "float32"):
        config = config | {"decode_dtype": decode_dtype}
    identity = {
        **asdict(samples.sampling),
        "negative_prompt": asked.text.negative_prompt,
        "num_images": asked.options.num_images,
        "seed": samples.seed,
        "batch_size": samples.batch_size,
        "dtype": source.dtype,
        "weight_format": asked.engine.weight_format,
        "grid": list(samples.grid),
        "plan": samples.plan,
        "checkpoint_sha256": path_digest(source.path),
        "tokenizer": tokenizer_identity(config),
        "prompts": len(entries),
    }
    check_settings(out, identity)
    if not (out / SETTINGS).exists():
        write_json(out / SETTINGS, {**identity, "versions": versions()})
    for i, entry in enumerate(entries):
        folder = out / f"{i:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        file = folder / "metadata.jsonl"
        if not file.exists():
            write_text(file, json.dumps(entry) + "\n")
        elif _entry_of(folder) != entry:
            raise ValueError(f"{file} is of another prompt; choose another --out.")


# --- scoring ----------------------------------------------------------------------------------------------------------


def list_images(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every image of the layout with its prompt's entry, in order. ValueError where there are none or too few."""
    found: list[tuple[Path, dict[str, Any]]] = []
    counts: dict[str, int] = {}
    for folder in sorted(p for p in out.glob("[0-9]*") if p.is_dir() and p.name.isdigit()):
        entry = _entry_of(folder)
        files = sorted(p for p in (folder / "samples").glob("*.png") if p.stem.isdigit())
        counts[folder.name] = len(files)
        found += [(file, entry) for file in files]
    if not found:
        raise ValueError(f"no images in {out}; expected 00000/samples/0000.png and so on.")
    most = max(counts.values())
    short = [name for name, count in counts.items() if count < most]
    if short:
        raise ValueError(
            f"{len(short)} of {len(counts)} prompts in {out} have fewer than {most} images (first: {short[0]}); give "
            "the command that draws them again."
        )
    return found


def _entry_of(folder: Path) -> dict[str, Any]:
    """The entry of a prompt's folder. Raises ValueError where its file does not hold one."""
    entries = read_entries(folder / "metadata.jsonl")
    if len(entries) != 1:
        raise ValueError(f"{folder}/metadata.jsonl holds {len(entries)} entries; expected one, the prompt's.")
    return entries[0]


def score_images(out: Path, detector: str, clip: str, rank: Rank) -> dict[str, Any] | None:
    """Score this rank's share of the images; the first rank writes results.jsonl and geneval.json."""
    images = list_images(out)
    rank.say(f"scoring {len(images):,} images of {out}; reading {detector} and {clip}")
    detect = geneval_images.Detector(detector, rank.device)
    colors = geneval_images.ColorClassifier(clip, rank.device)
    mine = rank.share(len(images))
    rows: list[str] = []
    with rank.progress(len(mine), "images") as advance:
        for i in mine:
            rows.append(json.dumps(_score(*images[i], detect, colors, out)))
            advance(1)
    scored = rank.gather(rows)
    if rank.rank > 0:
        return None
    lines = [scored[i % rank.world][i // rank.world] for i in range(len(images))]
    return _summary(out, images, lines, {"detector": detector, "clip": clip})


def _score(file: Path, entry: dict[str, Any], detect: Any, colors: Any, out: Path) -> dict[str, str | bool]:
    """The official fields of one image."""
    image = geneval_images.open_image(file)
    found = detect(image)
    correct, reason = score_image(found, entry, partial(colors, image))
    kept = keep_detections(found, entry["tag"])
    return {
        "filename": str(file.relative_to(out)),
        "tag": entry["tag"],
        "prompt": entry["prompt"],
        "correct": correct,
        "reason": reason,
        "metadata": json.dumps(entry),
        "details": json.dumps({name: [[*d.box, d.score] for d in chosen] for name, chosen in kept.items()}),
    }


def _summary(
    out: Path, images: list[tuple[Path, dict[str, Any]]], lines: list[str], models: dict[str, str]
) -> dict[str, Any]:
    """Write the results and return the report."""
    summary = summarise([(entry, json.loads(line)["correct"]) for (_, entry), line in zip(images, lines)])
    drawn = out / SETTINGS
    report = {
        "command": "evaluate geneval",
        **asdict(summary),
        "tasks": {name: {"correct": right, "images": total} for name, (right, total) in summary.tasks.items()},
        "thresholds": asdict(DEFAULT_SETTINGS),
        **{name: {"path": path, "sha256": path_digest(path)} for name, path in models.items()},
        "drawn_with": read_json(drawn) if drawn.exists() else None,
        "versions": versions(),
    }
    write_text(out / RESULTS, "".join(line + "\n" for line in lines))
    write_json(out / SUMMARY, report)
    return report
