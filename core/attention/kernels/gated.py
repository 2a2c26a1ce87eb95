# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles the kernels by rules of its own, which a type checker does not know.
"""Running sums with a decay per feature on a GPU: the kind `vector_decay` of `core.attention.blocked.scan`.

    S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t,    g_t <= 0 in R^F        GLA, RWKV-6

With b the running sum of g inside a chunk of C positions (`_cumulate`), and A_ij = sum_f q_if k_jf e^{b_if - b_jf},

    O = (Q e^b) S + A V,    S <- Diag(e^{b_C}) S + (K e^{b_C - b})^T V

A does not factor into one product without e^{-b}, which overflows. `_inner` builds it in blocks of 16 rows: against
earlier keys as one product of factors anchored at the block's first row, against its own keys element by element. No
exponent is above 0 anywhere. `_inner_gradient` differentiates the same two forms, and adds what came through S. The
gate needs no pass of its own: db = q dq - k dk per feature, dg is its reverse running sum, to which a final state that
is used adds S dS at the end.

Sweeps, value tiles and segments are those of `linear`: one segment where batch x heads fills the device, else sums of
segments, a prefix over them in fixed order, all segments at once. Deterministic, no atomics.

Bytes, e per element, n value tiles: forward L (K (e F (1 + n) + e E + 4 F (3 + n)) + H (e F (1 + n) + 4 E + 4 C)); the
backward 3 times that and 8 n H L F for the partial gradients. FLOPs forward H L (4 F E + 2 C (F + E) + 34 F exp).

Serves, when asked for: float32, float16 and bfloat16 up to 256 features; `launch.products` states the precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.kernels.features import features, product
from core.attention.kernels.launch import Blocks, choose, on, padded, products, rows_contiguous, segments
from core.attention.kernels.linear_sweeps import prefix
from core.attention.kernels.step import decay_step, is_step

BLOCKS = {
    None: Blocks(16, 32, 8, 1),
    "interpreter": Blocks(32, 16, 4, 1),
    ("hopper", 16, 2): Blocks(64, 64, 4, 1),
    ("hopper", 32, 2): Blocks(64, 64, 4, 1),
    ("hopper", 64, 2): Blocks(64, 64, 8, 1),
    ("hopper", 128, 2): Blocks(64, 32, 8, 1),
    ("hopper", 256, 2): Blocks(32, 32, 8, 1),
}
"""Keyed by (class of device, padded features, bytes per element). Chosen by the registers and shared memory that ptxas
reports for sm_90a (2026-11-25); not yet timed on a GPU."""

ROWS = tl.constexpr(16)
"""Rows of a block inside a chunk."""


def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `core.attention.blocked.scan.scan("vector_decay", ...)`."""
    if state is not None and is_step(q, k, v, state) and not (torch.is_grad_enabled() and g.requires_grad):
        return decay_step(q, k, v, g, state)
    return gated_forward(q, k, v, g, state)


@triton.jit
def load(x, at, ok, f, F: tl.constexpr):
    """Rows [rows, f] that begin at x + at, in float32, 0 where not ok."""
    return features(x, at, ok, f, F, F, "identity")


@triton.jit
def fall(b):
    """e^b for exponents that are <= 0 where they matter: rows past the end have b = 0 and are multiplied by 0."""
    return tl.exp(tl.minimum(b, 0.0))


