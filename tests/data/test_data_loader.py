"""Loaders: real workers, exact places, no trace in the global random state."""

import gc
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_shards import GRID, VOCABULARY, in_pieces, sample_codes, write_classes

from flashar_pl.backbones.condition import Batch, TextFeatures
from flashar_pl.data.batches import Cut, EvaluationBatches, TrainingBatches, evaluation_batches, training_batches
from flashar_pl.data.loader import EvaluationLoader, TrainingLoader
from flashar_pl.data.shards import ConditionSpec, Manifest, ShardWriter

BATCH = 12


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Manifest:
    return write_classes(tmp_path_factory.mktemp("data") / "toy", crops=3)


def training(manifest: Manifest, rank: int = 0, ranks: int = 1, seed: int = 0) -> TrainingBatches:
    return training_batches([manifest], BATCH, seed, 4, Cut(rank, ranks))


def evaluation(manifest: Manifest, batch_size: int, split: str = "validation", **cut) -> EvaluationBatches:
    return evaluation_batches([manifest], split, batch_size, None, Cut(**cut))


def rows(batch: Batch, split: str = "train") -> list[tuple[int, int]]:
    """(sample, crop) of each row, read back from the codes and compared with the condition."""
    index = batch.index.numpy()
    crop = [
        next(k for k in range(3) if np.array_equal(codes.numpy(), sample_codes(np.array([i]), 3, split)[0, k]))
        for codes, i in zip(batch.codes, index, strict=True)
    ]
    assert batch.codes.dtype == batch.condition.dtype == batch.index.dtype == torch.int64
    assert batch.condition.tolist() == (index % 5).tolist()
    return list(zip(index.tolist(), crop, strict=True))


def epoch_rows(loader: TrainingLoader) -> list[list[tuple[int, int]]]:
    return [rows(batch) for batch in loader]


def test_an_epoch_shows_each_sample_at_most_once_and_epochs_differ(toy: Manifest) -> None:
    loader = TrainingLoader(training(toy))
    first, second = epoch_rows(loader), epoch_rows(loader)
    assert len(first) == len(second) == len(loader) == 107 // BATCH
    for epoch in (first, second):
        seen = [i for batch in epoch for i, _ in batch]
        assert len(set(seen)) == len(seen) == 96
    assert first != second
    assert {crop for batch in first for _, crop in batch} == {0, 1, 2}
    crops = [dict(row for batch in epoch for row in batch) for epoch in (first, second)]
    shared = crops[0].keys() & crops[1].keys()
    assert 0.1 < np.mean([crops[0][i] == crops[1][i] for i in shared]) < 0.6, "a new crop each epoch"


def test_two_workers_give_what_none_gives_and_ranks_add_up(toy: Manifest) -> None:
    alone = TrainingLoader(training(toy))
    ranks = [TrainingLoader(training(toy, rank, 2), num_workers=2) for rank in range(2)]
    for _ in range(2):
        expected = epoch_rows(alone)
        parts = [epoch_rows(loader) for loader in ranks]
        assert [a + b for a, b in zip(*parts, strict=True)] == expected


@pytest.mark.parametrize("stops", [(3, 2, 3), (1, 8, 4), (8, 1, 9)])
def test_resume_on_other_ranks_and_workers_is_exact(toy: Manifest, stops: tuple[int, ...]) -> None:
    """2 ranks x 2 workers -> 1 x 0 -> 2 x 1, stopped in the middle of epochs, equals the uninterrupted run."""
    plain = TrainingLoader(training(toy))
    expected = [batch for _ in range(3) for batch in epoch_rows(plain)]
    pieces = zip(stops, (2, 1, 2), (2, 0, 1), strict=True)
    seen = in_pieces(lambda rank, ranks: training(toy, rank, ranks), rows, pieces)
    assert seen == expected[: sum(stops)]


def test_state_counts_batches_handed_out_not_prefetched(toy: Manifest) -> None:
    loader = TrainingLoader(training(toy), num_workers=2)
    iterator = iter(loader)
    next(iterator)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (0, 1)


def test_state_never_runs_ahead_of_training(toy: Manifest) -> None:
    """Guards a checkpoint written when a step fails: its batch must come again."""
    done = 0
    loader = TrainingLoader(training(toy), processed=lambda: done)
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict()["position"] == 0
    done = 1
    next(iterator)
    assert loader.state_dict()["position"] == 1


