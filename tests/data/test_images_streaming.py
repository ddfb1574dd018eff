"""Tars of images tokenised on the training device: the same codes as ready shards, equal numbers of batches."""

from __future__ import annotations

import io
import itertools
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from flashar_pl.data.datamodules_images import ImageBatch, ImageStream, ImageTarsDataModule, Prepare
from flashar_pl.data.images import SquareCrop, ten_crop
from flashar_pl.data.shards import ConditionSpec, ShardWriter
from flashar_pl.tokenizers import VQ16

GOLDEN = Path(__file__).parent.parent / "golden" / "vq" / "vq_tiny.npz"


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


@pytest.fixture(scope="module")
def vq_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vq") / "vq.pt"
    with np.load(GOLDEN) as arrays:
        torch.save({name[3:]: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("sd/")}, path)
    return str(path)


@pytest.fixture
def shards(tmp_path, vq_file) -> str:
    condition = ConditionSpec("class", num_classes=20)
    config = {"kind": "vq16", "weights": vq_file, "decode_dtype": "float32"}
    with ShardWriter(
        tmp_path / "s", name="x", tokenizer=config, grid=(4, 4), vocabulary=64, condition=condition
    ) as writer:
        writer.write("validation", np.zeros((5, 4, 4), dtype=np.int64), ids=range(5), labels=range(5))
    return str(tmp_path / "s")


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


def fit(data: ImageTarsDataModule, epochs: int = 2, path: Path | None = None, resume: Path | None = None) -> Probe:
    module = Probe()
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    if path is not None:
        trainer.save_checkpoint(path)
    return module


def test_codes_are_those_of_a_crop_and_epochs_have_their_length(tmp_path, shards, vq_file):
    """Guards the pixels, the pairing with labels and the number of batches, through a real Trainer."""
    tars = write_tars(tmp_path / "tars")
    data = ImageTarsDataModule(tars, shards, epoch_samples=13, batch_size=4, num_workers=1, shuffle=8)
    probe = fit(data)
    assert len(probe.seen) == 2 * 3
    assert probe.validated == 2 * 5
    with np.load(GOLDEN) as arrays:
        model = VQ16.from_official({n[3:]: torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith("sd/")})
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
    first_pass = torch.cat([labels for _, labels in probe.seen[:2]]).tolist()
    assert first_pass != sorted(first_pass)


def test_a_resumed_run_goes_on_elsewhere(tmp_path, shards):
    """Guards against the same tars after every restart."""
    tars = write_tars(tmp_path / "tars")
    options = {"epoch_samples": 8, "batch_size": 4, "num_workers": 0, "shuffle": 8}
    first = fit(ImageTarsDataModule(tars, shards, **options), 2, tmp_path / "c.ckpt")
    again = fit(ImageTarsDataModule(tars, shards, **options), 2)
    resumed = fit(ImageTarsDataModule(tars, shards, **options), 4, resume=tmp_path / "c.ckpt")
    labels = [torch.cat([labels for _, labels in probe.seen]).tolist() for probe in (first, again, resumed)]
    assert labels[0] == labels[1], "the same seed gives the same run"
    assert len(labels[2]) == 16
    assert labels[0] != labels[2]


def stream_of(urls: list[str], rank: int, ranks: int, text: bool = False) -> ImageStream:
    prepare = Prepare(16, 24, 1.1, None, lambda t: torch.tensor([len(t)])) if text else Prepare(16, 16, 1.0, 20, None)
    return ImageStream(urls, prepare, 2, key=5, shuffle=1, rank=rank, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_readers_share_the_tars(tmp_path, ranks):
    """Guards against ranks that read the same tars, and against a reader without any."""
    root = write_tars(tmp_path / "tars", tars=4, each=2)
    urls = sorted(str(path) for path in Path(root).glob("*.tar"))
    firsts = []
    for rank in range(ranks):
        source = stream_of(urls, rank, ranks)._sources(rank, ranks, [0])
        firsts.append([next(source)["url"] for _ in range(2 * len(urls))])
    if 4 % ranks == 0:
        one_pass = [url for urls_of_rank in firsts for url in urls_of_rank[: 4 // ranks]]
        assert sorted(one_pass) == urls
    assert all(set(found) <= set(urls) for found in firsts)


def test_captions_become_prefixes(tmp_path):
    root = write_tars(tmp_path / "tars", tars=1, each=4)
    batch = next(iter(stream_of([f"{root}/t0.tar"], 0, 1, text=True)))
    assert isinstance(batch, ImageBatch)
    assert batch.pixels.shape == (2, 3, 16, 24)
    assert [ids.tolist() for ids in batch.condition] == [[6], [6]]


def test_unreadable_images_are_skipped_with_a_warning(tmp_path):
    root = write_tars(tmp_path / "tars", tars=1, each=4, bad=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = iter(stream_of([f"{root}/t0.tar"], 0, 1))
        labels = torch.cat([next(batches).condition for _ in range(3)]).tolist()
        assert 1 not in labels
        assert any("t0.tar: 001: UnidentifiedImageError" in str(w.message) for w in caught)
        with pytest.raises(ValueError, match="samples cannot be read"):
            list(itertools.islice(batches, 100))


def test_tars_without_samples_end_in_an_error_not_in_an_endless_loop(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "empty.tar")):
        pass
    with pytest.raises(ValueError, match="None of the tars gives a sample"):
        next(iter(stream_of([str(tmp_path / "empty.tar")], 0, 1)))


def test_wrong_input(tmp_path, shards):
    tars = write_tars(tmp_path / "tars", tars=1)
    with pytest.raises(ValueError, match="at least one batch of 8"):
        ImageTarsDataModule(tars, shards, epoch_samples=7, batch_size=8)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="No tars"):
        ImageTarsDataModule(str(tmp_path / "none"), shards, epoch_samples=8, batch_size=4).setup("fit")
    with pytest.raises(ValueError, match="does not exist"):
        ImageTarsDataModule(tars, shards, 8, 4, tokenizer_weights="no.pt").setup("fit")
    prepare = Prepare(16, 16, 1.0, 3, None)
    with pytest.raises(ValueError, match=r"7.cls holds '5'; expected 0 \.\. 2"):
        prepare({"jpg": jpeg(0), "cls": b"5", "__key__": "7", "__url__": "u"}, random.Random(0))
