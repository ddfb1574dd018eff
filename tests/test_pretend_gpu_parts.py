"""Tokenizers and metrics on a pretended GPU: the results of the CPU, devices not mixed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pretend_gpu import PretendGPU
from torch import Tensor

from flashar_pl.metrics import collector
from flashar_pl.metrics.classifier import ClassifierFeatures
from flashar_pl.metrics.collector import DistributionMetrics
from flashar_pl.metrics.extractor import extract_features
from flashar_pl.metrics.fid import FrechetDistance
from flashar_pl.metrics.reference import reference_from_batches
from flashar_pl.tokenizers import IBQ, VQ16, Tokenizer
from flashar_pl.tokenizers.conv_tokenizer import TokenizerSpec
from flashar_pl.tokenizers.convnet import NetSpec
from flashar_pl.tokenizers.pixels import PixelTokenizer


def convolutional(kind: type[VQ16] | type[IBQ]) -> Tokenizer:
    """Two levels, with attention in the lower one; random weights."""
    torch.manual_seed(0)
    net = NetSpec(stem=32, widths=(32, 64), blocks=1, attention=(False, True), latent=16)
    made = kind(TokenizerSpec(net, net, codes=24, dim=8), decode_dtype="bfloat16")
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
    """All metrics of two batches of samples, the second with one row that only fills it up."""
    torch.manual_seed(1)
    names = [name for name in collector.NAMES if name != "sfid"]
    extractor = ClassifierFeatures((8, 8), 3, 4).requires_grad_(False).eval().to(device)
    metrics = DistributionMetrics(extractor, names).to(device)
    metrics.set_reference(reference_from_batches(extractor, images(9, 8).split(4)))
    first, second = (extract_features(extractor, images(n, 8, n // 3).to(device)) for n in (6, 3))
    metrics.update(first, torch.arange(6), None)
    metrics.update(second, torch.arange(6, 9).to(device), torch.tensor([1, 1, 0]).bool().to(device))
    return metrics.compute()


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """FID, Inception Score, precision, recall and KID."""
    monkeypatch.setattr(collector, "MEASURES", collector.measures(k=2, kid_subset=4, kid_subsets=2))
    expected = results("cpu")
    with PretendGPU():
        found = results("cuda")
    assert found.keys() == expected.keys() >= {"fid", "is", "precision", "kid"}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_real_rows_and_moments() -> None:
    """What validation does: real images are counted on the device, and moments that were read come from the CPU."""
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    mu, sigma = rows[:20].double().mean(0).numpy(), np.cov(rows[:20].double().numpy().T)
    answers: list[Any] = []
    for device in ("cpu", "cuda"):
        with PretendGPU():
            for reference in (True, False):
                distance = FrechetDistance(5).to(device)
                if reference:
                    distance.set_reference(mu, sigma, 20)
                else:
                    distance.update(rows[:20].to(device), real=True)
                distance.update(rows[20:].to(device), real=False, valid=torch.ones(20).bool().to(device))
                answers.append(float(distance.compute()))
    assert answers == pytest.approx([answers[0]] * 4, rel=1e-6)
