# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles this file by rules of its own, which a type checker does not know.
"""The kernels of sums with a decay per feature: products in chunks, sweeps, gradients. `gated` says what they compute.

Arguments, beside pointers and their strides (b, h, l): H heads per batch item of this launch, GROUP of them per key
head, L positions; `tiles` of value columns, `parts` segments of `size` positions; all_rows = B H L. F, E widths; FP,
BE or EP the blocks over them; C positions per chunk. b [B, K, L, F] are running sums of the gates inside chunks.
"""

import triton
import triton.language as tl

from core.attention.kernels.features import features, product

ROWS = tl.constexpr(16)
"""Rows of a block inside a chunk."""


@triton.jit
def load(x, at, ok, f, F: tl.constexpr):
    """Rows [rows, f] that begin at x + at, in float32, 0 where not ok."""
    return features(x, at, ok, f, F, F, "identity")


@triton.jit
def fall(b):
    """e^b for exponents that are <= 0 where they matter: rows past the end have b = 0 and are multiplied by 0."""
    return tl.exp(tl.minimum(b, 0.0))


@triton.jit
def cumulate(g, b, gb, gh, gl, K, L, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr):
    """b [B, K, L, F] = running sum of g since its chunk's first position."""
    blocks = tl.cdiv(L, C)
    bk, f = tl.program_id(0) // blocks, tl.arange(0, FP)
    i = (tl.program_id(0) % blocks).to(tl.int64) * C + tl.arange(0, C)
    item, head, ok = (bk // K).to(tl.int64), (bk % K).to(tl.int64), i < L
    running = tl.cumsum(load(g + item * gb + head * gh, i * gl, ok, f, F), 0)
    spot = b + (bk.to(tl.int64) * L + i)[:, None] * F + f[None, :]
    tl.store(spot, running, mask=ok[:, None] & (f < F)[None, :])


@triton.jit
def inner(
    q, k, b, a, qb, qh, ql, kb, kh, kl, H, GROUP, L,
    F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A [B, H, L, C] at 16 rows and their chunk's keys up to their own; columns above the diagonal stay unwritten."""
    blocks = tl.cdiv(L, ROWS)
    bh, i0 = tl.program_id(0) // blocks, (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    item, h, f, c = (bh // H).to(tl.int64), (bh % H).to(tl.int64), tl.arange(0, FP), tl.arange(0, ROWS)
    i = i0 + c
    ok, begin = i < L, i0 // C * C
    q += item * qb + h * qh
    k += item * kb + h // GROUP * kh
    b += (bh // GROUP).to(tl.int64) * L * F
    a += (bh.to(tl.int64) * L + i)[:, None] * C + c[None, :] - begin
    x, run = load(q, i * ql, ok, f, F), load(b, i * F, ok, f, F)
    anchor = tl.load(b + i0 * F + f, mask=f < F, other=0.0)[None, :]
    left = x * fall(run - anchor)
    for j0 in range(begin, i0, ROWS):
        j = (j0 + c).to(tl.int64)  # the interpreter counts in 32 bits, whatever the bounds are
        right = load(k, j * kl, j < L, f, F) * fall(anchor - load(b, j * F, j < L, f, F))
        tl.store(a + j0, product(left, tl.trans(right), DOT, PRECISION).to(a.dtype.element_ty), mask=ok[:, None])
    own = tl.zeros([ROWS, ROWS], tl.float32)
    for n in range(ROWS):
        one = tl.minimum(i0 + n, L - 1)
        key = tl.load(k + one * kl + f, mask=f < F, other=0.0).to(tl.float32)
        at = tl.load(b + one * F + f, mask=f < F, other=0.0)
        column = tl.sum(x * key[None, :] * fall(run - at[None, :]), 1)
        own = tl.where(c[None, :] == n, column[:, None], own)
    tl.store(a + i0, own.to(a.dtype.element_ty), mask=ok[:, None] & (c[:, None] >= c[None, :]))


@triton.jit
def _pairs(d_out, at, row, v, to, key, E: tl.constexpr, EP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """<d_out_i, v_j> [16, 16], the gradient at A."""
    d = tl.zeros([ROWS, ROWS], tl.float32)
    for e0 in range(0, E, EP):
        e = e0 + tl.arange(0, EP)
        d += product(load(d_out, at, row, e, E), tl.trans(load(v, to, key, e, E)), DOT, PRECISION)
    return d


@triton.jit
def inner_gradient(
    q, k, v, d_out, b, dq_parts, dk_parts, dq, dk, along,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol, H, GROUP, L, tiles, all_rows,
    F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, EP: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and along = q dq - k dk of 16 positions: through A, and through S as summed over the value tiles."""
    blocks = tl.cdiv(L, ROWS)
    bh, i0 = tl.program_id(0) // blocks, (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    item, h, f, c = (bh // H).to(tl.int64), (bh % H).to(tl.int64), tl.arange(0, FP), tl.arange(0, ROWS)
    i = i0 + c
    ok, begin = i < L, i0 // C * C
    q += item * qb + h * qh
    k += item * kb + h // GROUP * kh
    v += item * vb + h // GROUP * vh
    d_out += item * ob + h * oh
    b += (bh // GROUP).to(tl.int64) * L * F
    here = ok[:, None] & (f < F)[None, :]
    place = (bh.to(tl.int64) * L + i)[:, None] * F + f[None, :]
    x, y, run = load(q, i * ql, ok, f, F), load(k, i * kl, ok, f, F), load(b, i * F, ok, f, F)
    dx, dy = tl.zeros([ROWS, FP], tl.float32), tl.zeros([ROWS, FP], tl.float32)
    for n in range(tiles):
        part = (bh * 0 + n).to(tl.int64) * all_rows * F
        dx += tl.load(dq_parts + part + place, mask=here, other=0.0)
        dy += tl.load(dk_parts + part + place, mask=here, other=0.0)
    anchor = tl.load(b + i0 * F + f, mask=f < F, other=0.0)[None, :]
    earlier = tl.zeros([ROWS, FP], tl.float32)
    for j0 in range(begin, i0, ROWS):
        j = (j0 + c).to(tl.int64)
        d = _pairs(d_out, i * ol, ok, v, j * vl, j < L, E, EP, DOT, PRECISION)
        right = load(k, j * kl, j < L, f, F) * fall(anchor - load(b, j * F, j < L, f, F))
        earlier += product(d, right, DOT, PRECISION)
    dx += earlier * fall(run - anchor)
    for j0 in range(i0 + ROWS, tl.minimum(begin + C, L), ROWS):
        j = (j0 + c).to(tl.int64)
        d = _pairs(d_out, j * ol, j < L, v, i * vl, ok, E, EP, DOT, PRECISION)
        first = tl.load(b + j0 * F + f, mask=f < F, other=0.0)[None, :]
        left = load(q, j * ql, j < L, f, F) * fall(load(b, j * F, j < L, f, F) - first)
        dy += product(tl.trans(d), left, DOT, PRECISION) * fall(first - run)
    d = _pairs(d_out, i * ol, ok, v, i * vl, ok, E, EP, DOT, PRECISION)
    d = tl.where(c[:, None] >= c[None, :], d, 0.0)
    for n in range(ROWS):
        one = tl.minimum(i0 + n, L - 1)  # past the end d is 0
        ask = tl.load(q + one * ql + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        key = tl.load(k + one * kl + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        at = tl.load(b + one * F + f, mask=f < F, other=0.0)[None, :]
        dx += tl.sum(tl.where(c[None, :] == n, d, 0.0), 1)[:, None] * key * fall(run - at)
        dy += tl.sum(tl.where(c[:, None] == n, d, 0.0), 0)[:, None] * ask * fall(at - run)
    tl.store(dq + place, dx.to(dq.dtype.element_ty), mask=here)
    tl.store(dk + place, dy.to(dk.dtype.element_ty), mask=here)
    tl.store(along + place, x * dx - y * dy, mask=here)


@triton.jit
def decays(b, u0, u, L, f, F: tl.constexpr, C: tl.constexpr):
    """(running sums at u [C, F], the chunk's whole sum [F])."""
    last = tl.load(b + (tl.minimum(u0 + C, L) - 1).to(tl.int64) * F + f, mask=f < F, other=0.0)
    return load(b, u * F, u < L, f, F), last


@triton.jit
def square(a, u, L, C: tl.constexpr):
    """A of one chunk, 0 above the diagonal."""
    c = tl.arange(0, C)
    return tl.load(a + u[:, None] * C + c[None, :], mask=(u < L)[:, None] & (c[:, None] >= c[None, :]), other=0.0)


@triton.jit
def write(
    x, b, v, sums, totals, xb, xh, xl, vb, vh, vl, H, GROUP, L, tiles, parts, size,
    F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state; REVERSE, x being queries and v d_out: to the gradient of the one before it."""
    pid = tl.program_id(0)
    tile, part, bh = pid % tiles, (pid // tiles) % parts, pid // (tiles * parts)
    item, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    f, e = tl.arange(0, FP), tile * BE + tl.arange(0, BE)
    x += item * xb + h * xh
    v += item * vb + h * vh
    b += (bh // GROUP).to(tl.int64) * L * F
    s, total = tl.zeros([FP, BE], tl.float32), tl.zeros([FP], tl.float32)
    begin, end = part * size, tl.minimum(L, (part + 1) * size)
    chunks = tl.cdiv(end - begin, C)
    for n in range(chunks):
        u0 = begin + (chunks - 1 - n if REVERSE else n) * C
        u = (u0 + tl.arange(0, C)).to(tl.int64)
        run, last = decays(b, u0, u, L, f, F, C)
        rows = load(x, u * xl, u < L, f, F) * fall(run if REVERSE else last[None, :] - run)
        s = s * tl.exp(last)[:, None] + product(tl.trans(rows), load(v, u * vl, u < L, e, E), DOT, PRECISION)
        total += last
    at = (bh * parts + part).to(tl.int64) * F
    tl.store(sums + (at + f)[:, None] * E + e[None, :], s, mask=(f < F)[:, None] & (e < E)[None, :])
    if tile == 0:
        tl.store(totals + at + f, total, mask=f < F)


@triton.jit
def forward(
    q, k, v, b, a, states, out, end, qb, qh, ql, kb, kh, kl, vb, vh, vl, H, GROUP, L, tiles, parts, size,
    F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
    STATE: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment from the state before it."""
    pid = tl.program_id(0)
    tile, part, bh = pid % tiles, (pid // tiles) % parts, pid // (tiles * parts)
    item, h, bk = (bh // H).to(tl.int64), (bh % H).to(tl.int64), (bh // GROUP).to(tl.int64)
    f, e = tl.arange(0, FP), tile * BE + tl.arange(0, BE)
    spot, here = f[:, None] * E + e[None, :], (f < F)[:, None] & (e < E)[None, :]
    s = tl.zeros([FP, BE], tl.float32)
    if STATE:
        s = tl.load(states + (bk * parts + part) * F * E + spot, mask=here, other=0.0)
    q += item * qb + h * qh
    k += item * kb + h // GROUP * kh
    v += item * vb + h // GROUP * vh
    b += bk * L * F
    a += bh.to(tl.int64) * L * C
    for u0 in range(part * size, tl.minimum(L, (part + 1) * size), C):
        u = (u0 + tl.arange(0, C)).to(tl.int64)
        run, last = decays(b, u0, u, L, f, F, C)
        value = load(v, u * vl, u < L, e, E)
        read = product(load(q, u * ql, u < L, f, F) * fall(run), s, DOT, PRECISION)
        read += product(square(a, u, L, C), value, DOT, PRECISION)
        rows = load(k, u * kl, u < L, f, F) * fall(last[None, :] - run)
        s = s * tl.exp(last)[:, None] + product(tl.trans(rows), value, DOT, PRECISION)
        place = (bh.to(tl.int64) * L + u)[:, None] * E + e[None, :]
        tl.store(out + place, read, mask=(u < L)[:, None] & (e < E)[None, :])
    if KEEP and h % GROUP == 0:
        tl.store(end + bk * F * E + spot, s, mask=here)


@triton.jit
def query_gradient(
    k, v, d_out, b, states, dq, kb, kh, kl, vb, vh, vl, ob, oh, ol, H, GROUP, L, tiles, parts, size, all_rows,
    F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
    STATE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What reaches the queries of one segment through S, over this tile's values, in a sweep with the forward's S."""
    pid = tl.program_id(0)
    tile, part, bh = pid % tiles, (pid // tiles) % parts, pid // (tiles * parts)
    item, h, bk = (bh // H).to(tl.int64), (bh % H).to(tl.int64), (bh // GROUP).to(tl.int64)
    f, e = tl.arange(0, FP), tile * BE + tl.arange(0, BE)
    s = tl.zeros([FP, BE], tl.float32)
    if STATE:
        at = (bk * parts + part) * F * E
        s = tl.load(states + at + f[:, None] * E + e[None, :], mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
    k += item * kb + h // GROUP * kh
    v += item * vb + h // GROUP * vh
    d_out += item * ob + h * oh
    b += bk * L * F
    for u0 in range(part * size, tl.minimum(L, (part + 1) * size), C):
        u = (u0 + tl.arange(0, C)).to(tl.int64)
        run, last = decays(b, u0, u, L, f, F, C)
        d = product(load(d_out, u * ol, u < L, e, E), tl.trans(s), DOT, PRECISION) * fall(run)
        place = (tile.to(tl.int64) * all_rows + bh.to(tl.int64) * L + u)[:, None] * F + f[None, :]
        tl.store(dq + place, d, mask=(u < L)[:, None] & (f < F)[None, :])
        rows = load(k, u * kl, u < L, f, F) * fall(last[None, :] - run)
        value = load(v, u * vl, u < L, e, E)
        s = s * tl.exp(last)[:, None] + product(tl.trans(rows), value, DOT, PRECISION)


@triton.jit
def key_gradient(
    q, k, v, d_out, b, a, states, dk, dv, d_first,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol, H, GROUP, L, tiles, parts, size, all_rows,
    F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
    STATE: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What reaches the keys of one segment through S, and dv, for one query head, against time with S's gradient."""
    pid = tl.program_id(0)
    tile, part, bh = pid % tiles, (pid // tiles) % parts, pid // (tiles * parts)
    item, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    f, e = tl.arange(0, FP), tile * BE + tl.arange(0, BE)
    spot, here = f[:, None] * E + e[None, :], (f < F)[:, None] & (e < E)[None, :]
    s = tl.zeros([FP, BE], tl.float32)
    if STATE:
        s = tl.load(states + (bh * parts + part).to(tl.int64) * F * E + spot, mask=here, other=0.0)
    q += item * qb + h * qh
    k += item * kb + h // GROUP * kh
    v += item * vb + h // GROUP * vh
    d_out += item * ob + h * oh
    b += (bh // GROUP).to(tl.int64) * L * F
    a += bh.to(tl.int64) * L * C
    begin, end = part * size, tl.minimum(L, (part + 1) * size)
    chunks = tl.cdiv(end - begin, C)
    for n in range(chunks):
        u0 = begin + (chunks - 1 - n) * C
        u = (u0 + tl.arange(0, C)).to(tl.int64)
        run, last = decays(b, u0, u, L, f, F, C)
        do, leave = load(d_out, u * ol, u < L, e, E), fall(last[None, :] - run)
        dy = product(load(v, u * vl, u < L, e, E), tl.trans(s), DOT, PRECISION) * leave
        rows = bh.to(tl.int64) * L + u
        spread = (tile.to(tl.int64) * all_rows + rows)[:, None] * F + f[None, :]
        tl.store(dk + spread, dy, mask=(u < L)[:, None] & (f < F)[None, :])
        d = product(load(k, u * kl, u < L, f, F) * leave, s, DOT, PRECISION)
        d += product(tl.trans(square(a, u, L, C)), do, DOT, PRECISION)
        place = rows[:, None] * E + e[None, :]
        tl.store(dv + place, d.to(dv.dtype.element_ty), mask=(u < L)[:, None] & (e < E)[None, :])
        read = load(q, u * ql, u < L, f, F) * fall(run)
        s = s * tl.exp(last)[:, None] + product(tl.trans(read), do, DOT, PRECISION)
    if KEEP:
        tl.store(d_first + bh.to(tl.int64) * F * E + spot, s, mask=here)
