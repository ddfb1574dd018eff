"""`flashar serve`: images over HTTP, with a page to try them, from one loaded checkpoint."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from flashar_pl.options import EngineOptions, ModelOptions, SamplingSettings, ShapeOptions, TextOptions


@dataclass(frozen=True)
class ServerOptions:
    """Server"""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    allowed_hosts: str = "localhost,127.0.0.1,[::1]"
    """Names that clients may know the server by, besides --host, separated by commas; * allows all."""
    most_waiting: int = 32
    """Requests that wait or are drawn; more are answered 429, try again later."""


def serve(
    model: ModelOptions,
    server: ServerOptions = ServerOptions(),
    shape: ShapeOptions = ShapeOptions(),
    sampling: SamplingSettings = SamplingSettings(),
    engine: EngineOptions = EngineOptions(),
    text: TextOptions = TextOptions(),
) -> None:
    """Draw images on request, over HTTP, until Ctrl-C.

    Open http://127.0.0.1:8000 for a page that shows images grow in both decoding orders. Programs POST to
    /v1/images/generations the JSON of OpenAI's images API: "prompt" and "n", or "class" for a class-conditional model;
    also "seed", "plan", "negative_prompt" and the names of the sampling options below, which hold where a request says
    nothing. The answer has PNG images in base64 and the seconds they took; with "stream", server-sent events show
    "partial_images" of them first. /health says what is served, /metrics counts for Prometheus. There is no
    authentication: keep the host local, or put a proxy in front.

    Example:
        flashar serve --checkpoint runs/demo/flashar/checkpoints/last.ckpt --cfg-scale 1.5
        curl -d '{"class": 3, "n": 2, "seed": 1}' http://127.0.0.1:8000/v1/images/generations
    """
    try:
        import uvicorn
    ...
