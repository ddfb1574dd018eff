"""`flashar serve`: images over HTTP, with a page to try them, from one loaded checkpoint."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass

from flashar_pl.console import needing
from flashar_pl.options import EngineOptions, ModelOptions, SamplingSettings, ShapeOptions, TextOptions


@dataclass(frozen=True)
class ServerOptions:
    """Server"""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    allowed_hosts: str = "localhost,127.0.0.1,[::1]"
    """Names that clients may know this server by, besides --host, separated by commas; * is any."""
    most_requests: int = 32
    """Requests that are drawn or wait; more are refused with 429."""


def serve(
    model: ModelOptions,
    server: ServerOptions = ServerOptions(),
    sampling: SamplingSettings = SamplingSettings(),
    shape: ShapeOptions = ShapeOptions(),
    text: TextOptions = TextOptions(),
    engine: EngineOptions = EngineOptions(),
) -> None:
    """Draw images on request, over HTTP, until Ctrl-C.

    Open http://127.0.0.1:8000 for a page where images grow in both decoding orders. Programs POST the JSON of OpenAI's
    images API to /v1/images/generations: "prompt" (of a class model: an id or a name) or "class", and where they want
    "n", "seed", "plan", a sampling option, "negative_prompt". They get PNGs in base64 and the seconds that the codes
    took; with "stream" server-sent events, "partial_images" times before the end. There is no authentication: stay
    local, or put a proxy in front.

    Example:
        flashar serve --checkpoint runs/demo/flashar/checkpoints/last.ckpt --cfg-scale 1.5
        curl --json '{"class": 3, "n": 2, "seed": 1}' http://127.0.0.1:8000/v1/images/generations
    """
    with needing("serving", "serve"):
        import uvicorn

        from flashar_pl.serving.app import Service, build_app
    try:
        listener = socket.create_server((server.host, server.port), backlog=128)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {server.host}:{server.port}: {error}; give another --port.") from error
    with listener:
        service = Service(model, sampling, shape, text, engine, server.most_requests)
        service.draw(service.job({service.by: service.facts["example"]}))  # compiles, records graphs, fills caches
        print(f"ready ({service.engine.runner}): http://{server.host}:{listener.getsockname()[1]}", flush=True)
        app = build_app(service, [server.host, *server.allowed_hosts.split(",")])
        with suppress(KeyboardInterrupt):
            most = server.most_requests + 64  # connections: pages and /health beside those that wait; more are told 503
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, limit_concurrency=most)
            uvicorn.Server(config).run([listener])
        service.thread.shutdown(cancel_futures=True)
