"""Linear attention with its log mass, one chunk of positions at a time.

    S = sum_j phi(k_j) [v_j, 1]^T,    [num_i, den_i] = phi(q_i)^T S,    o_i = num_i / den_i,    log_mass_i = log den_i

The ones column makes numerator, denominator and their gradients one product with one accumulator. Which keys a row
sees is its `direction`, with an offset between rows and keys:

    both     all keys
    past     keys j <= i + offset      (causal: offset = M - L; a hybrid's tail: minus its window)
    future   keys j >= i + offset      (the other half of a two-sided tail; offset >= 0)

A causal chunk is exact products inside, and the running S for what came before:

    X = phi(Q) S + (phi(Q) phi(K)^T * tril) [V, 1],    S <- S + phi(K)^T [V, 1]

With `decay` [H] every step multiplies the past by exp(-decay_h): ALiBi, exactly. The backward, with dU = [do / den,
(d log_mass - <do, o>) / den], is one sweep in the direction of the forward for dq and one against it for dk and dv; S
is rebuilt on the way, never stored per chunk.
"""

import torch
from torch import Tensor

from core.attention.blocked import batches, full_precision
from core.attention.blocked.pairs import join_sums
from core.attention.contract import accumulator
from core.attention.feature_maps import feature_map
from core.attention.packing import Pack

CHUNK = {"both": 512, "past": 128, "future": 128}
"""Positions per chunk, measured best on 2 CPU cores at D = E = 64 (2026-11-21); never keyed on the length."""


class _Span:
    """Which rows and keys meet: rows start..stop pair with keys `offset` further on, `before` keys precede them all."""

    def __init__(self, queries: int, keys: int, direction: str, offset: int):
        self.direction, self.offset = direction, offset
        self.start, self.stop, self.before = 0, queries, 0
        if direction == "both":
            self.before = keys
        elif direction == "past":
            self.start = min(queries, max(0, -offset))
            self.before = max(0, min(keys, offset)) if self.start < queries else 0
        else:
            self.stop = max(0, min(queries, keys - offset))

    def chunks(self, backwards: bool = False) -> list[tuple[int, int]]:
        size = CHUNK[self.direction]
        found = [(a, min(a + size, self.stop)) for a in range(self.start, self.stop, size)]
        return found[::-1] if (self.direction == "future") != backwards else found

    def preceding(self) -> list[tuple[int, int]]:
        size = CHUNK["both"]
        return [(a, min(a + size, self.before)) for a in range(0, self.before, size)]


