"""Several grids as one data set: one grid in a batch, and the order, resume and ranks of a single grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_shards import in_pieces

from flashar_pl.backbones.condition import Batch
from flashar_pl.data.batches import Cut, evaluation_batches, training_batches
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.loader import EvaluationLoader, TrainingLoader
from flashar_pl.data.manifest import load_grids
from flashar_pl.data.order import GridOrder, TrainingOrder
from flashar_pl.data.shards import ConditionSpec, Manifest, ShardWriter

VOCABULARY = 97
SIZES = {(3, 4): (50, 7), (4, 3): (29, 0), (2, 6): (41, 5), (1, 2): (6, 2)}
"""Grid -> training and validation samples; the last has no whole batch of 8."""
BATCH, BATCHES = 8, 50 // 8 + 29 // 8 + 41 // 8


def write_grid(out: Path, grid: tuple[int, int], train: int, validation: int, first: int = 0, **changes) -> None:
    """Every cell of a sample holds its label, which is its number from `first` on, of validation one more."""
    options = {"tokenizer": {"kind": "none"}, "vocabulary": VOCABULARY, "crops": 1} | changes
    with ShardWriter(
        out, name="toy", grid=grid, condition=ConditionSpec("class", num_classes=VOCABULARY), block=5, **options
    ) as writer:
        for split, n in (("train", train), ("validation", validation)):
            if n:
                labels = (first + np.arange(n) + (split == "validation")) % VOCABULARY
                codes = np.broadcast_to(labels[:, None, None, None], (n, options["crops"], *grid))
                writer.write(split, codes, ids=np.arange(n), labels=labels)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("grids")
    for k, (grid, sizes) in enumerate(SIZES.items()):
        write_grid(root / f"{grid[0]}x{grid[1]}", grid, *sizes, first=10 * k)
    return root


def training(place: Path, rank: int = 0, ranks: int = 1, seed: int = 0):
    return training_batches(load_grids(str(place)), BATCH, seed, 3, Cut(rank, ranks))


def rows(batch: Batch) -> list[tuple[tuple[int, ...], int]]:
    """(grid, sample number over all grids) of each row; codes and condition belong together."""
    assert torch.equal(batch.codes.flatten(1), batch.condition[:, None].expand(-1, batch.codes[0].numel()))
    return [(tuple(batch.codes.shape[1:]), i) for i in batch.index.tolist()]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**70), st.integers(0, 9), st.data())
def test_every_batch_of_every_grid_once_and_in_its_own_order(counts, seed, epoch, data) -> None:
    """Guards a batch that is shown twice or never, and an order that depends on what was asked before."""
    batch = data.draw(st.integers(1, 3))
    order = GridOrder([TrainingOrder(np.full(n, batch), batch, seed, 2) for n in counts], seed)
    places = [order.place(epoch, g) for g in range(len(order))]
    for k, n in enumerate(counts):
        assert [inner for grid, inner in places if grid == k] == list(range(n))
    other = GridOrder([TrainingOrder(np.full(n, batch), batch, seed, 2) for n in counts], seed)
    for g in data.draw(st.permutations(range(len(order))))[:10]:
        other.place(epoch + 1, g)
        assert other.place(epoch, g) == places[g]


@given(st.integers(0, 2**64), st.integers(1, 30))
def test_grids_are_spread_over_an_epoch(seed: int, n: int) -> None:
    """Guards grids that come one after the other: each half of an epoch has about half of either grid's batches."""
    order = GridOrder([TrainingOrder(np.full(200, 1), 1, seed, 4) for _ in range(2)], seed)
    first = sum(order.place(n, g)[0] for g in range(200))
    assert 60 < first < 140
    assert [order.place(n, g) for g in range(400)] != [order.place(n + 1, g) for g in range(400)]


def test_a_batch_is_of_one_grid_and_a_sample_comes_at_most_once(place) -> None:
    loader = TrainingLoader(training(place))
    epochs = [[rows(batch) for batch in loader] for _ in range(2)]
    for epoch in epochs:
        assert len(epoch) == len(loader) == BATCHES
        assert all(len({grid for grid, _ in batch}) == 1 for batch in epoch)
        seen = [row for batch in epoch for row in batch]
        assert len({i for _, i in seen}) == len(seen) == BATCH * BATCHES, "numbers differ across grids"
        assert {i for _, i in seen} <= set(range(sum(n for n, _ in SIZES.values())))
    assert epochs[0] != epochs[1]


