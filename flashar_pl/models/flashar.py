"""FlashAR: a raster backbone that also predicts downwards, and a gate that fuses both predictions (Sec. 4).

Shapes: R rows, L positions, D width.
"""

from __future__ import annotations

import copy
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from flashar_pl.backbones.base import Backbone
from flashar_pl.layers.kv_cache import CacheSpec, KVCache
from flashar_pl.layers.rope import Rope
from flashar_pl.layers.transformer import Mask, run_blocks
from flashar_pl.models.base import GridModel
from flashar_pl.models.dual_head import DualHead, Fusion, States
from flashar_pl.models.gates import FusionGate, LogitGate
from flashar_pl.models.intra import IntraHead
from flashar_pl.models.sources import Corner
from flashar_pl.numerics import without_memory


def check_video(frames: int, delay: int = 1) -> tuple[int, int]:
    """Both as they are. ValueError for less than two frames, or no delay."""
    if frames < 2 or delay < 1:
        raise ValueError(f"{frames} frames, delay {delay}; expected 2 frames or more, delay 1 or more, or no video.")
    return frames, delay


class VerticalBranch(nn.Module):
    """The cloned top layers and final norm (Eq. 6, without the head)."""

    def __init__(self, blocks: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, rope: Rope, mask: Mask, cache: KVCache | None, first_layer: int) -> Tensor:
        return self.norm(run_blocks(self.blocks, x, rope, mask, cache, first_layer))


