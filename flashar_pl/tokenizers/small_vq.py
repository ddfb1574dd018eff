"""A small VQ tokenizer trained on the spot: VQ-16's architecture at other widths, in minutes on one CPU core.

Reconstruction and codebook losses only (van den Oord et al. 2017, Eq. 3, on unit vectors as in LlamaGen); the published
tokenizers also train against a perceptual network and a discriminator, so pictures of this one are softer.

Shapes: n pictures or B of a batch, S side in pixels, f pixels per code, D dimensions of a code, N codes, M vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashar_pl.tokenizers.conv_tokenizer import TokenizerSpec, best_codes
from flashar_pl.tokenizers.convnet import GROUPS, NetSpec
from flashar_pl.tokenizers.vq16 import VQ16

BATCH, RATE, DIM = 16, 1e-3, 8
"""Pictures of a step, highest learning rate, D."""
COMMITMENT = 0.25
"""Weight of the loss that draws latents to their codes (LlamaGen)."""
CONTINUOUS = 0.15
"""Share of the steps before the codebook exists: latents pass as they are, then some of them become the codes."""
RESTART = 25
"""Codes that were not used for so many steps become latents of the batch."""
PATCH = 32
"""Side of the random parts that are trained on, where pictures are larger: the network sees places, not positions."""
FACTORS = (2, 4, 8, 16)
"""Possible numbers of pixels per code."""


def small_spec(downsample: int, codes: int, width: int) -> TokenizerSpec:
    """The sizes: a block a level, `width` channels, twice as many at the latents, and attention there.

    Raises:
        ValueError: a factor, width or number of codes that cannot be.
    """
    if downsample not in FACTORS or width < GROUPS or width % GROUPS or not 2 <= codes <= 65536:
        raise ValueError(
            f"downsample is {downsample}, width {width}, codes {codes}; expected downsample one of "
            f"{', '.join(map(str, FACTORS))}, width a multiple of {GROUPS}, codes from 2 to 65,536."
        )
    halvings = int(math.log2(downsample))
    widths = (width,) * halvings + (2 * width,)
    encoder = NetSpec(width, widths, blocks=1, attention=(False,) * halvings + (True,), latent=2 * width)
    return TokenizerSpec(encoder, replace(encoder, stem=widths[-1]), codes=codes, dim=DIM)


def train_small_vq(
    images: Tensor,
    spec: TokenizerSpec,
    steps: int,
    seed: int = 0,
    advance: Callable[..., Any] = lambda n, **shown: None,
) -> VQ16:
    """Train on pictures (n, 3, S, S) uint8, on their device; on the CPU the same for the same seed.

    advance: called after every step, with the loss.

    Raises:
        ValueError: a side that is no multiple of the pixels per code, or fewer than 2 steps.
    """
    side, f = images.shape[-1], spec.encoder.downsample
    if side % f:
        raise ValueError(f"pictures are {side} pixels wide; expected a multiple of {f}, such as {-(-side // f) * f}.")
    if steps < 2:
        raise ValueError(f"steps is {steps}; expected 2 or more.")
    part = max(f, PATCH // f * f) if side > PATCH else side
    numbers = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = VQ16(spec).to(images.device).requires_grad_(True).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=1e-4)
        rising = 0.1 if steps != 10 else 0.15  # a rise of one step is a division by 0 in torch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=RATE, total_steps=steps, pct_start=rising)
        used = torch.zeros(spec.codes, dtype=torch.bool, device=images.device)  # (N,)
        begins = max(1, int(CONTINUOUS * steps))
        for step in range(steps):
            pixels = model.from_uint8(random_parts(images, BATCH, part, numbers))
            if step == begins or (step > begins and (step - begins) % RESTART == 0 and step < 0.9 * steps):
                _renew(model, pixels, used, numbers)
                used.zero_()
            loss, codes = losses(model, pixels, quantised=step >= begins)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            used[codes] = True
            advance(1, loss=loss.detach())
    return model.requires_grad_(False).eval()


def losses(model: VQ16, pixels: Tensor, quantised: bool) -> tuple[Tensor, Tensor]:
    """The loss of pixels (B, 3, s, s) in [-1, 1], and the codes (M,) in use; without codes the latents are decoded."""
    z = F.normalize(model.quant_conv(model.encoder(pixels)), dim=1)  # (B, D, h, w)
    extra: Tensor | float = 0.0
    codes = torch.empty(0, dtype=torch.int64, device=pixels.device)
    if quantised:
        table = F.normalize(model.quantize.embedding.weight, dim=-1)  # (N, D)
        codes = best_codes(z.detach().movedim(1, -1).flatten(0, 2), table.detach())  # (M,)
        found = table[codes].view(z.shape[0], *z.shape[2:], -1).movedim(-1, 1)  # (B, D, h, w)
        extra = F.mse_loss(found, z.detach()) + COMMITMENT * F.mse_loss(z, found.detach())
        z = z + (found - z).detach()  # the gradient passes straight through
    out = model.decoder(model.post_quant_conv(z))  # (B, 3, s, s)
    return F.l1_loss(out, pixels) + F.mse_loss(out, pixels) + extra, codes


@torch.no_grad()
def _renew(model: VQ16, pixels: Tensor, used: Tensor, numbers: torch.Generator) -> None:
    """Give the codes that were not used (N,) latents of a batch."""
    rows = F.normalize(model.quant_conv(model.encoder(pixels)), dim=1).movedim(1, -1).flatten(0, 2)  # (M, D)
    idle = (~used).nonzero().flatten()
    chosen = torch.randint(len(rows), (len(idle),), generator=numbers).to(rows.device)
    noise = torch.randn(len(idle), rows.shape[1], generator=numbers).to(rows.device)
    model.quantize.embedding.weight[idle] = rows[chosen] + 0.02 * noise  # else a latent drawn twice is one code twice


def random_parts(images: Tensor, n: int, side: int, numbers: torch.Generator) -> Tensor:
    """n random square parts (n, 3, s, s) of random pictures (m, 3, S, S), every other one mirrored."""
    far = images.shape[-1] - side
    which = torch.randint(len(images), (n,), generator=numbers).tolist()
    tops, lefts = (torch.randint(far + 1, (n,), generator=numbers).tolist() for _ in range(2))
    places = zip(which, tops, lefts, strict=True)
    parts = [images[i, :, top : top + side, left : left + side] for i, top, left in places]
    return torch.stack([part.flip(-1) if k % 2 else part for k, part in enumerate(parts)])


def psnr(images: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB between uint8 pictures (n, 3, h, w): of the mean squared error over all."""
    error = (images.double() - other.double()).square().mean()
    return float(10 * (255**2 / error.clamp_min(1e-10)).log10())
