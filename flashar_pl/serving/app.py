"""What a server may be asked, what its one thread draws, and how it answers: OpenAI's images API and a page."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from flashar_pl.checkpoints.opening import check_plan, open_checkpoint
from flashar_pl.decoding.build import build_engine
from flashar_pl.decoding.loop import Progress
from flashar_pl.decoding.prompts import choose_grid, class_ids
from flashar_pl.decoding.request import DrawRequest
from flashar_pl.decoding.samples import SampleSet, decode_all, draw_codes
from flashar_pl.options import EngineOptions, ModelOptions, SampleOptions, SamplingSettings, ShapeOptions, TextOptions
from flashar_pl.pictures import png_bytes
from flashar_pl.planner.room import fitting_batch

MOST_BYTES = 16384
"""Longest request."""
ONCE = ("host", "origin", "content-type", "content-length", "transfer-encoding")
"""Headers that give a request two meanings where they stand twice; so do the last two together."""
FIELDS: dict[str, type] = {
    **dict.fromkeys(("prompt", "negative_prompt", "plan", "response_format", "output_format", "size"), str),
    **dict.fromkeys(("model", "user"), str),  # unused
    **dict.fromkeys(("class", "n", "seed", "cfg_interval", "top_k", "partial_images"), int),
    **dict.fromkeys(("cfg_scale", "temperature", "top_p"), float),
    **dict.fromkeys(("greedy", "stream"), bool),
}


@dataclass
class Job:
    """The samples of one request. left: the client is gone, nothing more is drawn."""

    asked: DrawRequest
    samples: SampleSet
    partial_images: int
    left: bool = False


class Service:
    """A checkpoint, what holds where a request does not say it, and the thread that draws."""

    def __init__(
        self, model: ModelOptions, sampling: SamplingSettings, shape: ShapeOptions, text: TextOptions,
        engine: EngineOptions, most_jobs: int,
    ) -> None:  # fmt: skip
        self.source, self.shape, self.text = open_checkpoint(model, engine), shape, text
        network, grid = self.source.model, choose_grid(self.source, shape)
        self.sampling = sampling.of(network.backbone.published_cfg_scale)
        self.plan = check_plan(network, engine.plan, grid)
        self.steps = {plan: network.make_plan(plan, *grid).n_steps for plan in reversed(network.plans)}
        self.tokenizer = self.source.matching_tokenizer(engine.device, engine.pixel_dtype)
        self.engine = build_engine(self.source, engine, self.plan)
        self.by = "class" if network.backbone.conditioning.kind == "class" else "prompt"
        example: Any = 0 if self.by == "class" else "a lighthouse at sunset"
        height, width = self.tokenizer.image_size(grid)
        self.only = {"response_format": "b64_json", "output_format": "png", "size": f"{width}x{height}"}
        self.most_images = engine.batch_size if isinstance(engine.batch_size, int) else 64
        fullest = self.job({self.by: example, "n": self.most_images, "cfg_scale": 2}).asked
        self.most_images = fitting_batch(self.source, fullest, engine.batch_size, self.engine.prefix_bucket)
        self.thread = ThreadPoolExecutor(1, "flashar-drawing")
        self.jobs, self.most_jobs, self.counts = 0, most_jobs, Counter[str]()  # jobs wait or are drawn
        self.facts = {
            "checkpoint": Path(model.checkpoint).name, "grid": grid, "asked_by": self.by, "example": example,
            "plans": self.steps, "defaults": {"plan": self.plan, **asdict(self.sampling)},
            "most_images": self.most_images,
        }  # fmt: skip

    def job(self, body: Any) -> Job:
        """What the JSON of a request asks for. Raises ValueError where it is wrong."""
        if not isinstance(body, dict) or not body.keys() <= FIELDS.keys():
            raise ValueError(f"got {json.dumps(body)[:200]}; expected an object with some of {', '.join(FIELDS)}.")
        given, most = {key: value for key, value in body.items() if value is not None}, self.most_images
        for key, value in given.items():
            if type(value) is not FIELDS[key] and (FIELDS[key], type(value)) != (float, int):
                raise ValueError(f'"{key}" is {str(value)[:60]!r}; expected {FIELDS[key].__name__}.')
            if key in self.only and value not in (self.only[key], "auto"):
                raise ValueError(f'"{key}" is {value[:60]!r}; expected "{self.only[key]}".')
        n, seed, parts = given.get("n", 1), given.get("seed", time.time_ns() % 2**31), given.get("partial_images", 8)
        if not (1 <= n <= most and 0 <= seed < 2**63 and 0 <= parts <= 64):
            raise ValueError(f"n is {n}, seed {seed}, partial_images {parts}; expected 1 to {most}, 63 bits, 0 to 64.")
        if self.by == "class" and "prompt" in given and "class" not in given:  # as OpenAI's clients can say it
            ids = class_ids(self.source, given.pop("prompt"))
            if len(ids) > 1:
                raise ValueError(f'"prompt" is {body["prompt"][:60]!r}; expected one class, and "n" for more images.')
            given["class"] = ids[0]
        if given.keys() & {"class", "prompt"} != {self.by}:
            raise ValueError(f'this model is asked by "{self.by}"; got {json.dumps(body)[:200]}.')
        sampling = replace(self.sampling, **{key: given[key] for key in asdict(self.sampling) if key in given})
        text = replace(self.text, negative_prompt=given.get("negative_prompt", self.text.negative_prompt))
        subject: dict[str, Any] = {"classes" if self.by == "class" else "prompt": [given[self.by]]}
        draw = SampleOptions(**subject, num_images=n, seed=seed)
        asked = DrawRequest.of(self.source, draw, sampling, self.shape, text, given.get("plan", self.plan))
        # graphs are made for shapes: two of them, so that the first requests and not all of them wait for that
        size = n if "graphs" not in self.engine.runner or n == 1 else self.most_images
        return Job(asked, asked.samples(size), parts if given.get("stream") else 0)

    def draw(self, job: Job, show: Callable[[dict[str, Any]], object] = print) -> dict[str, Any]:
        """Images in base64, and the seconds their codes took; `show` gets growing ones. Raises where it left."""
        steps, parts = self.steps[job.asked.plan], job.partial_images + 1
        shown = {-(-steps * i // parts) for i in range(1, parts)} - {steps}
        began = time.perf_counter()
        if job.left:
            raise ConnectionAbortedError

        def news(codes: Tensor, step: int) -> dict[str, Any]:
            nonlocal began
            codes = codes[: job.samples.n].cpu()  # waits for the device
            seconds = time.perf_counter() - began
            pngs = [base64.b64encode(png_bytes(image)).decode() for image in decode_all(self.tokenizer, codes)]
            data = [{"index": i, "seed": job.asked.seed + i, "b64_json": png} for i, png in enumerate(pngs)]
            began = time.perf_counter() - seconds
            return {"data": data, "step": step, "steps": steps, "seconds": seconds}

        def on_step(progress: Progress) -> None:
            if job.left:
                raise ConnectionAbortedError
            if progress.steps in shown:
                show(news(progress.codes(), progress.steps))

        return news(draw_codes(self.engine, job.samples, on_step=on_step), steps)

    def start(self, job: Job) -> asyncio.Queue[Any]:
        """Have a job drawn. The queue gets what `draw` tells, or its error, and None. HTTPException: too many wait."""
        if self.jobs >= self.most_jobs:
            self.counts["refused"] += 1
            raise HTTPException(429, f"{self.jobs} requests wait already.", {"Retry-After": str(self.jobs)})
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self.jobs += 1

        def end(drawn: asyncio.Future[dict[str, Any]]) -> None:
            self.jobs -= 1
            error = drawn.exception()
            how = "cancelled" if isinstance(error, ConnectionAbortedError) else "failed" if error else "drawn"
            self.counts.update({how: 1, "images": 0 if error else job.samples.n})
            told.put_nowait({"error": {"message": str(error), "type": "server_error"}} if error else drawn.result())
            told.put_nowait(None)

        show = lambda news: loop.call_soon_threadsafe(told.put_nowait, news)  # noqa: E731
        loop.run_in_executor(self.thread, self.draw, job, show).add_done_callback(end)
        return told


async def follow(request: Request, job: Job, told: asyncio.Queue[Any]) -> AsyncIterator[dict[str, Any]]:
    """What a job's queue gets, until the client leaves."""
    try:
        while not await request.is_disconnected():
            with suppress(TimeoutError):
                if (news := await asyncio.wait_for(told.get(), 0.2)) is None:
                    return
                yield news
    finally:
        job.left = True


