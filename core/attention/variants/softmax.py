r"""Softmax attention, the yardstick.

    s_ij = scale q_i.k_j + b_ij,    o_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij),    log_mass_i = log sum_j exp(s_ij)

Time L M, memory linear. Its decoding state is the cache of all keys and values.

Source:
    Vaswani et al. 2017, arXiv:1706.03762
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.autocast import lowered
from core.attention.backends import implementation, resolve
from core.attention.blocked.softmax import softmax_forward
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    State,
    Variant,
    check_inputs,
    hide,
    repeat_heads,
    visible,
)
from core.attention.positions import alibi_bias
from core.attention.registry import register
from core.attention.ring import empty_ring, extend_ring


def reference(q, k, v, seen, scale, bias=None) -> Attended:
    """The definition, dense: q [B, H, L, D], k and v [B, H, M, .], seen bool broadcast to [B, H, L, M]."""
    s = scale * q @ k.transpose(-1, -2)
    s = (s if bias is None else s + bias).masked_fill(~seen, -torch.inf)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    mass = torch.logsumexp(s.masked_fill(empty, 0.0), dim=-1, keepdim=True).masked_fill(empty, -torch.inf)
    return Attended(p @ v, mass.squeeze(-1))


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_mass: bool = False,
    backend: str = "auto",
) -> Tensor | Attended:
    """Attention with exponential weights: every query reads a mean of the values it is most similar to.

    Args:
        q: queries [B, H, L, D].
        k: keys [B, K, M, D]; H is a multiple of K, query head h reads key head h // (H // K).
        v: values [B, K, M, E].
        causal: query i sees key j iff j <= i + M - L (the last query sees the last key).
        key_mask: bool [B, M], True where a key is real; padding may hold anything, NaN included.
        bias: added to the scores, broadcastable to [B, H, L, M]; receives a gradient.
        slopes: [H] ALiBi slopes; adds -slope_h |i + M - L - j| without an [L, M] tensor.
        scale: factor of the scores, default 1/sqrt(D).
        dropout: probability of dropping a weight, applied after normalisation.
        return_mass: return `Attended` with the log mass.
        backend: "auto", "sdpa", "torch" or "reference".

    Returns:
        [B, H, L, E] in the dtype of v, or `Attended`. A query that sees no key gives 0 and mass -inf.

    Raises:
        ValueError: shapes disagree, or the backend cannot serve the request.
    """
    options = {"causal": causal, "key_mask": key_mask, "bias": bias, "slopes": slopes, "scale": scale}
    attended = attend(*lowered(q, k, v), dropout=dropout, return_mass=return_mass, backend=backend, **options)
    return attended if return_mass else attended.out


def attend(
    q,
    k,
    v,
    *,
    causal=False,
    key_mask=None,
    bias=None,
    slopes=None,
    scale=None,
    dropout=0.0,
    return_mass=False,
    backend="auto",
) -> Attended:
    """`softmax_attention`, always as `Attended`; the mass is there if asked for."""
    check_inputs(q, k, v, key_mask, slopes)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        scores = (*q.shape[:3], k.shape[2])
        if any(given not in (1, size) for given, size in zip(bias.shape, scores, strict=True)):
            raise ValueError(f"bias must broadcast to the scores {list(scores)}, got {list(bias.shape)}")
    square = not causal or q.shape[2] == k.shape[2] or q.shape[2] == 1
    asked = {"mass": return_mass, "dropout": dropout > 0}
    if not dropout:  # for which SDPA serves them all, by a mask [L, M]
        asked |= {
            "alibi": slopes is not None,
            "causal with a mask or bias": causal and (key_mask is not None or bias is not None) and q.shape[2] > 1,
            "causal with L != M": not square,
        }
    needs = tuple(name for name, wanted in asked.items() if wanted)
    choice = resolve("softmax", backend, q.device.type, q.dtype, needs)
    k, v = hide(k, key_mask), hide(v, key_mask)
    return choice.run(q, k, v, causal, key_mask, bias, slopes, scale, dropout)


def _with_alibi(bias: Tensor | None, slopes: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias of the scores with ALiBi's penalty, dense."""
    if slopes is None:
        return bias
    penalty = alibi_bias(slopes.to(q.dtype), q.shape[2], k.shape[2])
    return penalty if bias is None else bias + penalty


