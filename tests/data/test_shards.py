"""Shards: what is written is read back, stays an ordinary WebDataset, and damage is noticed."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset
from toy_shards import GRID, VOCABULARY, sample_codes, write_classes

from flashar_pl.backbones import Conditioning
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.manifest import Record, Shard, check_matches, code_dtype, load_grids
from flashar_pl.data.shards import ConditionSpec, Manifest, ShardReader, ShardWriter, verify
from flashar_pl.files import digest


@pytest.fixture
def toy(tmp_path: Path) -> Manifest:
    return write_classes(tmp_path / "toy", crops=2)


def writer_for(out: Path, condition: ConditionSpec, **kwargs) -> ShardWriter:
    return ShardWriter(
        out, name="toy", tokenizer={}, grid=GRID, vocabulary=VOCABULARY, condition=condition, block=4, **kwargs
    )


def test_any_samples_in_any_order(toy: Manifest) -> None:
    reader = ShardReader(toy, "train")
    assert len(reader) == toy.samples("train") == 107
    assert [len(s.records) for s in toy.shards("train")] == [3, 3, 3, 2]
    assert toy.block_sizes("train").tolist() == [10] * 10 + [7]
    where = np.random.default_rng(0).permutation(107)
    crops = where % 2
    got = reader.read(where, crops)
    np.testing.assert_array_equal(got.codes, sample_codes(where, 2)[np.arange(107), crops])
    np.testing.assert_array_equal(got.ids, where)
    np.testing.assert_array_equal(got.labels, where % 5)
    assert got.codes.dtype == got.labels.dtype == np.int64
    np.testing.assert_array_equal(reader.read(where[:3]).codes, sample_codes(where[:3], 2)[:, 0])


def test_many_shards_hold_few_files_open(tmp_path: Path, monkeypatch) -> None:
    """Records remembered past their shard kept its file open: "Too many open files" from about 1,000 shards on."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("flashar_pl.data.reader.OPEN_SHARDS", 16)
    reader = ShardReader(
        write_classes(tmp_path / "toy", {"train": 150}, block=1, shard_blocks=1), "train", verify=False
    )
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    try:
        order = np.random.default_rng(0).permutation(150)
        np.testing.assert_array_equal([int(reader.read(np.array([i])).ids[0]) for i in order], order)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_reader_travels_to_a_worker(toy: Manifest) -> None:
    """Guards spawn and forkserver workers: maps and file handles do not pickle."""
    reader = ShardReader(toy, "validation")
    reader.read(np.array([1]))
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.read(np.array([3])).codes, reader.read(np.array([3])).codes)


def test_webdataset_reads_our_tars(toy: Manifest) -> None:
    urls = [str(Path(toy.root) / s.path) for s in toy.shards("train")]
    records = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len({r["__key__"] for r in records}) == len(records) == 11
    codes = np.concatenate([r["codes.npy"] for r in records])
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(codes, sample_codes(np.arange(107), 2))
    np.testing.assert_array_equal(np.concatenate([r["labels.npy"] for r in records]), np.arange(107) % 5)
    np.testing.assert_array_equal(np.concatenate([r["ids.npy"] for r in records]), np.arange(107))


def test_smallest_type() -> None:
    sizes = {17: "uint8", 256: "uint8", 257: "uint16", 16384: "uint16", 65536: "uint16", 131072: "uint32"}
    assert {v: code_dtype(v).name for v in sizes} == sizes


def test_equal_data_gives_equal_files(tmp_path: Path) -> None:
    """Guards the hashes against times and names in the tar."""
    one, two = write_classes(tmp_path / "one"), write_classes(tmp_path / "two")
    assert one.splits == two.splits
    assert one.fingerprint("train") == two.fingerprint("train") != one.fingerprint("validation")


