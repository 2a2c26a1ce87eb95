r"""Gated recurrences, one chunk of positions at a time, in memory linear in the length.

A state S [F, E] of keys and values is decayed, written and read at every position t, in this order:

    decay          S <- e^{g_t} S + k_t v_t^T                                      retention, SSD, mLSTM
    vector_decay   S <- Diag(e^{g_t}) S + k_t v_t^T                                GLA, RWKV-6
    delta          S <- e^{g_t} (I - beta_t k_t k_t^T) S + beta_t k_t v_t^T        delta, gated delta
    vector_delta   S <- (I - beta_t k_t k_t^T) Diag(e^{g_t}) S + beta_t k_t v_t^T  Kimi delta
    o_t = S^T q_t

with g_t <= 0 a number, or [F] in the vector kinds. Each is written once below, as what a chunk does to the state it
finds. With b the inclusive running sum of g in the chunk,

    A_ij = sum_f q_if k_jf e^{b_if - b_jf}  (j <= i),    O = (Q e^b) S + A X,    S <- e^{b_C} S + (K e^{b_C - b})^T X

where X = V without beta; with it, X solves (I + N) X = beta (V - (K e^b) S), N being beta times the part of A below the
diagonal with keys in place of queries. Every exponent is <= 0: e^{-b} alone would overflow float32 after a few strong
gates. A vector gate does not factor into one product without it, so A is built from sub-blocks of 16 rows, anchored at
their first row, and the diagonal ones element by element. Only a chunk whose gates add up to no more than `MILD`, the
usual case, is one product after all: e^{-b} is then a number that float32 holds with all its digits.

The backward goes through the chunks in reverse from the states kept at their borders, and differentiates the same
functions, so that each formula stands here once. g = 0 means exactly no decay.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.blocked import batches, full_precision
from core.attention.blocked.pairs import join, like
from core.attention.contract import accumulator

CHUNK = {"decay": 128, "vector_decay": 64, "delta": 64, "vector_delta": 64}
"""Positions per chunk; never keyed on the length."""

ROWS = 16
"""Rows of a sub-block of a vector gate."""

MILD = 40.0
"""Largest sum of a chunk's gates that may be undone: e^40 times any reasonable product stays far below 3e38."""


