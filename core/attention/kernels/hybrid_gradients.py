# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles this file by rules of its own, which a type checker does not know.
"""The gradients of the hybrid: by rows and by keys. `hybrid` says what they compute, `hybrid_blocks` the arguments."""

import triton
import triton.language as tl

from core.attention.kernels.features import features, product, through_features, weights
from core.attention.kernels.hybrid_blocks import far_factor, pair_operand
from core.attention.kernels.packs import line, pieces
from core.attention.kernels.window import LOG2E, real, scores, tile


@triton.jit
def _read_gradient(
    d, dt, along, a, u, at, to, row, lower, state,
    G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, XP: tl.constexpr, FP: tl.constexpr, EP: tl.constexpr,
    BT: tl.constexpr, MAP: tl.constexpr, TURN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d with u S^T - lower z, S [F, E] taken BT columns at a time; TURN: the first part goes to dt.

    Taylor features are many: there BT of them at a time go on to a, which is what d is the gradient at.
    """
    p, f, e = tl.arange(0, XP), tl.arange(0, FP), tl.arange(0, EP)
    if MAP == "taylor":
        for f0 in range(0, FP, BT):
            n = f0 + tl.arange(0, BT)
            s = tl.load(state + n[:, None] * E + e[None, :], mask=(n < F)[:, None] & (e < E)[None, :], other=0.0)
            z = tl.load(state + F * E + n, mask=n < F, other=0.0)
            more = product(tile(u, to, row, e, E), tl.trans(s), DOT, PRECISION) - lower[:, None] * z[None, :]
            along += tl.sum(features(a, at, row, n, G, F, MAP) * more, 1)
            d += through_features(a, at, row, n, p, more, G, F, MAP, DOT, PRECISION)
    else:
        z = tl.load(state + F * E + f, mask=f < F, other=0.0)
        d -= lower[:, None] * z[None, :]
        for e0 in range(0, E, BT):
            n = e0 + tl.arange(0, BT)
            s = tl.load(state + f[:, None] * E + n[None, :], mask=(f < F)[:, None] & (n < E)[None, :], other=0.0)
            more = product(tile(u, to, row, n, E), tl.trans(s), DOT, PRECISION)
            if TURN:
                dt += more
            else:
                d += more
    return d, dt, along


@triton.jit
def _gather_gradient(
    d, dt, along, ask, do, offset, t, row, c, y, v, mask, first, last, cl, yl, vl, M, W, SIDE: tl.constexpr,
    G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, XP: tl.constexpr, FP: tl.constexpr, EP: tl.constexpr,
    BN: tl.constexpr, MAP: tl.constexpr, MASK: tl.constexpr, TURN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_gather`: the gradients at phi(a) (d; for Taylor features at a itself), at x (dt) and at the gate (along)."""
    p, f, e = tl.arange(0, XP), tl.arange(0, FP), tl.arange(0, EP)
    for n0 in range(first, last, BN):
        n = n0 + tl.arange(0, BN)
        at, key = n.to(tl.int64), real(mask, n, M, MASK)
        seen = ((t[:, None] - n[None, :]) * SIDE >= W) & row[:, None] & key[None, :]
        put = pair_operand(c, at * cl, key, p, G, F, MAP)
        dw = product(do, tl.trans(tile(v, at * vl, key, e, E)), DOT, PRECISION)
        if TURN:
            dt += product(tl.where(seen, dw, 0.0), features(y, at * yl, key, f, F, F, "given"), DOT, PRECISION)
            dw = tl.zeros_like(dw)
        dw = tl.where(seen, dw - offset[:, None], 0.0)
        if MAP == "taylor":
            w, slope = weights(ask, put, G, MAP, DOT, PRECISION)
            along += tl.sum(w * dw, 1)
            d += product(dw * slope, put, DOT, PRECISION)
        else:
            d += product(dw, put, DOT, PRECISION)
    return d, dt, along


@triton.jit
def query_gradient(
    q, k, v, a, c, x, y, d_out, mass, delta, mask, gate, table, slots, past, future, dq, da, dx, d_gate,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ab, ah, al, cb, ch, cl, xb, xh, xl, yb, yh, yl, gb, gh, gl, mb, ob, oh, ol,
    H, GROUP, L, M, W, scale, T, size, parts, row_parts, blocks,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, XP: tl.constexpr,
    FP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, MAP: tl.constexpr,
    CAUSAL: tl.constexpr, STATE: tl.constexpr, MASK: tl.constexpr, TURN: tl.constexpr, SAME: tl.constexpr,
    PACK: tl.constexpr, DOT: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, da, dx and the gradient at the gate [B, H, L] of BM rows; SAME: a is q, and dq is the sum."""
    bh, i0 = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BM
    b, h, state, head = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh // GROUP * parts, bh.to(tl.int64) * L
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    a += b * ab + h * ah
    c += b * cb + h // GROUP * ch
    x += b * xb + h * xh
    y += b * yb + h // GROUP * yh
    d_out += b * ob + h * oh
    mask += b * mb
    gate += b * gb + h * gh
    if PACK:
        own, i0, start, L, _, M, _, _, _ = line(table, tl.program_id(0) % blocks)
        state, parts = pieces(slots, own, state)
        T = tl.maximum(L - W, 0) if CAUSAL else L
        q += start * ql
        k += start * kl
        v += start * vl
        a += start * al
        c += start * cl
        x += start * xl
        y += start * yl
        d_out += start * ol
        gate += start * gl
        head += start
    d, e, p, f, i = tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, XP), tl.arange(0, FP), i0 + tl.arange(0, BM)
    at, row, t, behind = i.to(tl.int64), i < L, i + (M - L), M - L - W
    place = head + at
    level = tl.load(mass + place, mask=row, other=float("-inf"))
    offset = tl.load(delta + place, mask=row, other=0.0)
    do = tile(d_out, at * ol, row, e, E)
    # Both parts without the factor `far` of the row, which comes last.
    tail, turned, along = tl.zeros([BM, XP], tl.float32), tl.zeros([BM, FP], tl.float32), tl.zeros([BM], tl.float32)
    ask = pair_operand(a, at * al, row, p, G, F, MAP)
    part = tl.maximum(tl.minimum((i0 + behind + 1) // size, parts - 1), 0)
    if STATE:
        tail, turned, along = _read_gradient(
            tail, turned, along, a, d_out, at * al, at * ol, row, offset,
            past + (state + part).to(tl.int64) * (F * (E + 1)), G, F, E, XP, FP, EP, BT, MAP, TURN, DOT, PRECISION,
        )  # fmt: skip
    tail, turned, along = _gather_gradient(
        tail, turned, along, ask, do, offset, t, row, c, y, v, mask, part * size, tl.minimum(T, i0 + behind + BM),
        cl, yl, vl, M, W, 1, G, F, E, XP, FP, EP, BN, MAP, MASK, TURN, DOT, PRECISION,
    )  # fmt: skip
    if not CAUSAL:
        part = tl.minimum(tl.cdiv(i0 + BM - 1 + W, size), parts) - 1
        if STATE:
            tail, turned, along = _read_gradient(
                tail, turned, along, a, d_out, at * al, at * ol, row, offset,
                future + (state + part).to(tl.int64) * (F * (E + 1)),
                G, F, E, XP, FP, EP, BT, MAP, TURN, DOT, PRECISION,
            )  # fmt: skip
        tail, turned, along = _gather_gradient(
            tail, turned, along, ask, do, offset, t, row, c, y, v, mask, (i0 + W) // BN * BN,
            tl.minimum(T, (part + 1) * size), cl, yl, vl, M, W, -1,
            G, F, E, XP, FP, EP, BN, MAP, MASK, TURN, DOT, PRECISION,
        )  # fmt: skip
    far = far_factor(gate, at * gl, level, row)
    if MAP != "taylor":
        along += tl.sum(ask * tail, 1)
        tail = through_features(a, at * al, row, f, p, tail, G, F, MAP, DOT, PRECISION)
    if TURN:
        along += tl.sum(features(x, at * xl, row, f, F, F, "given") * turned, 1)
        spot = dx + place[:, None] * F + f[None, :]
        tl.store(spot, (turned * far[:, None]).to(dx.dtype.element_ty), mask=row[:, None] & (f < F)[None, :])
    tl.store(d_gate + place, far * along, mask=row)
    tail *= far[:, None]
    if SAME:
        acc = tail
    else:
        spot = da + place[:, None] * G + p[None, :]
        tl.store(spot, tail.to(da.dtype.element_ty), mask=row[:, None] & (p < G)[None, :])
        acc = tl.zeros([BM, DP], tl.float32)
    near, height = tile(q, at * ql, row, d, D), tl.where(level == float("-inf"), 0.0, level * LOG2E)
    first = tl.maximum(0, i0 + behind + 1) // BN * BN
    for n0 in range(first, tl.minimum(M, i0 + BM + M - L + (0 if CAUSAL else W - 1)), BN):
        n = n0 + tl.arange(0, BN)
        to, key = n.to(tl.int64), real(mask, n, M, MASK)
        keys = tile(k, to * kl, key, d, D)
        s = scores(near, keys, t, n, row, key, W, scale, 0.0, CAUSAL, False, NEAR, PRECISION)
        dw = product(do, tl.trans(tile(v, to * vl, key, e, E)), NEAR, PRECISION)
        acc += product(tl.exp2(s - height[:, None]) * (dw - offset[:, None]) * scale, keys, NEAR, PRECISION)
    spot = dq + place[:, None] * D + d[None, :]
    tl.store(spot, acc.to(dq.dtype.element_ty), mask=row[:, None] & (d < D)[None, :])


@triton.jit
def _spread(
    d, dt, dv, c, y, v, at, turned_at, to, key, state,
    G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, XP: tl.constexpr, FP: tl.constexpr, EP: tl.constexpr,
    BT: tl.constexpr, MAP: tl.constexpr, TURN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a gradient at the state gives its keys, at phi(c) (d; for Taylor features at c itself), at y and at v."""
    p, f, e = tl.arange(0, XP), tl.arange(0, FP), tl.arange(0, EP)
    if MAP != "taylor":
        d += tl.where(key[:, None], tl.load(state + F * E + f, mask=f < F, other=0.0)[None, :], 0.0)
        for e0 in range(0, E, BT):
            n = e0 + tl.arange(0, BT)
            s = tl.load(state + f[:, None] * E + n[None, :], mask=(f < F)[:, None] & (n < E)[None, :], other=0.0)
            more = product(tile(v, to, key, n, E), tl.trans(s), DOT, PRECISION)
            if TURN:
                dt += more
            else:
                d += more
    for f0 in range(0, FP, BT):
        n = f0 + tl.arange(0, BT)
        s = tl.load(state + n[:, None] * E + e[None, :], mask=(n < F)[:, None] & (e < E)[None, :], other=0.0)
        put = features(y, turned_at, key, n, F, F, "given") if TURN else features(c, at, key, n, G, F, MAP)
        dv += product(put, s, DOT, PRECISION)
        if MAP == "taylor":
            z = tl.load(state + F * E + n, mask=n < F, other=0.0)
            more = product(tile(v, to, key, e, E), tl.trans(s), DOT, PRECISION) + z[None, :]
            d += through_features(c, at, key, n, p, more, G, F, MAP, DOT, PRECISION)
    return d, dt, dv


@triton.jit
def _scatter(
    d, dt, dv, put, turned, value, n, key, a, x, d_out, mass, delta, gate, first, last, al, xl, ol, gl, shift,
    L, W, SIDE: tl.constexpr,
    G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, XP: tl.constexpr, FP: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, MAP: tl.constexpr, TURN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same from the rows first..last one by one; SIDE 1: rows after the keys, -1: rows before them."""
    p, f, e = tl.arange(0, XP), tl.arange(0, FP), tl.arange(0, EP)
    for i0 in range(first, last, BM):
        i = i0 + tl.arange(0, BM)
        at, row = i.to(tl.int64), i < L
        far = far_factor(gate, at * gl, tl.load(mass + at, mask=row, other=float("-inf")), row)
        offset = tl.load(delta + at, mask=row, other=0.0)
        do, ask = tile(d_out, at * ol, row, e, E), pair_operand(a, at * al, row, p, G, F, MAP)
        seen = ((i[:, None] + shift - n[None, :]) * SIDE >= W) & row[:, None] & key[None, :]
        w, slope = weights(ask, put, G, MAP, DOT, PRECISION)
        dw = tl.where(seen, product(do, tl.trans(value), DOT, PRECISION) * far[:, None], 0.0)
        if TURN:
            ahead = features(x, at * xl, row, f, F, F, "given")
            w = product(ahead, tl.trans(turned), DOT, PRECISION)
            dt += product(tl.trans(dw), ahead, DOT, PRECISION)
            dw = tl.zeros_like(dw)
        dw -= tl.where(seen, (far * offset)[:, None], 0.0)
        dv += product(tl.trans(tl.where(seen, w * far[:, None], 0.0)), do, DOT, PRECISION)
        if MAP == "taylor":
            d += product(tl.trans(dw * slope), ask, DOT, PRECISION)
        else:
            d += product(tl.trans(dw), ask, DOT, PRECISION)
    return d, dt, dv


@triton.jit
def key_gradient(
    q, k, v, a, c, x, y, d_out, mass, delta, mask, gate, table, slots, after, before, dk, dv, dc, dy,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ab, ah, al, cb, ch, cl, xb, xh, xl, yb, yh, yl, gb, gh, gl, mb, ob, oh, ol,
    H, GROUP, L, M, W, scale, T, size, parts, row_parts, blocks,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, XP: tl.constexpr,
    FP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, MAP: tl.constexpr,
    CAUSAL: tl.constexpr, STATE: tl.constexpr, MASK: tl.constexpr, TURN: tl.constexpr, SAME: tl.constexpr,
    PACK: tl.constexpr, DOT: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv, dc and dy of BN keys, over the heads of their group in order; SAME: c is k, and dk is the sum."""
    heads, whole, some = H // GROUP, L, row_parts
    bk, j0 = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BN
    b, kept = (bk // heads).to(tl.int64), (bk % heads).to(tl.int64)
    q += b * qb
    k += b * kb + kept * kh
    v += b * vb + kept * vh
    a += b * ab
    c += b * cb + kept * ch
    x += b * xb
    y += b * yb + kept * yh
    d_out += b * ob
    gate += b * gb
    start, state, column = 0, 0, bk.to(tl.int64) * M
    if PACK:
        own, j0, start, L, _, M, _, _, _ = line(table, tl.program_id(0) % blocks)
        state, row_parts = pieces(slots, own, state)
        T = tl.maximum(L - W, 0) if CAUSAL else L
        q += start * ql
        k += start * kl
        v += start * vl
        a += start * al
        c += start * cl
        x += start * xl
        y += start * yl
        d_out += start * ol
        gate += start * gl
        column += start
    d, e, p, f, j = tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, XP), tl.arange(0, FP), j0 + tl.arange(0, BN)
    to, inside, behind, shift = j.to(tl.int64), j < M, M - L - W, M - L
    key = real(mask + b * mb, j, M, MASK)
    held = key & (j < T)
    value, put, turned = tile(v, to * vl, key, e, E), pair_operand(c, to * cl, held, p, G, F, MAP), key[:, None]
    if TURN:
        turned = features(y, to * yl, held, f, F, F, "given")
    tail, d_turned = tl.zeros([BN, XP], tl.float32), tl.zeros([BN, FP], tl.float32)
    d_value = tl.zeros([BN, EP], tl.float32)
    late = tl.maximum(tl.minimum(tl.cdiv(j0 + BN - 1 - behind, size), row_parts), 1) - 1
    early = tl.maximum(tl.minimum((j0 - W + 1) // size, row_parts - 1), 0)
    for g in range(GROUP):
        h = kept * GROUP + g
        head, spot = (b * H + h) * whole + start, (b * H + h) * some + state
        if STATE:
            tail, d_turned, d_value = _spread(
                tail, d_turned, d_value, c, y, v, to * cl, to * yl, to * vl, held,
                after + (spot + late) * (F * (E + 1)), G, F, E, XP, FP, EP, BT, MAP, TURN, DOT, PRECISION,
            )  # fmt: skip
        tail, d_turned, d_value = _scatter(
            tail, d_turned, d_value, put, turned, value, j, held, a + h * ah, x + h * xh,
            d_out + h * oh, mass + head, delta + head, gate + h * gh,
            tl.maximum(0, j0 - behind) // BM * BM, tl.minimum(L, (late + 1) * size), al, xl, ol, gl, shift, L, W, 1,
            G, F, E, XP, FP, EP, BM, MAP, TURN, DOT, PRECISION,
        )  # fmt: skip
        if not CAUSAL:
            if STATE:
                tail, d_turned, d_value = _spread(
                    tail, d_turned, d_value, c, y, v, to * cl, to * yl, to * vl, held,
                    before + (spot + early) * (F * (E + 1)), G, F, E, XP, FP, EP, BT, MAP, TURN, DOT, PRECISION,
                )  # fmt: skip
            tail, d_turned, d_value = _scatter(
                tail, d_turned, d_value, put, turned, value, j, held, a + h * ah, x + h * xh,
                d_out + h * oh, mass + head, delta + head, gate + h * gh,
                early * size, tl.minimum(L, j0 + BN - W), al, xl, ol, gl, shift, L, W, -1,
                G, F, E, XP, FP, EP, BM, MAP, TURN, DOT, PRECISION,
            )  # fmt: skip
    if TURN:
        spot = dy + (column + to)[:, None] * F + f[None, :]
        d_turned = tl.where(held[:, None], d_turned, 0.0)
        tl.store(spot, d_turned.to(dy.dtype.element_ty), mask=inside[:, None] & (f < F)[None, :])
    if MAP != "taylor":
        tail = through_features(c, to * cl, held, f, p, tail, G, F, MAP, DOT, PRECISION)
    tail = tl.where(held[:, None], tail, 0.0)
    if SAME:
        acc = tail
    else:
        spot = dc + (column + to)[:, None] * G + p[None, :]
        tl.store(spot, tail.to(dc.dtype.element_ty), mask=inside[:, None] & (p < G)[None, :])
        acc = tl.zeros([BN, DP], tl.float32)
    keys = tile(k, to * kl, key, d, D)
    first = tl.maximum(0, j0 - shift - (0 if CAUSAL else W - 1)) // BM * BM
    last = tl.minimum(L, j0 + BN - shift + W - 1)
    for g in range(GROUP):
        h = kept * GROUP + g
        for i0 in range(first, last, BM):
            i = i0 + tl.arange(0, BM)
            at, row = i.to(tl.int64), i < L
            place = (b * H + h) * whole + start + at
            near = tile(q + h * qh, at * ql, row, d, D)
            do = tile(d_out + h * oh, at * ol, row, e, E)
            level, offset = tl.load(mass + place, mask=row, other=0.0), tl.load(delta + place, mask=row, other=0.0)
            level = tl.where(level == float("-inf"), 0.0, level * LOG2E)
            s = scores(near, keys, i + shift, j, row, key, W, scale, 0.0, CAUSAL, False, NEAR, PRECISION)
            w = tl.exp2(s - level[:, None])
            d_value += product(tl.trans(w), do, NEAR, PRECISION)
            dw = product(do, tl.trans(value), NEAR, PRECISION)
            acc += product(tl.trans(w * (dw - offset[:, None]) * scale), near, NEAR, PRECISION)
    place = column + to
    spot = dk + place[:, None] * D + d[None, :]
    tl.store(spot, acc.to(dk.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    spot = dv + place[:, None] * E + e[None, :]
    tl.store(spot, d_value.to(dv.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
