"""`flashar evaluate geneval`: images for GenEval's prompts, and their score."""

from __future__ import annotations

from functools import partial
from typing import Any

from flashar_pl.console import plus_minus
from flashar_pl.evaluate.options import DrawnModelOptions, GenEval, GenEvalOptions
from flashar_pl.options import EngineOptions, RankOptions, SamplingSettings, TextOptions


def evaluate_geneval(
    options: GenEvalOptions,
    model: DrawnModelOptions = DrawnModelOptions(),
    sampling: SamplingSettings = SamplingSettings(),
    text: TextOptions = TextOptions(),
    engine: EngineOptions = EngineOptions(),
    ranks: RankOptions = RankOptions(),
) -> dict[str, Any] | None:
    """Draw GenEval's images with a text-to-image checkpoint, score them, or both.

    With --checkpoint and --prompts it draws what is missing in --out, in the layout that the official evaluator reads;
    a stopped run continues. With --detector and --clip it scores the images in --out, whoever drew them: results.jsonl
    (the official fields) and geneval.json with the mean over tasks (the official score) and the mean over images, which
    published tables mix up. Every visible GPU takes its share, or --devices processes, or those of torchrun or SLURM.

    Example:
        flashar evaluate geneval --checkpoint Emu3.5-Image-FlashAR --assets Emu3.5-Image
          --prompts evaluation_metadata.jsonl --tokenizer ibq:Emu3.5-VisionTokenizer --out geneval/flashar
        flashar evaluate geneval --detector mask2former-swin-small-coco-instance --clip clip-vit-large-patch14
          --out geneval/flashar
    """
    import torch

    from flashar_pl.checkpoints.repositories import located
    from flashar_pl.evaluate.geneval import geneval_on_rank
    from flashar_pl.ranks import run_on_ranks

    for pair in ({"--checkpoint": model.checkpoint, "--prompts": options.prompts},
                 {"--detector": options.detector, "--clip": options.clip}):  # fmt: skip
        if len(missing := [name for name, value in pair.items() if not value]) == 1:
            raise ValueError(f"{' and '.join(pair)} belong together; {missing[0]} is missing.")
    if not model.checkpoint and options.detector is None:
        raise ValueError("nothing to do: give --checkpoint and --prompts to draw, --detector and --clip to score.")
    if not model.checkpoint and (model, text) != (DrawnModelOptions(), TextOptions()):
        raise ValueError("options of the model and of its prompts are for drawing; add --checkpoint, --prompts.")
    if model.checkpoint:
        model = located(model)  # once, before there are ranks
    asked = GenEval(options, model, sampling, text, engine)
    report = run_on_ranks(partial(geneval_on_rank, asked, torch.get_num_threads()), ranks, engine.device)
    if report is not None:
        errors = report["standard_errors"]
        for name, task in report["tasks"].items():
            share = plus_minus(task["correct"] / task["images"], errors[name], ".4f")
            print(f"{name:<14} {share}  ({task['correct']} of {task['images']})")
        print(f"mean over tasks (the official score)  {plus_minus(report['overall'], errors['overall'], '.4f')}")
        print(f"mean over images                      {report['image_mean']:.4f}")
        print(f"wrote {options.out}/geneval.json, {options.out}/results.jsonl")
    return report
