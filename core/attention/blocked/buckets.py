"""Softmax among tokens that fell into the same bucket, over several rounds of bucketing at once.

In each round tokens are sorted by (bucket, position). A code per token and round says who meets whom:

    code = rank in the sorted order + bucket * window,      i and j meet  iff  |code_i - code_j| < window

for the codes of different buckets are further apart than that. So a round is a band in sorted order, computed in blocks
of `window` rows against the block before (two-sided: and after). A pair that meets in c rounds would count c times;
its score is lowered by log c in each, which makes the sum over the rounds the softmax over the union of their keys.

The backward recomputes the weights from the mass of the union, round by round. Memory is linear in the length.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.blocked import block_elements, full_precision
from core.attention.blocked.pairs import join_softmax
from core.attention.contract import Attended, accumulator, merge


class _Round:
    """One round of a slice of sequences (batch and heads in one), sorted; X [n, L, .] throughout."""

    def __init__(self, order: Tensor, codes: Tensor, real: Tensor, number: int, window: int, causal: bool):
        self.window, self.causal, self.number, self.order = window, causal, number, order[:, number]
        self.length = order.shape[2]
        self.blocks = -(-self.length // window)
        self.rank = torch.empty_like(self.order)
        self.rank.scatter_(1, self.order, torch.arange(self.length, device=order.device).expand_as(self.order))
        self.codes = self.sorted(codes.transpose(1, 2))
        self.real = self.sorted(real.unsqueeze(-1))

    def sorted(self, x: Tensor) -> Tensor:
        """x by position -> in sorted order, as blocks [n, blocks + 2, window, X] with an empty one at either end."""
        x = x.gather(1, self.order.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        after = (self.blocks + 1) * self.window - self.length
        return F.pad(x, (0, 0, self.window, after)).unflatten(1, (-1, self.window))

    def unsorted(self, x: Tensor) -> Tensor:
        """The inverse of `sorted`."""
        x = x[:, 1:].flatten(1, 2)[:, : self.length]
        return x.gather(1, self.rank.unsqueeze(-1).expand(-1, -1, x.shape[2]))

    def columns(self, x: Tensor, a: int, b: int) -> Tensor:
        """Blocks -> what row blocks a..b read, [n, b - a, columns, X]; row block a stands at 1 + a."""
        return torch.cat([x[:, a + step : b + step] for step in range(2 if self.causal else 3)], 2)

    def add(self, target: Tensor, x: Tensor, a: int, b: int) -> None:
        """The transpose of `columns`."""
        for step, part in enumerate(x.split(self.window, 2)):
            target[:, a + step : b + step] += part

    def scores(self, q: Tensor, k: Tensor, a: int, b: int) -> Tensor:
        """[n, b - a, window, columns] from scaled queries and keys in blocks, -inf where hidden."""
        s = q[:, 1 + a : 1 + b] @ self.columns(k, a, b).transpose(-1, -2)
        row, column = self.codes[:, 1 + a : 1 + b], self.columns(self.codes, a, b)
        count = torch.zeros_like(s)
        for one in range(row.shape[-1]):
            near = (row[..., one].unsqueeze(-1) - column[..., one].unsqueeze(-2)).abs() < self.window
            count += near
            if one == self.number:
                seen = near
        at = torch.arange(self.window, device=s.device)[:, None] + self.window
        key = torch.arange(s.shape[-1], device=s.device)
        seen = seen & (key < at if self.causal else key != at)
        seen &= self.real[:, 1 + a : 1 + b] & self.columns(self.real, a, b).transpose(-1, -2)
        return s.sub_(count.clamp_(min=1).log_()).masked_fill_(~seen, -torch.inf)

    def runs(self) -> list[tuple[int, int]]:
        """Row blocks a..b of every run, sized to stay in cache."""
        budget = block_elements(self.order.device)
        run = max(1, budget // (self.order.shape[0] * 3 * self.window**2))
        return [(a, min(a + run, self.blocks)) for a in range(0, self.blocks, run)]


def _slices(q: Tensor, v: Tensor, window: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices over batch and heads, and the rows of v [B K, ...] that belong to them."""
    batch, heads, length, _ = q.shape
    at = torch.arange(batch * heads, device=q.device)
    rows = at // heads * v.shape[1] + at % heads // (heads // v.shape[1])
    step = max(1, block_elements(q.device) // (3 * window * max(window, length)))
    for start in range(0, batch * heads, step):
        yield slice(start, start + step), rows[start : start + step]


def _real(key_mask: Tensor | None, q: Tensor) -> Tensor:
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    return real.repeat_interleave(q.shape[1], 0)


@torch.library.custom_op("longspan::bucket_forward", mutates_args=())
def bucket_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    codes: Tensor,
    key_mask: Tensor | None,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, E], log_mass [B, H, L]) over all keys that a query meets, without itself.

    q and k [B, H, L, D], v [B, K, L, E]; order and codes int64 [B, H, rounds, L], see the head of this file. A masked
    position is neither key nor query.
    """
    acc = accumulator(q.dtype)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    mass = torch.full(q.shape[:3], -torch.inf, dtype=acc, device=q.device)
    if 0 in q.shape:
        return out, mass
    window = min(window, q.shape[2])  # no bucket is larger, and a block need not be
    real, outs, masses = _real(key_mask, q), out.flatten(0, 1), mass.flatten(0, 1)
    with full_precision(q.device):
        for items, rows in _slices(q, v, window):
            flat = [x.flatten(0, 1)[items].to(acc) for x in (q, k)]
            values, results = v.flatten(0, 1)[rows].to(acc), []
            orders, labels = (x.flatten(0, 1)[items] for x in (order, codes))
            for number in range(order.shape[2]):
                one = _Round(orders, labels, real[items], number, window, causal)
                qs, ks, vs = one.sorted(flat[0] * scale), one.sorted(flat[1]), one.sorted(values)
                o = torch.zeros_like(vs)
                m = torch.full_like(vs[..., :1], -torch.inf)
                for a, b in one.runs():
                    s = one.scores(qs, ks, a, b)
                    total = torch.logsumexp(s, -1, keepdim=True)
                    p = s.sub_(total.masked_fill(total == -torch.inf, 0.0)).exp_()
                    o[:, 1 + a : 1 + b], m[:, 1 + a : 1 + b] = p @ one.columns(vs, a, b), total
                results.append(Attended(one.unsorted(o), one.unsorted(m).squeeze(-1)))
            union = merge(*results)
            assert union.log_mass is not None
            outs[items], masses[items] = union.out.to(v.dtype), union.log_mass
    return out, mass


@torch.library.custom_op("longspan::bucket_backward", mutates_args=())
def bucket_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mass: Tensor,
    order: Tensor,
    codes: Tensor,
    key_mask: Tensor | None,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    acc = accumulator(q.dtype)
    dq, dk = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k))
    dv = torch.zeros(*q.shape[:3], v.shape[3], dtype=acc, device=v.device)  # per query head, summed at the end
    if 0 in q.shape:
        return dq.to(q.dtype), dk.to(k.dtype), torch.zeros_like(v)
    window = min(window, q.shape[2])
    real = _real(key_mask, q)
    with full_precision(q.device):
        for items, rows in _slices(q, v, window):
            flat = [x.flatten(0, 1)[items].to(acc) for x in (q, k, d_out, out)]
            delta = (flat[2] * flat[3]).sum(-1)
            if d_mass is not None:
                delta = delta - d_mass.flatten(0, 1)[items]
            lse = mass.flatten(0, 1)[items]
            stats = torch.stack((lse.masked_fill(lse == -torch.inf, 0.0), delta), -1)
            values = v.flatten(0, 1)[rows].to(acc)
            orders, labels = (x.flatten(0, 1)[items] for x in (order, codes))
            for number in range(order.shape[2]):
                one = _Round(orders, labels, real[items], number, window, causal)
                qs, ks, vs, dos, st = (one.sorted(x) for x in (flat[0] * scale, flat[1], values, flat[2], stats))
                gq, gk, gv = (torch.zeros_like(x) for x in (qs, ks, vs))
                for a, b in one.runs():
                    p = one.scores(qs, ks, a, b).sub_(st[:, 1 + a : 1 + b, :, :1]).exp_()
                    do = dos[:, 1 + a : 1 + b]
                    one.add(gv, p.transpose(-1, -2) @ do, a, b)
                    ds = (do @ one.columns(vs, a, b).transpose(-1, -2)).sub_(st[:, 1 + a : 1 + b, :, 1:]).mul_(p)
                    gq[:, 1 + a : 1 + b] = ds @ one.columns(ks, a, b) * scale
                    one.add(gk, ds.transpose(-1, -2) @ qs[:, 1 + a : 1 + b], a, b)
                for total, part in zip((dq, dk, dv), (gq, gk, gv)):
                    total.flatten(0, 1)[items] += one.unsorted(part)
    dv = dv.unflatten(1, (v.shape[1], -1)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


join_softmax(bucket_forward, bucket_backward, fixed=3)
