# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false
# Triton compiles the kernel by rules of its own, which a type checker does not know.
"""Running sums with a data-dependent decay per head on a GPU: the kind `decay` of `core.attention.blocked.scan`.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t

The sweeps of `linear` without ones column and normaliser. With b the running sum of g, the gradient
db_t = <q_t, dq_t> - <k_t, dk_t> is summed in float32 where dq and dk are made; dg is the reverse running sum of db, to
which a final state that is used adds <S, dS> at the end. Bytes as in `linear`, and 8 B K L for g and dg.

mLSTM has no kernel of its own. With its running maximum m taken into the gates, g_t = log f_t + m_{t-1} - m_t, and into
the keys, k_t e^{i_t - m_t}, it is this sum with the normaliser as one more column, and max(|n.q|, e^{-m}) divides after
it. No factor is above 1, so input gates of e^60 beside e^-60 cost no digits: `test_serves_mlstm_exactly_at_any_gate`,
values and gradients against float64. A kernel that scaled keys and divided rows by itself would save 2 e L (F + E).

Serves, when asked for: float32, float16 and bfloat16 up to 256 features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.blocked.pairs import join_scan
from core.attention.kernels.launch import on
from core.attention.kernels.linear_launch import Sweep
from core.attention.kernels.packs import pack_from
from core.attention.kernels.step import decay_step, is_step
from core.attention.packing import Pack


def scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state: Tensor | None = None, pack: Pack | None = None
) -> tuple[Tensor, Tensor]:
    """As `core.attention.blocked.scan.scan("decay", ...)`, also of packs, which have no state before or after them."""
    if state is not None and is_step(q, k, v, state, g):
        return decay_step(q, k, v, g, state)
    return decay_forward(q, k, v, g, state, *(() if pack is None else (pack.offsets, pack.longest)))


@triton.jit
def sums_to_end(d, dg, offsets, N, T, BLOCK: tl.constexpr):
    """The running sum of d [K, T] from the end of each sequence, one of them and one head per program."""
    n, head = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64) * T
    begin, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    total = 0.0
    for p0 in range(0, end - begin, BLOCK):
        at = end - 1 - p0 - tl.arange(0, BLOCK)
        x = tl.load(d + head + at, mask=at >= begin, other=0.0)
        tl.store(dg + head + at, total + tl.cumsum(x, 0), mask=at >= begin)
        total += tl.sum(x, 0)


def _sweep(q, k, v, g: Tensor, state: Tensor | None, offsets: Tensor | None, longest: int) -> Sweep:
    pack = pack_from(offsets, None, longest, state)
    return Sweep(q, k, v, None, None, g, "identity", "past", 0, normalize=False, ones=False, pack=pack)


@torch.library.custom_op("longspan::decay_kernel_forward", mutates_args=())
def decay_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    offsets: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, E], last state [B, K, F, E] or, of a pack, nothing), float32."""
    with on(q.device):
        out, _, _, end = _sweep(q, k, v, g, state, offsets, longest).forward(state, q, torch.float32)
    return out, end


@torch.library.custom_op("longspan::decay_kernel_backward", mutates_args=())
def decay_backward(
    d_out: Tensor,
    d_end: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    end: Tensor,
    offsets: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, d first state)."""
    sweep = _sweep(q, k, v, g, state, offsets, longest)
    with on(q.device):
        given = d_end if offsets is None else None
        dq, dk, dv, d_first, *along, _ = sweep.backward((d_out.contiguous(), q, q), state, end, given)
        by_query, by_key = (x.sum(0).unflatten(1, (sweep.key_heads, sweep.group)).sum(2) for x in along)
        d = by_query - by_key
        if offsets is not None:
            dg, number = torch.empty_like(d), offsets.shape[0] - 1
            sums_to_end[(number * d.shape[1],)](d.contiguous(), dg, offsets, number, d.shape[2], BLOCK=1024)
            return dq, dk, dv, dg.to(g.dtype), end.new_empty(0)
        if d_end is not None and d.shape[2]:
            d[:, :, -1] += (end * d_end).sum((2, 3))
        dg = d.flip(2).cumsum(2).flip(2).to(g.dtype)
    return dq, dk, dv, dg, d_first


join_scan(decay_forward, decay_backward, packs=True)
