"""Images tokenised on the training device, exact and streamed, and streamed codes: right samples, equal batches."""

import io
import random
import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from tiny_images import vq_state
from toy_shards import sample_codes, write_classes

from flashar_pl.data import CodesDataModule, ImageNetDataModule, TextImageDataModule
from flashar_pl.data.images import SquareCrop, ten_crop
from flashar_pl.data.pixels import ImageBatch, ImageRows, Prepare
from flashar_pl.data.shards import ConditionSpec, Manifest, ShardWriter
from flashar_pl.data.sources import condition_of
from flashar_pl.data.streaming import Stream
from flashar_pl.tokenizers import VQ16


def jpeg(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((30 + i, 40), Image.Resampling.BICUBIC).save(buffer, format="JPEG")
    return buffer.getvalue()


def write_tars(root: Path, tars: int = 4, each: int = 5, bad: int | None = None) -> str:
    root.mkdir()
    for k in range(tars):
        with webdataset.TarWriter(str(root / f"t{k}.tar"), encoder=False) as tar:
            for i in range(k * each, (k + 1) * each):
                data = b"no image" if i == bad else jpeg(i)
                tar.write({"__key__": f"{i:03d}", "jpg": data, "cls": str(i).encode(), "txt": f"text {i}".encode()})
    return str(root)


def write_shards(out: Path, vq: str, condition: ConditionSpec) -> str:
    config = {"kind": "vq16", "weights": vq, "decode_dtype": "float32"}
    with ShardWriter(out, name="x", tokenizer=config, grid=(4, 4), vocabulary=64, condition=condition) as writer:
        given = {"labels": range(5)} if condition.kind == "class" else {"texts": list("abcde")}
        writer.write("validation", np.zeros((5, 4, 4), dtype=np.int64), ids=range(5), **given)
    return str(out)


@pytest.fixture
def shards(tmp_path, vq) -> str:
    return write_shards(tmp_path / "s", vq, ConditionSpec("class", num_classes=20))


class Probe(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)
        self.seen: list = []
        self.validated = 0

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.codes, batch.condition))
        return self.layer(batch.codes.flatten(1) / 64).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated += int(batch.valid.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    @property
    def labels(self) -> list[int]:
        return torch.cat([labels for _, labels in self.seen]).tolist()


def fit(data, epochs: int = 2, path: Path | None = None, resume: Path | None = None, **options) -> Probe:
    module = Probe()
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    if path is not None:
        trainer.save_checkpoint(path)
    return module


@pytest.mark.parametrize("reading", ["exact", "streamed"])
def test_codes_are_those_of_a_crop_and_epochs_have_their_length(tmp_path, shards, reading, caplog):
    """Guards the pixels, the pairing with labels, the number of batches and the account, through a real Trainer."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    tars = write_tars(tmp_path / "tars")
    data = ImageNetDataModule(tars, shards, reading=reading, epoch_samples=20, batch_size=4, num_workers=1, shuffle=8)
    probe = fit(data)
    assert len(probe.seen) == 2 * 5
    assert probe.validated == 2 * 5
    model = VQ16.from_official(vq_state())
    chosen = set()
    for codes, labels in probe.seen:
        assert codes.shape == (4, 4, 4)
        assert codes.dtype == torch.int64
        for grid, label in zip(codes, labels.tolist(), strict=True):
            crops = ten_crop(torch.from_numpy(SquareCrop(17)(jpeg(label)))[None], 16)[0]
            matches = (model.encode(crops) == grid).all(dim=(1, 2)).nonzero().flatten().tolist()
            assert matches, label
            chosen.update(matches)
    assert len(chosen) > 3
    assert probe.labels[:20] != probe.labels[20:]
    told = re.findall(r"found (\d+) entries, used (\d+), left out 0", caplog.text)
    assert [int(n) >= 20 and n == used for n, used in told] == [True] * (reading == "streamed"), "a worker's counts"
    if reading == "exact":
        assert sorted(probe.labels[:20]) == sorted(probe.labels[20:]) == list(range(20)), "each once in an epoch"


def test_exact_images_resume_at_the_sample(tmp_path, shards):
    tars = write_tars(tmp_path / "tars")
    data = partial(ImageNetDataModule, tars, shards, batch_size=4, num_workers=0)
    whole = fit(data())
    fit(data(), 1, tmp_path / "c.ckpt", max_steps=3)
    rest = fit(data(), -1, resume=tmp_path / "c.ckpt", max_steps=10)
    assert rest.labels == whole.labels[12:]


def test_a_resumed_stream_has_a_fresh_order_and_says_so(tmp_path, shards):
    """Guards against the same tars after every restart."""
    tars = write_tars(tmp_path / "tars")
    data = partial(
        ImageNetDataModule, tars, shards, reading="streamed", epoch_samples=16, batch_size=4, num_workers=0, shuffle=8
    )
    first = fit(data(), 1, tmp_path / "c.ckpt", max_steps=3)
    again = fit(data(), 1)
    assert first.labels == again.labels[:12], "the same seed gives the same run"
    with pytest.warns(UserWarning, match="does not resume at the sample: pass 0 was left at batch 3 of 4"):
        resumed = fit(data(), 2, resume=tmp_path / "c.ckpt")
    assert resumed.labels[: len(again.labels)] != again.labels
    with pytest.raises(ValueError, match="reading='streamed'; this run has reading='exact'"):
        fit(ImageNetDataModule(tars, shards, batch_size=4), 2, resume=tmp_path / "c.ckpt")


def stream_of(urls: list[str], rank: int = 0, ranks: int = 1, **options) -> Stream:
    prepare = options.pop("prepare", Prepare(16, 16, 1.0, 20))
    settings = {"seed": 5, "shuffle": 1, "resampled": True} | options
    return Stream(urls, ImageRows(prepare), prepare.collate, 2 * ranks, rank=rank, ranks=ranks, **settings)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_tars_of_a_pass(tmp_path, ranks):
    """Guards against ranks that read the same tars; every rank can go on for ever."""
    root = write_tars(tmp_path / "tars", tars=4, each=2)
    urls = sorted(str(path) for path in Path(root).glob("*.tar"))
    per_pass = 4 // ranks
    taken = []
    for rank in range(ranks):
        batches = iter(stream_of(urls, rank, ranks, resampled=False).pipeline(0))
        taken.append([next(batches).condition.tolist() for _ in range(3 * per_pass)])
    for k in range(3):
        one_pass = [label for part in taken for batch in part[k * per_pass : (k + 1) * per_pass] for label in batch]
        assert sorted(one_pass) == list(range(8))
    with pytest.raises(ValueError, match="10 readers, but there are 4 tars"):
        stream_of(urls, 0, 2, resampled=False).check(5)


def test_resampled_ranks_draw_other_tars(tmp_path):
    root = write_tars(tmp_path / "tars", tars=8, each=2)
    urls = sorted(str(path) for path in Path(root).glob("*.tar"))
    drawn = []
    for rank, turn in ((0, 0), (1, 0), (0, 1), (0, 0)):
        batches = iter(stream_of(urls, rank, 2).pipeline(turn))
        drawn.append([next(batches).condition.tolist() for _ in range(12)])
    assert drawn[0] == drawn[3]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize("reading", ["exact", "streamed"])
def test_class_names_in_another_order_than_the_shards_are_refused(tmp_path, shards, reading):
    """Ids of the training images would be others than those of the validation split."""
    names, classes = tuple(f"n{i}" for i in range(20)), tmp_path / "classes.txt"
    manifest = replace(Manifest.load(shards), class_names=names)
    manifest.save(shards)
    tars = write_tars(tmp_path / "tars", tars=1)
    more, options = (*names, "more"), {"epoch_samples": 8, "batch_size": 4, "num_workers": 0}
    for known, given, message in (
        (names, names[::-1], "has n19 where the shards that are there have n0"),
        (names, more, "has 21 names where the shards that are there have 20 names"),
        ((), more, "has 21 classes, the shards at .* have 20"),
    ):
        replace(manifest, class_names=known).save(shards)
        classes.write_text("\n".join(given))
        data = ImageNetDataModule(tars, shards, reading=reading, classes=str(classes), **options)
        with pytest.raises(ValueError, match=message):
            data.setup("fit")


def test_an_epoch_of_no_streamed_batch_is_refused(tmp_path):
    """Lightning would train nothing, without an error."""
    write_classes(tmp_path / "s", {"train": 3})
    with pytest.raises(ValueError, match="3 samples, fewer than one batch of 4; set batch_size to at most 3"):
        CodesDataModule(str(tmp_path / "s"), reading="streamed", batch_size=4).setup("fit")


def test_streamed_captions_are_those_of_the_exact_way(tmp_path):
    """A byte order mark is no part of a caption, and what is not UTF-8 is no caption."""
    assert condition_of("\ufeffa fox\n".encode(), None, None) == "a fox"
    prepare = Prepare(16, 16, 1.0, None, lambda text: torch.tensor([len(text)]))
    given = [{"jpg": jpeg(0), "txt": text, "__key__": "7", "__url__": "u"} for text in (b"\xef\xbb\xbfa fox", b"\xff")]
    with pytest.warns(UserWarning, match="skipped u: 7: UnicodeDecodeError"):
        assert [ids.tolist() for _, ids in ImageRows(prepare)(iter(given), random)] == [[5]]


@pytest.mark.parametrize("reading", ["exact", "streamed"])
def test_captions_become_prefixes(tmp_path, vq, reading):
    root = write_tars(tmp_path / "tars", tars=1, each=4)
    shards = write_shards(tmp_path / "text", vq, ConditionSpec("text"))
    data = TextImageDataModule(
        root, shards, reading=reading, epoch_samples=4, batch_size=2, num_workers=0,
        text_encoder=lambda text: torch.tensor([len(text), int(text[-1])]),
    )  # fmt: skip
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ImageBatch)
    assert batch.pixels.shape == (2, 3, 16, 16)
    assert all(ids[0] == 6 for ids in batch.condition)
    wrong = ImageNetDataModule(root, shards, batch_size=2, num_workers=0)
    with pytest.raises(ValueError, match="condition 'text'; ImageNetDataModule expects 'class'"):
        wrong.setup("fit")


def test_streamed_codes_are_those_of_the_shards(tmp_path):
    """Codes, labels and crops belong together; urls may be pipes."""
    manifest = write_classes(tmp_path / "toy", crops=2)
    root = str(tmp_path / "toy")
    for location in (root, f"pipe:cat {root}/{{path}}", f"file://{root}"):
        data = CodesDataModule(location, reading="streamed", batch_size=12, shuffle=30)
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert len(batches) == manifest.samples("train") // 12
        known = sample_codes(np.arange(107), 2)
        for codes, label in (
            (codes, label) for b in batches for codes, label in zip(b.codes, b.condition, strict=True)
        ):
            found = np.argwhere((known == codes.numpy()).all(axis=(2, 3)))
            assert len(found)
            assert (found[:, 0] % 5 == int(label)).any()


def test_urls_of_any_kind_are_opened(tmp_path):
    root = write_tars(tmp_path / "tars", tars=2, each=2)
    memory = fsspec.filesystem("memory")
    for k in range(2):
        memory.pipe(f"/stream/t{k}.tar", Path(root, f"t{k}.tar").read_bytes())
    from flashar_pl.data.streaming import tar_urls

    for location in ("memory://stream/t{0..1}.tar", f"pipe:cat {root}/t{{0..1}}.tar", f"{root}/t{{0..1}}.tar"):
        urls = tar_urls(location)
        assert len(urls) == 2
        batches = iter(stream_of(urls, resampled=False).pipeline(0))
        assert sorted(label for _ in range(2) for label in next(batches).condition.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("reading", ["exact", "streamed"])
def test_unreadable_images_are_skipped_with_a_warning(tmp_path, shards, reading, monkeypatch):
    monkeypatch.setattr("flashar_pl.data.pixels.BAD_START", 20)
    root = write_tars(tmp_path / "tars", tars=4, each=5, bad=1)
    options = {"epoch_samples": 200, "batch_size": 2, "num_workers": 0}
    data = ImageNetDataModule(root, shards, reading=reading, **options)
    data.setup("fit")
    loader, seen = data.train_dataloader(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"samples cannot be read; the last one: .*t0\.tar: 001"):
            seen += [batch.condition.tolist() for _ in range(9) for batch in loader]
        assert all(1 not in labels for labels in seen)
        assert any("t0.tar: 001: its beginning is that of no" in str(w.message) for w in caught)


def test_an_exact_batch_names_the_samples_it_holds(tmp_path, shards):
    """Also where the next one has taken the place of one that cannot be read."""
    data = ImageNetDataModule(write_tars(tmp_path / "tars", bad=1), shards, batch_size=20, num_workers=0)
    data.setup("fit")
    with pytest.warns(UserWarning, match="skipped"):
        (batch,) = data.train_dataloader()
    assert batch.index.tolist() == batch.condition.tolist()


def test_tars_without_samples_end_in_an_error_not_in_an_endless_loop(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "empty.tar")):
        pass
    for resampled in (True, False):
        with pytest.raises(ValueError, match="None of the tars gives a sample"):
            next(iter(stream_of([str(tmp_path / "empty.tar")], resampled=resampled).pipeline(0)))


def test_wrong_input(tmp_path, shards, caplog):
    tars = write_tars(tmp_path / "tars", tars=1)
    with pytest.raises(ValueError, match="at least one batch of 8"):
        ImageNetDataModule(tars, shards, reading="streamed", epoch_samples=7, batch_size=8)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no class folders and no tars"):
        ImageNetDataModule(str(tmp_path / "none"), shards, batch_size=4).setup("fit")
    for k in range(20):
        (tmp_path / "set" / f"n{k}").mkdir(parents=True)
        (tmp_path / "set" / f"n{k}" / "0.jpg").write_bytes(jpeg(k))
    (tmp_path / "set" / ".git").mkdir()
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        data = ImageNetDataModule(str(tmp_path / "set"), shards, batch_size=2, num_workers=0)
        data.setup("fit")
        data.train_dataloader()
    assert "found 21 entries, used 20, left out 1: 1 hidden (such as .git)" in caplog.text
    rows = ImageRows(Prepare(16, 16, 1.0, 3))([{"jpg": jpeg(0), "cls": b"5", "__key__": "7", "__url__": "u"}], random)
    with pytest.warns(UserWarning, match=r"skipped u: 7: the label '5' is no class id 0 \.\. 2"):
        assert list(rows) == []
