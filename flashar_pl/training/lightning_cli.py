"""`flashar fit | validate | test | predict`: LightningCLI with a run directory, stored configuration and short errors.

A run directory (`trainer.default_root_dir`) holds config.yaml, TensorBoard events and checkpoints/. A run that goes on
takes that file as its defaults if this user's command wrote it. Checkpoints carry the same text as "flashar_config", of
which numbers and known words are taken.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse import DefaultHelpFormatter, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from flashar_pl.backbones import describe_backbone
from flashar_pl.checkpoints.repositories import locate
from flashar_pl.checkpoints.runs import RunCheckpoint
from flashar_pl.data.datamodules import CodesDataModule, ImageNetDataModule, TextImageDataModule
from flashar_pl.data.manifest import NoShards
from flashar_pl.files import replacing, write_text
from flashar_pl.mark import marked
from flashar_pl.options import HubOptions
from flashar_pl.ranks import leave_group_at_exit
from flashar_pl.training.carried import carried, check_place, forget_strange_paths, left_out
from flashar_pl.training.checks import check_features, how_to_make, initial_weights
from flashar_pl.training.data_sizes import with_data_sizes
from flashar_pl.training.logger import RunLogger, show_settings
from flashar_pl.training.measured import join_predictions, report
from flashar_pl.training.module import FlashARModule
from flashar_pl.training.progress import RunProgress, quiet_lightning
from flashar_pl.training.run_directory import check_own, continued, is_finished, only_one, where_to_continue
from flashar_pl.training.stored_config import (
    CONFIG_KEY,
    check_same_data,
    check_same_model,
    config_beside,
    differences,
    flatten,
    own_config,
    read_config,
)
from flashar_pl.training.strategies import check_checkpoint_kind
from flashar_pl.training.words import DEFAULT_DATA, Words, check_keys, data_classes, explain

DATA: dict[str, type[LightningDataModule]] = {
    kind.__name__: kind for kind in (CodesDataModule, ImageNetDataModule, TextImageDataModule)
}
"""Data modules that a YAML may call by their short names."""
DEFAULT_ROOT = "runs/run"
"""Run directory where none is given."""
TERMINATED = 143
"""Exit code of a run that SIGTERM has ended, as of any other process."""
VERBS = {
    "fit": "Train a raster model, or post-train FlashAR from one (give model.flashar and model.init_from).\n\n"
    "example:\n  flashar fit --config experiments/demo_raster.yaml\n"
    "  flashar fit --checkpoint runs/demo/raster/checkpoints/last.ckpt    # continue a run that was stopped\n"
    "  flashar fit --data.help CodesDataModule    # shards, batch size; also ImageNetDataModule ...\n"
    "  flashar fit --model.flashar.help    # branch layer, fusion, corner; --model.lora.help: LoRA\n\n"
    "Options win over files, files over the configuration of the checkpoint that is continued. A run keeps the\n"
    "schedule it was started with; to train longer, start a new one with --model.init_from CHECKPOINT.",
    "validate": "Losses, likelihood and, where configured, FID and samples on the validation split:\n"
    "a table, and validate.json in the run directory.\n\n"
    "example:\n  flashar validate --checkpoint runs/demo/flashar/checkpoints/last.ckpt\n\n"
    "The configuration is that of the checkpoint's run directory, if it is yours. Of a file alone only numbers and\n"
    "known words are taken: say where the data is, --data.shards DIRECTORY. Options change it.",
    "test": "Losses, likelihood and, where configured, FID and samples on the test split:\n"
    "a table, and test.json in the run directory.\n\n"
    "example:\n  flashar test --checkpoint runs/demo/flashar/checkpoints/last.ckpt",
    "predict": "Likelihood of every test image, written as .npz into the run directory.\n\n"
    "example:\n  flashar predict --checkpoint runs/demo/flashar/checkpoints/last.ckpt",
}
"""What each verb does, for its --help."""


class KeepConfig(SaveConfigCallback):
    """Writes config.yaml into the run directory of a fit, and the same text into every checkpoint."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **_: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self._shown = False
        """Whether the run has had this configuration before."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        path, text = Path(trainer.default_root_dir) / self.config_filename, marked(self.text())
        self._shown = path.exists() and path.read_text(encoding="utf-8") == text
        if path.exists() and not self._shown:
            path.rename(free_name(path))  # a continued run keeps the configuration it had before
        write_text(path, text)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not (self._shown and trainer.global_step):
            show_settings(trainer, self.text(), flatten(plain(self.parser, self.config)))

    def text(self) -> str:
        return yaml.safe_dump(plain(self.parser, self.config), sort_keys=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = self.text()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        forget_strange_paths(checkpoint, [getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks])


def plain(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """A parsed configuration as nested plain values, without the options of one call and what follows from others."""
    values: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_none=False, format="yaml"))
    for name in ("config", "ckpt_path", "download"):
        values.pop(name, None)
    data = values["data"]["class_path"]  # the shortest path that leads to it
    if data.startswith("flashar_pl.") and data.endswith(f".{DEFAULT_DATA}"):
        values["data"] = values["data"]["init_args"]
    logger, root = values["trainer"]["logger"], values["trainer"]["default_root_dir"]
    for entry in logger if isinstance(logger, list) else [logger]:
        if isinstance(entry, dict) and entry.get("init_args", {}).get("save_dir") == root:
            del entry["init_args"]["save_dir"]
    return values


def free_name(path: Path) -> Path:
    """`path`, or with a number before its suffix where something is already."""
    numbered = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


class ExperimentCLI(LightningCLI):
    """LightningCLI for one verb on `FlashARModule`: parses, checks and builds; `run` does the rest.

    Args:
        verb: fit, validate, test or predict.
        argv: options. `--config` files come first whatever their place, so that options win over them.
        parse_only: stop after parsing: nothing is built, and names of files are not looked up.

    Raises:
        ValueError: an unknown key (the closest ones are named), a wrong value, a run directory that is in use, missing
            shards, a checkpoint without configuration or of another model.
    """

    def __init__(self, verb: str, argv: list[str], parse_only: bool = False) -> None:
        self.verb, self.parse_only = verb, parse_only
        words = Words.read(argv)
        self.typed, self.checkpoint = words, words.checkpoint()
        self.stored: dict[str, Any] = {}
        self.foreign: dict[str, Any] | None = None
        if self.checkpoint is not None:
            self.stored = self._stored(self.checkpoint, words)
            words = words.before(self.stored)
        check_keys(words, FlashARModule, DATA)
        if verb == "fit" and not (parse_only or words.wants_help):
            words = with_data_sizes(words)
        self.words = words.with_places(str(words.given("trainer.default_root_dir") or DEFAULT_ROOT))
        quiet_lightning()
        set_parsing_settings(docstring_parse_attribute_docstrings=words.wants_help)  # text under a field; slow
        super().__init__(
            FlashARModule,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=KeepConfig if verb == "fit" else None,
            trainer_defaults={"default_root_dir": DEFAULT_ROOT, "enable_model_summary": False},
            seed_everything_default=0,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "formatter_class": _RunHelp,
                "usage": f"flashar {verb} [--config FILE.yaml ...] [--checkpoint PATH] [--key value ...]",
                "description": VERBS[verb],
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=False,
            args=self.words.parsed(),
        )

    def _stored(self, path: str, words: Words) -> dict[str, Any]:
        """What a continued run takes over: the whole configuration of a run directory that this user's command wrote,
        or else what a checkpoint alone may say."""
        if (stored := own_config(path)) is not None:
            return stored
        self.foreign = read_config(path)
        beside = config_beside(path)
        hint = f"take it all: --config {beside or 'FILE'}"
        check_place(path, hint, self.foreign, words)
        *_, data = data_classes(words, DATA)
        model = RunCheckpoint(path).description.model.get("backbone", {})
        return carried(path, self.foreign, model, FlashARModule, data, words)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            "--checkpoint",
            type=str | None,
            default=None,
            help="Checkpoint to continue or measure; --checkpoint is the same.",
        )
        parser.add_class_arguments(HubOptions, instantiate=False)
        data: dict[str, Any] = {"class_path": f"flashar_pl.data.datamodules.{DEFAULT_DATA}"}
        if self.parse_only:
            data["init_args"] = {"shards": ""}  # a run needs them, its arithmetic does not
        parser.set_defaults({"data": data})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise ValueError(explain(str(error))) from error
        seed = self.config.seed_everything
        if seed is True or not 0 <= int(seed or 0) < 2**32:
            raise ValueError(
                f"seed_everything is {str(seed).lower()}; expected a number from 0 to 4294967295, or false for none: "
                "true is another seed on each device and at each start."
            )
        self.values = plain(parser, self.config)
        if self.parse_only:
            self.config["seed_everything"] = False

    # --- before anything long ---------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        if self.parse_only:
            return
        self._directory = Path(self.config.trainer.default_root_dir or DEFAULT_ROOT).expanduser()
        places = (self._directory, *self._directory.parents)
        self._absent = [place for place in places if not place.exists()]  # what this run makes, innermost first
        if self.verb == "fit" and not self.config.trainer.fast_dev_run:
            self._find_run()
        self._say_what_is_taken()
        if self.config.download:
            self._fetch()
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(explain(str(error))) from error
        self._check_files()

    def _fetch(self) -> None:
        """Bring what the model starts from into the Hub cache, where everything else looks for it."""
        model = self.values["model"]
        for named in (model["init_from"], model["backbone"].get("directory")):
            if named is not None:
                locate(named, download=True)

    def _find_run(self) -> None:
        """Continue the run that is in the run directory, if this command is its own. SystemExit if it is finished."""
        if self.checkpoint is not None:
            return check_own(self._directory, self.checkpoint)
        self.checkpoint = continued(self._directory, self.values, [key for key, _ in self.typed.pairs()])
        if self.checkpoint is not None:
            self.stored = self.values
            rank_zero_info(f"The run in {self._directory} continues from {self.checkpoint}.")
            if is_finished(self.checkpoint):
                rank_zero_info(
                    f"The run in {self._directory} has all its steps, in {self.checkpoint}: nothing is left to do. For "
                    "a new run choose another --trainer.default_root_dir."
                )
                raise SystemExit(0)

    def _say_what_is_taken(self) -> None:
        """What a continued run has of its checkpoint's settings: what is changed, or what is left out."""
        if self.checkpoint is None:
            return
        if self.foreign is not None:
            lines = left_out(self.foreign, self.values, self.typed)
            what = ": numbers and known words are taken. Type what you trust of the rest:" if lines else "."
        else:
            lines = differences(self.stored, self.values)
            what = ", with these changes:" if lines else ", unchanged."
        for line in (f"Configuration of {self.checkpoint}{what}", *(f"  {line}" for line in lines)):
            rank_zero_info(line)

    def _check_files(self) -> None:
        """ValueError for files that are missing or do not fit the model, now that it is made."""
        try:
            manifest = getattr(self.datamodule, "manifest", None)  # missing shards show now
        except NoShards as error:
            found, place = error.args
            backbone = describe_backbone(self.model.model_config["backbone"])
            raise ValueError(f"{found} Make them: {how_to_make(place, backbone)}") from error
        if self.checkpoint is not None:
            RunCheckpoint(self.checkpoint).check_whole()
            check_same_model(self.checkpoint, self.model.model_config, self.model.lora)
            check_checkpoint_kind(self.checkpoint, self.trainer.strategy)
            if manifest is not None:
                check_same_data(self.checkpoint, manifest.name, manifest.grid)
        elif self.model.init_from is not None:
            initial_weights(self.model.init_from)
        elif self.verb != "fit":
            rank_zero_info("Neither --checkpoint nor model.init_from is given: the model has random weights.")
        check_features(self.model.validation.features, getattr(self.datamodule, "location", None))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Event files and checkpoints go into the run directory; only a fit writes any."""
        config = self.config_init.trainer
        own_logger = config.logger in (None, True)
        if self.verb != "fit":
            return super().instantiate_trainer(**({"logger": False} if own_logger else {}), **kwargs)
        root = os.path.expanduser(config.default_root_dir)  # as the Trainer does
        if own_logger:
            kwargs["logger"] = RunLogger(root, name="", version="", default_hp_metric=False)
        given = config.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RunProgress())
        if config.enable_checkpointing is not False and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks.append(ModelCheckpoint())
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.dirpath = callback.dirpath or os.path.join(root, "checkpoints")
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    # --- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Fit, validate, test or predict. SystemExit with its code for a run that was asked to stop."""
        leave_group_at_exit()
        first = getattr(rank_zero_only, "rank", 0) == 0  # the trainer may learn its rank when it starts
        if self.verb != "fit" or self.config.trainer.fast_dev_run or not first:
            return self._run()
        with only_one(self._directory, new=bool(self._absent)):
            self._run()

    def _run(self) -> None:
        arguments = {"model": self.model, "datamodule": self.datamodule, "ckpt_path": self.checkpoint}
        try:
            getattr(self.trainer if self.verb == "fit" else self, self.verb)(**arguments, weights_only=True)
        except SIGTERMException:
            raise SystemExit(TERMINATED) from None
        except SystemExit as end:  # Lightning turns Ctrl-C into exit(1); a run that was asked to stop has its own code
            if self.trainer.interrupted and end.code == 1:
                if self.verb == "fit":
                    folders = {getattr(each, "dirpath", None) for each in self.trainer.checkpoint_callbacks}
                    rank_zero_info(where_to_continue(self.trainer.global_step, filter(None, folders)))
                raise KeyboardInterrupt from None
            raise
        except (ValueError, OSError, MisconfigurationException):
            if self._absent and self.verb == "fit" and self.trainer.global_step == 0:  # nothing was trained
                shutil.rmtree(self._directory, ignore_errors=True)
                with suppress(OSError):  # another run is in it
                    for place in self._absent[1:]:
                        place.rmdir()
            raise

    def validate(self, **arguments: Any) -> None:
        """Print rounded numbers and write validate.json or test.json into the run directory."""
        getattr(self.trainer, self.verb)(**arguments, verbose=False)
        if self.trainer.is_global_zero:
            self._report(self.trainer.callback_metrics)

    def _report(self, metrics: Mapping[str, Any]) -> None:
        manifest = getattr(self.datamodule, "manifest", None)
        facts = {"checkpoint": self.checkpoint, "data": None if manifest is None else manifest.name}
        report(self.verb, metrics, free_name(Path(self.trainer.default_root_dir) / f"{self.verb}.json"), facts)

    test = validate

    def predict(self, **arguments: Any) -> None:
        """Write predictions.npz: of every test image its "index" (N,), ascending, and "nll" (N,) in nats."""
        found = join_predictions(self.trainer.predict(**arguments) or [])  # type: ignore[arg-type]
        if self.trainer.is_global_zero:
            path = free_name(Path(self.trainer.default_root_dir) / "predictions.npz")
            with replacing(path) as part, part.open("wb") as file:
                np.savez(file, **found)  # type: ignore[arg-type]
            self._report({"images": len(found["nll"]), "nll": found["nll"].mean()})
            print(f"nll of each image, in nats: {path}")


def parsed_config(argv: list[str]) -> dict[str, Any]:
    """What `flashar fit ARGV` would run: nested plain values, defaults included. Nothing is built.

    Raises:
        ValueError: an unknown key at any depth (the closest ones are named), or a value of the wrong type.
    """
    return ExperimentCLI("fit", argv, parse_only=True).values


class _RunHelp(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The description keeps its lines."""
