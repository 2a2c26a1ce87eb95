# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles the kernel by rules of its own, which a type checker does not know.
r"""One decoding step of a window or of a hybrid, in one launch: the ring, the sums of those that left it, the output.

    ring of R keys, oldest first, and the new one      0 1 2 ... R-1 | R       distance of row n to the query: R - n
    window      R = window - 1: the query sees all     x x x ... x     x
    hybrid      R = window: row 0 leaves for the sums  S x x ... x     x

The new ring is rows 1 to R, written as they are read. In the hybrid the leaving key enters the sums before the query
reads them; where it is masked it adds nothing, and decay (ALiBi) still runs. The tail's mean is num / max(den, floor),
its mass e^gate den whatever the floor, and both parts are joined under their common maximum, as `merge` does.

Rotary positions: the hybrid's ring holds keys unturned, and a score depends on the distance alone, so they are turned
back by it as they are read. Features are turned in the numerator, by their own positions, as
`core.attention.positions` has it; frequencies and angles are rounded as there. A window's ring holds turned keys.

One program has one head of the state and a tile of value columns; it reads the keys of the ring for each tile, mostly
from the L2 cache. No matrix products and all sums in float32, so the bound is bytes: 8 B S F (E + 1) of the state and
2 e B K R (D + E) of the ring, which a step that leaves the old state as it was has to write once. Heads and features
up to 256 wide.

Serves, under the backend `triton`, one new token after a state without gradients; else the kernels of `window` and
`linear` or of `hybrid` run.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.blocked.pairs import alone
from core.attention.feature_maps import feature_map as phi_named
from core.attention.kernels.features import features
from core.attention.kernels.launch import on, padded, rows_contiguous
from core.attention.kernels.step import VALUES, frequencies, position_stride

LOW = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def halves(c, N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the two numbers of pair c stand in a row of N; N, past the row, where there is none."""
    half: tl.constexpr = (N + 1) // 2
    first = 2 * c if INTERLEAVED else c
    second = 2 * c + 1 if INTERLEAVED else c + half
    return tl.where(c < half, first, N), tl.where(c < half, second, N)


