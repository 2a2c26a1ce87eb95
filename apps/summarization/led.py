"""The two attentions of LED, classes of their own in transformers, with a variant of our core inside (extra `hf`).

    local token   its variant over the local tokens, merged with exact attention to the global ones
    global token  exact attention to all tokens, by LED's second set of projections

so that LED's own attention is the variant "window" here. LED was trained with its first token global, and its output
falls apart without; `StockWriter` marks it. A variant without a mass cannot be merged: there a local token sees the
global ones as it sees any other.

Source:
    Beltagy et al. 2020, arXiv:2004.05150
"""

from typing import Any

import torch
from torch import Tensor, nn

from core.attention import build, merge, softmax_attention
from core.attention.contract import Attended, Heads

SEEN = -1.0
"""Additive masks of transformers are 0 for what is seen and very negative for what is not."""


class LedSelf(nn.Module):
    """Encoder self-attention of LED, between its projections.

    Args:
        stock: `LEDEncoderSelfAttention`, whose projections are taken over.
        variant, options: of `core.attention.build`.
    """

    def __init__(self, stock: Any, variant: str, options: dict[str, Any]):
        super().__init__()
        for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
            setattr(self, name, getattr(stock, name))
        self.variant = _built(stock, variant, options, "bidirectional")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor]:
        """[B, L, C] -> ([B, L, C],); the mask [B, L] is LED's: 0 local, below 0 padding, above 0 global."""
        q, k, v = (self._heads(name, hidden_states) for name in ("query", "key", "value"))
        if attention_mask is None:
            return (_joined(self.variant(q, k, v).out),)
        real, marked = attention_mask >= 0, attention_mask > 0
        if not bool(marked.any()):
            return (_joined(self.variant(q, k, v, key_mask=real).out),)
        most = int(marked.sum(dim=1).max())
        order = marked.int().sort(dim=1, descending=True, stable=True).indices[:, :most]  # global tokens, in order
        valid = marked.gather(1, order)
        at = order[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        if "mass" in self.variant.can:
            near = self.variant(q, k, v, key_mask=real & ~marked, return_mass=True)
            far = _exact(q, k.gather(2, at), v.gather(2, at), valid)
            out = merge(near, far).out
        else:
            out = self.variant(q, k, v, key_mask=real).out
        queries = self._heads(
            "query_global", hidden_states.gather(1, order[:, :, None].expand(-1, -1, q.shape[1] * q.shape[3]))
        )
        keys, values = (self._heads(name, hidden_states) for name in ("key_global", "value_global"))
        wide = _exact(queries, keys, values, real).out
        # Slots without a token write back what stands there.
        out = out.scatter(2, at, torch.where(valid[:, None, :, None], wide, out.gather(2, at)))
        return (_joined(out),)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, name)(x).unflatten(-1, (self.variant.heads.query, -1)).transpose(1, 2)


class LedCross(nn.Module):
    """Cross-attention of LED's decoder with a variant between its projections; caches are kept as the stock class does.

    Args:
        stock: `LEDDecoderAttention`, whose projections are taken over.
        variant, options: of `core.attention.build`.
    """

    out_proj: nn.Linear

    def __init__(self, stock: Any, variant: str, options: dict[str, Any]):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, getattr(stock, name))
        self.layer = stock.layer_idx
        self.variant = _built(stock, variant, options, "cross")

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None, Any]:
        """[B, T, C], [B, M, C] -> ([B, T, C], no weights, the cache)."""
        if cache is not None and cache.is_updated.get(self.layer):
            known = cache.cross_attention_cache.layers[self.layer]
            k, v = known.keys, known.values
        else:
            k, v = (self._heads(name, key_value_states) for name in ("k_proj", "v_proj"))
            if cache is not None:
                k, v = cache.cross_attention_cache.update(k, v, self.layer)
                cache.is_updated[self.layer] = True
        # All queries see the same keys: one row of the mask [B, 1, T, M] says which.
        mask = None if attention_mask is None else attention_mask[:, 0, 0] > SEEN
        out = self.variant(self._heads("q_proj", hidden_states), k, v, key_mask=mask).out
        return self.out_proj(_joined(out)), None, cache

    def _heads(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, name)(x).unflatten(-1, (self.variant.heads.query, -1)).transpose(1, 2)


def _built(stock: Any, variant: str, options: dict[str, Any], wanted: str) -> Any:
    if variant == "longformer":
        raise ValueError("a converted LED has global tokens of its own: attention 'window' is what it was trained with")
    built = build(variant, Heads(stock.num_heads, stock.num_heads, stock.head_dim, stock.head_dim), **options)
    if not {wanted, "cross"} & built.can:
        raise ValueError(f"attention {variant!r} cannot do {wanted!r}, which this module needs")
    reference = next(stock.parameters())
    return built.to(reference.device, reference.dtype)


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Attended:
    found = softmax_attention(q, k, v, key_mask=mask, return_mass=True)
    assert isinstance(found, Attended)
    return found


def _joined(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)
