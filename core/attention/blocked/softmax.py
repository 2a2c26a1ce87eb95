"""Softmax attention with its log mass, one block of query rows at a time.

    s_ij = scale q_i.k_j + bias_ij - slope_h |i + M - L - j|
    log_mass_i = log sum_j exp s_ij,   o_i = sum_j exp(s_ij - log_mass_i) v_j

    backward:  P = exp(s - log_mass),  dS = P * (dO V^T - delta),  delta_i = <dO_i, O_i> - d log_mass_i

SDPA computes the same faster; this one also serves the mass and its gradient, masks together with `causal`, and ALiBi,
without an [L, M] mask. Forward and backward keep one block [B, H, rows, M].
"""

import torch
from torch import Tensor

from core.attention.blocked import batches, block_elements, full_precision
from core.attention.blocked.pairs import join, like
from core.attention.contract import accumulator


class _Scores:
    """The scores of a block of rows against all keys it may see, in the accumulator's precision."""

    def __init__(self, q: Tensor, k: Tensor, key_mask, bias, slopes, causal: bool, scale: float):
        self.q, self.key_mask, self.bias, self.slopes, self.causal, self.scale = (
            q,
            key_mask,
            bias,
            slopes,
            causal,
            scale,
        )
        self.acc = accumulator(q.dtype)
        self.k = k.to(self.acc)
        self.offset = k.shape[2] - q.shape[2]

    def seen(self, stop: int) -> int:
        """Number of leading keys that rows before `stop` may see."""
        keys = self.k.shape[2]
        return max(0, min(keys, stop + self.offset)) if self.causal else keys

    def rows(self, items: slice, start: int, stop: int) -> Tensor:
        """Scaled queries [b, K, G * rows, D]: the heads of a group side by side, so keys are never repeated."""
        q = self.q[items, :, start:stop].to(self.acc) * self.scale
        batch, _, rows, width = q.shape
        heads = self.k.shape[1]
        return q.reshape(batch, heads, -1, rows, width).flatten(2, 3)

    def block(self, items: slice, start: int, stop: int, seen: int) -> Tensor:
        """Scores [b, H, rows, seen], -inf where hidden."""
        q = self.rows(items, start, stop)
        s = (q @ self.k[items, :, :seen].transpose(-1, -2)).view(q.shape[0], -1, stop - start, seen)
        row = torch.arange(start, stop, device=s.device)[:, None] + self.offset
        key = torch.arange(seen, device=s.device)[None, :]
        if self.slopes is not None:
            s -= self.slopes.to(self.acc)[:, None, None] * (row - key).abs()
        if self.bias is not None:
            s += part(self.bias, items, start, stop, seen)
        if self.causal:
            s.masked_fill_(key > row, -torch.inf)
        if self.key_mask is not None:
            s.masked_fill_(~self.key_mask[items, None, None, :seen], -torch.inf)
        return s


def part(bias: Tensor, items: slice, start: int, stop: int, seen: int) -> Tensor:
    """The block of a bias [B or 1, H or 1, L or 1, M or 1] that belongs to these items, rows and keys."""
    bias = bias[items] if bias.shape[0] > 1 else bias
    bias = bias[:, :, start:stop] if bias.shape[2] > 1 else bias
    return bias[..., :seen] if bias.shape[3] > 1 else bias


