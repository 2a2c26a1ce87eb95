# pyright: reportCallIssue=false, reportArgumentType=false
# A kernel is launched by Triton, whose call a type checker cannot see through.
"""Hybrid attention in one kernel: softmax over the window, a linear tail beyond it, one normaliser; either direction.

    o_i = (sum_{j near} e^{s_ij} v_j + gamma_i phi(q_i)^T S_i) / e^{l_i}
    e^{l_i} = sum_{j near} e^{s_ij} + gamma_i phi(q_i)^T z_i
    S_i = sum_j phi(k_j) v_j^T and z_i = sum_j phi(k_j) over j <= t_i - W and, two-sided, j >= t_i + W;  t_i = i + M - L

Keys are cut into segments. `write` sums each of them, a prefix in fixed order turns the sums into the states at their
borders, from both ends where two-sided. Then every block of rows is a program of its own: it reads the state of the
whole segments behind it (and ahead of it), meets the tail's keys up to its window one by one, then the window's, with
a running maximum that the tail starts, and divides once. Sums of both ends are disjoint, never a total less a window.

Rotary positions turn the features in the numerator only: it then takes rotated features that were computed before (x of
queries, y of keys), the normaliser plain ones. Maps that are functions of q.k are rotated before, as the window is.

Backward from l: the gradient at a near score, before the division, is e^{s_ij - l_i} (do.v_j - delta_i), that at
phi(q_i).phi(k_j) is gamma_i e^{-l_i} (do.v_j - delta_i), delta = <do, o> - dl. Rows are cut into segments as well: the
gradient at a state is a sum over the rows that read it. One kernel by rows gives dq and the gate's gradient, one by
keys dk and dv over the heads of a group in order. Neither part's output or mass is ever written. No atomics.

Bytes per position and head, e per element, R positions per segment: forward e (3 D + 3 E) and 16 F (E + 1) / R of
states (24 two-sided); backward e (8 D + 9 E) and twice the states' bytes, blocks next to each other sharing theirs in
the L2 cache. FLOPs forward 2 (W + BM + R / 2) (D + E) + 4 F E. The two kernels of `merge` write both parts' outputs and
read them again, 3 e E more forward, but hold the state on chip.

Packs: the same kernels, with tables of which block or segment of which sequence a program has (`packs`).

Serves, when asked for and `prefers` says so: float32, float16 and bfloat16; `launch.products` states the precision.
"""

import torch
from torch import Tensor

from core.attention.blocked.pairs import join
from core.attention.feature_maps import FEATURE_MAPS, FeatureMap
from core.attention.kernels.features import MAPS
from core.attention.kernels.hybrid_launch import Call
from core.attention.kernels.launch import on
from core.attention.kernels.packs import pack_from

WIDEST = 128
"""Largest width that one kernel takes."""


def prefers(phi, widest: int, *, decays: bool) -> bool:
    """Whether one kernel runs rather than two and a merge. By bytes and registers; not timed (2026-11-25).

    One kernel moves fewer bytes than two at every length, so two run only where one cannot: with ALiBi (`decays`),
    whose states would be per query head; for maps with a floor, whose tail is a mean of its own; and for heads so wide
    that the accumulators of their gradients spill out of the registers (112 to 208 bytes a thread at 256).

    Args:
        phi: what the sums see of the tail's map.   widest: the largest of D, F and E, but for Taylor
            features, which are taken some at a time, of D and E.
    """
    known = isinstance(phi, FeatureMap) and phi.name in MAPS and phi.positive and phi.floor == 0
    return known and not decays and widest <= WIDEST