def test_manifest_round_trip(toy: Manifest) -> None:
    assert Manifest.load(toy.root) == Manifest.load(Path(toy.root) / "manifest.json") == toy
    data = json.loads((Path(toy.root) / "manifest.json").read_text())
    assert {k: data[k] for k in ("format", "name", "grid", "vocabulary", "condition", "crops")} == {
        "format": 1,
        "name": "toy",
        "grid": list(GRID),
        "vocabulary": VOCABULARY,
        "condition": {"kind": "class", "num_classes": 5},
        "crops": 2,
    }
    record = data["splits"]["train"][0]["records"][0]
    offset, size = record["members"]["codes.npy"]
    tar = (Path(toy.root) / "train-000000.tar").read_bytes()
    assert record["samples"] == 10
    assert tar[offset : offset + 6] == b"\x93NUMPY"
    assert size == 128 + 10 * 2 * 12 * 2
    assert not list(Path(toy.root).glob(".*"))


def test_captions(tmp_path: Path) -> None:
    texts = [f"une tasse n\u00b0 {i}" for i in range(10)]
    with writer_for(tmp_path / "t", ConditionSpec("text")) as writer:
        writer.write("train", sample_codes(np.arange(10)), ids=range(10), texts=texts)
    verify(tmp_path / "t")
    got = ShardReader(writer.manifest, "train").read(np.array([9, 0, 5]))
    assert got.texts == [texts[9], texts[0], texts[5]]
    assert got.labels is None


def test_text_features_are_left_padded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(1 + i % 4, 6)).astype(np.float16) for i in range(10)]
    with writer_for(tmp_path / "t", ConditionSpec("text-features", length=5, width=6)) as writer:
        writer.write("train", sample_codes(np.arange(10)), ids=range(10), features=rows)
    verify(tmp_path / "t")
    got = ShardReader(writer.manifest, "train").read(np.arange(10)[::-1])
    assert got.features.shape == (10, 5, 6)
    assert got.features.dtype == np.float32
    for i, (features, mask) in enumerate(zip(got.features, got.mask, strict=True)):
        row = rows[9 - i]
        assert mask.tolist() == [False] * (5 - len(row)) + [True] * len(row)
        np.testing.assert_array_equal(features[mask], row.astype(np.float32))
        assert not features[~mask].any()


CLASS = ConditionSpec("class", num_classes=5)
CODES = sample_codes(np.arange(2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"codes": CODES + VOCABULARY}, "vocabulary of 300 allows 0 .. 299"),
        ({"codes": CODES[..., :3]}, r"shape \(2, 1, 3, 3\)"),
        ({"codes": CODES.astype(float)}, "float64"),
        ({"labels": [0, 5]}, "labels range over 0 .. 5; expected 0 .. 4"),
        ({"labels": None}, "takes 2 labels and nothing else; given: none"),
        ({"texts": ["a", "b"]}, "given: 2 labels, 2 texts"),
        ({"ids": [1]}, r"ids have shape \(1,\)"),
    ],
)
def test_bad_samples_are_refused_when_written(tmp_path: Path, kwargs: dict, message: str) -> None:
    good = {"split": "train", "codes": CODES, "ids": [0, 1], "labels": [0, 1]}
    with pytest.raises(ValueError, match=message), writer_for(tmp_path / "t", CLASS) as writer:
        writer.write(**(good | kwargs))
    assert list(tmp_path.iterdir()) == [], "an error leaves nothing behind"


