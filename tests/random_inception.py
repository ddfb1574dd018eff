"""torch-fidelity's Inception network with random weights whose features neither die out nor explode."""

from pathlib import Path

import pytest
import torch
from torch import nn

from flashar_pl.metrics import inception


def save_random_inception(path: Path) -> nn.Module:
    """Write the weights as torch-fidelity's file lays them out; returns its network with them. Skips without it."""
    try:
        module = inception.load_fidelity_module()
    except ValueError as error:
        pytest.skip(str(error))
    with torch.device("meta"):
        module.load_state_dict_from_url = lambda url, progress: {}
        holder = module.FeatureExtractorInceptionV3.load_state_dict
        module.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        module.FeatureExtractorInceptionV3.load_state_dict = holder
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif value.ndim == 4:  # with default initialisation the pooled features die out (spread 1e-8)
            fan_in = value[0].numel()
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name == "fc.weight":
            state[name] = torch.randn(value.shape, generator=generator) * 0.02
        else:
            ones = name.endswith(("bn.weight", "running_var"))
            state[name] = torch.ones(value.shape) if ones else torch.zeros(value.shape)
    torch.save(state, path)
    network = network.to_empty(device="cpu")
    network.load_state_dict(state)
    return network.eval()
