"""`flashar evaluate geneval`: images for GenEval's prompts in its official folder layout, and their score.

    OUT/00000/metadata.jsonl            the prompt's line of the prompt file
    OUT/00000/samples/0000.png          its images

Shapes: n images in all, B images drawn together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.checkpoints.opening import check_plan, check_top_k, open_checkpoint
from flashar_pl.console import progress_bar, versions
from flashar_pl.decoding.build import build_engine
from flashar_pl.decoding.prompts import ask
from flashar_pl.devices import find_device
from flashar_pl.evaluate.processes import Group, device_of_rank, launched_group
from flashar_pl.evaluate.reference import directory_digest, path_digest, tokenizer_identity
from flashar_pl.files import require_new, write_json, write_text
from flashar_pl.options import (
    DeviceOptions,
    Dtype,
    EngineOptions,
    ModelOptions,
    Plan,
    Runner,
    Subject,
    TextOptions,
    WeightFormat,
    parse_grid,
)

if TYPE_CHECKING:
    from flashar_pl.checkpoints.opening import Source
    from flashar_pl.decoding.samples import SampleSet

SETTINGS, RESULTS, SUMMARY = "settings.json", "results.jsonl", "geneval.json"


def evaluate_geneval(
    *,
    out: str,
    prompts: str | None = None,
    checkpoint: str | None = None,
    assets: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    detector: str | None = None,
    clip: str | None = None,
    num_images: int = 4,
    grid: str = "32x32",
    plan: Plan | None = None,
    cfg_scale: float = 5.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 4,
    device: str = "auto",
    dtype: Dtype | None = None,
    runner: Runner = "auto",
    weight_format: WeightFormat = "auto",
) -> dict[str, Any] | None:
    """Draw GenEval's images with a text-to-image checkpoint, score them, or both.

    With --checkpoint and --prompts it draws what is missing in --out, in the layout that the official evaluator reads;
    a stopped run continues, and torchrun shares the prompts out. With --detector and --clip
    it scores the images in --out, whoever drew them: results.jsonl (the official fields) and geneval.json with the mean
    over tasks (the official score) and the mean over images, which published tables mix up.

    Example:
        flashar evaluate geneval --checkpoint Emu3.5-Image-FlashAR --assets Emu3.5-Image
          --prompts evaluation_metadata.jsonl --tokenizer ibq:Emu3.5-VisionTokenizer --out geneval/flashar
        flashar evaluate geneval --detector mask2former-swin-small-coco-instance --clip clip-vit-large-patch14
          --out geneval/flashar

    Args:
        out: directory of the images and results.
        prompts: GenEval's evaluation_metadata.jsonl.
        checkpoint: Emu3.5-Image or Emu3.5-Image-FlashAR directory, LlamaGen text-to-image weights, or a converted or
            trained model of these.
        assets: directory with emu3.tiktoken, for Emu3.5. Default: the checkpoint's own.
        text_encoder: directory of the T5 encoder, for LlamaGen.
        tokenizer: what decodes the codes, such as ibq:DIRECTORY, where the checkpoint does not say it.
        detector: directory of a Mask2Former with COCO's classes, in transformers' format.
        clip: directory of CLIP ViT-L/14, in transformers' format.
        num_images: images of each prompt.
        grid: code grid HEIGHTxWIDTH.
        plan: decoding order: raster or diagonal. Default: the checkpoint's own.
        cfg_scale: classifier-free guidance s in u + s(c - u); 1 is off.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes; 0 is off.
        top_p: keep the most likely codes up to this probability; 1 is off.
        seed: image j of prompt i uses seed + i * num_images + j.
        batch_size: images drawn together.
        device: auto, cpu, cuda or cuda:N.
        dtype: of weights and activations; softmax and sampling stay in float32 and float64. Default: fp32, for official
            Emu3.5 directories that of the file.
        runner: eager, compiled, graphs or compiled-graphs; auto is graphs on a GPU, eager on a CPU.
        weight_format: plain, packed (laid out for a CPU's matrix products), int8 or fp8 (rounded; needs torchao);
            auto as in flashar generate.
    """
    drawing = {"--checkpoint": checkpoint, "--prompts": prompts}
    scoring = {"--detector": detector, "--clip": clip}
    for options in (drawing, scoring):
        missing = [name for name, value in options.items() if value is None]
        if missing and len(missing) < len(options):
            raise ValueError(f"{' and '.join(options)} belong together; {missing[0]} is missing.")
    if checkpoint is None and detector is None:
        raise ValueError("nothing to do: give --checkpoint and --prompts to draw, --detector and --clip to score.")
    if checkpoint is None and (assets or text_encoder or tokenizer):
        raise ValueError("--assets, --text-encoder and --tokenizer are for drawing; add --checkpoint and --prompts.")
    if detector is not None:
        require_new(Path(out) / SUMMARY, "scores")
    size = list(parse_grid(grid) or ())
    settings = Drawing(
        num_images, plan, cfg_scale, temperature, top_k, top_p, seed, batch_size, dtype, weight_format, size
    )
    entries = [] if prompts is None else read_prompts(prompts)
    with launched_group() as group:
        place = device_of_rank(device, group.local_rank) if group.ranks > 1 else device
        if checkpoint is not None:
            source = open_checkpoint(
                ModelOptions(checkpoint, grid=grid, tokenizer=tokenizer), DeviceOptions(place, dtype)
            )
            draw_images(Path(out), source, entries, TextOptions(assets, text_encoder), settings, place, runner, group)
        group.wait()
        rank = group.rank
    if rank > 0 or detector is None or clip is None:
        return None
    return score_images(Path(out), detector, clip, device)


@dataclass(frozen=True)
class Drawing:
    """How images are drawn."""

    num_images: int
    plan: Plan | None
    cfg_scale: float
    temperature: float
    top_k: int
    top_p: float
    seed: int
    batch_size: int
    dtype: str | None
    weight_format: WeightFormat
    grid: list[int]

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more.")


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """GenEval's prompt entries, one JSON object a line.

    Raises:
        ValueError: no such file, or a line without "tag", "prompt" and "include".
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"no prompts at {file}; expected evaluation_metadata.jsonl from github.com/djghosh13/geneval (prompts/)."
        )
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not {"tag", "prompt", "include"} <= entry.keys():
            raise ValueError(f'{file}, line {number}: expected an object with "tag", "prompt" and "include".')
        entries.append(entry)
    if not entries:
        raise ValueError(f"{file} holds no prompts.")
    return entries


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_images(
    out: Path,
    source: Source,
    entries: list[dict[str, Any]],
    text: TextOptions,
    drawing: Drawing,
    device: str,
    runner: Runner,
    group: Group,
) -> None:
    """Draw this rank's share of the images that are not there yet."""
    from flashar_pl.decoding.samples import draw
    from flashar_pl.pictures import save_png

    decoder = source.matching_tokenizer(device)
    samples = prompt_samples(source, [entry["prompt"] for entry in entries], text, drawing)
    if group.rank == 0:
        _open(out, source, entries, drawing, samples.plan)
    group.wait()
    every = drawing.num_images
    files = [out / f"{i // every:05d}" / "samples" / f"{i % every:04d}.png" for i in range(samples.n)]

    def missing(batch: int) -> bool:
        return any(not files[i].exists() for i in samples.numbers(batch) if i < samples.n)

    engine = build_engine(source, EngineOptions(runner=runner, weight_format=drawing.weight_format), samples.plan)
    todo = [batch for batch in range(group.rank, samples.batches, group.ranks) if missing(batch)]
    with progress_bar(len(todo) * samples.batch_size, "images") as advance:
        for drawn in draw(engine, decoder, samples, todo):
            for i, image in zip(drawn.index.tolist(), drawn.images.cpu()):
                if not files[i].exists():
                    save_png(image, files[i])
            advance(samples.batch_size)