@pytest.mark.parametrize(
    ("condition", "kwargs", "message"),
    [
        (ConditionSpec("text"), {"texts": ["a"]}, "takes 2 texts and nothing else; given: 1 texts"),
        (
            ConditionSpec("text-features", length=2, width=3),
            {"features": [np.ones((3, 3), np.float32)] * 2},
            r"shape \(3, 3\) .* of shape \(1 .. 2, 3\)",
        ),
    ],
)
def test_bad_texts_are_refused_when_written(tmp_path: Path, condition, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), writer_for(tmp_path / "t", condition) as writer:
        writer.write("train", CODES, ids=[0, 1], **kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConditionSpec("klass"), "expected one of class, text, text-features"),
        (lambda: ConditionSpec("class"), "num_classes of condition kind 'class' is None"),
        (lambda: Manifest("x", {}, (0, 4), 3, CLASS, 1, {}), "grid height is 0"),
    ],
)
def test_bad_descriptions(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_writer_never_overwrites(tmp_path: Path) -> None:
    write_classes(tmp_path / "t")
    before = (tmp_path / "t" / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="exists; the shards would overwrite it"):
        write_classes(tmp_path / "t")
    assert (tmp_path / "t" / "manifest.json").read_bytes() == before

    writer = writer_for(tmp_path / "u", CLASS)
    writer.write("train", CODES, ids=[0, 1], labels=[0, 1])
    (tmp_path / "u").mkdir()
    with pytest.raises(ValueError, match="exists; the shards would overwrite it"):
        writer.close()
    assert list((tmp_path / "u").iterdir()) == []


def test_an_interrupted_or_empty_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writer_for(tmp_path / "t", CLASS) as writer:
            for i in range(9):
                writer.write("train", CODES, ids=[i, i + 1], labels=[0, 1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ValueError, match="No sample was written"), writer_for(tmp_path / "t", CLASS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_the_home_directory(toy: Manifest, monkeypatch) -> None:
    """No shell writes out the ~ of a YAML file."""
    folder = Path(toy.root)
    monkeypatch.setenv("HOME", str(folder.parent))
    for place in (f"~/{folder.name}", f"~/{folder.name}/manifest.json"):
        assert Manifest.load(place).root == load_grids(place)[0].root == toy.root


def test_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"looked for .*nothing/manifest.json.*flashar tokenize digits --out .*nothing"
    ):
        Manifest.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format 2; this version of flashar-pl reads format 1"),
        (lambda d: d.update(vocabulary="many"), "vocabulary is 'many'"),
        (lambda d: d["condition"].update(colour=1), "wrong field: .*colour"),
        (lambda d: d["splits"]["train"][0].update(path="../x.tar"), "leaves the directory"),
        (lambda d: d["splits"]["train"][0].update(samples=3), "3 samples do not agree"),
        (lambda d: d.update(name=3), "name is 3; expected a name"),
        (lambda d: d.update(name="\ud800"), r"name is '\\ud800'; expected a name"),
        (lambda d: d.update(tokenizer="x"), "tokenizer is 'x'; expected its settings"),
        (lambda d: d.update(grid=[10**400, 4]), "grid height is 10{76}\\.\\.\\.; expected 1 .. 65536"),
        (lambda d: d.update(vocabulary=10**30), "vocabulary is 10+; expected 1 .. 2147483648"),
        (lambda d: d.update(vocabulary=True), "vocabulary is True; expected 1 .. 2147483648"),
        (lambda d: d.update(crops=10**12), "crops is 10+; expected 1 .. 65536"),
        (lambda d: d.update(crops=60_000), "608 bytes of codes.npy cannot hold 10 samples"),
        (lambda d: d["condition"].update(num_classes=0.5), "num_classes .* is 0.5; expected"),
        (lambda d: d["splits"]["train"][0].update(sha256="../../victim"), "sha256 is '../../victim'; expected a SHA"),
        (lambda d: d["splits"]["train"][0].update(bytes=1 << 60), "bytes is 1152921504606846976; expected 1 .. 11"),
        (lambda d: member(d, "codes.npy", [1.5, 5]), "offset of 'codes.npy' is 1.5; expected"),
        (lambda d: member(d, "codes.npy", [-9, 5]), "offset of 'codes.npy' is -9; expected 0 .. 11"),
        (lambda d: member(d, "ids.npy", [512, 10**6]), "a member of a record ends after the shard's"),
        (lambda d: member(d, "ids.npy", [512, 79]), "79 bytes of ids.npy cannot hold 10 samples"),
        (lambda d: d["splits"].update(test=d["splits"]["train"]), "'train-000000.tar' of the test split is also shard"),
        (lambda d: d["splits"]["test"].append(d["splits"]["train"][0] | {"path": "a.tar"}), "'a.tar' .* is also shard"),
    ],
)
def test_wrong_manifest(toy: Manifest, change, message: str) -> None:
    path = Path(toy.root) / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"manifest\.json has .*{message}"):
        Manifest.load(path)


