"""A server under load: `python -m tests.reliability.load 180` starts one and lets clients ask for so many seconds.

Clients wait for one image after the other; of ten requests one is wrong, and one is left before it is answered.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashar_pl.backbones import LlamaGen
from flashar_pl.backbones.llamagen import LlamaGenConfig
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.weights import save_model
from flashar_pl.files import write_json
from flashar_pl.models import FlashAR

CLIENTS = 8
SLOWEST = 3.0
"""The 99th of a hundred answers may take so many times the median."""
GROWTH = 1.1
"""Memory after the load, over that after its first fifth."""


@dataclass
class Load:
    """What clients met."""

    seconds: list[float] = field(default_factory=list)
    """Of the answers with an image."""
    refused: int = 0
    """Wrong requests that were told so."""
    left: int = 0
    errors: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the server over time."""
    files: list[int] = field(default_factory=list)
    """Its open files over time."""

    busy: bool = field(default_factory=lambda: os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1))
    """Whether the machine did something else before; its times say nothing then."""

    def times(self) -> tuple[float, float]:
        """Seconds of the median answer, and of the 99th of a hundred."""
        return statistics.median(self.seconds), statistics.quantiles(self.seconds, n=100)[98]

    def wrong(self) -> list[str]:
        """What a good server does not do."""
        middle, slow = self.times()
        early = self.memory[len(self.memory) // 5]
        found = self.errors[:5]
        if not self.busy and slow > SLOWEST * middle:
            found.append(f"the slowest in a hundred takes {slow:.3f} s, the median {middle:.3f} s")
        if self.memory[-1] > GROWTH * early:
            found.append(f"memory grows from {early >> 20} to {self.memory[-1] >> 20} MiB")
        if self.files[-1] > self.files[0]:
            found.append(f"open files grow from {self.files[0]} to {self.files[-1]}")
        return found


def tiny_checkpoint(folder: Path) -> Path:
    """A FlashAR model of 8 x 8 grey pixels."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 8, "vocab_size": 17, "num_classes": 10}
    model = FlashAR(LlamaGen(LlamaGenConfig(**sizes)), 1)
    note = Description(model.config(), grid=(8, 8), tokenizer={"kind": "pixels", "levels": 17})
    save_model(folder / "model", model, note)
    return folder / "model"


def ask(port: int, client: int, until: float, load: Load) -> None:
    """One client's requests."""
    turn = client
    while time.monotonic() < until:
        turn += 1
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": "12" if turn % 10 == 5 else str(turn % 10), "seed": turn}
        began = time.monotonic()
        try:
            connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
            if turn % 10 == 0:
                load.left += 1
                continue
            reply = connection.getresponse()
            found = json.loads(reply.read())
            if turn % 10 == 5 and reply.status == 400:
                load.refused += 1
            elif reply.status == 200 and found["data"][0]["seed"] == turn:
                load.seconds.append(time.monotonic() - began)
            else:
                load.errors.append(f"{body}: {reply.status} {found}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            load.errors.append(f"{body}: {error!r}")
        finally:
            connection.close()


def run(seconds: float) -> Load:
    """Start a server, ask it for so long, and end it."""
    load = Load()
    with tempfile.TemporaryDirectory() as folder:
        words = ["serve", "--checkpoint", str(tiny_checkpoint(Path(folder))), "--port", "0", "--device", "cpu"]
        server = subprocess.Popen(
            [sys.executable, "-m", "flashar_pl.cli", *words], stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            assert server.stdout is not None
            where = re.search(r"http://127\.0\.0\.1:(\d+)", said := server.stdout.readline())
            assert where is not None, said
            until = time.monotonic() + seconds
            threads = [threading.Thread(target=ask, args=(int(where[1]), i, until, load)) for i in range(CLIENTS)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(seconds / 50)
                observe(server.pid, load)
            time.sleep(1)  # what was left to the last
            observe(server.pid, load)
            server.send_signal(signal.SIGINT)
            if server.wait(30) != 0:
                load.errors.append(f"the server ended with {server.returncode}")
        finally:
            server.kill()
    return load


def observe(process: int, load: Load) -> None:
    """Memory and open files of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    load.memory.append(1024 * int(status.split("VmRSS:")[1].split()[0]))
    load.files.append(len(os.listdir(f"/proc/{process}/fd")))


def main(seconds: str = "180", out: str = "benchmarks/results/load_cpu.json") -> int:
    """Print the counts and keep them; 1 where something is wrong."""
    load = run(float(seconds))
    middle, slow = load.times()
    print(
        f"{CLIENTS} clients, {seconds} s: {len(load.seconds):,} images drawn, {load.refused:,} wrong requests refused, "
        f"{load.left:,} left, {len(load.errors)} errors\n"
        f"median {1000 * middle:.0f} ms, 99 of 100 within {1000 * slow:.0f} ms; memory {load.memory[0] >> 20} to "
        f"{load.memory[-1] >> 20} MiB; open files {load.files[0]} to {load.files[-1]}"
        f"{'; the machine was busy, so times are not judged' if load.busy else ''}"
    )
    print(*load.wrong(), sep="\n")
    counts = {
        **{"seconds": float(seconds), "clients": CLIENTS, "drawn": len(load.seconds), "refused": load.refused},
        **{"left": load.left, "errors": len(load.errors)},
        **{"median_ms": round(1000 * middle), "p99_ms": round(1000 * slow)},
        **{"memory_mib": [load.memory[0] >> 20, load.memory[-1] >> 20], "open_files": [load.files[0], load.files[-1]]},
        "busy": load.busy,
    }
    write_json(out, counts)
    return min(len(load.wrong()), 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
