"""Conditions: counted, moved, cut, joined and filled up alike, whatever their kind."""

import copy
import pickle

import pytest
import tiny
import torch

from flashar_pl.backbones import Batch, ClassIds, Condition, Conditioning, Prompts, TextFeatures
from flashar_pl.backbones.condition import as_condition

GIVEN = {
    "class": (torch.tensor([3, 1, 4]), lambda c, i: c.ids[i]),
    "text": (tiny.captions([1, 2, 5]), lambda c, i: (c.features[i], c.mask[i])),
    "prompt": ([torch.arange(1, 4), torch.arange(2, 3), torch.arange(5, 9)], lambda c, i: c[i]),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_rows_of_every_operation(kind: str) -> None:
    given, row = GIVEN[kind]
    condition = as_condition(given)
    assert len(condition) == 3
    expected = {
        "rows": (condition.rows([2, 0, 2]), [2, 0, 2]),
        "slice": (condition.rows(slice(1, None)), [1, 2]),
        "cat": (Condition.cat([condition, condition.rows([1])]), [0, 1, 2, 1]),
        "pad": (condition.pad(5), [0, 1, 2, 2, 2]),
        "pickle": (pickle.loads(pickle.dumps(condition)), [0, 1, 2]),
        "copy": (copy.deepcopy(condition), [0, 1, 2]),
        "to": (condition.to("cpu"), [0, 1, 2]),
    }
    for name, (found, samples) in expected.items():
        assert type(found) is type(condition), name
        assert len(found) == len(samples), name
        for i, sample in enumerate(samples):
            torch.testing.assert_close(row(found, i), row(condition, sample), atol=0, rtol=0)
    assert as_condition(condition) is condition


def test_kinds_do_not_mix() -> None:
    with pytest.raises(ValueError, match="ClassIds and TextFeatures; expected the same kind"):
        Condition.cat([as_condition(tiny.classes(1)), tiny.captions([1])])
    with pytest.raises(ValueError, match="condition is a int; expected class ids"):
        as_condition(3)  # type: ignore[arg-type]


def test_a_batch_reads_as_before() -> None:
    """Notebooks take a batch's class ids for a tensor and its prompts for a list."""
    labels = torch.tensor([3, 1])
    batch = Batch(tiny.codes(2, 2, 2), labels)  # type: ignore[arg-type]
    assert isinstance(batch.condition, ClassIds)
    assert torch.equal(batch.condition, labels)  # type: ignore[arg-type]
    assert torch.cat([batch.condition, batch.condition]).tolist() == [3, 1, 3, 1]  # type: ignore[list-item]
    assert batch.condition.tolist() == [3, 1]
    assert batch.condition.dtype == torch.int64
    assert batch.condition[:, None].shape == (2, 1)
    prompts = Batch(tiny.codes(1, 2, 2), [torch.arange(3)]).condition  # type: ignore[arg-type]
    assert isinstance(prompts, list)
    assert [ids.tolist() for ids in prompts] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("takes", "kind"),
    [
        (Conditioning("class", 5), ClassIds),
        (Conditioning("text", 12, 7), TextFeatures),
        (Conditioning("prompt", 60, 9), Prompts),
    ],
)
def test_examples_are_what_is_taken(takes: Conditioning, kind: type[Condition]) -> None:
    made = takes.example(6)
    assert isinstance(made, kind)
    assert len(made) == 6
    made.check(takes)
