# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles the kernel by rules of its own, which a type checker does not know.
"""One decoding step of linear attention or of a gated recurrence, in one launch: the state and what it is asked.

    S' = e^g S + phi(k) [v, 1]^T,    [num, den] = phi(q)^T S',    out = num / max(den, floor)

g is nothing, a number or one per row of S; under the delta rule beta (v - (e^g S)^T k) takes the place of v. Rotary
positions turn the features of the numerator as they are made, not those of den (`core.attention.positions`).
One program has one key head of one sequence and a tile of value columns; the query heads of its group read the new
state while it is on chip. No matrix products: a step is bound by the state's bytes, 8 B K F (E + 1), whatever the
length before. The old state is left as it was.

Serves, under the backend `triton`, one new token after a state without gradients; else the sweeps of `linear` run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.blocked.pairs import alone
from core.attention.feature_maps import feature_map as phi_named
from core.attention.kernels.features import features
from core.attention.kernels.launch import on, padded, rows_contiguous

VALUES = 32
"""Value columns per program, so that a small batch still fills the device."""

KINDS = {3: "given", 4: "vector"}
"""What a log-gate with so many dimensions is to the kernel."""


@triton.jit
def frequencies(pair, N: tl.constexpr, LOG_BASE: tl.constexpr):
    """base^(-2 pair / N) in float32, by way of float64: a rounded exponent would turn far positions differently."""
    return tl.exp2(pair.to(tl.float64) * (-2 * LOG_BASE / N)).to(tl.float32)


@triton.jit
def _turned(x, at, ok, position, f, D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, INTERLEAVED: tl.constexpr,
            LOG_BASE: tl.constexpr):  # fmt: skip
    """Features f of one row, turned: each takes a share of the other one of its pair."""
    half: tl.constexpr = F // 2
    first = f % 2 == 0 if INTERLEAVED else f < half
    pair = f // 2 if INTERLEAVED else tl.where(first, f, f - half)
    away = 1 if INTERLEAVED else half
    other = tl.where(f < F, tl.where(first, f + away, f - away), F)
    angle = position.to(tl.float32) * frequencies(pair, F, LOG_BASE)
    own, across = tl.sum(features(x, at, ok, f, D, F, MAP), 0), tl.sum(features(x, at, ok, other, D, F, MAP), 0)
    return own * tl.cos(angle) + tl.where(first, -across, across) * tl.sin(angle)


@triton.jit
def _step(
    q, k, v, mask, gate, rate, state, count, beta, at_q, at_k, out, mass, end,
    qb, qh, kb, kh, vb, vh, mb, pq, pk, K, GROUP, tiles, least,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, BE: tl.constexpr, MAP: tl.constexpr,
    DECAY: tl.constexpr, ONES: tl.constexpr, MASK: tl.constexpr, COUNT: tl.constexpr, NORMALIZE: tl.constexpr,
    DELTA: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr, LOG_BASE: tl.constexpr,
):  # fmt: skip
    tile, bk = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, kept = (bk // K).to(tl.int64), (bk % K).to(tl.int64)
    f, e, one = tl.arange(0, FP), tile * BE + tl.arange(0, BE), tl.arange(0, 1)
    real = one == 0
    if MASK:
        real = tl.load(mask + b * mb + one) != 0
    width: tl.constexpr = E + 1 if ONES else E
    at = bk.to(tl.int64) * F * width
    place, here = f[:, None] * width + e[None, :], (f < F)[:, None] & (e < E)[None, :]
    s = tl.load(state + at + place, mask=here, other=0.0)
    zero = one.to(tl.int64)
    phi = tl.sum(features(k + b * kb + kept * kh, zero, real, f, D, F, MAP), 0)
    written = phi
    if TURN:
        position = tl.load(at_k + b * pk)
        written = _turned(k + b * kb + kept * kh, zero, real, position, f, D, F, MAP, INTERLEAVED, LOG_BASE)
    value = tl.load(v + b * vb + kept * vh + (one * 0)[:, None] + e[None, :], mask=real[:, None] & (e < E)[None, :])
    value = tl.sum(tl.where(real[:, None] & (e < E)[None, :], value.to(tl.float32), 0.0), 0)
    decay = tl.full([FP], 1.0, tl.float32)
    if DECAY == "constant":
        decay *= tl.exp(-tl.load(rate + kept).to(tl.float32))
    if DECAY == "given":
        decay *= tl.exp(tl.load(gate + bk).to(tl.float32))
    if DECAY == "vector":
        decay = tl.exp(tl.load(gate + bk.to(tl.int64) * F + f, mask=f < F, other=0.0).to(tl.float32))
    s *= decay[:, None]
    if DELTA:
        value = tl.load(beta + bk).to(tl.float32) * (value - tl.sum(phi[:, None] * s, 0))
    s += written[:, None] * value[None, :]
    tl.store(end + at + place, s, mask=here)
    z = tl.zeros([FP], tl.float32)
    if ONES:
        z = tl.load(state + at + f * width + E, mask=f < F, other=0.0) * decay + phi
        if tile == 0:
            tl.store(end + at + f * width + E, z, mask=f < F)
    low = 1.1754943508222875e-38
    if COUNT:
        low = tl.maximum(least * (tl.load(count + b).to(tl.float32) + tl.sum(real.to(tl.float32), 0)), low)
    for g in range(GROUP):
        h = kept * GROUP + g
        asked = tl.sum(features(q + b * qb + h * qh, zero, one == 0, f, D, F, MAP), 0)
        reads = asked
        if TURN:
            position = tl.load(at_q + b * pq)
            reads = _turned(q + b * qb + h * qh, zero, one == 0, position, f, D, F, MAP, INTERLEAVED, LOG_BASE)
        num = tl.sum(reads[:, None] * s, 0)
        row = b * K * GROUP + h
        if ONES:
            den = tl.maximum(tl.sum(asked * z, 0), 0.0)
            if tile == 0:
                log = tl.log(tl.where(den > 0, den, 1.0))
                tl.store(mass + row, tl.where(den > 0, log, float("-inf")))
            if NORMALIZE:
                num = tl.where(den > 0, num / tl.maximum(den, low), 0.0)  # turned, it is not 0 where den is
        tl.store(out + row * E + e, num.to(out.dtype.element_ty), mask=e < E)


def position_stride(at: Tensor | None) -> int:
    """From one sequence's position to the next one's, of positions [1] or [B, 1]."""
    return 0 if at is None or at.dim() == 1 or at.shape[0] == 1 else at.stride(0)


def _launch(
    q, k, v, key_mask, decay, gate, state, count, name: str, normalize: bool, ones: bool, out_dtype, beta=None,
    at=(None, None), base: float = 1.0, interleaved: bool = False,
):  # fmt: skip
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    phi, (batch, heads, _, width), key_heads = phi_named(name), q.shape, k.shape[1]
    out = torch.empty(batch, heads, 1, v.shape[3], dtype=out_dtype, device=q.device)
    mass = torch.empty(batch, heads, 1, dtype=torch.float32, device=q.device)
    state = state.float().contiguous()
    end, tile = torch.empty_like(state), min(VALUES, padded(v.shape[3]))
    tiles = max(1, -(-v.shape[3] // tile))
    optional = (None if key_mask is None else key_mask.view(torch.uint8), gate, decay, state, count, beta)
    pointers = [*(q if x is None else x.contiguous() for x in optional), *(q if x is None else x for x in at)]
    if batch:
        with on(q.device):
            _step[(tiles * batch * key_heads,)](
                q, k, v, *pointers, out, mass, end, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], 1,
                *map(position_stride, at), key_heads, heads // key_heads, tiles, phi.floor, D=width,
                F=phi.width(width), E=v.shape[3], FP=padded(phi.width(width)), BE=tile, MAP=name, ONES=ones,
                MASK=key_mask is not None,
                DECAY="constant" if decay is not None else "none" if gate is None else KINDS[gate.dim()],
                COUNT=count is not None, NORMALIZE=normalize, DELTA=beta is not None,
                TURN=at[0] is not None, INTERLEAVED=interleaved, LOG_BASE=math.log2(base), num_warps=4,
            )  # fmt: skip
    return out, mass, end


@torch.library.custom_op("longspan::linear_kernel_step", mutates_args=())
def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    decay: Tensor | None,
    state: Tensor,
    count: Tensor | None,
    feature_map: str,
    normalize: bool,
    at_q: Tensor | None = None,
    at_k: Tensor | None = None,
    base: float = 10_000.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, log mass, new state) of one token: `linear.linear_forward` for L = M = 1, without a gradient.

    at_q, at_k: positions [1] or [B, 1], where features are turned in the numerator.   base, interleaved: of these.
    """
    given = key_mask, decay, None, state, count, feature_map, normalize, True, v.dtype, None
    return _launch(q, k, v, *given, (at_q, at_k), base, interleaved)


