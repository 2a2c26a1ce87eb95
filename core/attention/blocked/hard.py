"""Hard attention: one key per query, a block of query rows at a time, with the gradients of two estimators.

    s_ij as in softmax;   c_i = argmax_j (s_ij + g_ij);   o_i = v_{c_i}      g Gumbel noise, or 0

so that with noise c_i is a draw from p_i = softmax_j(s_ij). On request also log p_i(c_i) and the entropy of p_i.

    straight      dS = y * (dO V^T - <y, dO V^T>) / tau,   y = softmax_j((s_ij + g_ij) / tau)      straight-through
    log p(c)      dS = d (onehot(c) - p)
    entropy       dS = -d p (log p + entropy)

The noise of a pair is a hash of the seed and the pair's number, so the backward computes it again, and neither blocks
nor devices change it. Forward and backward keep one block [B, H, rows, M].
"""

import torch
from torch import Tensor

from core.attention.blocked import full_precision
from core.attention.blocked.pairs import join, like
from core.attention.blocked.softmax import _blocks, _grouped, _Scores
from core.attention.contract import accumulator


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


GOLDEN, FIRST, SECOND = (_signed(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Multipliers of SplitMix64 (Steele et al. 2014), as int64."""


def gumbel(seed: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    """Gumbel noise of the pairs numbered `at` (int64), from SplitMix64; 23 bits, so that float32 never rounds to 1."""

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)  # int64's own shift copies the sign

    z = seed + at * GOLDEN
    z = (z ^ shifted(z, 30)) * FIRST
    z = (z ^ shifted(z, 27)) * SECOND
    uniform = (shifted(z ^ shifted(z, 31), 41).to(dtype) + 0.5) * 2.0**-23
    return uniform.log_().neg_().log_().neg_()


def numbers(items: slice, heads: int, rows: slice, keys: int, sizes: tuple[int, int], device) -> Tensor:
    """The number of each pair of a block, [b, H, rows, keys]; sizes: all queries, all keys."""
    queries, total = sizes
    at = torch.arange(items.start, items.stop, device=device)[:, None] * heads + torch.arange(heads, device=device)
    at = at[:, :, None] * queries + torch.arange(rows.start, rows.stop, device=device)
    return at[..., None] * total + torch.arange(keys, device=device)


class _Choices:
    """Scores of a block, with and without noise."""

    def __init__(self, q, k, key_mask, slopes, seed, causal, scale):
        self.scores = _Scores(q, k, key_mask, None, slopes, causal, scale)
        self.seed, self.heads, self.sizes = seed, q.shape[1], (q.shape[2], k.shape[2])

    def block(self, items: slice, start: int, stop: int, seen: int) -> tuple[Tensor, Tensor]:
        s = self.scores.block(items, start, stop, seen)
        if self.seed is None:
            return s, s
        at = numbers(items, self.heads, slice(start, stop), seen, self.sizes, s.device)
        return s, s + gumbel(self.seed, at, s.dtype)


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(x == -torch.inf, 0.0)


@torch.library.custom_op("longspan::hard_forward", mutates_args=())
def hard_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    temperature: Tensor,
    causal: bool,
    scale: float,
    straight: bool,
    measure: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [B, H, L, E], chosen key or -1 [B, H, L], its log probability, entropy); the last two empty if not asked."""
    acc = accumulator(q.dtype)
    shape = q.shape[:3]
    out = torch.zeros(*shape, v.shape[3], dtype=v.dtype, device=q.device)
    chosen = torch.full(shape, -1, dtype=torch.int64, device=q.device)
    log_prob, entropy = (torch.zeros(shape if measure else (0,), dtype=acc, device=q.device) for _ in range(2))
    with full_precision(q.device):
        choices = _Choices(q, k, key_mask, slopes, seed, causal, scale)
        for items, start, stop in _blocks(q, k):
            seen = choices.scores.seen(stop)
            if not seen:
                continue
            s, noisy = choices.block(items, start, stop, seen)
            best, index = noisy.max(-1)
            real = best > -torch.inf
            by_key = _grouped(index.unsqueeze(-1), k.shape[1]).expand(-1, -1, -1, v.shape[3])
            picked = v[items].gather(2, by_key).view(*index.shape, -1)
            out[items, :, start:stop] = torch.where(real.unsqueeze(-1), picked, 0.0)
            chosen[items, :, start:stop] = torch.where(real, index, -1)
            if measure:
                log_mass = _finite(torch.logsumexp(s, -1))
                p = torch.exp(s - log_mass.unsqueeze(-1))
                log_prob[items, :, start:stop] = _finite(s.gather(-1, index.unsqueeze(-1)).squeeze(-1)) - log_mass
                entropy[items, :, start:stop] = log_mass - (p * _finite(s)).sum(-1)
    return out, chosen, log_prob, entropy


@torch.library.custom_op("longspan::hard_backward", mutates_args=())
def hard_backward(
    d_out: Tensor,
    d_log_prob: Tensor | None,
    d_entropy: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    entropy: Tensor,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    temperature: Tensor,
    causal: bool,
    scale: float,
    straight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    acc = accumulator(q.dtype)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=acc, device=x.device) for x in (k, v))
    with full_precision(q.device):
        choices, values = _Choices(q, k, key_mask, slopes, seed, causal, scale), v.to(acc)
        heads, tau = k.shape[1], temperature.to(acc)
        for items, start, stop in _blocks(q, k):
            seen = choices.scores.seen(stop)
            if not seen:
                continue
            s, noisy = choices.block(items, start, stop, seen)
            index = chosen[items, :, start:stop].unsqueeze(-1)
            # Times this, and not added at an index, so that equal choices add up in a fixed order.
            one_hot = torch.zeros_like(s).scatter_(-1, index.clamp(min=0), (index >= 0).to(acc))
            do = _grouped(d_out[items, :, start:stop].to(acc), heads)
            dv[items, :, :seen] += _grouped(one_hot, heads).mT @ do
            ds = torch.zeros_like(s)
            if straight:
                y = torch.softmax(noisy / tau, -1).nan_to_num_(nan=0.0)  # a row without a key
                dy = (do @ values[items, :, :seen].mT).view(s.shape)
                ds += y * (dy - (y * dy).sum(-1, keepdim=True)) / tau
            if d_log_prob is not None or d_entropy is not None:
                log_p = s - _finite(torch.logsumexp(s, -1, keepdim=True))
                p = log_p.exp()
                if d_log_prob is not None:
                    ds += d_log_prob[items, :, start:stop].unsqueeze(-1) * (one_hot - p)
                if d_entropy is not None:
                    level = entropy[items, :, start:stop].unsqueeze(-1)
                    ds -= d_entropy[items, :, start:stop].unsqueeze(-1) * p * (_finite(log_p) + level)
            ds = _grouped(ds, heads)
            dk[items, :, :seen] += ds.mT @ choices.scores.rows(items, start, stop)
            grad = (ds @ choices.scores.k[items, :, :seen]).mul_(scale)
            dq[items, :, start:stop] = grad.view(s.shape[0], q.shape[1], stop - start, -1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _shapes(q, k, v, key_mask, slopes, seed, temperature, causal, scale, straight, measure):
    shape = q.shape[:3]
    measured = shape if measure else (0,)
    return (
        v.new_empty(*shape, v.shape[3]),
        q.new_empty(shape, dtype=torch.int64),
        q.new_empty(measured, dtype=accumulator(q.dtype)),
        q.new_empty(measured, dtype=accumulator(q.dtype)),
    )


def _gradient_shapes(d_out, d_log_prob, d_entropy, q, k, v, *_):
    return like(q, k, v)


def _setup(ctx, inputs, output):
    q, k, v, key_mask, slopes, seed, temperature, ctx.causal, ctx.scale, ctx.straight, ctx.measure = inputs
    _, chosen, _, entropy = output
    ctx.mark_non_differentiable(chosen)
    ctx.save_for_backward(q, k, v, chosen, entropy, key_mask, slopes, seed, temperature)


def _backward(ctx, d_out, _d_chosen, d_log_prob, d_entropy):
    measured = (d_log_prob, d_entropy) if ctx.measure else (None, None)
    grads = hard_backward(d_out, *measured, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.straight)
    return *grads, *([None] * 8)


join(hard_forward, hard_backward, _shapes, _gradient_shapes, _setup, _backward)