def test_trainer_protocol(toy: Manifest) -> None:
    """The Trainer calls iter() before load_state_dict and once more after it, and expects a whole epoch's length."""
    reference = TrainingLoader(training(toy))
    expected = [epoch_rows(reference) for _ in range(4)]
    loader = TrainingLoader(training(toy))
    iter(loader)
    loader.load_state_dict(loader.state_dict() | {"epoch": 2, "position": 5})
    iterator = iter(loader)
    assert len(loader) == 8
    assert [rows(batch) for batch in iterator] == expected[2][5:]
    assert epoch_rows(loader) == expected[3], "a finished epoch is followed by the next"
    assert not hasattr(loader, "sampler"), "the Trainer would set its own epoch"


def test_resuming_another_order_in_mid_epoch_is_an_error(toy: Manifest) -> None:
    loader = TrainingLoader(training(toy))
    next(iter(loader))
    state = loader.state_dict()
    other = TrainingLoader(training(toy, seed=9))
    with pytest.raises(ValueError, match="batch 1 of epoch 0 of an order with seed=0; this run has seed=9"):
        other.load_state_dict(state)
    other.load_state_dict(state | {"epoch": 1, "position": 0})
    assert other.epoch == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(toy: Manifest, workers: int) -> None:
    """Guards exact resume with dropout: a pass of a plain DataLoader draws from the global generator."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(TrainingLoader(training(toy), workers))
    list(EvaluationLoader(evaluation(toy, 8), workers))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_evaluation_shows_each_sample_once_and_marks_the_rest(toy: Manifest, ranks: int, workers: int) -> None:
    seen = []
    for rank in range(ranks):
        batches = evaluation(toy, 8, rank=rank, ranks=ranks)
        loader = EvaluationLoader(batches, workers)
        for _ in range(2):
            got = list(loader)
            assert len(got) == len(loader) == 3
            assert [len(batch) for batch in got] == [8 // ranks] * 3
        for batch in got:
            seen += [row for row, valid in zip(rows(batch, "validation"), batch.valid.tolist(), strict=True) if valid]
    assert sorted(seen) == [(i, 0) for i in range(23)], "every sample once, first crop"


def test_evaluation_takes_the_crop_of_the_manifest(tmp_path: Path) -> None:
    """Guards the centre of ten crops, and manifests written before there was a choice."""
    manifest = write_classes(tmp_path / "toy", crops=3, evaluation_crop=2)
    assert Manifest.load(tmp_path / "toy").evaluation_crop == 2
    batches = evaluation(manifest, 23)
    assert rows(batches[0], "validation") == [(i, 2) for i in range(23)]
    file = tmp_path / "toy" / "manifest.json"
    text = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in text.items() if name != "evaluation_crop"}))
    assert Manifest.load(tmp_path / "toy").evaluation_crop == 0
    file.write_text(json.dumps(text | {"evaluation_crop": 3}))
    with pytest.raises(ValueError, match=r"evaluation_crop is 3; expected 0 \.\. 2"):
        Manifest.load(tmp_path / "toy")


def test_text_conditions(tmp_path: Path) -> None:
    codes, ids = sample_codes(np.arange(6)), range(6)
    common = {"name": "t", "tokenizer": {}, "grid": GRID, "vocabulary": VOCABULARY}
    with ShardWriter(tmp_path / "a", condition=ConditionSpec("text"), **common) as writer:
        writer.write("test", codes, ids=ids, texts=["x" * (i + 1) for i in range(6)])
    batches = evaluation(writer.manifest, 4, "test", encoder=lambda manifest: lambda text: torch.arange(len(text)))
    assert [len(t) for t in batches[1].condition] == [5, 6, 6, 6]

    spec = ConditionSpec("text-features", length=3, width=2)
    with ShardWriter(tmp_path / "b", condition=spec, **common) as writer:
        writer.write("test", codes, ids=ids, features=[np.ones((1 + i % 3, 2), np.float32) for i in range(6)])
    batch = evaluation(writer.manifest, 3, "test")[0]
    assert isinstance(batch.condition, TextFeatures)
    assert batch.condition.mask.tolist() == [[False, False, True], [False, True, True], [True, True, True]]
    assert batch.condition.features.dtype == torch.float32


def test_a_pass_that_is_left_stops_its_workers_at_once(toy: Manifest) -> None:
    """Guards against workers that hold up the end of a run for five seconds each."""
    loader = TrainingLoader(training(toy), num_workers=2)
    there = set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    workers = set(multiprocessing.active_children()) - there
    assert len(workers) == 2
    start = time.monotonic()
    del batches
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - start < 4
    assert len(list(loader)) == 7, "the loader starts again where it stands"
