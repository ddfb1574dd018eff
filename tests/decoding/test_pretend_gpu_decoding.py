"""Decoding on a pretended GPU: devices are not mixed, the loop waits for nothing, graphs replay other batches."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from pretend_gpu import Event, GPUTensor, PretendGPU, Stream

from flashar_pl import numerics
from flashar_pl.backbones import ClassIds, Condition
from flashar_pl.decoding import Engine, engine, generate, samples
from flashar_pl.decoding.graphs import Recording
from flashar_pl.decoding.lossless import Lossless
from flashar_pl.decoding.samples import SampleSet
from flashar_pl.metrics.extractor import FeatureExtractor, Features
from flashar_pl.models.base import GridModel
from flashar_pl.models.released import ReleasedFlashAR
from flashar_pl.options import SamplingSettings
from flashar_pl.tokenizers import PixelTokenizer

PROMPTS = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9])]
NULLS = {"unconditional": [torch.tensor([1, 2, 9])] * 2}
KINDS = ("class", "text", "emu", "released", "intra")
SETTINGS = ({"greedy": True}, {"cfg_scale": 2.0, "cfg_interval": 1, "top_k": 9, "top_p": 0.9, "temperature": 0.8})


def make(kind: str) -> tuple[GridModel, list[Condition], dict[str, Any]]:
    """A model, the conditions of two batches, and what guidance needs besides."""
    if kind == "class":
        return tiny.flashar(n_head=4, n_kv_head=2), [tiny.classes(2), tiny.classes(4)[2:]], {}
    if kind == "text":  # heads of 12, which are padded on a GPU
        batches: list[Condition] = [tiny.captions([2, 5], seed=seed) for seed in (0, 1)]
        return tiny.flashar(condition="text", dim=24), batches, {}
    if kind == "emu":
        return tiny.emu_flashar(), [PROMPTS, PROMPTS[::-1]], NULLS
    if kind == "intra":
        return tiny.flashar(intra={"groups": 2}), [tiny.classes(2), tiny.classes(4)[2:]], {}
    torch.manual_seed(0)
    released = ReleasedFlashAR(tiny.emu(), 2, 1)
    tiny.randomise(released.vertical, 1)
    return released.eval(), [PROMPTS, PROMPTS[::-1]], NULLS


@pytest.mark.parametrize("plan", ["diagonal", "raster"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_on_a_device(kind: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a tensor made on the CPU, and against a wait, which would end the recording of a graph."""
    model, batches, nulls = make(kind)
    asked = [{"seeds": 3, **settings, **(nulls if "cfg_scale" in settings else {})} for settings in SETTINGS]
    expected = [generate(model, batches[0], (2, 3), plan, **each) for each in asked]
    real = engine.decode
    with PretendGPU() as gpu:
        model.to("cuda")

        def decode(*arguments: Any) -> Iterator[int]:
            with gpu.never_waits():
                yield from real(*arguments)

        for each, codes in zip(asked, expected, strict=True):
            generate(model, batches[0], (2, 3), plan, **each)  # copies the plan to the device
            with monkeypatch.context() as patched:
                patched.setattr(engine, "decode", decode)
                found = generate(model, batches[0], (2, 3), plan, **each)
            assert found.is_cuda
            assert torch.equal(found.cpu(), codes)


