"""A decoding order of one's own: data that masks, loss and decoding follow, and a model that names it."""

import pytest
import tiny
import torch

from flashar_pl.decoding import Engine
from flashar_pl.decoding.parity import misplacement
from flashar_pl.grid import NONE, PREFIX, DecodePlan
from flashar_pl.models import FlashAR

HEIGHT, WIDTH = 3, 4


def staggered_plan(height: int, width: int, by: int) -> DecodePlan:
    """Each row starts `by` columns after the one above; by = 1 is the diagonal plan."""
    p, q = torch.arange(height * width) // width, torch.arange(height * width) % width
    step = by * p + q
    order = torch.argsort(step * height + p)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(height * width)
    h_source = torch.where(q > 0, slot.roll(1), NONE)
    v_source = torch.where(p > 0, slot.roll(width), NONE)
    h_source[0] = v_source[0] = PREFIX
    return DecodePlan(
        "staggered", height, width, order, step, int(step.max()) + 1, order, h_source, v_source, step[order]
    )


def column_plan(height: int, width: int) -> DecodePlan:
    """Column by column, each cell from the slot before it, by the vertical head: a plan that the cache can follow.

    The cached decoder holds the states of the last step only: there a step's sources must be slots of the step before.
    """
    n = height * width
    order = torch.arange(n).view(height, width).T.flatten()
    step = torch.empty_like(order)
    step[order] = torch.arange(n)
    h_source = torch.full((n,), NONE)
    h_source[0] = PREFIX  # the corner is the horizontal head's, as in every plan
    return DecodePlan("columns", height, width, order, step, n, order, h_source, step - 1, torch.arange(n))


class Columns(FlashAR):
    """FlashAR that knows one more order by name."""

    def make_plan(self, name, height, width):
        return column_plan(height, width) if name == "columns" else super().make_plan(name, height, width)


@pytest.fixture
def model() -> Columns:
    model = Columns(tiny.backbone(), 1).double()
    tiny.randomise(model, seed=3)
    return model.eval()


def test_a_cell_depends_on_earlier_steps_only(model) -> None:
    """Guards the mask: it comes from the steps of the plan, not from neighbours on the grid."""
    codes, plan = tiny.codes(1, HEIGHT, WIDTH), staggered_plan(HEIGHT, WIDTH, 2)
    before = model(codes, tiny.classes(1), plan).fused  # (1, H, W, V)
    step = plan.step.view(HEIGHT, WIDTH)
    for cell in range(plan.n_cells):
        other = codes.clone()
        other.view(-1)[cell] = (other.view(-1)[cell] + 1) % tiny.VOCABULARY
        same = (model(other, tiny.classes(1), plan).fused == before).all(-1)[0]  # (H, W)
        assert same[step <= plan.step[cell]].all()
    assert model.loss(codes, tiny.classes(1), plan)["loss"].isfinite()


def test_decoding_follows_it(model) -> None:
    """Guards the cache and its positions: every drawn code is the one that the whole model gives its random number."""
    steps: list[int] = []
    codes = Engine(model).generate(
        tiny.classes(2), (HEIGHT, WIDTH), "columns", seeds=0, cfg_scale=2.0, on_step=lambda p: steps.append(p.steps)
    )
    assert steps == list(range(1, HEIGHT * WIDTH + 1))
    far = misplacement(model, codes, tiny.classes(2), "columns", cfg_scale=2.0, seeds=0)
    assert far.max() < 1e-9
    assert misplacement(model, codes, tiny.classes(2), "diagonal", cfg_scale=2.0, seeds=0).max() > 1e-3
