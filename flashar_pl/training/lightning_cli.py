"""`flashar fit | validate | test | predict`: LightningCLI with a run directory, stored configuration and short errors.

A run directory (`trainer.default_root_dir`) holds config.yaml, TensorBoard events and checkpoints/. Checkpoints carry
the full configuration under "flashar_config"; a run that continues takes it as its defaults.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import typing
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import DefaultHelpFormatter, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from flashar_pl.training.checks import check_initial_file
from flashar_pl.training.cli_words import check_sections, checkpoint_of, configs_first, explain, nested_keys
from flashar_pl.training.data_choice import choose_data, with_class
from flashar_pl.training.logger import RunLogger
from flashar_pl.training.progress import RunProgress
from flashar_pl.training.stored_config import (
    CONFIG_KEY,
    DEFAULT_ROOT,
    check_run_directory,
    check_same_data,
    check_same_model,
    differences,
    plain,
    read_config,
    run_directory,
)
from flashar_pl.training.strategies import check_checkpoint_kind

NOISE = (
    "litlogger",
    "litmodels",
    "available: ",
    "does not have many workers",
    "LeafSpec",
    "Seed set to",
    "`weights_only` was not set",
    "exists and is not empty",
)
VERBS = {
    "fit": "Train a raster model, or post-train FlashAR from one (give model.flashar and model.init_from).\n\n"
    "example:\n  flashar fit --config experiments/demo_raster.yaml\n"
    "  flashar fit --ckpt_path runs/demo/raster/checkpoints/last.ckpt    (continue a run that was stopped)\n"
    "  flashar fit --model.flashar.help    (branch layer, fusion, corner; --model.lora.help: LoRA)\n\n"
    "Options win over files, files over the configuration of the checkpoint that is continued. A run keeps the\n"
    "schedule it was started with; to train longer, start a new one with --model.init_from CHECKPOINT.",
    "validate": "Losses, likelihood and, where configured, FID and samples on the validation split.\n\n"
    "example:\n  flashar validate --ckpt_path runs/demo/flashar/checkpoints/last.ckpt\n\n"
    "The configuration comes out of the checkpoint; options change it.",
    "test": "Losses, likelihood and, where configured, FID and samples on the test split.\n\n"
    "example:\n  flashar test --ckpt_path runs/demo/flashar/checkpoints/last.ckpt",
    "predict": "Likelihood of every test image, written as .npz into the run directory.\n\n"
    "example:\n  flashar predict --ckpt_path runs/demo/flashar/checkpoints/last.ckpt",
}
"""What each verb does, for its --help."""


class KeepConfig(SaveConfigCallback):
    """Writes config.yaml into the run directory of a fit, and the same text into every checkpoint."""

    def __init__(
        self, *args: Any, data_class: type[LightningDataModule], default_data_class: type, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.data_class, self.default_data_class = data_class, default_data_class

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.already_saved:
            return
        directory = trainer.log_dir  # every rank asks: it is broadcast
        if trainer.is_global_zero and directory is not None:
            path = Path(directory) / self.config_filename
            text = self.text()
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_text(encoding="utf-8") != text:
                path.rename(free_name(path))  # a continued run keeps the configuration it had before
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        self.already_saved = True

    def text(self) -> str:
        """The effective configuration as YAML, without the options of one call."""
        values = plain(self.parser.dump(self.config, skip_none=False, format="yaml"))
        return yaml.safe_dump(with_class(values, self.data_class, self.default_data_class), sort_keys=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = self.text()


def free_name(path: Path) -> Path:
    """`path`, or with a number before its suffix where something is already."""
    if not path.exists():
        return path
    n = 1
    while path.with_name(f"{path.stem}.{n}{path.suffix}").exists():
        n += 1
    return path.with_name(f"{path.stem}.{n}{path.suffix}")


class ExperimentCLI(LightningCLI):
    """LightningCLI for one module class; see the module's docstring.

    Args:
        model_class: the LightningModule.
        data_class: the LightningDataModule where the configuration names no other.
        argv: verb and options. `--config` files come first whatever their place, so that options win over them.

    Raises:
        ValueError: an unknown key (the closest ones are named), a wrong value, a run directory that is in use, missing
            shards, a checkpoint without configuration or of another model.
    """

    def __init__(
        self, model_class: type[LightningModule], data_class: type[LightningDataModule], argv: list[str]
    ) -> None:
        self._verb, words = argv[0], argv[1:]
        self._resumed: dict[str, Any] | None = None
        check_sections(words)
        self._checkpoint = checkpoint_of(words)
        _quiet()
        wants_help = any(word in ("--help", "-h") or word.endswith(".help") for word in words)
        set_parsing_settings(docstring_parse_attribute_docstrings=wants_help)  # text under a field is its help; slow
        options = {"exit_on_error": False, "allow_abbrev": False}
        with tempfile.TemporaryDirectory() as folder:
            if self._checkpoint is not None:
                self._resumed = read_config(self._checkpoint)
                stored = Path(folder) / "checkpoint.yaml"
                stored.write_text(yaml.safe_dump(self._resumed), encoding="utf-8")
                words = ["--config", str(stored), *words]
            self._default_data = data_class
            self._data, words = choose_data(configs_first(words), data_class, Path(folder))
            super().__init__(
                model_class,
                self._data,
                save_config_callback=KeepConfig,
                save_config_kwargs={"data_class": self._data, "default_data_class": self._default_data},
                trainer_defaults={"default_root_dir": DEFAULT_ROOT, "enable_model_summary": False},
                seed_everything_default=0,
                parser_kwargs={**options, "formatter_class": _RunHelp, self._verb: options | _help(self._verb)},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=[self._verb, *words],
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb of this call only: a parser for each of the four would take four times as long to build."""
        return {self._verb: LightningCLI.subcommands()[self._verb]}

    # --- parsing ----------------------------------------------------------------------------------------------------

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise ValueError(explain(str(error), self.known_keys())) from error

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyper-parameters win over YAML and command line."""

    def known_keys(self) -> list[str]:
        """Every configuration key of the verb, fields of optional parts included."""
        keys = {action.dest for action in self._subcommand_parsers[self._verb]._actions}
        for group, owner in (("model", self._model_class), ("data", self._datamodule_class)):
            keys |= nested_keys(group, typing.get_type_hints(owner.__init__))
        return sorted(key for key in keys if key not in ("help", "print_config"))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(explain(str(error), [])) from error

    # --- before anything long ---------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self._verb]
        root = run_directory(config.trainer)
        self._new_directory: Path | None = None
        if self._verb == "fit" and not config.trainer.fast_dev_run and getattr(rank_zero_only, "rank", 0) == 0:
            check_run_directory(root, self._checkpoint)
            self._new_directory = None if root.exists() else root
        if self._resumed is not None:
            self._print_differences(self._resumed)

    def _print_differences(self, stored: dict[str, Any]) -> None:
        parser = self._subcommand_parsers[self._verb]
        now = plain(parser.dump(self.config[self._verb], skip_none=False, format="yaml"))
        lines = differences(stored, with_class(now, self._data, self._default_data))
        rank_zero_info(f"Configuration of {self._checkpoint}" + (", with these changes:" if lines else ", unchanged."))
        for line in lines:
            rank_zero_info(f"  {line}")

    def after_instantiate_classes(self) -> None:
        manifest = getattr(self.datamodule, "manifest", None)  # missing shards show now
        if self._checkpoint is not None:
            check_same_model(self._checkpoint, self.model.model_config, self.model.lora)
            check_checkpoint_kind(self._checkpoint, self.trainer.strategy)
            if manifest is not None:
                check_same_data(self._checkpoint, manifest.name, manifest.grid)
        elif self.model.init_from is not None:
            check_initial_file(self.model.init_from)
        elif self._verb != "fit":
            rank_zero_info("Neither --ckpt_path nor model.init_from is given: the model has random weights.")
        features = self.model.validation.features
        if features is not None and not Path(features).expanduser().exists():
            raise ValueError(
                f"model.validation.features: nothing at {features}. For tiny images a classifier's features do: "
                f"flashar classifier --data {getattr(self.datamodule, 'location', 'SHARDS')} --out {features}"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Event files go straight into the run directory; only a fit writes any."""
        config = self._get(self.config_init, "trainer")
        if config.get("logger") in (None, True):
            root = config["default_root_dir"]
            logger = RunLogger(root, name="", version="", default_hp_metric=False)
            kwargs["logger"] = logger if self._verb == "fit" else False
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        bar = config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks)
        if bar and self._verb == "fit":
            kwargs["callbacks"] = [*callbacks, RunProgress()]
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as end:  # Lightning turns Ctrl-C into exit(1); a run that was asked to stop has its own code
            if self.trainer.interrupted and end.code == 1:
                if self._verb == "fit":
                    rank_zero_info(_where_to_continue(self.trainer))
                raise KeyboardInterrupt from None
            raise
        except (ValueError, MisconfigurationException):
            if self._new_directory is not None and self.trainer.global_step == 0:
                shutil.rmtree(self._new_directory, ignore_errors=True)  # made by this call, nothing was trained
            raise

    def predict(self, **arguments: Any) -> None:
        """Write the likelihood of every test image, one .npz per rank with "index" (N,) and "nll" (N,) in nats."""
        parts: list[Any] = self.trainer.predict(**arguments) or []
        keep = [part["valid"].cpu() for part in parts]  # (B,) each
        joined = {
            name: torch.cat([part[name].cpu()[k] for part, k in zip(parts, keep, strict=True)]).numpy()
            for name in ("index", "nll")
        }
        root = Path(self.trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        path = free_name(root / f"predictions_rank{self.trainer.global_rank}.npz")
        np.savez(path, index=joined["index"], nll=joined["nll"])
        print(f"{len(joined['nll'])} images, mean {joined['nll'].mean():.4f} nats per image: {path}")


def _where_to_continue(trainer: Trainer) -> str:
    """What an interrupted run has kept."""
    folders = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks}
    kept = [path for folder in folders if folder is not None for path in Path(folder).glob("*.ckpt")]
    if not kept:
        return f"Interrupted at step {trainer.global_step}, before the first checkpoint."
    newest, here = max(kept, key=lambda path: path.stat().st_mtime), Path.cwd()
    newest = newest.relative_to(here) if newest.is_relative_to(here) else newest
    return f"Interrupted at step {trainer.global_step}. Continue with: flashar fit --ckpt_path {newest}"


def _help(verb: str) -> dict[str, Any]:
    """Parser arguments for a readable head of the help text."""
    return {
        "usage": f"flashar {verb} [--config FILE.yaml ...] [--ckpt_path PATH] [--key value ...]",
        "description": VERBS[verb],
    }


class _RunHelp(DefaultHelpFormatter):
    """The description keeps its lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(part in text for part in NOISE)


def _quiet() -> None:
    """Hide Lightning's advertisements and hardware lines; its own messages and real warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(f, _Filter) for f in handler.filters):
                handler.addFilter(_Filter())
    for text in NOISE:
        warnings.filterwarnings("ignore", message=f".*{text}.*")