@implementation(
    "softmax", "reference", serves=("mass", "dropout", "alibi", "causal with a mask or bias", "causal with L != M")
)
def _reference(q, k, v, causal, key_mask, bias, slopes, scale, dropout) -> Attended:
    seen = visible(q.shape[2], k.shape[2], causal=causal, key_mask=key_mask, device=q.device)
    bias = _with_alibi(bias, slopes, q, k)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    if dropout:
        identity = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
        p, mass = reference(q, k, identity, seen, scale, bias)
        return Attended(F.dropout(p, dropout) @ v, mass)
    return reference(q, k, v, seen, scale, bias)


@implementation("softmax", "sdpa", serves=("dropout",))
def _sdpa(q, k, v, causal, key_mask, bias, slopes, scale, dropout) -> Attended:
    length, keys = q.shape[2], k.shape[2]
    if slopes is not None or (causal and length > 1 and (key_mask is not None or bias is not None or length != keys)):
        seen = visible(length, keys, causal=causal, key_mask=key_mask, device=q.device)
        bias = _with_alibi(bias, slopes, q, k)
        some = seen.any(-1, keepdim=True)  # a row without a key is given all, and then 0: its gradient is no NaN
        mask = seen | ~some if bias is None else bias.to(q.dtype).masked_fill(~seen & some, -torch.inf)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return Attended(torch.where(some, out, 0.0), None)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if bias is not None:
        mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, -torch.inf)
        mask = mask.expand(-1, -1, q.shape[2], k.shape[2])
    grouped = q.shape[1] != k.shape[1]
    if causal and (mask is not None or q.shape[2] != k.shape[2]):  # a single query, which sees every key
        causal = False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    if key_mask is not None:  # SDPA backends disagree on rows without a key
        out = torch.where(key_mask.any(-1)[:, None, None, None], out, 0.0)
    return Attended(out, None)


@implementation("softmax", "torch", serves=("mass", "alibi", "causal with a mask or bias", "causal with L != M"))
def _torch(q, k, v, causal, key_mask, bias, slopes, scale, dropout) -> Attended:
    return Attended(*softmax_forward(q, k, v, key_mask, bias, slopes, causal, scale))


@register(
    "softmax",
    summary="every query weighs every key by exp(q.k); exact, quadratic",
    source="Vaswani et al. 2017, arXiv:1706.03762",
    pick="length is below a few thousand tokens, or every far token may matter exactly",
    stability="scores in float32, the maximum taken out",
)
class SoftmaxAttention(Variant):
    """Softmax over all visible keys; the decoding state is the cache of keys and values."""

    can = frozenset({"causal", "bidirectional", "cross", "recurrent", "mass", "dropout"})
    positions = frozenset({"rope", "alibi"})
    growth = "quadratic"

    def __init__(self, heads: Heads):
        super().__init__(heads)

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
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        return attend(
            q,
            k,
            v,
            causal=causal,
            key_mask=key_mask,
            slopes=slopes,
            dropout=dropout,
            return_mass=return_mass,
            backend=backend,
        )

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        return empty_ring(self.heads, batch, 0, device, dtype)

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        new = extend_ring(state, k, v, key_mask)
        options = {"key_mask": new["mask"], "slopes": slopes, "backend": backend}
        return attend(q, new["keys"], new["values"], causal=True, **options), new

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        keys = length if keys is None else keys
        h = self.heads
        seen = (keys - (length - 1) / 2) if causal else keys  # mean over the queries, bottom-right aligned
        return Cost(
            flops=round(2 * batch * h.query * length * seen * (h.width + h.value_width)),
            bytes_moved=batch * element_bytes * (h.query * length + h.key * keys) * (h.width + h.value_width),
            state_bytes=batch * keys * (h.key * element_bytes * (h.width + h.value_width) + 1),
        )
