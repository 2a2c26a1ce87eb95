"""The core's attention inside stock models of the library transformers, through its attention interface (extra `hf`).

    register()                                    # once
    use_attention(model, "hybrid", window=64)     # any model that transformers has ported to its interface

Two functions are registered under one name: the attention, and the mask. Without the second, transformers would pass no
mask at all, and padding and causality would be lost without a word. Ours is the padding alone, [B, M]; causality comes
from the call or the module.

Any variant can be used that needs q, k and v only. Variants with weights of their own are put on the attention modules
by `use_attention`, so call it before the optimiser is built. Without a variant on it a module computes exact softmax.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from core.attention import build, softmax_attention
from core.attention.contract import Heads, Variant
from core.training.errors import UserError

NAME = "longspan"
ATTRIBUTE = "longspan_variant"


def need_transformers() -> Any:
    """The library, or an error that says how to get it.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError("this needs the library transformers: pip install 'longspan[hf]'") from error
    return transformers


def register() -> str:
    """Make attention and mask known to transformers; returns the name, for `attn_implementation`."""
    transformers = need_transformers()
    transformers.AttentionInterface.register(NAME, attention)
    from transformers.masking_utils import AttentionMaskInterface

    AttentionMaskInterface.register(NAME, padding_mask)
    return NAME


def use_attention(model: nn.Module, variant: str = "softmax", **options: Any) -> int:
    """Let all attention modules of a stock model compute `variant`; returns how many.

    Raises:
        ValueError: no such variant or option, or the model has no attention module that we know.
    """
    modules = list(attention_modules(model))
    if not modules:
        raise ValueError(f"{type(model).__name__} has no attention module that takes transformers' attention interface")
    for module in modules:
        attach(module, variant, **options)
    model.set_attn_implementation(register())  # type: ignore[operator]
    return len(modules)


def attach(module: nn.Module, variant: str, **options: Any) -> Variant:
    """Put a variant on one attention module.

    Raises:
        ValueError: as `core.attention.build`, or a variant that cannot do what the module does.
    """
    built = build(variant, geometry(module), **options)
    wanted = "causal" if getattr(module, "is_causal", False) else "bidirectional"
    if wanted not in built.can and "cross" not in built.can:
        raise ValueError(f"attention {variant!r} cannot do {wanted!r}, which this module needs")
    reference = next(module.parameters())
    setattr(module, ATTRIBUTE, built.to(reference.device, reference.dtype))
    return built


def attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that project queries and know whether they are causal."""
    for module in model.modules():
        if hasattr(module, "is_causal") and any(hasattr(module, name) for name in ("q_proj", "query", "q")):
            yield module


def geometry(module: nn.Module) -> Heads:
    """Heads and widths of a stock attention module."""
    width = next(
        (getattr(module, n) for n in ("head_dim", "attention_head_size", "key_value_proj_dim") if hasattr(module, n)),
        None,
    )
    query = next((getattr(module, n) for n in ("q_proj", "query", "q") if hasattr(module, n)), None)
    key = next((getattr(module, n) for n in ("k_proj", "key", "k") if hasattr(module, n)), None)
    if width is None or query is None or key is None:
        raise ValueError(f"{type(module).__name__}: heads and widths are not where they usually are")
    return Heads(query.out_features // width, key.out_features // width, width, width)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: [B, H, N, D] in, [B, N, H, D] out; no weights are returned.

    Raises:
        ValueError: the model asks for what neither the variant nor we can do (soft caps, windows of its own, a 4-D
            mask, a position bias with a variant that has none).
    """
    for name in ("softcap", "sliding_window", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} needs {name!r}, which attention {NAME!r} does not offer")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention {NAME!r} takes a padding mask [batch, keys], got {list(attention_mask.shape)}")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    mask = None if attention_mask is None else attention_mask.bool()
    variant = getattr(module, ATTRIBUTE, None)
    width = query.shape[-1]
    scale = width**-0.5 if scaling is None else scaling
    if variant is None or variant.name == "softmax":
        if causal and dropout and query.shape[2] > 1 and not (mask is None and position_bias is None):
            position_bias, causal = _with_causality(query, key, position_bias), False
        out = softmax_attention(
            query, key, value, causal=causal, key_mask=mask, bias=position_bias, scale=scale, dropout=dropout
        )
        return _plain(out).transpose(1, 2), None
    if position_bias is not None and bool(position_bias.any()):
        raise ValueError(f"attention {variant.name!r} takes no position bias; convert with drop_bias=True")
    if dropout and "dropout" not in variant.can:
        dropout = 0.0  # the stock model's rate belongs to attention weights, and here are none
    attended = variant(query * (scale * width**0.5), key, value, causal=causal, key_mask=mask, dropout=dropout)
    return attended.out.transpose(1, 2), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers asks for a mask: True for real keys, [batch, keys]; None where nothing is padded.

    Raises:
        ValueError: the model wants a mask that is more than causality and padding.
    """
    from transformers import masking_utils

    known = (None, masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    if mask_function not in known or kwargs.get("local_size") is not None:
        raise ValueError(f"attention {NAME!r} knows causal and padding masks; this model asks for another")
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return None if bool(mask.all()) else mask


def _with_causality(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """A bias that also hides the future, [..., L, M]: dropout on weights is served with a bias, not with both."""
    lengths = query.shape[2], key.shape[2]
    future = torch.ones(lengths, dtype=torch.bool, device=query.device).triu(key.shape[2] - query.shape[2] + 1)
    hidden = torch.zeros(lengths, dtype=query.dtype, device=query.device).masked_fill(future, -torch.inf)
    return hidden if bias is None else bias + hidden


def _plain(out: Any) -> Tensor:
    assert isinstance(out, torch.Tensor)
    return out
