"""What distributed strategies need to know about frozen parameters."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, Strategy


def allow_frozen_parameters(strategy: Strategy) -> None:
    """Let DDP skip parameters that are frozen in a stage; call it before the model is wrapped.

    DDP decides at the wrap which parameters it synchronises. So the stages freeze after the wrap, and DDP must look for
    parameters without gradient in every step: frozen before the wrap, a parameter would never be synchronised and the
    ranks would drift apart without an error once it trains. Other strategies are left alone.

    Raises:
        ValueError: the strategy was told explicitly not to look for unused parameters.
    """
    if not isinstance(strategy, DDPStrategy):
        return
    if strategy._ddp_kwargs.setdefault("find_unused_parameters", True) is False:
        raise ValueError(
            "trainer.strategy has find_unused_parameters=False, but stage 1 trains a part of the parameters only; "
            "use trainer.strategy auto or ddp."
        )