def member(data: dict, name: str, place: list) -> None:
    """Move a member of the first training record."""
    data["splits"]["train"][0]["records"][0]["members"][name] = place


@pytest.mark.parametrize("content", [b"{", b"\xff{}", b"[" * 100_000, b"1" * 5000, b"[]", b'{"format": Infinity}'])
def test_a_manifest_that_is_no_json_object(toy: Manifest, content: bytes) -> None:
    (Path(toy.root) / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json.* Restore it, or tokenize"):
        Manifest.load(toy.root)


@pytest.mark.parametrize(
    "path",
    ["../victim", "/etc/passwd", "a/b.tar", "", ".", "..", ".hidden", "a\0.tar", "a\n", "x::file:///etc/x", "pipe:date",
     "http://host/a.tar", "~", "*.tar", "{0..9}.tar", "-rf", "a;date", "$HOME", "a.tar?x", 3, None, ["a.tar"]],
)  # fmt: skip
def test_a_shard_is_one_plain_name(path) -> None:
    with pytest.raises(ValueError, match=r"shard path .* expected a name such as train-000000\.tar"):
        Shard(path, 1, 1, "0" * 64, (Record(1, {}),))


def damage(manifest: Manifest, member: str, at: int, value: bytes) -> None:
    """Overwrite bytes of a member of the first training record."""
    shard = manifest.shards("train")[0]
    path = Path(manifest.root) / shard.path
    data = bytearray(path.read_bytes())
    start = shard.records[0].members[member][0] + at
    data[start : start + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize("member", ["codes.npy", "labels.npy"])
@pytest.mark.parametrize("at", [0, 10, 40, 60])
def test_damaged_npy_is_an_error_with_the_file_name(toy: Manifest, member: str, at: int) -> None:
    """Guards against reading noise: any byte of the header, magic or shape."""
    damage(toy, member, at, b"\xff\x00(")
    with pytest.raises(ValueError, match=rf"(Damaged )?{member} .*train-000000.tar"):
        ShardReader(toy, "train").read(np.array([0]))


def test_damaged_payload_outside_the_vocabulary(toy: Manifest) -> None:
    damage(toy, "codes.npy", 128, b"\xff\xff")
    with pytest.raises(ValueError, match="holds the code 65535, outside the vocabulary of 300"):
        ShardReader(toy, "train").read(np.array([30, 0]))


def test_damaged_captions(tmp_path: Path) -> None:
    with writer_for(tmp_path / "t", ConditionSpec("text")) as writer:
        writer.write("train", CODES, ids=[0, 1], texts=["a", "b"])
    damage(writer.manifest, "texts.json", 0, b"{")
    with pytest.raises(ValueError, match=r"Damaged texts\.json"):
        ShardReader(writer.manifest, "train").read(np.array([0]))
    damage(writer.manifest, "texts.json", 0, b'["aaaaaa"]')
    with pytest.raises(ValueError, match="does not hold 2 captions"):
        ShardReader(writer.manifest, "train").read(np.array([0]))


def test_missing_and_truncated_shards(toy: Manifest) -> None:
    path = Path(toy.root) / "train-000001.tar"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(1000)
    reader = ShardReader(toy, "train")
    reader.read(np.arange(30))
    with pytest.raises(ValueError, match=rf"train-000001.tar has 1000 bytes, the manifest says {size}"):
        reader.read(np.array([30]))
    path.unlink()
    with pytest.raises(ValueError, match=r"train-000001.tar is missing"):
        reader.read(np.array([30]))
    with pytest.raises(ValueError, match=r"not as the manifest says:\n.*train-000001.tar is missing"):
        verify(toy.root)


def test_verify_reports_what_it_checked(toy: Manifest) -> None:
    got = verify(toy.root)
    assert got.samples == {"train": 107, "validation": 23, "test": 31}
    assert got.shards == 4 + 1 + 2
    assert got.labels["train"] == np.bincount(np.arange(107) % 5).tolist()


def test_verify_counts_samples_of_two_splits(tmp_path: Path) -> None:
    """Another packing of the training samples passed as a validation split."""
    codes = sample_codes(np.arange(12))
    with writer_for(tmp_path / "t", ConditionSpec("class", num_classes=5)) as writer:
        writer.write("train", codes[:9], ids=range(9), labels=[1] * 9)
        writer.write("validation", codes[[3, 11, 5, 8]], ids=range(20, 24), labels=[2] * 4)
        writer.write("test", codes[[10]], ids=[0], labels=[1])
    assert verify(tmp_path / "t").shared == {"train": {"validation": 3}, "validation": {"train": 3}, "test": {}}


def test_splits_of_the_same_samples_are_refused(tmp_path: Path) -> None:
    """Guards a validation on the training images: fit and check took the same samples, written again."""
    codes, labels = sample_codes(np.arange(12)), np.arange(12) % 5
    with writer_for(tmp_path / "t", ConditionSpec("class", num_classes=5)) as writer:
        writer.write("train", codes, ids=range(12), labels=labels)
        writer.write("validation", codes[:7], ids=range(7), labels=labels[:7])
    with pytest.raises(ValueError, match="Every sample of the validation split is in the train split"):
        verify(tmp_path / "t")
    with pytest.raises(ValueError, match="the same 7 samples in their train and validation splits"):
        CodesDataModule(str(tmp_path / "t"), batch_size=4).setup("fit")


def test_verify_finds_one_flipped_bit(toy: Manifest) -> None:
    damage(toy, "codes.npy", 130, b"\x07")
    with pytest.raises(ValueError, match=r"train-000000.tar has the SHA-256 \w{64}, the manifest says"):
        verify(toy.root)


def forge(manifest: Manifest) -> None:
    """Make the manifest agree with changed bytes, as a faulty writer would."""
    path = Path(manifest.root) / "manifest.json"
    data = json.loads(path.read_text())
    data["splits"]["train"][0]["sha256"] = digest(Path(manifest.root) / "train-000000.tar")
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("member", "at", "value", "message"),
    [
        ("codes.npy", 128, b"\xff\xff", "holds the code 65535"),
        ("labels.npy", 128, b"\x09", "labels 0 .. 9; there are 5 classes"),
        ("ids.npy", 128, b"\x01", "sample id more than once"),
        ("ids.npy", -500, b"name-of-another-file", "no end mark|members of the tar"),
    ],
)
def test_verify_checks_contents_even_if_the_hash_agrees(toy: Manifest, member, at, value, message: str) -> None:
    damage(toy, member, at, value)
    forge(toy)
    with pytest.raises(ValueError, match=message):
        verify(toy.root)


def test_check_matches(toy: Manifest, tmp_path: Path) -> None:
    takes = Conditioning("class", 5)
    check_matches(toy, VOCABULARY, takes, GRID)
    check_matches(toy, VOCABULARY, takes)
    for args, message in [
        ((16384, takes, GRID), "vocabulary of 300, the model has 16384"),
        ((VOCABULARY, Conditioning("class", 1000), GRID), "5 classes, the model has 1000"),
        ((VOCABULARY, takes, (4, 4)), "grid of 3 x 4 codes, the run is set up for 4 x 4"),
        ((VOCABULARY, Conditioning("prompt", 60), GRID), "condition 'class', the model expects 'text'"),
        ((VOCABULARY, Conditioning("text", 2048), GRID), "condition 'class', the model expects 'text-features'"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_matches(toy, *args)
    features = Manifest("x", {}, GRID, 9, ConditionSpec("text-features", length=3, width=8), 1, {})
    check_matches(features, 9, Conditioning("text", 8))
    with pytest.raises(ValueError, match="width 8, the model takes 16"):
        check_matches(features, 9, Conditioning("text", 16))
