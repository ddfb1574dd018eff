"""Shards with codes of a smaller version of every image, which stand in its prompt (GLM-Image)."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flashar_pl.backbones import Decoder
from flashar_pl.backbones.condition import Conditioning, Prompts
from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.data import TextImageDataModule
from flashar_pl.data.batches import to_batch
from flashar_pl.data.code_files import PtCodes
from flashar_pl.data.encode import ImageEncoder, tokenizer_of
from flashar_pl.data.manifest import check_matches
from flashar_pl.data.pixels import ImageBatch
from flashar_pl.data.reader import Samples
from flashar_pl.data.shards import ConditionSpec, Manifest, ShardReader, ShardWriter, verify
from flashar_pl.image_files import Unreadable

GRID, PREVIEW, N = (3, 4), (2, 3), 5
FACTS = {"name": "t", "tokenizer": {"kind": "pixels", "levels": 9}, "vocabulary": 9, "condition": ConditionSpec("text")}
TEXTS = [f"fox {i}" for i in range(N)]


def codes(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 9, (N, 1, *shape))


def write(out: Path, previews: np.ndarray | None = None, **facts: object) -> Manifest:
    with ShardWriter(out, grid=GRID, block=2, **{**FACTS, "preview": PREVIEW, **facts}) as writer:
        writer.write("train", codes(*GRID), ids=range(N), texts=TEXTS, previews=previews)
    return Manifest.load(out)


def test_previews_come_back_beside_their_codes(tmp_path: Path) -> None:
    """Guards their place in the file, the order of samples, and the prompt that training sees."""
    smaller = codes(*PREVIEW)
    manifest = write(tmp_path / "s", smaller)
    assert manifest.preview == PREVIEW
    verify(tmp_path / "s")
    rows = np.array([3, 0, 4])
    samples = ShardReader(manifest, "train").read(rows)
    assert np.array_equal(samples.codes, codes(*GRID)[rows, 0])
    assert np.array_equal(samples.previews, smaller[rows, 0])
    joined = Samples.joined([samples, samples], np.array([5, 0]))
    assert np.array_equal(joined.previews, smaller[[4, 3], 0])
    batch = to_batch(samples, text_encoder=lambda text: torch.tensor([int(text[-1]), 10])).to("cpu")
    config = DecoderConfig(
        dim=8, n_layer=1, n_head=1, n_kv_head=1, head_dim=8, ffn_dim=8, vocab_size=16, rope_base=1e4, norm_eps=1e-6,
        visual_token_offset=1, num_visual_codes=9, boi_token_id=10, preview_side=2,
    )  # fmt: skip
    found = Decoder(config).condition_of(batch)
    assert [ids.tolist() for ids in found] == [[n, 10, *(smaller[n, 0].flatten() + 1)] for n in rows]
    assert Decoder(replace(config, preview_side=None)).condition_of(replace(batch, previews=None)) is batch.condition


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no previews are given; the manifest has \(2, 3\)"):
        write(tmp_path / "a")
    with pytest.raises(ValueError, match="previews are given; the manifest has None"):
        write(tmp_path / "b", codes(*PREVIEW), preview=None)
    with pytest.raises(ValueError, match=r"previews have shape \(5, 1, 3, 3\)"):
        write(tmp_path / "c", codes(3, 3))
    with pytest.raises(ValueError, match=r"previews range over \d .. 9"):
        write(tmp_path / "d", codes(*PREVIEW) + 1)
    takes = Conditioning("prompt", 16, previews=True)
    check_matches(write(tmp_path / "e", codes(*PREVIEW)), 9, takes)
    with pytest.raises(ValueError, match="hold no previews, and the model draws one before every image"):
        check_matches(write(tmp_path / "f", preview=None), 9, takes)
    with pytest.raises(ValueError, match="hold previews, and the model draws none before an image"):
        check_matches(write(tmp_path / "g", codes(*PREVIEW)), 9, replace(takes, previews=False))
    damaged = write(tmp_path / "h", codes(*PREVIEW))
    with pytest.raises(ValueError, match="holds the code 8, outside the vocabulary of 8"):
        ShardReader(replace(damaged, vocabulary=8), "train", verify=False).read(np.array([0]))
    with pytest.raises(ValueError, match=r"previews.npy of .* has shape \(2, 1, 2, 3\) .* implies \(2, 1, 3, 2\)"):
        ShardReader(replace(damaged, preview=(3, 2)), "train", verify=False).read(np.array([0]))


def test_images_tokenised_while_training_have_their_previews(tmp_path: Path) -> None:
    """They had none, and a run on them saw previews at validations only."""
    write(tmp_path / "s", codes(*PREVIEW))
    data = TextImageDataModule("images.json", str(tmp_path / "s"))
    data._tokenizer = tokenizer_of(data.manifest, None, "")
    pixels = torch.randint(0, 256, (2, 3, *GRID), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = data.on_after_batch_transfer(ImageBatch(pixels, Prompts([torch.tensor([1])] * 2)), 0)
    shards = ImageEncoder(data._tokenizer, torch.device("cpu"), preview=lambda *grid: PREVIEW)
    assert torch.equal(batch.codes, torch.from_numpy(shards(pixels.numpy()))[:, 0])
    assert torch.equal(batch.previews, torch.from_numpy(shards.previews(pixels.numpy(), GRID))[:, 0])


def test_a_file_of_codes_may_hold_a_preview() -> None:
    def read(content: object) -> object:
        data = io.BytesIO()
        torch.save(content, data)
        return PtCodes(9)(data.getvalue())

    image, smaller = torch.randint(0, 9, GRID), torch.randint(0, 9, PREVIEW)
    found, preview = read({"codes": image, "preview": smaller})
    assert np.array_equal(found[0], image)
    assert np.array_equal(preview[0], smaller)
    assert np.array_equal(read(image)[0], image)
    for wrong in ({"codes": image}, {"codes": image, "preview": smaller + 9}, {"codes": image, "preview": [1]}):
        with pytest.raises(Unreadable):
            read(wrong)