class FlashAR(GridModel):
    """Trunk F_0..F_{m-1}, horizontal branch F_m..F_{L-1}, vertical branch cloned from it, both heads and the gate.

    Args:
        backbone: the pre-trained raster model; its head is handed over to this model's `dual_head`.
        branch_layer: m, 0 <= m <= L. The paper uses L - 1 for LlamaGen.
        vertical_layers: k, the number of cloned layers F_m..F_{m+k-1}; None = L - m; if m + k passes L, the last k
            layers are cloned. With m = L and None only norm and head are.
        fusion: "gate" (Eq. 7), "logit_gate" (the authors' LlamaGen code) or "average" (g = 0.5, NAR).
        corner: (0, 0) from the "horizontal" head (the paper) or "fused" like the interior (NAR).
        intra: options of an `IntraHead`; None = the codes of a diagonal are drawn independently (the paper).
        video: {"frames": T, "delay": d} of `diagonal_plan`; a third branch, the temporal one, is one more clone, whose
            states predict the cell in the next frame through the vertical head. None = images.

    Before any training step the vertical branch equals the horizontal one: "training-free" diagonal decoding.
    A backbone on the meta device is cloned later, by `init_vertical_from_backbone` after its weights are loaded.
    """

    plan_name = "diagonal"
    plans = ("raster", "diagonal")
    vertical_sees_prefix: ClassVar[bool] = True
    """Whether the vertical branch's image positions attend to the prefix."""

    def __init__(
        self,
        backbone: Backbone,
        branch_layer: int,
        vertical_layers: int | None = None,
        fusion: Fusion = "gate",
        corner: Corner = "horizontal",
        intra: dict[str, Any] | None = None,
        video: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        n_layer = backbone.n_layer
        if not 0 <= branch_layer <= n_layer:
            raise ValueError(f"branch_layer is {branch_layer}; expected 0 to {n_layer} (the number of layers).")
        if vertical_layers is not None and not 0 <= vertical_layers <= n_layer:
            raise ValueError(f"vertical_layers is {vertical_layers}; expected 0 to {n_layer}, or None.")
        if fusion not in get_args(Fusion):
            raise ValueError(f"fusion is {fusion!r}; expected one of {', '.join(get_args(Fusion))}.")
        if corner not in ("horizontal", "fused"):
            raise ValueError(f'corner is {corner!r}; expected "horizontal" or "fused".')
        if video is not None and intra is not None:
            raise ValueError("intra and video are given; expected one: a step of a video is no line.")
        self.frames, self.delay = (1, 1) if video is None else check_video(**video)
        self.branch_layer = branch_layer
        self.vertical_layers = n_layer - branch_layer if vertical_layers is None else vertical_layers
        self.fusion: Fusion = fusion
        self.backbone = backbone
        head = backbone.release_head()
        like = head.weight
        with without_memory():
            self.vertical = self._branch()
            self.temporal = None if video is None else self._branch()
            vertical_head = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        with torch.device(like.device):
            gate = self.new_gate()
            gate = None if gate is None else gate.to(like.dtype)
            with_time = video is not None and fusion != "average"
            time_gate = FusionGate(backbone.dim).to(like.dtype) if with_time else None
            within = None if intra is None else IntraHead(backbone.dim, **intra).to(like.dtype)
        self.dual_head = DualHead(head, vertical_head, gate, corner, backbone.first_code, within, time_gate)
        if like.device.type != "meta":
            for branch in self.branches:
                branch.to_empty(device=like.device).to(like.dtype)
            vertical_head.to_empty(device=like.device).to(like.dtype)
            self.init_vertical_from_backbone()
        self.train(backbone.training)

    def _branch(self) -> VerticalBranch:
        """A branch of new layers like those that are cloned."""
        blocks = [self.backbone.make_block(self.first_cloned + i) for i in range(self.vertical_layers)]
        return VerticalBranch(blocks, copy.deepcopy(self.backbone.norm).to("meta"))

    @property
    def branches(self) -> list[VerticalBranch]:
        """The vertical branch, and that of a video's time."""
        return [self.vertical] if self.temporal is None else [self.vertical, self.temporal]

    @property
    def first_cloned(self) -> int:
        """The layer of which the first block of the vertical branch is a clone (Sec. 4.1)."""
        return min(self.branch_layer, self.backbone.n_layer - self.vertical_layers)

    @property
    def method(self) -> str:  # type: ignore[override]
        """NAR where it branches behind the last layer and averages."""
        nar = (self.branch_layer, self.fusion, self.dual_head.corner) == (self.backbone.n_layer, "average", "fused")
        return "NAR" if nar else "FlashAR"

    def new_gate(self) -> FusionGate | None:
        """A gate of this model's kind with its first values."""
        if self.fusion == "average":
            return None
        return FusionGate(self.backbone.dim) if self.fusion == "gate" else LogitGate(self.backbone.vocabulary)

    @torch.no_grad()
    def init_vertical_from_backbone(self) -> None:
        """Copy the top layers, the final norm and the head into the vertical branch (Sec. 4.1)."""
        cloned = self.backbone.blocks[self.first_cloned : self.first_cloned + self.vertical_layers]
        for branch in self.branches:
            for block, source in zip(branch.blocks, cloned, strict=True):
                block.load_state_dict(source.state_dict())
            branch.norm.load_state_dict(self.backbone.norm.state_dict())
        assert self.dual_head.vertical is not None
        self.dual_head.vertical.load_state_dict(self.dual_head.horizontal.state_dict())

    def states(self, x: Tensor, rope: Rope, mask: Mask, cache: KVCache | None, n_prefix: int, vertical: bool) -> States:
        """h^H (Eq. 5) and h^V (Eq. 6) from the shared trunk state (Eq. 4), each (R, L, D), after the final norms."""
        trunk = self.backbone.layers(x, rope, mask, cache, stop=self.branch_layer)
        h = self.backbone.norm(self.backbone.layers(trunk, rope, mask, cache, start=self.branch_layer))
        return h, self.vertical_states(trunk, rope, mask, cache, n_prefix) if vertical else None

    def vertical_states(self, trunk: Tensor, rope: Rope, mask: Mask, cache: KVCache | None, n_prefix: int) -> Tensor:
        """h^V (R, L, D) from the trunk state (R, L, D) (Eq. 6); n_prefix as in `states`. Of a video (R, L, 2D), the
        states of the temporal branch beside."""
        h = self.vertical(trunk, rope, mask, cache, self.backbone.n_layer)
        if self.temporal is None:
            return h
        return torch.cat([h, self.temporal(trunk, rope, mask, cache, self.backbone.n_layer + self.vertical_layers)], -1)

    def cache_spec(self) -> CacheSpec:
        return self.backbone.cache_spec(len(self.branches) * self.vertical_layers)

    def config(self) -> dict[str, Any]:
        intra = self.dual_head.intra
        return {
            "kind": "flashar",
            "backbone": self.backbone.config_dict(),
            "branch_layer": self.branch_layer,
            "vertical_layers": self.vertical_layers,
            "fusion": self.fusion,
            "corner": self.dual_head.corner,
            **({} if intra is None else {"intra": intra.config()}),
            **({} if self.temporal is None else {"video": {"frames": self.frames, "delay": self.delay}}),
        }

    @classmethod
    def from_nar(
        cls,
        state_dict: dict[str, Tensor],
        n_head: int,
        *,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        branch_layer: int | None = None,
    ) -> FlashAR:
        """A model from an official NAR state dict: one extra block on the last layer's output, averaged logits.

        Also reads the authors' LlamaGen-FlashAR weights. branch_layer: m, which no weights tell; None = L, or what a
        file's arguments say. A gate on logits without either, and missing, unknown or misshapen keys raise ValueError.
        """
        read = resolve_name("flashar_pl.checkpoints.nar:read_nar")
        return read(state_dict, n_head, rope_base=rope_base, norm_eps=norm_eps, branch_layer=branch_layer)

    @classmethod
    def from_released(cls, directory: str | Path, heads: Literal["full", "visual"] = "full") -> FlashAR:
        """A model from a checkpoint directory of the authors' Emu3.5-FlashAR: config.json and safetensors files.

        It keeps the conventions of their code (`flashar_pl.models.released`). heads="visual" loads only
        the rows of both heads that score visual codes, all that decoding needs. Missing, unknown or misshapen keys
        raise ValueError.
        """
        return resolve_name("flashar_pl.checkpoints.released:read_released")(directory, heads)

    def to_nar(self) -> dict[str, Tensor]:
        """The official NAR or LlamaGen-FlashAR state dict, inverse of `from_nar`."""
        return resolve_name("flashar_pl.checkpoints.nar:write_nar")(self)
