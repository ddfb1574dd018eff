# mypy: ignore-errors
"""The five kernels of a transformer block: `norm_qkv`, `attend`, `project`, `norm_swiglu`, `project` again.

Norms stand before attention and feed-forward. A norm's factor is a number per row, so it is applied to the sums of the
product: x is read once. What is summed is ACC: float32, or float64 for float64 models.

Where a step's positions are is read from the device: `now` () int32 holds the step t, `places[t]` (done, start): the
cells drawn before it, and where its positions begin in the cache. So launches of equal shapes are equal, and one CUDA
graph serves all of them. Keys of row r begin at `first[r]`: prompts are left-padded.

Shapes: M rows of activations (sequence r, position i of n: r * n + i), D width, A query heads, G key/value heads,
E head width, F feed-forward width, T positions of the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLACES = tl.constexpr(2)
"""Numbers of a row of `places`."""


@triton.jit
def pair_products(x, gain, w, bias, m, rows, first, second, live, eps,
                  D: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  ACC: tl.constexpr):  # fmt: skip
    """rms_norm(x (M, D)) * gain times rows `first` and `second` (BN) of w: two (BM, BN) of dtype ACC."""
    a = tl.zeros((BM, BN), ACC)
    b = tl.zeros((BM, BN), ACC)
    square = tl.zeros((BM,), ACC)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        inside = k < D
        xs = tl.load(x + m[:, None] * D + k[None, :], mask=rows[:, None] & inside[None, :], other=0.0).to(ACC)
        square += tl.sum(xs * xs, 1)
        scaled = (xs * tl.load(gain + k, mask=inside, other=0.0).to(ACC)[None, :]).to(w.dtype.element_ty)
        seen = inside[:, None] & live[None, :]
        wa = tl.load(w + first[None, :] * D + k[:, None], mask=seen, other=0.0)
        wb = tl.load(w + second[None, :] * D + k[:, None], mask=seen, other=0.0)
        a += tl.dot(scaled, wa, input_precision="ieee", out_dtype=ACC)
        b += tl.dot(scaled, wb, input_precision="ieee", out_dtype=ACC)
    factor = (1 / tl.sqrt(square / D + eps))[:, None]
    a, b = a * factor, b * factor
    if BIAS:
        a += tl.load(bias + first, mask=live, other=0.0).to(ACC)[None, :]
        b += tl.load(bias + second, mask=live, other=0.0).to(ACC)[None, :]
    return a, b


@triton.jit(do_not_specialize=["M", "n"])
def norm_qkv(x, gain, w, bias, q_gain, q_shift, k_gain, k_shift, rope, places, now, q, keys, values,
             M, n, eps, rope_stride, row_stride, head_stride,
             D: tl.constexpr, A: tl.constexpr, G: tl.constexpr, E: tl.constexpr, INTERLEAVED: tl.constexpr,
             QK_NORM: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
             ACC: tl.constexpr):  # fmt: skip
    """q (M, A E), and keys and values (R, G, T, E) from `start` on, of x (M, D): norm, product, norms of queries and
    keys (QK_NORM: none, rms, or layer), rotation.

    A program has BP rotated pairs of one head, all of them if they are normed. rope (1 or R, T, E / 2, 2) float32.
    """
    half: tl.constexpr = E // 2
    parts: tl.constexpr = (half + BP - 1) // BP
    head = tl.program_id(0) // parts
    pair = tl.program_id(0) % parts * BP + tl.arange(0, BP)
    live = pair < half
    one = 2 * pair if INTERLEAVED else pair
    two = one + 1 if INTERLEAVED else pair + half
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = m < M
    a, b = pair_products(x, gain, w, bias, m, rows, head * E + one, head * E + two, live, eps, D, BIAS, BM, BP, BK, ACC)
    if QK_NORM != "none":
        query, key = live & (head < A), live & (head >= A) & (head < A + G)
        qo = head * E if QK_NORM == "layer" else 0
        ko = (head - A) * E if QK_NORM == "layer" else 0
        mean = tl.zeros((BM,), ACC)
        if QK_NORM == "layer":
            mean = tl.sum(a + b, 1) / E
        da = tl.where(live[None, :], a - mean[:, None], 0.0)
        db = tl.where(live[None, :], b - mean[:, None], 0.0)
        head_eps = 1e-5 if QK_NORM == "layer" else eps
        factor = (1 / tl.sqrt(tl.sum(da * da + db * db, 1) / E + head_eps))[:, None]
        ga = tl.load(q_gain + qo + one, mask=query, other=0.0) + tl.load(k_gain + ko + one, mask=key, other=0.0)
        gb = tl.load(q_gain + qo + two, mask=query, other=0.0) + tl.load(k_gain + ko + two, mask=key, other=0.0)
        na, nb = da * factor * ga.to(ACC)[None, :], db * factor * gb.to(ACC)[None, :]
        if QK_NORM == "layer":
            sa = tl.load(q_shift + qo + one, mask=query, other=0.0) + tl.load(k_shift + ko + one, mask=key, other=0.0)
            sb = tl.load(q_shift + qo + two, mask=query, other=0.0) + tl.load(k_shift + ko + two, mask=key, other=0.0)
            na, nb = na + sa.to(ACC)[None, :], nb + sb.to(ACC)[None, :]
        a, b = tl.where(head < A + G, na, a), tl.where(head < A + G, nb, b)
    start = tl.load(places + tl.load(now) * PLACES + 1)
    row = (m // n).to(tl.int64)
    position = start + m % n
    mask = rows[:, None] & live[None, :]
    if head < A + G:
        turn = rope + row[:, None] * rope_stride + (position[:, None] * half + pair[None, :]) * 2
        cos, sin = tl.load(turn, mask=mask, other=0.0).to(ACC), tl.load(turn + 1, mask=mask, other=0.0).to(ACC)
        a, b = a * cos - b * sin, b * cos + a * sin
    a, b = a.to(q.dtype.element_ty), b.to(q.dtype.element_ty)
    if head < A:
        target = q + m[:, None].to(tl.int64) * (A * E) + head * E
        tl.store(target + one[None, :], a, mask=mask)
        tl.store(target + two[None, :], b, mask=mask)
    else:
        target = keys + row[:, None] * row_stride + (head - A) * head_stride + position[:, None] * E
        if head >= A + G:
            target = values + row[:, None] * row_stride + (head - A - G) * head_stride + position[:, None] * E
        tl.store(target + one[None, :], a, mask=mask)
        tl.store(target + two[None, :], b, mask=mask)


@triton.jit
def risen(peak, other):
    """The higher of two peaks; the same to subtract from scores, 0 where nothing was seen; what sums taken at `peak`
    are worth there."""
    higher = tl.maximum(peak, other)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, safe, tl.exp(peak - safe)


@triton.jit
def all_parts(part, peaks, totals, tile, e, EP: tl.constexpr, SPLITS: tl.constexpr, BQ: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """acc (BQ, EP) and total (BQ,) of attention to all parts of the keys, in their order."""
    peak = tl.full((BQ,), float("-inf"), ACC)
    total = tl.zeros((BQ,), ACC)
    acc = tl.zeros((BQ, EP), ACC)
    for s in range(SPLITS):
        at = (tile * SPLITS + s) * BQ + tl.arange(0, BQ)
        other = tl.load(peaks + at, cache_modifier=".cg")
        peak, safe, fade = risen(peak, other)
        grow = tl.exp(other - safe)
        total = total * fade + tl.load(totals + at, cache_modifier=".cg") * grow
        more = tl.load(part + at[:, None] * EP + e[None, :], cache_modifier=".cg")
        acc = acc * fade[:, None] + more * grow[:, None]
    return acc, total


@triton.jit
def store_mean(y, place, wanted, acc, total):
    """acc / total to y; 0 where nothing was seen."""
    total = tl.where(total > 0, total, 1.0)
    tl.store(y + place, (acc / total[:, None]).to(y.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["n"])
def attend(q, keys, values, first, places, now, y, part, peaks, totals, arrived,
           n, scale, row_stride, head_stride,
           A: tl.constexpr, G: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, SPLITS: tl.constexpr,
           CAUSAL: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """y (M, A E) of q (M, A E): softmax attention to keys and values first[r] .. start + n of the cache, or, CAUSAL,
    up to the own position.

    A program has BQ of the A / G * n queries that share a key head, and one of SPLITS parts of the keys. The last one
    of these to arrive adds up all parts, in their order: equal inputs give equal bits. `arrived` is 0 before and after.
    """
    shared: tl.constexpr = A // G
    row, group, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    j = tl.program_id(2) * BQ + tl.arange(0, BQ)
    live = j < shared * n
    start = tl.load(places + tl.load(now) * PLACES + 1)
    begin = tl.load(first + row)
    end = start + n
    each = tl.cdiv(tl.cdiv(end - begin, SPLITS), BK) * BK
    low = begin + split * each
    high = tl.minimum(low + each, end)
    e = tl.arange(0, EP)
    column = e < E
    place = (row * n + j % n)[:, None].to(tl.int64) * (A * E) + ((group * shared + j // n) * E)[:, None] + e[None, :]
    wanted = live[:, None] & column[None, :]
    queries = tl.load(q + place, mask=wanted, other=0.0)
    base = row.to(tl.int64) * row_stride + group * head_stride
    own = start + j % n
    peak = tl.full((BQ,), float("-inf"), ACC)
    total = tl.zeros((BQ,), ACC)
    acc = tl.zeros((BQ, EP), ACC)
    for k0 in range(low, high, BK):
        k = k0 + tl.arange(0, BK)
        there = k < high
        ks = tl.load(keys + base + k[None, :] * E + e[:, None], mask=there[None, :] & column[:, None], other=0.0)
        vs = tl.load(values + base + k[:, None] * E + e[None, :], mask=there[:, None] & column[None, :], other=0.0)
        scores = tl.dot(queries, ks, input_precision="ieee", out_dtype=ACC) * scale
        seen = there[None, :] & live[:, None]
        if CAUSAL:
            seen = seen & (k[None, :] <= own[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        peak, safe, fade = risen(peak, tl.max(scores, 1))
        p = tl.exp(scores - safe[:, None])
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(vs.dtype), vs, input_precision="ieee", out_dtype=ACC)
    if SPLITS == 1:
        store_mean(y, place, wanted, acc, total)
    else:
        tile = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        at = (tile * SPLITS + split) * BQ + tl.arange(0, BQ)
        tl.store(peaks + at, peak)
        tl.store(totals + at, total)
        tl.store(part + at[:, None] * EP + e[None, :], acc)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            acc, total = all_parts(part, peaks, totals, tile, e, EP, SPLITS, BQ, ACC)
            store_mean(y, place, wanted, acc, total)
            tl.store(arrived + tile, 0)


@triton.jit(do_not_specialize=["M"])
def project(x, w, bias, added, out, M, N, K: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BK: tl.constexpr, ACC: tl.constexpr, SCALED: tl.constexpr = False):  # fmt: skip
    """out (M, N) = added (M, N) + x (M, K) w (N, K)^T + bias. `out` may be `added`.

    SCALED: w has one byte a weight, and `added` is a factor of every output, (N,): x w^T * factor + bias.
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, live = m < M, o < N
    acc = tl.zeros((BM, BN), ACC)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        inside = k < K
        xs = tl.load(x + m[:, None] * K + k[None, :], mask=rows[:, None] & inside[None, :], other=0.0)
        ws = tl.load(w + o[None, :] * K + k[:, None], mask=inside[:, None] & live[None, :], other=0.0)
        if SCALED:
            ws = ws.to(xs.dtype)
        acc += tl.dot(xs, ws, input_precision="ieee", out_dtype=ACC)
    if SCALED:
        acc *= tl.load(added + o, mask=live, other=0.0).to(ACC)[None, :]
    if BIAS:
        acc += tl.load(bias + o, mask=live, other=0.0).to(ACC)[None, :]
    place, mask = m[:, None] * N + o[None, :], rows[:, None] & live[None, :]
    if not SCALED:
        acc += tl.load(added + place, mask=mask, other=0.0).to(ACC)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def norm_swiglu(x, gain, w, bias, out, M, F, eps, D: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """out (M, F) = silu(w1 z) * w3 z of z = rms_norm(x (M, D)) * gain; w (2 F, D) holds the row blocks [w1; w3]."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    f = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, live = m < M, f < F
    a, b = pair_products(x, gain, w, bias, m, rows, f, F + f, live, eps, D, BIAS, BM, BN, BK, ACC)
    y = a / (1 + tl.exp(-a)) * b
    tl.store(out + m[:, None] * F + f[None, :], y.to(out.dtype.element_ty), mask=rows[:, None] & live[None, :])
