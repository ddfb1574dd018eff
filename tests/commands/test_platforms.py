"""What other systems lack: modules, signals and calls of POSIX. Windows and macOS themselves were not at hand."""

import ast
import ctypes
import os
import shutil
import signal
import sys
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint  # asks once which system this is: before `poorer` changes it
from command_toys import DIGITS, TINY

import flashar_pl
from flashar_pl import devices, locks
from flashar_pl.evaluate.options import EvaluateOptions, Evaluation
from flashar_pl.evaluate.samples import Bench
from flashar_pl.options import EngineOptions, ModelOptions, SamplingSettings
from flashar_pl.training.preemption import StopOnSignal

POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog"}
"""Modules that Windows does not have."""


def test_no_file_imports_modules_of_posix_when_it_is_imported() -> None:
    """Guards `import flashar_pl...` on Windows."""
    found = []
    for file in Path(flashar_pl.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = {id(node) for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) for node in ast.walk(each)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found += [(file.name, name) for name in names if name in POSIX and id(node) not in inside]
    assert found == []


@pytest.fixture
def poorer(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process without what Windows lacks."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    kept = {name: value for name, value in signal.Signals.__members__.items() if name in ("SIGINT", "SIGTERM")}
    monkeypatch.setattr(signal, "Signals", IntEnum("Signals", kept))
    for name in ("sysconf", "sched_getaffinity", "O_NOFOLLOW", "O_CLOEXEC"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(devices, "_from_proc", lambda file, key: "")
    monkeypatch.setattr(devices.sys, "platform", "win32")
    monkeypatch.setattr(shutil, "which", lambda *name: None)  # Python 3.12's asks Windows where it believes to be there
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("there is no C library without a name"))
    return monkeypatch


def test_generate_score_and_fit_run_without_posix(poorer, run, flashar_model, shards, work):
    """Guards every call on their way: memory of the machine, locks of run directories, handlers of signals."""
    code, _, err = run("generate", "--checkpoint", flashar_model, "--classes", 3, "--num-images", 1, "--out", "drawn")
    assert code == 0, err
    assert np.load("drawn/codes.npy").shape == (1, 8, 8)
    code, _, err = run("score", "--checkpoint", flashar_model, "--data", shards, "--limit", 4)
    assert code == 0, err
    sizes = [f"--model.backbone.options.{name}={value}" for name, value in {**TINY, **DIGITS}.items()]
    stop = "[{class_path: flashar_pl.training.StopOnSignal}]"
    code, _, err = run(
        *("fit", *sizes, "--data.shards", shards, "--trainer.max_steps", 1, "--trainer.default_root_dir", "runs/one"),
        *("--trainer.accelerator", "cpu", "--trainer.limit_val_batches", 0, "--trainer.callbacks", stop),
        *("--trainer.enable_progress_bar", "false"),
    )
    assert code == 0, err
    assert Path("runs/one/config.yaml").is_file()


def test_memory_of_a_training_is_known_without_proc(monkeypatch):
    """macOS: its curve would be missing, and what the process has had must not pass for what a block has."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "_from_proc", lambda file, key: "")
    assert devices.most_memory(cpu) > 2**24
    with devices.peak_memory(cpu) as peak:
        pass
    assert (peak.bytes, peak.extra) == (0, 0)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert devices.most_memory(cpu) == 0


def test_locks_keep_nobody_out_where_there_are_none(poorer, tmp_path):
    with (tmp_path / "a").open("w") as file, (tmp_path / "a").open("a") as other:
        assert locks.take(file) is None
        assert locks.take(other) is None  # where there are locks: BlockingIOError
        locks.release(other)


def test_names_of_signals_are_still_checked(poorer):
    assert StopOnSignal().names == ("SIGUSR1", "SIGTERM")
    with pytest.raises(ValueError, match="SIGUSR9"):
        StopOnSignal(("SIGUSR9",))


def test_an_apple_gpu_is_taken_where_torch_has_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.find_device("mps").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with pytest.raises(ValueError, match="finds no Apple GPU; use --device cpu"):
        devices.find_device("mps")
    with pytest.raises(ValueError, match="expected auto, cpu, cuda, cuda:N or mps"):
        devices.find_device("mps:1")


def test_metrics_refuse_a_device_without_float64():
    """Guards torch's own words, after all samples were drawn."""
    options = EvaluateOptions(reference="r", features="f", out="o")
    asked = Evaluation(options, ModelOptions("c"), SamplingSettings(), EngineOptions())
    with pytest.raises(ValueError, match="metrics are computed in float64, which mps does not have; use --device cpu"):
        Bench.load(asked, torch.device("mps"))
