"""Softmax under sparse patterns that become plain or windowed softmax once positions are rearranged.

A pattern is a list of parts with disjoint key sets. Each part rearranges rows and columns, runs one of the operations
of this package, and puts the results back; the parts' masses say how to add them up. The backward needs no part's own
result: with the weights P = exp(s - log_mass) of the union, each part's share of the gradient is its operation's
backward, given the output and the mass of the whole. So nothing but those two is kept.

    dilated   every class of positions modulo `step`, as a sequence, under a window of `size`
    strided   the window of `step`, and the rest of the own class modulo `step`
    blocks    the own block of `step`
    fixed     the own block of `step`, and the last `size` positions of every other (causal: earlier) block
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.blocked import full_precision
from core.attention.blocked.pairs import join_softmax
from core.attention.blocked.softmax import softmax_backward, softmax_forward
from core.attention.blocked.window import window_backward, window_forward
from core.attention.contract import Attended, accumulator, merge


class _Band:
    """A plain window of `size`."""

    def __init__(self, queries: int, keys: int, size: int, causal: bool):
        self.size, self.causal = size, causal

    def rows(self, x: Tensor) -> Tensor:
        """x [B, H, L, X], zero where something is added, as the operation takes it."""
        return x

    def columns(self, x: Tensor) -> Tensor:
        """The same for keys [B, K, M, X]."""
        return x

    def from_rows(self, x: Tensor) -> Tensor:
        """The transpose of `rows`, and its inverse."""
        return x

    def from_columns(self, x: Tensor) -> Tensor:
        """The transpose of `columns`."""
        return x

    def forward(self, q, k, v, mask, slopes, scale):
        return window_forward(q, k, v, mask, slopes, self.size, self.causal, scale)

    def backward(self, *saved, scale):
        return window_backward(*saved, self.size, self.causal, scale)


class _Classes(_Band):
    """Every class of positions modulo `step`, counted from the end, as a sequence under a window of `size`."""

    def __init__(self, queries: int, keys: int, size: int, step: int, causal: bool):
        super().__init__(queries, keys, size, causal)
        self.queries, self.keys, self.step = queries, keys, step

    def rows(self, x):
        x = F.pad(x, (0, 0, -x.shape[2] % self.step, 0)).unflatten(2, (-1, self.step))
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def columns(self, x):
        return _Classes.rows(self, x)

    def from_rows(self, x):
        return self._joined(x, self.queries)

    def from_columns(self, x):
        return self._joined(x, self.keys)

    def _joined(self, x: Tensor, length: int) -> Tensor:
        x = x.unflatten(0, (-1, self.step)).movedim(1, 3).flatten(2, 3)
        return x[:, :, x.shape[2] - length :]

    def forward(self, q, k, v, mask, slopes, scale):
        return super().forward(q, k, v, mask, None if slopes is None else slopes * self.step, scale)

    def backward(self, *saved, scale):
        *tensors, slopes = saved
        return super().backward(*tensors, None if slopes is None else slopes * self.step, scale=scale)


class _Past(_Classes):
    """The keys of the own class before the own position: causal softmax over keys delayed by one."""

    def columns(self, x):
        return F.pad(super().columns(x), (0, 0, 1, -1))

    def from_columns(self, x):
        return super().from_columns(F.pad(x, (0, 0, -1, 1)))

    def forward(self, q, k, v, mask, slopes, scale):
        return softmax_forward(q, k, v, mask, None, slopes, True, scale)

    def backward(self, *saved, scale):
        *tensors, slopes = saved
        return softmax_backward(*tensors, None, slopes, True, scale, False)[:3]


class _Future(_Past):
    """The keys of the own class after the own position: the past of the reversed sequences."""

    def rows(self, x):
        return super().rows(x).flip(2)

    def columns(self, x):
        return F.pad(_Classes.columns(self, x).flip(2), (0, 0, 1, -1))

    def from_rows(self, x):
        return super().from_rows(x.flip(2))

    def from_columns(self, x):
        return _Classes.from_columns(self, F.pad(x, (0, 0, -1, 1)).flip(2))


class _Blocks(_Band):
    """Softmax inside blocks of `step`, counted from the start; queries are the last ones."""

    def __init__(self, queries: int, keys: int, step: int, causal: bool):
        super().__init__(queries, keys, step, causal)
        self.queries, self.keys, self.step = queries, keys, step
        self.first = (keys - queries) // step  # block of the first query
        self.before = keys - queries - self.first * step
        self.after = -keys % step

    def rows(self, x):
        x = F.pad(x, (0, 0, self.before, self.after)).unflatten(2, (-1, self.step))
        return x.transpose(1, 2).flatten(0, 1)

    def columns(self, x):
        x = F.pad(x, (0, 0, -self.first * self.step, self.after)).unflatten(2, (-1, self.step))
        return x.transpose(1, 2).flatten(0, 1)

    def from_rows(self, x):
        x = x.unflatten(0, (-1, (self.before + self.queries + self.after) // self.step))
        return x.transpose(1, 2).flatten(2, 3)[:, :, self.before : self.before + self.queries]

    def from_columns(self, x):
        x = x.unflatten(0, (-1, (self.keys + self.after) // self.step - self.first)).transpose(1, 2).flatten(2, 3)
        return F.pad(x, (0, 0, self.first * self.step, -self.after))

    def forward(self, q, k, v, mask, slopes, scale):
        return softmax_forward(q, k, v, mask, None, slopes, self.causal, scale)

    def backward(self, *saved, scale):
        *tensors, slopes = saved
        return softmax_backward(*tensors, None, slopes, self.causal, scale, False)[:3]


class _Summaries(_Blocks):
    """The last `size` positions of other blocks: the rows of a block become heads, for they all see the same keys."""

    def __init__(self, queries: int, keys: int, size: int, step: int, causal: bool):
        super().__init__(queries, keys, step, causal)
        self.size = size

    def rows(self, x):
        x = F.pad(x, (0, 0, self.before, self.after)).unflatten(2, (-1, self.step))
        return x.transpose(2, 3).flatten(1, 2)

    def columns(self, x):
        return F.pad(x, (0, 0, 0, self.after)).unflatten(2, (-1, self.step))[:, :, :, -self.size :].flatten(2, 3)

    def from_rows(self, x):
        x = x.unflatten(1, (-1, self.step)).transpose(2, 3).flatten(2, 3)
        return x[:, :, self.before : self.before + self.queries]

    def from_columns(self, x):
        x = F.pad(x.unflatten(2, (-1, self.size)), (0, 0, self.step - self.size, 0)).flatten(2, 3)
        return x[:, :, : self.keys]

    def bias(self, q: Tensor, k: Tensor) -> Tensor:
        """[1, 1, blocks, summaries]: below the size of q itself up to a million positions of usual widths."""
        row = torch.arange(q.shape[2], device=q.device)[:, None] + self.first
        block = torch.arange(k.shape[2], device=q.device)[None, :] // self.size
        hidden = block >= row if self.causal else block == row
        bias = torch.zeros(hidden.shape, dtype=accumulator(q.dtype), device=q.device)
        return bias.masked_fill_(hidden, -torch.inf)[None, None]

    def forward(self, q, k, v, mask, slopes, scale):
        return softmax_forward(q, k, v, mask, self.bias(q, k), None, False, scale)

    def backward(self, *saved, scale):
        q, k = saved[2:4]
        return softmax_backward(*saved[:-1], self.bias(q, k), None, False, scale, False)[:3]


def _parts(q: Tensor, k: Tensor, pattern: str, size: int, step: int, causal: bool) -> list[_Band]:
    queries, keys = q.shape[2], k.shape[2]
    if pattern == "dilated":
        return [_Classes(queries, keys, size, step, causal)]
    if keys <= step:  # one block, one member of every class: no other part, and no room to fill up
        return [_Blocks(queries, keys, keys, causal)]
    if pattern == "strided":
        parts: list[_Band] = [_Band(queries, keys, step, causal), _Past(queries, keys, 0, step, True)]
        return parts if causal else [*parts, _Future(queries, keys, 0, step, True)]
    if pattern == "blocks":
        return [_Blocks(queries, keys, step, causal)]
    return [_Blocks(queries, keys, step, causal), _Summaries(queries, keys, size, step, causal)]


def _columns(part: _Band, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """The rearranged key mask; what a rearrangement adds is masked."""
    if key_mask is None:
        key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    return part.columns(key_mask[:, None, :, None])[:, 0, :, 0]


@torch.library.custom_op("longspan::pattern_forward", mutates_args=())
def pattern_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    pattern: str,
    size: int,
    step: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, E], log_mass [B, H, L]); slopes only for "dilated" and "blocks". See the head of this file."""
    if 0 in (*q.shape, k.shape[2]):
        mass = torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)
        return torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device), mass
    results = []
    with full_precision(q.device):
        for part in _parts(q, k, pattern, size, step, causal):
            tensors = part.rows(q), part.columns(k), part.columns(v), _columns(part, k, key_mask)
            out, mass = part.forward(*tensors, slopes, scale)
            results.append(Attended(part.from_rows(out), part.from_rows(mass.unsqueeze(-1)).squeeze(-1)))
        out, mass = merge(*results)
    assert mass is not None
    return out.contiguous(), mass.contiguous()


@torch.library.custom_op("longspan::pattern_backward", mutates_args=())
def pattern_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mass: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    pattern: str,
    size: int,
    step: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    acc = accumulator(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (q, k, v))
    if 0 not in (*q.shape, k.shape[2]):
        with full_precision(q.device):
            for part in _parts(q, k, pattern, size, step, causal):
                d = None if d_mass is None else part.rows(d_mass.unsqueeze(-1)).squeeze(-1)
                given = part.rows(q), part.columns(k), part.columns(v), part.rows(out)
                whole = part.rows(mass.unsqueeze(-1)).squeeze(-1)
                mask = _columns(part, k, key_mask)
                grads = part.backward(part.rows(d_out), d, *given, whole, mask, slopes, scale=scale)
                dq += part.from_rows(grads[0])
                dk += part.from_columns(grads[1])
                dv += part.from_columns(grads[2])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


join_softmax(pattern_forward, pattern_backward, fixed=2)
