# pyright: reportCallIssue=false, reportArgumentType=false
# A kernel is launched by Triton, whose call a type checker cannot see through.
"""Linear attention with its log mass on a GPU: `core.attention.blocked.linear`, fused, with decay that may vary.

    S_u = e^{g_u} S_{u-1} + phi(k_u) [v_u, 1]^T,    [num_u, den_u] = phi(q_u)^T S_u,    o_u = num_u / den_u

Positions are put on a timeline u = 0..T-1 on which key j = key0 + step u meets row i = row0 + step u, so that "past"
(step 1) and "future" (step -1), with any offset, are one causal sweep; "both" sums first and reads then. One program
has one query head, one segment of the timeline and a tile of value columns, and keeps S [F, values] and z [F] on chip
in float32. phi is computed while loading; weights inside a chunk never leave the chip.

Packs: the same kernels, with a table of which segment of which sequence a program has (`packs`).

Segments: a sum over each (`write`), a prefix over those sums in fixed order (`prefix`), then all segments at once.
One segment, without these passes, where batch x heads fills the device by itself. Always deterministic, no atomics.

Bytes moved, e per element, n = value tiles (1 up to the table's width): forward e L (2 n D + 2 E), and e L (D + E) more
with several segments; backward e L (5 D + 5 E), the same more, and 4 n L D more for n > 1 or grouped heads, whose key
gradients are summed in a fixed order outside. S is summed again in the backward instead of kept.

Serves, when asked for: float32, float16 and bfloat16 up to 256 features; `launch.products` states the precision.
"""

import torch
from torch import Tensor

from core.attention.blocked.pairs import join, like
from core.attention.feature_maps import feature_map as phi_named
from core.attention.kernels.features import MAPS as PLAIN
from core.attention.kernels.launch import on
from core.attention.kernels.linear_launch import Sweep, seen_by_sums
from core.attention.kernels.packs import pack_from

MAPS = (*PLAIN, "focused")
"""Feature maps that are computed while q and k are loaded; others are computed before and come as "given"."""


@torch.library.custom_op("longspan::linear_kernel_forward", mutates_args=())
def linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    decay: Tensor | None,
    state: Tensor | None,
    count: Tensor | None,
    feature_map: str,
    direction: str,
    offset: int,
    normalize: bool,
    factor: Tensor | None = None,
    offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `core.attention.blocked.linear.linear_forward`, also of packs.

    factor: [K, D] of the map "focused", 1 / softplus(s).
    offsets, key_offsets, longest: of a `Pack`, key_offsets None where keys are rows; in "past" offset <= 0 then. There
        is no state before a pack, and the one after it is of every sequence, [N, K, F, E + 1], for "both" only.
    """
    pack = pack_from(offsets, key_offsets, longest, state)
    sweep = Sweep(q, k, v, key_mask, decay, None, feature_map, direction, offset, normalize, True, factor, pack)
    with on(q.device):
        return sweep.forward(state, sweep.floor(key_mask, count), v.dtype)


@torch.library.custom_op("longspan::linear_kernel_backward", mutates_args=())
def linear_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    den: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    decay: Tensor | None,
    state: Tensor | None,
    count: Tensor | None,
    factor: Tensor | None,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    feature_map: str,
    direction: str,
    offset: int,
    normalize: bool,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d initial state, d factor); what there is no input for holds nothing, but for the state."""
    pack = pack_from(offsets, key_offsets, longest, state)
    sweep = Sweep(q, k, v, key_mask, decay, None, feature_map, direction, offset, normalize, True, factor, pack)
    with on(q.device):
        rows = sweep.rows(d_out, out, den, sweep.floor(key_mask, count), d_mass)
        *grads, d_state, _, _, d_factor = sweep.backward(rows, state, end, d_state)
    return *grads, d_state if pack is None else end.new_empty(0), d_factor  # pyright: ignore[reportReturnType]


def _shapes(
    q, k, v, key_mask, decay, state, count, feature_map, direction, offset, normalize,
    factor=None, offsets=None, key_offsets=None, longest=0,
):  # fmt: skip
    rows, width = q.new_empty(q.shape[:3], dtype=torch.float32), phi_named(seen_by_sums(feature_map)).width(q.shape[3])
    sequences = q.shape[0] if offsets is None else offsets.shape[0] - 1
    end = rows.new_empty(sequences, k.shape[1], width, v.shape[3] + 1)
    if offsets is not None and direction != "both":
        end = rows.new_empty(0)
    return v.new_empty(*q.shape[:3], v.shape[3]), rows, torch.empty_like(rows), end


def _gradient_shapes(
    d_out, d_mass, d_state, q, k, v, out, den, end, key_mask, decay, state, count, factor, offsets, *_
):
    nothing = end.new_empty(0)
    d_factor = nothing if factor is None else factor.new_empty(factor.shape, dtype=torch.float32)
    return *like(q, k, v), torch.empty_like(end) if offsets is None else nothing, d_factor


def _setup(ctx, inputs, output):
    q, k, v, key_mask, decay, state, count, name, direction, offset, normalize, factor, *where, longest = inputs
    out, _, den, end = output
    ctx.options = name, direction, offset, normalize, longest
    ctx.mark_non_differentiable(*((den,) if where[0] is None else (den, end)))
    ctx.save_for_backward(q, k, v, out, den, end, key_mask, decay, state, count, factor, *where)


def _backward(ctx, d_out, d_mass, _d_den, d_state):
    saved = ctx.saved_tensors  # read once: gradient checkpointing hands out each tensor a single time
    state, factor, packed = saved[8], saved[10], saved[11] is not None
    *grads, ds, df = linear_backward(d_out, d_mass, None if packed else d_state, *saved, *ctx.options)
    ds, df = None if state is None else ds, None if factor is None else df.to(factor.dtype)
    return *grads, None, None, ds, None, None, None, None, None, df, None, None, None


join(linear_forward, linear_backward, _shapes, _gradient_shapes, _setup, _backward)
