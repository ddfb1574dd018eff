"""The grey-level tokenizer: exact round trips and nearest levels."""

import pytest
import torch

from flashar_pl.tokenizers import PixelTokenizer


def test_round_trip_is_exact_for_every_number_of_levels():
    for levels in range(2, 257):
        tokenizer = PixelTokenizer(levels)
        codes = torch.arange(levels).view(1, 1, levels)
        images = tokenizer.decode(codes)
        assert images.dtype == torch.uint8
        assert images.shape == (1, 3, 1, levels)
        assert images[0, 1, 0].tolist() == [round(255 * c / (levels - 1)) for c in range(levels)]
        assert torch.equal(tokenizer.encode(images), codes)
        assert torch.equal(tokenizer.encode_float(tokenizer.decode_float(codes)), codes)


def test_nearest_level_of_the_mean_channel():
    tokenizer = PixelTokenizer(17)
    grey = torch.arange(256, dtype=torch.uint8)
    codes = tokenizer.encode(grey.view(1, 1, 1, 256).expand(1, 3, 1, 256))[0, 0]
    levels = torch.arange(17).double() * 255 / 16
    assert torch.equal(codes, (grey.double()[:, None] - levels).abs().argmin(dim=1))
    red = torch.tensor([240, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)  # mean 80, level 5.02
    assert tokenizer.encode(red).item() == 5  # uint8 sums must not wrap around
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert tokenizer.encode(white).item() == 16


def test_float_agrees_with_uint8():
    tokenizer = PixelTokenizer(17)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.encode_float(images.double() / 127.5 - 1), tokenizer.encode(images))


@pytest.mark.parametrize("levels", [1, 257, 0, 17.0, True, "17"])
def test_levels_out_of_range(levels):
    with pytest.raises(ValueError, match="from 2 to 256"):
        PixelTokenizer(levels)
