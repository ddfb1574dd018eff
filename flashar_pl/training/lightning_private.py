"""The one private name of Lightning that this package touches. `tests/test_private_names.py` says when it is gone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy


def ddp_options(strategy: DDPStrategy) -> dict[str, Any]:
    """Arguments for torch's DistributedDataParallel, to read and to complete before the model is wrapped.

    A strategy that Lightning makes from `trainer.strategy: ddp` or `auto` takes them in its constructor only, and that
    has run when the model says that it freezes parameters.
    """
    return strategy._ddp_kwargs
