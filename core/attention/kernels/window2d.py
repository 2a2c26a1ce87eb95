# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles the kernels by rules of its own, which a type checker does not know.
"""Softmax inside a 2-D window of an image grid, with the tokens before the grid, in one kernel: `window2d`.

    query (r, c) sees key (r', c')  iff  max(|r - r'|, |c - c'|) < W; tokens before the grid see all, and all see them

A program has a tile of queries, 8 x 8 tokens of the image or a row of 64 where the grid is a line, and visits the
blocks before the grid, then the tiles of keys that cover its tile and W - 1 tokens on each side. Queries before the
grid are blocks of their own, which visit all keys; they come first in the launch, because they are the longest. Both
kinds run through one loop, so there is one normaliser and nothing to merge. Pairs are symmetric: the sweep by keys for
dk and dv has the same geometry with queries and keys changed over. Weights, mass and gradients are those of `window`,
and so are the block sizes.

Bytes moved: those of `window`, with (1 + 2 (W - 1) / 8)^2 reads of keys and values, mostly from the L2 cache. FLOPs
2 N (W' + 8)^2 (D + E) with W' = 2 W - 1, of which W'^2 are needed. One program for each 64 tokens before the grid walks
over the whole image: with very few heads and a large image that is the time of the launch.

Serves, when asked for: float32, float16 and bfloat16 and heads up to 256 wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.blocked.pairs import join_softmax
from core.attention.kernels.features import product
from core.attention.kernels.launch import on, rows_contiguous
from core.attention.kernels.window import LOG2E, Call, absorb, delta_of, finish, real, tile, upstream


@triton.jit
def _own(n, FIRST, ROWS, COLUMNS, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(token, row, column, whether there is one) of block n, and whether it lies before the grid; a, b: its corner."""
    before, across = tl.cdiv(FIRST, BLOCK), tl.cdiv(COLUMNS, WIDE)
    flat, t, x = n < before, tl.maximum(n - before, 0), tl.arange(0, BLOCK)
    a, b = t // across * (BLOCK // WIDE), t % across * WIDE
    r, c = a + x // WIDE, b + x % WIDE
    at = tl.where(flat, n * BLOCK + x, FIRST + r * COLUMNS + c)
    return at, r, c, tl.where(flat, at < FIRST, (r < ROWS) & (c < COLUMNS)), flat, a, b


