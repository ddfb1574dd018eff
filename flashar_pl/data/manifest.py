"""The manifest of a set of code shards: what `manifest.json` says, read and written.

A data set is a directory: `manifest.json` and WebDataset tars. A tar holds *records*; one record is a block of
samples (`codes.npy`, `ids.npy` and the condition, see `writer.py`). The manifest stores where each member of each
record begins, so that samples are read by offset and no tar is ever scanned.

Shapes: n samples of a block, K crops of an image, H x W grid.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashar_pl.checkpoints.named_paths import all_inside, located, marks, named_paths, strange
from flashar_pl.data import forms
from flashar_pl.data.locations import fetch, is_remote, read_bytes
from flashar_pl.files import default_cache, write_text
from flashar_pl.text_files import read_json

if TYPE_CHECKING:
    from flashar_pl.backbones.condition import Conditioning

FORMAT = 1
FILE_NAME = "manifest.json"
SPLITS = ("train", "validation", "test")
KINDS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "class": ({"num_classes": forms.CLASSES}, ("labels.npy",)),
    "text": ({}, ("texts.json",)),
    "text-features": ({"length": forms.SIDE, "width": forms.SIDE}, ("features.npy", "lengths.npy")),
}
"""Kind of condition -> the sizes it has, with their limits, and the members of a record that hold it."""


class NoShards(ValueError):
    """There is no manifest at a place: (what was looked for, the place)."""

    def __str__(self) -> str:
        found, place = self.args
        return (
            f"{found} Make them: `flashar tokenize digits --out {place}` writes the embedded digits, `tokenize scenes` "
            "the scenes; for images see `flashar tokenize --help`."
        )


def code_dtype(vocabulary: int) -> np.dtype:
    """The smallest unsigned type that holds code ids 0 .. vocabulary - 1."""
    return np.min_scalar_type(vocabulary - 1)


@dataclass(frozen=True)
class ConditionSpec:
    """What the samples are conditioned on."""

    kind: str
    """"class" (one class id), "text" (one caption), or "text-features" (features of a text encoder)."""
    num_classes: int | None = None
    """"class": number of classes; ids are 0 .. num_classes - 1."""
    length: int | None = None
    """"text-features": the text length T every batch is left-padded to; no sample is longer."""
    width: int | None = None
    """"text-features": feature width C."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"Condition kind {forms.shown(self.kind)}; expected one of {', '.join(KINDS)}.")
        limits = KINDS[self.kind][0]
        for size in ("num_classes", "length", "width"):
            value = getattr(self, size)
            if size in limits:
                forms.integer(f"{size} of condition kind {self.kind!r}", value, 1, limits[size])
            elif value is not None:
                found = forms.shown(value)
                raise ValueError(f"{size}={found} has no meaning for condition kind {self.kind!r}; leave it out.")

    @property
    def members(self) -> tuple[str, ...]:
        """The members of a record that hold the condition."""
        return KINDS[self.kind][1]


@dataclass(frozen=True)
class Record:
    """One block of samples inside a tar."""

    samples: int
    members: dict[str, tuple[int, int]]
    """Member name, such as "codes.npy" -> (offset of its first byte in the tar, number of bytes)."""

    def __post_init__(self) -> None:
        forms.integer("samples of a record", self.samples, 1, forms.SIZE)
        for member, (offset, size) in self.members.items():
            forms.integer(f"offset of {forms.shown(member)}", offset, 0, forms.SIZE)
            forms.integer(f"size of {forms.shown(member)}", size, 0, forms.SIZE)


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    path: str
    """Name of the file, which lies beside the manifest."""
    samples: int
    bytes: int
    sha256: str
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        forms.file_name("shard path", self.path)
        what = f"shard {self.path!r}"
        forms.sha256(f"{what}: sha256", self.sha256)
        forms.integer(f"{what}: bytes", self.bytes, 1, forms.SIZE)
        if forms.integer(f"{what}: samples", self.samples, 1, forms.SIZE) != sum(r.samples for r in self.records):
            raise ValueError(f"{what}: {self.samples} samples do not agree with its records")
        if any(offset + size > self.bytes for record in self.records for offset, size in record.members.values()):
            raise ValueError(f"{what}: a member of a record ends after the shard's {self.bytes} bytes")


