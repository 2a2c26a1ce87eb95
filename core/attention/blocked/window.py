"""Sliding-window softmax attention with its log mass, a run of row blocks at a time.

Rows are cut into blocks; the keys that a block can see are one slice of fixed width, so scores are dense small
matrices under one constant band, here for blocks of 2 rows and window 3, causal and two-sided:

    keys  -2 -1  0  1          -2 -1  0  1  2  3
    row 0  1  1  1  .     row 0  1  1  1  1  1  .
    row 1  .  1  1  1     row 1  .  1  1  1  1  1

Time L (rows + reach), memory linear. The backward recomputes the weights from the log mass and adds the overlapping
key gradients piece by piece.
"""

import torch
from torch import Tensor

from core.attention.blocked import block_elements, full_precision
from core.attention.blocked.pairs import alone, join_softmax
from core.attention.contract import accumulator

ROWS = (32, 128)
"""Fewest and most rows per block. A quarter of the window between them: 32 was best of 32, 64, 128 for window 64 on a
CPU core (2026-11-21); wider windows want more rows per copy of their keys."""


class _Band:
    """Geometry: which slice of the keys a block of rows needs, and which of those each row sees."""

    def __init__(self, queries: int, keys: int, window: int, causal: bool):
        window = min(window, max(queries, keys))  # no two positions are further apart
        self.queries, self.keys, self.window, self.causal = queries, keys, window, causal
        self.rows = max(1, min(queries, max(ROWS[0], min(ROWS[1], window // 4))))
        reach = self.rows + (window - 1) * (1 if causal else 2)
        self.width = -(-reach // self.rows) * self.rows  # whole blocks, so that gradients add up block by block
        self.first = keys - queries - (window - 1) - (self.width - reach)  # key index of column 0 for row block 0
        self.blocks = -(-queries // self.rows)
        if self.blocks == 1:  # a short sequence: leave out the columns past both ends
            last = min(keys, self.first + self.width)
            self.first = max(0, self.first)
            self.width = max(0, last - self.first)

    def runs(self, run: int) -> list[tuple[int, int]]:
        return [(a, min(a + run, self.blocks)) for a in range(0, self.blocks, run)]

    def distance(self, device) -> Tensor:
        """[rows, width]: how far each column's key stands behind each row, negative where ahead."""
        row = torch.arange(self.rows, device=device)[:, None] + (self.keys - self.queries)
        return row - (torch.arange(self.width, device=device)[None, :] + self.first)

    def hidden(self, device) -> Tensor:
        distance = self.distance(device)
        return (distance < 0) | (distance >= self.window) if self.causal else distance.abs() >= self.window

    def span(self, a: int, b: int) -> tuple[int, int]:
        """Keys that row blocks a..b need; may reach past both ends."""
        return self.first + a * self.rows, self.first + (b - 1) * self.rows + self.width


class _Runs:
    """Runs of row blocks of the inputs, in the accumulator's precision, for one slice of the batch."""

    def __init__(self, q, k, v, key_mask, slopes, scale: float, band: _Band, items: slice):
        self.q, self.k, self.v = q[items], k[items], v[items]
        self.mask = None if key_mask is None else key_mask[items]
        self.scale, self.band, self.acc = scale, band, accumulator(q.dtype)
        self.heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        hidden = band.hidden(q.device)
        self.bias = torch.zeros(hidden.shape, dtype=self.acc, device=q.device).masked_fill_(hidden, -torch.inf)
        if slopes is not None:
            self.bias = self.bias - slopes.to(self.acc)[:, None, None] * band.distance(q.device).abs()
            self.bias = self.bias.view(self.heads, 1, -1, band.width)  # as grouped rows

    def rows(self, x: Tensor, a: int, b: int) -> Tensor:
        """x [b, H, L, X] at row blocks a..b -> [b, K, blocks, G rows, X], zero past the end."""
        r = self.band.rows
        x = _cut(x, a * r, b * r).to(self.acc).unflatten(2, (b - a, r))
        if self.group == 1:
            return x
        return x.unflatten(1, (self.heads, self.group)).transpose(2, 3).flatten(3, 4)

    def put(self, target: Tensor, x: Tensor, a: int, b: int) -> None:
        """Write x [b, K, blocks, G rows, X] to rows of target [b, H, L, X]; the inverse of `rows`."""
        if self.group > 1:
            x = x.unflatten(3, (self.group, -1)).transpose(2, 3).flatten(1, 2)
        stop = min(b * self.band.rows, self.band.queries)
        target[:, :, a * self.band.rows : stop] = x.flatten(2, 3)[:, :, : stop - a * self.band.rows]

    def columns(self, x: Tensor, a: int, b: int) -> Tensor:
        """x [b, K, M, X] -> [b, K, blocks, width, X]: the keys of each block, zero past both ends."""
        start, stop = self.band.span(a, b)
        return _cut(x, start, stop).to(self.acc).unfold(2, self.band.width, self.band.rows).transpose(-1, -2)

    def add(self, target: Tensor, x: Tensor, a: int, b: int) -> None:
        """Add x [b, K, blocks, width, X] to the keys of target [b, K, M, X]; the transpose of `columns`."""
        r = self.band.rows
        for piece in range(-(-self.band.width // r)):
            start = self.band.first + (a + piece) * r
            part = x[:, :, :, piece * r : (piece + 1) * r].flatten(2, 3)
            low, high = max(0, start), min(self.band.keys, start + part.shape[2])
            if low < high:
                target[:, :, low:high] += part[:, :, low - start : high - start]

    def scores(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """(scores, scaled queries, keys) of row blocks a..b, scores -inf where hidden."""
        q, k = self.rows(self.q, a, b) * self.scale, self.columns(self.k, a, b)
        s = q @ k.transpose(-1, -2)
        if self.bias.dim() == 2 and self.group > 1:
            s.unflatten(3, (self.group, -1)).add_(self.bias)
        else:
            s += self.bias
        start, stop = self.band.span(a, b)
        if self.mask is not None or start < 0 or stop > self.band.keys:
            real = torch.ones(1, self.band.keys, dtype=torch.bool, device=q.device) if self.mask is None else self.mask
            real = _cut(real.unsqueeze(-1), start, stop, dim=1).squeeze(-1).unfold(1, self.band.width, self.band.rows)
            s.masked_fill_(~real[:, None, :, None, :], -torch.inf)
        return s, q, k


def _cut(x: Tensor, start: int, stop: int, dim: int = 2) -> Tensor:
    """x[start:stop] along `dim`, with zeros where the range passes either end; a view where it does not."""
    size = x.shape[dim]
    low, high = min(max(start, 0), size), min(max(stop, 0), size)
    inner = x.narrow(dim, low, max(0, high - low))
    if high - low == stop - start:
        return inner
    shape = list(x.shape)
    shape[dim] = stop - start
    padded = x.new_zeros(shape)
    if low < high:
        padded.narrow(dim, low - start, high - low).copy_(inner)
    return padded


def _plan(q: Tensor, k: Tensor, window: int, causal: bool):
    """The band and the (items, first block, last block) of every run, sized to stay in cache."""
    band = _Band(q.shape[2], k.shape[2], window, causal)
    per_block = q.shape[1] * band.rows * band.width
    budget = block_elements(q.device)
    run = max(1, min(band.blocks, budget // per_block))
    step = max(1, budget // (per_block * run))
    items = [slice(i, min(q.shape[0], i + step)) for i in range(0, q.shape[0], step)]
    return band, [(item, band.runs(run)) for item in items]


@torch.library.custom_op("longspan::window_forward", mutates_args=())
def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, E], log_mass [B, H, L]); see the head of this file."""
    acc = accumulator(q.dtype)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    mass = torch.full(q.shape[:3], -torch.inf, dtype=acc, device=q.device)
    if 0 in (*q.shape, k.shape[2]):
        return out, mass
    with full_precision(q.device):
        band, plan = _plan(q, k, window, causal)
        for items, spans in plan:
            runs = _Runs(q, k, v, key_mask, slopes, scale, band, items)
            for a, b in spans:
                s, _, _ = runs.scores(a, b)
                top = s.amax(-1, keepdim=True)
                top.masked_fill_(top == -torch.inf, 0.0)
                p = s.sub_(top).exp_()
                total = p.sum(-1, keepdim=True)
                o = (p @ runs.columns(runs.v, a, b)).div_(total.clamp(min=torch.finfo(acc).tiny))
                runs.put(out[items], o, a, b)
                runs.put(mass[items].unsqueeze(-1), total.log_().add_(top), a, b)
    return out, mass


@torch.library.custom_op("longspan::window_backward", mutates_args=())
def window_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mass: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    acc = accumulator(q.dtype)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (k, v))
    if 0 in (*q.shape, k.shape[2]):
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    with full_precision(q.device):
        band, plan = _plan(q, k, window, causal)
        for items, spans in plan:
            runs = _Runs(q, k, v, key_mask, slopes, scale, band, items)
            safe = mass[items].masked_fill(mass[items] == -torch.inf, 0.0).unsqueeze(-1)
            for a, b in spans:
                s, scaled, keys = runs.scores(a, b)
                p = s.sub_(runs.rows(safe, a, b)).exp_()
                do = runs.rows(d_out[items], a, b)
                delta = (do * runs.rows(out[items], a, b)).sum(-1, keepdim=True)
                if d_mass is not None:
                    delta -= runs.rows(d_mass[items].unsqueeze(-1), a, b)
                runs.add(dv[items], p.transpose(-1, -2) @ do, a, b)
                ds = (do @ runs.columns(runs.v, a, b).transpose(-1, -2)).sub_(delta).mul_(p)
                runs.put(dq[items], (ds @ keys).mul_(scale), a, b)
                runs.add(dk[items], ds.transpose(-1, -2) @ scaled, a, b)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@torch.library.custom_op("longspan::window_top", mutates_args=())
def window_top(q: Tensor, k: Tensor, key_mask: Tensor | None, window: int, causal: bool, scale: float) -> Tensor:
    """The key with the highest score in each query's window, [B, H, L]; -1 where it sees none."""
    top = torch.full(q.shape[:3], -1, dtype=torch.int64, device=q.device)
    if 0 in (*q.shape, k.shape[2]):
        return top
    with full_precision(q.device):
        band, plan = _plan(q, k, window, causal)
        for items, spans in plan:
            runs = _Runs(q, k, k, key_mask, None, scale, band, items)
            for a, b in spans:
                best, column = runs.scores(a, b)[0].max(-1, keepdim=True)
                start = band.first + torch.arange(a, b, device=q.device)[:, None, None] * band.rows
                runs.put(top[items].unsqueeze(-1), torch.where(best == -torch.inf, -1, column + start), a, b)
    return top


join_softmax(window_forward, window_backward, fixed=2)
alone(window_top, lambda q, *_: q.new_empty(q.shape[:3], dtype=torch.int64))
