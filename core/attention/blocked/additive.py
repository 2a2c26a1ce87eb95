"""Softmax over additive scores with its log mass, one tile of queries and keys at a time.

    s_ij = sum_a w_ha tanh(a_ia + c_ja) - slope_h |i + M - L - j|
    log_mass_i = log sum_j exp s_ij,   o_i = sum_j exp(s_ij - log_mass_i) v_j

    backward:  P = exp(s - log_mass),  dS = P * (dO V^T - delta),  delta_i = <dO_i, O_i> - d log_mass_i
               dw_a = sum_ij dS_ij tanh(..),   da_ia = w_a sum_j dS_ij (1 - tanh(..)^2),   dc_ja = w_a sum_i of the same

A score is no product of a query's and a key's vector, so every pair needs its own A numbers. A tile holds them for some
queries and `KEYS` keys; the forward carries a running maximum over the tiles (online softmax), the backward computes
the tanh again.
"""

import torch
from torch import Tensor

from core.attention.blocked import batches, block_elements, full_precision
from core.attention.blocked.pairs import join_softmax
from core.attention.contract import accumulator

KEYS = 64
"""Keys per tile."""


class _Tiles:
    """Heads-first views of the inputs, so that the weighting of a tile by w is one matrix product per head."""

    def __init__(self, a: Tensor, c: Tensor, w: Tensor, v: Tensor, key_mask, slopes, causal: bool):
        self.acc = accumulator(v.dtype)
        heads = c.shape[1]
        self.a = a.to(self.acc).unflatten(1, (heads, -1)).permute(1, 2, 0, 3, 4).contiguous()  # [K, G, B, L, A]
        self.c = c.to(self.acc).transpose(0, 1).unsqueeze(1).contiguous()  # [K, 1, B, M, A]
        self.v = v.to(self.acc).transpose(0, 1).unsqueeze(1)  # [K, 1, B, M, E]
        self.w = w.to(self.acc)  # [H, A]
        self.slopes = None if slopes is None else slopes.to(self.acc).view(heads, -1, 1, 1, 1)
        self.key_mask, self.causal = key_mask, causal
        self.queries, self.keys = a.shape[2], c.shape[2]
        self.offset = self.keys - self.queries

    def blocks(self):
        """(items, start, stop) of every block of rows."""
        per_row = self.w.numel() * KEYS
        rows = max(1, min(self.queries, block_elements(self.w.device) // per_row))
        for items in batches(self.a.shape[2], rows * per_row, self.w.device):
            for start in range(0, self.queries, rows):
                yield items, start, min(self.queries, start + rows)

    def columns(self, stop: int):
        """(low, high) of every tile of keys that rows before `stop` may see."""
        seen = max(0, min(self.keys, stop + self.offset)) if self.causal else self.keys
        for low in range(0, seen, KEYS):
            yield low, min(seen, low + KEYS)

    def tile(self, items: slice, start: int, stop: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        """(tanh [K, G, b, rows, keys, A], scores [K, G, b, rows, keys]), -inf where hidden."""
        t = self.a[:, :, items, start:stop].unsqueeze(4) + self.c[:, :, items, low:high].unsqueeze(3)
        t.tanh_()
        s = (t.view(len(self.w), -1, t.shape[-1]) @ self.w.unsqueeze(-1)).view(t.shape[:-1])
        row = torch.arange(start, stop, device=s.device)[:, None] + self.offset
        key = torch.arange(low, high, device=s.device)[None, :]
        if self.slopes is not None:
            s -= self.slopes * (row - key).abs()
        if self.causal:
            s.masked_fill_(key > row, -torch.inf)
        if self.key_mask is not None:
            s.masked_fill_(~self.key_mask[items, None, low:high], -torch.inf)
        return t, s

    def rows(self, x: Tensor, items: slice, start: int, stop: int) -> Tensor:
        """x [B, H, L, ...] at these rows, [K, G, b, rows, ...]."""
        return x[items, :, start:stop].to(self.acc).transpose(0, 1).unflatten(0, (self.c.shape[0], -1))


def _put(target: Tensor, x: Tensor, items: slice, start: int, stop: int) -> None:
    """Write x [K, G, b, rows, ...] to rows of target [B, H, L, ...]."""
    target[items, :, start:stop] = x.flatten(0, 1).transpose(0, 1)


@torch.library.custom_op("longspan::additive_forward", mutates_args=())
def additive_forward(
    a: Tensor, c: Tensor, w: Tensor, v: Tensor, key_mask: Tensor | None, slopes: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, E], log_mass [B, H, L]) from queries' a [B, H, L, A], keys' c [B, K, M, A] and w [H, A]."""
    acc = accumulator(v.dtype)
    out = torch.zeros(*a.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    mass = torch.full(a.shape[:3], -torch.inf, dtype=acc, device=v.device)
    with full_precision(v.device):
        tiles = _Tiles(a, c, w, v, key_mask, slopes, causal)
        for items, start, stop in tiles.blocks():
            top = tiles.rows(mass, items, start, stop).unsqueeze(-1)
            total, o = torch.zeros_like(top), tiles.rows(out, items, start, stop)
            for low, high in tiles.columns(stop):
                _, s = tiles.tile(items, start, stop, low, high)
                higher = torch.maximum(top, s.amax(-1, keepdim=True))
                level = higher.masked_fill(higher == -torch.inf, 0.0)
                p, shrink = s.sub_(level).exp_(), torch.exp(top - level)
                total = total * shrink + p.sum(-1, keepdim=True)
                o = o * shrink + p @ tiles.v[:, :, items, low:high]
                top = higher
            _put(out, o / total.masked_fill(total == 0, 1.0), items, start, stop)
            _put(mass, (top.masked_fill(top == -torch.inf, 0.0) + total.log()).squeeze(-1), items, start, stop)
    return out, mass


@torch.library.custom_op("longspan::additive_backward", mutates_args=())
def additive_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    a: Tensor,
    c: Tensor,
    w: Tensor,
    v: Tensor,
    out: Tensor,
    mass: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(da, dc, dw, dv)."""
    acc = accumulator(v.dtype)
    da = torch.zeros(a.shape, dtype=a.dtype, device=a.device)
    dc, dw, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (c, w, v))
    with full_precision(v.device):
        tiles = _Tiles(a, c, w, v, key_mask, slopes, causal)
        by_head = tiles.w.view(c.shape[1], -1, 1, 1, w.shape[1])
        for items, start, stop in tiles.blocks():
            level = tiles.rows(mass, items, start, stop).unsqueeze(-1)
            level = level.masked_fill(level == -torch.inf, 0.0)
            do = tiles.rows(d_out, items, start, stop)
            delta = (do * tiles.rows(out, items, start, stop)).sum(-1, keepdim=True)
            if d_mass is not None:
                delta = delta - tiles.rows(d_mass, items, start, stop).unsqueeze(-1)
            along_rows = torch.zeros_like(tiles.a[:, :, items, start:stop])
            for low, high in tiles.columns(stop):
                t, s = tiles.tile(items, start, stop, low, high)
                p = s.sub_(level).exp_()
                dv[items, :, low:high] += (p.mT @ do).sum(1).transpose(0, 1)
                ds = (do @ tiles.v[:, :, items, low:high].mT).sub_(delta).mul_(p)
                dw += (ds.view(len(w), 1, -1) @ t.view(len(w), -1, w.shape[1])).squeeze(1)
                slope = t.square_().neg_().add_(1).mul_(ds.unsqueeze(-1))
                along_rows += slope.sum(4)
                dc[items, :, low:high] += (slope.sum(3) * by_head).sum(1).transpose(0, 1)
            _put(da, along_rows * by_head, items, start, stop)
    return da, dc.to(c.dtype), dw.to(w.dtype), dv.to(v.dtype)


join_softmax(additive_forward, additive_backward, fixed=2, learned=4)
