"""Mixtures: proportions, every sample of a source before one comes again, exact resume, any number of ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grids import write_grid
from toy_shards import in_pieces

from flashar_pl.backbones.condition import Batch
from flashar_pl.data.batches import Cut
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.loader import TrainingLoader
from flashar_pl.data.manifest import load_grids
from flashar_pl.data.mixture import load_mixture, mixed_batches
from flashar_pl.data.order import MixtureOrder, TrainingOrder

SIZES = {"a": (40, 3), "b": (25, 4), "c": (16, 0)}
WEIGHTS = {"a": 3, "b": 1, "c": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    for k, (name, sizes) in enumerate(SIZES.items()):
        write_grid(root / name, (3, 4), *sizes, first=10 * k)
    for k, (grid, sizes) in enumerate({(3, 4): (30, 2), (2, 5): (24, 1)}.items()):
        write_grid(root / "buckets" / f"{grid[0]}x{grid[1]}", grid, *sizes, first=20 + 10 * k)
    return root


def mixture(root: Path, weights: dict[str, float], rank: int = 0, ranks: int = 1):
    sources = load_mixture({str(root / name): weight for name, weight in weights.items()})
    return mixed_batches(sources, 8, 0, 3, Cut(rank, ranks), True)


def rows(batch: Batch) -> list[tuple[int, int]]:
    """(label, sample number over all sources) of each row; codes and condition belong together."""
    assert (batch.codes.flatten(1) == batch.condition[:, None]).all()
    return list(zip(batch.condition.tolist(), batch.index.tolist(), strict=True))


orders = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=5)


@given(orders, st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 4), st.integers(1, 40))
@settings(max_examples=60)
def test_proportions_hold_at_every_slot_and_draws_follow_upon_one_another(sources, seed, local, ranks, batches) -> None:
    """Guards shares that drift, a draw skipped or given twice, and an order that depends on ranks or epochs."""
    own = [TrainingOrder(np.array([n]), 1, seed, 1) for n, _ in sources]
    weights = [weight for _, weight in sources]
    order = MixtureOrder(own, weights, local * ranks, batches)
    seen = [[] for _ in sources]
    for epoch in range(2):
        for g in range(batches):
            parts = [order.batch(epoch, g, rank, ranks) for rank in range(ranks)]
            source, draw = (np.concatenate(each) for each in zip(*parts, strict=True))
            assert all(np.array_equal(x, y) for x, y in zip((source, draw), order.batch(epoch, g), strict=True))
            for k, n in zip(source.tolist(), draw.tolist(), strict=True):
                seen[k].append(n)
    total = 2 * batches * local * ranks
    for k, draws in enumerate(seen):
        assert draws == list(range(len(draws)))
        assert abs(len(draws) - total * weights[k] / sum(weights)) <= len(sources) + total * 2**-20 * len(sources)
    assert order.drawn(np.array([total]))[0].tolist() == [len(draws) for draws in seen]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 60), st.integers(0, 60))
def test_no_sample_comes_again_before_all_others_of_its_source(sizes, start, n) -> None:
    order = TrainingOrder(np.array(sizes), 1, 5, 2)
    drawn = np.concatenate([numbers for _, numbers in order.endless(0, start + n)] or [np.zeros(0, int)])
    for begin in range(0, len(drawn), sum(sizes)):
        part = drawn[begin : begin + sum(sizes)]
        assert len(set(part.tolist())) == len(part)
    later = [numbers for _, numbers in order.endless(start, start + n)] or [np.zeros(0, int)]
    assert np.array_equal(np.concatenate(later), drawn[start:]), "the place alone says what comes"


def test_batches_have_the_proportions_and_sources_their_own_passes(place) -> None:
    """Guards weights that are ignored, and a small source whose samples come unevenly often."""
    batches = mixture(place, WEIGHTS)
    loader = TrainingLoader(batches)
    seen = [row for _ in range(2) for batch in loader for row in rows(batch)]
    assert len(loader) == (40 + 25 + 16) // 8
    numbers, ends = [index for _, index in seen], np.cumsum([n for n, _ in SIZES.values()])
    counts = np.bincount(np.searchsorted(ends, numbers, side="right"))
    assert counts.tolist() == batches.drawn(1, 10).tolist()
    assert np.abs(counts - len(seen) * np.array([3, 1, 2]) / 6).max() <= 1
    times = np.bincount(numbers, minlength=81)
    for end, (n, _) in zip(ends, SIZES.values(), strict=True):
        assert np.ptp(times[end - n : end]) <= 1
    assert all(len({index >= 40 for _, index in rows(batch)}) == 2 for batch in loader), "sources are mixed in a batch"


def test_resume_on_other_ranks_and_workers_is_exact(place) -> None:
    """Buckets of which one source has a grid more; stopped in the middle of epochs, on 1, 2 and 4 ranks."""
    weights = {"a": 1, "buckets": 2}
    plain = TrainingLoader(mixture(place, weights))
    expected = [rows(batch) for _ in range(2) for batch in plain]
    made = lambda rank, ranks: mixture(place, weights, rank, ranks)  # noqa: E731
    assert in_pieces(made, rows, ((3, 2, 0), (6, 1, 0), (4, 4, 0))) == expected[:13]
    grids = [tuple(batch.codes.shape[1:]) for batch in plain]
    assert grids.count((2, 5)) == int(94 * 2 / 3 * 24 / 54) // 8


def test_data_module_counts_what_training_was_given_and_validates_on_all(place) -> None:
    data = CodesDataModule({str(place / name): weight for name, weight in WEIGHTS.items()}, batch_size=12)
    for _, batch in zip(range(3), data.train_dataloader(), strict=False):
        assert len(batch.codes) == 12
    assert data.drawn() == {"a": 18, "b": 6, "c": 12}
    valid = sum(int(batch.valid.sum()) for batch in data.val_dataloader())
    assert valid == 3 + 4
    stopped = TrainingLoader(mixture(place, WEIGHTS)).state_dict() | {"position": 2}
    with pytest.raises(ValueError, match="of an order with shards="):
        TrainingLoader(mixture(place, WEIGHTS | {"c": 5})).load_state_dict(stopped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 98}, r"a has vocabulary 97, .*other has vocabulary 98|a has vocabulary 97, .*other has 98"),
        ({"tokenizer": {"kind": "vq16"}}, r"a has tokenizer .*none.*other has .*vq16"),
        ({"grid": (5, 5)}, r"a has codes of 3x4, .*other of 5x5; the sources"),
    ],
)
def test_sources_that_disagree_are_both_named(place, tmp_path, changes, message) -> None:
    write_grid(tmp_path / "other", **{"grid": (3, 4), "train": 9, "validation": 1} | changes)
    with pytest.raises(ValueError, match=message):
        load_mixture({str(place / "a"): 1, str(tmp_path / "other"): 1})


def test_names_of_classes_agree_where_both_sources_have_some(place, monkeypatch) -> None:
    """Guards a label that is a cat in one source and a dog in the other."""
    named = {name: tuple(f"{name}{i}" for i in range(97)) for name in ("a", "b")}
    found = {
        name: [replace(m, class_names=named.get(name, ())) for m in load_grids(str(place / name))] for name in SIZES
    }
    monkeypatch.setattr("flashar_pl.data.mixture.load_grids", lambda path: found[path])
    load_mixture({"a": 1, "c": 1})
    with pytest.raises(ValueError, match=r"a has classes a0, .*b has b0; "):
        load_mixture({"a": 1, "b": 1})


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"a": 0}, "weight of .*a is 0"), ({"a": 1, "a/": 1}, "hold the same samples"), ({}, "names no data set")],
)
def test_wrong_weights_and_twins(place, weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_mixture({f"{place}/{name}": weight for name, weight in weights.items()})
