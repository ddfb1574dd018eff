"""The order of samples does not depend on ranks or workers, and loses or repeats nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashar_pl.data.order import (
    _BLOCKS,
    _CROPS,
    _GRIDS,
    _SAMPLES,
    EvaluationOrder,
    TrainingOrder,
    check_cut,
    hashes,
    permutation,
    stream,
)

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=20)


@st.composite
def orders(draw) -> TrainingOrder:
    sizes = np.array(draw(SIZES))
    batch = draw(st.integers(1, int(sizes.sum())))
    return TrainingOrder(sizes, batch, draw(st.integers(-5, 2**70)), draw(st.integers(1, 8)))


def epoch_of(order: TrainingOrder, epoch: int) -> np.ndarray:
    return np.concatenate([order.batch(epoch, g) for g in range(len(order))])


@given(st.integers(0, 2**64 - 1), st.integers(0, 200))
def test_permutation_is_a_bijection(key: int, n: int) -> None:
    np.testing.assert_array_equal(np.sort(permutation(key, n)), np.arange(n))


def test_hash_is_splitmix64() -> None:
    """Guards the stored meaning of a seed: the first outputs of SplitMix64 for state 0 and 1234567."""
    assert [hex(v) for v in hashes(0, np.arange(2)).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
    assert hashes(1234567, np.arange(2)).tolist() == [6457827717110365317, 3203168211198807973]


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 5))
def test_each_sample_at_most_once_and_only_a_tail_is_left_out(order: TrainingOrder, epoch: int) -> None:
    seen = epoch_of(order, epoch)
    assert len(np.unique(seen)) == len(seen) == order.samples - order.samples % order.batch_size
    assert seen.min() >= 0
    assert seen.max() < order.samples


@settings(max_examples=60, deadline=None)
@given(orders())
def test_windows_hold_whole_blocks(order: TrainingOrder) -> None:
    """A window of K blocks is finished before the next block is touched, so a reader needs K blocks at a time."""
    sizes = order._sizes
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    seen = block_of[order._slice(3, 0, order.samples)]
    first = {b: i for i, b in reversed(list(enumerate(seen.tolist())))}
    last = {b: i for i, b in enumerate(seen.tolist())}
    open_at_once = max(sum(first[b] <= i <= last[b] for b in first) for i in range(len(seen)))
    assert open_at_once <= order.window


@given(st.integers(0, 2**64), st.integers(0, 9))
def test_the_order_of_blocks_changes_with_the_epoch(seed: int, epoch: int) -> None:
    """Guards epochs that show the same windows one after the other, with only the samples inside shuffled anew."""
    orders = [TrainingOrder(np.full(64, 3), 3, seed, window=1)._slice(e, 0, 192) // 3 for e in (epoch, epoch + 1)]
    first, second = (list(dict.fromkeys(blocks.tolist())) for blocks in orders)
    assert sorted(first) == sorted(second) == list(range(64))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 16, "about one block keeps its place by chance"


@settings(max_examples=60, deadline=None)
@given(st.data(), SIZES, st.integers(1, 4), st.integers(1, 5))
def test_ranks_together_are_the_global_batch(data, sizes: list[int], ranks: int, window: int) -> None:
    total = sum(sizes)
    if total < ranks:
        return
    batch = ranks * data.draw(st.integers(1, total // ranks))
    order = TrainingOrder(np.array(sizes), batch, 1, window)
    for g in range(len(order)):
        parts = [order.batch(2, g, rank, ranks) for rank in range(ranks)]
        np.testing.assert_array_equal(np.concatenate(parts), order.batch(2, g))


@settings(max_examples=40, deadline=None)
@given(orders(), st.lists(st.integers(0, 1000), max_size=8))
def test_batch_is_a_function_of_its_number_alone(order: TrainingOrder, jumps: list[int]) -> None:
    """Guards the caches: any access order gives what a fresh object gives."""
    for jump in jumps:
        epoch, g = jump % 3, jump % len(order)
        fresh = TrainingOrder(order._sizes, order.batch_size, order.seed, order.window)
        np.testing.assert_array_equal(order.batch(epoch, g), fresh.batch(epoch, g))


def test_epochs_and_seeds_differ_and_another_tail_is_dropped() -> None:
    sizes = np.full(30, 10)
    order = TrainingOrder(sizes, 64, 0, 4)
    other = TrainingOrder(sizes, 64, 1, 4)
    assert not np.array_equal(epoch_of(order, 0), epoch_of(order, 1))
    assert not np.array_equal(epoch_of(order, 0), epoch_of(other, 0))
    dropped = [frozenset(range(300)) - set(epoch_of(order, epoch).tolist()) for epoch in range(6)]
    assert {len(d) for d in dropped} == {300 % 64}
    assert len(set(dropped)) == 6


def test_shuffle_is_uniform() -> None:
    """With one window over everything, each sample's mean place over epochs is the middle (4.5 sigma)."""
    order = TrainingOrder(np.full(8, 5), 40, 7, 8)
    places = np.array([np.argsort(epoch_of(order, epoch)) for epoch in range(400)])  # (epochs, samples)
    sigma = np.sqrt((40**2 - 1) / 12 / 400)
    assert np.abs(places.mean(axis=0) - 19.5).max() < 4.5 * sigma


def test_crops_follow_seed_epoch_and_id() -> None:
    order = TrainingOrder(np.array([1000]), 10, 3, 1)
    index = np.arange(1000)
    crops = order.crops(0, index, 10)
    np.testing.assert_array_equal(order.crops(0, index[::-1], 10), crops[::-1])
    assert np.bincount(crops, minlength=10).min() > 60
    assert (order.crops(1, index, 10) == crops).mean() < 0.2
    assert not order.crops(0, index, 1).any()


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 4), st.none() | st.integers(1, 80))
def test_evaluation_counts_each_sample_once(n: int, per_rank: int, ranks: int, limit: int | None) -> None:
    order = EvaluationOrder(n, per_rank * ranks, limit)
    seen = []
    for g in range(len(order)):
        for rank in range(ranks):
            index, valid = order.batch(g, rank, ranks)
            assert index.shape == valid.shape == (per_rank,)
            assert index.max() < n
            seen += index[valid].tolist()
    assert sorted(seen) == seen, "the order of the manifest"
    assert len(set(seen)) == len(seen) == min(n, limit or n)


def test_limited_evaluation_is_spread_over_the_split() -> None:
    """Guards against validating on the first classes only."""
    assert EvaluationOrder(100, 10, 4).index.tolist() == [0, 25, 50, 75]


def test_the_order_of_a_seed_stays_what_it_was() -> None:
    """A run that is continued by another version must see the samples that are left, not others."""
    assert stream(7, 0, 1) == 10221096115935525395
    assert permutation(stream(7, 0, 1), 6).tolist() == [2, 4, 5, 3, 1, 0]
    assert (_BLOCKS, _SAMPLES, _CROPS, _GRIDS) == (1, 2, 3, 9)


def test_a_batch_that_cannot_be_cut_comes_with_one_that_can() -> None:
    with pytest.raises(ValueError, match="a multiple of 4, such as 12"):
        check_cut(10, 4)
    with pytest.raises(ValueError, match=r"batch_size=1,000,000,000,000; expected at most 1,048,576"):
        check_cut(10**12, 4)  # of a stranger's checkpoint