def _empty(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return 0 in (*q.shape, k.shape[2], v.shape[3])


@torch.library.custom_op("longspan::hybrid_kernel_forward", mutates_args=())
def hybrid_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_q: Tensor | None,
    tail_k: Tensor | None,
    turned_q: Tensor | None,
    turned_k: Tensor | None,
    key_mask: Tensor | None,
    gate: Tensor,
    state: Tensor | None,
    feature_map: str,
    window: int,
    causal: bool,
    scale: float,
    keep: bool,
    offsets: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hybrid attention: (out [B, H, L, E], log mass [B, H, L], last state [B, K, F, E + 1] or [0]).

    Args:
        q: [B, H, L, D].   k: [B, K, M, D].   v: [B, K, M, E].   key_mask: [B, M].
        tail_q, tail_k: what phi acts on, [B, H, L, G] and [B, K, M, G]; None: q and k.
        turned_q, turned_k: rotated features for the tail's numerator, [B, H, L, F] and [B, K, M, F]; None: phi itself.
        gate: [B, H, L] log weight of the tail.   feature_map: one of `MAPS` that is positive and has no floor.
        state: [B, K, F, E + 1] sums over keys before these, all of them beyond the window of every query (causal).
        causal: two-sided needs L = M.   keep: also give the sums of all keys but the last `window` (causal).
        offsets, longest: of a `Pack` whose keys are its rows; without a state before or after it.
    """
    if _empty(q, k, v):
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
        mass = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        wide = FEATURE_MAPS[feature_map].width((k if tail_k is None else tail_k).shape[3])
        end = mass.new_zeros(*k.shape[:2], wide, v.shape[3] + 1) if keep else mass.new_zeros(0)
        return out, mass, end if state is None or not keep else state.float().clone()
    tails, turned = (tail_q, tail_k), (turned_q, turned_k)
    with on(q.device):
        pack = pack_from(offsets, None, longest, state)
        call = Call(q, k, v, tails, turned, key_mask, gate, feature_map, window, causal, scale, pack)
        return call.forward(state, keep)


@torch.library.custom_op("longspan::hybrid_kernel_backward", mutates_args=())
def hybrid_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    d_end: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_q: Tensor | None,
    tail_k: Tensor | None,
    turned_q: Tensor | None,
    turned_k: Tensor | None,
    key_mask: Tensor | None,
    gate: Tensor,
    state: Tensor | None,
    out: Tensor,
    mass: Tensor,
    feature_map: str,
    window: int,
    causal: bool,
    scale: float,
    offsets: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, both tails, both turned features, gate and state, [0] for what is None."""
    tails, turned = (tail_q, tail_k), (turned_q, turned_k)
    if _empty(q, k, v):
        given = q, k, v, *tails, *turned, gate
        zeros = [q.new_zeros(0) if x is None else torch.zeros_like(x) for x in given]
        last = None if state is None else torch.zeros_like(state) if d_end is None else d_end.to(state.dtype).clone()
        return *zeros, q.new_zeros(0) if last is None else last  # pyright: ignore[reportReturnType]
    with on(q.device):
        pack = pack_from(offsets, None, longest, state)
        call = Call(q, k, v, tails, turned, key_mask, gate, feature_map, window, causal, scale, pack)
        return call.backward(d_out, d_mass, d_end, out, mass, state)  # pyright: ignore[reportReturnType]


def _shapes(
    q, k, v, tail_q, tail_k, turned_q, turned_k, key_mask, gate, state, feature_map, window, causal, scale, keep,
    *_,
):  # fmt: skip
    wide = FEATURE_MAPS[feature_map].width((k if tail_k is None else tail_k).shape[3])
    mass = q.new_empty(q.shape[:3], dtype=torch.float32)
    end = mass.new_empty(*k.shape[:2], wide, v.shape[3] + 1) if keep else mass.new_empty(0)
    return v.new_empty(*q.shape[:3], v.shape[3]), mass, end


def _gradient_shapes(d_out, d_mass, d_end, q, k, v, tail_q, tail_k, turned_q, turned_k, key_mask, gate, state, *_):
    given = q, k, v, tail_q, tail_k, turned_q, turned_k, gate, state
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _setup(ctx, inputs, output):
    *tensors, name, window, causal, scale, keep, offsets, longest = inputs
    out, mass, end = output
    ctx.options, ctx.keep = (name, window, causal, scale, offsets, longest), keep
    if not keep:
        ctx.mark_non_differentiable(end)
    ctx.save_for_backward(*tensors, out, mass)


def _backward(ctx, d_out, d_mass, d_end):
    saved = ctx.saved_tensors  # read once: gradient checkpointing hands out each tensor a single time
    found = hybrid_backward(d_out, d_mass, d_end if ctx.keep else None, *saved, *ctx.options)
    *grads, d_gate, d_state = (x if given is not None else None for x, given in zip(found, (*saved[:7], *saved[8:10])))
    return *grads, None, d_gate, d_state, *([None] * 7)


join(hybrid_forward, hybrid_backward, _shapes, _gradient_shapes, _setup, _backward)
