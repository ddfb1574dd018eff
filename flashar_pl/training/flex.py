"""FlexAttention in the place of the bool masks of training: on a GPU, where it does what they do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flashar_pl.backbones.base import Backbone, plan_mask
from flashar_pl.backbones.condition import Prefix
from flashar_pl.grid import DecodePlan
from flashar_pl.layers.compiled import first_line
from flashar_pl.layers.flex import BlockedMask, blocks_of, hiding
from flashar_pl.layers.transformer import Attention, BlockConfig, Mask, attention
from flashar_pl.models.flashar import FlashAR

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest difference from attention with the bool mask, of its largest value. A wrong mask is far beyond."""


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot train with it; None = it can, if it runs."""
    if isinstance(model, FlashAR) and not model.vertical_sees_prefix:
        return "the vertical branch of this model does not see the prefix"
    if any(module.config.attn_dropout for module in model.modules() if isinstance(module, Attention)):
        return "this model has dropout of attention, which FlexAttention has not"
    return None


class FlexMasks:
    """A backbone's `attention_mask`, as blocks where it is a tensor. The last few plans and lengths of prefix are kept.

    The first mask is tried: where its attention or gradients do not run, or are not those of the bool mask, it says why
    and gives bool masks from then on.
    """

    def __init__(self, backbone: Backbone, kernel: Callable[..., Tensor]) -> None:
        self.backbone, self.kernel = backbone, kernel
        self.fits: bool | None = None
        """Whether the first mask did what the bool mask does; None = not tried yet."""
        self._of_plan = lru_cache(maxsize=4)(_of_plan)  # on the GPU: 18 MB each at 4,200 positions

    def __call__(self, plan: DecodePlan, prefix: Prefix, n_slots: int) -> Mask:
        """As `Backbone.attention_mask`."""
        plain = type(self.backbone).attention_mask(self.backbone, plan, prefix, n_slots)
        if not isinstance(plain, Tensor) or self.fits is False:
            return plain
        mask = self.blocked(plan, prefix, n_slots)
        if self.fits is None:
            config = next(each.config for each in self.backbone.modules() if isinstance(each, Attention))
            cause = differs(mask, plain, config, prefix.x)
            self.fits = cause is None
            if cause is not None:
                warnings.warn(f"training goes on without FlexAttention: {cause}", stacklevel=2)
        return mask if self.fits else plain

    def blocked(self, plan: DecodePlan, prefix: Prefix, n_slots: int) -> BlockedMask:
        """The mask of a sequence."""
        allowed, blocks = self._of_plan(plan, len(prefix), n_slots, prefix.x.device)
        if prefix.mask is not None:
            visible = nn.functional.pad(prefix.mask, (0, n_slots), value=True)
            blocks = hiding(blocks, allowed, visible)
        return BlockedMask(self.kernel, blocks)


def _of_plan(plan: DecodePlan, prefix: int, n_slots: int, device: torch.device) -> tuple[Tensor, BlockMask]:
    allowed = plan_mask(plan, prefix, n_slots, device)
    return allowed, blocks_of(allowed)


@torch.enable_grad()
def differs(mask: BlockedMask, plain: Tensor, config: BlockConfig, like: Tensor) -> str | None:
    """Why attention with `mask`, and its gradients, are not those with `plain` (1 or R, 1, K, K); None = they are.

    like: (R, P, D), whose rows, device and dtype, or that of autocast, the random inputs have. They leave the
    generators of the training alone.
    """
    device, rows, n = like.device, len(like), plain.shape[-1]
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else like.dtype
    random = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(rows, heads, n, config.head_dim, generator=random, device=device).to(dtype).requires_grad_()
        for heads in (config.n_head, config.n_kv_head, config.n_kv_head)
    )
    found = []
    try:
        for each in (plain, mask):
            y = attention(q, k, v, each)
            found.append((y.detach(), *torch.autograd.grad(y, (q, k, v), torch.cos(y.detach()))))
    except (RuntimeError, ValueError) as error:  # torch's compiler raises the first kind
        return first_line(error)
    for name, wanted, got in zip(("its values", "its gradients of q", "of k", "of v"), *found, strict=True):
        off = float((got - wanted).abs().max() / wanted.abs().max())
        if not off <= TOLERANCE[dtype]:
            return f"{name} differ by {off:.1e} of the largest from those with a bool mask ({dtype})"
    return None


@contextmanager
def flex_masks(masks: Iterable[FlexMasks]) -> Iterator[None]:
    """Inside, the backbones of `masks` make these masks for whole sequences; decoding has its own."""
    masks = list(masks)
    for each in masks:
        each.backbone.attention_mask = each  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for each in masks:
            del each.backbone.attention_mask