@triton.jit
def turned(a, b, angle):
    """Pairs (a, b) turned by an angle."""
    cos, sin = tl.cos(angle), tl.sin(angle)
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _ring_step(
    q, k, v, tail_q, tail_k, mask, gate, level, slopes, keys, values, held, state, count, at_q, at_k,
    out, mass, new_keys, new_values, new_held, end, new_count,
    qb, qh, kb, kh, vb, vh, ab, ah, cb, ch, mb, pq, pk, S, SHARE, GROUP, R, W, tiles, scale, least,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DH: tl.constexpr, FH: tl.constexpr,
    BE: tl.constexpr, BN: tl.constexpr, GP: tl.constexpr, MAP: tl.constexpr, TAIL: tl.constexpr, MASK: tl.constexpr,
    LEVEL: tl.constexpr, ALIBI: tl.constexpr, ROTARY: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr,
    LOG_BASE: tl.constexpr,
):  # fmt: skip
    tile, bs = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, s = bs // S, bs % S
    kept = s // SHARE
    e, member, one = tile * BE + tl.arange(0, BE), tl.arange(0, GP), tl.arange(0, 1)
    first, second = halves(tl.arange(0, DH), D, INTERLEAVED)
    owner = one + s % SHARE == 0  # heads of the state that share a key head: one of them writes the ring
    fresh = one == 0
    if MASK:
        fresh = tl.load(mask + b * mb + one) != 0
    k += b * kb + kept * kh
    v += b * vb + kept * vh
    own_first = tl.load(k + first, mask=(first < D) & fresh, other=0.0).to(tl.float32)
    own_second = tl.load(k + second, mask=(second < D) & fresh, other=0.0).to(tl.float32)
    own_value = tl.load(v + e, mask=(e < E) & fresh, other=0.0).to(tl.float32)
    ring = (b * (S // SHARE) + kept) * R
    slope = tl.zeros([GP], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + s * GROUP + member, mask=member < GROUP, other=0.0).to(tl.float32)
    if ROTARY:
        ahead = (tl.load(at_q + b * pq) - tl.load(at_k + b * pk)).to(tl.float32)
        speed = frequencies(tl.arange(0, DH), D, LOG_BASE)

    top, total = tl.full([GP], float("-inf"), tl.float32), tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, BE], tl.float32)
    for n0 in range(0, R + 1, BN):
        n = n0 + tl.arange(0, BN)
        old, new, row = n < R, (n == R)[:, None], (ring + n)[:, None]
        real = tl.load(held + b * R + n, mask=old, other=0) != 0
        real = tl.where(n == R, fresh, real)
        x = tl.load(keys + row * D + first[None, :], mask=old[:, None] & (first < D)[None, :], other=0.0)
        y = tl.load(keys + row * D + second[None, :], mask=old[:, None] & (second < D)[None, :], other=0.0)
        z = tl.load(values + row * E + e[None, :], mask=old[:, None] & (e < E)[None, :], other=0.0)
        x = tl.where(new, own_first[None, :], x.to(tl.float32))
        y = tl.where(new, own_second[None, :], y.to(tl.float32))
        z = tl.where(new, own_value[None, :], z.to(tl.float32))
        stays = (n > 0) & (n <= R) & owner
        turn = stays & (one + n0 // BN % tiles == tile)  # each tile writes its share of the keys
        kind = new_keys.dtype.element_ty
        tl.store(new_keys + (row - 1) * D + first[None, :], x.to(kind), mask=turn[:, None] & (first < D)[None, :])
        tl.store(new_keys + (row - 1) * D + second[None, :], y.to(kind), mask=turn[:, None] & (second < D)[None, :])
        kind = new_values.dtype.element_ty
        tl.store(new_values + (row - 1) * E + e[None, :], z.to(kind), mask=stays[:, None] & (e < E)[None, :])
        tl.store(new_held + b * R + n - 1, real.to(tl.uint8), mask=stays & (one + s + tile == 0))
        away = (R - n).to(tl.float32)
        if ROTARY:
            x, y = turned(x, y, -(ahead + away)[:, None] * speed[None, :])
        seen = real & (n <= R) & (R - n < W)
        scores = tl.full([GP, BN], float("-inf"), tl.float32)
        for g in range(GROUP):
            at = q + b * qb + (s * GROUP + g) * qh
            asked = tl.load(at + first, mask=first < D, other=0.0).to(tl.float32)
            also = tl.load(at + second, mask=second < D, other=0.0).to(tl.float32)
            score = tl.sum(x * asked[None, :] + y * also[None, :], 1) * scale
            scores = tl.where((member == g)[:, None], score[None, :], scores)
        scores = tl.where(seen[None, :], scores - slope[:, None] * away[None, :], float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        fall, weights = tl.exp(top - safe), tl.exp(scores - safe[:, None])
        top, total, acc = higher, total * fall + tl.sum(weights, 1), acc * fall[:, None]
        for g in range(GROUP):
            mine = (member == g)[:, None]
            weight = tl.sum(tl.where(mine, weights, 0.0), 0)
            acc = tl.where(mine, acc + tl.sum(weight[:, None] * z, 0)[None, :], acc)

    if TAIL:
        f, f2 = halves(tl.arange(0, FH), F, INTERLEAVED)
        leaves = tl.load(held + b * R + one) != 0
        start, zero = bs * F * (E + 1), one.to(tl.int64)
        tail_k += b * cb + kept * ch
        phi = tl.sum(features(tail_k, zero, leaves, f, G, F, MAP), 0)
        phi2 = tl.sum(features(tail_k, zero, leaves, f2, G, F, MAP), 0)
        decay = tl.exp(-tl.sum(slope, 0)) if ALIBI else 1.0  # then a state has one query head
        norm = tl.load(state + start + f * (E + 1) + E, mask=f < F, other=0.0) * decay + phi
        norm2 = tl.load(state + start + f2 * (E + 1) + E, mask=f2 < F, other=0.0) * decay + phi2
        if TURN:
            spin = frequencies(tl.arange(0, FH), F, LOG_BASE)
            phi, phi2 = turned(phi, phi2, (tl.load(at_k + b * pk) - R).to(tl.float32) * spin)
        gone = tl.load(values + ring * E + e, mask=(e < E) & leaves, other=0.0).to(tl.float32)
        place = start + f[:, None] * (E + 1) + e[None, :]
        place2 = start + f2[:, None] * (E + 1) + e[None, :]
        here, here2 = (f < F)[:, None] & (e < E)[None, :], (f2 < F)[:, None] & (e < E)[None, :]
        sums = tl.load(state + place, mask=here, other=0.0) * decay + phi[:, None] * gone[None, :]
        sums2 = tl.load(state + place2, mask=here2, other=0.0) * decay + phi2[:, None] * gone[None, :]
        tl.store(end + place, sums, mask=here)
        tl.store(end + place2, sums2, mask=here2)
        number = tl.load(count + b) + tl.sum(leaves.to(tl.float32), 0)
        if tile == 0:
            tl.store(end + start + f * (E + 1) + E, norm, mask=f < F)
            tl.store(end + start + f2 * (E + 1) + E, norm2, mask=f2 < F)
            if s == 0:
                tl.store(new_count + b, number)
        low = tl.maximum(least * number, LOW)

    for g in range(GROUP):
        h = s * GROUP + g
        mine = member == g
        level_near, whole = tl.sum(tl.where(mine, top, 0.0), 0), tl.sum(tl.where(mine, total, 0.0), 0)
        mean = tl.sum(tl.where(mine[:, None], acc, 0.0), 0)
        if TAIL:
            a = tail_q + b * ab + h * ah
            asked = tl.sum(features(a, zero, one == 0, f, G, F, MAP), 0)
            also = tl.sum(features(a, zero, one == 0, f2, G, F, MAP), 0)
            den = tl.maximum(tl.sum(asked * norm, 0) + tl.sum(also * norm2, 0), 0.0)
            if TURN:
                asked, also = turned(asked, also, tl.load(at_q + b * pq).to(tl.float32) * spin)
            num = tl.sum(asked[:, None] * sums, 0) + tl.sum(also[:, None] * sums2, 0)
            weight = tl.load(gate + h).to(tl.float32)
            if LEVEL:
                weight += tl.load(level + b * S * GROUP + h).to(tl.float32)
            if ALIBI:
                weight -= tl.sum(tl.where(mine, slope, 0.0), 0) * W
            far = tl.where(den > 0, tl.log(tl.where(den > 0, den, 1.0)) + weight, float("-inf"))
            both = tl.maximum(level_near, far)
            safe = tl.where(both == float("-inf"), 0.0, both)
            of_near, of_far = tl.exp(level_near - safe), tl.exp(far - safe)
            mean = mean * of_near + of_far * tl.where(den > 0, num / tl.maximum(den, low), 0.0)
            whole = whole * of_near + of_far
            level_near = both
        safe = tl.where(whole > 0, whole, 1.0)
        place_out = b * S * GROUP + h
        tl.store(out + place_out * E + e, (mean / safe).to(out.dtype.element_ty), mask=e < E)
        if tile == 0:
            tl.store(mass + place_out, tl.where(whole > 0, level_near + tl.log(safe), float("-inf")))


class _Tail(NamedTuple):
    """What a hybrid's step has beside a window's."""

    q: Tensor
    k: Tensor
    gate: Tensor
    level: Tensor | None
    state: Tensor
    count: Tensor
    at_q: Tensor | None
    at_k: Tensor | None
    flags: dict


def _launch(q, k, v, key_mask, slopes, keys, values, mask, window: int, scale: float, tail: _Tail | None) -> Any:
    """The results of `hybrid_step`; without a tail the first five are those of `window_step`."""
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    keys, values, mask = (x.contiguous() for x in (keys, values, mask))
    (batch, heads, _, width), kept, size, columns = q.shape, *keys.shape[1:3], values.shape[3]
    made = [torch.empty(shape, dtype=kind, device=q.device) for shape, kind in _results(q, k, v, keys, values)]
    given = tail or _Tail(q, k, q, None, keys, q, None, None, {"MAP": "given", "F": 1, "TURN": False, "LOG_BASE": 0.0})
    a, c = rows_contiguous(given.q), rows_contiguous(given.k)
    states = kept if tail is None else given.state.shape[1]
    end, count = (x if tail is None else torch.empty_like(x) for x in (given.state, given.count))
    group, tile = heads // states, min(VALUES, padded(columns))
    tiles, half = max(1, -(-columns // tile)), padded((width + 1) // 2)
    block = 32 if half <= 32 else 16  # keys; 32 of 128 numbers take 217 registers with rotary positions, 16 take 111
    flags = {"INTERLEAVED": False, "floor": 0.0, **given.flags}
    floor = flags.pop("floor")
    optional = (key_mask, given.gate, given.level, slopes)
    bits = [x.view(torch.uint8) if x.dtype == torch.bool else x for x in (q if x is None else x for x in optional)]
    at = [q if x is None else x for x in (given.at_q, given.at_k)]
    if batch:
        with on(q.device):
            _ring_step[(tiles * batch * states,)](
                q, k, v, a, c, *bits, keys, values, mask.view(torch.uint8), given.state, given.count, *at,
                *made[:4], made[4].view(torch.uint8), end, count, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                *a.stride()[:2], *c.stride()[:2], 0 if key_mask is None else key_mask.stride(0),
                *map(position_stride, (given.at_q, given.at_k)), states, states // kept, group, size, window, tiles,
                scale, floor, D=width, G=a.shape[3], E=columns, DH=half, FH=padded((flags["F"] + 1) // 2), BE=tile,
                BN=block, GP=triton.next_power_of_2(group), TAIL=tail is not None,
                MASK=key_mask is not None, LEVEL=given.level is not None, ALIBI=slopes is not None,
                ROTARY=given.at_q is not None, **flags, num_warps=4,
            )  # fmt: skip
    return (*made, end, count)


@torch.library.custom_op("longspan::hybrid_kernel_step", mutates_args=())
def hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_q: Tensor,
    tail_k: Tensor,
    key_mask: Tensor | None,
    gate: Tensor,
    level: Tensor | None,
    slopes: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    state: Tensor,
    count: Tensor,
    at_q: Tensor | None,
    at_k: Tensor | None,
    feature_map: str,
    scale: float,
    base: float,
    interleaved: bool,
    turn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, log mass, and the state after this token: keys, values, mask, sums, count).

    Args:
        q: [B, H, 1, D].   k: [B, K, 1, D].   v: [B, K, 1, E].   key_mask: [B, 1]: of the new token.
        tail_q, tail_k: what phi acts on, [B, H, 1, G] and, of the key that leaves, [B, K, 1, G].
        gate: [H] log weight of the tail.   level: [B, H, 1], to be added to it.   slopes: [H], of ALiBi.
        keys: [B, K, W, D].   values: [B, K, W, E].   mask: [B, W]: the ring, as wide as the window.
        state: [B, K, F, E + 1], with slopes [B, H, F, E + 1].   count: [B] keys in it.
        at_q, at_k: positions [1] or [B, 1] of the new query and key, for rotary ones.   base, interleaved: of these.
        feature_map: one of `MAPS`.   turn: rotate the features too.
    """
    phi = phi_named(feature_map)
    flags = {"MAP": feature_map, "F": phi.width(tail_q.shape[3]), "TURN": turn, "floor": phi.floor}
    flags |= {"INTERLEAVED": interleaved, "LOG_BASE": math.log2(base)}
    tail = _Tail(tail_q, tail_k, gate, level, state.float().contiguous(), count, at_q, at_k, flags)
    return _launch(q, k, v, key_mask, slopes, keys, values, mask, keys.shape[2], scale, tail)


@torch.library.custom_op("longspan::window_kernel_step", mutates_args=())
def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, log mass, and the ring after this token) of `hybrid_step`'s q to mask; the ring is window - 1 long."""
    return _launch(q, k, v, key_mask, slopes, keys, values, mask, keys.shape[2] + 1, scale, None)[:5]


def _results(q, k, v, keys, values) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of out, log mass, and the new ring, which is as wide as the wider of its old and new keys."""
    of_keys, of_values = torch.promote_types(keys.dtype, k.dtype), torch.promote_types(values.dtype, v.dtype)
    ring = (keys.shape, of_keys), (values.shape, of_values), ((keys.shape[0], keys.shape[2]), torch.bool)
    return [((*q.shape[:3], v.shape[3]), of_values), (q.shape[:3], torch.float32), *ring]


def _window_shapes(q, k, v, key_mask, slopes, keys, values, *_):
    return tuple(q.new_empty(shape, dtype=kind) for shape, kind in _results(q, k, v, keys, values))


def _hybrid_shapes(q, k, v, tail_q, tail_k, key_mask, gate, level, slopes, keys, values, mask, state, count, *_):
    exact = (state.shape, torch.float32), (count.shape, count.dtype)
    return tuple(q.new_empty(shape, dtype=kind) for shape, kind in (*_results(q, k, v, keys, values), *exact))


alone(hybrid_step, _hybrid_shapes)
alone(window_step, _window_shapes)
