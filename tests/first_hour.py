"""The first hour of a stranger: an installed wheel in an empty directory, own pictures, notebook, demo.

`make first-hour` calls it; `make first-hour PYTHON=python3.13` on a clean checkout tries another interpreter. It builds
the wheel, installs it with the extra `demo` in a fresh environment, makes 60 pictures of mixed sizes, modes and
orientations, and runs in a directory that holds nothing else: the commands of docs/data.md on own pictures and the
experiment of docs/notebook.md (trainings cut to 40 steps unless --full), then `flashar demo` (only with --full). Ends
with 1 at the first command that fails. --keep DIR leaves the directory there, to be looked at.

    python -m tests.first_hour [--full] [--keep DIR]
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.own_pictures import make_pictures

ROOT = Path(__file__).parents[1]
STEPS = 40
"""A training is cut to, unless --full."""


def own_pictures_commands() -> list[list[str]]:
    """All commands of docs/data.md on own pictures, in their order."""
    section = (ROOT / "docs/data.md").read_text(encoding="utf-8").split("\n## ")[1]
    found = re.findall(r"^ {4}(flashar .*)$", section.replace("\\\n", " "), re.M)
    assert section.startswith("Your own pictures"), "docs/data.md begins with another section"
    assert found, "docs/data.md has no commands on own pictures"
    return [shlex.split(line) for line in found]


def notebook_script() -> str:
    """The experiment of docs/notebook.md."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/notebook.md").read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "Trainer(" in block)


def shortened(words: list[str]) -> list[str]:
    """A training command of `STEPS` steps that validates once."""
    if words[1] != "fit":
        return words
    return [*words, "--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", str(STEPS)]


def install(folder: Path) -> Path:
    """The directory of the programs of a fresh environment that holds the wheel."""
    uv = Path(sys.executable).parent / "uv"
    wheel_of = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "dist", ROOT]
    subprocess.run(wheel_of, check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "environment"], check=True)
    programs = folder / "environment" / "bin"
    (wheel,) = (folder / "dist").glob("*.whl")
    target = ["--python", programs / "python", "--constraint", ROOT / "constraints.txt", f"{wheel}[demo]"]
    found = os.environ | {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    subprocess.run([uv, "pip", "install", "--quiet", *target], env=found, check=True)
    return programs


def main(words: list[str]) -> int:
    """Run everything; 0 = no command failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args(words)
    full = asked.full
    with tempfile.TemporaryDirectory() as place:
        programs = install(Path(place))
        home = (asked.keep or Path(place) / "home").resolve()
        make_pictures(home / "photos")
        script = notebook_script()
        commands = own_pictures_commands()
        if not full:
            script = re.sub(r"raster_steps, flashar_steps = .*", f"raster_steps = flashar_steps = {STEPS}", script)
            commands = [shortened(words) for words in commands]
        (home / "notebook.py").write_text(script, encoding="utf-8")
        commands += [["python", "notebook.py"], *([["flashar", "demo"]] if full else [])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{programs}:{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        for words in commands:
            start = time.time()
            done = subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True, check=False)
            print(
                f"{'FAILED' if done.returncode else 'ran'} {time.time() - start:6.1f} s  {shlex.join(words)}",
                flush=True,
            )
            if done.returncode:
                print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
                return 1
        made = sorted(str(path.relative_to(home)) for path in home.rglob("*.png") if "photos" not in path.parts)
        print("pictures:", *made, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