class _Chunks:
    """Chunks of the inputs in the accumulator's precision, with features, for one slice of the batch."""

    def __init__(self, q, k, v, key_mask, decay, name: str, items: slice, span: _Span):
        self.q, self.k, self.v = q[items], k[items], v[items]
        self.mask = None if key_mask is None else key_mask[items, None, :, None]
        self.map, self.decay, self.span = feature_map(name), decay, span
        self.acc = accumulator(q.dtype)
        self.heads, self.group = k.shape[1], q.shape[1] // k.shape[1]

    def grouped(self, x: Tensor) -> Tensor:
        """[b, H, C, X] -> [b, K, G C, X]: the heads of a group side by side, so keys are never repeated."""
        return x if self.group == 1 else x.unflatten(1, (self.heads, self.group)).flatten(2, 3)

    def ungrouped(self, x: Tensor) -> Tensor:
        return x if self.group == 1 else x.unflatten(2, (self.group, -1)).flatten(1, 2)

    def queries(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """(q, phi(q)) of rows a..b, heads grouped."""
        x = self.grouped(self.q[:, :, a:b].to(self.acc))
        return x, self.map.features(x)

    def keys(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """(k, phi(k), [v, 1]) of keys a..b; a masked key has no features."""
        x = self.k[:, :, a:b].to(self.acc)
        features = self.map.features(x)
        if self.mask is not None:
            features = torch.where(self.mask[:, :, a:b], features, 0.0)
        v = self.v[:, :, a:b]
        values = torch.ones(*v.shape[:3], v.shape[3] + 1, dtype=self.acc, device=v.device)
        values[..., :-1] = v
        return x, features, values

    def key_gradient(self, a: int, b: int, x: Tensor, features: Tensor, d: Tensor) -> Tensor:
        if self.mask is not None:
            d = torch.where(self.mask[:, :, a:b], d, 0.0)
        return self.map.gradient(x, features, d)

    def inside(self, weights: Tensor) -> Tensor:
        """Zero the weights [b, K, G C, C] that a chunk's rows do not see, and decay the others, in place."""
        size = weights.shape[-1]
        weights = weights.view(*weights.shape[:2], self.group, size, size)
        weights.tril_() if self.span.direction == "past" else weights.triu_()
        if self.decay is not None:
            weights *= self._powers(size)[0]
        return weights.flatten(2, 3)

    def rows(self, x: Tensor) -> Tensor:
        """Decay what rows of a chunk read from the state."""
        return x if self.decay is None else x * self._powers(x.shape[2])[1]

    def columns(self, x: Tensor) -> Tensor:
        """Decay what keys of a chunk write to the state."""
        return x if self.decay is None else x * self._powers(x.shape[2])[2]

    def carry(self, state: Tensor, size: int) -> Tensor:
        """Decay the state over a chunk, in place."""
        return state if self.decay is None else state.mul_(self._powers(size)[3])

    def _powers(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not hasattr(self, "_cached"):
            self._cached: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        if size not in self._cached:
            at = torch.arange(size, device=self.decay.device, dtype=self.acc)
            at = at if self.span.direction != "future" else at.flip(0)
            rate = -self.decay.to(self.acc)[:, None, None]
            between = (at[:, None] - at[None, :]).clamp(min=0)
            self._cached[size] = (
                torch.exp(rate * between).unsqueeze(1),
                torch.exp(rate * (at[:, None] + 1)),
                torch.exp(rate * (size - 1 - at[:, None])),
                torch.exp(rate * size),
            )
        return self._cached[size]

    def absorb(self, state: Tensor) -> Tensor:
        """Add the keys that precede all rows to the state."""
        for a, b in self.span.preceding():
            _, features, values = self.keys(a, b)
            self.carry(state, b - a).add_(self.columns(features).transpose(-1, -2) @ values)
        return state


def least_denominator(
    q, k, key_mask, count, name: str, direction: str, offset: int, pack: Pack | None = None
) -> Tensor:
    """Lower bound [B or 1, 1, L] of the denominator: a share of the visible keys, for maps that can vanish."""
    acc = accumulator(q.dtype)
    smallest = torch.finfo(acc).tiny
    share = feature_map(name).floor
    if not share:
        return torch.full((1, 1, q.shape[2]), smallest, dtype=acc, device=q.device)
    if pack is not None:
        return (pack.seen(q.shape[2], direction, offset).to(acc) * share).clamp_(min=smallest)[None, None]
    real = torch.ones(1, k.shape[2], device=q.device) if key_mask is None else key_mask
    upto = torch.nn.functional.pad(real.to(acc).cumsum(-1), (1, 0))
    if direction == "both":
        seen = upto[:, -1:].expand(-1, q.shape[2])
    else:
        at = torch.arange(q.shape[2], device=q.device) + offset
        if direction == "past":
            seen = upto[:, (at + 1).clamp(0, k.shape[2])]
        else:
            seen = upto[:, -1:] - upto[:, at.clamp(0, k.shape[2])]
    if count is not None:
        seen = seen + count[:, None]
    return (seen * share).clamp_(min=smallest).unsqueeze(1)


def _items(q: Tensor, k: Tensor, v: Tensor, name: str, direction: str):
    rows = min(q.shape[2] + k.shape[2], CHUNK[direction])
    widths = feature_map(name).width(q.shape[3]) + v.shape[3] + (0 if direction == "both" else rows)
    return batches(q.shape[0], q.shape[1] * rows * widths, q.device)


@torch.library.custom_op("longspan::linear_forward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [B, H, L, E], log_mass [B, H, L], den [B, H, L], state [B, K, F, E + 1]); see the head of this file.

    state, count: what was summed before these keys, and from how many.   normalize: False gives out = num.
    """
    acc = accumulator(q.dtype)
    span = _Span(q.shape[2], k.shape[2], direction, offset)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    den = torch.zeros(q.shape[:3], dtype=acc, device=q.device)
    end = _zero_state(q, k, v, feature_map) if state is None else _owned(state, acc)
    with full_precision(q.device):
        floor = least_denominator(q, k, key_mask, count, feature_map, direction, offset)
        for items in _items(q, k, v, feature_map, direction):
            chunks = _Chunks(q, k, v, key_mask, decay, feature_map, items, span)
            low = floor[items] if floor.shape[0] > 1 else floor
            s = chunks.absorb(end[items])
            for a, b in span.chunks():
                _, fq = chunks.queries(a, b)
                x = chunks.rows(fq) @ s
                if direction != "both":
                    _, fk, values = chunks.keys(a + offset, b + offset)
                    x += chunks.inside(fq @ fk.transpose(-1, -2)) @ values
                    chunks.carry(s, b - a).add_(chunks.columns(fk).transpose(-1, -2) @ values)
                x = chunks.ungrouped(x)
                x[..., -1].clamp_(min=0)  # a kernel that vanishes, 1 + cos, may round below 0
                den[items, :, a:b] = x[..., -1]
                if normalize:
                    torch.div(x[..., :-1], torch.maximum(x[..., -1], low[:, :, a:b]).unsqueeze(-1), out=x[..., :-1])
                out[items, :, a:b] = x[..., :-1]
    return out, den.log(), den, end


@torch.library.custom_op("longspan::linear_backward", mutates_args=())
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
    feature_map: str,
    direction: str,
    offset: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d initial state)."""
    acc = accumulator(q.dtype)
    span = _Span(q.shape[2], k.shape[2], direction, offset)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    ds_all = _zero_state(q, k, v, feature_map) if d_state is None else _owned(d_state, acc)
    with full_precision(q.device):
        floor = least_denominator(q, k, key_mask, count, feature_map, direction, offset)
        for items in _items(q, k, v, feature_map, direction):
            chunks = _Chunks(q, k, v, key_mask, decay, feature_map, items, span)
            low = floor[items] if floor.shape[0] > 1 else floor

            def upstream(a: int, b: int, chunks=chunks, items=items, low=low) -> Tensor:
                """d[num, den] of rows a..b, heads grouped."""
                du = torch.zeros(*chunks.q.shape[:2], b - a, v.shape[3] + 1, dtype=acc, device=q.device)
                do, z = d_out[items, :, a:b].to(acc), den[items, :, a:b]
                if normalize:
                    inverse = torch.where(z > 0, 1 / torch.maximum(z, low[:, :, a:b]), 0.0)
                    torch.mul(do, inverse.unsqueeze(-1), out=du[..., :-1])
                    dz = (do * out[items, :, a:b]).sum(-1).mul_(inverse).neg_()
                    dz.masked_fill_(z <= low[:, :, a:b], 0.0)  # the floor, not z, divided there
                    if d_mass is not None:
                        dz += torch.where(z > 0, d_mass[items, :, a:b] / torch.where(z > 0, z, 1.0), 0.0)
                    du[..., -1] = dz
                else:
                    du[..., :-1] = do
                return chunks.grouped(du)

            ds = ds_all[items]
            if direction == "both":
                for a, b in span.chunks():
                    x, fq = chunks.queries(a, b)
                    du = upstream(a, b)
                    dq[items, :, a:b] = chunks.ungrouped(chunks.map.gradient(x, fq, du @ end[items].transpose(-1, -2)))
                    ds += fq.transpose(-1, -2) @ du
            else:
                s = _zero_state(chunks.q, chunks.k, chunks.v, feature_map)
                s = chunks.absorb(s if state is None else s.copy_(state[items]))
                for a, b in span.chunks():
                    x, fq = chunks.queries(a, b)
                    _, fk, values = chunks.keys(a + offset, b + offset)
                    du = upstream(a, b)
                    d = chunks.rows(du @ s.transpose(-1, -2)) + chunks.inside(du @ values.transpose(-1, -2)) @ fk
                    dq[items, :, a:b] = chunks.ungrouped(chunks.map.gradient(x, fq, d))
                    chunks.carry(s, b - a).add_(chunks.columns(fk).transpose(-1, -2) @ values)
                for a, b in span.chunks(backwards=True):
                    _, fq = chunks.queries(a, b)
                    x, fk, values = chunks.keys(a + offset, b + offset)
                    du = upstream(a, b)
                    weights = chunks.inside(fq @ fk.transpose(-1, -2))
                    d_weights = chunks.inside(du @ values.transpose(-1, -2))
                    d = d_weights.transpose(-1, -2) @ fq + chunks.columns(values @ ds.transpose(-1, -2))
                    dk[items, :, a + offset : b + offset] = chunks.key_gradient(a + offset, b + offset, x, fk, d)
                    d = weights.transpose(-1, -2) @ du + chunks.columns(fk @ ds)
                    dv[items, :, a + offset : b + offset] = d[..., :-1]
                    chunks.carry(ds, b - a).add_(chunks.rows(fq).transpose(-1, -2) @ du)
            for a, b in reversed(span.preceding()):
                x, fk, values = chunks.keys(a, b)
                d = chunks.columns(values @ ds.transpose(-1, -2))
                dk[items, :, a:b] = chunks.key_gradient(a, b, x, fk, d)
                dv[items, :, a:b] = chunks.columns(fk @ ds)[..., :-1]
                chunks.carry(ds, b - a)
    return dq, dk, dv, ds_all


def _owned(state: Tensor, dtype: torch.dtype) -> Tensor:
    # An op's output may neither alias its input nor inherit its strides.
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _zero_state(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    width = feature_map(name).width(q.shape[3])
    return torch.zeros(k.shape[0], k.shape[1], width, v.shape[3] + 1, dtype=accumulator(q.dtype), device=q.device)


join_sums(linear_forward, linear_backward)
