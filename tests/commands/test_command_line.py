"""The dispatcher: help without torch, closest names, exit codes."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from flashar_pl import cli
from flashar_pl.commands.arguments import build_parser

TYPED = [name for name, command in cli.COMMANDS.items() if not command.trains]
COMMAND_MODULES = sorted(Path(cli.__file__).parent.joinpath("commands").glob("*.py"))


def test_help_imports_neither_torch_nor_lightning():
    """Guards the half-second answer: one import of torch at module level of a command costs over a second."""
    code = """
import contextlib, importlib, io, sys
from flashar_pl import cli
for name in {modules!r}:
    importlib.import_module("flashar_pl.commands." + name)
out = io.StringIO()
with contextlib.redirect_stdout(out):
    for words in [["--help"], ["--version"]] + [name.split() + ["--help"] for name in {typed!r}]:
        assert cli.main(words) == 0, words
heavy = {{"torch", "lightning", "numpy", "matplotlib", "tensorboard", "sklearn"}} & set(sys.modules)
assert not heavy, heavy
"""
    modules = [path.stem for path in COMMAND_MODULES if path.stem != "__init__"]
    done = subprocess.run(
        [sys.executable, "-c", code.format(modules=modules, typed=TYPED)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_python_m_and_a_process_exit_code(tmp_path):
    """The installed command passes exit code and one-line error on."""
    words = [sys.executable, "-m", "flashar_pl.cli", "score", "--checkpoint", "no.ckpt", "--data", "no"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("flashar: error: No shards at no:")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", TYPED)
def test_every_command_is_a_typed_function_with_a_described_help(name, run):
    """A stranger reads what it does, an example, and each option's meaning; a notebook calls the same function."""
    function = cli.load(cli.COMMANDS[name])
    text = build_parser(function, f"flashar {name}").format_help()
    assert "example:" in text
    example = text.split("example:")[1]
    assert f"flashar {name}" in example
    for line, before in zip(example.splitlines()[2:], example.splitlines()[1:], strict=False):
        starts = line.startswith(("  flashar ", "  torchrun ", "  curl "))
        assert starts != before.endswith("\\"), f"not to be pasted: {line}"
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not parameter.empty
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    assert out == text


def test_help_lists_every_verb(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    code, out, _ = run("tokenize")
    assert code == 0
    assert "tokenize digits" in out


def test_unknown_command_and_option_offer_the_closest_names(refused):
    assert "did you mean score" in refused("scor")
    assert "did you mean tokenize digits" in refused("tokenize", "digit")
    assert "did you mean --checkpoint" in refused("score", "--chekpoint", "x")
    assert "--num-images is 'a few'; expected a whole number" in refused(
        "generate", "--checkpoint", "x", "--out", "y", "--num-images", "a few"
    )
    assert "generate needs --out and --checkpoint." in refused("generate", "--classes", "3")
    assert "convert needs CHECKPOINT and --out." in refused("convert")


def test_interrupt_is_quiet_and_exits_130(run, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", interrupted)
    code, out, err = run("demo")
    assert (code, out, err) == (130, "", "")


def test_traceback_on_request(run, monkeypatch):
    with pytest.raises(ValueError, match="no command"):
        run("scor", "--traceback")
    monkeypatch.setenv("FLASHAR_DEBUG", "1")
    with pytest.raises(ValueError, match="no command"):
        run("scor")


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    """Only user errors are shortened: an assertion inside a command must reach the developer."""

    def broken(words):
        raise AssertionError

    monkeypatch.setattr(cli, "dispatch", broken)
    with pytest.raises(AssertionError):
        run("demo")


def test_an_interrupt_inside_a_library_still_exits_130(monkeypatch):
    """torch.save turns a Ctrl-C into a RuntimeError of its file writer; that must not print a traceback."""

    def saving(words):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - the context is the point

    monkeypatch.setattr(cli, "dispatch", saving)
    assert cli.main(["fit"]) == 130

    def broken(words):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "dispatch", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["fit"])
