r"""Attention as it began: a learned score per pair of positions, and softmax over the keys.

    additive        s_ij = w_h^T tanh(W_q q_i + b_h + W_k k_j)         W_q, W_k [D, A], w_h and b_h [A]
    luong dot       s_ij = q_i.k_j
    luong general   s_ij = q_i^T W_h k_j                               W_h [D, D]
    luong concat    s_ij = w_h^T tanh(W [q_i; k_j])                    = additive without its bias
    o_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij),    log_mass_i = log sum_j exp(s_ij)

Time L M (the tanh ones A times that), memory linear: no [L, M, A] tensor is kept, forward or backward. The decoding
state is the cache of values and of keys, which for the tanh scores are projected once.

Source:
    Bahdanau et al. 2015, arXiv:1409.0473 (additive); Luong et al. 2015, arXiv:1508.04025 (multiplicative, concat)

Where we differ:
    Both papers attend from one decoder state to one encoder; here every head of a layer has its own score, for self-
    and cross-attention alike. The scale is 1 as in the papers, not 1/sqrt(D): dot and general start sharper than
    softmax attention. Keys shared by several query heads share W_k. `general` starts as `dot` (W_h = identity).
"""

import torch
from torch import Tensor, nn

from core.attention.backends import implementation, resolve
from core.attention.blocked.additive import additive_forward
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    State,
    Variant,
    hide,
    repeat_heads,
    visible,
)
from core.attention.positions import alibi_bias
from core.attention.registry import nearest, register
from core.attention.ring import empty_ring, extend_ring
from core.attention.variants import softmax

SCORES = ("dot", "general", "concat")


def reference(a, c, w, v, seen, bias=None) -> Attended:
    """The definition, dense: projected queries a [B, H, L, A] and keys c [B, H, M, A], w [H, A], seen bool."""
    s = (torch.tanh(a.unsqueeze(3) + c.unsqueeze(2)) * w[:, None, None]).sum(-1)
    s = (s if bias is None else s + bias).masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    mass = torch.logsumexp(s.masked_fill(empty, 0.0), dim=-1, keepdim=True).masked_fill(empty, -torch.inf)
    return Attended(p.to(v.dtype) @ v, mass.squeeze(-1))


def attend(a, c, w, v, *, causal=False, key_mask=None, slopes=None, backend="auto") -> Attended:
    """Additive attention from projected queries a [B, H, L, A] and keys c [B, K, M, A]; always with its mass."""
    choice = resolve("additive", backend, v.device.type, v.dtype, ())
    return choice.run(a, hide(c, key_mask), w, hide(v, key_mask), causal, key_mask, slopes)


@implementation("additive", "reference")
def _reference(a, c, w, v, causal, key_mask, slopes) -> Attended:
    seen = visible(a.shape[2], c.shape[2], causal=causal, key_mask=key_mask, device=a.device)
    bias = None if slopes is None else alibi_bias(slopes.to(a.dtype), a.shape[2], c.shape[2])
    return reference(a, repeat_heads(c, a.shape[1]), w, repeat_heads(v, a.shape[1]), seen, bias)


@implementation("additive", "torch")
def _torch(a, c, w, v, causal, key_mask, slopes) -> Attended:
    return Attended(*additive_forward(a, c, w, v, key_mask, slopes, causal))


class AdditiveScore(nn.Module):
    """w^T tanh(W_q q + b + W_k k), one set of weights per head.

    Args:
        heads: head geometry.
        hidden: A; None: the head width.
        bias: whether there is a b.
    """

    def __init__(self, heads: Heads, hidden: int | None, *, bias: bool):
        super().__init__()
        if hidden is not None and (isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1):
            raise ValueError(f"hidden must be a whole number of at least 1, or None for the head width, got {hidden!r}")
        self.width = heads.width if hidden is None else hidden
        self.query = nn.Parameter(torch.empty(heads.query, heads.width, self.width))
        self.key = nn.Parameter(torch.empty(heads.key, heads.width, self.width))
        self.weight = nn.Parameter(torch.randn(heads.query, self.width) * self.width**-0.5)
        self.bias = nn.Parameter(torch.zeros(heads.query, self.width)) if bias else None
        for table in (self.query, self.key):
            for one in table:
                nn.init.xavier_uniform_(one.data)
        self.pair_flops = 4 * self.width  # add, tanh, multiply-add

    def queries(self, q: Tensor) -> Tensor:
        """W_q q + b, [B, H, L, A]."""
        a = q @ self.query
        return a if self.bias is None else a + self.bias[:, None]

    def keys(self, k: Tensor) -> Tensor:
        """W_k k, [B, K, M, A]."""
        return k @ self.key

    def attend(self, a: Tensor, c: Tensor, v: Tensor, *, dropout=0.0, return_mass=False, **options) -> Attended:
        """Softmax over the scores; the layer has refused dropout, and the mass comes for nothing."""
        return attend(a, c, self.weight, v, **options)

    def cost(self, batch: int, length: int, keys: int) -> Cost:
        """Cost of the projections."""
        flops = 2 * batch * (length * self.query.numel() + keys * self.key.numel())
        return Cost(flops=flops, parameters=sum(p.numel() for p in self.parameters()))


