"""`flashar tokenize check`: are these shards what their manifest says, and do the codes decode to pictures?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashar_pl.data.manifest import Manifest
    from flashar_pl.data.shards import Verification
    from flashar_pl.tokenizers import Tokenizer

STATISTICS = 2000
"""Samples of each split whose codes and captions are looked at for the summary."""
COLUMNS = 8


def tokenize_check(
    shards: str,
    /,
    *,
    decode: int | None = None,
    out: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Check shards against their manifest; exit code 2 and a list of what is wrong if anything is.

    Reads every byte: hashes, members, shapes, code and label ranges, ids unique within a split. Prints a summary of
    labels or captions and of the codes in use. With --out, draws random samples decoded to pixels: the surest test
    of a tokenizer that does not belong to the codes.

    Example:
        flashar tokenize check data/imagenet256 --decode 32 --out check.png

    Args:
        shards: directory of the shards, or one with a sub-directory for each grid.
        decode: samples to draw; 16 if only --out is given.
        out: PNG of the drawn samples; with several grids, their names are added to it.
        weights: weights file of the tokenizer, if it is not where the manifest says.
        device: auto, cpu, cuda or cuda:N; where the samples are decoded.
        seed: of the draw.
    """
    from flashar_pl.data.parts import manifests
    from flashar_pl.data.shards import Manifest, verify

    if decode is not None and out is None:
        raise ValueError("--decode draws samples into a PNG; add --out check.png.")
    if decode is not None and decode < 1:
        raise ValueError(f"decode is {decode}; expected 1 or more samples.")
    if out is not None and Path(out).exists():
        raise ValueError(f"{out} exists; choose another --out or remove it.")
    root = Path(shards)
    found = [path.parent for path in manifests(root)] if root.is_dir() else []
    result: dict[str, Any] = {}
    folders: list[Any] = [*found] or [shards]  # none found: a URL, or `load` says what it looked for
    for folder in folders:
        manifest = Manifest.load(folder)
        tokenizer = find_tokenizer(manifest, weights, device, needed=out is not None)
        if tokenizer is not None:
            check_weights(root, tokenizer)
        verified = verify(folder)
        facts = {"samples": verified.samples, "shards": verified.shards, "bytes": verified.bytes}
        facts |= {split: split_facts(manifest, split, verified) for split in verified.samples}
        show(manifest, facts)
        if out is not None:
            assert tokenizer is not None
            name = "" if len(found) < 2 else f"{manifest.grid[0]}x{manifest.grid[1]}"
            facts["picture"] = draw(manifest, tokenizer, decode or 16, picture_path(out, name), seed)
        result[Path(folder).name] = facts
    print("everything is as the manifest says")
    return result


def find_tokenizer(manifest: Manifest, weights: str | None, device: str, needed: bool) -> Tokenizer | None:
    """The tokenizer of the shards, on a device, checked against the manifest; None where it is not needed.

    Raises:
        ValueError: its weights are not there, or it has another number of codes.
    """
    if not needed and weights is None:
        return None
    from flashar_pl.devices import find_device
    from flashar_pl.tokenizers import build_tokenizer

    config = manifest.tokenizer if weights is None else manifest.tokenizer | {"weights": weights}
    if config.get("weights", "") is None or ("weights" in config and not Path(str(config["weights"])).exists()):
        raise ValueError(f"The tokenizer's weights {config['weights']} are not there; add --weights FILE.")
    tokenizer = build_tokenizer(config).to(find_device(device))
    if tokenizer.vocabulary != manifest.vocabulary:
        raise ValueError(
            f"The shards at {manifest.root} hold codes of a vocabulary of {manifest.vocabulary}, their tokenizer has "
            f"{tokenizer.vocabulary}: it is not the one that made them."
        )
    return tokenizer


def check_weights(out: Path, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the shards were made with other weights than the tokenizer has, where that was noted."""
    from flashar_pl.data.encode import weights_hash
    from flashar_pl.data.parts import read_json

    for report in sorted(out.glob("tokenize-*.json")):
        noted = read_json(report)["settings"].get("weights_hash")
        if noted is not None and noted != weights_hash(tokenizer):
            raise ValueError(
                f"{report} says that the codes were made with other weights than {tokenizer.config()} has."
            )


def split_facts(manifest: Manifest, split: str, verified: Verification) -> dict[str, Any]:
    """Labels or captions of a split, and the codes in use among some of its samples."""
    import numpy as np

    from flashar_pl.data.captions import caption_report
    from flashar_pl.data.order import EvaluationOrder
    from flashar_pl.data.reader import ShardReader

    reader = ShardReader(manifest, split)
    index = EvaluationOrder(len(reader), 1, STATISTICS).index
    samples = reader.read(index)
    share = np.bincount(samples.codes.reshape(-1), minlength=manifest.vocabulary) / samples.codes.size  # (V,)
    used = share[share > 0]
    facts: dict[str, Any] = {
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
        if labels := found.get("labels"):
            absent = labels["without_samples"]
            print(
                f"    {labels['classes']} classes, {labels['fewest'][1]:,} (class {labels['fewest'][0]}) to "
                f"{labels['most'][1]:,} (class {labels['most'][0]}) samples each; {len(absent)} without any"
                + (f": {', '.join(map(str, absent[:10]))}{' ...' if len(absent) > 10 else ''}" if absent else "")
            )
        if captions := found.get("captions"):
            for line in captions["lines"]:
                print(f"    {line}")


def draw(manifest: Manifest, tokenizer: Tokenizer, number: int, path: Path, seed: int) -> str:
    """Random samples and crops as one PNG; prints which ones, row by row. Returns the path."""
    import numpy as np
    import torch

    from flashar_pl.data.order import permutation, stream
    from flashar_pl.data.reader import ShardReader
    from flashar_pl.pictures import save_png, tile

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
        print("    " + "  ".join(f"{samples.ids[i]} ({_condition(samples, i)})" for i in rows))
    print(f"  {agree:.0%} of their codes are unchanged after decoding and encoding")
    return str(path)


def _condition(samples: Any, i: int) -> str:
    if samples.labels is not None:
        return str(samples.labels[i])
    return samples.texts[i][:40] if samples.texts is not None else "features"


def picture_path(out: str, name: str) -> Path:
    """`out`, with the name of a grid before its ending."""
    path = Path(out)
    return path.with_name(f"{path.stem}-{name}{path.suffix}") if name else path
