"""`flashar benchmark`: sound numbers in the JSON, refusals before allocation, no claim that was not measured."""

import json
from dataclasses import replace

import pytest
import torch

from flashar_pl import decoding, devices
from flashar_pl.benchmarking import measure, pixels
from flashar_pl.benchmarking.rows import Job
from flashar_pl.benchmarking.subjects import Subject
from flashar_pl.benchmarking.table import PLAIN, doubts, speedups
from flashar_pl.checkpoints.opening import open_checkpoint
from flashar_pl.commands.benchmark import MeasureOptions, benchmark
from flashar_pl.decoding import build as formats
from flashar_pl.decoding.build import choose_format
from flashar_pl.layers import measured
from flashar_pl.layers.packed import unsupported
from flashar_pl.options import (
    ComputeOptions,
    DeviceOptions,
    EngineOptions,
    ModelOptions,
    PresetOptions,
    SamplingSettings,
    WayOptions,
)
from flashar_pl.planner.decode import DecodeJob
from flashar_pl.planner.room import HEADROOM, Room
from flashar_pl.planner.sizes import model_sizes

CPU = torch.device("cpu")
ROW = {"plan", "batch", "steps", "ms_per_image", "images_per_s", "ms_per_step", "peak_bytes", "bandwidth_floor_s"}


@pytest.fixture
def quick(flashar_model):
    """The fastest benchmark that measures every kind of row, some options changed."""

    def call(sampling=SamplingSettings(cfg_scale=2.0), runners="auto", weight_formats="auto", grid="4x6", **changes):
        measured = MeasureOptions(**{"repeats": 2, "threads": 1, **changes})
        model, ways = PresetOptions(checkpoint=flashar_model, grid=grid), WayOptions(runners, weight_formats)
        return benchmark(model, measured, sampling, ways, ComputeOptions("cpu"))

    return call


def test_a_benchmark_writes_rows_speedups_and_a_table(run, flashar_model, work):
    words = ["--checkpoint", flashar_model, "--device", "cpu", "--repeats", 2, "--grid", "4x6", "--out", "bench"]
    code, out, err = run("benchmark", *words, "--batch-sizes", "1,3", "--threads", "1")
    assert code == 0, err
    result = json.loads((work / "bench" / "results.json").read_text())
    assert [(row["plan"], row["batch"]) for row in result["rows"]] == [
        (plan, batch) for batch in (1, 3) for plan in ("raster", "diagonal", "plain raster")
    ]
    for row in result["rows"]:
        assert row.keys() >= ROW
        assert row["steps"] == (9 if row["plan"] == "diagonal" else 24)
        assert row["time"]["repeats"] == 2
        assert row["ms_per_image"] == pytest.approx(1e3 * row["seconds"] / row["batch"])
        assert row["floor_s"] >= max(row["bandwidth_floor_s"], row["flop_floor_s"]) * 0.999
        assert (row["gemm_s"] is None) == (row["plan"] == "plain raster")
    for each in result["speedups"]:
        assert each["steps"] == pytest.approx(24 / 9)
        assert each["over_raster"] > 0
        assert each["over_plain_raster"] > 0
    assert result["clock"] == "cpu"
    assert "| diagonal " in out
    assert (work / "bench" / "table.md").read_text() in out


def test_every_row_decodes_the_job_it_names(quick, monkeypatch):
    """Guards against a speed-up measured on another plan, guidance, batch or grid than the table says."""
    calls = []
    real = decoding.Engine.generate

    def generate(engine, condition, grid, plan, **options):
        calls.append((plan, len(condition), grid, options["cfg_scale"]))
        return real(engine, condition, grid, plan, **options)

    monkeypatch.setattr(decoding.Engine, "generate", generate)
    quick(batch_sizes="2", sampling=SamplingSettings(3.0), skip_plain=True)
    assert calls == [("raster", 2, (4, 6), 3.0)] * 3 + [("diagonal", 2, (4, 6), 3.0)] * 3  # a warm-up and two repeats