class DotScore(nn.Module):
    """q^T k, or q^T W k with one W [D, D] per query head, which is folded into q."""

    def __init__(self, heads: Heads, *, general: bool):
        super().__init__()
        self.width, self.pair_flops = heads.width, 2 * heads.width
        self.between = nn.Parameter(torch.eye(heads.width).repeat(heads.query, 1, 1)) if general else None

    def queries(self, q: Tensor) -> Tensor:
        """W^T q, [B, H, L, D]."""
        return q if self.between is None else q @ self.between

    def keys(self, k: Tensor) -> Tensor:
        """The keys themselves."""
        return k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Attended:
        """Softmax attention of scale 1."""
        return softmax.attend(q.to(v.dtype), k.to(v.dtype), v, scale=1.0, **options)

    def cost(self, batch: int, length: int, keys: int) -> Cost:
        """Cost of folding W into the queries."""
        size = 0 if self.between is None else self.between.numel()
        return Cost(flops=2 * batch * length * size, parameters=size)


class _Scored(Variant):
    """Softmax over a learned score; the decoding state is the cache of prepared keys and of values."""

    can = frozenset({"causal", "bidirectional", "cross", "recurrent", "mass"})
    growth = "quadratic"

    def __init__(self, heads: Heads, score: AdditiveScore | DotScore):
        super().__init__(heads)
        self.score = score

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
        options = {"causal": causal, "key_mask": key_mask, "slopes": slopes, "backend": backend}
        options |= {"dropout": dropout, "return_mass": return_mass}
        return self.score.attend(*self._prepare(q, hide(k, key_mask), rotary), v, **options)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        h = self.heads
        return empty_ring(Heads(h.query, h.key, self.score.width, h.value_width), batch, 0, device, dtype)

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        q, k = self._prepare(q, hide(k, key_mask), rotary)
        new = extend_ring(state, k, v, key_mask)
        options = {"key_mask": new["mask"], "slopes": slopes, "backend": backend}
        return self.score.attend(q, new["keys"], new["values"], causal=True, **options), new

    def remember(self, k, v, *, key_mask=None, backend="auto") -> State:
        return super().remember(self.score.keys(hide(k, key_mask)), v, key_mask=key_mask)

    def recall(self, q, state: State, *, backend="auto", inputs=NO_INPUTS) -> Attended:
        options = {"key_mask": state.get("mask"), "backend": backend}
        return self.score.attend(self.score.queries(q), state["keys"], state["values"], **options)

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        keys = length if keys is None else keys
        h = self.heads
        seen = (keys - (length - 1) / 2) if causal else keys  # mean over the queries, bottom-right aligned
        cache = keys * (h.key * element_bytes * (self.score.width + h.value_width) + 1)
        return self.score.cost(batch, length, keys) + Cost(
            flops=round(batch * h.query * length * seen * (self.score.pair_flops + 2 * h.value_width)),
            bytes_moved=batch * element_bytes * (h.query * length + h.key * keys) * (h.width + h.value_width),
            state_bytes=batch * cache if causal else 0,
        )

    def _prepare(self, q: Tensor, k: Tensor, rotary) -> tuple[Tensor, Tensor]:
        q, k = self.score.queries(q), self.score.keys(k)
        return (q, k) if rotary is None else (rotary[0](q), rotary[1](k))


@register(
    "additive",
    summary="scores from a small network, w.tanh(W q + W k); the first attention, quadratic",
    source="Bahdanau et al. 2015, arXiv:1409.0473",
    pick="you reproduce or compare with the first encoder-decoders",
    stability="scores are bounded by the sum of |w|",
)
class AdditiveAttention(_Scored):
    """Softmax over the scores of a one-layer network per head.

    Args:
        hidden: A, the network's width; None: the head width.
    """

    positions = frozenset({"alibi"})

    def __init__(self, heads: Heads, *, hidden: int | None = None):
        super().__init__(heads, AdditiveScore(heads, hidden, bias=True))


@register(
    "luong",
    summary="softmax over unscaled scores: q.k, q.W k or w.tanh(W [q; k]); quadratic",
    source="Luong et al. 2015, arXiv:1508.04025",
    pick="you reproduce or compare with recurrent encoder-decoders",
    stability="unscaled scores: large widths want qk_norm",
)
class LuongAttention(_Scored):
    """Softmax over one of Luong's three scores.

    Args:
        score: "dot", "general" or "concat"; concat goes neither with dropout nor with rotary positions.
    """

    can = _Scored.can | {"dropout"}
    positions = frozenset({"rope", "alibi"})

    def __init__(self, heads: Heads, *, score: str = "general"):
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}{nearest(score, SCORES)}; known: {', '.join(SCORES)}")
        if score == "concat":
            super().__init__(heads, AdditiveScore(heads, None, bias=False))
            self.can, self.positions = _Scored.can, AdditiveAttention.positions
        else:
            super().__init__(heads, DotScore(heads, general=score == "general"))
