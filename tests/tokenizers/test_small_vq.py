"""A VQ tokenizer trained on the spot."""

import pytest
import torch

from flashar_pl.tensor_files import save_checked
from flashar_pl.tokenizers import build_tokenizer
from flashar_pl.tokenizers.small_vq import _renew, losses, psnr, small_spec, train_small_vq
from flashar_pl.tokenizers.vq16 import VQ16


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """(6, 3, 8, 8): flat ones, which the smallest network learns at once."""
    return torch.arange(0, 240, 40, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 8, 8).contiguous()


def test_training_lowers_the_error_and_is_repeatable(pictures):
    spec = small_spec(4, 16, 32)
    state = torch.random.get_rng_state()
    first, second = (train_small_vq(pictures, spec, 12, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.quantize.embedding.weight, second.quantize.embedding.weight)
    torch.manual_seed(3)
    untrained = VQ16(spec)
    error = {model: psnr(pictures, model.decode(model.encode(pictures))) for model in (untrained, first)}
    assert error[first] > error[untrained] + 2
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_the_file_is_read_by_every_option_that_takes_one(tmp_path, pictures):
    """Guards sizes that the published layout cannot tell: width, blocks, levels."""
    model = VQ16(small_spec(8, 16, 32))
    save_checked(model.to_official(), tmp_path / "t.safetensors")
    for kind in ("vq16", "vq8"):
        read = build_tokenizer({"kind": kind, "weights": str(tmp_path / "t.safetensors")})
        assert read.spec == model.spec
        assert torch.equal(read.encode(pictures), model.encode(pictures))
    assert build_tokenizer(read.config()).downsample == 8


def test_gradients_pass_through_the_codes_and_unused_codes_move(pictures):
    model = VQ16(small_spec(4, 16, 32)).requires_grad_(True)
    pixels = model.from_uint8(pictures)
    loss, codes = losses(model, pixels, quantised=True)
    loss.backward()
    assert float(model.encoder.conv_in.weight.grad.abs().sum()) > 0
    assert float(model.quantize.embedding.weight.grad.abs().sum()) > 0
    used = torch.zeros(16, dtype=torch.bool)
    used[codes] = True
    before = model.quantize.embedding.weight.detach().clone()
    _renew(model, pixels, used, torch.Generator().manual_seed(0))
    moved = (model.quantize.embedding.weight != before).any(dim=1)
    assert torch.equal(moved, ~used)


def test_sizes_that_cannot_be():
    for sizes in ((3, 16, 32), (4, 1, 32), (4, 16, 48)):
        with pytest.raises(ValueError, match="expected downsample one of 2, 4, 8, 16"):
            small_spec(*sizes)
    with pytest.raises(ValueError, match="12 pixels wide; expected a multiple of 8, such as 16"):
        train_small_vq(torch.zeros(1, 3, 12, 12, dtype=torch.uint8), small_spec(8, 16, 32), 2)


def test_psnr():
    """Source: 20 log10(255 / rmse)."""
    black = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert psnr(black, black + 255) == pytest.approx(0.0)
    assert psnr(black, black + 51) == pytest.approx(13.9794, abs=1e-4)