def test_a_grid_alone_has_the_order_of_the_seed_itself(place) -> None:
    """Guards the order of runs that were begun on one grid; of several, each has an order of its own."""
    manifests = load_grids(str(place))
    plain = TrainingOrder(manifests[0].block_sizes("train"), BATCH, 5, 3).batch(0, 0, 0, 1)
    for n, same in ((1, True), (2, False)):
        order = training_batches(manifests[:n], BATCH, 5, 3).grids[0].order
        assert np.array_equal(order.batch(0, 0, 0, 1), plain) == same


def test_resume_on_other_ranks_and_workers_is_exact(place) -> None:
    """2 ranks x 1 worker -> 1 x 0 -> 2 x 0, stopped in the middle of epochs, equals the uninterrupted run."""
    plain = TrainingLoader(training(place))
    expected = [rows(batch) for _ in range(2) for batch in plain]
    seen = in_pieces(lambda rank, ranks: training(place, rank, ranks), rows, ((5, 2, 1), (12, 1, 0), (6, 2, 0)))
    assert seen == expected[:23]


def test_another_set_of_grids_cannot_be_resumed_in_mid_epoch(place, tmp_path) -> None:
    loader = TrainingLoader(training(place))
    next(iter(loader))
    write_grid(tmp_path / "a", (3, 4), 50, 1)
    write_grid(tmp_path / "b", (4, 3), 29, 1)
    with pytest.raises(ValueError, match="of an order with shards="):
        TrainingLoader(training(tmp_path)).load_state_dict(loader.state_dict())


@pytest.mark.parametrize(("limit", "count"), [(None, 14), (6, 6), (1, 1)])
def test_evaluation_shows_each_sample_once_grid_after_grid(place, limit, count) -> None:
    manifests = load_grids(str(place))
    per_rank = []
    for rank in range(2):
        batches = evaluation_batches(manifests, "validation", 4, limit, Cut(rank, 2))
        per_rank.append(list(EvaluationLoader(batches)))
    seen = []
    for parts in zip(*per_rank, strict=True):
        assert len({tuple(part.codes.shape[1:]) for part in parts}) == 1
        for part in parts:
            seen += [row for row, valid in zip(rows(part), part.valid.tolist(), strict=True) if valid]
    grids = [grid for grid, _ in seen]
    assert len({i for _, i in seen}) == len(seen) == count
    assert grids == sorted(grids, key=[(3, 4), (2, 6), (1, 2)].index), "one grid after the other"
    if limit is None:
        assert {grid: grids.count(grid) for grid in grids} == {(3, 4): 7, (2, 6): 5, (1, 2): 2}


def test_the_data_module_takes_the_directory_of_grids(place) -> None:
    data = CodesDataModule(str(place), batch_size=BATCH, validation_batch_size=4, window=3)
    assert data.manifest.grid == (3, 4), "the grid with most training samples comes first"
    with pytest.warns(UserWarning, match="1x2 has 6 training samples, fewer than one batch of 8: they are left out"):
        data.setup("fit")
    batches = [rows(batch) for batch in data.train_dataloader()]
    assert batches == [rows(batch) for batch in TrainingLoader(training(place))]
    assert sum(int(batch.valid.sum()) for batch in data.val_dataloader()) == 14
    with pytest.raises(ValueError, match="no 'test' split"):
        data.test_dataloader()
    big = CodesDataModule(str(place), batch_size=64)
    with pytest.raises(ValueError, match="50 samples, fewer than one batch of 64"):
        big.setup("fit")


def test_directories_that_are_no_set_of_grids(place, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a data set for each grid; expected one of them, such as .*1x2"):
        Manifest.load(place)
    with pytest.raises(ValueError, match="looked for"):
        load_grids(str(tmp_path))
    write_grid(tmp_path / "a", (3, 4), 9, 1)
    write_grid(tmp_path / "b", (3, 4), 9, 1)
    with pytest.raises(ValueError, match="the same grid"):
        load_grids(str(tmp_path))
    write_grid(tmp_path / "c", (4, 4), 9, 1, crops=2)
    with pytest.raises(ValueError, match=r"/c has crops 2, .*/a has 1"):
        load_grids(str(tmp_path))
    (tmp_path / ".train").mkdir()
    with pytest.raises(ValueError, match="is not finished"):
        load_grids(str(tmp_path))
