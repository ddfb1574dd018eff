# mypy: ignore-errors
"""The three kernels between two forwards: `gate`, `logits` and `choose`. `places`, `now`, ACC: as in `block`.

Shapes: B samples, n cells of a step, C = B n cells (b * n + j), S states fed last in each row, V codes, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashar_pl.layers.kernels.block import PLACES


@triton.jit(do_not_specialize=["pairs", "n_pairs", "n_states", "h_at", "v_at"])
def gate(h, v, h_gain, v_gain, w, out_w, sums, pairs, n_pairs, n_states, h_at, v_at, h_eps, v_eps, hidden,
         D: tl.constexpr, NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
         ACC: tl.constexpr):  # fmt: skip
    """sums (blocks of the hidden units, pairs): this block's part of the gate's last layer (Eq. 7), before its bias.

    Pair r * n_pairs + j: states r * n_states + h_at + j of h and + v_at + j of v, which NORM norms. w (hidden, 2 D).
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = m < pairs
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    live = o < hidden
    at = m // n_pairs * n_states + m % n_pairs
    a = tl.zeros((BM, BN), ACC)
    b = tl.zeros((BM, BN), ACC)
    h2 = tl.zeros((BM,), ACC)
    v2 = tl.zeros((BM,), ACC)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        inside = k < D
        mask, seen = rows[:, None] & inside[None, :], inside[:, None] & live[None, :]
        hs = tl.load(h + (at + h_at)[:, None] * D + k[None, :], mask=mask, other=0.0).to(ACC)
        vs = tl.load(v + (at + v_at)[:, None] * D + k[None, :], mask=mask, other=0.0).to(ACC)
        if NORM:
            h2 += tl.sum(hs * hs, 1)
            v2 += tl.sum(vs * vs, 1)
            hs *= tl.load(h_gain + k, mask=inside, other=0.0).to(ACC)[None, :]
            vs *= tl.load(v_gain + k, mask=inside, other=0.0).to(ACC)[None, :]
        wh = tl.load(w + o[None, :] * (2 * D) + k[:, None], mask=seen, other=0.0)
        wv = tl.load(w + o[None, :] * (2 * D) + D + k[:, None], mask=seen, other=0.0)
        a += tl.dot(hs.to(wh.dtype), wh, input_precision="ieee", out_dtype=ACC)
        b += tl.dot(vs.to(wv.dtype), wv, input_precision="ieee", out_dtype=ACC)
    if NORM:
        a *= (1 / tl.sqrt(h2 / D + h_eps))[:, None]
        b *= (1 / tl.sqrt(v2 / D + v_eps))[:, None]
    unit = a + b
    unit = unit / (1 + tl.exp(-unit)) * tl.load(out_w + o, mask=live, other=0.0).to(ACC)[None, :]
    tl.store(sums + tl.program_id(0) * pairs + m, tl.sum(unit, 1), mask=rows)


