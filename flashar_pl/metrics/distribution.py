"""Distances between two sets of feature rows: FID, Inception Score, KID, precision and recall.

Pure functions, whose sums and decisions are float64. Every argument is a torch tensor or a numpy array; every result
is a Python float.
Higher is better for the Inception Score, precision, recall and F1; lower is better for the distances.

Shapes: n samples, m reference rows, d feature columns, C classes, s splits or subsets, k neighbours.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flashar_pl.metrics.precision_recall import f1_score, precision_recall, squared_distances
from flashar_pl.metrics.rows import Array, check_pair, check_rows
from flashar_pl.numerics import strict_float32

__all__ = [
    "check_moments",
    "f1_score",
    "frechet_distance",
    "frechet_distance_from_moments",
    "frechet_standard_error",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]

ADM_SPLIT_SIZE = 5000
"""Rows per part of the Inception Score in the ADM evaluator."""
ROUNDING = 1e-12
"""A Fréchet distance below this share of tr S1 + tr S2 is rounding: equal sets give exactly 0."""
NEGATIVE = 1e-4
"""A covariance may lack symmetry, or have a negative eigenvalue, by this share of its largest one: rounding."""
CANCELLED = 1e-5
"""Or by this share of |mean|^2: so much float32 leaves of E[x x^T] - mean mean^T where rows are nearly constant."""
LOST = 1e-10
"""Share of tr S1 + tr S2 that rounding may cost the quick form of tr (S1 S2)^(1/2) at worst; it costs some 1e-14."""


# --- Fréchet distance -------------------------------------------------------------------------------------------------


def frechet_distance(samples: Array, reference: Array) -> float:
    """Fréchet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of samples (n, d) and reference (m, d).

    FID on Inception pool features, sFID on spatial features (Heusel et al., 2017, Eq. 6). Covariances are unbiased and
    float64. The means are taken and subtracted in the dtype of the rows, as the ADM evaluator and torch-fidelity do:
    float32 rows with a large common offset lose digits (3e-4 of the result in one reference vector). Singular
    covariances (n <= d) need no special case; equal sets give exactly 0.

    Raises:
        ValueError: fewer than 2 rows, different numbers of columns, or values that are not finite.
    """
    x, y = check_pair(samples, reference, minimum=2)
    offset = _stored_mean(x) - _stored_mean(y)  # (d,)
    x, y, apart = x.double(), y.double(), float(offset.dot(offset))
    if min(len(x), len(y)) > x.shape[1]:
        return _from_covariances(apart, (_covariance(x), None), (_covariance(y), None))
    return _from_factors(apart, _factor_of_rows(x), _factor_of_rows(y))


def frechet_distance_from_moments(mu: Array, sigma: Array, mu2: Array, sigma2: Array) -> float:
    """The same distance from means (d,) and covariances (d, d).

    Raises:
        ValueError: shapes do not match, values are not finite, or a matrix is not a covariance (not symmetric, or with
            a negative eigenvalue, each beyond `_rounding`; smaller ones count as 0).
    """
    first, second = check_moments(mu, sigma, "first"), check_moments(mu2, sigma2, "second")
    if first[0].shape != second[0].shape:
        raise ValueError(f"means have {len(first[0])} and {len(second[0])} entries; expected the same features.")
    offset = (first[0] - second[0]).square().sum()
    return _from_covariances(float(offset), first[::-1], second[::-1])


def frechet_standard_error(samples: Array, mu: Array, sigma: Array) -> float:
    """Standard error of the Fréchet distance of samples (n, d) from fixed moments mu (d,), sigma (d, d).

    Delta method: to first order the distance is a mean over samples of
        f(x) = 2 (m - mu)^T (x - m) + (x - m)^T (I - T) (x - m),
        T = S^(-1/2) (S^(1/2) sigma S^(1/2))^(1/2) S^(-1/2),
    with m, S the samples' own moments (T takes them to the reference), so the error is s(f) / sqrt(n). It is that of
    the draw of samples; the bias of the distance, which falls with n, and the reference's own error are not in it.
    """
    rows = check_rows(samples, "samples", minimum=3).double()
    mean, covariance = (torch.as_tensor(moment).detach().double().to(rows.device) for moment in (mu, sigma))
    own = rows.mean(dim=0)
    apart = rows - own  # (n, d)
    values, vectors = torch.linalg.eigh(rows.T.cov().reshape(len(own), len(own)))
    kept = values > len(values) * torch.finfo(torch.float64).eps * values.abs().max()
    roots, basis = values[kept].sqrt(), vectors[:, kept]  # (r,), (d, r)
    inner, turn = torch.linalg.eigh(roots[:, None] * (basis.T @ covariance @ basis) * roots)  # (r,), (r, r)
    white = apart @ (basis / roots) @ turn  # (n, r)
    moved = white.square() @ inner.clamp(min=0).sqrt()  # (n,) (x - m)^T T (x - m)
    influence = 2 * apart @ (own - mean) + apart.square().sum(dim=1) - moved  # (n,)
    return float(influence.std()) / len(rows) ** 0.5


def check_moments(mu: Array, sigma: Array, name: str = "reference") -> tuple[Tensor, Tensor]:
    """A mean (d,) and a covariance (d, d) in float64 on the CPU; ValueError where they cannot be such a pair."""
    mean, covariance = (torch.as_tensor(moments).detach().double().cpu() for moments in (mu, sigma))
    if mean.ndim != 1 or tuple(covariance.shape) != (len(mean), len(mean)):
        raise ValueError(
            f"{name} moments are {tuple(mean.shape)} and {tuple(covariance.shape)}; expected a mean (d,) and a "
            "covariance (d, d)."
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError(f"{name} moments hold NaN or infinity; expected finite values.")
    if len(mean) and float((covariance - covariance.T).abs().max()) > _rounding(float(covariance.abs().max()), mean):
        raise ValueError(f"{name} covariance is not symmetric.")
    return mean, (covariance + covariance.T) / 2


def _rounding(largest: float, mean: Tensor | None) -> float:
    """What a covariance with this largest entry, of rows around this mean (d,), may be wrong by."""
    return NEGATIVE * largest + (0.0 if mean is None else CANCELLED * float(mean.square().sum()))


def _stored_mean(rows: Tensor) -> np.ndarray:
    """Mean over rows (d,) in their own dtype (bfloat16: float32), added in numpy's order."""
    kept = rows.float() if rows.dtype == torch.bfloat16 else rows
    return kept.cpu().numpy().mean(axis=0)


