"""Sample sets: what in-training validation and `flashar evaluate` both draw from."""

from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny_images import vq_state

from flashar_pl.backbones import ClassIds, Prompts
from flashar_pl.decoding import Engine, generate
from flashar_pl.decoding.samples import SampleSet, decode_images, draw, draw_batch
from flashar_pl.metrics.extractor import FeatureExtractor, Features
from flashar_pl.options import SamplingSettings
from flashar_pl.tokenizers import VQ16, PixelTokenizer


class Counting(FeatureExtractor):
    """Three features of an image; remembers the shapes it was given."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def extract(self, images: torch.Tensor) -> Features:
        self.shapes.append(tuple(images.shape))
        return Features(images.float().mean((2, 3)), None, images.float().amax((2, 3)))

    def fingerprint(self) -> str:
        return "counting"


def samples(n: int, batch_size: int, **overrides: object) -> SampleSet:
    settings = SamplingSettings(cfg_scale=1.5, top_k=9)
    return SampleSet(ClassIds(torch.arange(tiny.CLASSES)), (3, 4), "diagonal", settings, batch_size, n=n, **overrides)


def test_samples_are_those_of_plain_generation_and_every_batch_has_one_shape() -> None:
    """Guards seeds, conditions and settings, and a last batch of another shape, which rounds differently."""
    model, extractor = tiny.flashar().double(), Counting()
    drawn = list(draw(model, PixelTokenizer(tiny.VOCABULARY), samples(7, 3, seed=5), extractor=extractor))
    expected = generate(model, torch.arange(7) % tiny.CLASSES, (3, 4), cfg_scale=1.5, top_k=9, seeds=list(range(5, 12)))
    assert torch.equal(torch.cat([part.codes for part in drawn]), expected)
    assert torch.cat([part.index for part in drawn]).tolist() == list(range(7))
    assert [part.batch for part in drawn] == [0, 1, 2]
    assert extractor.shapes == [(3, 3, 3, 4)] * 3
    for part in drawn:
        assert part.features is not None
        assert torch.equal(part.features.pool, part.images.float().mean((2, 3)))
        assert part.features.logits is not None
        assert len(part.images) == len(part.features.logits) == len(part.index)


def test_whether_a_preview_is_drawn_is_one_answer_for_all_batches() -> None:
    """Ranks that share one model draw other batches, and would wait for each other's forwards for ever."""
    model, begin = tiny.emu(boi_token_id=9, preview_side=2), torch.tensor([5, 9])
    grids: list[tuple[int, int]] = []

    class Grids(Engine):
        def generate(self, condition: Any, grid: Any, *arguments: Any, **options: Any) -> torch.Tensor:
            grids.append(grid)
            return super().generate(condition, grid, *arguments, **options)

    with_one = torch.tensor([5, 9, 7, 7, 7, 7])
    for first, last, drawn in ((begin, begin, [(2, 2), (4, 4)]), (with_one, with_one, [(4, 4)]), (begin, with_one, [])):
        prompts = SampleSet(Prompts([first, last]), (4, 4), "raster", SamplingSettings(), 1)
        for batch in (0, 1):
            grids.clear()
            with nullcontext() if drawn else pytest.raises(ValueError, match="1 of 2 prompts have no preview yet"):
                draw_batch(Grids(model, "eager"), prompts, batch)
            assert grids == drawn


def test_a_long_and_narrow_image_has_a_preview() -> None:
    """A side of it was rounded down to 0 codes."""
    config = tiny.emu(preview_side=2).config
    assert [config.preview(*grid) for grid in ((4, 4), (1, 64), (64, 1))] == [(2, 2), (1, 16), (16, 1)]


def test_entries_of_several_samples_each_fill_up_the_last_batch() -> None:
    """Two images of each of two prompts, in batches of three."""
    prompts = Prompts([torch.tensor([5]), torch.tensor([6, 7])])
    drawn = SampleSet(prompts, (2, 2), "raster", SamplingSettings(), 3, every=2)
    assert (drawn.n, drawn.batches) == (4, 2)
    rows = [drawn.entries(drawn.condition, batch) for batch in (0, 1)]
    assert [[len(ids) for ids in part] for part in rows] == [[1, 1, 2], [2, 2, 2]]


def test_ranks_share_the_batches_and_run_equally_many() -> None:
    plan = samples(7, 2)  # 4 batches
    assert plan.batches == 4
    assert [plan.batches_of_rank(rank, 3) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [part.batch for part in draw(tiny.flashar(), PixelTokenizer(tiny.VOCABULARY), plan, [2, 5])] == [2]


def tiny_vq() -> tuple[VQ16, torch.Tensor]:
    tokenizer = VQ16.from_official(vq_state())
    side = 48 // tokenizer.downsample
    return tokenizer, torch.arange(2 * side * side).view(2, side, side) % tokenizer.vocabulary


def test_resizing_is_llamagens() -> None:
    """Bicubic without antialiasing on the decoder's floats, then clamp(127.5 x + 128) truncated, in that order."""
    tokenizer, codes = tiny_vq()
    floats = F.interpolate(tokenizer.decode_float(codes), size=(32, 32), mode="bicubic")
    expected = torch.clamp(127.5 * floats + 128.0, 0, 255).to(torch.uint8)
    resized = decode_images(tokenizer, codes, 32)
    assert resized.shape == (2, 3, 32, 32)
    assert torch.equal(resized, expected)
    late = F.interpolate(tokenizer.decode(codes).float(), size=(32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)
    smooth = F.interpolate(tokenizer.decode_float(codes), size=(32, 32), mode="bicubic", antialias=True)
    assert (resized != late).float().mean() > 0.1
    assert not torch.equal(resized, tokenizer.to_uint8(smooth))
    assert torch.equal(decode_images(tokenizer, codes, 48), tokenizer.decode(codes))


def test_what_cannot_be_resized_is_refused() -> None:
    tokenizer, codes = tiny_vq()
    with pytest.raises(ValueError, match="48 x 32 pixels from VQ16 cannot be resized"):
        decode_images(tokenizer, codes[:, :, : 32 // tokenizer.downsample], 16)
    with pytest.raises(ValueError, match="from PixelTokenizer cannot be resized to 16 x 16"):
        decode_images(PixelTokenizer(17), torch.zeros(1, 8, 8, dtype=torch.int64), 16)
