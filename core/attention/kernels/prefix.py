# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles this file by rules of its own, which a type checker does not know.
"""The states at the borders of segments from the segments' sums: what linear, gated and hybrid kernels share.

Arguments: sums and states [B, H, parts, N], end and first [B, H, N], totals [B, H, parts, RATES]; `blocks` programs of
BLOCK numbers each per head. PACK: `parts` are the pieces of all sequences, [1, H, parts, N], those of the n-th from
slots[n] on (`packs`), and B in `end` and `first` is the number of sequences.
"""

import triton
import triton.language as tl


@triton.jit
def _fetch(
    sums, totals, base, n, parts, at, ok,
    N: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, RATES: tl.constexpr,
):  # fmt: skip
    """(the sum of the n-th part to come, its decay or 1); 0 and 1 past the last."""
    part = (base + (parts - 1 - n if REVERSE else n)).to(tl.int64)
    ok = ok & (at * 0 + n < parts)
    own, fall = tl.load(sums + part * N + at, mask=ok, other=0.0), 1.0
    if DECAY:
        fall = tl.exp(tl.load(totals + part * RATES + at // (N // RATES), mask=ok, other=0.0))
    return own, fall


@triton.jit
def _pass(states, s, own, fall, base, n, parts, at, ok, N: tl.constexpr, REVERSE: tl.constexpr):
    """Store what came before the n-th part; what comes after it."""
    part = (base + (parts - 1 - n if REVERSE else n)).to(tl.int64)
    tl.store(states + part * N + at, s, mask=ok & (at * 0 + n < parts))
    return s * fall + own


@triton.jit
def prefix(
    sums, totals, first, end, states, slots, parts, blocks, H,
    N: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    PACK: tl.constexpr = False, RATES: tl.constexpr = 1,
):  # fmt: skip
    """states[part] = what came before it (after it, REVERSE), `end` = all; one part after the other, in order.

    Four parts are read before the first of them is passed: the time of a chain of single reads would be their latency.
    RATES: log-decays per part, one per head or one per row of the state.   states: may be `sums` itself.
    """
    bh = tl.program_id(0) // blocks
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    ok, base = at < N, bh * parts
    if PACK:
        before = tl.load(slots + bh // H)
        base = bh % H * parts + before
        parts = tl.load(slots + bh // H + 1) - before
    s = tl.zeros([BLOCK], tl.float32)
    if FIRST:
        s = tl.load(first + bh.to(tl.int64) * N + at, mask=ok, other=0.0)
    for n in range(0, parts, 4):
        a, a_fall = _fetch(sums, totals, base, n, parts, at, ok, N, DECAY, REVERSE, RATES)
        b, b_fall = _fetch(sums, totals, base, n + 1, parts, at, ok, N, DECAY, REVERSE, RATES)
        c, c_fall = _fetch(sums, totals, base, n + 2, parts, at, ok, N, DECAY, REVERSE, RATES)
        d, d_fall = _fetch(sums, totals, base, n + 3, parts, at, ok, N, DECAY, REVERSE, RATES)
        s = _pass(states, s, a, a_fall, base, n, parts, at, ok, N, REVERSE)
        s = _pass(states, s, b, b_fall, base, n + 1, parts, at, ok, N, REVERSE)
        s = _pass(states, s, c, c_fall, base, n + 2, parts, at, ok, N, REVERSE)
        s = _pass(states, s, d, d_fall, base, n + 3, parts, at, ok, N, REVERSE)
    tl.store(end + bh.to(tl.int64) * N + at, s, mask=ok)
