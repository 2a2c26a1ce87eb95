# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles this file by rules of its own, which a type checker does not know.
"""The kernels of the hybrid: sums of segments and outputs. `hybrid` says what they compute.

Arguments, beside pointers and their strides (b, h, l): a, c what phi acts on, [B, H, L, G] and [B, K, M, G]; x, y
rotated features [B, H, L, F] and [B, K, M, F], read where TURN; H heads, GROUP of them per key head, L rows, M keys, W
the window, T keys that the tail may hold; `size` positions per segment, `parts` segments of keys and `row_parts` of
rows. A state is S [F, E], then z [F]. D, G, F, E widths, DP, XP, FP, EP the blocks over them, XP that of what a pair's
weight is made from: a and c for Taylor features, else phi of them. BM rows and BN keys at once, BT columns of a state.
`blocks` programs per head.

PACK: the batch is one, L = M are all rows, and block or segment are a line of `table` (`packs`): pointers move to its
sequence, and lengths become that sequence's own; its states begin at `slots` of it among the `parts` of all.
"""

import triton
import triton.language as tl

from core.attention.kernels.features import features, product, weights
from core.attention.kernels.packs import line, pieces
from core.attention.kernels.window import LOG2E, real, scores, tile


@triton.jit
def far_factor(gate, at, level, ok):
    """The factor of phi.phi in a weight, e^(gate - mass); capped near the end of float32, where phi.phi is e^-80."""
    raw = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32) - level
    return tl.where(ok & (level > float("-inf")), tl.exp(tl.minimum(raw, 80.0)), 0.0)


@triton.jit
def pair_operand(c, at, ok, n, G: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr):
    """What the weight of a pair is a function of: for Taylor features the vectors themselves, G wide, else phi."""
    if MAP == "taylor":
        return features(c, at, ok, n, G, G, "identity")
    return features(c, at, ok, n, G, F, MAP)


