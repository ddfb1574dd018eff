"""`flashar serve`: what it draws is what `generate` draws, whoever else asks at the time."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emu_files
import numpy as np
import pytest
import torch
from PIL import Image

from flashar_pl.backbones import ClassIds, Condition
from flashar_pl.checkpoints.opening import Source, open_checkpoint
from flashar_pl.commands.serve import listen
from flashar_pl.commands.serve_requests import Service
from flashar_pl.commands.serve_worker import Request, Worker
from flashar_pl.decoding import Engine, generate
from flashar_pl.options import DeviceOptions, ModelOptions
from flashar_pl.sampling import SamplingSettings
from flashar_pl.tokenizers import Emu35Text


@pytest.fixture
def source(flashar_model: str) -> Source:
    return open_checkpoint(ModelOptions(flashar_model), DeviceOptions("cpu"))


@pytest.fixture
def service(source: Source) -> Service:
    return Service(source, (8, 8), "diagonal", SamplingSettings(cfg_scale=1.5), 4, None)


class Watched(Engine):
    """Notes its batches; the first waits until it is let go."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sizes: list[int] = []
        self.started, self.go = threading.Event(), threading.Event()

    def generate(self, condition: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        self.sizes.append(len(condition))
        self.started.set()
        assert self.go.wait(30)
        return super().generate(condition, *arguments, **options)


@pytest.fixture
def engine(source: Source) -> Watched:
    return Watched(source.model, "eager")


@pytest.fixture
def worker(source: Source, engine: Watched) -> Iterator[Worker]:
    with Worker(engine, source.matching_tokenizer("cpu"), (8, 8), 4) as worker:
        yield worker
        engine.go.set()


def test_requests_that_wait_share_batches_and_get_what_they_would_alone(
    service: Service, worker: Worker, engine: Watched
) -> None:
    """Guards an image that depends on who else asked, and a request that is never answered."""
    bodies: list[dict[str, Any]] = [
        {"class": 1, "seed": 5},
        {"class": 2, "seed": 7, "n": 2}, {"class": 3, "seed": 1, "plan": "raster"}, {"class": 3, "seed": 2},
        {"class": 4, "seed": 3, "n": 2}, {"class": 5, "seed": 4, "cfg_scale": 1}, {"class": 6, "seed": 4},
    ]  # fmt: skip
    requests = [service.request(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        drawn = [pool.submit(worker.draw, requests[0])]
        assert engine.started.wait(30)
        for request in requests[1:]:
            drawn.append(pool.submit(worker.draw, request))
            while worker._waiting.qsize() < len(drawn) - 1:
                pass
        engine.go.set()
        found = [future.result(30) for future in drawn]
    assert engine.sizes == [1, 4, 1, 2, 1], "2 + 1 + 1; raster; 2; without guidance"
    assert [each.batch for each in found] == [1, 4, 1, 4, 2, 1, 4]
    for request, each in zip(requests, found, strict=True):
        alone = generate(
            worker.engine.model, request.condition, (8, 8), request.plan, request.sampling.cfg_scale,
            seeds=request.seeds,
        )  # fmt: skip
        assert torch.equal(each.images, worker.tokenizer.decode(alone))


def test_a_failure_reaches_its_own_requests_only(
    service: Service, worker: Worker, engine: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.go.set()
    wrong = Request(ClassIds(torch.tensor([99])), None, "diagonal", SamplingSettings(), [0])
    with pytest.raises(ValueError, match="class ids range from 99"):
        worker.draw(wrong)
    assert worker.draw(service.request({"class": 1})).images.shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="5 images are wanted at once; expected at most 4"):
        worker.draw(Request(ClassIds(torch.zeros(5, dtype=torch.int64)), None, "diagonal", SamplingSettings(), [0] * 5))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_the_program_leaves_nobody_waiting(
    service: Service, worker: Worker, engine: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that draws ended, and every request after it hung."""
    monkeypatch.setattr(worker.tokenizer, "decode", lambda codes: {"a": 1}["b"])
    with ThreadPoolExecutor(2) as pool:
        drawn = [pool.submit(worker.draw, service.request({"class": 1}))]
        assert engine.started.wait(30)
        drawn.append(pool.submit(worker.draw, service.request({"class": 2})))
        while worker._waiting.empty():
            pass
        engine.go.set()
        for future in drawn:
            with pytest.raises(ValueError, match="has printed an error"):
                future.result(30)
    assert worker.closed
    with pytest.raises(ValueError, match="has printed an error"):
        worker.draw(service.request({"class": 3}))


def test_closing_refuses_what_waits(service: Service, worker: Worker, engine: Watched) -> None:
    """A caller that waited for ever would keep the process from ending."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(worker.draw, service.request({"class": 1}))
        assert engine.started.wait(30)
        second = pool.submit(worker.draw, service.request({"class": 2}))
        while worker._waiting.empty():
            pass
        closing = threading.Thread(target=worker.__exit__)
        closing.start()
        while worker._waiting.qsize() < 2:
            pass
        engine.go.set()
        assert first.result(30).batch == 1
        with pytest.raises(ValueError, match="closing"):
            second.result(30)
        closing.join(30)
    with pytest.raises(ValueError, match="closing"):
        worker.draw(service.request({"class": 2}))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, 'asked by "class"'),
        ({"prompt": "a fox"}, 'asked by "class"'),
        ({"class": "3"}, "expected a whole number"),
        ({"class": True}, "expected a whole number"),
        ({"class": -1}, "at least 0"),
        ({"class": 11}, "class ids range from 11"),
        ({"class": 1, "n": 5}, "expected 1 to 4"),
        ({"class": 1, "n": True}, "expected 1 to 4"),
        ({"class": 1, "seed": -1}, "seed"),
        ({"class": 1, "plan": "spiral"}, "expected one of diagonal, raster"),
        ({"class": 1, "top_p": 2}, "top_p is 2"),
        ({"class": 1, "top_k": 18}, "top_k is 18"),
        ({"class": 1, "temperature": "hot"}, "expected a number"),
        ({"class": 1, "size": "64x64"}, 'no field "size"'),
        ({"class": 1, "response_format": "url"}, "b64_json"),
        ({"class": 10**30}, "expected a whole number"),
        ({"class": 1, "negative_prompt": "rain"}, "models that are asked by"),
        ({"class": 1, "plan": {}}, "expected one of diagonal, raster"),
        ({"class": 1, "top_k": 1.5}, "expected a whole number"),
        ({"class": 1, "cfg_interval": math.nan}, "expected a whole number or null"),
        ({"class": 1, "cfg_scale": 10**400}, "expected a number"),
        ({"class": 1, "temperature": math.inf}, "expected a number"),
        ({"class": 1, "greedy": 0.5}, "expected true or false"),
    ],
)
def test_wrong_requests_say_what_is_expected(service: Service, body: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        service.request(body)


def test_what_a_request_leaves_out(service: Service) -> None:
    """What is not said comes from the command; every seed of a request is its own."""
    request = service.request({"class": 3, "n": 3, "seed": 7, "top_k": 5, "model": "any", "user": "me"})
    assert request.seeds == [7, 8, 9]
    assert request.sampling == SamplingSettings(cfg_scale=1.5, top_k=5)
    assert request.plan == "diagonal"
    free = [service.request({"class": 3}).seeds[0] for _ in range(2)]
    assert free[0] != free[1]


def answer(url: str, body: Any = None) -> tuple[int, bytes]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_closing_waits_for_answers_and_not_for_clients_that_say_nothing(
    service: Service, worker: Worker, engine: Watched
) -> None:
    """Python aborts (exit code -6) where a thread still prints while the process ends."""
    server = listen("127.0.0.1", 0)
    server.service, server.worker = service, worker
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with ThreadPoolExecutor(3) as pool, socket.create_connection(("127.0.0.1", server.server_address[1])) as silent:
        pool.submit(server.serve_forever, 0.01)
        silent.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert silent.recv(100).startswith(b"HTTP/1.1 200")
        asked = pool.submit(answer, url + "/v1/images/generations", {"class": 1})
        assert engine.started.wait(30)
        server.shutdown()
        closing = pool.submit(server.server_close)
        with pytest.raises(TimeoutError):
            closing.result(0.1)
        engine.go.set()
        closing.result(30)
        assert asked.result(30)[0] == 200


def leave(url: str) -> None:
    """Ask for an image, and be gone before it is there."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        body = b'{"class": 3, "n": 8, "plan": "raster"}'
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed


def test_a_real_server(flashar_model: str, source: Source) -> None:
    """Over a socket, in a process of its own, until Ctrl-C."""
    words = ["serve", "--checkpoint", flashar_model, "--port", "0", "--cfg-scale", "1.5", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flashar_pl.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = [process.stdout.readline(), process.stdout.readline()]
        where = re.search(r"http://\S+", said[1])
        assert where is not None, said
        url = where[0]
        status, page = answer(url + "/")
        assert (status, page[:15]) == (200, b"<!doctype html>")
        assert answer(url + "/health") == (200, b'{"status": "ok"}')
        facts = json.loads(answer(url + "/info")[1])
        assert facts["plans"] == {"diagonal": 15, "raster": 64}
        assert facts["defaults"]["cfg_scale"] == 1.5

        status, content = answer(url + "/v1/images/generations", {"class": 3, "n": 2, "seed": 1})
        assert status == 200
        found = json.loads(content)
        pictures = [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) for item in found["data"]]
        codes = generate(source.model, torch.tensor([3, 3]), (8, 8), "diagonal", 1.5, seeds=1)
        wanted = source.matching_tokenizer("cpu").decode(codes).permute(0, 2, 3, 1).numpy()
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(pictures, wanted, strict=True))
        assert [item["seed"] for item in found["data"]] == [1, 2]
        assert found["batch"] == 2
        assert found["seconds"] > 0

        for path, body, code, message in (
            ("/v1/images/generations", {"class": 77}, 400, "class ids range from 77"),
            ("/v1/images/generations", b"[1", 400, "Expecting"),
            ("/v1/images/generations", b"[1]", 400, "no JSON object"),
            ("/v1/images/generations", b" " * 70000, 400, "Content-Length"),
            ("/v1/other", {}, 404, "expected /v1/images/generations"),
            ("/other", None, 404, "expected /, /info"),
        ):
            status, content = answer(url + path, body)
            assert (status, message in json.loads(content)["error"]["message"]) == (code, True), content
        with pytest.raises(urllib.error.HTTPError, match="400"):  # int() refuses so many digits in its own way
            urllib.request.urlopen(urllib.request.Request(url + "/", b"", {"Content-Length": "9" * 5000}), timeout=60)
        leave(url)
        assert answer(url + "/v1/images/generations", {"class": 1})[0] == 200, "drawn after those that nobody reads"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr is not None
        said = process.stderr.read().splitlines()
        assert "closing" in said
        assert not any("Traceback" in line for line in said), "a client that goes away is no error of the server"
    finally:
        process.kill()


def test_wrong_options(flashar_model: str, refused: Any) -> None:
    """A taken port is found before the checkpoint is read."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "give another --port" in refused("serve", "--checkpoint", "nowhere", "--port", port)
    assert "batch_size is 0" in refused("serve", "--checkpoint", flashar_model, "--batch-size", 0)
    assert "no checkpoint nowhere" in refused("serve", "--checkpoint", "nowhere", "--port", 0)


def test_prompts(tmp_path: Path) -> None:
    """Prompts of several lengths share a batch, each with its own negative prompt; the vocabulary is read once."""
    pytest.importorskip("tiktoken")
    folder = str(emu_files.write_base(tmp_path / "base"))
    source = open_checkpoint(
        folder, branch_layer=1, grid="4x4", tokenizer=str(emu_files.write_ibq(tmp_path / "ibq")), dtype="fp32"
    )
    service = Service(source, (4, 4), "diagonal", SamplingSettings(cfg_scale=2.0), 4, None)
    requests = [
        service.request({"prompt": "a red square", "seed": 1}),
        service.request({"prompt": "blue", "seed": 2, "negative_prompt": "red"}),
    ]
    assert requests[0].joins(requests[1])
    assert not torch.equal(requests[0].unconditional[0], requests[1].unconditional[0])  # type: ignore[index]
    condition = Condition.cat([request.condition for request in requests])
    unconditional = Condition.cat([request.unconditional for request in requests])  # type: ignore[misc]
    together = generate(source.model, condition, (4, 4), "diagonal", 2.0, seeds=[1, 2], unconditional=unconditional)
    with Worker(Engine(source.model, "eager"), source.matching_tokenizer("cpu"), (4, 4), 4) as worker:
        for i, request in enumerate(requests):
            assert torch.equal(worker.draw(request).images, worker.tokenizer.decode(together[i : i + 1]))
    assert Emu35Text.from_directory(folder) is Emu35Text.from_directory(folder)
    for wrong in ({"prompt": 3}, {"prompt": "é" * 2049}, {"prompt": "red", "negative_prompt": ["blue"]}):
        with pytest.raises(ValueError, match="expected text of at most 4096 bytes"):
            service.request(wrong)
