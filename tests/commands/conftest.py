"""Tiny checkpoints and shards for the command line, made once."""

from pathlib import Path

import pytest
import torch
from command_toys import tiny_backbone

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import save_model
from flashar_pl.models import FlashAR, RasterAR


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    from flashar_pl.data.digits import tokenize_digits

    path = tmp_path_factory.mktemp("data") / "digits"
    tokenize_digits(path)
    return str(path)


@pytest.fixture(scope="session")
def raster_model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "raster"
    model = RasterAR(tiny_backbone())
    note = Description(model.config(), grid=(8, 8), tokenizer={"kind": "pixels", "levels": 17})
    save_model(path, model, note)
    return str(path)


@pytest.fixture(scope="session")
def flashar_model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "flashar"
    torch.manual_seed(1)
    model = FlashAR(tiny_backbone(), 1)
    note = Description(model.config(), grid=(8, 8), tokenizer={"kind": "pixels", "levels": 17})
    save_model(path, model, note)
    return str(path)


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""
    from flashar_pl.cli import main

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(run):
    """Run a command line that must fail: exit code 2 and one line on stderr, which is returned."""

    def call(*words: object) -> str:
        code, _, err = run(*words)
        assert code == 2, err
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("flashar: error: ")]
        assert len(lines) == 1, err
        return lines[0]

    return call


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
