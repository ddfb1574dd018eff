"""`flashar serve`: images over HTTP, with a page to try them, from one loaded checkpoint.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import TYPE_CHECKING, Any

from flashar_pl.checkpoints.opening import check_plan, check_top_k, open_checkpoint
from flashar_pl.commands.serve_requests import Service
from flashar_pl.commands.serve_worker import Worker
from flashar_pl.decoding.build import build_engine
from flashar_pl.decoding.prompts import choose_grid
from flashar_pl.options import Dtype, EngineOptions, ModelOptions, Plan, Runner, ShapeOptions, WeightFormat, Weights
from flashar_pl.planner.room import fitting_batch

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 2**16
"""Of a request's body."""


def serve(
    *,
    checkpoint: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 8,
    plan: Plan | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    aspect_ratio: str | None = None,
    image_size: int | None = None,
    runner: Runner = "auto",
    weight_format: WeightFormat = "auto",
    weights: Weights = "auto",
    branch_layer: int | None = None,
    n_head: int | None = None,
    grid: str | None = None,
    assets: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
) -> None:
    """Draw images on request, over HTTP, until Ctrl-C.

    Open http://127.0.0.1:8000 for a page that draws with both decoding orders and shows their times. Programs POST to
    /v1/images/generations the JSON of OpenAI's images API, "prompt" (of at most 4096 bytes) and "n", or "class" for a
    class-conditional model; "seed", "plan", "negative_prompt" and the sampling options below may be given too. The
    answer holds PNG images in base64 and the time they took. Requests that wait while others are drawn share a batch if
    their settings agree. There is no authentication: keep the host local, or put a proxy in front.

    Example:
        flashar serve --checkpoint runs/demo/flashar/checkpoints/last.ckpt --cfg-scale 1.5
        curl -d '{"class": 3, "n": 2, "seed": 1}' http://127.0.0.1:8000/v1/images/generations

    Args:
        checkpoint: a checkpoint of any kind that `flashar generate` reads.
        host: address to listen on; 0.0.0.0 is every network of this machine.
        port: port to listen on; 0 takes a free one.
        batch_size: most images drawn together, and most of one request.
        plan: decoding order where a request does not say it. Default: the checkpoint's own.
        cfg_scale: classifier-free guidance where a request does not say it; 1 is off.
        cfg_interval: guide only steps with at most this number + 1 cells decoded before them, likewise.
        temperature: divides the logits, likewise.
        top_k: keep the k most likely codes, likewise; 0 is off.
        top_p: keep the most likely codes up to this probability, likewise; 1 is off.
        aspect_ratio: shape of all images, as in `flashar generate`.
        image_size: side in pixels of the square with their area, as in `flashar generate`.
        runner: eager, compiled, graphs or compiled-graphs; auto is graphs on a GPU, eager on a CPU.
        weight_format: plain, packed, int8 or fp8; auto as in `flashar generate`.
        weights: which weights of a Lightning checkpoint: averaged ones where present (auto), raw, or ema.
        branch_layer: turns a raster checkpoint into an untrained FlashAR that branches at this layer.
        n_head: attention heads, for official files of unpublished sizes.
        grid: code grid HEIGHTxWIDTH, where the checkpoint does not say it or another one is wanted.
        assets: directory with emu3.tiktoken, for prompts of Emu3.5. Default: the checkpoint's own.
        tokenizer: what decodes the codes, where the checkpoint does not say it.
        device: auto, cpu, cuda or cuda:N.
        dtype: of weights and activations. Default: fp32, for official Emu3.5 directories that of the files.
    """
    from flashar_pl.sampling import SamplingSettings

    settings = SamplingSettings(cfg_scale, cfg_interval, temperature, top_k, top_p)
    if grid is not None and (aspect_ratio, image_size) != (None, None):
        raise ValueError("--grid is given with --aspect-ratio or --image-size; give one of them.")
    if batch_size < 1 or not 0 <= port < 2**16:
        raise ValueError(f"batch_size is {batch_size}, port {port}; expected 1 or more, and 0 to 65535.")
    with listen(host, port) as server:
        engine_options = EngineOptions(device, dtype, runner=runner, weight_format=weight_format)
        source = open_checkpoint(
            ModelOptions(checkpoint, weights, n_head, tokenizer, branch_layer=branch_layer, grid=grid), engine_options
        )
        shape = choose_grid(source, ShapeOptions(aspect_ratio, image_size))
        check_top_k(source.model, top_k)
        service = Service(source, shape, check_plan(source.model, plan, shape), settings, batch_size, assets)
        decoder = source.matching_tokenizer(device)
        engine = build_engine(source, engine_options, service.plan)
        fullest, guided = service.ask(service.example(), batch_size, guided=True), replace(settings, cfg_scale=2.0)
        fitting_batch(source, fullest, shape, service.plan, guided, batch_size, engine.prefix_bucket)
        size = " x ".join(str(side * decoder.downsample) for side in shape)
        print(f"{checkpoint} ({source.kind}): images of {size} pixels, {engine.runner} on {engine.device}", flush=True)
        with Worker(engine, decoder, shape, batch_size) as worker:
            server.service, server.worker = service, worker
            for _ in range(2):  # the first one compiles, records graphs or fills caches
                took = worker.draw(service.request({**service.example(), "seed": 0})).seconds
            where = f"http://{host}:{server.server_address[1]}"
            print(f"ready: {1e3 * took:.0f} ms an image ({service.plan} plan). {where} (Ctrl-C ends)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("closing", file=sys.stderr)


class Server(ThreadingHTTPServer):
    """One thread for each connection; all of them share the worker.

    Closing waits for what is being answered: Python aborts if a thread prints while the process ends.
    """

    service: Service
    worker: Worker
    request_queue_size = 128
    daemon_threads = False

    def __init__(self, *arguments: Any) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        """The end of a connection."""
        self._connections.discard(request)
        super().close_request(request)

    def server_close(self) -> None:
        """Take no more requests, from connections that wait for their next one either; wait for those in progress."""
        for connection in list(self._connections):
            with suppress(OSError):  # it was closed meanwhile
                connection.shutdown(socket.SHUT_RD)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error in progress, unless it says that the client went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def listen(host: str, port: int) -> Server:
    """A server that holds the port; connections wait until it serves. Raises ValueError where the port is not free."""
    try:
        return Server((host, port), Handler)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port or --host.") from error


class Handler(BaseHTTPRequestHandler):
    """GET / (the page), /info and /health; POST /v1/images/generations."""

    server_version = "flashar"
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        """The page, or facts as JSON."""
        if self.path == "/":
            page = resources.files("flashar_pl.commands").joinpath("serve_page.html").read_bytes()
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
        elif self.path == "/info":
            self._json(HTTPStatus.OK, self.server.service.facts())
        elif self.path == "/health":
            closed = self.server.worker.closed
            status = HTTPStatus.SERVICE_UNAVAILABLE if closed else HTTPStatus.OK
            self._json(status, {"status": "closed" if closed else "ok"})
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"no page {self.path}; expected /, /info or /health.")

    def do_POST(self) -> None:
        """Draw images."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > len(str(MOST_BYTES)) or int(length) > MOST_BYTES:
            self.close_connection = True  # the body is not read
            self._refuse(HTTPStatus.BAD_REQUEST, f"Content-Length is {length[:20]!r}; expected at most {MOST_BYTES}.")
            return
        content = self.rfile.read(int(length))
        if self.path != "/v1/images/generations":
            self._refuse(HTTPStatus.NOT_FOUND, f"no service {self.path}; expected /v1/images/generations.")
            return
        try:
            body = json.loads(content)
            if not isinstance(body, dict):
                raise ValueError("the body is no JSON object.")
            request = self.server.service.request(body)
        except (ValueError, RecursionError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        try:
            drawn = self.server.worker.draw(request)
        except (ValueError, RuntimeError) as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
            return
        data = [{"b64_json": png(image), "seed": s} for image, s in zip(drawn.images, request.seeds, strict=True)]
        answer = {"created": int(time.time()), "data": data, "plan": request.plan, **asdict(request.sampling)}
        self._json(HTTPStatus.OK, {**answer, "seconds": drawn.seconds, "batch": drawn.batch})

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        self._json(status, {"error": {"message": message, "type": kind}})

    def _json(self, status: HTTPStatus, values: dict[str, Any]) -> None:
        self._send(status, json.dumps(values).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def png(image: Tensor) -> str:
    """An image (3, h, w) uint8 as PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
