"""Training-free diagonal decoding by the limited plan: what it sees, and that it beats the average of clones."""

import numpy as np
import pytest
import torch
from torch import nn

from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig
from flashar_pl.data.digits import tokenize_digits
from flashar_pl.data.shards import Manifest, ShardReader
from flashar_pl.decoding import generate
from flashar_pl.grid import NONE, diagonal_plan, limited_plan, raster_plan
from flashar_pl.models import FlashAR, RasterAR


def test_the_plan_is_the_diagonal_one_within_the_raster_one():
    plan, diagonal, raster = limited_plan(3, 4), diagonal_plan(3, 4), raster_plan(3, 4)
    assert torch.equal(plan.step, diagonal.step)
    assert torch.equal(plan.h_source, diagonal.h_source)
    assert (plan.v_source >= 0).nonzero().flatten().tolist() == [4, 8]  # the first column below the corner
    assert plan.v_source[0] == NONE
    both = diagonal.mask(2, "raster") & raster.mask(2, "raster")
    assert torch.equal(plan.mask(2, "raster"), both)


def backbone(**sizes: int) -> LlamaGen:
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout"), 0.0)
    tiny = {"dim": 24, "n_layer": 2, "n_head": 2, "multiple_of": 8, "vocab_size": 5, "num_classes": 2}
    return LlamaGen(LlamaGenConfig(**{**tiny, **sizes}, **no_dropout))


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (1, 3), (3, 1)])
def test_cached_drawing_is_the_teacher_forced_argmax(size):
    """The mask inside a diagonal must hold in the cache too, in float64."""
    own = backbone()
    nn.init.normal_(own.head.weight)
    model = FlashAR(own.double(), 1).eval()
    classes = torch.tensor([0, 1])
    codes = generate(model, classes, size, plan="limited", greedy=True)
    logits = model(codes, classes, limited_plan(*size)).fused
    assert torch.equal(logits.argmax(-1), codes)


@pytest.mark.slow
def test_it_beats_the_average_of_clones_on_digits(tmp_path):
    """In nats per held-out image, after some training in raster order, which beats both."""
    tokenize_digits(tmp_path / "digits")
    manifest = Manifest.load(tmp_path / "digits")

    def images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        reader = ShardReader(manifest, split)
        samples = reader.read(np.arange(len(reader)))
        return torch.from_numpy(samples.codes).long(), torch.from_numpy(samples.labels).long()

    (codes, classes), held_out = images("train"), images("test")
    model = RasterAR(backbone(dim=32, n_head=4, multiple_of=32, vocab_size=17, num_classes=10)).train()
    adam, rng = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(100):
        chosen = torch.randint(0, len(codes), (64,), generator=rng)
        adam.zero_grad()
        model.loss(codes[chosen], classes[chosen])["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    with torch.no_grad():
        raster = model.eval().loss(*held_out)["nll"].mean()
        free = FlashAR(model.backbone, 1).eval()
        limited, average = (free.loss(*held_out, plan(8, 8))["nll"].mean() for plan in (limited_plan, diagonal_plan))
    assert raster + 3 < limited
    assert limited + 3 < average