@dataclass(frozen=True)
class Manifest:
    """Everything a reader must know about a set of shards. `load` it from a directory; a `ShardWriter` makes it."""

    name: str
    """Name of the data set, such as "digits"."""
    tokenizer: dict[str, Any]
    """`config()` of the tokenizer that made the codes and decodes them."""
    grid: tuple[int, int]
    """(H, W) of every sample."""
    vocabulary: int
    """Codes are 0 .. vocabulary - 1."""
    condition: ConditionSpec
    crops: int = 1
    """Tokenised crops of each image; training draws one per epoch."""
    splits: dict[str, tuple[Shard, ...]] = field(default_factory=dict)
    evaluation_crop: int = 0
    """Which crop evaluation takes; the centre of ten is 4."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their ids, where they are known; the same for every split."""
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Split -> what the input held: {"found": entries, "used": n, "left_out": {reason: n}}."""
    preview: tuple[int, int] | None = None
    """(h, w) of a smaller version of every image whose codes are there too, for models that draw it first."""
    preparation: dict[str, str] = field(default_factory=dict)
    """What was done to the images before they were tokenised, such as {"crop": "centre square"}, where it is known."""
    frames: int = 1
    """Frames of every sample, one below the other in the grid: of videos."""
    root: str = ""
    """Location the shard paths are relative to; not stored."""
    strange: frozenset[str] = field(default=frozenset(), compare=False)
    """Files of the tokenizer that no command of this user wrote or typed, see `named_paths`; not stored."""

    def __post_init__(self) -> None:
        forms.name("name", self.name)
        if not isinstance(self.tokenizer, dict):
            raise ValueError(f"tokenizer is {forms.shown(self.tokenizer)}; expected its settings by name.")
        for what, sides in (("grid", self.grid), ("preview", self.preview or self.grid)):
            if len(sides) != 2:
                raise ValueError(f"{what} {forms.shown(sides)}; expected (height, width).")
            for side, value in zip(("height", "width"), sides, strict=True):
                forms.integer(f"{what} {side}", value, 1, forms.SIDE)
        forms.integer("vocabulary", self.vocabulary, 1, forms.IDS)
        forms.integer("crops", self.crops, 1, forms.SIDE)
        if self.grid[0] % forms.integer("frames", self.frames, 1, forms.SIDE):
            raise ValueError(f"{self.frames} frames in {self.grid[0]} rows; expected as many rows for each.")
        forms.integer("evaluation_crop", self.evaluation_crop, 0, self.crops - 1)
        self._check_splits()
        check_names(self.class_names, self.condition.num_classes)
        for what, done in self.preparation.items():
            forms.name(forms.name("a step of the preparation", what), done)
        for split, account in self.accounts.items():
            forms.name("a split of the accounts", split)
            for what in ("found", "used"):
                forms.integer(f"{what} of the account of {split}", account[what], 0, forms.SIZE)
            for reason, number in account["left_out"].items():
                forms.integer(forms.name("a reason in the accounts", reason), number, 1, forms.SIZE)

    def class_name(self, label: int) -> str:
        """What stands above pictures of a class."""
        return self.class_names[label] if self.class_names else str(label)

    def _check_splits(self) -> None:
        """No shard twice, in one split or in two; no record of more samples than its members have room for."""
        sample = self.crops * self.grid[0] * self.grid[1] * code_dtype(self.vocabulary).itemsize
        needed = {"codes.npy": sample, "ids.npy": np.dtype(np.int64).itemsize}
        seen: dict[str, str] = {}
        for split, shards in self.splits.items():
            forms.name("a split", split)
            for shard in shards:
                what = f"shard {shard.path!r} of the {split} split"
                if before := seen.get(shard.path) or seen.get(shard.sha256):
                    raise ValueError(f"{what} is also {before}: no sample may be in two splits, or twice in one")
                seen[shard.path] = seen[shard.sha256] = what
                for record, (member, size) in product(shard.records, needed.items()):
                    _, room = record.members.get(member, (0, record.samples * size))
                    if record.samples * size > room:
                        raise ValueError(f"{what}: {room} bytes of {member} cannot hold {record.samples} samples")

    @classmethod
    def load(cls, location: str | os.PathLike[str]) -> Manifest:
        """Read the manifest at `location`: the directory, the file itself, a URL or a `pipe:` command (locations.py).

        Raises:
            ValueError: no manifest there, not JSON, another format version, or a missing or wrong field.
        """
        if is_remote(str(location)):
            root = str(location).removesuffix(f"/{FILE_NAME}")
            return cls.parse(read_bytes(root, FILE_NAME), root=root, source=f"{FILE_NAME} of {root}")
        given = Path(location).expanduser()
        folder = given.parent if given.name == FILE_NAME else given
        path = folder / FILE_NAME
        if path.is_file():
            return cls.parse(path.read_bytes(), root=str(folder), source=str(path))
        if inside := sub_manifests(folder):
            raise ValueError(
                f"{folder} holds a data set for each grid; expected one of them, such as {inside[0].parent}."
            )
        if any((folder / f".{split}").is_dir() for split in SPLITS):
            raise ValueError(
                f"The shards at {folder} are unfinished: there is no {FILE_NAME} yet. Give the command that began "
                "them once more; it continues."
            )
        raise NoShards(f"No shards at {folder}: looked for {path}.", str(folder))

    @classmethod
    def parse(cls, content: bytes, root: str, source: str) -> Manifest:
        """Build a manifest from its JSON; `source` names it in errors. Raises ValueError as `load` does."""
        try:
            data = read_json(source, content)
        except ValueError as error:
            raise ValueError(f"{error} Restore it, or tokenize the data set again.") from error
        version = data.get("format")
        if version != FORMAT:
            found = forms.shown(version)
            raise ValueError(f"{source} has format {found}; this version of flashar-pl reads format {FORMAT}.")
        try:
            splits = {split: tuple(_shard(s) for s in shards) for split, shards in data["splits"].items()}
            plain = {key: data[key] for key in ("name", "tokenizer", "vocabulary", "crops")}
            others = strange(named_paths(data["tokenizer"], {}), data.get("marks", {}))
            here: dict[str, str] = {} if is_remote(root) else all_inside(Path(root) / FILE_NAME, others)
            plain |= {"tokenizer": located(plain["tokenizer"], here)} if here else {}
            condition = ConditionSpec(**data["condition"])
            crop = data.get("evaluation_crop", 0)
            later = {"class_names": tuple(data.get("class_names", ())), "accounts": data.get("accounts", {})}
            later |= {"preparation": data.get("preparation", {}), "frames": data.get("frames", 1)}
            later["preview"] = tuple(data["preview"]) if "preview" in data else None
            return cls(
                grid=tuple(data["grid"]), condition=condition, splits=splits, evaluation_crop=crop, root=root, **plain,
                **later, strange=others - here.keys(),
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(f"{source} lacks the field {error}. Tokenize the data set again.") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source} has a wrong field: {error}") from error

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `manifest.json` into `directory`, complete or not at all. Returns its path."""
        return write_text(Path(directory) / FILE_NAME, json.dumps(self.stored(Path(directory)), indent=1) + "\n")

    def stored(self, directory: Path) -> dict[str, Any]:
        """What the file holds: the tokenizer's files by name where they lie in its directory, marks of others."""
        data = {"format": FORMAT} | asdict(self)
        del data["root"], data["strange"]
        place = directory.resolve()
        own = {path: Path(path).expanduser().resolve() for path in named_paths(self.tokenizer, {}) - self.strange}
        here = {path: file.relative_to(place).as_posix() for path, file in own.items() if place in file.parents}
        data["tokenizer"] = located(self.tokenizer, here)
        if own_marks := marks(own.keys() - here.keys()):
            data["marks"] = own_marks
        data |= {name: data.pop(name) for name in ("class_names", "accounts", "splits")}  # what is long stands last
        for optional, absent in (("preparation", {}), ("preview", None), ("frames", 1)):
            if data[optional] == absent:
                del data[optional]
        data["condition"] = {k: v for k, v in data["condition"].items() if v is not None}
        return data

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split. Raises ValueError for a split that is not there."""
        if not self.splits.get(split):
            raise ValueError(
                f"The shards of {self.name!r} at {self.root or '.'} have no {split!r} split; "
                f"they have: {', '.join(name for name, shards in self.splits.items() if shards) or 'none'}."
            )
        return self.splits[split]

    def local_path(self, shard: Shard, cache: str | os.PathLike[str] | None = None) -> str:
        """Where the shard can be opened: itself, or its copy in `cache`. Raises ValueError if it cannot be copied."""
        if is_remote(self.root):
            return str(fetch(self.root, shard.path, shard.sha256, default_cache() if cache is None else Path(cache)))
        return str(Path(self.root) / shard.path)

    def samples(self, split: str) -> int:
        """Number of samples in a split, 0 if there is none of that name."""
        return sum(shard.samples for shard in self.splits.get(split, ()))

    def block_sizes(self, split: str) -> np.ndarray:
        """Samples of each block of a split, in the order of the manifest: (M,) int64."""
        return np.array([r.samples for shard in self.shards(split) for r in shard.records], dtype=np.int64)

    @property
    def shared(self) -> dict[str, Any]:
        """What the data sets of several grids, and the splits of one, must have in common."""
        return {
            "tokenizer": without_path(self.tokenizer),
            "vocabulary": self.vocabulary,
            "crops": self.crops,
            "frames": self.frames,
            "condition": self.condition,
        }

    def fingerprint(self, split: str) -> str:
        """A short hash of the contents of a split: equal for equal shards, wherever they lie."""
        listed = "".join(f"{shard.samples} {shard.sha256}\n" for shard in self.shards(split))
        return hashlib.sha256(listed.encode()).hexdigest()[:16]


def check_names(names: tuple[str, ...], classes: int | None) -> None:
    """Raises ValueError unless there is another plain name for each class, or none at all."""
    if names and not classes == len(names) == len({forms.name("a class", name) for name in names}):
        raise ValueError(f"{len(names)} class names for {classes} classes; expected another one for each.")


def check_alike(place: str, facts: dict[str, Any], other: str, others: dict[str, Any], advice: str) -> None:
    """Raises ValueError naming the first fact in which a data set at a place differs from another one.

    "classes" are names, and not compared where one of both knows none.
    """
    for name, value in facts.items():
        found = others[name]
        if name == "classes":
            value, found = first_difference(value, found) if value and found else ("", "")
        if found != value:
            raise ValueError(f"{place} has {name} {value}, {other} {found}; {advice}")


def first_difference(names: Sequence[str], others: Sequence[str]) -> tuple[str, str]:
    """The first two names at one place that differ, or how many there are of each; equal only for equal names."""
    both = [*zip(names, others), (f"{len(names)} names", f"{len(others)} names")]
    return next((pair for pair in both if pair[0] != pair[1]), both[-1])


def without_path(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's config without the place of its weights, which may move; their hash is compared instead."""
    return {name: value for name, value in tokenizer.items() if name != "weights"}