def scan(
    kind: str, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run a recurrence over the length.

    Args:
        kind: one of `CHUNK`.
        q: [B, H, L, F].   k: [B, K, L, F]; H is a multiple of K.   v: [B, K, L, E].
        gates: g [B, K, L] or, for vector kinds, [B, K, L, F], <= 0; then for delta kinds beta [B, K, L].
        state: [B, K, F, E] before the first position; None: zero.

    Returns:
        (o [B, H, L, E] and the last state, both float32, float64 for float64 inputs). Gradients flow to all inputs.
    """
    keys = k.shape[1]
    grouped = q.unflatten(1, (keys, q.shape[1] // keys))
    inputs = [grouped, *(x.unsqueeze(2) for x in (k, v))]
    inputs += [(gate if gate.dim() == 4 else gate.unsqueeze(-1)).unsqueeze(2) for gate in gates]
    if state is None:
        state = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=accumulator(q.dtype), device=q.device)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    out, end, _ = scan_forward(kind, inputs, state.unsqueeze(2), keep)
    return out.flatten(1, 2), end.squeeze(2)


def _below(b: Tensor) -> Tensor:
    """e^{b_i - b_j} for j <= i, else 0; b [..., C, 1]."""
    size = b.shape[-2]
    above = torch.ones(size, size, dtype=torch.bool, device=b.device).triu(1)
    return torch.exp((b - b.mT).masked_fill(above, -torch.inf))


def _scalar_products(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    return (q @ k.mT) * _below(b)


def _vector_products(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    size = b.shape[-2]
    rows = min(ROWS, size)
    blocks = size // rows
    q_in, k_in, b_in = (x.unflatten(-2, (blocks, rows)) for x in (q, k, b))
    above = torch.ones(rows, rows, dtype=torch.bool, device=b.device).triu(1).unsqueeze(-1)
    exponents = (b_in.unsqueeze(-2) - b_in.unsqueeze(-3)).masked_fill(above, -torch.inf)
    diagonal = ((q_in.unsqueeze(-2) * exponents.exp()) * k_in.unsqueeze(-3)).sum(-1)
    lines = []
    for n in range(blocks):
        at, end = n * rows, (n + 1) * rows
        parts = [diagonal[..., n, :, :]]
        if n:
            anchor = b[..., at : at + 1, :]
            left = (q[..., at:end, :] * (b[..., at:end, :] - anchor).exp()) @ (
                k[..., :at, :] * (anchor - b[..., :at, :]).exp()
            ).mT
            parts.insert(0, left)
        lines.append(F.pad(torch.cat(parts, -1), (0, size - end)))
    return torch.cat(lines, -2)


def _mild_products(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    return ((q * b.exp()) @ (k * (-b).exp()).mT).tril()


def _additive(products: Callable) -> Callable:
    def chunk(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        b = g.cumsum(-2)
        last = b[..., -1:, :]
        out = (q * b.exp()) @ s + products(q, k, b) @ v
        return out, s * last.exp().mT + (k * (last - b).exp()).mT @ v

    return chunk


def _delta(products: Callable) -> Callable:
    def chunk(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        b = g.cumsum(-2)
        last = b[..., -1:, :]
        coupling = (beta * products(k, k, b)).tril(-1)  # its diagonal, 1, is implied by unitriangular
        x = torch.linalg.solve_triangular(coupling, beta * (v - (k * b.exp()) @ s), upper=False, unitriangular=True)
        out = (q * b.exp()) @ s + products(q, k, b) @ x
        return out, s * last.exp().mT + (k * (last - b).exp()).mT @ x

    return chunk


_CHUNKS = {
    "decay": _additive(_scalar_products),
    "vector_decay": _additive(_vector_products),
    "delta": _delta(_scalar_products),
    "vector_delta": _delta(_vector_products),
    "vector_decay, mild": _additive(_mild_products),
    "vector_delta, mild": _delta(_mild_products),
}


def _function(kind: str, pieces: list[Tensor]) -> Callable:
    """What computes this chunk."""
    # On a GPU looking at the gates would wait for them; its chunks take the way that is always safe.
    if kind.startswith("vector") and pieces[3].device.type == "cpu" and pieces[3].sum(-2).min() >= -MILD:
        return _CHUNKS[f"{kind}, mild"]
    return _CHUNKS[kind]


def _chunk(kind: str, inputs: Sequence[Tensor], items: slice, at: int, end: int, acc: torch.dtype) -> list[Tensor]:
    """Positions at..end, widened; past 16 rows filled up to whole sub-blocks with zeros, which change nothing."""
    pieces = [x[items, :, :, at:end].to(acc) for x in inputs]
    missing = -(end - at) % ROWS if end - at > ROWS and kind.startswith("vector") else 0
    return [F.pad(x, (0, 0, 0, missing)) for x in pieces] if missing else pieces


def _spans(kind: str, length: int) -> list[tuple[int, int]]:
    size = CHUNK[kind]
    return [(at, min(at + size, length)) for at in range(0, length, size)]


def _items(kind: str, inputs: Sequence[Tensor]):
    q, _, v = inputs[:3]
    rows = min(q.shape[3], CHUNK[kind])
    widest = max(rows, v.shape[-1], q.shape[-1] * (ROWS if kind.startswith("vector") else 1))
    return batches(q.shape[0], q.shape[1] * q.shape[2] * rows * widest, q.device)


@torch.library.custom_op("longspan::scan_forward", mutates_args=())
def scan_forward(kind: str, inputs: Sequence[Tensor], state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, K, G, L, E], last state [B, K, 1, F, E], states before each chunk [N, B, K, 1, F, E] or none of them).

    inputs: q [B, K, G, L, F], k and v [B, K, 1, L, .], gates [B, K, 1, L, 1 or F].   keep: whether a backward follows.
    """
    q, v, acc = inputs[0], inputs[2], accumulator(inputs[0].dtype)
    spans = _spans(kind, q.shape[3])
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=acc, device=q.device)
    end = state.to(acc, copy=True, memory_format=torch.contiguous_format)
    borders = torch.empty(len(spans) if keep else 0, *state.shape, dtype=acc, device=q.device)
    with full_precision(q.device):
        for items in _items(kind, inputs):
            s = end[items]
            for n, (a, b) in enumerate(spans):
                if keep:
                    borders[n, items] = s
                pieces = _chunk(kind, inputs, items, a, b, acc)
                y, s = _function(kind, pieces)(s, *pieces)
                out[items, :, :, a:b] = y[..., : b - a, :]
            end[items] = s
    return out, end, borders


@torch.library.custom_op("longspan::scan_backward", mutates_args=())
def scan_backward(
    d_out: Tensor, d_end: Tensor | None, kind: str, inputs: Sequence[Tensor], borders: Tensor
) -> list[Tensor]:
    """Gradients of the inputs, then of the first state."""
    acc = borders.dtype
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    ds_all = torch.zeros(borders.shape[1:], dtype=acc, device=borders.device)
    if d_end is not None:
        ds_all += d_end
    with full_precision(borders.device):
        for items in _items(kind, inputs):
            ds = ds_all[items]
            for n, (a, b) in reversed(list(enumerate(_spans(kind, inputs[0].shape[3])))):
                pieces = _chunk(kind, inputs, items, a, b, acc)
                do = d_out[items, :, :, a:b].to(acc)
                do = F.pad(do, (0, 0, 0, pieces[0].shape[3] - (b - a)))
                # torch.func, because plain autograd does not record inside of an operator.
                pull = torch.func.vjp(_function(kind, pieces), borders[n, items], *pieces)[1]
                ds, *found = pull((do, ds))
                for grad, one in zip(grads, found):
                    grad[items, :, :, a:b] = one[..., : b - a, :]
            ds_all[items] = ds
    return [*grads, ds_all]


def _shapes(kind, inputs, state, keep):
    q, v, acc = inputs[0], inputs[2], accumulator(inputs[0].dtype)
    spans = (q.shape[3] + CHUNK[kind] - 1) // CHUNK[kind] if keep else 0
    out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=acc)
    return out, state.new_empty(state.shape, dtype=acc), state.new_empty(spans, *state.shape, dtype=acc)


def _gradient_shapes(d_out, d_end, kind, inputs, borders):
    return [*like(*inputs), borders.new_empty(borders.shape[1:])]


def _setup(ctx, inputs, output):
    ctx.kind, tensors, _, ctx.keep = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx, d_out, d_end, _d_borders):
    borders, *tensors = ctx.saved_tensors
    *grads, ds = scan_backward(d_out, d_end, ctx.kind, tensors, borders)
    return None, grads, ds, None


join(scan_forward, scan_backward, _shapes, _gradient_shapes, _setup, _backward)
