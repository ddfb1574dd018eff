"""BlockDiffusion: masked diffusion inside blocks, blocks one after the other (MDLM; BD3-LM, Arriola et al., 2025).

The FlashAR paper's post-training rival. A LlamaGen model gets a mask token and an embedding of time; the slot of a cell
predicts that cell. Two variants:

- the authors' own: one stream, in which later blocks see the noisy earlier ones, decoded without a cache;
- `clean_context`: training sees [noisy | clean], so a block sees what it will see while decoding, clean earlier blocks,
  and those are cached.

Shapes: B samples, R rows, H, W grid, N cells, V codes, D width, n cells of a block, S denoising steps of a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashar_pl.backbones.base import Backbone, check_codes, hide_padding, initialise
from flashar_pl.backbones.condition import Condition, Given
from flashar_pl.grid import DecodePlan, check_grid
from flashar_pl.layers.transformer import decode_mode
from flashar_pl.models.baselines.block_sampler import BlockSampler, Draws, check_steps
from flashar_pl.models.baselines.plans import block_plan, doubled_mask
from flashar_pl.models.dual_head import affine
from flashar_pl.models.losses import HeadInputs, head_nll
from flashar_pl.models.raster import RasterAR
from flashar_pl.numerics import wide
from flashar_pl.options import SamplingSettings

MIN_TIME = {False: 1e-5, True: 1e-3}
"""Smallest time in training, by `clean_context`: the authors', and BD3-LM's."""
PERIOD = 10000.0
"""Of the slowest time frequency."""


class TimeEmbedding(nn.Module):
    """W2 silu(W0 e(t) + b0) + b2; the last layer starts at zero. e(t): cosines, then sines, of t in [0, 1]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        initialise(self.hidden)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Times (...) -> (..., D)."""
        half, weight = self.hidden.in_features // 2, self.hidden.weight
        steps = torch.arange(half, dtype=wide(weight[:0]).dtype, device=weight.device)
        angles = t[..., None].to(steps) * torch.exp(-math.log(PERIOD) / half * steps)
        waves = F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, self.hidden.in_features - 2 * half))
        return self.out(F.silu(self.hidden(waves.to(weight.dtype))))


class BlockDiffusion(RasterAR):
    """A block diffusion model on a backbone, which it takes over.

    Args:
        backbone: its weights are where post-training starts; where it ends rows with a token, there is none here.
        strategy: what a block is, see `plans.block_plan`.
        clean_context: the strong variant, see the top of this file.
        steps: calls per block, S, where decoding is not told; the authors have 16, for one block.
        grid: (H, W) that `generate` draws where it is given none; None = the backbone's usual one.

    Raises:
        ValueError: an unknown strategy.
    """

    method = "BlockDiffusion"
    plan_name = "blocks"
    plans = ("blocks",)
    own_decoding = True

    def __init__(
        self,
        backbone: Backbone,
        strategy: str = "mdlm",
        clean_context: bool = False,
        steps: int = 16,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(backbone)
        self.strategy, self.clean_context, self.steps = strategy, clean_context, check_steps(steps)
        self.usual_grid = backbone.usual_grid if grid is None else check_grid(grid)
        self.make_plan(None, 8, 8)  # names the strategies
        self.mask, self.time = self.new_embeddings()

    def new_embeddings(self) -> tuple[nn.Embedding, TimeEmbedding]:
        """Of the mask and of time, with their first values."""
        mask = nn.Embedding(1, self.backbone.dim)
        initialise(mask)
        return mask, TimeEmbedding(self.backbone.dim)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any],
        strategy: str = "mdlm",
        clean_context: bool = False,
    ) -> BlockDiffusion:
        """A model from official weights.

        config: dim, n_layer, n_head, vocab_size and num_classes, and where they differ from LlamaGen's n_kv_head,
        multiple_of, ffn_dim_multiplier, rope_base, norm_eps, block_size (N of a square grid). The weights do not tell
        the strategy.

        Raises:
            ValueError: another method's weights, missing or unknown keys, or sizes that differ from the configuration.
        """
        read = resolve_name("flashar_pl.checkpoints.baselines:read_block_diffusion")
        return read(state_dict, config, strategy, clean_context)

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict, bit-exact inverse of `from_official`."""
        return resolve_name("flashar_pl.checkpoints.baselines:write_block_diffusion")(self)

    def config(self) -> dict[str, Any]:
        return {
            "kind": "block_diffusion",
            "backbone": self.backbone.config_dict(),
            "strategy": self.strategy,
            "clean_context": self.clean_context,
            "steps": self.steps,
        }

    def roles(self) -> dict[str, str]:
        """As of any model, but mask, time and head, whose targets change, are what stage 1 trains."""
        new = ("mask.", "time.", "backbone.head.")
        return {name: "added" if name.startswith(new) else role for name, role in super().roles().items()}

    @property
    def mask_id(self) -> int:
        """Token of a cell that is not decoded yet: V."""
        return self.backbone.vocabulary

    def make_plan(self, name: str | None, height: int, width: int) -> DecodePlan:
        if name not in (None, self.plan_name):
            raise ValueError(
                f"plan is {name!r}, and a BlockDiffusion model knows its own only; leave it out, or blocks."
            )
        return block_plan(height, width, self.strategy)

    # --- training ---------------------------------------------------------------------------------------------------

    def noise(self, codes: Tensor, t_blocks: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mask every cell of a block with the probability of its time: (noisy (B, N) int64, masked (B, N) bool).

        codes (B, H, W) or (B, N) int64; t_blocks (B, blocks) in [0, 1]; u (B, N) uniforms: u < t means masked.
        """
        flat, plan = self._flat(codes)
        masked = u < self._by_cell(t_blocks, plan).clamp_min(MIN_TIME[self.clean_context])
        return flat.masked_fill(masked, self.mask_id), masked

    def logits(self, noisy: Tensor, classes: Given, t: Tensor, clean: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) float32 of every cell of noisy (B, N) or (B, H, W) int64, masked where it holds V.

        t: (B,), (B, blocks) or (B, N) times. clean: codes like `noisy`, which a model with clean context needs.
        """
        flat, plan = self._flat(noisy)
        if (clean is not None) != self.clean_context:
            raise ValueError(f"clean is {'missing' if clean is None else 'given'}; the model has clean_context "
                             f"{self.clean_context}.")  # fmt: skip
        context = None if clean is None else self._flat(clean)[0]
        condition = self.backbone.check_condition(classes, len(flat))
        h = self.hidden(flat, condition, self._by_cell(t, plan), plan, context)
        return self.head_logits(h)

    def loss(  # type: ignore[override]
        self,
        codes: Tensor,
        classes: Given,
        t_blocks: Tensor | None = None,
        u: Tensor | None = None,
        *,
        plan: DecodePlan | None = None,
        valid: Tensor | None = None,
        aux_weight: float = 0.0,
    ) -> dict[str, Tensor]:
        """The weighted cross-entropy of masked cells, sum(CE / t) over all of them.

        The authors divide by the number of masked cells; with clean context it is divided by B * N, which bounds the
        nats per cell from above (BD3-LM, Eq. 8).

        codes (B, H, W) int64; t_blocks (B, blocks) and u (B, N) as in `noise`, None = drawn from U(0, 1) by torch's
        generator; in evaluation mode without gradients, as in a validation, the same ones every time.
        valid: (B,) bool; other samples count nothing.
        plan, aux_weight: of other models; the blocks follow from the grid, and there is one head.

        Returns "loss", differentiable, and detached "fused" and "horizontal", the same; "nll" (B,), the sum per image
        in nats, an upper bound of its likelihood in expectation; "masked", the share of masked cells; and "vertical"
        and "gate" (B, H, W), 0 and 1, of which a model with one head has nothing to say.
        """
        flat, plan = self._flat(codes)
        fixed = not self.training and not torch.is_grad_enabled()
        generator = torch.Generator(flat.device).manual_seed(0) if fixed else None
        if t_blocks is None:
            t_blocks = torch.rand(len(flat), plan.n_steps, device=flat.device, generator=generator)
        if u is None:
            u = torch.rand(flat.shape, device=flat.device, generator=generator)
        noisy, masked = self.noise(codes, t_blocks, u)
        t = self._by_cell(t_blocks, plan).clamp_min(MIN_TIME[self.clean_context])
        t = t.to(wide(self.mask.weight[:0]).dtype)
        condition = self.backbone.check_condition(classes, len(flat))
        h = self.hidden(noisy, condition, t, plan, flat if self.clean_context else None)
        counted = masked if valid is None else masked & valid.bool()[:, None]
        weight = counted.to(t) / t  # (B, N)
        rows = flat.flatten() + self.backbone.first_code
        head = HeadInputs(*affine(self.backbone.head, h.flatten(0, 1)), rows, weight.flatten())
        total, nll = head_nll(head)
        samples = len(flat) if valid is None else valid.sum().clamp_min(1)
        loss = total / (samples * plan.n_cells if self.clean_context else counted.sum().clamp_min(1))
        return {
            "loss": loss,
            "fused": loss.detach(),
            "horizontal": loss.detach(),
            "vertical": torch.zeros_like(loss.detach()),
            "nll": (nll.view_as(weight) * masked.to(t) / t).sum(1).detach(),
            "masked": masked.float().mean(),
            "gate": torch.ones(len(flat), plan.height, plan.width, device=flat.device),
        }

    # --- the network ------------------------------------------------------------------------------------------------

    def embed_at(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Tokens (R, n), V = masked, at times (R or 1, n) -> (R, n, D)."""
        masked = tokens == self.mask_id
        x = self.backbone.embed(tokens.masked_fill(masked, 0))
        return torch.where(masked[..., None], self.mask.weight[0].to(x), x) + self.time(t)

    def hidden(self, tokens: Tensor, condition: Condition, t: Tensor, plan: DecodePlan, clean: Tensor | None) -> Tensor:
        """Final states (R, N, D) in raster order, of tokens (R, N) at times (R or 1, N), all at once."""
        prefix, cells = self.backbone.prefix(condition), plan.on("cell", tokens.device)
        parts, rope = [prefix.x, self.embed_at(tokens[:, cells], t[:, cells])], self.backbone.rope(plan, prefix)
        mask = self.backbone.attention_mask(plan, prefix, plan.n_slots)
        if clean is not None:
            parts.append(self.embed_at(clean[:, cells], torch.zeros_like(t[:1])))
            rope = torch.cat([rope, rope[:, len(prefix) :]], dim=1)
            mask = hide_padding(doubled_mask(plan, len(prefix), tokens.device), prefix)
        x = self.backbone.layers(self.backbone.input_dropout(torch.cat(parts, dim=1)), rope, mask)
        h = self.backbone.norm(x)[:, len(prefix) : len(prefix) + plan.n_slots]
        return h[:, plan.on("slot", h.device)]

    def head_logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        return wide(self.backbone.head(h))[..., self.backbone.first_code :]

    def _flat(self, tokens: Tensor) -> tuple[Tensor, DecodePlan]:
        """Tokens (B, N) of (B, H, W) or (B, N), and the blocks of their grid: the usual one, or a square."""
        if tokens.ndim == 2:
            n = tokens.shape[1]
            square = (math.isqrt(n), math.isqrt(n))
            grid = self.usual_grid if self.usual_grid[0] * self.usual_grid[1] == n else square
            if grid[0] * grid[1] != n:
                raise ValueError(f"{n} cells are no {self.usual_grid} grid and no square; expected (B, H, W).")
            tokens = tokens.unflatten(1, grid)
        check_codes(tokens, self.mask_id + 1)
        return tokens.flatten(1), self.make_plan(None, *tokens.shape[1:])

    def _by_cell(self, t: Tensor, plan: DecodePlan) -> Tensor:
        """Times (B, N) of (B,), (B, blocks) or (B, N)."""
        if t.ndim == 1:
            return t[:, None].expand(-1, plan.n_cells)
        if t.ndim != 2 or t.shape[1] not in (plan.n_steps, plan.n_cells):
            raise ValueError(
                f"t has shape {tuple(t.shape)}; expected (B,), (B, {plan.n_steps}) of blocks or (B, {plan.n_cells})."
            )
        return t if t.shape[1] == plan.n_cells else t[:, plan.on("step", t.device)]

    # --- decoding ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        classes: Given,
        *,
        grid: tuple[int, int] | None = None,
        steps: int | None = None,
        cfg_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seeds: int | list[int] | Tensor | None = None,
        reveal_u: Tensor | None = None,
        gumbel_u: Tensor | None = None,
        cached: bool | None = None,
        on_step: Callable[[Tensor], object] | None = None,
        unconditional: Given | None = None,
    ) -> Tensor:
        """Codes (B, H, W) int64, in `steps` calls of the model per block.

        Args:
            classes: (B,) int64, or another condition of the backbone.
            grid: (H, W); None = that of the configuration.
            steps: S per block, None = the model's. Step s reveals a cell that is still masked with probability
                1 / (S - s).
            cfg_scale, temperature, top_k, seeds: as of `flashar_pl.decoding.generate`.
            top_p: the code that crosses the threshold is dropped too, as the authors' sampler does.
            greedy: take the most likely code. Which cells a step reveals stays random.
            reveal_u: (blocks, S - 1, B, n) uniforms, u < 1 / (S - s) reveals; None = from the seeds.
            gumbel_u: (blocks, S, B, n, V) uniforms; the code is argmax(logits - log(-log u)). None = from the seeds.
            cached: keep the keys and values of finished blocks; None = if the model has clean context.
            on_step: called with the tokens (B, N) after every call of the model; V = still masked.
            unconditional: what guidance leads away from; None = the backbone's own.

        Raises:
            ValueError: a value out of range, a cache without clean context, or logits that are not finite.
        """
        settings = SamplingSettings(cfg_scale, None, temperature, top_k, top_p, greedy)
        cached = self.clean_context if cached is None else cached
        if cached and not self.clean_context:
            raise ValueError("cached is True, and without clean_context every call changes all states; leave it out.")
        condition = self.backbone.check_condition(classes).to(self.device)
        if unconditional is not None:
            unconditional = self.backbone.check_condition(unconditional, len(condition)).to(self.device)
        plan = self.make_plan(None, *check_grid(grid or self.usual_grid))
        steps = check_steps(self.steps if steps is None else steps)
        if self.sharded:
            raise ValueError("the model is sharded, and a BlockDiffusion model draws on one device only; use ddp.")
        vocabulary = self.backbone.vocabulary
        draws = Draws.of(len(condition), plan, steps, seeds, reveal_u, gumbel_u, vocabulary, self.device)
        with decode_mode(self):
            if settings.guided:
                condition = self.backbone.with_unconditional(condition, unconditional)
            sampler = BlockSampler(self, condition, plan, settings, draws, cached)
            return sampler.run(on_step or (lambda tokens: None)).unflatten(1, (plan.height, plan.width))

    def draw(
        self,
        condition: Condition,
        plan: DecodePlan,
        settings: SamplingSettings,
        seeds: list[int],
        unconditional: Condition | None,
        on_step: Callable[[int, Tensor], object],
    ) -> Tensor:
        """See `GridModel.draw`: a step of the plan is a finished block. ValueError for a guidance interval."""
        if settings.cfg_interval is not None:
            raise ValueError("cfg_interval is given, and block diffusion guides every call; leave it out.")
        calls = itertools.count(1)

        def after_call(tokens: Tensor) -> None:
            if (call := next(calls)) % self.steps == 0:
                on_step(call // self.steps, tokens[:, plan.on("order", tokens.device)])

        names = ("temperature", "top_k", "top_p", "greedy")
        options = {"cfg_scale": settings.scale, **{name: getattr(settings, name) for name in names}}
        grid = plan.height, plan.width
        return self.generate(
            condition, grid=grid, seeds=seeds, on_step=after_call, unconditional=unconditional, **options
        )