def sub_manifests(folder: Path) -> list[Path]:
    """Manifests in the sub-folders of a directory, hidden ones left out."""
    return [path for path in sorted(folder.glob(f"*/{FILE_NAME}")) if not path.parent.name.startswith(".")]


def load_grids(location: str) -> list[Manifest]:
    """The manifest at `location`, or those in its sub-folders, one a grid: that with most training samples first.

    Raises:
        ValueError: as `Manifest.load`; a training split that is still being written; sub-folders that differ in
            tokenizer, vocabulary, condition or crops, or have one grid twice.
    """
    folder = Path(location).expanduser()
    if is_remote(location) or folder.name == FILE_NAME or (folder / FILE_NAME).is_file():
        return [Manifest.load(location)]
    found = [Manifest.load(path) for path in sub_manifests(folder)]
    if not found:
        return [Manifest.load(location)]  # says what is missing
    if (folder / ".train").is_dir():
        raise ValueError(f"The training split in {location} is not finished; run the same flashar tokenize again.")
    for other in found[1:]:
        advice = f"the data sets in {location} must agree. Give one of them, or tokenize them alike."
        check_alike(other.root, other.shared, f"{found[0].root} has", found[0].shared, advice)
    if len({manifest.grid for manifest in found}) < len(found):
        raise ValueError(
            f"Several data sets in {location} have the same grid; expected one for each. Give one of them."
        )
    return sorted(found, key=lambda manifest: (-manifest.samples("train"), manifest.grid))


