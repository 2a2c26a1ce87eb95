r"""Reformer: softmax among tokens that hash to the same bucket.

    x_i = q_i / |q_i|  is the key of token i,   bucket_r(i) = argmax [x_i R_r, -x_i R_r],   R_r [D, buckets / 2] random

    in round r, query i sees those of its bucket that are fewer than `window` members away, the order in a bucket being
    that of positions; causal: the window - 1 members before it. All rounds together:

    o_i = softmax over the union of the rounds' keys of  q_i.x_j,   itself only where it sees no one else

so similar vectors find each other at any distance. Time is L log L for the sort and linear else, memory linear. Queries
and keys are one vector: what the layer has for keys (projection, norm, short convolution) is frozen and not read.

Source:
    Kitaev et al. 2020, arXiv:2001.04451

Where we differ:
    The paper cuts the sorted sequence into chunks that see themselves and the one before. Where a chunk begins depends
    on every token, so the future leaks into whom a causal query sees, and padding changes it; members of the own bucket
    are counted instead, which the past alone decides. A pair that meets in several rounds counts once, exactly. The
    number of buckets does not follow the length. A query's own key is left out, not lowered by a constant. Hashing
    looks at vectors before rotary positions turn them, so a shift of positions keeps the buckets. A masked token is in
    no bucket, not even as a query: its row is 0.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.backends import implementation, resolve
from core.attention.blocked import full_precision
from core.attention.blocked.buckets import bucket_forward
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    Variant,
    accumulator,
    check_inputs,
    check_whole,
    hide,
    repeat_heads,
    visible,
)
from core.attention.registry import register
from core.attention.variants import softmax, window


def reference(q, k, v, codes, width, causal, key_mask) -> Attended:
    """The definition: v has as many heads as q; codes [B, H, rounds, L] are near for those who meet."""
    length = q.shape[2]
    seen = ((codes.unsqueeze(-1) - codes.unsqueeze(-2)).abs() < width).any(2)
    seen = seen & visible(length, length, causal=causal, key_mask=key_mask, device=q.device)
    itself = torch.eye(length, dtype=torch.bool, device=q.device)
    if key_mask is not None:
        itself, seen = itself & key_mask[:, None, None, :], seen & key_mask[:, None, :, None]
    others = seen & ~itself
    return softmax.reference(q, k, v, torch.where(others.any(-1, keepdim=True), others, itself), 1.0)


@implementation("reformer", "reference")
def _reference(q, k, v, order, codes, width, causal, key_mask) -> Attended:
    return reference(q, k, repeat_heads(v, q.shape[1]), codes, width, causal, key_mask)


@implementation("reformer", "torch")
def _torch(q, k, v, order, codes, width, causal, key_mask) -> Attended:
    out, mass = bucket_forward(q, k, v, order, codes, key_mask, width, causal, 1.0)
    alone = mass == -torch.inf
    if key_mask is not None:
        alone = alone & key_mask[:, None, :]
    own = (q.to(mass.dtype) * k.to(mass.dtype)).sum(-1)
    out = torch.where(alone.unsqueeze(-1), repeat_heads(v, q.shape[1]), out)
    return Attended(out, torch.where(alone, own, mass))


@register(
    "reformer",
    summary="softmax among tokens that hash alike, queries being keys; L log L",
    source="Kitaev et al. 2020, arXiv:2001.04451",
    pick="few keys matter to each query, and which is a matter of content",
    stability="unit keys, so scores stay within 1; rounds counted once each",
)
class ReformerAttention(Variant):
    """Softmax among tokens of the same bucket, over several rounds of hashing.

    Args:
        window: a query sees the window - 1 members of its bucket before it; two-sided also those after it.
        buckets: per round, even; about L / window keeps most of a bucket in sight.
        rounds: independent hashings; more find more of the similar tokens.
        seed: of the hash planes, which the state_dict keeps.
    """

    can = frozenset({"causal", "bidirectional", "mass"})
    positions = frozenset({"rope"})
    growth = "log-linear"
    unread = frozenset({"key", "key_norm", "convolutions.key"})

    planes: Tensor

    def __init__(self, heads: Heads, *, window: int = 64, buckets: int = 64, rounds: int = 4, seed: int = 0):
        super().__init__(heads)
        check_whole("window", window, 2, " (1 sees nobody)")
        check_whole("buckets", buckets, 2)
        check_whole("rounds", rounds)
        check_whole("seed", seed, 0)
        if buckets % 2:
            raise ValueError(f"buckets come in pairs, a direction and its opposite: must be even, got {buckets}")
        self.window, self.buckets, self.rounds = window, buckets, rounds
        generator = torch.Generator().manual_seed(seed)
        planes = torch.randn(heads.query, heads.width, rounds * (buckets // 2), generator=generator)
        self.register_buffer("planes", planes)

    def forward(
        self,
        q,
        k,
        v,
        *,
        causal=False,
        key_mask=None,
        rotary=None,
        slopes=None,
        dropout=0.0,
        return_mass=False,
        backend="auto",
        inputs=NO_INPUTS,
    ) -> Attended:
        check_inputs(q, k, v, key_mask)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"reformer's queries are its keys: L and M must agree, got L={q.shape[2]}, M={k.shape[2]}")
        q, v = hide(q, key_mask), hide(v, key_mask)
        unit = F.normalize(q.to(accumulator(q.dtype)), dim=-1, eps=1e-6)
        order, codes = self.hash(unit, key_mask)
        k = unit.to(q.dtype)
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        choice = resolve("reformer", backend, q.device.type, q.dtype, ())
        return choice.run(q, k, v, order, codes, self.window, causal, key_mask)

    @torch.no_grad()
    def hash(self, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(order, codes) int64 [B, H, rounds, L] of keys [B, H, L, D]; see `core.attention.blocked.buckets`."""
        with full_precision(k.device):
            side = (k @ self.planes.to(k.dtype)).unflatten(-1, (self.rounds, -1)).transpose(2, 3)
            bucket = torch.cat((side, -side), -1).argmax(-1)
        if key_mask is not None:
            bucket = torch.where(key_mask[:, None, None, :], bucket, self.buckets)
        bucket, order = bucket.sort(dim=-1, stable=True)
        rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return order, torch.zeros_like(order).scatter(-1, order, rank + bucket * self.window)

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h, rows = self.heads, batch * self.heads.query * length
        pairs = window.band_pairs(length, self.window, causal) - length
        sort = length * max(1, math.ceil(math.log2(max(2, length))))  # comparisons
        each = 2 * pairs * (h.width + h.value_width) + length * h.width * self.buckets + sort
        return Cost(
            flops=batch * h.query * self.rounds * each,
            bytes_moved=element_bytes * (rows * (h.width + h.value_width) + batch * h.key * length * h.value_width),
        )
