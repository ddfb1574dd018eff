"""From logits to codes: guidance, temperature, top-k, top-p, drawing. Pure, vectorised, no host synchronisation.

Shapes: leading axes are free, the last one is V codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashar_pl.numerics import wide
from flashar_pl.options import SamplingSettings

MIN_TEMPERATURE = 1e-5
"""Lower bound that keeps the division finite; LlamaGen uses the same."""


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance u + s (c - u) on float32 logits (..., V)."""
    return (conditional - unconditional).mul_(scale).add_(unconditional)


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, crossing: bool = True
) -> Tensor:
    """Logits (..., V) divided by the temperature, with removed codes at -inf: top-k first, then top-p on the rest.

    Ties with the k-th largest logit are kept. Top-p keeps the code that crosses the threshold, so at least one; without
    `crossing` it keeps that one only if it is the first.
    """
    logits = wide(logits)
    if temperature != 1:
        logits = logits / max(temperature, MIN_TEMPERATURE)
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        below = ordered.softmax(-1).cumsum(-1)
        removed = (below.roll(1, -1) if crossing else below) > top_p
        removed[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, index, removed), float("-inf"))
    return logits


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Filtered probabilities (..., V), float32 (float64 for float64 logits); they sum to 1."""
    SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    return filter_logits(logits, temperature, top_k, top_p).softmax(-1)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first code k with cdf[k] > u * cdf[-1], in vocabulary order.

    weights: (..., V) non-negative, any positive sum; uniform: (...) float64 in [0, 1). Returns (...) int64.
    The CDF is float64, so that a code depends on rounding only where u lies at a CDF edge. It is computed where
    `uniform` is: on the CPU for devices without float64 (`numerics.float64_device`).
    """
    cdf = weights.to(uniform.device).double().cumsum(-1)  # (..., V)
    threshold = uniform.unsqueeze(-1) * cdf[..., -1:]
    codes = torch.searchsorted(cdf, threshold, right=True).squeeze(-1).clamp_max(weights.shape[-1] - 1)
    return codes.to(weights.device)


def draw_coupled(weights: Tensor, uniform: Tensor) -> Tensor:
    """Codes (B, n) int64 of cells that leave their most likely code together as seldom as can be; n > 1.

    weights: (B, n, V) as in `draw`; uniform: (B, n) float64. Cell i owns the interval of length 1 - p_i(mode) that
    follows those of the cells before it, and leaves its mode where the interval holds u + a whole number, u one uniform
    for all (systematic sampling). Where it leaves, its own uniform draws from the other codes. u is the sum of the
    uniforms modulo 1, which is independent of each of them: every single cell has the distribution of `draw`.
    """
    weights, own = weights.to(uniform.device).double(), uniform
    mode = weights.argmax(-1, keepdim=True)
    others = weights.scatter(-1, mode, 0.0)
    ends = (others.sum(-1) / weights.sum(-1)).cumsum(-1)  # (B, n)
    passed = (ends - own.sum(-1, keepdim=True) % 1).ceil()  # how many u + 0, u + 1, ... lie below the end
    leaves = passed > torch.nn.functional.pad(passed[:, :-1], (1, 0))
    return torch.where(leaves, draw(others, own), mode.squeeze(-1))


def choose(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """Codes (B, n) int64 from guided logits (B, n, V) and uniforms (B, n) float64; coupled if the settings say so."""
    if settings.greedy:
        return logits.argmax(-1)
    weights = filter_logits(logits, settings.temperature, settings.top_k, settings.top_p).softmax(-1)
    if settings.coupling == "systematic" and uniform.shape[-1] > 1:
        return draw_coupled(weights, uniform).to(logits.device)
    return draw(weights, uniform)


def unusable(logits: Tensor) -> Tensor:
    """() bool on the device of logits (..., V): whether some row holds NaN or +inf, or nothing above -inf.

    `choose` would return some legal code there. -inf alone is no error: such a code is never drawn.
    """
    return ~logits.amax(-1).isfinite().all()


def check_usable(flags: Tensor, dtype: torch.dtype) -> None:
    """ValueError if `flags` (n_steps,), `unusable` of every step's logits, names a step. Waits for the device.

    dtype: of the model, for the message.
    """
    bad = flags.nonzero()
    if not len(bad):
        return
    advice = {
        torch.bfloat16: "try --dtype fp32",
        torch.float16: "float16 ends at 65504: try --dtype bf16 or fp32",
    }.get(dtype, "the weights are broken, or the condition is")
    name = str(dtype).removeprefix("torch.")
    raise ValueError(f"the logits of decoding step {int(bad[0])} are NaN or infinite in {name}; {advice}.")
