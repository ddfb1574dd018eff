"""Communication inside a diagonal: a likelihood by the chain rule, decoded as it is scored, and off without a trace."""

from typing import Any

import pytest
import tiny
import torch

from flashar_pl.checkpoints.description import build_model
from flashar_pl.decoding import generate
from flashar_pl.decoding.parity import misplacement
from flashar_pl.grid import diagonal_plan
from flashar_pl.models import FlashAR
from flashar_pl.models.intra import IntraHead, turns
from flashar_pl.models.lora import adapt
from flashar_pl.sampling import guide

EMU = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 4, 9])]
NULLS = {"unconditional": [torch.tensor([1, 2, 9])] * 2}


def make(groups: int, kind: str = "class", alone: bool = False) -> FlashAR:
    """A FlashAR model in float64 whose cells tell one another something."""
    model = tiny.emu_flashar() if kind == "emu" else tiny.flashar()
    torch.manual_seed(1)
    head = model.dual_head
    head.intra = IntraHead(model.backbone.dim, groups, alone)
    torch.nn.init.normal_(head.intra.out.weight, std=0.3)
    return model.double().eval()


def test_groups_are_nested_and_far_apart() -> None:
    """Guards the order of the groups: of four, the first two must be the first of two."""
    assert turns(4) == [0, 2, 1, 3]
    for groups in (2, 4, 8):
        assert [turns(groups).index(k % groups) for k in turns(2 * groups)] == [i // 2 for i in range(2 * groups)]


@pytest.mark.parametrize("kind", ["class", "emu"])
@pytest.mark.parametrize("groups", [2, 4, 64])
@torch.no_grad()
def test_codes_are_drawn_from_the_distribution_that_is_scored(groups: int, kind: str) -> None:
    """Guards the chain rule: a code that one pass sees and the other does not moves an interval off its uniform."""
    model = make(groups, kind)
    condition, nulls = (EMU, NULLS) if kind == "emu" else (tiny.classes(2), {})
    for scale in (1.0, 2.0):
        asked: dict[str, Any] = {"cfg_scale": scale, **(nulls if scale != 1 else {})}
        codes = generate(model, condition, (4, 5), seeds=3, **asked)
        assert float(misplacement(model, codes, condition, "diagonal", seeds=3, **asked).max()) < 1e-9
    logits = model(codes, condition).fused
    nll = -logits.log_softmax(-1).gather(-1, codes[..., None]).sum((1, 2, 3))
    if kind == "class":  # Emu3.5's loss is over text tokens too
        assert torch.allclose(model.loss(codes, condition)["nll"], nll)


@pytest.mark.parametrize("groups", [2, 4, 8, 64])
@torch.no_grad()
def test_greedy_codes_are_the_largest_teacher_forced_logits(groups: int) -> None:
    """Guards the same for the edges of a diagonal, whose cells lack one of both states."""
    model = make(groups)
    for shape in ((3, 5), (5, 3), (1, 4)):
        both = model.backbone.with_unconditional(tiny.classes(2), None)
        codes = generate(model, tiny.classes(2), shape, greedy=True, cfg_scale=1.5)
        fused = model(codes.repeat(2, 1, 1), both).fused
        assert torch.equal(guide(fused[:2], fused[2:], 1.5).argmax(-1), codes)


@torch.no_grad()
def test_off_and_new_it_is_flashar_bit_for_bit() -> None:
    """Guards models without it against any change, and the start of its training against a jump."""
    plain, codes = tiny.flashar(), tiny.codes(2, 4, 4)
    expected = plain(codes, tiny.classes(2)).fused
    for options in ({"groups": 1}, {"groups": 4}):
        model = FlashAR(tiny.backbone(), 1, intra=options)
        state = plain.state_dict() | {k: v for k, v in model.state_dict().items() if "intra" in k}
        model.load_state_dict(state)
        if options["groups"] == 1:
            model.dual_head.intra.out.weight.data.fill_(1.0)  # type: ignore[union-attr]
        assert torch.equal(model.eval()(codes, tiny.classes(2)).fused, expected)
        drawn = [generate(each, tiny.classes(2), (4, 4), seeds=0) for each in (model, plain)]
        assert torch.equal(*drawn)
        again = build_model(model.config())
        again.load_state_dict(model.state_dict())
        assert again.config() == model.config()


def test_a_cell_sees_the_codes_drawn_before_it_and_no_others() -> None:
    """Guards the mask: the control with hidden codes must find nothing, and a later group nothing in an earlier one."""
    model, codes = make(2), tiny.codes(1, 4, 4)
    other = codes.clone()
    cells = diagonal_plan(4, 4).cells_of_step[3]  # of four
    first, second = cells[0::2], cells[1::2]
    changed = []
    for part in (first, second):
        other = codes.clone()
        other.view(-1)[part] = (other.view(-1)[part] + 1) % tiny.VOCABULARY
        pair = [model(each, tiny.classes(1)).fused.flatten(1, 2)[0] for each in (codes, other)]
        changed.append((pair[0] != pair[1]).any(-1))
    assert not changed[0][first].any()
    assert changed[0][second].all()
    assert not changed[1][cells].any()


@pytest.mark.parametrize("alone", [False, True])
def test_gradients_reach_what_trains(alone: bool) -> None:
    """Guards a frozen FlashAR against training along, and random groups against leaving a part without a gradient."""
    model = adapt(make(2, alone=alone), None).train()
    model.loss(tiny.codes(3, 6, 6), tiny.classes(3))["loss"].backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    within = {name for name in model.roles() if name.startswith("dual_head.intra.")}
    assert found == (within if alone else set(model.roles()))
    assert all(float(model.get_parameter(name).grad.abs().max()) > 0 for name in within)  # type: ignore[union-attr]


def test_groups_that_are_no_power_of_two_are_refused() -> None:
    """Guards the nesting of groups."""
    with pytest.raises(ValueError, match="groups is 3; expected 1"):
        IntraHead(8, 3)