@pytest.mark.parametrize("plan", ["diagonal", "raster"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_replay_other_batches(kind: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded depends on shapes only: another batch, and other weights in the same memory, replay it."""
    monkeypatch.setattr("flashar_pl.decoding.graphs.STEPS_PER_GRAPH", 3)
    model, batches, nulls = make(kind)
    asked: dict[str, Any] = {**SETTINGS[1], **nulls}
    with PretendGPU():
        model.to("cuda")
        fast = Engine(model)
        assert fast.runner == "graphs"
        for seed, condition in enumerate(batches):
            codes = fast.generate(condition, (2, 3), plan, seeds=seed, **asked)
            assert torch.equal(codes.cpu(), generate(model, condition, (2, 3), plan, seeds=seed, **asked).cpu())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
        (recording,) = fast._kept.values()
        assert isinstance(recording, Recording)
        assert len(recording.graphs) == 2


def test_a_wait_ends_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where auto chose graphs and they fail, decoding goes on without, with the cause."""
    model, batches, _ = make("class")
    real = engine.decode

    def decode(*arguments: Any) -> Iterator[int]:
        for t in real(*arguments):
            int(arguments[-1].drawn.sum())
            yield t

    with PretendGPU():
        model.to("cuda")
        monkeypatch.setattr("flashar_pl.decoding.graphs.decode", decode)
        fast = Engine(model)
        with pytest.warns(UserWarning, match="could not be recorded, decoding goes on without: operation not perm"):
            codes = fast.generate(batches[0], (2, 3), seeds=0)
        assert fast.runner == "eager"
        assert torch.equal(codes.cpu(), generate(model, batches[0], (2, 3), seeds=0).cpu())


def test_a_wait_ends_the_recording_of_a_lossless_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had an error of its own, where every other plan goes on without graphs."""
    model, batches, _ = make("class")
    real = Lossless._feed

    def feed(self: Lossless, at: torch.Tensor) -> Any:
        int(at.sum())
        return real(self, at)

    with PretendGPU():
        model.to("cuda")
        expected = generate(model, batches[0], (2, 3), "raster", seeds=0)
        monkeypatch.setattr(Lossless, "_feed", feed)
        fast, shown = Engine(model), list[int]()
        with pytest.warns(UserWarning, match="could not be recorded, decoding goes on without: operation not perm"):
            codes = fast.generate(batches[0], (2, 3), "lossless", seeds=0, on_step=lambda p: shown.append(p.steps))
        assert fast.runner == "eager"
        assert torch.equal(codes.cpu(), expected.cpu())
        assert shown == list(range(1, 7)), "every cell once"


def test_a_device_without_float64_draws_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards Apple's GPUs, which refuse tensors of float64: the CDF is computed on the CPU for them."""
    model, batches, _ = make("class")
    expected = [generate(model, batches[0], (2, 3), "diagonal", seeds=3, **each) for each in SETTINGS]
    made = GPUTensor.__init__

    def refuse(self: GPUTensor, inner: torch.Tensor) -> None:
        assert inner.dtype != torch.float64, "float64 on the device"
        made(self, inner)

    with PretendGPU():
        model.to("cuda")
        monkeypatch.setattr(GPUTensor, "__init__", refuse)
        with pytest.raises(AssertionError, match="float64 on the device"):
            generate(model, batches[0], (2, 3), "diagonal", seeds=3)
        monkeypatch.setattr(numerics, "WITHOUT_FLOAT64", ("cuda",))
        for each, codes in zip(SETTINGS, expected, strict=True):
            found = Engine(model, "eager").generate(batches[0], (2, 3), "diagonal", seeds=3, **each)
            assert torch.equal(found.cpu(), codes)


class Means(FeatureExtractor):
    """The mean of each channel."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def extract(self, images: torch.Tensor) -> Features:
        return Features(images.float().mean((2, 3)) * self.gain)

    def fingerprint(self) -> str:
        return "means"


def test_pixels_of_a_batch_are_made_beside_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a caller is given must be finished: its stream waits for this batch's pixels, and not for those of the next
    batch, which would stop the drawing. Guards their order, too, and the last batch."""
    log: list[str] = []
    model, asked = (
        tiny.flashar(),
        SampleSet(ClassIds(torch.arange(5) % tiny.CLASSES), (2, 3), "diagonal", SamplingSettings(cfg_scale=1.5), 2),
    )
    extractor = Means()
    expected = list(samples.draw(model, PixelTokenizer(tiny.VOCABULARY), asked, extractor=extractor))
    waits: list[int] = []  # so far, before and after each call

    def logged(name: str) -> None:
        real, count = getattr(samples, name), iter(range(9))

        def call(*arguments: Any) -> Any:
            log.append(f"{name} {next(count)}")
            waits.append(len(gpu.waits))
            found = real(*arguments)
            waits.append(len(gpu.waits))
            return found

        monkeypatch.setattr(samples, name, call)

    logged("draw_batch")
    logged("decode_images")
    events: list[Event] = []
    with PretendGPU() as gpu:
        monkeypatch.setattr(Stream, "record_event", lambda stream: events.append(Event()) or events[-1])
        monkeypatch.setattr(Stream, "wait_event", lambda stream, event: log.append(f"wait {events.index(event)}"))
        tokenizer = PixelTokenizer(tiny.VOCABULARY).to("cuda")
        drawn = samples.draw(model.to("cuda"), tokenizer, asked, extractor=extractor.to("cuda"))
        for number, (found, wanted) in enumerate(zip(drawn, expected)):
            log.append(f"given {number}")
            assert torch.equal(found.images.cpu(), wanted.images)
            assert torch.equal(found.codes.cpu(), wanted.codes)
        assert gpu.waits
    assert waits[3] == waits[4]  # from the first pixels to the second drawing nothing has waited for the features
    made = [[f"draw_batch {i}", f"decode_images {i}"] for i in range(3)]
    given = [[f"wait {i}", f"given {i}"] for i in range(3)]
    assert log == [*made[0], *made[1], *given[0], *made[2], *given[1], *given[2]]
