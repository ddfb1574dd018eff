"""The backbone behind the tiny checkpoints of the command-line tests."""

import torch

from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig

TINY = {"dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 8}
DIGITS = {"vocab_size": 17, "num_classes": 10}


def tiny_backbone(**overrides) -> LlamaGen:
    """A random backbone for the digits, unless overridden."""
    torch.manual_seed(0)
    backbone = LlamaGen(LlamaGenConfig(**{**TINY, **DIGITS, **overrides}))
    with torch.no_grad():  # far from uniform, so that a wrong code is seen
        for parameter in backbone.parameters():
            parameter.mul_(8)
        backbone.head.weight.normal_(std=0.5)
    return backbone