@triton.jit
def head(x, gain, w, bias, at, there, o, live, eps, D: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Logits (BM, BN) of dtype ACC: rows `at` of x, where `there`, through rows `o` of w (V, D)."""
    acc = tl.zeros((BM, BN), ACC)
    square = tl.zeros((BM,), ACC)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        inside = k < D
        xs = tl.load(x + at[:, None] * D + k[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        if NORM:
            wide = xs.to(ACC)
            square += tl.sum(wide * wide, 1)
            xs = (wide * tl.load(gain + k, mask=inside, other=0.0).to(ACC)[None, :]).to(w.dtype.element_ty)
        ws = tl.load(w + o[None, :] * D + k[:, None], mask=inside[:, None] & live[None, :], other=0.0)
        acc += tl.dot(xs, ws, input_precision="ieee", out_dtype=ACC)
    if NORM:
        acc *= (1 / tl.sqrt(square / D + eps))[:, None]
    if BIAS:
        acc += tl.load(bias + o, mask=live, other=0.0).to(ACC)[None, :]
    return acc


@triton.jit
def weight(sums, gate_bias, c, n, n_pairs, pairs, only_h, only_v, row, MODE: tl.constexpr, BLOCKS: tl.constexpr,
           BM: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """(BM,) weight of the horizontal logits of cells c in rows `row`: 1, 0, or for both heads the gate or 0.5."""
    j = c % n
    g = tl.full((BM,), 0.5, ACC)
    both = (j >= only_h) & (j < n - only_v)
    if MODE == "gate":
        g = tl.zeros((BM,), ACC)
        for block in range(BLOCKS):
            g += tl.load(
                sums + block * pairs + row * n_pairs + j - only_h, mask=both & (row * n_pairs < pairs), other=0.0
            )
        g = 1 / (1 + tl.exp(-(g + tl.load(gate_bias).to(ACC))))
    return tl.where(both, g, tl.where(j < only_h, 1.0, 0.0).to(ACC))


@triton.jit(do_not_specialize=["batch", "n", "n_states", "h_at", "v_at", "only_h", "only_v", "pairs"])
def logits(h, v, h_gain, v_gain, w_h, w_v, b_h, b_v, sums, gate_bias, z, clock, now,
           batch, n, V, n_states, h_at, v_at, only_h, only_v, pairs, h_eps, v_eps, scale, temperature,
           D: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GUIDED: tl.constexpr, MODE: tl.constexpr,
           BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """z (C, V) float32: both heads, their mix (Eq. 8), guidance u + s (c - u), divided by the temperature.

    MODE: "horizontal", that head alone, or how both are mixed: "gate" or "average". Of a step's n cells the first
    only_h have the horizontal head alone, the last only_v the vertical one. Sets `now` to the step, `clock`.
    """
    c = tl.program_id(1) * BM + tl.arange(0, BM)
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    b, j, live = c // n, c % n, o < V
    rows = b < batch
    n_pairs = n - only_h - only_v
    with_h, with_v = rows & (j < n - only_v), rows & (j >= only_h)
    at = b * n_states + j
    far = at + batch * n_states
    mixed = head(h, h_gain, w_h, b_h, at + h_at, with_h, o, live, h_eps, D, NORM, BIAS, BM, BN, BK, ACC)
    if MODE != "horizontal":
        g = weight(sums, gate_bias, c, n, n_pairs, pairs, only_h, only_v, b, MODE, BLOCKS, BM, ACC)[:, None]
        other = head(v, v_gain, w_v, b_v, at + v_at - only_h, with_v, o, live, v_eps, D, NORM, BIAS, BM, BN, BK, ACC)
        mixed = g * mixed + (1 - g) * other
    if GUIDED:
        away = head(h, h_gain, w_h, b_h, far + h_at, with_h, o, live, h_eps, D, NORM, BIAS, BM, BN, BK, ACC)
        if MODE != "horizontal":
            g = weight(sums, gate_bias, c, n, n_pairs, pairs, only_h, only_v, b + batch, MODE, BLOCKS, BM, ACC)[:, None]
            other = head(
                v, v_gain, w_v, b_v, far + v_at - only_h, with_v, o, live, v_eps, D, NORM, BIAS, BM, BN, BK, ACC
            )
            away = g * away + (1 - g) * other
        mixed = (mixed - away) * scale + away
    tl.store(z + c[:, None].to(tl.int64) * V + o[None, :], (mixed / temperature).to(tl.float32),
             mask=rows[:, None] & live[None, :])  # fmt: skip
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(now, tl.load(clock))


@triton.jit
def sortable(x):
    """Integers (int64, 0 to 2^32 - 1) in the order of float32 x."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648


@triton.jit
def threshold(z, V, peak, goal, floor, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest `sortable` t such that the codes from t on, those from `floor` on counted, are at least `goal`
    many or, MASS, weigh more than the part `goal` of all. 4 bits at a time, most significant first."""
    t = tl.zeros((1,), tl.int64)
    for i in range(8):
        tries = t + (tl.arange(0, 16).to(tl.int64) << (28 - 4 * i))
        found = tl.zeros((16,), tl.float64)
        whole = tl.zeros((1,), tl.float64)
        for k0 in range(0, V, BLOCK):
            k = k0 + tl.arange(0, BLOCK)
            x = tl.load(z + k, mask=k < V, other=float("-inf"))
            key = sortable(x)
            each = tl.where((key >= floor) & (k < V), tl.exp(x - peak) if MASS else 1.0, 0.0)
            found += tl.sum(tl.where(key[None, :] >= tries[:, None], each[None, :], 0.0), 1).to(tl.float64)
            whole += tl.sum(each, 0).to(tl.float64)
        reached = found > goal * whole if MASS else found >= goal
        t += (tl.sum(reached.to(tl.int64), 0) - 1) << (28 - 4 * i)
    return tl.sum(t, 0)


@triton.jit
def last_tie(z, V, peak, t, floor, top_p, BLOCK: tl.constexpr):
    """Index of the last code of key t that top-p keeps: of equal ones the first, until all kept outweigh it."""
    above = tl.zeros((1,), tl.float64)
    whole = tl.zeros((1,), tl.float64)
    value = tl.zeros((1,), tl.float64)
    for k0 in range(0, V, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        x = tl.load(z + k, mask=k < V, other=float("-inf"))
        key = sortable(x)
        each = tl.where((key >= floor) & (k < V), tl.exp(x - peak), 0.0)
        above += tl.sum(tl.where(key > t, each, 0.0), 0).to(tl.float64)
        whole += tl.sum(each, 0).to(tl.float64)
        value = tl.maximum(value, tl.max(tl.where(key == t, each, 0.0), 0).to(tl.float64))
    kept = tl.floor((top_p * whole - above) / value) + 1
    seen = tl.zeros((1,), tl.float64)
    last = tl.zeros((1,), tl.int32)
    for k0 in range(0, V, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        x = tl.load(z + k, mask=k < V, other=float("-inf"))
        tie = ((sortable(x) == t) & (k < V)).to(tl.int32)
        count = seen + tl.cumsum(tie, 0).to(tl.float64)
        last = tl.maximum(last, tl.max(tl.where((tie > 0) & (count <= kept), k, 0), 0))
        seen += tl.sum(tie, 0).to(tl.float64)
    return tl.sum(last, 0)


@triton.jit
def kept_weights(z, V, k, peak, t, tie, FILTER: tl.constexpr):
    """exp(z - peak) of codes k (BLOCK,), float64; 0 for those that a filter removes: below t, or t and after `tie`."""
    x = tl.load(z + k, mask=k < V, other=float("-inf"))
    keep = k < V
    if FILTER:
        key = sortable(x)
        keep = keep & ((key > t) | ((key == t) & (k <= tie)))
    return tl.where(keep, tl.exp(x - peak), 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["n", "n_fed", "top_k"])
def choose(z, noise, drawn, fed, broken, places, now, clock, n, V, N, n_fed, top_k, top_p,
           GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program per cell: the code drawn from z (C, V) with noise (B, N), into drawn (B, N) and fed (B, n_fed).

    Two levels: sums of blocks of codes, then the codes of one block, all float64; see `flashar_pl.sampling.draw`.
    Sets broken[t] where logits are NaN or +inf or nothing is above -inf, and `clock` to the next step.
    """
    c = tl.program_id(0)
    b, j = c // n, c % n
    step = tl.load(now)
    done = tl.load(places + step * PLACES)
    z += c.to(tl.int64) * V
    peak = float("-inf")
    nan = 0
    for k0 in range(0, V, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        x = tl.load(z + k, mask=k < V, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(x, 0))
        nan += tl.sum((x != x).to(tl.int32), 0)
    tl.store(broken + step, 1, mask=(nan > 0) | (peak == float("inf")) | (peak == float("-inf")))
    code = V - 1
    if GREEDY:
        for k0 in range(0, V, BLOCK):
            k = k0 + tl.arange(0, BLOCK)
            x = tl.load(z + k, mask=k < V, other=float("-inf"))
            code = tl.minimum(code, tl.min(tl.where(x == peak, k, V - 1), 0))
    else:
        t = tl.full((), 0, tl.int64)
        tie = V
        if TOP_K:
            t = threshold(z, V, peak, top_k, t, False, BLOCK)
        if TOP_P:
            floor = t
            t = threshold(z, V, peak, top_p, floor, True, BLOCK)
            tie = last_tie(z, V, peak, t, floor, top_p, BLOCK)
        total = tl.full((), 0.0, tl.float64)
        for k0 in range(0, V, BLOCK):
            total += tl.sum(kept_weights(z, V, k0 + tl.arange(0, BLOCK), peak, t, tie, TOP_K or TOP_P), 0)
        goal = tl.load(noise + b * N + done + j) * total
        before = tl.full((), 0.0, tl.float64)
        base = tl.full((), 0.0, tl.float64)
        block = 0
        for k0 in range(0, V, BLOCK):
            own = tl.sum(kept_weights(z, V, k0 + tl.arange(0, BLOCK), peak, t, tie, TOP_K or TOP_P), 0)
            here = (before <= goal) & (own > 0)
            block = tl.where(here, k0, block)
            base = tl.where(here, before, base)
            before += own
        k = block + tl.arange(0, BLOCK)
        weights = kept_weights(z, V, k, peak, t, tie, TOP_K or TOP_P)
        last = tl.max(tl.where(weights > 0, k, 0), 0)
        passed = (base + tl.cumsum(weights, 0) > goal) & (weights > 0)
        code = tl.min(tl.where(passed, k, last), 0)
    tl.store(drawn + b * N + done + j, code.to(tl.int64))
    tl.store(fed + b * n_fed + j, code.to(tl.int64))
    if c == 0:
        tl.store(clock, step + 1)
