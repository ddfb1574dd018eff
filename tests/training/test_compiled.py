"""Compiled blocks train as eager ones do."""

from pathlib import Path

import pytest
import torch
from training_toys import STEPS, Losses, fit, make_module

from flashar_pl.layers.compiled import PARTS
from flashar_pl.layers.transformer import Block
from flashar_pl.training import compiled
from flashar_pl.training.compiled import CompileBlocks
from flashar_pl.training.sharded.strategy import ShardedStrategy


class Seen(CompileBlocks):
    """Counts the batches that compiled parts train on."""

    calls = 0

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        blocks = [block for block in pl_module.modules() if isinstance(block, Block)]
        self.calls += all(name in vars(block) for block in blocks for name in PARTS)

    def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
        assert not any(name in vars(block) for block in pl_module.modules() for name in PARTS)


@pytest.mark.slow
def test_losses_of_compiled_blocks(tmp_path: Path, toy_shards: str) -> None:
    """Both stages, with a validation on the way, on parameters that are cut. Guards parts that are compiled and not
    run, or left behind."""
    found = []
    for callbacks in ([], [Seen()]):
        losses = Losses()
        module = fit(
            tmp_path / str(len(found)), toy_shards, make_module(dropout=False), callbacks=[losses, *callbacks],
            strategy=ShardedStrategy(),
            limit_val_batches=1.0, val_check_interval=3, check_val_every_n_epoch=None,
        )  # fmt: skip
        found.append(losses.seen)
    assert callbacks[0].calls == STEPS
    assert found[1].keys() == found[0].keys()
    for step, loss in found[0].items():
        assert found[1][step] == pytest.approx(loss, rel=1e-4)
    assert not any(name in vars(block) for block in module.modules() for name in PARTS)


def test_without_a_compiler_training_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_shards: str) -> None:
    """Guards a machine without a C++ compiler, which would end the run at its first step."""

    def broken(function: object, **options: object) -> object:
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\n\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiled.refusal(torch.device("cpu")) == "no C++ compiler"
    losses = Losses()
    with pytest.warns(UserWarning, match="not compiled, training goes on without: no C.. compiler"):
        fit(tmp_path, toy_shards, make_module(), callbacks=[losses, CompileBlocks()], max_steps=1)
    assert losses.seen
