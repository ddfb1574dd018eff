"""Data and a feature extractor, made once."""

import os
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from emu_tiny_data import write
from training_toys import save_classifier, write_digit_like


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory) -> str:
    return write_digit_like(tmp_path_factory.mktemp("training") / "shards")


@pytest.fixture(scope="session")
def toy_classifier(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("training") / "classifier")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with the data of experiments/emu35_tiny.yaml."""
    place = tmp_path_factory.mktemp("emu35")
    with chdir(place):
        write(Path("data/emu35_tiny"))
    return place


@pytest.fixture(autouse=True)
def _no_trace_of_process_groups():
    """A sharded fit in this process leaves its process group, and variables that tell a new process it is a rank."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
