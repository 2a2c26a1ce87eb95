"""Attention on an image grid: softmax inside a two-sided 2-D window, and kernel sums outside of it, tile by tile.

    near     key at (r', c') and query at (r, c) with max(|r - r'|, |c - c'|) < window
    outside  all other pairs

The grid is cut into tiles that are at least window - 1 high and wide, so the window of a query lies within the 3 x 3
tiles around its own. Scores are dense small matrices, a tile of queries against those nine tiles of keys, under one
constant band. What lies beyond the nine tiles reaches a query through sums over whole tiles: rows of tiles above and
below, and tiles to the left and right within the three rows, all of them running sums, never a difference:

    A A A A A A
    L N N N R R      the query is in the N of the middle; A, B, L, R are four sums, the nine N are dense
    L N N N R R
    L N N N R R
    B B B B B B

Time and memory are linear in the number of tokens. A side of the grid that three tiles would cover is one tile.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.blocked import batches, block_elements, full_precision
from core.attention.blocked.pairs import alone, join_softmax
from core.attention.contract import accumulator

LEAST, LEAST_OUTSIDE = 4, 5
"""Least height and width of a tile: for the softmax, and for the sums outside, which keep a state per tile (best of 4,
5, 6, 8, 10, 12 on a CPU core at window 5, 2026-11-25). On a line 32, because its tiles have a single row."""


class Tiles:
    """How a grid is cut, and the views of its tensors by tile.

    rows, columns: of the grid, N = rows * columns tokens, row by row.   window: as in the head of this file.
    least: height and width of a tile at least.
    """

    def __init__(self, rows: int, columns: int, window: int, least: int = LEAST):
        self.rows, self.columns, self.window = rows, columns, window
        self.high, self.down = _cut(rows, max(window - 1, least))
        self.wide, self.across = _cut(columns, max(window - 1, least if rows > 1 else 32))
        self.edge_rows, self.edge_columns = int(self.down > 1), int(self.across > 1)
        self.size = self.high * self.wide
        self.seen = (1 + 2 * self.edge_rows) * (1 + 2 * self.edge_columns) * self.size

    def tiled(self, x: Tensor) -> Tensor:
        """[b, H, N, X] -> [b, H, down, across, size, X], zero beyond the image."""
        x = x.unflatten(2, (self.rows, self.columns))
        x = F.pad(x, (0, 0, 0, self.across * self.wide - self.columns, 0, self.down * self.high - self.rows))
        x = x.unflatten(3, (self.across, self.wide)).unflatten(2, (self.down, self.high))
        return x.transpose(3, 4).flatten(4, 5)

    def untiled(self, x: Tensor) -> Tensor:
        """The inverse of `tiled`."""
        x = x.unflatten(4, (self.high, self.wide)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return x[:, :, : self.rows, : self.columns].flatten(2, 3)

    def bordered(self, x: Tensor) -> Tensor:
        """Tiles with a border of zero tiles, so that every tile has the neighbours that `around` looks for."""
        r, c = self.edge_rows, self.edge_columns
        return F.pad(x, (0, 0, 0, 0, c, c, r, r)) if r or c else x

    def inner(self, x: Tensor) -> Tensor:
        """The inverse of `bordered`."""
        r, c = self.edge_rows, self.edge_columns
        return x[:, :, r : r + self.down, c : c + self.across]

    def around(self, x: Tensor, i: int, a: int, b: int) -> Tensor:
        """Bordered tiles -> [b, H, b - a, seen, X]: what tiles a..b of tile row i can see."""
        x = x[:, :, i : i + 1 + 2 * self.edge_rows, a : b + 2 * self.edge_columns]
        x = x.unfold(3, 1 + 2 * self.edge_columns, 1)  # [b, H, near rows, b - a, size, X, near columns]
        return x.permute(0, 1, 3, 2, 6, 4, 5).flatten(3, 5)

    def add_around(self, target: Tensor, x: Tensor, i: int, a: int, b: int) -> None:
        """Add x [b, H, b - a, seen, X] to bordered tiles; the transpose of `around`."""
        x = x.unflatten(3, (1 + 2 * self.edge_rows, 1 + 2 * self.edge_columns, self.size))
        for r in range(x.shape[3]):
            for c in range(x.shape[4]):
                target[:, :, i + r, a + c : b + c] += x[:, :, :, r, c]

    def near(self, device: torch.device, queries: slice) -> Tensor:
        """[queries, seen] bool: which of the keys around a tile lie in the window of each of its queries."""
        at = torch.arange(self.size, device=device)[queries, None]
        rows = torch.arange(-self.edge_rows * self.high, (1 + self.edge_rows) * self.high, device=device)
        columns = torch.arange(-self.edge_columns * self.wide, (1 + self.edge_columns) * self.wide, device=device)
        rows, columns = rows.view(-1, 1, self.high, 1), columns.view(1, -1, 1, self.wide)  # in the order of `around`
        rows, columns = (x.expand(len(rows), columns.shape[1], self.high, self.wide).flatten() for x in (rows, columns))
        close = (at.div(self.wide, rounding_mode="floor") - rows).abs() < self.window
        return close & ((at % self.wide - columns).abs() < self.window)

    def plan(self, batch: int, heads: int, device: torch.device) -> tuple[list[slice], list[tuple[int, int]], int]:
        """(slices of the batch, runs of tiles in a row, queries of a tile at a time), sized to stay in cache."""
        budget = block_elements(device)
        queries = max(1, min(self.size, budget // (heads * self.seen)))
        run = max(1, min(self.across, budget // (heads * self.seen * queries)))
        items = list(batches(batch, heads * run * queries * self.seen, device))
        return items, [(a, min(a + run, self.across)) for a in range(0, self.across, run)], queries

    def blocks(self, runs: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """(tile row, first and last tile) of every run."""
        return ((i, a, b) for i in range(self.down) for a, b in runs)


def _cut(length: int, least: int) -> tuple[int, int]:
    """(length of a tile, number of tiles) of one side."""
    return (length, 1) if 3 * least >= length else (least, -(-length // least))


class _Near:
    """Scores of blocks of tiles, for one slice of the batch."""

    def __init__(self, q: Tensor, k: Tensor, key_mask: Tensor | None, tiles: Tiles, scale: float, items: slice):
        self.tiles, self.acc = tiles, accumulator(q.dtype)
        self.q = tiles.tiled(q[items].to(self.acc) * scale)
        self.k = tiles.bordered(tiles.tiled(k[items].to(self.acc)))
        real = q.new_ones(1, q.shape[2]) if key_mask is None else key_mask[items]
        self.real = tiles.bordered(tiles.tiled(real[:, None, :, None].to(self.acc))) > 0
        self.far: tuple[slice, Tensor] | None = None

    def scores(self, i: int, a: int, b: int, rows: slice) -> tuple[Tensor, Tensor]:
        """(scores [b, H, tiles, rows, seen], -inf where hidden; keys around)."""
        keys = self.tiles.around(self.k, i, a, b)
        s = self.q[:, :, i, a:b, rows] @ keys.mT
        if self.far is None or self.far[0] != rows:  # where a tile is taken whole, one mask serves all
            self.far = rows, ~self.tiles.near(s.device, rows)
        hidden = self.far[1] | ~self.tiles.around(self.real, i, a, b).mT
        return s.masked_fill_(hidden, -torch.inf), keys


@torch.library.custom_op("longspan::tiles_near", mutates_args=())
def near_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, rows: int, columns: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys of the window: (out [B, H, N, E], log_mass [B, H, N]).

    q, k [B, H, N, D] and v [B, H, N, E] of a grid, N = rows * columns; key_mask bool [B, N].
    """
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    mass = torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)
    if 0 in (*q.shape, v.shape[3]):
        return out, mass
    with full_precision(q.device):
        tiles = Tiles(rows, columns, window)
        items, runs, queries = tiles.plan(q.shape[0], q.shape[1], q.device)
        for part in items:
            near = _Near(q, k, key_mask, tiles, scale, part)
            values = tiles.bordered(tiles.tiled(v[part].to(near.acc)))
            found = near.q.new_zeros(*near.q.shape[:-1], v.shape[3])
            level = near.q.new_zeros(*near.q.shape[:-1], 1)
            for i, a, b in tiles.blocks(runs):
                around = tiles.around(values, i, a, b)
                for lo in range(0, tiles.size, queries):
                    chunk = slice(lo, lo + queries)
                    s, _ = near.scores(i, a, b, chunk)
                    top = s.amax(-1, keepdim=True)
                    top.masked_fill_(top == -torch.inf, 0.0)
                    p = s.sub_(top).exp_()
                    total = p.sum(-1, keepdim=True)
                    found[:, :, i, a:b, chunk] = (p @ around).div_(total.clamp(min=torch.finfo(near.acc).tiny))
                    level[:, :, i, a:b, chunk] = total.log_().add_(top)
            out[part] = tiles.untiled(found).to(v.dtype)
            mass[part] = tiles.untiled(level).squeeze(-1)
    return out, mass


