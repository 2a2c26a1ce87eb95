# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles this file by rules of its own, which a type checker does not know.
"""The kernels of the causal hybrid: outputs, gradients by rows, gradients by keys. `hybrid` says what they compute.

Arguments, beside pointers and their strides (b, h, l): a and c are what phi acts on, [B, H, L, G] and [B, K, M, G]; far
and d_den the factor of phi.phi in a weight and the gradient at the tail's mass, per row; H heads, GROUP of them per key
head, L rows, M keys, W the window, T steps of the tail's timeline, on which row u + row0 meets key u + key0; `parts`
segments of `size` steps. D, G, F, E widths, DP, FP, EP the blocks over them; BM steps per block, BN keys or rows of the
window at once.
"""

import triton
import triton.language as tl

from core.attention.kernels.features import features, product, through_features, upstream
from core.attention.kernels.linear_sweeps import load_state
from core.attention.kernels.window import LOG2E, real, scores, tile


@triton.jit
def forward(
    q, k, v, a, c, mask, gate, states, out, mass,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ab, ah, al, cb, ch, cl, mb,
    H, GROUP, L, M, W, scale, row0, key0, T, parts, size,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, STATE: tl.constexpr, MASK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and log mass of one segment from the tail's state before it."""
    part, bh = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h, bk = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh // GROUP
    d, f, e = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, EP)
    s, z = tl.zeros([FP, EP], tl.float32), tl.zeros([FP], tl.float32)
    if STATE:
        s, z = load_state(states, (bk * parts + part).to(tl.int64) * F * (E + 1), f, e, F, E, True)
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    a += b * ab + h * ah
    c += b * cb + h // GROUP * ch
    mask += b * mb
    weight = tl.load(gate + h).to(tl.float32) * LOG2E
    for u0 in range(part * size, tl.minimum(T, (part + 1) * size), BM):
        u = u0 + tl.arange(0, BM)
        i, j = (row0 + u).to(tl.int64), (key0 + u).to(tl.int64)
        row, key = (u < T) & (i >= 0) & (i < L), (u < T) & real(mask, j, M, MASK)
        ask, put = features(a, i * al, row, f, G, F, MAP), features(c, j * cl, key, f, G, F, MAP)
        value = tile(v, j * vl, key, e, E)
        w = product(ask, tl.trans(put), DOT, PRECISION)
        w = tl.where((u[:, None] >= u[None, :]) & key[None, :], w, 0.0)
        num = product(ask, s, DOT, PRECISION) + product(w, value, DOT, PRECISION)
        den = tl.maximum(tl.sum(ask * z[None, :], 1) + tl.sum(w, 1), 0.0)
        s += product(tl.trans(put), value, DOT, PRECISION)
        z += tl.sum(put, 0)
        # The tail is the first block of the running maximum: its mean, at the level of its mass.
        some = den > 0
        top = tl.where(some, weight + tl.log2(tl.where(some, den, 1.0)), float("-inf"))
        total = tl.where(some, 1.0, 0.0)
        acc = num / tl.where(some, den, 1.0)[:, None] * total[:, None]
        x, t = tile(q, i * ql, row, d, D), u + (row0 + M - L)
        first = tl.maximum(0, u0 + row0 + M - L - W + 1) // BN * BN
        last = tl.where(u0 + row0 + BM > 0, tl.minimum(M, u0 + row0 + BM + M - L), 0)
        for n0 in range(first, last, BN):
            n = n0 + tl.arange(0, BN)
            near = real(mask, n, M, MASK)
            keys = tile(k, n.to(tl.int64) * kl, near, d, D)
            y = scores(x, keys, t, n, row, near, W, scale, 0.0, True, False, DOT, PRECISION)
            higher = tl.maximum(top, tl.max(y, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            fall, p = tl.exp2(top - safe), tl.exp2(y - safe[:, None])
            total = total * fall + tl.sum(p, 1)
            acc = acc * fall[:, None] + product(p, tile(v, n.to(tl.int64) * vl, near, e, E), DOT, PRECISION)
            top = higher
        whole = tl.where(total > 0, total, 1.0)
        place = bh.to(tl.int64) * L + i
        tl.store(mass + place, tl.where(total > 0, (top + tl.log2(whole)) / LOG2E, float("-inf")), mask=row)
        spot = out + place[:, None] * E + e[None, :]
        tl.store(spot, (acc / whole[:, None]).to(out.dtype.element_ty), mask=row[:, None] & (e < E)[None, :])


@triton.jit
def query_gradient(
    q, k, v, a, c, d_out, mass, delta, far, d_den, mask, states, dq, da, d_gate,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ab, ah, al, cb, ch, cl, ob, oh, ol, mb,
    H, GROUP, L, M, W, scale, row0, key0, T, parts, size,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, STATE: tl.constexpr, MASK: tl.constexpr,
    SAME: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, da and the gradient at the gate [B, H, L] of one segment; SAME: a is q, and dq is the sum."""
    part, bh = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h, bk = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh // GROUP
    d, f, e = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, EP)
    s, z = tl.zeros([FP, EP], tl.float32), tl.zeros([FP], tl.float32)
    if STATE:
        s, z = load_state(states, (bk * parts + part).to(tl.int64) * F * (E + 1), f, e, F, E, True)
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    a += b * ab + h * ah
    c += b * cb + h // GROUP * ch
    d_out += b * ob + h * oh
    mask += b * mb
    for u0 in range(part * size, tl.minimum(T, (part + 1) * size), BM):
        u = u0 + tl.arange(0, BM)
        i, j = (row0 + u).to(tl.int64), (key0 + u).to(tl.int64)
        row, key = (u < T) & (i >= 0) & (i < L), (u < T) & real(mask, j, M, MASK)
        place = bh.to(tl.int64) * L + i
        put, value = features(c, j * cl, key, f, G, F, MAP), tile(v, j * vl, key, e, E)
        du, dz = upstream(d_out, far, d_den, i * ol, place, row, e, E, True)
        dw = product(du, tl.trans(value), DOT, PRECISION) + dz[:, None]
        dw = tl.where((u[:, None] >= u[None, :]) & key[None, :], dw, 0.0)
        tail = product(du, tl.trans(s), DOT, PRECISION) + dz[:, None] * z[None, :] + product(dw, put, DOT, PRECISION)
        tl.store(d_gate + place, tl.sum(features(a, i * al, row, f, G, F, MAP) * tail, 1), mask=row)
        tail = through_features(a, i * al, row, f, f, tail, G, F, MAP, DOT, PRECISION)
        s += product(tl.trans(put), value, DOT, PRECISION)
        z += tl.sum(put, 0)
        x, do, t = tile(q, i * ql, row, d, D), tile(d_out, i * ol, row, e, E), u + (row0 + M - L)
        level, offset = tl.load(mass + place, mask=row, other=0.0), tl.load(delta + place, mask=row, other=0.0)
        level = tl.where(level == float("-inf"), 0.0, level * LOG2E)
        acc = tl.zeros([BM, DP], tl.float32)
        first = tl.maximum(0, u0 + row0 + M - L - W + 1) // BN * BN
        last = tl.where(u0 + row0 + BM > 0, tl.minimum(M, u0 + row0 + BM + M - L), 0)
        for n0 in range(first, last, BN):
            n = n0 + tl.arange(0, BN)
            near = real(mask, n, M, MASK)
            keys = tile(k, n.to(tl.int64) * kl, near, d, D)
            p = tl.exp2(scores(x, keys, t, n, row, near, W, scale, 0.0, True, False, DOT, PRECISION) - level[:, None])
            dp = product(do, tl.trans(tile(v, n.to(tl.int64) * vl, near, e, E)), DOT, PRECISION)
            acc += product(p * (dp - offset[:, None]), keys, DOT, PRECISION)
        acc *= scale
        if SAME:
            acc += tail
        else:
            spot = da + place[:, None] * G + f[None, :]
            tl.store(spot, tail.to(da.dtype.element_ty), mask=row[:, None] & (f < G)[None, :])
        spot = dq + place[:, None] * D + d[None, :]
        tl.store(spot, acc.to(dq.dtype.element_ty), mask=row[:, None] & (d < D)[None, :])


@triton.jit
def key_gradient(
    q, k, v, a, c, d_out, mass, delta, far, d_den, mask, states, dk, dv, dc,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ab, ah, al, cb, ch, cl, ob, oh, ol, mb,
    H, GROUP, L, M, W, scale, row0, key0, T, parts, size,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, STATE: tl.constexpr, MASK: tl.constexpr,
    SAME: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and dc of one segment and query head, against time, with the gradient at the tail's state."""
    part, bh = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    d, f, e = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, EP)
    s, z = tl.zeros([FP, EP], tl.float32), tl.zeros([FP], tl.float32)
    if STATE:
        s, z = load_state(states, (bh * parts + part).to(tl.int64) * F * (E + 1), f, e, F, E, True)
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    a += b * ab + h * ah
    c += b * cb + h // GROUP * ch
    d_out += b * ob + h * oh
    mask += b * mb
    begin, end = part * size, tl.minimum(T, (part + 1) * size)
    blocks = tl.cdiv(end - begin, BM)
    for step in range(blocks):
        u0 = begin + (blocks - 1 - step) * BM
        u = u0 + tl.arange(0, BM)
        i, j = (row0 + u).to(tl.int64), (key0 + u).to(tl.int64)
        row, inside = (u < T) & (i >= 0) & (i < L), (u < T) & (j >= 0) & (j < M)
        key = inside & real(mask, j, M, MASK)
        put, value = features(c, j * cl, key, f, G, F, MAP), tile(v, j * vl, key, e, E)
        ask = features(a, i * al, row, f, G, F, MAP)
        du, dz = upstream(d_out, far, d_den, i * ol, bh.to(tl.int64) * L + i, row, e, E, True)
        seen = (u[:, None] >= u[None, :]) & key[None, :]
        w = tl.where(seen, product(ask, tl.trans(put), DOT, PRECISION), 0.0)
        dw = tl.where(seen, product(du, tl.trans(value), DOT, PRECISION) + dz[:, None], 0.0)
        tail = product(value, tl.trans(s), DOT, PRECISION) + z[None, :] + product(tl.trans(dw), ask, DOT, PRECISION)
        tail = through_features(c, j * cl, key, f, f, tail, G, F, MAP, DOT, PRECISION)
        d_value = product(put, s, DOT, PRECISION) + product(tl.trans(w), du, DOT, PRECISION)
        s += product(tl.trans(ask), du, DOT, PRECISION)
        z += tl.sum(ask * dz[:, None], 0)
        keys, acc = tile(k, j * kl, key, d, D), tl.zeros([BM, DP], tl.float32)
        first = tl.maximum(0, u0 + key0 + L - M) // BN * BN
        last = tl.where(u0 + key0 + BM > 0, tl.minimum(L, u0 + key0 + BM + L - M + W - 1), 0)
        for n0 in range(first, last, BN):
            n = n0 + tl.arange(0, BN)
            near, place = n < L, bh.to(tl.int64) * L + n
            x, do = tile(q, n.to(tl.int64) * ql, near, d, D), tile(d_out, n.to(tl.int64) * ol, near, e, E)
            level, offset = tl.load(mass + place, mask=near, other=0.0), tl.load(delta + place, mask=near, other=0.0)
            level = tl.where(level == float("-inf"), 0.0, level * LOG2E)
            y = scores(x, keys, n + (M - L), u + key0, near, key, W, scale, 0.0, True, False, DOT, PRECISION)
            p = tl.exp2(y - level[:, None])
            d_value += product(tl.trans(p), do, DOT, PRECISION)
            dp = product(do, tl.trans(value), DOT, PRECISION)
            acc += product(tl.trans(p * (dp - offset[:, None])), x, DOT, PRECISION)
        acc *= scale
        place = bh.to(tl.int64) * M + j
        if SAME:
            acc += tl.where(key[:, None], tail, 0.0)
        else:
            spot, tail = dc + place[:, None] * G + f[None, :], tl.where(key[:, None], tail, 0.0)
            tl.store(spot, tail.to(dc.dtype.element_ty), mask=inside[:, None] & (f < G)[None, :])
        spot = dk + place[:, None] * D + d[None, :]
        tl.store(spot, acc.to(dk.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
        spot = dv + place[:, None] * E + e[None, :]
        tl.store(spot, d_value.to(dv.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
