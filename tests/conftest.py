"""One thread per process: tiny models run several times slower on more."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from pair import Pair

torch.set_num_threads(1)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that are not for them: commands and trainers would choose one, and expect other results."""
    chosen = config.getoption("markexpr")
    if chosen and "gpu" not in chosen.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `-n 2 --dist loadgroup`: a file's tests stay together, and all files with tests of two ranks do."""
    with_pair = {item.path for item in items if "pair" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("pair" if item.path in with_pair else str(item.path)))


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two processes that run functions as the two ranks of a job."""
    made = Pair()
    yield made
    made.close()
