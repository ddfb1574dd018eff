"""`flashar serve`: what it draws is what `generate` draws, in the order it is asked, and for those who still wait."""

import asyncio
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
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emu_files
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from flashar_pl.decoding import generate
from flashar_pl.options import EngineOptions, ModelOptions, SamplingSettings, ShapeOptions, TextOptions
from flashar_pl.serving.app import Service, build_app

IMAGES, JSON = "/v1/images/generations", {"Content-Type": "application/json"}


def serving(model: ModelOptions, sampling: SamplingSettings, engine: EngineOptions) -> Service:
    return Service(model, sampling, ShapeOptions(), TextOptions(), engine, most_jobs=32)


@pytest.fixture
def service(flashar_model: str) -> Iterator[Service]:
    made = serving(ModelOptions(flashar_model), SamplingSettings(cfg_scale=1.5), EngineOptions(batch_size=4))
    yield made
    made.thread.shutdown()


@pytest.fixture
def client(service: Service) -> TestClient:
    app = build_app(service, ["localhost"])
    return TestClient(app, "http://localhost", raise_server_exceptions=False, headers=JSON)


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def expected(service: Service, classes: list[int], plan: str = "diagonal", scale: float = 1.5, seed: int = 1) -> Any:
    codes = generate(service.source.model, torch.tensor(classes), (8, 8), plan, scale, seeds=seed)
    return service.tokenizer.decode(codes).permute(0, 2, 3, 1).numpy()