@triton.jit
def _cumulate(g, b, gb, gh, gl, K, L, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr):
    """b [B, K, L, F] = running sum of g since its chunk's first position."""
    blocks = tl.cdiv(L, C)
    bk, f = tl.program_id(0) // blocks, tl.arange(0, FP)
    i = (tl.program_id(0) % blocks).to(tl.int64) * C + tl.arange(0, C)
    item, head, ok = (bk // K).to(tl.int64), (bk % K).to(tl.int64), i < L
    running = tl.cumsum(load(g + item * gb + head * gh, i * gl, ok, f, F), 0)
    spot = b + (bk.to(tl.int64) * L + i)[:, None] * F + f[None, :]
    tl.store(spot, running, mask=ok[:, None] & (f < F)[None, :])


@triton.jit
def _inner(
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
        j = j0 + c
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
def _inner_gradient(
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
        j = j0 + c
        d = _pairs(d_out, i * ol, ok, v, j * vl, j < L, E, EP, DOT, PRECISION)
        right = load(k, j * kl, j < L, f, F) * fall(anchor - load(b, j * F, j < L, f, F))
        earlier += product(d, right, DOT, PRECISION)
    dx += earlier * fall(run - anchor)
    for j0 in range(i0 + ROWS, tl.minimum(begin + C, L), ROWS):
        j = j0 + c
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
def _write(
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
def _forward(
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
def _query_gradient(
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
def _key_gradient(
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


def cumulated(g: Tensor, chunk: int, warps: int = 4) -> Tensor:
    """Running sums of the gates [B, K, L, F] inside chunks, float32."""
    g = rows_contiguous(g)
    b = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    batch, heads, length, width = g.shape
    _cumulate[(-(-length // chunk) * batch * heads,)](
        g, b, *g.stride()[:3], heads, length, F=width, FP=padded(width), C=chunk, num_warps=warps
    )
    return b


def squares(q: Tensor, k: Tensor, b: Tensor, chunk: int, kind: dict, dtype: torch.dtype) -> Tensor:
    """A [B, H, L, chunk] of queries and keys; above the diagonal nothing is written."""
    batch, heads, length, width = q.shape
    a = torch.empty(batch, heads, length, chunk, dtype=dtype, device=q.device)
    _inner[(-(-length // ROWS.value) * batch * heads,)](
        q, k, b, a, *q.stride()[:3], *k.stride()[:3], heads, heads // k.shape[1], length,
        F=width, FP=padded(width), C=chunk, **kind,
    )  # fmt: skip
    return a


class Gated:
    """The launches of one call: what all of them share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor):
        self.q, self.k, self.v = (rows_contiguous(x) for x in (q, k, v))
        self.batch, self.heads, self.length, self.width = q.shape
        self.key_heads, self.values, self.group = k.shape[1], v.shape[3], q.shape[1] // k.shape[1]
        self.empty_input = 0 in (self.batch, self.length, self.width, self.values)
        blocks = choose(BLOCKS, q.device, padded(self.width), q.element_size())
        self.chunk, tile = blocks.chunk, min(blocks.values, padded(self.values))
        self.tiles = max(1, -(-self.values // tile))
        self.parts, self.size = segments(self.length, self.chunk, self.batch * self.heads * self.tiles, q.device)
        self.products = {**products(q, k, v), "num_warps": blocks.warps}
        self.sizes = {"F": self.width, "E": self.values, "FP": padded(self.width), "C": self.chunk}
        self.kind = {**self.sizes, "BE": tile, **self.products, "num_stages": blocks.stages}
        self.shared = self.group, self.length, self.tiles, self.parts, self.size
        self.grid = (self.tiles * self.parts * self.batch * self.heads,)
        if not self.empty_input:
            self.b = cumulated(g, self.chunk, blocks.warps)
            exact = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32  # as it is multiplied
            self.a = squares(self.q, self.k, self.b, self.chunk, self.products, exact)

    def buffer(self, *shape: int) -> Tensor:
        """An unwritten float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def between(self, x: Tensor, v: Tensor, first: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        """(state, or its gradient where reverse, at the border of each segment; that past all of them)."""
        heads, group = x.shape[1], x.shape[1] // self.key_heads
        sums = self.buffer(self.batch, heads, self.parts, self.width, self.values)
        totals, end = self.buffer(*sums.shape[:4]), self.buffer(self.batch, heads, self.width, self.values)
        _write[(self.tiles * self.parts * self.batch * heads,)](
            x, self.b, v, sums, totals, *x.stride()[:3], *v.stride()[:3], heads, group, *self.shared[1:],
            REVERSE=reverse, **self.kind,
        )  # fmt: skip
        states, blocks = torch.empty_like(sums), -(-self.width * self.values // 1024)
        prefix[(blocks * self.batch * heads,)](
            sums, totals, sums if first is None else first, end, states, self.parts, blocks,
            N=self.width * self.values, BLOCK=1024, FIRST=first is not None, DECAY=True, REVERSE=reverse,
            RATES=self.width,
        )  # fmt: skip
        return states, end

    def forward(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out [B, H, L, E], state after all), float32."""
        rows, ends = (self.batch, self.heads, self.length), (self.batch, self.key_heads, self.width, self.values)
        state = None if state is None else state.float().contiguous()
        if self.empty_input:
            zero = torch.zeros(ends, dtype=torch.float32, device=self.q.device)
            out = torch.zeros(*rows, self.values, dtype=torch.float32, device=self.q.device)
            return out, zero if state is None else state.clone()
        out, keep = self.buffer(*rows, self.values), self.parts == 1
        if keep:
            end = self.buffer(*ends)
        else:
            state, end = self.between(self.k, self.v, state, reverse=False)
        _forward[self.grid](
            self.q, self.k, self.v, self.b, self.a, out if state is None else state, out, end,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], self.heads, *self.shared,
            STATE=state is not None, KEEP=keep, **self.kind,
        )  # fmt: skip
        return out, end

    def backward(self, d_out: Tensor, state: Tensor | None, d_end: Tensor | None) -> tuple[Tensor, ...]:
        """(dq, dk, dv, db [B, K, L, F], d state before all)."""
        q, k, v, d_out, heads = self.q, self.k, self.v, rows_contiguous(d_out), self.heads
        rows, state = (self.batch, heads, self.length), None if state is None else state.float().contiguous()
        after = None
        if d_end is not None:  # to the first head of each group; the sum over all heads is what counts
            after = torch.zeros(*self.k.shape[:2], self.group, *d_end.shape[2:], device=q.device)
            after[:, :, 0] = d_end
            after = after.flatten(1, 2)
        keep, d_first = self.parts == 1, self.buffer(self.batch, heads, self.width, self.values)
        if not keep:
            state, _ = self.between(k, v, state, reverse=False)
            after, d_first = self.between(q, d_out, after, reverse=True)
        partial_q, partial_k = (self.buffer(self.tiles, *rows, self.width) for _ in range(2))
        strides = *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3]
        all_rows = self.batch * heads * self.length
        _query_gradient[self.grid](
            k, v, d_out, self.b, partial_q if state is None else state, partial_q, *strides, heads, *self.shared,
            all_rows, STATE=state is not None, **self.kind,
        )  # fmt: skip
        alone = self.group == 1
        dv = torch.empty(*rows, self.values, dtype=v.dtype if alone else torch.float32, device=q.device)
        _key_gradient[self.grid](
            q, k, v, d_out, self.b, self.a, partial_k if after is None else after, partial_k, dv, d_first,
            *q.stride()[:3], *strides, heads, *self.shared, all_rows, STATE=after is not None, KEEP=keep, **self.kind,
        )  # fmt: skip
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty(*rows, self.width, dtype=k.dtype if alone else torch.float32, device=q.device)
        db = self.buffer(*rows, self.width)
        _inner_gradient[(-(-self.length // ROWS.value) * self.batch * heads,)](
            q, k, v, d_out, self.b, partial_q, partial_k, dq, dk, db, *q.stride()[:3], *strides, heads, self.group,
            self.length, self.tiles, all_rows, EP=min(64, padded(self.values)), **self.sizes, **self.products,
        )  # fmt: skip
        dk, dv, db, d_first = (x if alone else self.summed(x) for x in (dk, dv, db, d_first))
        return dq, dk.to(k.dtype), dv.to(v.dtype), db, d_first

    def summed(self, x: Tensor) -> Tensor:
        """Per query head -> per key head, in fixed order."""
        return x.unflatten(1, (self.key_heads, self.group)).sum(2)


@torch.library.custom_op("longspan::gated_kernel_forward", mutates_args=())
def gated_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, E], last state [B, K, F, E]), float32."""
    with on(q.device):
        return Gated(q, k, v, g).forward(state)


@torch.library.custom_op("longspan::gated_kernel_backward", mutates_args=())
def gated_backward(
    d_out: Tensor, d_end: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, end: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, d first state)."""
    with on(q.device):
        gated = Gated(q, k, v, g)
        if gated.empty_input:
            dq, dk, dv, dg, d_first = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, end))
            return dq, dk, dv, dg, d_first if d_end is None else d_end.float().clone()
        dq, dk, dv, db, d_first = gated.backward(d_out, state, d_end)
        if d_end is not None:
            db[:, :, -1] += (end * d_end).sum(3)
        return dq, dk, dv, db.flip(2).cumsum(2).flip(2).to(g.dtype), d_first


@gated_forward.register_fake
def _(q, k, v, g, state):
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
    return out, q.new_empty(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float32)


@gated_backward.register_fake
def _(d_out, d_end, q, k, v, g, state, end):
    return (*(x.new_empty(x.shape) for x in (q, k, v, g)), torch.empty_like(end))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, d_out, d_end):
    *grads, ds = gated_backward(d_out, d_end, *ctx.saved_tensors)
    return *grads, ds if ctx.saved_tensors[4] is not None else None


gated_forward.register_autograd(_backward, setup_context=_setup)
