"""What shards hold: codes in use, labels, captions, and a picture of decoded samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashar_pl.data.manifest import Manifest
from flashar_pl.data.order import EvaluationOrder, permutation, stream
from flashar_pl.data.reader import ShardReader
from flashar_pl.data.verify import Verification
from flashar_pl.pictures import save_png, tile
from flashar_pl.tokenizers import Tokenizer

STATISTICS = 2000
"""Samples of each split whose codes are looked at for the summary."""
COLUMNS = 8
READ = 10_000
"""Captions read at once."""


def caption_report(reader: ShardReader) -> dict[str, Any]:
    """Counts over every caption of a split, and the same as lines of text under "lines".

    "empty" captions train like no caption; many samples with one caption ("repeated": samples whose caption some
    earlier sample has) often mean that a column was mixed up.
    """
    seen: Counter[str] = Counter()
    for numbers in np.split(np.arange(len(reader)), range(READ, len(reader), READ)):
        texts = reader.read(numbers).texts
        assert texts is not None
        seen.update(text.strip() for text in texts)
    filled = Counter({text: count for text, count in seen.items() if text})
    repeated = sum(filled.values()) - len(filled)
    low, median, high = np.quantile(np.repeat([len(text) for text in seen], list(seen.values())), [0, 0.5, 1])
    lines = [
        f"captions: {seen['']:,} empty, {repeated:,} repeated; {low:.0f} to {high:.0f} characters, median {median:.0f}"
    ]
    most, times = filled.most_common(1)[0] if filled else ("", 0)
    if times > 1:
        lines.append(f"most frequent, {times:,} times: {most[:80]!r}")
    return {"empty": seen[""], "repeated": repeated, "most_frequent": [most, times], "lines": lines}


def split_facts(manifest: Manifest, split: str, verified: Verification) -> dict[str, Any]:
    """Labels or captions of a split, and the codes in use among some of its samples."""
    reader = ShardReader(manifest, split)
    index = EvaluationOrder(len(reader), 1, STATISTICS).index
    samples = reader.read(index)
    share = np.bincount(samples.codes.reshape(-1), minlength=manifest.vocabulary) / samples.codes.size  # (V,)
    used = share[share > 0]
    facts: dict[str, Any] = {
        "also_in": verified.shared[split],
        "codes_used": len(used),
        "codes_perplexity": float(np.exp(-(used * np.log(used)).sum())),
    }
    if manifest.condition.kind == "class":
        counts = np.array(verified.labels[split])
        facts["labels"] = {
            "classes": len(counts),
            "without_samples": np.flatnonzero(counts == 0).tolist(),
            "fewest": [int(counts.argmin()), int(counts.min())],
            "most": [int(counts.argmax()), int(counts.max())],
        }
    if manifest.condition.kind == "text":
        facts["captions"] = caption_report(reader)
    return facts


def show(manifest: Manifest, facts: dict[str, Any]) -> None:
    """Print the facts of one set of shards."""
    height, width = manifest.grid
    kind = manifest.tokenizer.get("kind")
    print(
        f"{manifest.root}: {facts['shards']} shards, {facts['bytes'] / 1e6:,.1f} MB, {manifest.crops} crops of "
        f"{height} x {width} codes of {manifest.vocabulary} ({kind})"
    )
    for split, count in facts["samples"].items():
        found = facts[split]
        looked = min(count, STATISTICS)
        print(
            f"  {split}: {count:,} samples; {found['codes_used']:,} different codes in {looked:,} of them, "
            f"perplexity {found['codes_perplexity']:,.0f}"
        )
        for other, number in found["also_in"].items():
            print(f"    WARNING: {number:,} of them have the codes of one in the {other} split: they are not held out")
        if labels := found.get("labels"):
            absent = [_class(manifest, number) for number in labels["without_samples"]]
            (fewest, least), (most, greatest) = labels["fewest"], labels["most"]
            print(
                f"    {labels['classes']} classes, {least:,} (class {_class(manifest, fewest)}) to {greatest:,} (class "
                f"{_class(manifest, most)}) samples each; {len(absent)} without any"
                + (f": {', '.join(absent[:10])}{' ...' if len(absent) > 10 else ''}" if absent else "")
            )
        if account := manifest.accounts.get(split):
            left_out = "".join(f"; {n} {why}" for why, n in account["left_out"].items())
            print(f"    of {account['found']} entries of the input {account['used']} were used{left_out}")
        if captions := found.get("captions"):
            for line in captions["lines"]:
                print(f"    {line}")


def draw(manifest: Manifest, tokenizer: Tokenizer, number: int, path: Path, seed: int) -> str:
    """Random samples and crops as one PNG; prints which ones, row by row. Returns the path."""
    split = next(iter(manifest.splits))
    reader = ShardReader(manifest, split)
    index = np.sort(permutation(stream(seed, 5), len(reader))[:number])
    crops = np.array([stream(seed, 6, int(i)) % manifest.crops for i in index], dtype=np.int64)
    samples = reader.read(index, crops)
    place = next(iter([*tokenizer.parameters(), *tokenizer.buffers()])).device
    codes = torch.from_numpy(samples.codes).to(place)
    images = torch.cat([tokenizer.decode(part) for part in codes.split(COLUMNS)])  # (N, 3, h, w) uint8
    again = torch.cat([tokenizer.encode(part) for part in images.split(COLUMNS)])  # (N, H, W)
    agree = float((again == codes).float().mean())
    save_png(tile(images.cpu(), COLUMNS), path)
    print(f"  {path}: {len(index)} samples of the {split} split, id (condition):")
    for begin in range(0, len(index), COLUMNS):
        rows = range(begin, min(begin + COLUMNS, len(index)))
        print("    " + "  ".join(f"{samples.ids[i]} ({_condition(manifest, samples, i)})" for i in rows))
    print(f"  {agree:.0%} of their codes are unchanged after decoding and encoding")
    return str(path)


def _class(manifest: Manifest, number: int) -> str:
    """A class by id, and by name where it is known."""
    return f"{number} {manifest.class_names[number]}" if manifest.class_names else str(number)


def _condition(manifest: Manifest, samples: Any, i: int) -> str:
    if samples.labels is not None:
        return _class(manifest, int(samples.labels[i]))
    return samples.texts[i][:40] if samples.texts is not None else "features"
