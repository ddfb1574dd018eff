"""Pixels before the tokenizer: crops equal the published ones, buckets keep the ratio, broken files say so."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flashar_pl.data.images import (
    BucketCrop,
    SquareCrop,
    centre_crop,
    default_grids,
    fit,
    nearest_grid,
    ten_crop,
    views,
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def test_large_images_are_halved_with_a_box_filter_first():
    """Guards parity with published codes: one bicubic step gives other pixels than halving first."""
    image = noise(32, 32)
    pixels = np.asarray(image).astype(np.float64)  # (32, 32, 3)
    mean = pixels.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    got = centre_crop(image, 16).transpose(1, 2, 0)
    assert np.abs(got - mean).max() <= 1
    direct = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.abs(got.astype(int) - direct).max() > 10


def test_smaller_images_are_resized_bicubically_and_the_centre_is_cut_out():
    image = noise(45, 31)  # shorter side 31 -> 16, longer side 45 * 16 / 31 = 23.2 -> 23, centre 3 .. 18
    whole = np.asarray(image.resize((23, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(centre_crop(image, 16), whole[:, :, 3:19])
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    turned = centre_crop(image, 16).transpose(0, 2, 1).astype(int)
    assert np.abs(centre_crop(tall, 16) - turned).max() <= 3, "Pillow rounds between the two directions"


def test_ten_crops_in_the_published_order():
    """Guards comparability with the .npy codes: the mirror image is cropped, not each crop mirrored in place."""
    images = torch.arange(2 * 3 * 9 * 9).reshape(2, 3, 9, 9)
    got = ten_crop(images, 4)
    assert got.shape == (2, 10, 3, 4, 4)
    corners = [(0, 0), (0, 5), (5, 0), (5, 5), (2, 2)]  # 2.5 rounds to even
    for k, (top, left) in enumerate(corners):
        assert torch.equal(got[:, k], images[..., top : top + 4, left : left + 4])
        assert torch.equal(got[:, 5 + k], images.flip(-1)[..., top : top + 4, left : left + 4])
    assert torch.equal(got[:, 5], got[:, 1].flip(-1)), "top left of the mirror image is the mirrored top right"
    assert not torch.equal(got[:, 9], got[:, 4].flip(-1)), "an odd margin puts the centres one pixel apart"


def test_image_and_mirror():
    images = torch.arange(12).reshape(1, 3, 2, 2)
    assert torch.equal(views(images, 2, 2)[0, 0], images[0])
    assert torch.equal(views(images, 2, 2)[0, 1], images[0].flip(-1))


def test_a_strip_is_cut_before_it_is_resized(monkeypatch):
    """92 bytes of 4,000 x 1 pixels took 1.3 GB: the strip was resized to 1,024,000 x 256."""
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *args: (made.append(size), resize(self, size, *args))[1]
    )
    for size in ((4_000, 1), (1, 4_000)):
        assert SquareCrop(256)(encoded(noise(*size))).shape == (3, 256, 256)
    assert made == [(2048, 256), (256, 2048)]
    strip = noise(800, 16)
    middle = strip.crop((400 - 64, 0, 400 + 64, 16))
    np.testing.assert_array_equal(centre_crop(strip, 16), np.asarray(middle)[:, 56:72].transpose(2, 0, 1))


def test_grids_of_one_area_mirror_each_other():
    grids = default_grids(512, 16)
    assert len(grids) == len(set(grids)) == 9
    assert (32, 32) in grids
    for height, width in grids:
        assert (width, height) in grids
        assert 0.94 * 1024 <= height * width <= 1024
    ratios = [width / height for height, width in grids]
    np.testing.assert_allclose(ratios, [1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9, 2], rtol=0.03)
    with pytest.raises(ValueError, match="multiple of 16"):
        default_grids(500, 16)


def test_an_image_goes_to_the_nearest_ratio():
    grids = ((4, 4), (4, 8), (8, 4))
    assert nearest_grid(1.3, grids) == (4, 4)
    assert nearest_grid(1.5, grids) == (4, 8), "sqrt(2) is the border, on a logarithmic scale"
    assert nearest_grid(1 / 1.5, grids) == (8, 4)
    crop = BucketCrop(grids, 4)
    assert crop(encoded(noise(60, 31))).shape == (3, 16, 32)
    assert crop(encoded(noise(31, 60))).shape == (3, 32, 16)


def test_a_bucket_keeps_the_aspect_ratio():
    """Guards against squashing: a disc stays a disc."""
    y, x = np.mgrid[:120, :200]
    disc = ((x - 100) ** 2 + (y - 60) ** 2 < 40**2).astype(np.uint8) * 255
    got = fit(Image.fromarray(disc).convert("RGB"), 32, 48)[0] > 127  # scale 120 / 32
    assert abs(got.any(axis=0).sum() - 80 / 3.75) <= 1
    assert abs(got.any(axis=1).sum() - 80 / 3.75) <= 1
    for width, height in [(7, 1000), (1000, 7), (333, 500), (1, 1)]:
        assert fit(noise(width, height), 12, 20).shape == (3, 12, 20)
