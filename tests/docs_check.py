"""Run the commands of README and docs as written, page by page, and say which were only parsed.

`make docs-check` calls it. Every page gets a directory of its own with what a short `make demo` leaves: data/digits
and runs of 20 steps. A command runs if everything it reads is there, so chains run from their own files; where weights,
downloads or other machines are missing it is parsed. The demo's training is cut to 20 steps and 20 samples.

    python -m tests.docs_check [PAGE...]
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.test_documents import ROOT, commands, parse_words

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ["--trainer.max_steps", "20", "--model.validation.samples", "20"]
"""Added to the training runs of the demo."""
SECONDS = 600
"""A command may take."""
OUTPUTS = {"--out", "--trainer.default_root_dir", "default_root_dir", "dirpath", "monitor"}
"""What follows is made, or no file, and not read."""
INPUTS = {
    "--checkpoint",
    "--raster",
    "--detector",
    "--clip",
    "--assets",
    "--weights",
    "--images",
    "--codes",
    "--labels",
    "images",  # tokenize images FOLDER
    "train",  # tokenizer train FOLDER
}
"""What follows is a path, though it may not look like one."""
FILES = re.compile(r"[^\s:]*/[^\s:]*|[\w.=-]+\.(pt|ckpt|npz|npy|json|jsonl|txt|yaml|safetensors|tar)")
PRELUDE = """
tokenize digits --out data/digits
classifier --data data/digits --out runs/demo/classifier
fit --config experiments/demo_raster.yaml
fit --config experiments/demo_flashar.yaml
"""
ENDLESS = {
    "serve": "runs until it is stopped",
    "demo": "is `make demo`",
    "doctor": "takes minutes",
    "benchmark": "takes minutes, or a GPU",
    "sweep": "trains for an hour",
}


def run(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and output of `flashar WORDS` in a folder."""
    extra = SHORT if words[0] == "fit" and any("/demo_" in word for word in words) else []
    command = [sys.executable, "-m", "flashar_pl.cli", *words, *extra]
    if words[0] == "python":
        command = [sys.executable, *words[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, timeout=SECONDS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def settings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in a configuration."""
    if isinstance(value, dict):
        for name, held in value.items():
            yield from settings(held, str(name))
    elif isinstance(value, list):
        for held in value:
            yield from settings(held, key)
    elif isinstance(value, str):
        yield key, value


def read_paths(words: list[str], folder: Path) -> Iterator[str]:
    """What a command reads, as far as its words and its YAML say; `plan` opens nothing that a YAML names."""
    overridden = {word.rpartition(".")[2] for word in words if word.startswith("--")}
    for before, word in zip(["", *words], words):
        if before in OUTPUTS or word.startswith("-"):
            continue
        path = word.rpartition(":")[2] if re.fullmatch(r"[a-z0-9]+:.+", word) else word
        if FILES.fullmatch(path) or (before in INPUTS and path != "random"):
            yield path
        if before == "--config" and words[0] != "plan" and (folder / word).is_file():
            for key, text in settings(yaml.safe_load((folder / word).read_text(encoding="utf-8"))):
                if key not in OUTPUTS | overridden and FILES.fullmatch(text):
                    yield text


def why_not(words: list[str], folder: Path) -> str:
    """Why a command cannot run in a folder; "" = it can."""
    if words[0] == "python":
        return ""
    if words[0] in ENDLESS and "--dry-run" not in words:
        return ENDLESS[words[0]]
    if any("..." in word or re.fullmatch(r"[A-Z]{4,}", word) for word in words):
        return "has a placeholder"
    missing = [path for path in read_paths(words, folder) if not (folder / path).exists()]
    return f"reads {missing[0]}" if missing else ""


def lines(page: Path) -> Iterator[list[str]]:
    """The commands of a page in order: `flashar`'s, and Python scripts of the checkout."""
    text = re.sub(r"^( {2,})python (tests/)", r"\1flashar python \2", page.read_text(encoding="utf-8"), flags=re.M)
    yield from commands(text)


def check_page(page: Path, folder: Path) -> list[str]:
    """Run or parse every command of a page; those that failed."""
    failed = []
    for words in lines(page):
        typed = shlex.join(words)
        shown = typed if words[0] == "python" else f"flashar {typed}"
        reason = why_not(words, folder)
        try:
            if reason:
                parse_words(words)
                print(f"  parsed  {shown[:100]}  ({reason})", flush=True)
                continue
            code, output = run(words, folder)
        except (ValueError, SystemExit, subprocess.TimeoutExpired) as error:
            code, output = 1, f"{type(error).__name__}: {error}"
        needs = re.search(r"pip install \S+", output)
        if code == 2 and needs:
            print(f"  parsed  {shown[:100]}  (needs {needs[0]})", flush=True)
        elif code:
            failed.append(f"{page.name}: {shown}\n{output[-1500:]}")
            print(f"  FAILED  {shown}", flush=True)
        else:
            print(f"  ran     {shown[:100]}", flush=True)
    return failed


def main(names: list[str]) -> int:
    """Check the pages whose names are given, or all."""
    failed = []
    with tempfile.TemporaryDirectory() as place:
        start = Path(place) / "start"
        start.mkdir()
        for name in ("experiments", "tests", "benchmarks"):
            (start / name).symlink_to(ROOT / name)
        for line in PRELUDE.strip().splitlines():
            print(f"$ flashar {line}", flush=True)
            code, output = run(line.split(), start)
            if code:
                raise SystemExit(output)
        for page in PAGES:
            if (names and page.name not in names) or not any(lines(page)):
                continue
            print(page.relative_to(ROOT), flush=True)
            folder = Path(place) / page.stem
            shutil.copytree(start, folder, symlinks=True)
            failed += check_page(page, folder)
    print("\n".join(failed) if failed else "no command failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