class Slow:
    """An engine whose steps wait until it is let go."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started, self.go, self.steps = threading.Event(), threading.Event(), 0
        real = service.engine.generate

        def generate(*arguments: Any, on_step: Any, **options: Any) -> torch.Tensor:
            def slow(progress: Any) -> None:
                self.started.set()
                self.steps += 1
                assert self.go.wait(30)
                on_step(progress)

            return real(*arguments, on_step=slow, **options)

        monkeypatch.setattr(service.engine, "generate", generate)


def test_images_are_those_of_generate(service: Service, client: TestClient) -> None:
    found = client.post(IMAGES, json={"class": 3, "n": 2, "seed": 1, "model": "any", "user": None}).json()
    assert all(np.array_equal(pixels(a["b64_json"]), b) for a, b in zip(found["data"], expected(service, [3, 3])))
    assert [item["seed"] for item in found["data"]] == [1, 2]
    assert (found["plan"], found["cfg_scale"], found["steps"]) == ("diagonal", 1.5, 15)
    assert found["seconds"] > 0
    other = client.post(IMAGES, json={"class": 3, "seed": 7, "plan": "raster", "cfg_scale": 1, "top_k": 5}).json()
    assert (other["plan"], other["cfg_scale"], other["top_k"], other["steps"]) == ("raster", 1, 5, 64)
    seeds = [client.post(IMAGES, json={"class": 3}).json()["data"][0]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(("plan", "steps"), [("diagonal", 15), ("raster", 64)])
def test_streamed_images_grow(service: Service, client: TestClient, plan: str, steps: int) -> None:
    """Guards a preview with codes that are not drawn yet, and another end than without a stream."""
    body = {"class": 3, "n": 2, "seed": 1, "plan": plan, "stream": True, "partial_images": 3}
    reply = client.post(IMAGES, json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(event.split("data: ")[1]) for event in reply.text.split("\n\n")[:-1]]
    names = re.findall(r"^event: image_generation\.(\w+)$", reply.text, re.MULTILINE)
    assert names == ["partial_image"] * 6 + ["completed"] * 2
    order = service.source.model.make_plan(plan, 8, 8).step.view(8, 8, 1).numpy()
    whole = expected(service, [3, 3], plan)
    for event in events:
        grown = np.where(order < event["step"], whole[event["index"]], 128)
        assert np.array_equal(pixels(event["b64_json"]), grown), event["step"]
    assert [event["step"] for event in events[::2]] == [steps * i // 4 + (steps * i % 4 > 0) for i in range(1, 5)]
    assert events[-1]["seed"] == 2
    assert [event["seconds"] for event in events] == sorted(event["seconds"] for event in events)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, 'asked by "class"'),
        ({"class": "3"}, "expected int"),
        ({"class": 11}, "class ids range from 11"),
        ({"class": 1, "n": 5}, "expected 1 to 4"),
        ({"class": 1, "response_format": "url"}, "b64_json"),
        ({"class": 1, "partial_images": 65}, "0 to 64"),
        ({"class": 1, "plan": "spiral"}, "plan is 'spiral'"),
        ({"class": 1, "top_k": 18}, "top_k is 18"),
        ({"class": 1, "temperature": "hot"}, "expected float"),
        ({"class": 1, "quality": "high"}, "expected an object with some of prompt"),
        ({"class": 1, "size": "64x64"}, 'expected "8x8"'),
        ({"class": 1, "output_format": "webp"}, 'expected "png"'),
        ({"class": 1, "prompt": "1"}, 'asked by "class"'),
        ({"prompt": "0-3"}, "expected one class"),
        ({"prompt": "0-99999999999"}, "expected numbers such as"),
        ({"prompt": "a dog"}, "expected numbers such as"),
        ({"prompt": "9" * 4000}, "expected numbers such as"),
        ({"prompt": "\u00b2"}, "expected numbers such as"),
        ({"class": 10**30}, "expected at most 63"),
        ({"class": 1, "n": 10**9}, "n is 1000000000"),
        ({"class": 1, "seed": 2**63}, "63 bits"),
        ({"class": 1, "size": "100000x100000"}, 'expected "8x8"'),
        (b'{"class": 1, "class": 2}', "a name stands twice"),
        ({"class": 1, "negative_prompt": "rain"}, "are for --prompt"),
        ({"class": 1, "cfg_scale": math.nan}, "expected 0 or more"),
        ({"class": 1, "cfg_scale": 1e308}, "cfg_scale is 1e+308; expected at most 1,000"),
        ({"class": 1, "temperature": 10**400}, "expected at most 1,000"),
        ([1], "expected an object"),
        (b"[" * 10000, "recursion"),
    ],
)
def test_wrong_requests_say_what_is_expected(client: TestClient, flashar_model: str, body: Any, message: str) -> None:
    reply = client.post(IMAGES, content=body if isinstance(body, bytes) else json.dumps(body))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert message in error["message"]
    assert flashar_model not in reply.text, "where the server keeps its files"
    assert error["type"] == "invalid_request_error"


def test_other_requests(client: TestClient, flashar_model: str) -> None:
    assert client.get("/").text.startswith("<!doctype html>")
    found = client.get("/health").json()
    assert (found["status"], found["plans"], found["asked_by"]) == ("ok", {"diagonal": 15, "raster": 64}, "class")
    assert client.post(IMAGES, content=b" " * 20000).status_code == 413
    models, name = client.get("/v1/models").json(), Path(flashar_model).name
    assert (models["object"], models["data"][0]["object"]) == ("list", "model")
    assert (found["checkpoint"], models["data"][0]["id"]) == (name, name), "not the whole path"
    assert client.get(IMAGES).status_code == 405
    assert client.get("/other").json()["error"]["message"] == "Not Found"


def test_a_page_of_another_name_is_refused(client: TestClient) -> None:
    """DNS rebinding: a page whose name was pointed at this machine reads what it serves."""
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
    assert client.post(IMAGES, json={"class": 1}, headers={"Host": "evil.example:8000"}).status_code == 400
    assert client.get("/health", headers={"Host": "localhost:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Origin", "http://localhost:8000")], 200),
        ([("Content-Type", "application/json; charset=utf-8")], 200),
        ([("Origin", "https://evil.example")], 403),
        ([("Origin", "null")], 403),
        ([("Origin", "http://[")], 403),
        ([("Content-Type", "text/plain")], 415),  # what a page may send anywhere, without asking
        ([("Content-Type", "application/x-www-form-urlencoded")], 415),
        ([("Host", "localhost"), ("Host", "evil.example")], 400),
        ([("Transfer-Encoding", "chunked"), ("Content-Length", "12")], 400),
    ],
)
def test_requests_of_pages_and_of_two_meanings(client: TestClient, headers: list[tuple[str, str]], status: int) -> None:
    """A page of another origin could draw, if not see it; a proxy in front could read another request than we do."""
    own = [] if headers[0][0] == "Content-Type" else list(JSON.items())
    del client.headers["Content-Type"]
    assert client.post(IMAGES, content=b'{"class": 1}', headers=own + headers).status_code == status


def test_openai_clients_draw_classes(service: Service, client: TestClient) -> None:
    """They always send a prompt: a class's id, or its name where the model knows names."""
    service.source.description.training["class_names"] = ["zero", "one", "two", "golden retriever"]
    for prompt in ("3", "golden retriever"):
        asked = {"prompt": prompt, "n": 1, "size": "8x8", "seed": 1, "response_format": "b64_json", "model": "any"}
        found = client.post(IMAGES, json=asked).json()["data"][0]
        assert np.array_equal(pixels(found["b64_json"]), expected(service, [3])[0])