def _factor_of_rows(rows: Tensor) -> Tensor:
    """F with F^T F = covariance of rows (n, d): the centred rows themselves where they are the fewer."""
    if len(rows) <= rows.shape[1]:
        return (rows - rows.mean(dim=0)) / (len(rows) - 1) ** 0.5  # (n, d)
    return _factor(_covariance(rows))


def _covariance(rows: Tensor) -> Tensor:
    """(d, d) of rows (n, d)."""
    return _gram((rows - rows.mean(dim=0)).T) / (len(rows) - 1)


def _gram(a: Tensor) -> Tensor:
    """a a^T (n, n), in whose symmetry numpy's BLAS finds half of the time on a CPU."""
    return torch.from_numpy(a.numpy() @ a.numpy().T) if a.device.type == "cpu" else a @ a.T


def _factor(covariance: Tensor, mean: Tensor | None = None) -> Tensor:
    """F (r, d) with F^T F = covariance, r the numerical rank. mean: see `_rounding`."""
    values, vectors = torch.linalg.eigh(covariance)  # (d,) ascending, (d, d)
    if values[0] < -_rounding(float(values.abs().max()), mean):
        raise ValueError(
            f"not a covariance: its smallest eigenvalue is {float(values[0]):.3g}, its largest {float(values[-1]):.3g}."
        )
    kept = values > len(values) * torch.finfo(torch.float64).eps * values.abs().max()  # the rest is rounding
    return (vectors[:, kept] * values[kept].sqrt()).T


def _from_covariances(
    offset: float, first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None]
) -> float:
    """Of two covariances (d, d) with means (d,), for `_rounding`.

    With S1 = L L^T the trace of the root is that of the root of L^T S2 L, which is symmetric and positive. An
    eigenvalue e is off by some epsilon times the largest, and its root by 1 / 2 sqrt(e) of that: little, unless a
    covariance is singular or nearly so. Then it is the factors' turn.
    """
    spread = float(first[0].trace() + second[0].trace())
    lower, failed = torch.linalg.cholesky_ex(first[0])
    if not failed:
        roots = torch.linalg.eigvalsh(lower.T @ second[0] @ lower).clamp(min=0).sqrt()  # (d,) ascending
        lost = float((torch.finfo(torch.float64).eps * roots[-1] ** 2 / roots).sum())  # both traces; inf at 0
        if lost <= LOST * spread:
            return _distance(offset, spread, float(roots.sum()), max(lost, ROUNDING * spread))
    return _from_factors(offset, _factor(*first), _factor(*second))


def _from_factors(offset: float, factor: Tensor, other: Tensor) -> float:
    # tr (S1 S2)^(1/2) = nuclear norm of F1 F2^T: real by construction, and exact to rounding for singular matrices.
    root_trace = float(torch.linalg.svdvals(factor @ other.T).sum())
    spread = float(factor.square().sum() + other.square().sum())  # tr S1 + tr S2
    return _distance(offset, spread, root_trace, ROUNDING * spread)


def _distance(offset: float, spread: float, root_trace: float, rounding: float) -> float:
    distance = offset + spread - 2 * root_trace
    return distance if distance > rounding else 0.0


# --- Inception Score --------------------------------------------------------------------------------------------------