@triton.jit
def _reach(flat, a, b, FIRST, ROWS, COLUMNS, W, HIGH, WIDE, BLOCK: tl.constexpr, ACROSS: tl.constexpr):
    """(blocks to visit, first row and end, first column and end) from a tile HIGH x WIDE at (a, b), or from `flat`."""
    top, bottom = tl.maximum(a - W + 1, 0), tl.minimum(a + HIGH - 1 + W, ROWS)
    left, right = tl.maximum(b - W + 1, 0), tl.minimum(b + WIDE - 1 + W, COLUMNS)
    tiles = tl.cdiv(bottom - top, BLOCK // ACROSS) * tl.cdiv(right - left, ACROSS)
    all_blocks = tl.cdiv(FIRST + ROWS * COLUMNS, BLOCK)
    return tl.where(flat, all_blocks, tl.cdiv(FIRST, BLOCK) + tiles), top, bottom, left, right


@triton.jit
def _visit(n, flat, r, c, top, bottom, left, right, FIRST, ROWS, COLUMNS, W, BLOCK: tl.constexpr, ACROSS: tl.constexpr):
    """(token, whether there is one [BLOCK], whether it is near to (r, c) [own, BLOCK]) of the n-th block to visit."""
    before, x = tl.cdiv(FIRST, BLOCK), tl.arange(0, BLOCK)
    plain, t, across = flat | (n < before), tl.maximum(n - before, 0), tl.maximum(tl.cdiv(right - left, ACROSS), 1)
    s, d = top + t // across * (BLOCK // ACROSS) + x // ACROSS, left + t % across * ACROSS + x % ACROSS
    at = tl.where(plain, n * BLOCK + x, FIRST + s * COLUMNS + d)
    limit = tl.where(flat, FIRST + ROWS * COLUMNS, FIRST)
    there = tl.where(plain, at < limit, (s < bottom) & (d < right))
    near = (tl.abs(r[:, None] - s[None, :]) < W) & (tl.abs(c[:, None] - d[None, :]) < W)
    return at, there, near | plain


@triton.jit
def _scores(q, k, row, key, near, scale, DOT: tl.constexpr, PRECISION: tl.constexpr):
    s = product(q, tl.trans(k), DOT, PRECISION) * (scale * LOG2E)
    return tl.where(near & row[:, None] & key[None, :], s, float("-inf"))


@triton.jit
def _forward(
    q, k, v, mask, out, mass,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, mb, H, GROUP, FIRST, ROWS, COLUMNS, W, scale, blocks,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    QW: tl.constexpr, KW: tl.constexpr, MASK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    heads, length = tl.num_programs(0) // blocks, FIRST + ROWS * COLUMNS
    bh = tl.program_id(0) % heads
    i, r, c, row, flat, a, b0 = _own(tl.program_id(0) // heads, FIRST, ROWS, COLUMNS, BM, QW)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    x, e = tl.arange(0, DP), tl.arange(0, EP)
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    asked = tile(q + b * qb + h * qh, i.to(tl.int64) * ql, row, x, D)
    best = tl.full([BM], float("-inf"), tl.float32)
    total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, EP], tl.float32)
    visits, top, bottom, left, right = _reach(flat, a, b0, FIRST, ROWS, COLUMNS, W, BM // QW, QW, BN, KW)
    for n in range(visits):
        j, there, near = _visit(n, flat, r, c, top, bottom, left, right, FIRST, ROWS, COLUMNS, W, BN, KW)
        key = there & real(mask + b * mb, tl.where(there, j, -1), length, MASK)
        s = _scores(asked, tile(k, j.to(tl.int64) * kl, key, x, D), row, key, near, scale, DOT, PRECISION)
        values = tile(v, j.to(tl.int64) * vl, key, e, E)
        best, total, acc = absorb(s, values, best, total, acc, DOT, PRECISION)
    finish(out, mass, bh.to(tl.int64) * length + i, row, e, best, total, acc, E)


@triton.jit
def _query_gradient(
    q, k, v, d_out, mass, delta, mask, dq,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, db, dh, dl, mb, H, GROUP, FIRST, ROWS, COLUMNS, W, scale, blocks,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    QW: tl.constexpr, KW: tl.constexpr, MASK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    heads, length = tl.num_programs(0) // blocks, FIRST + ROWS * COLUMNS
    bh = tl.program_id(0) % heads
    i, r, c, row, flat, a, b0 = _own(tl.program_id(0) // heads, FIRST, ROWS, COLUMNS, BM, QW)
    b, h, place = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh.to(tl.int64) * length + i
    x, e = tl.arange(0, DP), tl.arange(0, EP)
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    asked, do, level, offset = upstream(
        q + b * qb + h * qh, d_out + b * db + h * dh, mass, delta, i, place, row, x, e, ql, dl, D, E
    )
    acc = tl.zeros([BM, DP], tl.float32)
    visits, top, bottom, left, right = _reach(flat, a, b0, FIRST, ROWS, COLUMNS, W, BM // QW, QW, BN, KW)
    for n in range(visits):
        j, there, near = _visit(n, flat, r, c, top, bottom, left, right, FIRST, ROWS, COLUMNS, W, BN, KW)
        key = there & real(mask + b * mb, tl.where(there, j, -1), length, MASK)
        keys = tile(k, j.to(tl.int64) * kl, key, x, D)
        p = tl.exp2(_scores(asked, keys, row, key, near, scale, DOT, PRECISION) - level[:, None])
        dp = product(do, tl.trans(tile(v, j.to(tl.int64) * vl, key, e, E)), DOT, PRECISION)
        acc += product(p * (dp - offset[:, None]), keys, DOT, PRECISION)
    spot = dq + place[:, None] * D + x[None, :]
    tl.store(spot, (acc * scale).to(dq.dtype.element_ty), mask=row[:, None] & (x < D)[None, :])


@triton.jit
def _key_gradient(
    q, k, v, d_out, mass, delta, mask, dk, dv,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, db, dh, dl, mb, H, GROUP, FIRST, ROWS, COLUMNS, W, scale, blocks,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    QW: tl.constexpr, KW: tl.constexpr, MASK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    heads, length, kept_heads = tl.num_programs(0) // blocks, FIRST + ROWS * COLUMNS, H // GROUP
    bk = tl.program_id(0) % heads
    j, r, c, inside, flat, a, b0 = _own(tl.program_id(0) // heads, FIRST, ROWS, COLUMNS, BN, KW)
    b, kept = (bk // kept_heads).to(tl.int64), (bk % kept_heads).to(tl.int64)
    x, e = tl.arange(0, DP), tl.arange(0, EP)
    key = inside & real(mask + b * mb, tl.where(inside, j, -1), length, MASK)
    keys = tile(k + b * kb + kept * kh, j.to(tl.int64) * kl, key, x, D)
    values = tile(v + b * vb + kept * vh, j.to(tl.int64) * vl, key, e, E)
    key_acc, value_acc = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, EP], tl.float32)
    visits, top, bottom, left, right = _reach(flat, a, b0, FIRST, ROWS, COLUMNS, W, BN // KW, KW, BM, QW)
    for g in range(GROUP):
        h = kept * GROUP + g
        for n in range(visits):
            i, row, near = _visit(n, flat, r, c, top, bottom, left, right, FIRST, ROWS, COLUMNS, W, BM, QW)
            asked, do, level, offset = upstream(
                q + b * qb + h * qh, d_out + b * db + h * dh, mass, delta, i, (b * H + h) * length + i, row, x, e,
                ql, dl, D, E,
            )  # fmt: skip
            s = _scores(asked, keys, row, key, tl.trans(near), scale, DOT, PRECISION)
            p = tl.exp2(s - level[:, None])
            value_acc += product(tl.trans(p), do, DOT, PRECISION)
            dp = product(do, tl.trans(values), DOT, PRECISION)
            key_acc += product(tl.trans(p * (dp - offset[:, None])), asked, DOT, PRECISION)
    place = bk.to(tl.int64) * length + j
    spot = dk + place[:, None] * D + x[None, :]
    tl.store(spot, (key_acc * scale).to(dk.dtype.element_ty), mask=inside[:, None] & (x < D)[None, :])
    spot = dv + place[:, None] * E + e[None, :]
    tl.store(spot, value_acc.to(dv.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


def wide(block: int, rows: int, columns: int) -> int:
    """Columns of a tile of `block` tokens: as square as a grid of this height and width lets it be."""
    high = min(triton.next_power_of_2(rows), 1 << (block.bit_length() - 1) // 2)
    return min(triton.next_power_of_2(columns), block // high)


class _Call(Call):
    """Arguments that the launches of one call share."""

    def __init__(self, q, k, v, key_mask, rows: int, columns: int, window: int, scale: float):
        super().__init__(q, k, v, key_mask, None, min(window, max(rows, columns)), False, scale)
        heads, group, length, _, window, scale = self.sizes
        self.sizes = heads, group, length - rows * columns, rows, columns, window, scale
        row_block, key_block = self.blocks.chunk, self.blocks.values
        given = {"QW": wide(row_block, rows, columns), "KW": wide(key_block, rows, columns)}
        self.options = {name: x for name, x in self.options.items() if name not in ("CAUSAL", "ALIBI")} | given
        self.by_rows, self.by_keys = (
            -(-self.sizes[2] // block) + -(-rows // (block // across)) * -(-columns // across)
            for block, across in ((row_block, given["QW"]), (key_block, given["KW"]))
        )
        self.row_grid, self.key_grid = (
            (self.by_rows * self.batch * heads,),
            (self.by_keys * self.batch * heads // group,),
        )


@torch.library.custom_op("longspan::window2d_kernel_forward", mutates_args=())
def window2d_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, rows: int, columns: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, H, N, E], log mass [B, H, N]) of tokens whose last rows * columns are a grid.

    q [B, H, N, D], k [B, K, N, D], v [B, K, N, E]; key_mask bool [B, N].
    """
    if 0 in (*q.shape, v.shape[3]):
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
        return out, torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    call = _Call(q, k, v, key_mask, rows, columns, window, scale)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    mass = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with on(q.device):
        _forward[call.row_grid](
            call.q, call.k, call.v, call.mask, out, mass, *call.strides, call.mask_stride, *call.sizes, call.by_rows,
            **call.options,
        )  # fmt: skip
    return out, mass


@torch.library.custom_op("longspan::window2d_kernel_backward", mutates_args=())
def window2d_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mass: Tensor,
    key_mask: Tensor | None,
    rows: int,
    columns: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    if 0 in (*q.shape, v.shape[3]):
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        return dq, dk, dv
    call = _Call(q, k, v, key_mask, rows, columns, window, scale)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_out = rows_contiguous(d_out)
    with on(q.device):
        delta = delta_of(d_out, out, d_mass)
        shared = call.q, call.k, call.v, d_out, mass, delta, call.mask
        sizes = *call.strides, *d_out.stride()[:3], call.mask_stride, *call.sizes
        _query_gradient[call.row_grid](*shared, dq, *sizes, call.by_rows, **call.options)
        _key_gradient[call.key_grid](*shared, dk, dv, *sizes, call.by_keys, **call.options)
    return dq, dk, dv


join_softmax(window2d_forward, window2d_backward, fixed=1)