def test_more_than_fit_the_queue_are_refused(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, service.most_jobs = Slow(service, monkeypatch), 2
    with ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(client.post, IMAGES, json={"class": 1, "seed": 1})]
        assert slow.started.wait(30)
        replies.append(pool.submit(client.post, IMAGES, json={"class": 2, "seed": 1}))
        while service.jobs < 2:
            time.sleep(0.001)
        refused = client.post(IMAGES, json={"class": 3})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        slow.go.set()
        for label, reply in zip((1, 2), replies):
            assert np.array_equal(pixels(reply.result(30).json()["data"][0]["b64_json"]), expected(service, [label])[0])
    assert client.post(IMAGES, json={"class": 3}).status_code == 200
    lines = client.get("/metrics").text.splitlines()
    assert {"flashar_jobs 0", "flashar_refused_total 1", "flashar_drawn_total 3", "flashar_images_total 3"} <= {*lines}
    assert client.get("/health").json()["jobs"] == 0


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyError("a mistake")])
def test_a_failure_reaches_its_own_request_only(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Guards requests that hang once the thread that draws has met an error."""
    with monkeypatch.context() as patched:

        def fail(*arguments: Any, **options: Any) -> None:
            raise error

        patched.setattr(service.engine, "generate", fail)
        reply = client.post(IMAGES, json={"class": 1})
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
        assert str(error) in reply.json()["error"]["message"]
        streamed = client.post(IMAGES, json={"class": 1, "stream": True}).text
        assert streamed.startswith("event: image_generation.error")
    assert client.post(IMAGES, json={"class": 1}).status_code == 200
    assert {"flashar_jobs 0", "flashar_failed_total 2"} <= {*client.get("/metrics").text.splitlines()}


def test_graphs_are_for_two_shapes(service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, or as many as fit; what fills a batch up is not shown."""
    real, sizes = service.engine.generate, []

    def generate(condition: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        sizes.append(len(condition))
        with monkeypatch.context() as patched:
            patched.setattr(service.engine, "runner", "eager")
            return real(condition, *arguments, **options)

    monkeypatch.setattr(service.engine, "generate", generate)
    monkeypatch.setattr(service.engine, "runner", "graphs")
    for n in (1, 2, 4):
        found = client.post(IMAGES, json={"class": 3, "n": n, "seed": 1}).json()["data"]
        assert all(np.array_equal(pixels(a["b64_json"]), b) for a, b in zip(found, expected(service, [3] * n)))
        assert len(found) == n
    assert sizes == [1, 4, 4]


def leave(port: int, body: bytes) -> None:
    """Ask for images, and be gone before they are there."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        kind = "Content-Type: application/json"
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        time.sleep(0.1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed


def test_nothing_is_drawn_for_those_who_left(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting or in the middle of an image, streamed or not."""
    slow = Slow(service, monkeypatch)
    config = uvicorn.Config(build_app(service, ["localhost"]), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        for body in (b'{"class": 1, "plan": "raster"}', b'{"class": 2, "stream": true}', b'{"class": 3}'):
            leave(port, body)
        time.sleep(0.5)  # how often it looks: 0.2 s
        slow.go.set()
        while service.jobs:
            time.sleep(0.01)
        server.should_exit = True
        thread.join(30)
    assert slow.steps == 1, "the step that was being drawn, and none after it"


def test_who_leaves_while_it_sends_is_nobodys_error(client: TestClient) -> None:
    """Forty lines in the log of the server for each of them."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"99")]
    scope = {"type": "http", "method": "POST", "path": IMAGES, "headers": headers, "query_string": b""}
    asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 499


@pytest.mark.slow
def test_a_real_server(flashar_model: str, service: Service) -> None:
    """A process of its own, until Ctrl-C."""
    words = ["serve", "--checkpoint", flashar_model, "--port", "0", "--cfg-scale", "1.5", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flashar_pl.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        where = re.search(r"http://\S+", said)
        assert where is not None, said
        asked = urllib.request.Request(where[0] + IMAGES, b'{"class": 3, "n": 2, "seed": 1}', JSON)
        found = json.loads(urllib.request.urlopen(asked, timeout=60).read())
        assert all(np.array_equal(pixels(a["b64_json"]), b) for a, b in zip(found["data"], expected(service, [3, 3])))
        with socket.create_connection(("127.0.0.1", int(where[0].split(":")[2]))) as silent:
            silent.sendall(b"GET /health HTTP/1.1\r\n")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, "closing waits for no client that says nothing"
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_wrong_options(flashar_model: str, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A taken port is found before the checkpoint is read."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "give another --port" in refused("serve", "--checkpoint", "nowhere", "--port", port)
    assert "give another --port" in refused("serve", "--checkpoint", "nowhere", "--port", 70000)
    assert "batch_size is 0" in refused("serve", "--checkpoint", flashar_model, "--batch-size", 0)
    assert "no checkpoint nowhere" in refused("serve", "--checkpoint", "nowhere", "--port", 0)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'flashar-pl[serve]'" in refused("serve", "--checkpoint", flashar_model)


def test_prompts(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    folder = str(emu_files.write_base(tmp_path / "base"))
    model = ModelOptions(folder, branch_layer=1, grid="4x4", tokenizer=str(emu_files.write_ibq(tmp_path / "ibq")))
    service = serving(model, SamplingSettings(cfg_scale=2.0), EngineOptions(dtype="fp32", batch_size=2))
    client = TestClient(build_app(service, ["localhost"]), "http://localhost")
    plain, negative = (
        client.post(IMAGES, json={"prompt": "a red square", "seed": 1, **more}).json()["data"][0]["b64_json"]
        for more in ({}, {"negative_prompt": "red"})
    )
    assert pixels(plain).shape == (64, 64, 3)
    assert plain != negative
    for wrong in ({"prompt": 3}, {"class": 3}):
        assert client.post(IMAGES, content=json.dumps(wrong), headers=JSON).status_code == 400
