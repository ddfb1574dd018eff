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


def choose(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """Codes (...) int64 from guided logits (..., V) and uniforms (...) float64."""
    if settings.greedy:
        return logits.argmax(-1)
    return draw(filter_logits(logits, settings.temperature, settings.top_k, settings.top_p).softmax(-1), uniform)


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
