"""The configuration of a fit, checked as a fit checks it, without building model, data or trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

from flashar_pl.training.config import typed_settings
from flashar_pl.training.lightning_cli import ExperimentCLI
from flashar_pl.training.module import FlashARModule
from flashar_pl.training.stored_config import plain


class _Parsed(ExperimentCLI):
    """Stops after parsing."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def after_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parsed_config(words: list[str], data: type[LightningDataModule]) -> dict[str, Any]:
    """What `flashar fit WORDS` would run: nested plain values, defaults included. Names of files are not looked up.

    data: the data module of a configuration that names none.

    Raises:
        ValueError: an unknown key at any depth (the closest ones are named), or a value of the wrong type.
    """
    cli = _Parsed(FlashARModule, data, ["fit", *words])
    parser = cli._subcommand_parsers["fit"]
    return plain(parser.dump(cli.config["fit"], skip_none=False, format="yaml"))


def built_module(model: dict[str, Any]) -> FlashARModule:
    """The module of the `model` part of `parsed_config`, without weights. ValueError for what a fit would refuse."""
    return FlashARModule(**typed_settings(model))