def test_pixels_are_measured_beside_the_codes(quick, refused, flashar_model, monkeypatch, capsys):
    """A time to an image that leaves out its pixels; and pixels of another batch or grid than the row's."""
    decoded = []
    real = pixels.decode_all
    monkeypatch.setattr(pixels, "decode_all", lambda *given: decoded.append(given[1].shape) or real(*given))
    tokenizer = f"pixels:{open_checkpoint(ModelOptions(flashar_model), DeviceOptions('cpu')).model.backbone.vocabulary}"
    result = quick(batch_sizes="1,3", skip_plain=True, pixels=tokenizer)
    assert decoded == [(1, 4, 6)] * 4 + [(3, 4, 6)] * 4  # two warm-ups, two repeats
    assert {row["batch"]: row["pixels_s"] for row in result["rows"]} == {
        batch: timed["cpu_s"] for batch, timed in result["pixels"]["times"].items()
    }
    for each in result["speedups"]:
        assert 1 < each["over_raster_with_pixels"] < each["over_raster"] or each["over_raster"] < 1
    table = capsys.readouterr().out
    row = result["rows"][0]
    assert f"{1e3 * (row['pixels_s'] + row['seconds']):.2f} |" in table
    assert "with pixels ms/image" in table
    assert quick(plans="raster", skip_plain=True)["pixels"] is None
    words = ("--checkpoint", flashar_model, "--grid", "4x6", "--device", "cpu")
    other = refused("benchmark", *words, "--pixels", "vq8")
    assert "16384 codes" in other
    assert "or --pixels of" in other  # benchmark has no --tokenizer
    assert "pixels is 'vq18'; expected vq16, vq8, ibq, a dir" in refused("benchmark", *words, "--pixels", "vq18")
    assert "add --pixels" in refused("benchmark", *words, "--pixel-dtype", "bf16")
    assert "PixelTokenizer does not have" in refused(
        "benchmark", *words, "--pixel-dtype", "bf16", "--pixels", tokenizer
    )


def test_the_lossless_row_counts_its_own_forwards(quick):
    """Guards its steps, floors and matrix products against those of the raster plan, which it replaces."""
    (row,) = quick(plans="lossless", skip_plain=True)["rows"]
    assert 2 <= row["steps"] <= 24
    assert row["codes_per_forward"] == 24 / row["steps"]
    assert row["flops"] > 2 * quick(plans="raster", skip_plain=True)["rows"][0]["flops"], "12 codes a forward"


def test_a_runner_that_fails_says_why_and_the_others_are_measured(quick, refused, flashar_model, capsys):
    """Guards an hour of measurements against the one runner that this machine cannot use."""
    result = quick(runners="eager,graphs", plans="diagonal", skip_plain=True)
    assert [(row["plan"], row["runner"], row["weight_format"]) for row in result["rows"]] == [
        ("diagonal", "eager", "plain")
    ]
    assert [(row["plan"], row["runner"]) for row in result["failed"]] == [("diagonal", "graphs")]
    assert "CUDA graphs need a CUDA device" in result["failed"][0]["cause"]
    assert "FAILED: diagonal at batch 1 with runner graphs" in capsys.readouterr().out
    words = ("--checkpoint", flashar_model, "--grid", "4x6", "--device", "cpu", "--runners", "graphs", "--threads", 1)
    assert "CUDA graphs need a CUDA device" in refused("benchmark", *words)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("no kernel\nmore")])
def test_a_plain_row_without_memory_leaves_the_others(quick, monkeypatch, error):
    """Its growing cache needs more than the planner counts for the largest batch; hours of other rows must stay. Nor
    may they be lost to a kernel that a GPU does not have."""

    def full(*_):
        raise error

    monkeypatch.setattr("flashar_pl.benchmarking.rows.generate_plain", full)
    result = quick(plans="diagonal")
    assert [row["plan"] for row in result["rows"]] == ["diagonal"]
    assert [(row["plan"], row["cause"]) for row in result["failed"]] == [(PLAIN, str(error).split("\n")[0])]


