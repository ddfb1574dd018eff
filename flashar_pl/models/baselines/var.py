"""VAR: next-scale prediction. All codes of one scale are drawn at once, given all smaller scales.

A step decodes a scale, and its grid is one row of the codes of all scales (`plans.scale_plan`). What a scale reads is
no embedding of codes but the image so far, which the tokenizer's codebook sums up and shrinks.

Shapes: B samples, R rows (B, or 2B with guidance), K scales of p_0 < ... < p_(K-1) codes a side, L = sum of p_k^2
positions, D width, C code dimension of the tokenizer, V codes.
Source: Tian et al. 2024 (VAR), Sec. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.backbones.condition import ClassIds, Condition
from flashar_pl.grid import DecodePlan
from flashar_pl.layers.kv_cache import KVCache
from flashar_pl.models.baselines.plans import scale_plan
from flashar_pl.models.baselines.var_transformer import VARConfig, VARTransformer
from flashar_pl.models.raster import RasterAR
from flashar_pl.numerics import sample_seeds, strict_float32, uniforms
from flashar_pl.options import SamplingSettings
from flashar_pl.sampling import check_usable, choose, guide, unusable
from flashar_pl.tokenizers import MultiScaleVQ, Tokenizer
from flashar_pl.tokenizers.multi_scale_codebook import MultiScaleCodebook
from flashar_pl.tokenizers.multi_scale_vq import check_ids


class VAR(RasterAR):
    """A VAR model; see `VARConfig`. Conditions are class ids (B,) int64, num_classes = the null class."""

    method = "VAR"
    plan_name = "scales"
    plans = ("scales",)
    own_decoding = True
    reads_tokenizer = True
    backbone: VARTransformer
    codebook: MultiScaleCodebook | None
    """Of the tokenizer in use."""

    def __init__(self, backbone: VARTransformer) -> None:
        super().__init__(backbone)
        object.__setattr__(self, "codebook", None)  # the tokenizer's, and no part of the model

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> VAR:
        """A model from a published state dict, in the dtype of its weights; copied.

        config: patch_nums, depth, embed_dim and num_heads, and where they are not the published ones vocab_size (4096),
        num_classes (1000), shared_aln (False), attn_l2_norm (True), mlp_ratio (4) and norm_eps (1e-6). Other entries
        are not read. ValueError where config and tensors disagree, and for tensors that are missing, left over or of
        another shape.
        """
        return resolve_name("flashar_pl.checkpoints.var:read_official")(state_dict, config)

    def to_official(self) -> dict[str, Tensor]:
        """The published state dict, bit-exact inverse of `from_official`."""
        return resolve_name("flashar_pl.checkpoints.var:write_official")(self)

    def config(self) -> dict[str, Any]:
        return {"kind": "var", "backbone": self.backbone.config_dict()}

    @property
    def sizes(self) -> VARConfig:
        """Of the network."""
        return self.backbone.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.backbone.head.weight.dtype

    def make_plan(self, name: str | None, height: int, width: int) -> DecodePlan:
        if name not in (None, self.plan_name):
            raise ValueError(f"plan is {name!r}, and a VAR model knows its own only; leave it out, or scales.")
        if (height, width) != self.backbone.usual_grid:
            raise ValueError(
                f"grid is {height} x {width}; the grid of this VAR model is 1x{self.sizes.length}, all codes of its "
                "scales, and no other can be chosen: leave it out."
            )
        return scale_plan(self.sizes.patch_nums)

    def logits(self, ids: Tensor, x: Tensor, classes: Tensor) -> Tensor:
        """Teacher-forced logits (B, L, V) float32: position i predicts ids[:, i].

        ids (B, L) int64, of which only the shape matters; x (B, L - p_0^2, C): what the scales after the first see,
        `MultiScaleVQ.var_input(ids)`; classes (B,) int64. ValueError for other shapes, dtypes or ranges.
        """
        check_ids(ids, self.sizes.length, self.sizes.vocab_size, "this VAR model")
        condition = self._embed_classes(classes, len(ids))
        expected = (len(ids), self.sizes.length - self.sizes.first, self.sizes.code_dim)
        if tuple(x.shape) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {expected}: MultiScaleVQ.var_input(ids).")
        start = condition + self.backbone.pos_start
        seen = torch.cat([start, self.backbone.word_embed(x.to(self.dtype))], dim=1)  # (B, L, D)
        level = self.backbone.level()
        return self.backbone(seen, self.backbone.modulations(condition), 0, mask=level[:, None] >= level[None])

    def loss(self, ids: Tensor, x: Tensor, classes: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """{"loss": mean cross-entropy in nats over all positions}, of the arguments of `logits`; nothing is dropped."""
        logits = self.logits(ids, x, classes)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), ids.flatten())}

    # --- decoding ---------------------------------------------------------------------------------------------------

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Sums and shrinks by the tokenizer's codebook from now on; one without scales of its own gets the model's.

        ValueError where scales, number of codes, code dimension or device are not the model's; it names both.
        """
        object.__setattr__(self, "codebook", self._codebook_of(tokenizer))

    def invent(self) -> None:
        """A random codebook, where there is none."""
        if self.codebook is None:
            made = MultiScaleCodebook(self.sizes.vocab_size, self.sizes.code_dim, self.sizes.patch_nums)
            object.__setattr__(self, "codebook", made.to(self.device).requires_grad_(False))

    def _codebook_of(self, tokenizer: Tokenizer) -> MultiScaleCodebook:
        if not isinstance(tokenizer, MultiScaleVQ):
            raise ValueError(
                f"the tokenizer is {type(tokenizer).__name__}, and VAR draws codes of several scales; expected "
                "multi_scale_vq:FILE, such as vae_ch160v4096z32.pth."
            )
        tokenizer.check_weights()
        if not tokenizer.scales_given:
            tokenizer.quantize.set_scales(self.sizes.patch_nums)
        pairs = {
            "patch_nums": (list(tokenizer.patch_nums), list(self.sizes.patch_nums)),
            "codes": (tokenizer.vocabulary, self.sizes.vocab_size),
            "code dimension": (tokenizer.spec.dim, self.sizes.code_dim),
            "device": (str(tokenizer.quantize.embedding.weight.device), str(self.device)),
        }
        if odd := [f"{name} {its} and {own}" for name, (its, own) in pairs.items() if its != own]:
            raise ValueError(f"the tokenizer is not this model's: tokenizer and model have {', '.join(odd)}.")
        return tokenizer.quantize

    def generate(
        self,
        classes: Tensor,
        *,
        tokenizer: MultiScaleVQ,
        cfg_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seeds: int | Tensor | list[int] | None = None,
        on_scale: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """Ids (B, L) int64 of images of the given classes (B,), scale by scale, K forwards over a cache.

        cfg_scale: VAR's own, which grows over the scales: (1 + t) c - t u with t = cfg_scale k / (K - 1). 0 is off (no
        second row). The other settings and `seeds` are those of `flashar_pl.decoding.generate`; a sample's uniforms
        belong to its positions 0 .. L - 1. on_scale: called with k and the guided logits (B, p_k^2, V) of the scale.

        Raises ValueError for a tokenizer that is not the model's, for settings out of range, and where logits are NaN
        or infinite.
        """
        if not 0 <= cfg_scale < inf:
            raise ValueError(f"cfg_scale is {cfg_scale}; expected 0 or more (0 = no guidance).")
        settings = SamplingSettings(cfg_scale, None, temperature, top_k, top_p, greedy)
        codebook, listed = self._codebook_of(tokenizer), sample_seeds(seeds, len(classes))
        show = on_scale or (lambda k, logits: None)
        return self._draw(codebook, classes, None, settings, listed, lambda k, logits, ids: show(k, logits))

    def draw(
        self,
        condition: Condition,
        plan: DecodePlan,
        settings: SamplingSettings,
        seeds: list[int],
        unconditional: Condition | None,
        on_step: Callable[[int, Tensor], object],
    ) -> Tensor:
        """See `GridModel.draw`: a step of the plan is a scale, the codes are (B, 1, L), and cfg_scale is VAR's own."""
        if settings.cfg_interval is not None:
            raise ValueError("cfg_interval is given, and VAR's guidance grows over the scales; leave it out.")
        if self.codebook is None:
            raise ValueError("VAR draws with its tokenizer; give it: multi_scale_vq:FILE, or use_tokenizer.")
        assert isinstance(condition, ClassIds)
        assert isinstance(unconditional, ClassIds | None)
        return self._draw(
            self.codebook,
            condition.ids,
            None if unconditional is None else unconditional.ids,
            settings,
            seeds,
            lambda k, logits, ids: on_step(k + 1, F.pad(ids, (0, self.sizes.length - ids.shape[1]))),
        )[:, None]

    @torch.no_grad()
    def _draw(
        self,
        codebook: MultiScaleCodebook,
        classes: Tensor,
        null: Tensor | None,
        settings: SamplingSettings,
        seeds: list[int],
        after_scale: Callable[[int, Tensor, Tensor], object],
    ) -> Tensor:
        """Ids (B, L). after_scale: called with k, the guided logits (B, p_k^2, V) and the ids so far."""
        config, network, batch = self.sizes, self.backbone, len(classes)
        condition = self._embed_classes(classes, batch)
        noise = uniforms(seeds, config.length).to(condition.device)
        if network.guided(settings):
            null = torch.full_like(classes, config.num_classes) if null is None else null
            condition = torch.cat([condition, self._embed_classes(null, batch)])
        modulations, rows = network.modulations(condition), len(condition)
        cache = KVCache(network.cache_spec(), rows, config.length, self.dtype, condition.device)
        x, total, ids = condition + network.pos_start, None, classes.new_empty(batch, 0).to(condition.device)
        broken = []
        for k, side in enumerate(config.patch_nums):
            begin, end = cache.filled, cache.filled + side * side
            logits = network(x, modulations, begin, cache=cache)  # (R, p_k^2, V)
            if rows > batch:
                given, without = logits.chunk(2)
                logits = guide(given, without, 1 + settings.scale * k / (len(config.patch_nums) - 1))
            broken.append(unusable(logits))
            found = choose(logits, noise[:, begin:end], settings)  # (B, p_k^2)
            ids = torch.cat([ids, found], dim=1)
            after_scale(k, logits, ids)
            if end < config.length:
                with strict_float32(ids.device.type):
                    added = codebook.scale(k, found)
                    total = added if total is None else total + added  # (B, C, P, P)
                    seen = codebook.next_input(total, k)  # (B, p_(k+1)^2, C)
                x = network.word_embed(seen.to(self.dtype)).repeat(rows // batch, 1, 1)
        check_usable(torch.stack(broken), self.dtype)
        return ids

    def _embed_classes(self, classes: Tensor, batch: int) -> Tensor:
        """(B, 1, D). ValueError unless `classes` is (batch,) int64 of 0 .. num_classes."""
        if classes.shape != (batch,) or classes.dtype != torch.int64:
            raise ValueError(f"classes is {tuple(classes.shape)} {classes.dtype}; expected ({batch},) int64.")
        if batch and not 0 <= int(classes.min()) <= int(classes.max()) <= self.sizes.num_classes:
            raise ValueError(
                f"classes lie in {int(classes.min())} .. {int(classes.max())}; this model has 0 .. "
                f"{self.sizes.num_classes - 1}, and {self.sizes.num_classes} = no class."
            )
        return self.backbone.class_emb(classes.to(self.device))[:, None]
