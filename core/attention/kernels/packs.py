# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles the kernels by rules of its own, which a type checker does not know.
"""Which part of which sequence of a pack a program has: a table that is made on the device, without a sync.

A pack of T rows in N sequences, cut into pieces of at most `size` positions that never cross from one sequence into the
next, has at most T // size + N pieces: so many programs are launched, which shapes alone tell, and those that are left
over find a sequence of length 0. A line of the table is nine numbers,

    sequence, begin, first row, rows, first key, keys, steps, row0, key0

begin: where in its sequence the piece begins.   steps, row0, key0: the sequence's timeline, see `linear`.
`slots` [N + 1] counts the pieces before each sequence: where its states stand among those of all.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.packing import Pack

WIDTH = tl.constexpr(9)
"""Numbers in a line."""


@triton.jit
def line(table, piece):
    """(sequence, begin, first row, rows, first key, keys, steps, row0, key0) of a piece; the firsts in 64 bits."""
    at = table + piece * WIDTH
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2).to(tl.int64), tl.load(at + 3), tl.load(at + 4).to(tl.int64),
        tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8),
    )  # fmt: skip


@triton.jit
def pieces(slots, n, before):
    """(where the pieces of sequence n begin, after `before` others; how many there are)."""
    first = tl.load(slots + n)
    return before + first, tl.load(slots + n + 1) - first


@triton.jit
def _lengths(offsets, key_offsets, n, ok, shift, OVER: tl.constexpr):
    """(first row, rows, first key, keys, steps) of sequences n, 0 where not ok."""
    row = tl.load(offsets + n, mask=ok, other=0).to(tl.int32)
    rows = tl.load(offsets + n + 1, mask=ok, other=0).to(tl.int32) - row
    key = tl.load(key_offsets + n, mask=ok, other=0).to(tl.int32)
    keys = tl.load(key_offsets + n + 1, mask=ok, other=0).to(tl.int32) - key
    if OVER == "rows":
        steps = rows
    elif OVER == "keys":
        steps = keys
    elif OVER == "past":
        steps = tl.maximum(rows + shift, 0)
    else:
        steps = tl.maximum(keys - shift, 0)
    return row, rows, key, keys, steps


@triton.jit
def lay_out(
    offsets, key_offsets, table, slots, N, number, size, shift, OVER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The lines of one sequence; the last one also empties those that are left over."""
    n, before = tl.program_id(0), 0
    for m0 in range(0, n, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        _, _, _, _, steps = _lengths(offsets, key_offsets, m, m < n, shift, OVER)
        before += tl.sum(tl.where(m < n, tl.maximum(tl.cdiv(steps, size), 1), 0))
    row, rows, key, keys, steps = _lengths(offsets, key_offsets, n, n < N, shift, OVER)
    mine = tl.maximum(tl.cdiv(steps, size), 1)
    row0, key0 = 0, 0
    if OVER == "past":
        row0 = -shift
    if OVER == "future":
        row0, key0 = keys - 1 - shift, keys - 1
    tl.store(slots + n, before)
    tl.store(slots + N, before + mine, mask=n == N - 1)
    end = tl.where(n == N - 1, number, before + mine)
    for p0 in range(0, end - before, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        ok, real, at = p < end - before, p < mine, table + (before + p) * WIDTH
        tl.store(at, tl.where(real, n, 0), mask=ok)
        tl.store(at + 1, tl.where(real, p * size, 0), mask=ok)
        tl.store(at + 2, tl.where(real, row, 0), mask=ok)
        tl.store(at + 3, tl.where(real, rows, 0), mask=ok)
        tl.store(at + 4, tl.where(real, key, 0), mask=ok)
        tl.store(at + 5, tl.where(real, keys, 0), mask=ok)
        tl.store(at + 6, tl.where(real, steps, 0), mask=ok)
        tl.store(at + 7, tl.where(real, row0, 0), mask=ok)
        tl.store(at + 8, tl.where(real, key0, 0), mask=ok)


def pack_from(
    offsets: Tensor | None, key_offsets: Tensor | None, longest: int, state: Tensor | None = None
) -> Pack | None:
    """The pack that an operator was given in pieces, or none; without key_offsets its keys are its rows."""
    if offsets is not None and state is not None:
        raise ValueError("there is no state before a pack: each of its sequences begins in it")
    return None if offsets is None else Pack(offsets, offsets if key_offsets is None else key_offsets, longest)


class Layout(NamedTuple):
    """A table, the pieces before each sequence, the number of pieces at most, and positions in each."""

    table: Tensor
    slots: Tensor
    number: int
    size: int


def layout(pack: Pack, over: str, total: int, longest: int, size: int, shift: int = 0) -> Layout:
    """The pieces of a pack.

    Args:
        over: what is cut, "rows" or "keys", or the timeline of a direction, "past" or "future" with its offset `shift`.
        total, longest: of all sequences together, and of the longest one at most.   size: positions per piece.
    """
    sequences, device = pack.offsets.shape[0] - 1, pack.offsets.device
    number = sequences if longest <= size else total // size + sequences
    table = torch.empty(number, 9, dtype=torch.int32, device=device)
    slots = torch.empty(sequences + 1, dtype=torch.int32, device=device)
    if sequences:
        lay_out[(sequences,)](
            pack.offsets, pack.keys, table, slots, sequences, number, size, shift, OVER=over, BLOCK=128, num_warps=1
        )
    return Layout(table, slots, number, size)