@torch.library.custom_op("longspan::tiles_near_backward", mutates_args=())
def near_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mass: Tensor,
    key_mask: Tensor | None,
    rows: int,
    columns: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); the weights are computed again from the mass."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if 0 in (*q.shape, v.shape[3]):
        return dq, dk, dv
    with full_precision(q.device):
        tiles = Tiles(rows, columns, window)
        items, runs, queries = tiles.plan(q.shape[0], q.shape[1], q.device)
        for part in items:
            near = _Near(q, k, key_mask, tiles, scale, part)
            do = d_out[part].to(near.acc)
            delta = (do * out[part]).sum(-1)
            delta = delta if d_mass is None else delta - d_mass[part]
            level = mass[part].masked_fill(mass[part] == -torch.inf, 0.0)
            upstream = tiles.tiled(torch.cat((do, delta.unsqueeze(-1), level.unsqueeze(-1)), -1))
            values = tiles.bordered(tiles.tiled(v[part].to(near.acc)))
            sums = torch.zeros_like(near.q), torch.zeros_like(near.k), torch.zeros_like(values)
            for i, a, b in tiles.blocks(runs):
                around = tiles.around(values, i, a, b)
                for lo in range(0, tiles.size, queries):
                    chunk = slice(lo, lo + queries)
                    s, keys = near.scores(i, a, b, chunk)
                    up = upstream[:, :, i, a:b, chunk]
                    do, delta, level = up[..., :-2], up[..., -2:-1], up[..., -1:]
                    p = s.sub_(level).exp_()
                    tiles.add_around(sums[2], p.mT @ do, i, a, b)
                    ds = (do @ around.mT).sub_(delta).mul_(p)
                    sums[0][:, :, i, a:b, chunk] = (ds @ keys).mul_(scale)
                    tiles.add_around(sums[1], ds.mT @ near.q[:, :, i, a:b, chunk], i, a, b)  # q has its scale
            dq[part] = tiles.untiled(sums[0]).to(q.dtype)
            dk[part] = tiles.untiled(tiles.inner(sums[1])).to(k.dtype)
            dv[part] = tiles.untiled(tiles.inner(sums[2])).to(v.dtype)
    return dq, dk, dv


