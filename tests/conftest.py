"""One thread per process: tiny models run several times slower on more, and results do not depend on the machine."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that are not for them: commands and trainers would choose one, and expect other results."""
    chosen = config.getoption("markexpr")
    if chosen and "gpu" not in chosen.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
