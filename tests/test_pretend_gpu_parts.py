"""Tokenizers and metrics on a pretended GPU: the results of the CPU, devices not mixed."""

import pytest
import torch
from pretend_gpu import PretendGPU
from torch import Tensor

from flashar_pl.metrics import table
from flashar_pl.metrics.classifier import ClassifierFeatures
from flashar_pl.metrics.extractor import extract_features
from flashar_pl.metrics.reference import reference_from_batches
from flashar_pl.tokenizers import IBQ, VQ16, Tokenizer
from flashar_pl.tokenizers.conv_tokenizer import TokenizerSpec
from flashar_pl.tokenizers.convnet import NetSpec
from flashar_pl.tokenizers.pixels import PixelTokenizer


def convolutional(kind: type[VQ16] | type[IBQ]) -> Tokenizer:
    """Two levels, with attention in the lower one; random weights."""
    torch.manual_seed(0)
    net = NetSpec(stem=32, widths=(32, 64), blocks=1, attention=(False, True), latent=16)
    made = kind(TokenizerSpec(net, net, codes=24, dim=8))
    made.decode_dtype = "bfloat16"
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return made


def images(n: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", ["vq16", "ibq", "pixels"])
def test_a_tokenizer(kind: str) -> None:
    tokenizer = PixelTokenizer(17) if kind == "pixels" else convolutional(VQ16 if kind == "vq16" else IBQ)
    pictures = images(2, 8)
    codes = tokenizer.encode(pictures)
    decoded, values = tokenizer.decode(codes), tokenizer.decode_float(codes)
    with PretendGPU():
        tokenizer.to("cuda")
        found = tokenizer.encode(pictures.to("cuda"))
        assert found.is_cuda
        assert torch.equal(found.cpu(), codes)
        assert (tokenizer.decode(found).cpu().int() - decoded.int()).abs().max() <= 2  # bfloat16
        torch.testing.assert_close(tokenizer.decode_float(found).cpu(), values, atol=2e-2, rtol=2e-2)


def results(device: str) -> dict[str, float]:
    """All metrics of a batch of samples."""
    torch.manual_seed(1)
    extractor = ClassifierFeatures((8, 8), 3, 4).requires_grad_(False).eval().to(device)
    real = reference_from_batches(extractor, images(9, 8).split(4))
    names = [name for name in table.METRICS if name != "sfid"]
    return table.measure(names, extract_features(extractor, images(8, 8, 1).to(device)), real)[0]


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """FID, Inception Score, precision, recall and KID."""
    monkeypatch.setitem(table.FEWEST, "kid", 4)
    expected = results("cpu")
    with PretendGPU():
        found = results("cuda")
    assert found.keys() == expected.keys() >= {"fid", "is", "precision", "kid"}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
