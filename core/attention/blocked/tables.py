"""Softmax between blocks of positions that a table lists, as BigBird's random blocks: `table[h, a]` are the key blocks
that row block a of head h reads.

Rows of a block read their key blocks as one dense small matrix, a run of row blocks at a time; the backward recomputes
the weights from the log mass and adds the key gradients block by block. Row blocks that read everything (the first and
the last) are ordinary softmax. Memory is linear in the length: inputs, output, mass, and one run.

The plan is a pure function of (seed, head, row block, number of blocks), so nothing has to be stored: any process, any
batch and every later run draws the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.blocked import block_elements, full_precision
from core.attention.blocked.pairs import join_softmax
from core.attention.blocked.softmax import softmax_backward, softmax_forward
from core.attention.contract import accumulator


def plan(heads: int, blocks: int, near: int, random: int, seed: int, causal: bool, device=None) -> Tensor:
    """The key blocks of every row block, int64 [heads, blocks, n]; -1 where there are fewer.

    Row block a reads blocks a - near .. a + near, the first and the last one, and `random` different others; causal, no
    block behind its own, and the others are earlier ones. That the first and last row blocks read all is not in it.

    Example:
        >>> plan(1, 8, 1, 2, seed=0, causal=False)[0, 3].sort().values.tolist()[:5]  # 0, 2, 3, 4, 7 and two of 1, 5, 6
        [0, 1, 2, 3, 4]
    """
    row = torch.arange(blocks, device=device)[None, :]
    head = torch.arange(heads, device=device)[:, None]
    last = blocks - 1
    # Candidates are the blocks 1 .. last - 1 outside the window: `before` of them below it, `after` above.
    before = (row - near - 1).clamp(min=0, max=max(0, last - 1))
    after = (last - 1 - (row + near)).clamp(min=0, max=max(0, last - 1)) * (not causal)
    number = (before + after).expand(heads, -1)
    drawn: list[Tensor] = []
    for slot in range(random):
        # Floyd's sampling without replacement: the t-th draw is below number - random + t + 1; a repeat takes the top.
        top = number - random + slot
        pick = _hash(seed, head, row, blocks, slot) % (top + 1).clamp(min=1)
        taken = (
            torch.stack([pick == one for one in drawn]).any(0) if drawn else torch.zeros_like(pick, dtype=torch.bool)
        )
        drawn.append(torch.where(top < 0, -1, torch.where(taken, top, pick)))
    chosen = [torch.where(one < before, one + 1, one - before + row + near + 1) for one in drawn]
    parts = [torch.where(one < 0, -1, block) for one, block in zip(drawn, chosen)]
    for step in range(-near, 1 if causal else near + 1):
        block = row + step
        inner = (block > 0) & (block < last)
        parts.append(torch.where(inner, block, -1).expand(heads, -1))
    parts.append(torch.zeros_like(number))
    if not causal and last > 0:
        parts.append(torch.full_like(number, last))
    return torch.stack(parts, -1)


def _hash(seed: int, head: Tensor, row: Tensor, blocks: int, slot: int) -> Tensor:
    """Numbers from 0 to 2^31 - 1, [heads, rows], that look random in every argument."""
    x = torch.zeros_like(head + row) + seed % 2**31
    for word in (head, row, torch.full_like(row, blocks), torch.full_like(row, slot)):
        # Multiplications of 31-bit numbers by odd constants below 2^31 stay inside int64.
        x = (x ^ word) * 0x2545F491 & 0x7FFFFFFF
        x = (x ^ x >> 15) * 0x2C1B3C6D & 0x7FFFFFFF
        x = (x ^ x >> 13) * 0x297A2D39 & 0x7FFFFFFF
    return x ^ x >> 16


def is_short(length: int, block: int, near: int, random: int) -> bool:
    """Whether a sequence is read in full: a table would leave out too little to be worth it."""
    return -(-length // block) < 2 * near + 3 + 2 * random


class _Tiles:
    """The inner row blocks and the key blocks that they read, for one slice of the batch."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, table: Tensor, block: int, causal: bool
    ):
        self.acc, self.block, self.causal, self.table = accumulator(q.dtype), block, causal, table
        self.q, self.keys, self.blocks = q, k.shape[1], table.shape[1]
        after = self.blocks * block - k.shape[2]
        self.k, self.v = (F.pad(x, (0, 0, 0, after)).unflatten(2, (-1, block)).flatten(1, 2) for x in (k, v))
        real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
        self.real = F.pad(real, (0, after)).unflatten(1, (-1, block))

    def rows(self, x: Tensor, a: int, b: int) -> Tensor:
        """x [B, H, L, X] at row blocks a..b -> [B, H, blocks, rows, X]."""
        return x[:, :, a * self.block : b * self.block].to(self.acc).unflatten(2, (b - a, -1))

    def put(self, target: Tensor, x: Tensor, a: int, b: int) -> None:
        """Write x [B, H, blocks, rows, X] to these rows of target [B, H, L, X]."""
        target[:, :, a * self.block : b * self.block] = x.flatten(2, 3)

    def index(self, a: int, b: int) -> Tensor:
        """Where the key blocks of each head stand among those of all key heads, [H blocks n]."""
        table = self.table[:, a:b].clamp(min=0)
        head = torch.arange(table.shape[0], device=table.device) // (table.shape[0] // self.keys)
        return (table + head[:, None, None] * self.blocks).flatten()

    def columns(self, x: Tensor, index: Tensor, a: int, b: int) -> Tensor:
        """x [B, K blocks, block, X] -> [B, H, row blocks, n block, X]."""
        taken = x.index_select(1, index).to(self.acc)
        return taken.unflatten(1, (self.table.shape[0], b - a, -1)).flatten(3, 4)

    def add(self, target: Tensor, x: Tensor, index: Tensor) -> None:
        """Add x [B, H, row blocks, n block, X] to target [B, K blocks, block, X], in a fixed order on every device."""
        x = x.unflatten(3, (-1, self.block)).flatten(1, 3)
        if x.is_cuda:
            target.transpose(0, 1).index_put_((index,), x.transpose(0, 1), accumulate=True)
        else:
            target.index_add_(1, index, x)

    def scores(self, a: int, b: int, index: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(scores [B, H, row blocks, rows, n block], -inf where hidden; scaled queries; keys)."""
        q, k = self.rows(self.q, a, b) * scale, self.columns(self.k, index, a, b)
        s = q @ k.transpose(-1, -2)
        table = self.table[:, a:b]
        seen = self.real[:, table.clamp(min=0)] & (table >= 0)[..., None]  # [B, H, row blocks, n, block]
        seen = seen.flatten(3)[:, :, :, None, :]
        if self.causal:
            within = torch.arange(self.block, device=s.device)
            key = (table[..., None] * self.block + within).flatten(2)[:, :, None, :]
            row = torch.arange(a * self.block, b * self.block, device=s.device).view(1, b - a, self.block, 1)
            seen = seen & (key <= row)
        return s.masked_fill_(~seen, -torch.inf), q, k


def _runs(q: Tensor, table: Tensor, block: int):
    """(items, first, last row block) of every run, sized to stay in cache."""
    per_block = q.shape[1] * block * block * table.shape[2]
    run = max(1, block_elements(q.device) // per_block)
    step = max(1, block_elements(q.device) // (per_block * run))
    inner = table.shape[1] - 1
    for i in range(0, q.shape[0], step):
        yield slice(i, min(q.shape[0], i + step)), [(a, min(a + run, inner)) for a in range(1, inner, run)]


def _outer(q: Tensor, k: Tensor, block: int, causal: bool) -> list[tuple[slice, slice]]:
    """(rows, keys) of the first and the last row block, which read everything."""
    last = (-(-q.shape[2] // block) - 1) * block
    return [(slice(0, block), slice(0, block if causal else None)), (slice(last, None), slice(None))]


@torch.library.custom_op("longspan::table_forward", mutates_args=())
def table_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    block: int,
    near: int,
    random: int,
    seed: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, E], log_mass [B, H, L]) of square attention under `plan`; see the head of this file."""
    if 0 in q.shape or is_short(q.shape[2], block, near, random):
        return softmax_forward(q, k, v, key_mask, None, None, causal, scale)
    acc = accumulator(q.dtype)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    mass = torch.full(q.shape[:3], -torch.inf, dtype=acc, device=q.device)
    for rows, keys in _outer(q, k, block, causal):
        mask = None if key_mask is None else key_mask[:, keys]
        some = softmax_forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask, None, None, causal, scale)
        out[:, :, rows], mass[:, :, rows] = some
    table = plan(q.shape[1], -(-q.shape[2] // block), near, random, seed, causal, q.device)
    with full_precision(q.device):
        for items, runs in _runs(q, table, block):
            mask = None if key_mask is None else key_mask[items]
            tiles = _Tiles(q[items], k[items], v[items], mask, table, block, causal)
            for a, b in runs:
                index = tiles.index(a, b)
                s, _, _ = tiles.scores(a, b, index, scale)
                log_mass = torch.logsumexp(s, -1, keepdim=True)
                p = s.sub_(log_mass.masked_fill(log_mass == -torch.inf, 0.0)).exp_()
                tiles.put(out[items], p @ tiles.columns(tiles.v, index, a, b), a, b)
                tiles.put(mass[items].unsqueeze(-1), log_mass, a, b)
    return out, mass


@torch.library.custom_op("longspan::table_backward", mutates_args=())
def table_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mass: Tensor,
    key_mask: Tensor | None,
    block: int,
    near: int,
    random: int,
    seed: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    if 0 in q.shape or is_short(q.shape[2], block, near, random):
        return softmax_backward(d_out, d_mass, q, k, v, out, mass, key_mask, None, None, causal, scale, False)[:3]
    acc = accumulator(q.dtype)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (k, v))
    for rows, keys in _outer(q, k, block, causal):
        d, mask = None if d_mass is None else d_mass[:, :, rows], None if key_mask is None else key_mask[:, keys]
        given = q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], mass[:, :, rows], mask
        some = softmax_backward(d_out[:, :, rows], d, *given, None, None, causal, scale, False)
        dq[:, :, rows] = some[0]
        dk[:, :, keys] += some[1]
        dv[:, :, keys] += some[2]
    table = plan(q.shape[1], -(-q.shape[2] // block), near, random, seed, causal, q.device)
    with full_precision(q.device):
        for items, runs in _runs(q, table, block):
            mask = None if key_mask is None else key_mask[items]
            tiles = _Tiles(q[items], k[items], v[items], mask, table, block, causal)
            grads = [torch.zeros(x.shape, dtype=acc, device=x.device) for x in (tiles.k, tiles.v)]
            safe = mass[items].masked_fill(mass[items] == -torch.inf, 0.0).unsqueeze(-1)
            for a, b in runs:
                index = tiles.index(a, b)
                s, scaled, keys = tiles.scores(a, b, index, scale)
                p = s.sub_(tiles.rows(safe, a, b)).exp_()
                do = tiles.rows(d_out[items], a, b)
                delta = (do * tiles.rows(out[items], a, b)).sum(-1, keepdim=True)
                if d_mass is not None:
                    delta -= tiles.rows(d_mass[items].unsqueeze(-1), a, b)
                tiles.add(grads[1], p.transpose(-1, -2) @ do, index)
                ds = (do @ tiles.columns(tiles.v, index, a, b).transpose(-1, -2)).sub_(delta).mul_(p)
                tiles.put(dq[items], (ds @ keys).mul_(scale), a, b)
                tiles.add(grads[0], ds.transpose(-1, -2) @ scaled, index)
            for total, part in zip((dk, dv), grads):
                total[items] += part.unflatten(1, (k.shape[1], -1)).flatten(2, 3)[:, :, : k.shape[2]]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


join_softmax(table_forward, table_backward, fixed=1)