@torch.library.custom_op("longspan::decay_kernel_step", mutates_args=())
def decay_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(out, new state) of one token: `decay.scan` or `gated.scan` for L = 1, without a gradient."""
    out, _, end = _launch(q, k, v, None, None, g, state, None, "identity", False, False, torch.float32)
    return out, end


@torch.library.custom_op("longspan::delta_kernel_step", mutates_args=())
def delta_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(out, new state) of one token: `delta.scan` for L = 1, without a gradient."""
    out, _, end = _launch(q, k, v, None, None, g, state, None, "identity", False, False, torch.float32, beta)
    return out, end


def _shapes(q, k, v, *given):
    exact = {"dtype": torch.float32}
    return q.new_empty(*q.shape[:3], v.shape[3], **exact), q.new_empty(given[-1].shape, **exact)


def _linear_shapes(q, k, v, key_mask, decay, state, *_):
    exact = {"dtype": torch.float32}
    out = v.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], **exact), q.new_empty(state.shape, **exact)


alone(linear_step, _linear_shapes)
alone(decay_step, _shapes)
alone(delta_step, _shapes)


def is_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, *others: Tensor) -> bool:
    """Whether this is a single new token after a state, and nobody asks for a gradient of these or of `others`."""
    if state is None or q.shape[2] != 1 or k.shape[2] != 1:
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state, *others)))
