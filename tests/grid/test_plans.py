"""Plans against their definitions, written as double loops over cells."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashar_pl.grid import NONE, PREFIX, ROW_END, DecodePlan, check_grid, diagonal_plan, make_plan, raster_plan
from flashar_pl.models.baselines.plans import doubled_mask

sides = st.integers(1, 9)
CORNERS = [(1, 1), (1, 7), (7, 1), (2, 5), (5, 2), (4, 4)]


def plans(height: int, width: int) -> list[DecodePlan]:
    return [diagonal_plan(height, width), raster_plan(height, width), raster_plan(height, width, row_end=True)]


def cells(height: int, width: int) -> list[tuple[int, int]]:
    return [(p, q) for p in range(height) for q in range(width)]


@given(sides, sides)
def test_every_cell_is_decoded_exactly_once(height: int, width: int) -> None:
    for plan in plans(height, width):
        everything = list(range(height * width))
        assert sorted(plan.order.tolist()) == everything
        assert [int(i) for step in plan.cells_of_step for i in step] == plan.order.tolist()
        assert len(plan.cells_of_step) == plan.n_steps
        for t, step in enumerate(plan.cells_of_step):
            assert len(step) >= 1
            assert (plan.step[step] == t).all()
            assert (step.diff() > 0).all(), "rows ascend inside a step"


@given(sides, sides)
def test_slot_and_cell_are_inverse(height: int, width: int) -> None:
    for plan in plans(height, width):
        assert plan.cell[plan.slot].tolist() == list(range(plan.n_cells))
        assert int((plan.cell == ROW_END).sum()) == plan.n_slots - plan.n_cells
        for slot in range(plan.n_slots):
            if (i := int(plan.cell[slot])) != ROW_END:
                assert int(plan.slot[i]) == slot
                assert (int(plan.row[slot]), int(plan.column[slot])) == divmod(i, width)
                assert int(plan.slot_step[slot]) == int(plan.step[i])


@given(sides, sides)
def test_slots_of_the_steps_tile_the_sequence(height: int, width: int) -> None:
    for plan in plans(height, width):
        assert (plan.slot_step.diff() >= 0).all(), "plan order makes the visible keys one slice"
        slots = [i for step in plan.slots_of_step for i in range(step.start, step.stop)]
        assert slots == list(range(plan.n_slots))
        assert plan.n_inputs == plan.n_slots - sum(int(s) == plan.n_steps - 1 for s in plan.slot_step)


@given(sides, sides)
def test_diagonal_steps_and_order_by_definition(height: int, width: int) -> None:
    plan = diagonal_plan(height, width)
    assert plan.n_steps == height + width - 1
    assert plan.step.tolist() == [p + q for p, q in cells(height, width)]
    by_definition = sorted(cells(height, width), key=lambda cell: (sum(cell), cell[0]))
    assert plan.order.tolist() == [p * width + q for p, q in by_definition]


@given(sides, sides)
def test_diagonal_sources_by_definition(height: int, width: int) -> None:
    plan = diagonal_plan(height, width)
    slot = {divmod(int(i), width): n for n, i in enumerate(plan.cell)}
    for i, (p, q) in enumerate(cells(height, width)):
        corner = p == q == 0
        assert int(plan.h_source[i]) == (PREFIX if corner else slot[p, q - 1] if q else NONE)
        assert int(plan.v_source[i]) == (PREFIX if corner else slot[p - 1, q] if p else NONE)


@given(sides, sides)
def test_raster_plan_by_definition(height: int, width: int) -> None:
    plan = raster_plan(height, width)
    n = height * width
    assert plan.n_steps == n
    assert plan.order.tolist() == plan.step.tolist() == plan.cell.tolist() == list(range(n))
    assert plan.h_source.tolist() == [PREFIX, *range(n - 1)]
    assert plan.v_source.tolist() == [NONE] * n
    assert not plan.has_vertical


@given(sides, sides)
def test_row_end_tokens_follow_every_row_but_the_last(height: int, width: int) -> None:
    plan = raster_plan(height, width, row_end=True)
    expected: list[int] = []
    for p in range(height):
        expected += [p * width + q for q in range(width)] + [ROW_END] * (p < height - 1)
    assert plan.cell.tolist() == expected
    assert plan.n_slots == height * width + height - 1
    assert plan.n_steps == height * width, "a row end costs no step of its own"
    for n, i in enumerate(plan.cell.tolist()):
        if i != ROW_END:
            continue
        ended = int(plan.cell[n - 1]) // width
        assert (int(plan.row[n]), int(plan.column[n])) == (ended, width)
        assert int(plan.slot_step[n]) == int(plan.slot_step[n - 1]), "it enters with the last code of its row"
        assert int(plan.h_source[(ended + 1) * width]) == n, "it predicts the first cell of the next row"
    for i in range(height * width):
        if i % width:
            assert int(plan.h_source[i]) == int(plan.slot[i]) - 1
    causal = torch.ones(plan.n_slots, plan.n_slots, dtype=torch.bool).tril()
    assert torch.equal(plan.mask(0), causal), "codes do not see the row end that is fed with them"


@given(sides, sides, st.integers(0, 4))
def test_mask_by_definition(height: int, width: int, prefix: int) -> None:
    for plan in (diagonal_plan(height, width), raster_plan(height, width)):
        for order in ("plan", "raster"):
            cell = plan.cell.tolist() if order == "plan" else list(range(plan.n_cells))
            mask = plan.mask(prefix, order).tolist()
            for row in range(prefix + plan.n_cells):
                for column in range(prefix + plan.n_cells):
                    if row < prefix:
                        expected = column <= row
                    elif column < prefix:
                        expected = True
                    else:
                        steps = [int(plan.step[cell[k - prefix]]) for k in (row, column)]
                        expected = steps[1] <= steps[0]
                    assert mask[row][column] == expected


def test_doubled_mask_by_definition() -> None:
    """Guards noisy cells that see their own clean codes, or the prefix only in part."""
    for plan in (diagonal_plan(2, 3), raster_plan(2, 2)):
        n, step = plan.n_slots, plan.slot_step.tolist()
        for prefix in (0, 2):
            mask = doubled_mask(plan, prefix).tolist()
            for row in range(prefix + 2 * n):
                for column in range(prefix + 2 * n):
                    (clean, cell), (seen_clean, seen) = divmod(row - prefix, n), divmod(column - prefix, n)
                    if row < prefix or column < prefix:
                        expected = column < prefix and (row >= prefix or column <= row)
                    elif not seen_clean:
                        expected = not clean and step[seen] == step[cell]
                    else:
                        expected = step[seen] <= step[cell] if clean else step[seen] < step[cell]
                    assert mask[row][column] == expected, (prefix, row, column)


@pytest.mark.parametrize(("height", "width"), CORNERS)
def test_every_source_is_known_before_it_is_used(height: int, width: int) -> None:
    """A source of a later step would be a cell predicted from the future."""
    for plan in plans(height, width):
        for source in (plan.h_source, plan.v_source):
            held = source >= 0
            assert (plan.slot_step[source[held]] == plan.step[held] - 1).all(), "the previous step's states suffice"


def test_equal_arguments_give_the_same_object() -> None:
    """Masks and sources are cached by plan; a second object for the same plan would hold them twice."""
    assert (
        raster_plan(3, 4) is raster_plan(3, 4, False) is raster_plan(3, 4, row_end=False) is make_plan("raster", 3, 4)
    )
    assert diagonal_plan(3, 4) is diagonal_plan(height=3, width=4) is make_plan("diagonal", 3, 4, row_end=True)
    assert diagonal_plan(3, 4) is not diagonal_plan(4, 3)


@pytest.mark.parametrize("make", [diagonal_plan, raster_plan])
def test_a_plan_first_used_in_inference_mode_serves_autograd_later(make: object) -> None:
    """A validation in inference mode before training once left tensors in the cache that no backward accepts."""
    with torch.inference_mode():
        plan = make(11, 13)  # type: ignore[operator]
        values = [plan.row, plan.column, plan.slot, plan.slot_mask, plan.on("h_source", "cpu"), *plan.cells_of_step]
    for value in [*values, plan.order, plan.step, plan.cell, plan.slot_step, plan.v_source]:
        assert not value.is_inference()


def test_a_plan_does_not_follow_the_default_device() -> None:
    """Models are built under torch.device("meta"); a plan made there must still hold numbers."""
    with torch.device("meta"):
        plan = diagonal_plan(13, 11)
        assert plan.order.device.type == plan.slot.device.type == plan.slot_mask.device.type == "cpu"


@pytest.mark.parametrize("grid", [(0, 3), (3, 0), (-1, 2)])
def test_empty_grids_are_refused(grid: tuple[int, int]) -> None:
    for make in (diagonal_plan, raster_plan):
        with pytest.raises(ValueError, match=r"expected \(H, W\), two integers of at least 1"):
            make(*grid)
    with pytest.raises(ValueError, match=r"expected \(H, W\)"):
        check_grid(grid)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"spiral.*diagonal, raster"):
        make_plan("spiral", 2, 2)
    with pytest.raises(ValueError, match="expected \\(H, W\\)"):
        check_grid([4])