async def events(told: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events of each image: image_generation.partial_image and image_generation.completed; or error."""
    async for news in told:
        kind = "error" if "error" in news else "completed" if news["step"] == news["steps"] else "partial_image"
        for image in news.pop("data", [{}]):
            event = {"type": f"image_generation.{kind}", **image, **news}
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError where a name stands twice."""
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in an object; expected each once.")
    return values


def border(app: ASGIApp, hosts: Iterable[str]) -> ASGIApp:
    """Pass requests on that have one meaning and know the server by a name of `hosts`, "*" for any: no page of another
    name, nor one whose name was pointed at this machine. A page can send JSON only with the server's leave."""
    names = {host.strip(" []").lower() for host in hosts}

    async def pass_on(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if any(len(headers.getlist(name)) > 1 for name in ONCE) or {*ONCE[-2:]} <= {*headers}:
            raise HTTPException(400, f"expected each of {', '.join(ONCE)} at most once, and one of the last two.")
        for name, status in (("host", 400), ("origin", 403)):
            host = re.sub(r"^\w+://|:\d*$", "", headers.get(name, "")).strip("[]").lower()
            if "*" not in names and name in {"host", *headers} and host not in names:
                raise HTTPException(status, f"{name} is {headers.get(name, '')[:80]!r}; name it in --allowed-hosts.")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope.get("method") == "POST" and kind != "application/json":
            raise HTTPException(415, f"content-type is {kind[:80]!r}; expected application/json.")
        await app(scope, receive, send)

    return pass_on


def build_app(service: Service, hosts: list[str]) -> Starlette:
    """The application. hosts: names in a browser's address bar."""
    model = {"id": service.facts["checkpoint"], "object": "model", "created": int(time.time()), "owned_by": "flashar"}

    async def generations(request: Request) -> Response:
        content = b""
        async for chunk in request.stream():
            if len(content := content + chunk) > MOST_BYTES:
                raise HTTPException(413, f"the request is longer than {MOST_BYTES} bytes.")
        job = await asyncio.to_thread(service.job, json.loads(content, object_pairs_hook=once))
        told = follow(request, job, service.start(job))
        if job.partial_images:
            return StreamingResponse(events(told), media_type="text/event-stream")
        async for news in told:
            facts = {"created": int(time.time()), "plan": job.asked.plan, **asdict(job.asked.sampling)}
            return JSONResponse(news, 500) if "error" in news else JSONResponse({**facts, **news})
        raise ClientDisconnect

    def metrics(request: Request) -> Response:
        values = {"jobs gauge": service.jobs, **{f"{name}_total counter": n for name, n in service.counts.items()}}
        lines = [f"# TYPE flashar_{name}\nflashar_{name.split()[0]} {n}\n" for name, n in values.items()]
        return PlainTextResponse("".join(lines))

    def refuse(request: Request, error: Exception) -> Response:
        message = {"message": getattr(error, "detail", str(error)), "type": "invalid_request_error"}
        return JSONResponse({"error": message}, getattr(error, "status_code", 400), getattr(error, "headers", None))

    def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # to nobody

    routes = [
        Route("/", lambda _: FileResponse(Path(__file__).with_name("page.html"))),
        Route("/metrics", metrics),
        Route("/health", lambda _: JSONResponse({"status": "ok", "jobs": service.jobs, **service.facts})),
        Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [model]})),
        Route("/v1/images/generations", generations, methods=["POST"]),
    ]
    guarded = Mount("/", routes=routes, middleware=[Middleware(border, hosts=hosts)])
    handlers = {**dict.fromkeys((HTTPException, ValueError, RecursionError), refuse), ClientDisconnect: left}
    return Starlette(routes=[guarded], exception_handlers=handlers)
