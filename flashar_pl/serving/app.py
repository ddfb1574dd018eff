"""What a server may be asked, what its one thread draws, and how it answers: OpenAI's images API and a page."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from flashar_pl.checkpoints.opening import check_plan, check_top_k, open_checkpoint
from flashar_pl.decoding.build import build_engine
from flashar_pl.decoding.loop import Progress
from flashar_pl.decoding.prompts import Wanted, ask, choose_grid
from flashar_pl.decoding.samples import decode_partial
from flashar_pl.options import EngineOptions, ModelOptions, SamplingSettings, ShapeOptions, Subject, TextOptions
from flashar_pl.pictures import png_bytes
from flashar_pl.planner.room import fitting_batch

MOST_BYTES, LARGEST = 2**14, 2**63
"""Of a request; and of a number in it, which JSON allows any length."""
FIELDS: dict[str, type] = {
    **dict.fromkeys(("prompt", "negative_prompt", "plan", "response_format", "model", "user"), str),  # last two: unused
    **dict.fromkeys(("class", "n", "seed", "cfg_interval", "top_k", "partial_images"), int),
    **dict.fromkeys(("cfg_scale", "temperature", "top_p"), float), **dict.fromkeys(("greedy", "stream"), bool),
}  # fmt: skip


@dataclass
class Job:
    """The samples of one request. left: the client is gone, nothing more is drawn."""

    wanted: Wanted
    plan: str
    sampling: SamplingSettings
    seeds: list[int]
    partial_images: int
    left: bool = False


class Service:
    """A checkpoint, what holds where a request does not say it, and the thread that draws."""

    def __init__(
        self, model: ModelOptions, sampling: SamplingSettings, shape: ShapeOptions, text: TextOptions,
        engine: EngineOptions, most_jobs: int,
    ) -> None:  # fmt: skip
        self.source, self.sampling, self.text = open_checkpoint(model, engine), sampling, text
        self.grid = choose_grid(self.source, shape)
        self.plan = check_plan(self.source.model, engine.plan, self.grid)
        self.tokenizer = self.source.matching_tokenizer(engine.device)
        self.engine = build_engine(self.source, engine, self.plan)
        self.by = "class" if self.source.model.backbone.conditioning.kind == "class" else "prompt"
        self.example: Any = 0 if self.by == "class" else "a lighthouse at sunset"
        self.most_images = engine.batch_size if isinstance(engine.batch_size, int) else 64
        fullest = self.job({self.by: self.example, "n": self.most_images, "cfg_scale": 2})
        asked = (self.source, fullest.wanted, self.grid, self.plan, fullest.sampling)
        self.most_images = fitting_batch(*asked, engine.batch_size, self.engine.prefix_bucket)
        self.thread, self.counts = ThreadPoolExecutor(1, "flashar-drawing"), Counter[str]()
        self.jobs, self.most_jobs, network = 0, most_jobs, self.source.model  # jobs wait or are drawn
        plans = ("diagonal", "raster") if network.dual_head.vertical is not None else ("raster",)
        self.facts = {
            "checkpoint": self.source.path, "grid": self.grid, "asked_by": self.by, "example": self.example,
            "plans": {name: network.make_plan(name, *self.grid).n_steps for name in plans},
            "defaults": {"plan": self.plan, **asdict(sampling)}, "most_images": self.most_images,
        }  # fmt: skip

    def job(self, body: Any) -> Job:
        """What the JSON of a request asks for. Raises ValueError where it is wrong."""
        if not isinstance(body, dict) or not body.keys() <= FIELDS.keys():
            raise ValueError(f"got {json.dumps(body)[:200]}; expected an object with some of {', '.join(FIELDS)}.")
        given, most = {key: value for key, value in body.items() if value is not None}, self.most_images
        for key, value in given.items():
            fine = type(value) is FIELDS[key] or (type(value) is int and FIELDS[key] is float)
            if not fine or (not isinstance(value, str) and not abs(value) < LARGEST):  # so written, not NaN either
                raise ValueError(f'"{key}" is {str(value)[:60]!r}; expected {FIELDS[key].__name__}.')
        n, seed, parts = given.get("n", 1), given.get("seed", random.randrange(2**31)), given.get("partial_images", 8)
        if not (1 <= n <= most and seed >= 0 and 0 <= parts <= 64):
            raise ValueError(f"n is {n}, seed {seed}, partial_images {parts}; expected 1 to {most}, 0 up, 0 to 64.")
        if given.keys() & {"class", "prompt"} != {self.by}:
            raise ValueError(f'this model is asked by "{self.by}"; got {json.dumps(body)[:200]}.')
        if given.get("response_format", "b64_json") != "b64_json":
            raise ValueError(f'"response_format" is {given["response_format"]!r}; expected "b64_json".')
        plan = check_plan(self.source.model, given.get("plan", self.plan), self.grid)
        sampling = replace(self.sampling, **{key: given[key] for key in asdict(self.sampling) if key in given})
        check_top_k(self.source.model, sampling.top_k)
        subject = Subject(classes=[given["class"]]) if self.by == "class" else Subject(prompt=[given["prompt"]])
        text = replace(self.text, negative_prompt=given.get("negative_prompt", self.text.negative_prompt))
        wanted = ask(self.source, self.grid, n, sampling.guided, subject, text)
        return Job(wanted, plan, sampling, [seed + i for i in range(n)], parts if given.get("stream") else 0)

    def draw(self, job: Job, show: Callable[[dict[str, Any]], object] = print) -> dict[str, Any]:
        """Images in base64, and the seconds their codes took; `show` gets growing ones. Raises where it left."""
        began, steps = time.perf_counter(), self.source.model.make_plan(job.plan, *self.grid).n_steps

        def news(codes: Tensor, step: int) -> dict[str, Any]:
            nonlocal began
            codes, seconds = (
                codes[: len(job.seeds)].cpu(),
                time.perf_counter() - began,
            )  # the first waits for the device
            images = decode_partial(self.tokenizer, codes.to(self.engine.device))
            data = [base64.b64encode(png_bytes(image)).decode() for image in images]
            began = time.perf_counter() - seconds
            return {"data": data, "step": step, "steps": steps, "seconds": seconds}

        def on_step(progress: Progress) -> None:
            if job.left:
                raise ConnectionAbortedError
            step, parts = progress.steps, job.partial_images + 1
            if step < steps and step * parts // steps > (step - 1) * parts // steps:
                show(news(progress.codes(), step))

        n, condition, nulls = len(job.seeds), job.wanted.condition, job.wanted.unconditional
        # graphs are made for shapes: two of them, so that the first requests and not all of them wait for that
        size = n if "graphs" not in self.engine.runner or n == 1 else self.most_images
        seeds = job.seeds + [0] * (size - n)
        settings = {**asdict(job.sampling), "seeds": seeds, "unconditional": nulls and nulls.pad(size)}
        codes = self.engine.generate(condition.pad(size), self.grid, job.plan, on_step=on_step, **settings)
        return news(codes, steps)

    def start(self, request: Request, job: Job) -> AsyncIterator[dict[str, Any]]:
        """Have a job drawn: what `draw` tells, or its error, until the client leaves. HTTPException: too many wait."""
        if self.jobs >= self.most_jobs:
            self.counts["refused"] += 1
            raise HTTPException(429, f"{self.jobs} requests wait already.", {"Retry-After": str(self.jobs)})
        told, tell = asyncio.Queue[Any](), asyncio.get_running_loop().call_soon_threadsafe
        self.jobs += 1

        def end(drawn: asyncio.Future[dict[str, Any]]) -> None:
            error, self.jobs = drawn.exception(), self.jobs - 1
            how = "cancelled" if isinstance(error, ConnectionAbortedError) else "failed" if error else "drawn"
            self.counts.update({how: 1, "images": len(job.seeds) if how == "drawn" else 0})
            told.put_nowait({"error": {"message": str(error), "type": "server_error"}} if error else drawn.result())
            told.put_nowait(None)

        async def follow() -> AsyncIterator[dict[str, Any]]:
            try:
                while not await request.is_disconnected():
                    with suppress(TimeoutError):
                        if (news := await asyncio.wait_for(told.get(), 0.2)) is None:
                            return
                        yield news
            finally:
                job.left = True

        drawing = asyncio.get_running_loop().run_in_executor(
            self.thread, self.draw, job, lambda news: tell(told.put_nowait, news)
        )
        drawing.add_done_callback(end)
        return follow()


async def events(job: Job, told: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events of each image: image_generation.partial_image and image_generation.completed; or error."""
    async for news in told:
        kind = "error" if "error" in news else "completed" if news["step"] == news["steps"] else "partial_image"
        for i, image in enumerate(news.pop("data", [""])):
            event = {"type": f"image_generation.{kind}", "index": i, "seed": job.seeds[i], "b64_json": image, **news}
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def build_app(service: Service, hosts: list[str]) -> TrustedHostMiddleware:
    """The application. hosts: names in a browser's address bar; a page that rebinds another name to us is refused."""

    async def generations(request: Request) -> Response:
        content = b""
        async for chunk in request.stream():
            if len(content := content + chunk) > MOST_BYTES:
                raise HTTPException(413, f"the request is longer than {MOST_BYTES} bytes.")
        job = await asyncio.to_thread(service.job, json.loads(content))
        told = service.start(request, job)
        if job.partial_images:
            return StreamingResponse(events(job, told), media_type="text/event-stream")
        async for news in told:
            data = [{"b64_json": image, "seed": seed} for image, seed in zip(news.pop("data", ()), job.seeds)]
            facts = {"created": int(time.time()), "data": data, "plan": job.plan, **asdict(job.sampling), **news}
            return JSONResponse(facts if data else news, 200 if data else 500)
        return Response(status_code=499)  # to nobody

    def metrics(request: Request) -> Response:
        values = {"jobs gauge": service.jobs, **{f"{name}_total counter": n for name, n in service.counts.items()}}
        lines = [f"# TYPE flashar_{name}\nflashar_{name.split()[0]} {n}\n" for name, n in values.items()]
        return PlainTextResponse("".join(lines))

    def refuse(request: Request, error: Exception) -> Response:
        message = {"message": getattr(error, "detail", str(error)), "type": "invalid_request_error"}
        return JSONResponse({"error": message}, getattr(error, "status_code", 400), getattr(error, "headers", None))

    page = resources.files("flashar_pl.serving").joinpath("page.html").read_text("utf-8")
    routes = [
        Route("/", lambda _: HTMLResponse(page)), Route("/metrics", metrics),
        Route("/health", lambda _: JSONResponse({"status": "ok", "jobs": service.jobs, **service.facts})),
        Route("/v1/images/generations", generations, methods=["POST"]),
    ]  # fmt: skip
    refused = dict.fromkeys((HTTPException, ValueError, RecursionError), refuse)
    return TrustedHostMiddleware(Starlette(routes=routes, exception_handlers=refused), hosts, www_redirect=False)
