# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles the kernels by rules of its own, which a type checker does not know.
"""Sliding-window attention with its log mass on a GPU: `core.attention.blocked.window`, fused.

    s_ij = scale q_i.k_j - slope |t_i - j|  for |t_i - j| < W (and j <= t_i if causal), t_i = i + M - L
    o_i = sum_j exp(s_ij - l_i) v_j,    l_i = log sum_j exp(s_ij)

One program has a block of rows and visits only the blocks of keys that its band touches, with a running maximum in
float32. The backward recomputes the weights from l: one kernel by rows for dq, one by keys for dk and dv, adding the
heads of a group in order; dS = P (do.v - delta), delta = <do, o> - dl, so the gradient at the mass costs nothing.

Bytes moved: e L (D + E) (1 + group) of queries and outputs, and e M (D + E) (1 + W / rows) of keys and values, mostly
from the L2 cache; FLOPs 2 L W (D + E) forward and 2.5 times that backward. Bound by arithmetic from W of about 600.

Packs: the same kernels, with a table of which block of which sequence a program has (`packs`).

Serves, when asked for: float32, float16 and bfloat16 and heads up to 256 wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.blocked.pairs import join_softmax
from core.attention.kernels.features import product
from core.attention.kernels.launch import Blocks, choose, on, padded, products, rows_contiguous
from core.attention.kernels.packs import Layout, layout, line, pack_from
from core.attention.packing import Pack

BLOCKS = {
    None: Blocks(16, 32, 8, 1),
    "interpreter": Blocks(16, 16, 4, 1),
    ("hopper", 64, 2): Blocks(64, 64, 4, 3),
    ("hopper", 128, 2): Blocks(64, 64, 8, 2),
    ("hopper", 256, 2): Blocks(32, 32, 4, 1),
    ("ampere", 64, 2): Blocks(64, 64, 4, 2),
    ("ampere", 128, 2): Blocks(64, 32, 4, 2),
}
"""Rows and keys per block, warps and stages by (class of device, padded width, bytes per element). Chosen by the
registers and shared memory that ptxas reports for sm_90a (2026-11-21); not yet timed on a GPU."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(base, at, ok, c, WIDTH: tl.constexpr):
    """Rows [rows, c] that begin at base + at, 0 where not ok."""
    return tl.load(base + at[:, None] + c[None, :], mask=ok[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def real(mask, j, M, MASK: tl.constexpr):
    """Whether there is a key j, and no mask hides it."""
    ok = (j >= 0) & (j < M)
    if MASK:
        ok = ok & (tl.load(mask + j, mask=ok, other=0) != 0)
    return ok


@triton.jit
def scores(
    q, k, t, j, row, key, W, scale, slope, CAUSAL: tl.constexpr, ALIBI: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [rows, keys] in units of log 2, -inf where hidden."""
    s = product(q, tl.trans(k), DOT, PRECISION) * (scale * LOG2E)
    distance = t[:, None] - j[None, :]
    away = tl.abs(distance)
    if ALIBI:
        s -= away.to(tl.float32) * (slope * LOG2E)
    seen = (away < W) & row[:, None] & key[None, :]
    if CAUSAL:
        seen = seen & (distance >= 0)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def absorb(s, values, top, total, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Running maximum, sum and weighted values of each row after one more block of scores (units of log 2)."""
    higher = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    fall, p = tl.exp2(top - safe), tl.exp2(s - safe[:, None])
    return higher, total * fall + tl.sum(p, 1), acc * fall[:, None] + product(p, values, DOT, PRECISION)


@triton.jit
def finish(out, mass, place, row, e, top, total, acc, E: tl.constexpr):
    """Write the means and log masses of rows `place`; 0 and -inf where nothing was seen."""
    whole = tl.where(total > 0, total, 1.0)
    log = tl.where(total > 0, (top + tl.log2(whole)) / LOG2E, float("-inf"))
    tl.store(mass + place, log, mask=row)
    spot = out + place[:, None] * E + e[None, :]
    tl.store(spot, (acc / whole[:, None]).to(out.dtype.element_ty), mask=row[:, None] & (e < E)[None, :])


@triton.jit
def upstream(q, d_out, mass, delta, i, place, row, c, e, ql, dl, D: tl.constexpr, E: tl.constexpr):
    """(queries, d out, their log mass in units of log 2, delta) of rows i, whose row scalars stand at `place`."""
    x, do = tile(q, i.to(tl.int64) * ql, row, c, D), tile(d_out, i.to(tl.int64) * dl, row, e, E)
    level = tl.load(mass + place, mask=row, other=0.0) * LOG2E
    level = tl.where(level == float("-inf"), 0.0, level)
    return x, do, level, tl.load(delta + place, mask=row, other=0.0)


@triton.jit
def _forward(
    q, k, v, mask, slopes, table, out, mass,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, mb, H, GROUP, L, M, W, scale, blocks,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, PACK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    bh, i0 = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BM
    b, h, head = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh.to(tl.int64) * L
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    mask += b * mb
    if PACK:
        _, i0, first, L, _, M, _, _, _ = line(table, tl.program_id(0) % blocks)
        q += first * ql
        k += first * kl
        v += first * vl
        head += first
    c, e, i = tl.arange(0, DP), tl.arange(0, EP), i0 + tl.arange(0, BM)
    t, row = i + M - L, i < L
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + h).to(tl.float32)
    x = tile(q, i.to(tl.int64) * ql, row, c, D)
    top = tl.full([BM], float("-inf"), tl.float32)
    total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, EP], tl.float32)
    first = tl.maximum(0, i0 + M - L - W + 1) // BN * BN
    last = tl.minimum(M, i0 + BM + M - L + (0 if CAUSAL else W - 1))
    for j0 in range(first, last, BN):
        j = j0 + tl.arange(0, BN)
        key = real(mask, j, M, MASK)
        keys = tile(k, j.to(tl.int64) * kl, key, c, D)
        s = scores(x, keys, t, j, row, key, W, scale, slope, CAUSAL, ALIBI, DOT, PRECISION)
        values = tile(v, j.to(tl.int64) * vl, key, e, E)
        top, total, acc = absorb(s, values, top, total, acc, DOT, PRECISION)
    finish(out, mass, head + i, row, e, top, total, acc, E)


@triton.jit
def _delta(
    d_out, out, d_mass, delta, db, dh, dl, H, L,
    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """<do, o> - dl per row."""
    blocks = tl.cdiv(L, BM)
    bh, i = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    b, h, row, e = (bh // H).to(tl.int64), (bh % H).to(tl.int64), i < L, tl.arange(0, EP)
    place = bh.to(tl.int64) * L + i
    d = tile(d_out + b * db + h * dh, i.to(tl.int64) * dl, row, e, E).to(tl.float32)
    sums = tl.sum(d * tile(out, place * E, row, e, E).to(tl.float32), 1)
    if MASS:
        sums -= tl.load(d_mass + place, mask=row, other=0.0)
    tl.store(delta + place, sums, mask=row)


@triton.jit
def _query_gradient(
    q, k, v, d_out, mass, delta, mask, slopes, table, dq,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, db, dh, dl, mb, H, GROUP, L, M, W, scale, blocks,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, PACK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    bh, i0 = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BM
    b, h, head = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh.to(tl.int64) * L
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    d_out += b * db + h * dh
    mask += b * mb
    if PACK:
        _, i0, first, L, _, M, _, _, _ = line(table, tl.program_id(0) % blocks)
        q += first * ql
        k += first * kl
        v += first * vl
        d_out += first * dl
        head += first
    c, e, i = tl.arange(0, DP), tl.arange(0, EP), i0 + tl.arange(0, BM)
    t, row, place = i + M - L, i < L, head + i
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + h).to(tl.float32)
    x, do, level, offset = upstream(q, d_out, mass, delta, i, place, row, c, e, ql, dl, D, E)
    acc = tl.zeros([BM, DP], tl.float32)
    first = tl.maximum(0, i0 + M - L - W + 1) // BN * BN
    last = tl.minimum(M, i0 + BM + M - L + (0 if CAUSAL else W - 1))
    for j0 in range(first, last, BN):
        j = j0 + tl.arange(0, BN)
        key = real(mask, j, M, MASK)
        keys = tile(k, j.to(tl.int64) * kl, key, c, D)
        s = scores(x, keys, t, j, row, key, W, scale, slope, CAUSAL, ALIBI, DOT, PRECISION)
        p = tl.exp2(s - level[:, None])
        dp = product(do, tl.trans(tile(v, j.to(tl.int64) * vl, key, e, E)), DOT, PRECISION)
        acc += product(p * (dp - offset[:, None]), keys, DOT, PRECISION)
    spot = dq + place[:, None] * D + c[None, :]
    tl.store(spot, (acc * scale).to(dq.dtype.element_ty), mask=row[:, None] & (c < D)[None, :])


@triton.jit
def _key_gradient(
    q, k, v, d_out, mass, delta, mask, slopes, table, dk, dv,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, db, dh, dl, mb, H, GROUP, L, M, W, scale, blocks,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, PACK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    heads, rows = H // GROUP, L
    bk, j0 = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BN
    b, kept, head, to = (bk // heads).to(tl.int64), (bk % heads).to(tl.int64), 0, bk.to(tl.int64) * M
    q += b * qb
    k += b * kb + kept * kh
    v += b * vb + kept * vh
    d_out += b * db
    if PACK:
        _, j0, head, L, _, M, _, _, _ = line(table, tl.program_id(0) % blocks)
        q += head * ql
        k += head * kl
        v += head * vl
        d_out += head * dl
        to += head
    c, e, j = tl.arange(0, DP), tl.arange(0, EP), j0 + tl.arange(0, BN)
    key = real(mask + b * mb, j, M, MASK)
    keys, values = tile(k, j.to(tl.int64) * kl, key, c, D), tile(v, j.to(tl.int64) * vl, key, e, E)
    key_acc, value_acc = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, EP], tl.float32)
    first = tl.maximum(0, j0 + L - M - (0 if CAUSAL else W - 1)) // BM * BM
    last = tl.minimum(L, j0 + BN + L - M + W - 1)
    for g in range(GROUP):
        h = kept * GROUP + g
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + h).to(tl.float32)
        for i0 in range(first, last, BM):
            i = i0 + tl.arange(0, BM)
            row, place = i < L, (b * H + h) * rows + head + i
            x, do, level, offset = upstream(q + h * qh, d_out + h * dh, mass, delta, i, place, row, c, e, ql, dl, D, E)
            s = scores(x, keys, i + M - L, j, row, key, W, scale, slope, CAUSAL, ALIBI, DOT, PRECISION)
            p = tl.exp2(s - level[:, None])
            value_acc += product(tl.trans(p), do, DOT, PRECISION)
            dp = product(do, tl.trans(values), DOT, PRECISION)
            key_acc += product(tl.trans(p * (dp - offset[:, None])), x, DOT, PRECISION)
    place, inside = to + j, j < M
    spot = dk + place[:, None] * D + c[None, :]
    tl.store(spot, (key_acc * scale).to(dk.dtype.element_ty), mask=inside[:, None] & (c < D)[None, :])
    spot = dv + place[:, None] * E + e[None, :]
    tl.store(spot, value_acc.to(dv.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


def delta_of(d_out: Tensor, out: Tensor, d_mass: Tensor | None) -> Tensor:
    """<do, o> - dl [B, H, L], float32."""
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    _delta[(-(-out.shape[2] // 32) * out.shape[0] * out.shape[1],)](
        d_out, out, delta if d_mass is None else d_mass.contiguous(), delta, *d_out.stride()[:3], *out.shape[1:3],
        E=out.shape[3], EP=padded(out.shape[3]), BM=32, MASS=d_mass is not None,
    )  # fmt: skip
    return delta


class Call:
    """Arguments that the launches of one call share."""

    def __init__(self, q, k, v, key_mask, slopes, window: int, causal: bool, scale: float, pack: Pack | None = None):
        self.q, self.k, self.v = (rows_contiguous(x) for x in (q, k, v))
        self.mask = q if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.slopes = q if slopes is None else slopes.float().contiguous()
        self.batch, self.heads, self.rows = q.shape[:3]
        self.key_heads, self.keys = k.shape[1:3]
        width, values = padded(q.shape[3]), padded(v.shape[3])
        self.blocks = choose(BLOCKS, q.device, max(64, width, values), q.element_size())
        self.strides = *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3]
        window = min(window, max(self.rows, self.keys))
        group = self.heads // self.key_heads
        self.sizes = self.heads, group, self.rows, self.keys, window, scale
        self.mask_stride = 0 if key_mask is None else self.keys
        self.options = {
            "D": q.shape[3],
            "E": v.shape[3],
            "DP": width,
            "EP": values,
            "BM": self.blocks.chunk,
            "BN": self.blocks.values,
            "CAUSAL": causal,
            "MASK": key_mask is not None,
            "ALIBI": slopes is not None,
            **products(q, k, v, bounded=True),
            "num_warps": self.blocks.warps,
            "num_stages": self.blocks.stages,
        }
        self.row_cut, self.key_cut = (
            Layout(self.q, self.q, -(-n // size), size) if pack is None else layout(pack, over, n, pack.longest, size)
            for over, n, size in (("rows", self.rows, self.blocks.chunk), ("keys", self.keys, self.blocks.values))
        )
        self.row_grid = (self.row_cut.number * self.batch * self.heads,)
        self.key_grid = (self.key_cut.number * self.batch * self.key_heads,)


@torch.library.custom_op("longspan::window_kernel_forward", mutates_args=())
def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    window: int,
    causal: bool,
    scale: float,
    offsets: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `core.attention.blocked.window.window_forward`; offsets, longest: of a `Pack` whose keys are its rows."""
    if 0 in (*q.shape, k.shape[2], v.shape[3]):
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
        return out, torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    mass = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with on(q.device):
        call = Call(q, k, v, key_mask, slopes, window, causal, scale, pack_from(offsets, None, longest))
        _forward[call.row_grid](
            call.q, call.k, call.v, call.mask, call.slopes, call.row_cut.table, out, mass, *call.strides,
            call.mask_stride, *call.sizes, call.row_cut.number, PACK=offsets is not None, **call.options,
        )  # fmt: skip
    return out, mass


@torch.library.custom_op("longspan::window_kernel_backward", mutates_args=())
def window_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mass: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    window: int,
    causal: bool,
    scale: float,
    offsets: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    if 0 in (*q.shape, k.shape[2], v.shape[3]):
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        return dq, dk, dv
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_out = rows_contiguous(d_out)
    with on(q.device):
        call = Call(q, k, v, key_mask, slopes, window, causal, scale, pack_from(offsets, None, longest))
        delta = delta_of(d_out, out, d_mass)
        shared = call.q, call.k, call.v, d_out, mass, delta, call.mask, call.slopes
        sizes = *call.strides, *d_out.stride()[:3], call.mask_stride, *call.sizes
        rows, keys = call.row_cut, call.key_cut
        packed = {**call.options, "PACK": offsets is not None}
        _query_gradient[call.row_grid](*shared, rows.table, dq, *sizes, rows.number, **packed)
        _key_gradient[call.key_grid](*shared, keys.table, dk, dv, *sizes, keys.number, **packed)
    return dq, dk, dv


join_softmax(window_forward, window_backward, fixed=2)
