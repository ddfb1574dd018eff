"""What a server may be asked, what its one thread draws, and how it answers: OpenAI's images API and a page."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from flashar_pl.checkpoints.opening import Source, check_plan, check_top_k
from flashar_pl.decoding import Engine
from flashar_pl.decoding.loop import Progress
from flashar_pl.decoding.prompts import TextSettings, Wanted, ask, is_emu
from flashar_pl.decoding.samples import decode_partial
from flashar_pl.pictures import png_bytes
from flashar_pl.sampling import SamplingSettings
from flashar_pl.tokenizers import Tokenizer

MOST_BYTES, LARGEST = 2**14, 2**63
"""Of a request; and of a number in it, which JSON allows any length."""
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
FIELDS: dict[str, type] = {
    "prompt": str, "class": int, "negative_prompt": str, "n": int, "seed": int, "plan": str, "cfg_scale": float,
    "cfg_interval": int, "temperature": float, "top_k": int, "top_p": float, "greedy": bool, "stream": bool,
    "partial_images": int, "model": str, "user": str,
}  # fmt: skip
"""Of a request. Clients of OpenAI's API send the last two; nothing depends on them."""


@dataclass
class Job:
    """The samples of one request."""

    wanted: Wanted
    plan: str
    sampling: SamplingSettings
    seeds: list[int]
    partial_images: int
    left: bool = False
    """The client is gone: nothing more is drawn."""


class _Left(Exception):
    """Ends the decoding."""


