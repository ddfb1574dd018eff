"""Two real gloo processes against one: weights across the stage switch, validation, and the checkpoint between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Pair
from training_toys import ValidationConfig, fit, make_data, make_module

from flashar_pl.training.measured import join_predictions

VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 5, "check_val_every_n_epoch": None}


def module(classifier: str, **overrides):
    """No dropout: the ranks' masks would differ from those of one process."""
    config = ValidationConfig(samples=7, sample_batch=2, grid_images=3, features=classifier, cfg_scale=1.5)
    return make_module(dropout=False, ema_decay=0.5, validation=config, **overrides)


def train(shards: str, classifier: str, out: str) -> dict[str, Any]:
    """This rank's weights and results."""
    trained = fit(
        Path(out), shards, module(classifier), devices=2, data={"validation_batch_size": 4}, **VALIDATING,
    )  # fmt: skip
    trainer = trained.trainer
    results = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.save_checkpoint(Path(out) / "end.ckpt")
    record = {"weights": trained.state_dict(), "results": results, "drawn": torch.rand(4)}
    parts = trainer.predict(trained, datamodule=make_data(shards, validation_batch_size=4))
    return record | {name: torch.from_numpy(values) for name, values in join_predictions(parts).items()}


@pytest.fixture(scope="module")
def both(pair: Pair, tmp_path_factory, toy_shards: str, toy_classifier: str):
    """(directory, records of the two ranks, the same run in this process)."""
    out = tmp_path_factory.mktemp("two")
    records = pair(train, toy_shards, toy_classifier, str(out))
    alone = fit(
        tmp_path_factory.mktemp("one"), toy_shards, module(toy_classifier), data={"validation_batch_size": 4},
        **VALIDATING,
    )  # fmt: skip
    return out, records, alone


def test_ranks_agree_exactly(both) -> None:
    """Frozen before the wrap, a parameter would drift apart on the ranks once it trains, without an error."""
    _, (first, second), _ = both
    assert first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


def test_weights_equal_those_of_one_process(both) -> None:
    """Same global batches, ten steps, the switch after two."""
    _, (first, _), alone = both
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_validation_does_not_depend_on_the_ranks(both) -> None:
    """13 images and 7 samples over two ranks: averages of rank averages, or padding that counts, would be off."""
    _, records, alone = both
    names = [name for name in alone.trainer.callback_metrics if name.startswith("val/")]
    assert {"val/nll", "val/gate_mean", "val/fid", "val/accuracy"} <= set(names)
    for name in names:
        wanted = float(alone.trainer.callback_metrics[name])
        assert records[0]["results"][name] == records[1]["results"][name], name
        assert records[0]["results"][name] == pytest.approx(wanted, rel=2e-3, abs=1e-4), name


def test_predictions_count_every_image_once(both, toy_shards: str) -> None:
    """7 images over two ranks: the padding of a rank's last batch must not be counted."""
    _, records, alone = both
    [part, *rest] = alone.trainer.predict(alone, datamodule=make_data(toy_shards, validation_batch_size=8))
    assert not rest
    for record in records:
        assert record["index"].tolist() == list(range(7))
        torch.testing.assert_close(record["nll"], part["nll"][part["valid"]], atol=1e-4, rtol=2e-3)


def test_ranks_draw_different_numbers(both) -> None:
    """With one seed everywhere both ranks would drop the same units."""
    _, (first, second), _ = both
    assert not torch.equal(first["drawn"], second["drawn"])


def test_checkpoint_of_two_ranks_continues_on_one(both, toy_shards: str, toy_classifier: str, tmp_path: Path) -> None:
    out, (first, _), _ = both
    ranks = torch.load(out / "end.ckpt", weights_only=True)["callbacks"]["RandomState"]["ranks"]
    assert len(ranks) == 2
    assert not torch.equal(ranks[0]["torch"], ranks[1]["torch"])
    continued = fit(tmp_path, toy_shards, module(toy_classifier), ckpt_path=out / "end.ckpt", max_steps=12)
    assert continued.trainer.global_step == 12
    assert continued.total_steps == 10  # the rate is 0 behind the planned end, so nothing moves
    for name, value in first["weights"].items():
        if name.startswith("net."):
            assert torch.equal(continued.state_dict()[name], value), name