def prompt_samples(source: Source, prompts: list[str], text: TextOptions, drawing: Drawing) -> SampleSet:
    """The numbered images of all prompts. Numbers behind the last repeat it.

    Raises:
        ValueError: a class-conditional model, or prompt assets that are missing or of another model.
    """
    from flashar_pl.decoding.samples import SampleSet
    from flashar_pl.sampling import SamplingSettings

    grid = source.need_grid()
    settings = SamplingSettings(
        cfg_scale=drawing.cfg_scale, temperature=drawing.temperature, top_k=drawing.top_k, top_p=drawing.top_p
    )
    check_top_k(source.model, settings.top_k)
    wanted = ask(source, grid, 1, settings.guided, Subject(prompt=prompts), text)
    every, unconditional = drawing.num_images, wanted.unconditional
    n = len(prompts) * every

    def prompts_of(numbers: list[int]) -> list[int]:
        return [min(i, n - 1) // every for i in numbers]

    return SampleSet(
        condition_of=lambda numbers: wanted.condition.rows(prompts_of(numbers)),
        n=n,
        grid=grid,
        plan=check_plan(source.model, drawing.plan, grid),
        sampling=settings,
        batch_size=min(drawing.batch_size, n),
        seed=drawing.seed,
        unconditional_of=None if unconditional is None else lambda numbers: unconditional.rows(prompts_of(numbers)),
    )


def _open(out: Path, source: Source, entries: list[dict[str, Any]], drawing: Drawing, plan: str) -> None:
    """Make the folders, or check that those there are of the same images."""
    identity = {
        **asdict(drawing),
        "plan": plan,
        "checkpoint_sha256": path_digest(source.path),
        "tokenizer": tokenizer_identity(source.need_tokenizer()),
        "prompts": len(entries),
        "versions": versions(),
    }
    settings = out / SETTINGS
    if out.exists():
        if not settings.exists():
            raise ValueError(f"{out} exists and holds no {SETTINGS}; choose another --out or remove it.")
        stored = json.loads(settings.read_text())
        for key, value in identity.items():
            if key != "versions" and stored.get(key) != value:
                raise ValueError(
                    f"{out} holds images drawn with {key} {stored.get(key)!r}, this run has {value!r}; give the old "
                    "settings to continue, or choose another --out."
                )
    for i, entry in enumerate(entries):
        folder = out / f"{i:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        line = json.dumps(entry)
        file = folder / "metadata.jsonl"
        if file.exists() and json.loads(file.read_text()) != entry:
            raise ValueError(f"{file} is of another prompt; choose another --out.")
        if not file.exists():
            write_text(file, line + "\n")
    if not settings.exists():
        write_json(settings, identity)


# --- scoring ----------------------------------------------------------------------------------------------------------


def list_images(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every image of the layout with its prompt's entry, in order.

    Raises:
        ValueError: no images, or prompts with different numbers of them.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    counts: dict[str, int] = {}
    for folder in sorted(p for p in out.glob("[0-9]*") if p.is_dir() and p.name.isdigit()):
        entry = json.loads((folder / "metadata.jsonl").read_text(encoding="utf-8"))
        files = sorted(p for p in (folder / "samples").glob("*.png") if p.stem.isdigit())
        counts[folder.name] = len(files)
        found += [(file, entry) for file in files]
    if not found:
        raise ValueError(f"no images in {out}; expected 00000/samples/0000.png and so on.")
    most = max(counts.values())
    short = [name for name, count in counts.items() if count < most]
    if short:
        raise ValueError(
            f"{len(short)} of {len(counts)} prompts in {out} have fewer than {most} images (first: {short[0]}); give "
            "the command that draws them again."
        )
    return found


def score_images(out: Path, detector: str, clip: str, device: str) -> dict[str, Any]:
    """Score every image; writes results.jsonl and geneval.json and returns what the latter holds."""
    from flashar_pl.metrics.geneval import DEFAULT_SETTINGS, keep_detections, score_image, summarise
    from flashar_pl.metrics.geneval_images import ColorClassifier, Detector, open_image

    images = list_images(out)
    place = find_device(device)
    detect, colors = Detector(detector, place), ColorClassifier(clip, place)
    results = []
    with progress_bar(len(images), "images") as advance:
        for file, entry in images:
            image = open_image(file)
            found = detect(image)
            correct, reason = score_image(found, entry, _colors_of(colors, image))
            kept = keep_detections(found, entry["tag"])
            details = {name: [[*d.box, d.score] for d in chosen] for name, chosen in kept.items()}
            results.append(
                {
                    "filename": str(file.relative_to(out)),
                    "tag": entry["tag"],
                    "prompt": entry["prompt"],
                    "correct": correct,
                    "reason": reason,
                    "metadata": json.dumps(entry),
                    "details": json.dumps(details),
                }
            )
            advance(1)
    summary = summarise([(entry, result["correct"]) for (_, entry), result in zip(images, results)])
    drawn = out / SETTINGS
    report = {
        "command": "evaluate geneval",
        **asdict(summary),
        "tasks": {name: {"correct": right, "images": total} for name, (right, total) in summary.tasks.items()},
        "thresholds": asdict(DEFAULT_SETTINGS),
        "detector": {"path": detector, "sha256": directory_digest(Path(detector))},
        "clip": {"path": clip, "sha256": directory_digest(Path(clip))},
        "drawn_with": json.loads(drawn.read_text()) if drawn.exists() else None,
        "versions": versions(),
    }
    write_text(out / RESULTS, "".join(json.dumps(result) + "\n" for result in results))
    write_json(out / SUMMARY, report)
    for name, (right, total) in summary.tasks.items():
        print(f"{name:<14} {right / total:.4f}  ({right} of {total})")
    print(f"mean over tasks (the official score)  {summary.overall:.4f}")
    print(f"mean over images                      {summary.image_mean:.4f}")
    return report


def _colors_of(colors: Callable[..., list[str]], image: Any) -> Callable[..., list[str]]:
    return lambda name, found: colors(image, name, found)