def inception_score(
    logits_or_probs: Array,
    splits: int | None = None,
    *,
    split_size: int = ADM_SPLIT_SIZE,
    shuffle_seed: int | None = None,
    kind: str = "auto",
) -> float:
    """Inception Score: mean over parts of exp(mean KL(p(y|x) || p(y))) (Salimans et al., 2016).

    Args:
        logits_or_probs: (n, C) logits (Inception: without bias) or class probabilities.
        splits: None cuts consecutive parts of `split_size` rows, the last one shorter and with equal weight (ADM); a
            number cuts that many parts at i * n // splits (torch-fidelity, which uses 10).
        shuffle_seed: permute the rows first with numpy's RandomState of this seed (torch-fidelity: 2020); None keeps
            their order.
        kind: "logits", "probs", or "auto": probabilities where no entry is negative and every row sums to 1.

    Raises:
        ValueError: wrong shape, not finite, `splits` not in 1..n, `split_size` < 1, unknown kind, or "probs" whose rows
            are no probabilities.
    """
    rows = check_rows(logits_or_probs, "logits_or_probs")
    if kind not in ("auto", "logits", "probs"):
        raise ValueError(f"kind is {kind!r}; expected 'auto', 'logits' or 'probs'.")
    is_probs = kind != "logits" and _are_probabilities(rows)
    if kind == "probs" and not is_probs:
        raise ValueError("kind='probs', but the rows are not probabilities: negative entries or sums other than 1.")
    if splits is not None and not 1 <= splits <= len(rows):
        raise ValueError(f"splits is {splits}; expected 1 to {len(rows)}, the number of rows.")
    if split_size < 1:
        raise ValueError(f"split_size is {split_size}; expected 1 or more.")
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(len(rows))
        rows = rows[torch.as_tensor(order, device=rows.device)]
    if splits is None:
        parts = rows.split(split_size)
    else:
        edges = [i * len(rows) // splits for i in range(splits + 1)]
        parts = rows.split([b - a for a, b in pairwise(edges)])
    return float(np.mean([_part_score(part.double(), is_probs) for part in parts]))


def _are_probabilities(rows: Tensor) -> bool:
    tolerance = 1e-2 if rows.dtype in (torch.float16, torch.bfloat16) else 1e-4
    sums = rows.double().sum(dim=1)
    return bool((rows >= 0).all() and ((sums - 1).abs() <= tolerance).all())


def _part_score(part: Tensor, is_probs: bool) -> float:
    p = part if is_probs else part.softmax(dim=1)  # (b, C)
    divergence = (torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(dim=0))).sum(dim=1)  # (b,); 0 log 0 = 0
    return float(divergence.mean().exp())


# --- kernel distance --------------------------------------------------------------------------------------------------


def kernel_distance(
    samples: Array,
    reference: Array,
    subsets: int = 100,
    subset_size: int = 1000,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    *,
    kernel: str = "poly",
    sigma: float = 10.0,
    seed: int = 2020,
) -> float:
    """Kernel distance (KID): mean unbiased MMD^2 over random subsets (Binkowski et al., 2018), as in torch-fidelity.

    It may be negative, because the estimator is unbiased. The products of float32 rows are float32, as there; all that
    is made of them is float64 (1e-11 from float64 products, where a kernel distance is 4e-4).

    Args:
        samples, reference: (n, d) and (m, d).
        subsets, subset_size: number and size of the subsets, drawn without replacement from numpy's RandomState(seed),
            samples before reference.
        degree, gamma, coef: polynomial kernel (gamma x.y + coef)^degree; gamma None means 1 / d.
        kernel: "poly", or "rbf" with width `sigma`.

    Raises:
        ValueError: fewer rows than `subset_size`, subset_size < 2, subsets < 1, unknown kernel, shapes as elsewhere.
    """
    x, y = check_pair(samples, reference, minimum=2)
    if kernel not in ("poly", "rbf"):
        raise ValueError(f"kernel is {kernel!r}; expected 'poly' or 'rbf'.")
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets is {subsets}, subset_size {subset_size}; expected 1 and 2 or more.")
    if min(len(x), len(y)) < subset_size:
        raise ValueError(
            f"subset_size is {subset_size}, but there are {len(x)} samples and {len(y)} reference rows; "
            f"expected {min(len(x), len(y))} or less."
        )
    scale = 1.0 / x.shape[1] if gamma is None else gamma

    x, y = (rows.float() if rows.dtype.itemsize < 4 else rows for rows in (x, y))

    def total(a: Tensor, b: Tensor | None = None) -> float:
        """Sum of the kernel over all pairs; over those of different rows of `a`."""
        if kernel == "rbf":
            values = torch.exp(-squared_distances(a.double(), (a if b is None else b).double()) / (2 * sigma**2))
        else:
            values = (_gram(a) if b is None else a @ b.T).double().mul_(scale).add_(coef) ** degree
        return float(values.sum() - (values.trace() if b is None else 0.0))

    generator, size = np.random.RandomState(seed), subset_size
    results = []
    with strict_float32(x.device.type):
        for _ in range(subsets):
            a, b = (
                rows[torch.as_tensor(generator.choice(len(rows), size, replace=False), device=x.device)]
                for rows in (x, y)
            )
            within = (total(a) + total(b)) / (size * (size - 1))
            results.append(within - 2 * total(a, b) / size**2)
    return float(np.mean(results))