@torch.library.custom_op("longspan::tiles_outside", mutates_args=())
def outside(a: Tensor, b: Tensor, c: Tensor, rows: int, columns: int, window: int) -> Tensor:
    """Sums over the keys outside of the window: y_i = sum_j (a_i . b_j) c_j, [B, H, N, X].

    a, b [B, H, N, F] and c [B, H, N, X] of a grid. A masked key has b = 0. With a, b, c >= 0 so is y, to the last bit.
    The pairs are symmetric, so each gradient is such a sum, too.
    """
    y = torch.zeros(*a.shape[:3], c.shape[3], dtype=accumulator(a.dtype), device=a.device)
    if 0 in (*a.shape, c.shape[3]) or window >= max(rows, columns):
        return y
    with full_precision(a.device):
        tiles = Tiles(rows, columns, window, LEAST_OUTSIDE)
        items, runs, queries = tiles.plan(a.shape[0], a.shape[1], a.device)
        chunks = [slice(lo, lo + queries) for lo in range(0, tiles.size, queries)]
        bands = [tiles.near(a.device, chunks[0])] if len(chunks) == 1 else None
        for part in items:
            left, right, values = (tiles.tiled(x[part].to(y.dtype)) for x in (a, b, c))
            found = left.new_zeros(*left.shape[:-1], c.shape[3])
            beyond = _beyond(right.mT @ values, tiles) if tiles.down > 1 or tiles.across > 1 else None
            right, values = tiles.bordered(right), tiles.bordered(values)
            for i, first, last in tiles.blocks(runs):
                keys, around = (tiles.around(x, i, first, last) for x in (right, values))
                for chunk in chunks:
                    near = tiles.near(a.device, chunk) if bands is None else bands[0]
                    rows_of = left[:, :, i, first:last, chunk]
                    sums = (rows_of @ keys.mT).masked_fill_(near, 0.0) @ around
                    if beyond is not None:
                        sums += rows_of @ beyond[:, :, i, first:last]
                    found[:, :, i, first:last, chunk] = sums
            y[part] = tiles.untiled(found)
    return y


def _beyond(states: Tensor, tiles: Tiles) -> Tensor:
    """Per tile the sum of the states [b, H, down, across, F, X] of all tiles that are not around it."""
    found = torch.zeros_like(states)
    band = states
    if tiles.edge_rows:
        lines = states.sum(3, keepdim=True)
        found[:, :, 2:] += lines.cumsum(2)[:, :, :-2]
        found[:, :, :-2] += lines.flip(2).cumsum(2).flip(2)[:, :, 2:]
        band = states.clone()
        band[:, :, 1:] += states[:, :, :-1]
        band[:, :, :-1] += states[:, :, 1:]
    if tiles.edge_columns:
        found[:, :, :, 2:] += band.cumsum(3)[:, :, :, :-2]
        found[:, :, :, :-2] += band.flip(3).cumsum(3).flip(3)[:, :, :, 2:]
    return found


def _sums_shape(a, b, c, rows, columns, window):
    return a.new_empty(*a.shape[:3], c.shape[3], dtype=accumulator(a.dtype))


def _setup(ctx, inputs, output):
    *tensors, ctx.rows, ctx.columns, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    a, b, c = ctx.saved_tensors
    given = (ctx.rows, ctx.columns, ctx.window)
    da, db, dc = outside(dy, c, b, *given), outside(c, dy, a, *given), outside(b, a, dy, *given)
    return da.to(a.dtype), db.to(b.dtype), dc.to(c.dtype), None, None, None


join_softmax(near_forward, near_backward, fixed=1)
alone(outside, _sums_shape)
outside.register_autograd(_gradients, setup_context=_setup)
