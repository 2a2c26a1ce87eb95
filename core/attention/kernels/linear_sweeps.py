# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles this file by rules of its own, which a type checker does not know.
"""The linear kernels: sums of segments and outputs. `linear` says what they compute, `linear_gradients` has the rest.

Arguments, beside pointers and their strides (b, h, l): H heads per batch item of this launch, GROUP of them per key
head, L rows, M keys, T steps of the timeline, on which row = row0 + step u and key = key0 + step u; `tiles` of value
columns, `parts` segments of `size` steps. D, F, E widths; FP, DP, BE the blocks over them; C steps per chunk.

PACK: the batch is one, L and M are those of all sequences, and segment `part` is a line of `table` (`packs`): pointers
move to its sequence, and lengths and timeline become that sequence's own.
"""

import triton
import triton.language as tl

from core.attention.kernels.features import factor_of, features, log_decay, product, upstream, weights
from core.attention.kernels.packs import line


@triton.jit
def write(
    k, v, mask, gate, rate, factors, d_out, scale, d_den, table, sums, totals,
    kb, kh, kl, vb, vh, vl,
    H, GROUP, M, T, origin, step, tiles, parts, size, mask_b,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
    MAP: tl.constexpr, DECAY: tl.constexpr, ONES: tl.constexpr, MASK: tl.constexpr,
    REVERSE: tl.constexpr, NORMALIZE: tl.constexpr, PACK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state: sum_u e^{.} phi(k_u) [v_u, 1]^T, decayed to the segment's end.

    REVERSE: what it adds to the gradient of the state before it, sum_u e^{.} phi(q_u) d[num, den]_u^T; then k are the
    queries, and values come from `upstream`.
    """
    pid = tl.program_id(0)
    tile, part, bh = pid % tiles, (pid // tiles) % parts, pid // (tiles * parts)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    f, e = tl.arange(0, FP), tile * BE + tl.arange(0, BE)
    s, z = tl.zeros([FP, BE], tl.float32), tl.zeros([FP], tl.float32)
    k += b * kb + h * kh
    v += b * vb + h * vh
    heads_rate = 0.0
    if DECAY == "constant":
        heads_rate = tl.load(rate + h).to(tl.float32)
    if DECAY == "given":
        gate += (bh // GROUP).to(tl.int64) * T
    factor = factor_of(factors, h // GROUP, f, F, MAP)
    all_decay, begin, head = 0.0, part * size, bh.to(tl.int64) * M
    if PACK:
        _, begin, row_first, rows, key_first, M, T, row0, origin = line(table, part)
        gate += key_first
        first = key_first
        if REVERSE:
            first, M, origin = row_first, rows, row0
        k += first * kl
        v += first * vl
        head += first
    end = tl.minimum(T, begin + size)
    chunks = tl.cdiv(end - begin, C)
    for n in range(chunks):
        u0 = begin + (chunks - 1 - n if REVERSE else n) * C
        u = u0 + tl.arange(0, C)
        j = (origin + step * u).to(tl.int64)
        ok = (u < T) & (j >= 0) & (j < M)
        if MASK:
            ok = ok & (tl.load(mask + b * mask_b + j, mask=ok, other=0) != 0)
        phi = features(k, j * kl, ok, f, D, F, MAP, factor)
        if REVERSE:
            value, ones = upstream(v, scale, d_den, j * vl, head + j, ok, e, E, NORMALIZE)
        else:
            value = tl.load(v + (j * vl)[:, None] + e[None, :], mask=ok[:, None] & (e < E)[None, :], other=0.0)
            ones = tl.full([C], 1.0, tl.float32)
        if DECAY != "none":
            running, last = log_decay(gate, heads_rate, u0, u, T, C, DECAY)
            phi *= tl.exp(running if REVERSE else last - running)[:, None]
            s *= tl.exp(last)
            z *= tl.exp(last)
            all_decay += last
        s += product(tl.trans(phi), value, DOT, PRECISION)
        if ONES:
            z += tl.sum(phi * ones[:, None], 0)
    width: tl.constexpr = E + 1 if ONES else E
    at = (bh * parts + part).to(tl.int64) * F * width
    tl.store(sums + at + f[:, None] * width + e[None, :], s, mask=(f < F)[:, None] & (e < E)[None, :])
    if tile == 0:
        if ONES:
            tl.store(sums + at + f * width + E, z, mask=f < F)
        if DECAY != "none":
            tl.store(totals + bh * parts + part, all_decay)


@triton.jit
def load_state(states, at, f, e, F: tl.constexpr, E: tl.constexpr, ONES: tl.constexpr):
    """(S [F, values], z [F]) that begin at `states` + at."""
    width: tl.constexpr = E + 1 if ONES else E
    s = tl.load(states + at + f[:, None] * width + e[None, :], mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
    z = tl.zeros_like(tl.sum(s, 1))
    if ONES:
        z = tl.load(states + at + f * width + E, mask=f < F, other=0.0)
    return s, z


@triton.jit
def store_state(states, at, f, e, s, z, tile, F: tl.constexpr, E: tl.constexpr, ONES: tl.constexpr):
    """The opposite of `load_state`."""
    width: tl.constexpr = E + 1 if ONES else E
    tl.store(states + at + f[:, None] * width + e[None, :], s, mask=(f < F)[:, None] & (e < E)[None, :])
    if ONES and tile == 0:
        tl.store(states + at + f * width + E, z, mask=f < F)


@triton.jit
def forward(
    q, k, v, mask, gate, rate, factors, floor, table, states, out, mass, den, end,
    qb, qh, ql, kb, kh, kl, vb, vh, vl,
    H, GROUP, L, M, T, row0, key0, step, tiles, parts, size, mask_b, floor_b,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, DP: tl.constexpr,
    BE: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, CAUSAL: tl.constexpr, STATE: tl.constexpr,
    DECAY: tl.constexpr, ONES: tl.constexpr, MASK: tl.constexpr, FLOOR: tl.constexpr, NORMALIZE: tl.constexpr,
    KEEP: tl.constexpr, PACK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment from the state before it; not CAUSAL: from the state of all keys."""
    pid = tl.program_id(0)
    tile, part, bh = pid % tiles, (pid // tiles) % parts, pid // (tiles * parts)
    b, h, bk = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh // GROUP
    f, c, e = tl.arange(0, FP), tl.arange(0, DP), tile * BE + tl.arange(0, BE)
    width: tl.constexpr = E + 1 if ONES else E
    begin, of, head, timeline = part * size, bk, bh.to(tl.int64) * L, T
    if PACK:
        own, begin, first, L, key_first, M, T, row0, key0 = line(table, part)
        of += own * (H // GROUP)
        head += first
    s, z = tl.zeros([FP, BE], tl.float32), tl.zeros([FP], tl.float32)
    if STATE:
        at = (bk * parts + part if CAUSAL else of).to(tl.int64) * F * width
        s, z = load_state(states, at, f, e, F, E, ONES)
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    heads_rate = 0.0
    if DECAY == "constant":
        heads_rate = tl.load(rate + h).to(tl.float32)
    if DECAY == "given":
        gate += bk.to(tl.int64) * timeline
    factor = factor_of(factors, h // GROUP, f, F, MAP)
    if PACK:
        gate += key_first
        q += first * ql
        k += key_first * kl
        v += key_first * vl
        floor += first
    for u0 in range(begin, tl.minimum(T, begin + size), C):
        u = u0 + tl.arange(0, C)
        i = (row0 + step * u).to(tl.int64)
        row = (u < T) & (i >= 0) & (i < L)
        fq = features(q, i * ql, row, f, D, F, MAP, factor)
        read = fq
        if DECAY != "none":
            running, last = log_decay(gate, heads_rate, u0, u, T, C, DECAY)
            read = fq * tl.exp(running)[:, None]
        num = product(read, s, DOT, PRECISION)
        total = tl.sum(read * z[None, :], 1)
        if CAUSAL:
            j = (key0 + step * u).to(tl.int64)
            key = (u < T) & (j >= 0) & (j < M)
            if MASK:
                key = key & (tl.load(mask + b * mask_b + j, mask=key, other=0) != 0)
            fk = features(k, j * kl, key, f, D, F, MAP, factor)
            value = tl.load(v + (j * vl)[:, None] + e[None, :], mask=key[:, None] & (e < E)[None, :], other=0.0)
            if MAP == "taylor":
                xq = features(q, i * ql, row, c, D, D, "identity")
                xk = features(k, j * kl, key, c, D, D, "identity")
                w, _ = weights(xq, xk, D, MAP, DOT, PRECISION)
            else:
                w, _ = weights(fq, fk, D, MAP, DOT, PRECISION)
            seen = (u[:, None] >= u[None, :]) & key[None, :]
            if DECAY != "none":
                w *= tl.exp(tl.where(seen, running[:, None] - running[None, :], 0.0))
                fk *= tl.exp(last - running)[:, None]
                s *= tl.exp(last)
                z *= tl.exp(last)
            w = tl.where(seen, w, 0.0)
            num += product(w, value, DOT, PRECISION)
            total += tl.sum(w, 1)
            s += product(tl.trans(fk), value, DOT, PRECISION)
            z += tl.sum(fk, 0)
        place = head + i
        if ONES:
            total = tl.maximum(total, 0.0)
            if tile == 0:
                tl.store(den + place, total, mask=row)
                log = tl.log(tl.where(total > 0, total, 1.0))
                tl.store(mass + place, tl.where(total > 0, log, float("-inf")), mask=row)
        if NORMALIZE:
            low = tl.full([C], 1.1754943508222875e-38, tl.float32)
            if FLOOR:
                low = tl.load(floor + b * floor_b + i, mask=row, other=1.0)
            num = num / tl.maximum(total, low)[:, None]
        spot = out + place[:, None] * E + e[None, :]
        tl.store(spot, num.to(out.dtype.element_ty), mask=row[:, None] & (e < E)[None, :])
    if KEEP and h % GROUP == 0:
        store_state(end, bk.to(tl.int64) * F * width, f, e, s, z, tile, F, E, ONES)
