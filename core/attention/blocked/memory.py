r"""A memory of key-value sums that is read by whole segments and written after each, in memory linear in the length.

A state S [F, E + 1], whose last column sums the keys' features alone, meets every segment of `size` positions with

    read     A_i = f_i S_{:, :E} / f_i S_{:, E},   0 while the memory is empty
    write    S <- S + sum_j g_j [x_j, 1]^T,        x_j = v_j, or v_j - A(g_j) with `delta`

f and g being features of queries and keys. A segment that is not complete is read for but not written. The backward
goes through the segments in reverse from the states kept at their borders, and differentiates the same functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.blocked import full_precision
from core.attention.blocked.pairs import join, like
from core.attention.contract import accumulator


def read(s: Tensor, f: Tensor) -> Tensor:
    """What a memory s [.., F, E + 1] holds for features f [.., n, F]: [.., n, E]."""
    y = f @ s
    total = y[..., -1:]
    return y[..., :-1] / torch.where(total == 0, 1.0, total)


def write(s: Tensor, g: Tensor, v: Tensor, delta: bool) -> Tensor:
    """The memory after keys with features g [.., n, F] and values v [.., n, E]."""
    return s + g.mT @ F.pad(v - read(s, g) if delta else v, (0, 1), value=1.0)


def _segment(s: Tensor, f: Tensor, g: Tensor, v: Tensor, *, delta: bool, whole: bool) -> tuple[Tensor, Tensor]:
    return read(s, f), write(s, g, v, delta) if whole else s.clone()


def _spans(length: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, length)) for at in range(0, length, size)]


@torch.library.custom_op("longspan::memory_forward", mutates_args=())
def memory_forward(
    f: Tensor, g: Tensor, v: Tensor, state: Tensor, size: int, delta: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(A [B, K, G, L, E], last state [B, K, 1, F, E + 1], states before each segment [N, ...] or none of them).

    f: [B, K, G, L, F].   g and v: [B, K, 1, L, .].   keep: whether a backward follows.
    """
    acc = accumulator(f.dtype)
    spans = _spans(f.shape[3], size)
    out = torch.zeros(*f.shape[:-1], v.shape[-1], dtype=acc, device=f.device)
    borders = torch.empty(len(spans) if keep else 0, *state.shape, dtype=acc, device=f.device)
    s = state.to(acc, copy=True, memory_format=torch.contiguous_format)
    with full_precision(f.device):
        for n, (a, b) in enumerate(spans):
            if keep:
                borders[n] = s
            pieces = (x[:, :, :, a:b].to(acc) for x in (f, g, v))
            out[:, :, :, a:b], s = _segment(s, *pieces, delta=delta, whole=b - a == size)
    return out, s, borders


@torch.library.custom_op("longspan::memory_backward", mutates_args=())
def memory_backward(
    d_out: Tensor, d_end: Tensor, f: Tensor, g: Tensor, v: Tensor, borders: Tensor, size: int, delta: bool
) -> list[Tensor]:
    """Gradients of f, g, v and of the first state."""
    acc = borders.dtype
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (f, g, v)]
    ds = d_end.to(acc, copy=True, memory_format=torch.contiguous_format)
    with full_precision(f.device):
        for n, (a, b) in reversed(list(enumerate(_spans(f.shape[3], size)))):

            def segment(s, f, g, v, whole=b - a == size):
                return _segment(s, f, g, v, delta=delta, whole=whole)

            pieces = (x[:, :, :, a:b].to(acc) for x in (f, g, v))
            # torch.func, because plain autograd does not record inside of an operator.
            pull = torch.func.vjp(segment, borders[n], *pieces)[1]
            ds, *found = pull((d_out[:, :, :, a:b].to(acc), ds))
            for grad, one in zip(grads, found):
                grad[:, :, :, a:b] = one
    return [*grads, ds]


def _shapes(f, g, v, state, size, delta, keep):
    acc = accumulator(f.dtype)
    spans = (f.shape[3] + size - 1) // size if keep else 0
    out = f.new_empty(*f.shape[:-1], v.shape[-1], dtype=acc)
    return out, state.new_empty(state.shape, dtype=acc), state.new_empty(spans, *state.shape, dtype=acc)


def _gradient_shapes(d_out, d_end, f, g, v, borders, size, delta):
    return [*like(f, g, v), borders.new_empty(borders.shape[1:])]


def _setup(ctx, inputs, output):
    f, g, v, _, ctx.size, ctx.delta, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(f, g, v, output[2])


def _backward(ctx, d_out, d_end, _d_borders):
    return *memory_backward(d_out, d_end, *ctx.saved_tensors, ctx.size, ctx.delta), None, None, None


join(memory_forward, memory_backward, _shapes, _gradient_shapes, _setup, _backward)
