"""`flashar fit`, `validate`, `test`, `predict`: the doors to LightningCLI. Lightning is imported when one is called."""

from __future__ import annotations

import sys


def fit(verb: str, argv: list[str]) -> int:
    """Run a verb (fit, validate, test, predict) of LightningCLI on what the configuration says; the exit code.

    Raises:
        ValueError: wrong configuration, data or checkpoint.
    """
    if not argv:
        raise ValueError(
            f"flashar {verb} needs a configuration: --config experiments/demo_raster.yaml, or --checkpoint of a "
            f"checkpoint. See flashar {verb} --help."
        )
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from flashar_pl.training.lightning_cli import ExperimentCLI

    try:
        ExperimentCLI(verb, argv).run()
    except MisconfigurationException as error:
        if "No supported gpu backend" in str(error):
            raise ValueError(
                "the configuration asks for GPUs (trainer.accelerator: gpu) and torch finds none. On another machine: "
                "--trainer.accelerator cpu --trainer.devices 1 --trainer.precision 32-true, for small models only."
            ) from error
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        raise ValueError(f"the checkpoint does not fit the model. {' '.join(str(error).split())[:600]}") from error
    except SystemExit as end:  # --help and --print_config
        if end.code not in (None, 0):
            print(f"flashar {verb} ended with exit code {end.code}", file=sys.stderr)
            return end.code if isinstance(end.code, int) else 1
    return 0