def check_frames(manifest: Manifest, frames: int | None) -> None:
    """Raises ValueError unless a model of videos of `frames` frames can train on these shards; None = any model."""
    if frames is not None and frames != manifest.frames:
        made = "images" if frames == 1 else f"videos of {frames} frames"
        held = "images: leave out" if manifest.frames == 1 else f"videos of {manifest.frames} frames: expected"
        wanted = "" if manifest.frames == 1 else f".frames {manifest.frames}"
        raise ValueError(
            f"The model draws {made}, and the shards of {manifest.name!r} hold {held} model.flashar.video{wanted}."
        )


def check_matches(
    manifest: Manifest, vocabulary: int, takes: Conditioning, grid: tuple[int, int] | None = None
) -> None:
    """Raises ValueError unless a model of V = `vocabulary` codes can train on, or be scored on, these shards.

    grid: (H, W) the run is set up for; None = any, a model has no grid of its own.
    """
    where = f"The shards of {manifest.name!r} at {manifest.root or '.'}"
    spec = manifest.condition
    if manifest.vocabulary != vocabulary:
        raise ValueError(
            f"{where} hold codes of a vocabulary of {manifest.vocabulary}, the model has {vocabulary}. "
            f"Set the model's vocabulary to {manifest.vocabulary}, or tokenize with the model's tokenizer."
        )
    expected = {"class": "class", "text": "text-features", "prompt": "text"}[takes.kind]
    if spec.kind != expected:
        raise ValueError(f"{where} have the condition {spec.kind!r}, the model expects {expected!r}.")
    if takes.kind == "class" and spec.num_classes != takes.size:
        raise ValueError(
            f"{where} have {spec.num_classes} classes, the model has {takes.size}. "
            f"Set the model's num_classes to {spec.num_classes}."
        )
    if takes.kind == "text" and spec.width != takes.size:
        raise ValueError(f"{where} have text features of width {spec.width}, the model takes {takes.size}.")
    if takes.previews != (manifest.preview is not None):
        raise ValueError(
            f"{where} hold {'no ' if takes.previews else ''}previews, and the model draws "
            f"{'one before every' if takes.previews else 'none before an'} image. Tokenize with the model's tokenizer."
        )
    if grid is not None and tuple(grid) != manifest.grid:
        raise ValueError(
            f"{where} have a grid of {manifest.grid[0]} x {manifest.grid[1]} codes, the run is set up for "
            f"{grid[0]} x {grid[1]}. Change the grid, or tokenize at the matching image size."
        )


def _shard(data: dict[str, Any]) -> Shard:
    records = tuple(
        Record(r["samples"], {key: tuple(place) for key, place in r["members"].items()}) for r in data["records"]
    )
    return Shard(data["path"], data["samples"], data["bytes"], data["sha256"], records)