@triton.jit
def write(
    a, x, v, mask, gate, mass, delta, table, sums, ab, ah, al, xb, xh, xl, vb, vh, vl, gb, gh, gl, mb,
    H, N, parts, size, tiles,
    G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    MAP: tl.constexpr, MASK: tl.constexpr, TURN: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the N positions of one segment add to the state, or, ROWS, to its gradient; BT columns of the values."""
    pid = tl.program_id(0)
    column, part, bh = pid % tiles, (pid // tiles) % parts, pid // (tiles * parts)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    f, e = tl.arange(0, FP), column * BT + tl.arange(0, BT)
    s, z = tl.zeros([FP, BT], tl.float32), tl.zeros([FP], tl.float32)
    a += b * ab + h * ah
    x += b * xb + h * xh
    v += b * vb + h * vh
    gate += b * gb + h * gh
    mask += b * mb
    begin, head = part * size, bh.to(tl.int64) * N
    if PACK:
        _, begin, start, _, _, _, N, _, _ = line(table, part)
        a += start * al
        x += start * xl
        v += start * vl
        gate += start * gl
        head += start
    for n0 in range(begin, tl.minimum(N, begin + size), BN):
        n = n0 + tl.arange(0, BN)
        at, ok = n.to(tl.int64), n < N
        value = tile(v, at * vl, ok, e, E)
        if ROWS:
            place = head + at
            far = far_factor(gate, at * gl, tl.load(mass + place, mask=ok, other=float("-inf")), ok)
            phi = features(a, at * al, ok, f, G, F, MAP) * far[:, None]
            z -= tl.sum(phi * tl.load(delta + place, mask=ok, other=0.0)[:, None], 0)
            if TURN:
                phi = features(x, at * xl, ok, f, F, F, "given") * far[:, None]
        else:
            ok = real(mask, n, N, MASK)
            phi = features(a, at * al, ok, f, G, F, MAP)
            z += tl.sum(phi, 0)
            if TURN:
                phi = features(x, at * xl, ok, f, F, F, "given")
            value = tl.where(ok[:, None], value, 0.0)
        s += product(tl.trans(phi), value, DOT, PRECISION)
    at = (bh * parts + part).to(tl.int64) * (F * (E + 1))
    tl.store(sums + at + f[:, None] * E + e[None, :], s, mask=(f < F)[:, None] & (e < E)[None, :])
    if column == 0:
        tl.store(sums + at + F * E + f, z, mask=f < F)


@triton.jit
def _read(
    num, den, a, x, at, turned_at, row, state,
    G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr,
    MAP: tl.constexpr, TURN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """num [rows, E] and den [rows] with what rows read from a state; its rows are taken BT at a time."""
    e = tl.arange(0, EP)
    for f0 in range(0, FP, BT):
        f = f0 + tl.arange(0, BT)
        here = (f < F)[:, None] & (e < E)[None, :]
        ask = features(a, at, row, f, G, F, MAP)
        den += tl.sum(ask * tl.load(state + F * E + f, mask=f < F, other=0.0)[None, :], 1)
        if TURN:
            ask = features(x, turned_at, row, f, F, F, "given")
        s = tl.load(state + f[:, None] * E + e[None, :], mask=here, other=0.0)
        num += product(ask, s, DOT, PRECISION)
    return num, den


@triton.jit
def _gather(
    num, den, ask, turned, t, row, c, y, v, mask, first, last, cl, yl, vl, M, W, SIDE: tl.constexpr,
    G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, XP: tl.constexpr, FP: tl.constexpr, EP: tl.constexpr,
    BN: tl.constexpr, MAP: tl.constexpr, MASK: tl.constexpr, TURN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """num and den with the tail's keys first..last one by one; SIDE 1: those behind a row, -1: those ahead of it."""
    p, f, e = tl.arange(0, XP), tl.arange(0, FP), tl.arange(0, EP)
    for n0 in range(first, last, BN):
        n = n0 + tl.arange(0, BN)
        at, key = n.to(tl.int64), real(mask, n, M, MASK)
        seen = ((t[:, None] - n[None, :]) * SIDE >= W) & row[:, None] & key[None, :]
        put = pair_operand(c, at * cl, key, p, G, F, MAP)
        w, _ = weights(ask, put, G, MAP, DOT, PRECISION)
        w = tl.where(seen, w, 0.0)
        den += tl.sum(w, 1)
        if TURN:
            put = features(y, at * yl, key, f, F, F, "given")
            w = tl.where(seen, product(turned, tl.trans(put), DOT, PRECISION), 0.0)
        num += product(w, tile(v, at * vl, key, e, E), DOT, PRECISION)
    return num, den


@triton.jit
def forward(
    q, k, v, a, c, x, y, mask, gate, table, slots, past, future, out, mass,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ab, ah, al, cb, ch, cl, xb, xh, xl, yb, yh, yl, gb, gh, gl, mb,
    H, GROUP, L, M, W, scale, T, size, parts, row_parts, blocks,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, XP: tl.constexpr,
    FP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, MAP: tl.constexpr,
    CAUSAL: tl.constexpr, STATE: tl.constexpr, MASK: tl.constexpr, TURN: tl.constexpr, PACK: tl.constexpr,
    DOT: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and log mass of BM rows."""
    bh, i0 = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BM
    b, h, spot, head = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh // GROUP * parts, bh.to(tl.int64) * L
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    a += b * ab + h * ah
    c += b * cb + h // GROUP * ch
    x += b * xb + h * xh
    y += b * yb + h // GROUP * yh
    mask += b * mb
    gate += b * gb + h * gh
    if PACK:
        own, i0, start, L, _, M, T, _, _ = line(table, tl.program_id(0) % blocks)
        spot, parts = pieces(slots, own, spot)
        T = tl.maximum(L - W, 0) if CAUSAL else L
        q += start * ql
        k += start * kl
        v += start * vl
        a += start * al
        c += start * cl
        x += start * xl
        y += start * yl
        gate += start * gl
        head += start
    d, e, p, f, i = tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, XP), tl.arange(0, FP), i0 + tl.arange(0, BM)
    at, row, t, behind = i.to(tl.int64), i < L, i + (M - L), M - L - W
    num, den = tl.zeros([BM, EP], tl.float32), tl.zeros([BM], tl.float32)
    ask, turned = pair_operand(a, at * al, row, p, G, F, MAP), tl.zeros([BM, 1], tl.float32)
    if TURN:
        turned = features(x, at * xl, row, f, F, F, "given")
    part = tl.maximum(tl.minimum((i0 + behind + 1) // size, parts - 1), 0)
    if STATE:
        num, den = _read(
            num, den, a, x, at * al, at * xl, row, past + (spot + part).to(tl.int64) * (F * (E + 1)),
            G, F, E, FP, EP, BT, MAP, TURN, DOT, PRECISION,
        )  # fmt: skip
    num, den = _gather(
        num, den, ask, turned, t, row, c, y, v, mask, part * size, tl.minimum(T, i0 + behind + BM), cl, yl, vl, M, W, 1,
        G, F, E, XP, FP, EP, BN, MAP, MASK, TURN, DOT, PRECISION,
    )  # fmt: skip
    if not CAUSAL:
        part = tl.minimum(tl.cdiv(i0 + BM - 1 + W, size), parts) - 1
        if STATE:
            num, den = _read(
                num, den, a, x, at * al, at * xl, row, future + (spot + part).to(tl.int64) * (F * (E + 1)),
                G, F, E, FP, EP, BT, MAP, TURN, DOT, PRECISION,
            )  # fmt: skip
        num, den = _gather(
            num, den, ask, turned, t, row, c, y, v, mask, (i0 + W) // BN * BN, tl.minimum(T, (part + 1) * size), cl, yl,
            vl, M, W, -1, G, F, E, XP, FP, EP, BN, MAP, MASK, TURN, DOT, PRECISION,
        )  # fmt: skip
    # The tail is the first block of the running maximum: its mean, at the level of its mass.
    weight = tl.load(gate + at * gl, mask=row, other=0.0).to(tl.float32) * LOG2E
    some = den > 0
    whole = tl.where(some, den, 1.0)
    top, total = tl.where(some, weight + tl.log2(whole), float("-inf")), tl.where(some, 1.0, 0.0)
    acc = num * (total / whole)[:, None]
    near, first = tile(q, at * ql, row, d, D), tl.maximum(0, i0 + behind + 1) // BN * BN
    for n0 in range(first, tl.minimum(M, i0 + BM + M - L + (0 if CAUSAL else W - 1)), BN):
        n = n0 + tl.arange(0, BN)
        to, key = n.to(tl.int64), real(mask, n, M, MASK)
        s = scores(near, tile(k, to * kl, key, d, D), t, n, row, key, W, scale, 0.0, CAUSAL, False, NEAR, PRECISION)
        higher = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        fall, w = tl.exp2(top - safe), tl.exp2(s - safe[:, None])
        total = total * fall + tl.sum(w, 1)
        acc = acc * fall[:, None] + product(w, tile(v, to * vl, key, e, E), NEAR, PRECISION)
        top = higher
    whole = tl.where(total > 0, total, 1.0)
    place = head + at
    tl.store(mass + place, tl.where(total > 0, (top + tl.log2(whole)) / LOG2E, float("-inf")), mask=row)
    spot = out + place[:, None] * E + e[None, :]
    tl.store(spot, (acc / whole[:, None]).to(out.dtype.element_ty), mask=row[:, None] & (e < E)[None, :])