@dataclass
class Service:
    """A checkpoint, what holds where a request does not say it, and the thread that draws."""

    source: Source
    engine: Engine
    tokenizer: Tokenizer
    grid: tuple[int, int]
    plan: str
    sampling: SamplingSettings
    text: TextSettings
    most_images: int
    most_jobs: int
    jobs: int = 0
    """Waiting, or drawn now."""
    counts: Counter[str] = field(default_factory=Counter)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "flashar-drawing"))

    def facts(self) -> dict[str, Any]:
        """For the page and for clients."""
        model, by_class = self.source.model, not is_emu(self.source)
        plans = ("diagonal", "raster") if model.dual_head.vertical is not None else ("raster",)
        return {
            "checkpoint": self.source.path, "grid": self.grid, "asked_by": "class" if by_class else "prompt",
            "classes": model.backbone.config_dict()["num_classes"] if by_class else None, "jobs": self.jobs,
            "plans": {name: model.make_plan(name, *self.grid).n_steps for name in plans},
            "defaults": {"plan": self.plan, **asdict(self.sampling)}, "most_images": self.most_images,
        }  # fmt: skip

    def job(self, body: Any) -> Job:
        """What the JSON of a request asks for. Raises ValueError where it is wrong."""
        given, by, most = checked(body), self.facts()["asked_by"], self.most_images
        n, seed, parts = given.get("n", 1), given.get("seed", random.randrange(2**31)), given.get("partial_images", 8)
        if not (1 <= n <= most and seed >= 0 and 0 <= parts <= 64):
            raise ValueError(f"n is {n}, seed {seed}, partial_images {parts}; expected 1 to {most}, 0 up, 0 to 64.")
        if given.keys() & {"class", "prompt"} != {by}:
            raise ValueError(f'this model is asked by "{by}"; got {json.dumps(body)[:200]}.')
        plan = check_plan(self.source.model, given.get("plan", self.plan), self.grid)
        sampling = replace(self.sampling, **{key: given[key] for key in asdict(self.sampling) if key in given})
        check_top_k(self.source.model, sampling.top_k)
        what: dict[str, Any] = {"classes" if by == "class" else "prompts": [given[by]]}
        text = replace(self.text, negative_prompt=given.get("negative_prompt"))
        wanted = ask(self.source, self.grid, n, sampling.guided, text=text, **what)
        return Job(wanted, plan, sampling, [seed + i for i in range(n)], parts if given.get("stream") else 0)

    def draw(self, job: Job, show: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
        """Images in base64, the step, and the seconds that the codes took; `show` is called with partial images. None
        where the client left."""
        began = time.perf_counter()

        def news(codes: Tensor, step: int, steps: int) -> dict[str, Any]:
            nonlocal began
            codes, seconds = codes.cpu(), time.perf_counter() - began  # the first waits for the device
            images = decode_partial(self.tokenizer, codes.to(self.engine.device)).cpu()
            data = [base64.b64encode(png_bytes(image)).decode() for image in images]
            began = time.perf_counter() - seconds
            return {"data": data, "step": step, "steps": steps, "seconds": seconds}

        def on_step(progress: Progress) -> None:
            step, steps, parts = progress.steps, progress.plan.n_steps, job.partial_images + 1
            if job.left:
                raise _Left
            if step < steps and step * parts // steps > (step - 1) * parts // steps:
                show(news(progress.codes(), step, steps))

        settings = {**asdict(job.sampling), "seeds": job.seeds, "unconditional": job.wanted.unconditional}
        try:
            codes = self.engine.generate(job.wanted.condition, self.grid, job.plan, on_step=on_step, **settings)
        except _Left:
            return None
        steps = self.facts()["plans"][job.plan]
        return news(codes, steps, steps)


def checked(body: Any) -> dict[str, Any]:
    """The fields of a request, without null. Raises ValueError where one does not exist or has another type."""
    if not isinstance(body, dict) or not body.keys() <= FIELDS.keys():
        unknown = next((key for key in body if key not in FIELDS), "") if isinstance(body, dict) else ""
        raise ValueError(f'no field "{unknown}"; expected a JSON object with some of {", ".join(FIELDS)}.')
    given = {key: value for key, value in body.items() if value is not None}
    for key, value in given.items():
        fine = type(value) is FIELDS[key] or (type(value) is int and FIELDS[key] is float)
        if not fine or (type(value) in (int, float) and not abs(value) < LARGEST):  # so written, NaN is refused too
            raise ValueError(f'"{key}" is {str(value)[:60]!r}; expected {KINDS[FIELDS[key]]}.')
    return given


async def follow(service: Service, request: Request, job: Job) -> AsyncIterator[dict[str, Any]]:
    """What the drawing thread tells of a job, until its images are complete or the client leaves."""
    loop, told = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
    tell = partial(loop.call_soon_threadsafe, told.put_nowait)
    drawn = loop.run_in_executor(service.thread, service.draw, job, tell)
    service.jobs += 1

    def end(_: object) -> None:
        error = drawn.exception()
        how = "failed" if error else "drawn" if drawn.result() else "cancelled"
        service.counts.update({how: 1, "images": len(job.seeds) * (how == "drawn")})
        service.jobs -= 1
        logging.getLogger("uvicorn.error").log(logging.ERROR if error else 0, ...)
        told.put_nowait({"error": {"message": str(error), "type": "server_error"}} if error else drawn.result())
        told.put_nowait(None)

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        told.put_nowait(None)

    drawn.add_done_callback(end)
    watcher = asyncio.create_task(leave())
    try:
        while (news := await told.get()) is not None:
            yield news
    finally:
        job.left = True
        watcher.cancel()


async def events(service: Service, request: Request, job: Job) -> AsyncIterator[str]:
    """Server-sent events, one for each image: image_generation.partial_image and .completed; or error."""
    async for news in follow(service, request, job):
        kind = "completed" if news.get("step") == news.get("steps") else "partial_image"
        for i, image in enumerate(news.pop("data", ())):
            event = {"type": f"image_generation.{kind}", "index": i, "seed": job.seeds[i], "b64_json": image, **news}
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        if "error" in news:
            yield f"event: error\ndata: {json.dumps(news)}\n\n"


async def generations(service: Service, request: Request) -> Response:
    """Draw images: JSON when they are complete, or events while they grow."""
    content = b""
    async for chunk in request.stream():
        if len(content := content + chunk) > MOST_BYTES:
            raise HTTPException(413, f"the request is longer than {MOST_BYTES} bytes.")
    job = await asyncio.to_thread(service.job, json.loads(content))
    if service.jobs >= service.most_jobs:
        service.counts["refused"] += 1
        raise HTTPException(429, f"{service.jobs} requests wait already.", {"Retry-After": str(service.jobs)})
    if job.partial_images:
        return StreamingResponse(events(service, request, job), media_type="text/event-stream")
    async for news in follow(service, request, job):
        if "error" in news:
            raise HTTPException(500, news["error"]["message"])
        data = [{"b64_json": image, "seed": seed} for image, seed in zip(news.pop("data"), job.seeds)]
        return JSONResponse({"created": int(time.time()), "data": data, **news, "plan": job.plan, **asdict(job.sampling)})
    return Response(status_code=499)  # to nobody


def build_app(service: Service, hosts: list[str]) -> Starlette:
    """The application. hosts: names in a browser's address bar; a page that rebinds another name to us is refused."""

    def page(request: Request) -> Response:
        return HTMLResponse(resources.files("flashar_pl.serving").joinpath("page.html").read_text("utf-8"))

    def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", **service.facts()})

    def metrics(request: Request) -> Response:
        lines = [f"# TYPE flashar_{name}_total counter\nflashar_{name}_total {n}\n" for name, n in service.counts.items()]
        return PlainTextResponse("".join([*lines, f"# TYPE flashar_jobs gauge\nflashar_jobs {service.jobs}\n"]))

    def refuse(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 400)
        kind = "server_error" if status == 500 else "invalid_request_error"
        message = {"message": getattr(error, "detail", str(error)), "type": kind}
        return JSONResponse({"error": message}, status, getattr(error, "headers", None))

    posts = Route("/v1/images/generations", partial(generations, service), methods=["POST"])
    return Starlette(
        routes=[Route("/", page), Route("/health", health), Route("/metrics", metrics), posts],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={HTTPException: refuse, ValueError: refuse, RecursionError: refuse},
    )
