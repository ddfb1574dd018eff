"""What a checkpoint of a training run says about itself."""

from __future__ import annotations

from typing import Any

from flashar_pl.checkpoints.description import Description
from flashar_pl.models.lora import adaptation


def describe(module: Any) -> Description:
    """Model, grid and tokenizer, and under "training" the step, the length, the stage, all settings and what the data
    module adds: the grids where there are several, and the prompts of Emu3.5.
    """
    step, data, manifest = module.trainer.global_step, module.trainer.datamodule, module.manifest  # type: ignore[attr-defined]
    training: dict[str, Any] = {"step": step, "total_steps": module.total_steps, "settings": module.settings()}
    grids = [list(each.grid) for each in getattr(data, "manifests", ())]
    if len(grids) > 1:
        training["grids"] = grids
    if getattr(data, "prompts", None) is not None:
        training |= {"prompts": data.prompts, "max_prompt": data.max_prompt}
    if module.total_steps is not None:
        training["stage"] = module.built_schedule.stage(step)
    lora = adaptation(module.net)
    return Description(
        model=module.net.config(),
        grid=None if manifest is None else tuple(manifest.grid),
        tokenizer=None if manifest is None else dict(manifest.tokenizer),
        training=training,
        lora=None if lora is None else lora.to_dict(),
    )