def _blocks(q: Tensor, k: Tensor):
    """(items, start, stop) of every block; rows are chosen so that a block of scores stays in cache."""
    batch, heads, queries, _ = q.shape
    keys = max(1, k.shape[2])
    rows = max(16, min(queries, block_elements(q.device) // (heads * keys)))
    for items in batches(batch, heads * rows * keys, q.device):
        for start in range(0, queries, rows):
            yield items, start, min(queries, start + rows)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[b, H, rows, X] -> [b, K, G * rows, X]."""
    return x.unflatten(1, (heads, -1)).flatten(2, 3)


@torch.library.custom_op("longspan::softmax_forward", mutates_args=())
def softmax_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, E], log_mass [B, H, L]); see the head of this file."""
    batch, heads, queries, _ = q.shape
    acc = accumulator(q.dtype)
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=v.dtype, device=q.device)
    mass = torch.full((batch, heads, queries), -torch.inf, dtype=acc, device=q.device)
    with full_precision(q.device):
        scores, values = _Scores(q, k, key_mask, bias, slopes, causal, scale), v.to(acc)
        for items, start, stop in _blocks(q, k):
            seen = scores.seen(stop)
            if not seen:
                continue
            s = scores.block(items, start, stop, seen)
            log_mass = torch.logsumexp(s, dim=-1)
            p = s.sub_(torch.where(log_mass == -torch.inf, 0.0, log_mass).unsqueeze(-1)).exp_()
            o = _grouped(p, k.shape[1]) @ values[items, :, :seen]
            out[items, :, start:stop] = o.view(*p.shape[:3], -1)
            mass[items, :, start:stop] = log_mass
    return out, mass


@torch.library.custom_op("longspan::softmax_backward", mutates_args=())
def softmax_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mass: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    causal: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias); dbias is empty unless asked for."""
    acc = accumulator(q.dtype)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (k, v))
    db = torch.zeros(bias.shape if bias is not None and bias_grad else (0,), dtype=acc, device=q.device)
    with full_precision(q.device):
        scores, values = _Scores(q, k, key_mask, bias, slopes, causal, scale), v.to(acc)
        heads = k.shape[1]
        for items, start, stop in _blocks(q, k):
            seen = scores.seen(stop)
            if not seen:
                continue
            log_mass = mass[items, :, start:stop]
            p = scores.block(items, start, stop, seen)
            p.sub_(torch.where(log_mass == -torch.inf, 0.0, log_mass).unsqueeze(-1)).exp_()
            do = d_out[items, :, start:stop].to(acc)
            delta = (do * out[items, :, start:stop]).sum(-1, keepdim=True)
            if d_mass is not None:
                delta -= d_mass[items, :, start:stop].unsqueeze(-1)
            do = _grouped(do, heads)
            dv[items, :, :seen] += _grouped(p, heads).transpose(-1, -2) @ do
            dp = (do @ values[items, :, :seen].transpose(-1, -2)).view(p.shape)
            ds = dp.sub_(delta).mul_(p)
            if db.numel():
                block = part(db, items, start, stop, seen)
                block += ds.sum_to_size(block.shape)
            ds = _grouped(ds, heads)
            dk[items, :, :seen] += ds.transpose(-1, -2) @ scores.rows(items, start, stop)
            grad = (ds @ scores.k[items, :, :seen]).mul_(scale)
            dq[items, :, start:stop] = grad.view(p.shape[0], q.shape[1], stop - start, -1)
    return dq, dk.to(k.dtype), dv.to(v.dtype), db


def _shapes(q, k, v, key_mask, bias, slopes, causal, scale):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def _gradient_shapes(d_out, d_mass, q, k, v, out, mass, key_mask, bias, slopes, causal, scale, bias_grad):
    shape = bias.shape if bias is not None and bias_grad else (0,)
    return *like(q, k, v), q.new_empty(shape, dtype=accumulator(q.dtype))


def _setup(ctx, inputs, output):
    q, k, v, key_mask, bias, slopes, ctx.causal, ctx.scale = inputs
    ctx.bias_grad = bias is not None and bias.requires_grad
    ctx.save_for_backward(q, k, v, *output, key_mask, bias, slopes)


def _backward(ctx, d_out, d_mass):
    q, k, v, out, mass, key_mask, bias, slopes = ctx.saved_tensors
    dq, dk, dv, db = softmax_backward(
        d_out, d_mass, q, k, v, out, mass, key_mask, bias, slopes, ctx.causal, ctx.scale, ctx.bias_grad
    )
    return dq, dk, dv, None, db.to(bias.dtype) if ctx.bias_grad else None, None, None, None


join(softmax_forward, softmax_backward, _shapes, _gradient_shapes, _setup, _backward)
