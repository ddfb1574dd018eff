"""One thread per process: tiny models run several times slower on more."""

import functools
import gc
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, as Lightning does

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from pair import Pair
from tiny_images import vq_state

torch.set_num_threads(1)
gc.disable()  # until all modules are imported

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that are not for them: commands and trainers would choose one, and expect other results."""
    chosen = config.getoption("markexpr")
    if chosen and "gpu" not in chosen.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays. Each full collection would walk its million objects: a tenth of the suite's time."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, and all files with tests of two ranks in the same one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "pair" if "import Pair" in _text(config.rootpath / file) else file

    return ByFile(config, log)


@functools.cache
def _text(file: Path) -> str:
    return file.read_text()


@pytest.fixture(autouse=True, scope="session")
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The suite has its own key to mark run directories with, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_seed_left() -> Iterator[None]:
    """Lightning keeps the seed of a run in the environment; strategies of later tests in this process would take it."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two processes that run functions as the two ranks of a job."""
    made = Pair()
    yield made
    made.close()


@pytest.fixture(scope="session")
def vq(tmp_path_factory) -> str:
    """A file of tiny VQ weights."""
    path = tmp_path_factory.mktemp("vq") / "vq.pt"
    torch.save({"model": vq_state()}, path)
    return str(path)
