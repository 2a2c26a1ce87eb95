# pyright: reportCallIssue=false, reportArgumentType=false
# A kernel is launched by Triton, whose call a type checker cannot see through.
"""Running sums with a decay per feature on a GPU: the kind `vector_decay` of `core.attention.blocked.scan`.

    S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t,    g_t <= 0 in R^F        GLA, RWKV-6

With b the running sum of g inside a chunk of C positions (`cumulate`), and A_ij = sum_f q_if k_jf e^{b_if - b_jf},

    O = (Q e^b) S + A V,    S <- Diag(e^{b_C}) S + (K e^{b_C - b})^T V

A does not factor into one product without e^{-b}, which overflows. `inner` builds it in blocks of 16 rows: against
earlier keys as one product of factors anchored at the block's first row, against its own keys element by element. No
exponent is above 0 anywhere. `inner_gradient` differentiates the same two forms, and adds what came through S. The
gate needs no pass of its own: db = q dq - k dk per feature, dg is its reverse running sum, to which a final state that
is used adds S dS at the end.

Sweeps, value tiles and segments are those of `linear`: one segment where batch x heads fills the device, else sums of
segments, a prefix over them in fixed order, all segments at once. Deterministic, no atomics.

Bytes, e per element, n value tiles, A of 2 bytes an entry (bfloat16 inputs) or 4: forward
L (K (e F (1 + n) + e E + 4 F (3 + n)) + H (e F (1 + n) + 4 E + (1 + n) C x 2 or 4)); the backward about 3 times that,
and 16 n H L F for partial gradients. FLOPs forward H L (4 F E + 2 C (F + E)), and 16 H L F exponentials.

Serves, when asked for: float32, float16 and bfloat16 up to 256 features; `launch.products` states the precision.
"""

import torch
from torch import Tensor

from core.attention.blocked.pairs import join_scan
from core.attention.kernels.gated_sweeps import (
    ROWS,
    cumulate,
    forward,
    inner,
    inner_gradient,
    key_gradient,
    query_gradient,
    write,
)
from core.attention.kernels.launch import Blocks, choose, on, padded, products, rows_contiguous, segments
from core.attention.kernels.prefix import prefix
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


def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `core.attention.blocked.scan.scan("vector_decay", ...)`."""
    if state is not None and is_step(q, k, v, state, g):
        return decay_step(q, k, v, g, state)
    return gated_forward(q, k, v, g, state)


def cumulated(g: Tensor, chunk: int, warps: int = 4) -> Tensor:
    """Running sums of the gates [B, K, L, F] inside chunks, float32."""
    g = rows_contiguous(g)
    b = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    batch, heads, length, width = g.shape
    cumulate[(-(-length // chunk) * batch * heads,)](
        g, b, *g.stride()[:3], heads, length, F=width, FP=padded(width), C=chunk, num_warps=warps
    )
    return b


def squares(q: Tensor, k: Tensor, b: Tensor, chunk: int, kind: dict, dtype: torch.dtype) -> Tensor:
    """A [B, H, L, chunk] of queries and keys; above the diagonal nothing is written."""
    batch, heads, length, width = q.shape
    a = torch.empty(batch, heads, length, chunk, dtype=dtype, device=q.device)
    inner[(-(-length // ROWS.value) * batch * heads,)](
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
        self.products = {**products(q, k, v), "num_warps": blocks.warps, "num_stages": blocks.stages}
        self.sizes = {"F": self.width, "E": self.values, "FP": padded(self.width), "C": self.chunk}
        self.kind = {**self.sizes, "BE": tile, **self.products}
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
        write[(self.tiles * self.parts * self.batch * heads,)](
            x, self.b, v, sums, totals, *x.stride()[:3], *v.stride()[:3], heads, group, *self.shared[1:],
            REVERSE=reverse, **self.kind,
        )  # fmt: skip
        states, blocks = torch.empty_like(sums), -(-self.width * self.values // 1024)
        prefix[(blocks * self.batch * heads,)](
            sums, totals, sums if first is None else first, end, states, sums, self.parts, blocks, 1,
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
        forward[self.grid](
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
        query_gradient[self.grid](
            k, v, d_out, self.b, partial_q if state is None else state, partial_q, *strides, heads, *self.shared,
            all_rows, STATE=state is not None, **self.kind,
        )  # fmt: skip
        alone = self.group == 1
        dv = torch.empty(*rows, self.values, dtype=v.dtype if alone else torch.float32, device=q.device)
        key_gradient[self.grid](
            q, k, v, d_out, self.b, self.a, partial_k if after is None else after, partial_k, dv, d_first,
            *q.stride()[:3], *strides, heads, *self.shared, all_rows, STATE=after is not None, KEEP=keep, **self.kind,
        )  # fmt: skip
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty(*rows, self.width, dtype=k.dtype if alone else torch.float32, device=q.device)
        db = self.buffer(*rows, self.width)
        inner_gradient[(-(-self.length // ROWS.value) * self.batch * heads,)](
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


join_scan(gated_forward, gated_backward)