@pytest.mark.slow
def test_formats_of_weights_are_rows_with_matrix_products_of_their_own(quick):
    """Guards the ratio to GEMM-only: packed weights have other kernels, and other matrices, than plain ones."""
    result = quick(weight_formats="plain,packed,int8")
    assert result["failed"] == []
    rows = [(row["plan"], row["weight_format"]) for row in result["rows"]]
    assert rows == [
        ("raster", "plain"), ("diagonal", "plain"), ("plain raster", "plain"), ("raster", "packed"),
        ("diagonal", "packed"), ("raster", "int8"), ("diagonal", "int8"),
    ]  # fmt: skip
    assert [each["weight_format"] for each in result["speedups"]] == ["plain", "packed", "int8"]
    assert all(row["gemm_s"] > 0 for row in result["rows"] if row["plan"] != PLAIN)


@pytest.mark.parametrize(
    ("dtype", "width", "memory", "pays", "found"),
    [
        ("bf16", 256, 2**40, None, "packed"), ("fp32", 256, 2**40, None, "plain"),
        ("bf16", 1, 1, None, "plain"), ("fp32", 1, 1, None, "plain"),
        ("bf16", 1, 2**40, False, "plain"), ("fp32", 1, 2**40, True, "packed"), ("fp32", 1, 2**40, False, "plain"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("plan", "rows"), [("raster", 2), ("diagonal", 16)])
def test_auto_is_the_format_that_measures_best_here(
    dtype, width, memory, pays, found, plan, rows, monkeypatch, flashar_model
):
    """Guards "raster in float32 = plain weights", which was one processor's rule and 3.2 times slower on another."""
    if unsupported(torch.bfloat16) is not None:
        pytest.skip("this machine cannot pack bfloat16 weights")
    model = open_checkpoint(ModelOptions(flashar_model), DeviceOptions("cpu", dtype)).model
    asked: list[int] = []
    monkeypatch.setattr(measured, "packed_pays", lambda n_in, n_out, dtype, rows: asked.append(rows) or pays)
    monkeypatch.setattr(devices, "available_memory", lambda device: memory)
    monkeypatch.setattr(formats, "PACKED_WIDTH", width)
    assert choose_format(model, EngineOptions(weight_format="auto", runner="eager"), plan) == found
    assert asked == ([] if pays is None else [rows]), "narrow models and models without room are not measured"
    assert choose_format(model, EngineOptions(weight_format="auto", runner="compiled"), plan) == "plain", (
        "torch.compile cannot read packed weights"
    )
    assert choose_format(model, EngineOptions(weight_format="int8", runner="compiled"), plan) == "int8"


def test_a_machine_is_measured_once(monkeypatch, tmp_path):
    """Guards equal commands with unequal kernels: the first answer is kept, whatever a busier moment would measure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shares = iter([0.5, 1.5])
    monkeypatch.setattr(measured, "_share", lambda *shape: next(shares))
    assert [measured.packed_pays(64, 64, torch.float32, 2) for _ in range(3)] == [True] * 3
    assert not measured.packed_pays(64, 128, torch.float32, 2), "another matrix is another question"
    (tmp_path / "flashar_pl" / "packed_products.json").write_text("{")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "BYTES", 2**16)
    assert measured.packed_pays(64, 64, torch.float32, 2) in (True, False), "a damaged file is measured anew"
    assert "float32, 2 rows" in (tmp_path / "flashar_pl" / "packed_products.json").read_text()


def test_a_batch_that_cannot_fit_is_refused_before_the_model_is_built(monkeypatch, refused):
    sizes = model_sizes({"backbone": {"preset": "llamagen-b"}})
    job = DecodeJob(sizes, "diagonal", (16, 16), 4, True, torch.float32)
    need = job.memory.total
    monkeypatch.setattr(devices, "available_memory", lambda device: int(need / HEADROOM) + 10**6)
    monkeypatch.setattr("flashar_pl.benchmarking.subjects.Subject.model", None)
    words = ("--batch-sizes", "1,5", "--cfg-scale", "2", "--device", "cpu", "--weight-formats", "plain")
    error = refused("benchmark", "--preset", "llamagen-b", *words)
    assert "batch 5 with the" in error
    assert "the largest that fits is 4" in error
    room = Room((job,), CPU)
    assert room.choose_all("auto,2,4") == [4, 2]
    with pytest.raises(ValueError, match="not even one image fits"):
        replace(room, weight_copies=4).choose(1)
    assert replace(room, weight_copies=0).choose("auto") > 4, "weights that are loaded need no more room"
    monkeypatch.setattr(devices, "available_memory", lambda device: 2**50)
    assert room.choose_all("auto") == [64]


def test_memory_that_a_loaded_model_takes_is_not_available(monkeypatch):
    """Guards a batch chosen on a GPU that holds the weights already: what the allocator holds is not all free."""
    for name, value in (("mem_get_info", (10, 100)), ("memory_reserved", 80), ("memory_allocated", 70)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert devices.available_memory(torch.device("cuda")) == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --preset"),
        (["--preset", "llamagen-b", "--plans", "raster,spiral"], "plans has 'spiral'; expected some of"),
        (["--preset", "llamagen-b", "--batch-sizes", "1,many"], "batch_sizes is '1,many'"),
        (["--preset", "llamagen-b", "--repeats", "0"], "repeats is 0"),
        (["--preset", "llamagen-b", "--runners", "eager,fast"], "runners has 'fast'"),
        (["--preset", "llamagen-b", "--weight-formats", "int3"], "weight_formats has 'int3'"),
        (["--preset", "llamagen-b", "--out", "."], "exists"),
    ],
)
def test_wrong_options_are_refused(words, message, refused, work):
    assert message in refused("benchmark", "--device", "cpu", *words)


def test_threads_are_restored_and_missing_rows_are_no_speed_ups(quick):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        result = quick(threads=1, plans="diagonal", skip_plain=True)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert (result["threads"], result["clock"]) == (1, "cpu")
    assert result["speedups"] == [
        {"plan": "diagonal", "runner": "eager", "weight_format": "plain", "batch": 1, "over_raster": None,
         "like_for_like": None, "over_plain_raster": None, "steps": None, "gemm_only": None,
         "over_raster_with_pixels": None}
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 10), (5.0, 10), (5.1, 3), (20.0, 3), (20.1, 1)])
def test_slow_rows_are_repeated_less(seconds, count):
    assert measure.repeats_for(seconds, None) == count
    assert measure.repeats_for(seconds, 100) == 100  # Table 2: as asked for, however long it takes


def test_speedups_are_over_the_fastest_raster_of_the_batch():
    """Guards a headline over a raster row that is not this machine's best; the ratio of one engine stands beside it."""
    rows = [
        {"plan": plan, "runner": runner, "weight_format": form, "batch": batch, "seconds": seconds * batch / fast,
         "steps": steps, "gemm_s": gemm, "share_of_floor": 0.5}
        for batch in (1, 8)
        for runner, form, fast in (("eager", "plain", 1), ("graphs", "plain", 2), ("graphs", "int8", 4))
        for plan, seconds, steps, gemm in [("raster", 6, 256, 4.0), ("diagonal", 2, 31, 1.0)]
    ]  # fmt: skip
    plain = {"plan": PLAIN, "runner": "eager", "weight_format": "plain", "steps": 256, "share_of_floor": 1.04}
    rows += [plain | {"batch": batch, "seconds": 18 * batch} for batch in (1, 8)]
    rows = [row | {"pixels_s": row["batch"]} for row in rows]
    assert speedups(rows) == [
        {"plan": "diagonal", "runner": runner, "weight_format": form, "batch": batch, "over_raster": over,
         "like_for_like": 3, "over_plain_raster": 9 * fast, "steps": 256 / 31, "gemm_only": 4,
         "over_raster_with_pixels": pytest.approx(with_pixels)}
        for batch in (1, 8)
        for runner, form, fast, over, with_pixels in (
            ("eager", "plain", 1, 1.5, 4 / 3), ("graphs", "plain", 2, 3, 2), ("graphs", "int8", 4, 3, 2.5 / 1.5),
        )
    ]  # fmt: skip
    assert [line.split(":")[0] for line in doubts(rows, speedups(rows))] == ["DOUBT"] * 2, "of the plain rows' floors"
    for row in rows:
        row["seconds"] *= 10 if row["plan"] == "raster" else 1
    assert sum("not this machine's best" in line for line in doubts(rows, speedups(rows))) == 6


SMALL = {"n_layer": 2, "dim": 32, "ffn_dim": 48, "n_head": 2, "vocab_size": 1100}
SMALL_EMU = {"n_kv_head": 1, "head_dim": 8, "visual_token_offset": 1040, "eol_token_id": 1, "boi_token_id": 2}


@pytest.mark.parametrize("preset", ["llamagen-xl-t2i", "emu35-34b"])
def test_captions_and_prompts_are_benchmarked_too(preset):
    """Guards the 34B row: prompts of two lengths, row-end tokens and text rows of the head go through every decoder."""
    sizes = model_sizes({"backbone": {"preset": preset, **SMALL, **(SMALL_EMU if preset == "emu35-34b" else {})}})
    subject = Subject(sizes, (3, 4))
    job = Job(subject, subject.model(CPU, torch.float32), SamplingSettings(2.0), CPU, torch.float32, repeats=1)
    engine = decoding.Engine(job.model)
    for plan, decoder in (("raster", engine), ("diagonal", engine), ("raster", None)):
        row = job.row(plan, 2, decoder)
        assert row["plan"] == (PLAIN if decoder is None else plan)
        assert row["steps"] == (6 if plan == "diagonal" else 12)
        assert row["seconds"] > 0


@pytest.mark.parametrize("preset", ["llamagen-b", "emu35-34b"])
def test_synthetic_weights_are_made_in_their_dtype(preset, monkeypatch):
    """Guards the memory of a 34B model: float32 weights on the way would not fit beside it."""
    sizes = model_sizes({"backbone": {"preset": preset, **SMALL, **(SMALL_EMU if preset == "emu35-34b" else {})}})
    seen = []
    real = torch.nn.Module.to_empty

    def to_empty(self, *, device, recurse=True):
        seen.append({parameter.dtype for parameter in self.parameters()})
        return real(self, device=device, recurse=recurse)

    monkeypatch.setattr(torch.nn.Module, "to_empty", to_empty)
    model = Subject(sizes, (2, 2)).model(CPU, torch.bfloat16)
    assert seen == [{torch.bfloat16}]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.isfinite().all() and parameter.abs().sum() > 0 for parameter in model.parameters())


def test_peak_memory_sees_an_allocation():
    """Guards the memory column: the peak must start anew for every row and see what was freed again."""
    with devices.peak_memory(CPU) as first:
        torch.ones(16 * 2**20)
    if not first.bytes:
        pytest.skip("this system does not report resident memory")
    with devices.peak_memory(CPU) as second:
        torch.ones(2**10)
    assert first.extra >= 60 * 2**20
    assert second.extra < 16 * 2**20


def test_a_failed_compilation_is_a_row_with_its_cause(quick, monkeypatch):
    def broken(*arguments, **options):
        raise torch._dynamo.exc.Unsupported("no compiler here\n\ndetails")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    result = quick(runners="eager,compiled", plans="diagonal", skip_plain=True)
    assert len(result["rows"]) == 1
    assert "torch.compile failed: no compiler here" in result["failed"][0]["cause"]
