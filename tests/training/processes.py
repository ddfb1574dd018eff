"""Scripts as several ranks of one job, for the tests of distributed training."""

import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from pair import clean_environment

RECIPE = Path(__file__).parents[2] / "experiments" / "emu35_tiny.yaml"


def flashar(folder: Path, *words: object) -> str:
    """Run the command in `folder`; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "flashar_pl.cli", *map(str, words)], cwd=folder, timeout=150,
        env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


def launch(script: Path, *words: object, devices: int) -> None:
    """Run a script on `devices` ranks that start together, as under a cluster's launcher. Lightning's own starts the
    other ranks only when the first one has imported everything, which takes as long as the tests' training.
    """
    job = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_port(),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(devices),
    }
    with ExitStack() as stack:
        started = []
        for rank in range(devices):
            environment = clean_environment() | job | {"LOCAL_RANK": str(rank)}
            said = stack.enter_context(tempfile.TemporaryFile())  # a full pipe would stop the rank nobody reads from
            command = [sys.executable, str(script), *map(str, words)]
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append((process, said))
        for process, said in started:
            code = process.wait(timeout=300)
            said.seek(0)
            assert code == 0, said.read().decode()[-4000:]
