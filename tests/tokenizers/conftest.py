"""Reference vectors of the tokenizers: official code, tiny random networks, float32 on CPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def vq_golden():
    """(state dict, inputs and outputs) of the tiny VQ."""
    with np.load(GOLDEN / "vq" / "vq_tiny.npz") as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    state = {name[3:]: value for name, value in tensors.items() if name.startswith("sd/")}
    return state, {name: value for name, value in tensors.items() if not name.startswith("sd/")}


@pytest.fixture(scope="session")
def ibq_golden():
    """(state dict, settings, inputs and outputs) of the tiny IBQ."""
    settings = json.loads((GOLDEN / "ibq" / "ibq_tiny.json").read_text())
    state = load_file(GOLDEN / "ibq" / "ibq_tiny_state.safetensors")
    return state, settings["ddconfig"], load_file(GOLDEN / "ibq" / "ibq_tiny_io.safetensors")
