r"""Linformer: softmax over a fixed number of learned mixtures of the keys.

    K' = E K,  V' = G V  [F, .],    o_i = sum_f softmax_f(q_i.K'_f / sqrt(D)) V'_f,    E, G [F, max_length] learned

so a query weighs F slots instead of M keys, in time and memory linear in the length. A sequence of n < max_length keys
uses the first n columns. Every slot holds all positions, the future included: there is no causal form and no state.

    sharing      "none"       E and G per key head
                 "headwise"   one E and one G for all heads of a layer
                 "key_value"  one matrix for keys and values of a layer
                 "layerwise"  one matrix for all layers of a stack; `core.backbone` ties them

Source:
    Wang et al. 2020, arXiv:2006.04768

Where we differ:
    Masked keys are left out of K' and V', which shrinks the slots by the share that is masked; `renormalise` scales
    them back. The mass is that of the slots, so it merges only with keys that the same matrix has mixed. E and G start
    as N(0, 1/F), which keeps the norm of a single key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.backends import implementation, resolve
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
)
from core.attention.registry import nearest, register
from core.attention.variants import softmax

SHARING = ("none", "headwise", "key_value", "layerwise")


def reference(q, k, v, e, g, factor) -> Attended:
    """The definition: e, g [F, M] or [H, F, M]; k and v have as many heads as q, factor [B] is 0 without a key."""
    factor = factor.to(q.dtype)[:, None, None, None]
    return softmax.reference(q, e @ k * factor, g @ v * factor, factor > 0, q.shape[-1] ** -0.5)


@implementation("linformer", "reference", serves=("mass",))
def _reference(q, k, v, e, g, factor, dropout) -> Attended:
    if e.dim() == 3:
        e, g = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (e, g))
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return reference(q, k, v, e, g, factor)


@implementation("linformer", "sdpa", serves=("dropout",))
def _sdpa(q, k, v, e, g, factor, dropout) -> Attended:
    mixed, real = _mix(k, v, e, g, factor)
    return softmax.attend(q, *mixed, key_mask=real, dropout=dropout, backend="sdpa")


@implementation("linformer", "torch", serves=("mass",))
def _torch(q, k, v, e, g, factor, dropout) -> Attended:
    mixed, real = _mix(k, v, e, g, factor)
    return softmax.attend(q, *mixed, key_mask=real, return_mass=True, backend="torch")


def _mix(k: Tensor, v: Tensor, e: Tensor, g: Tensor, factor: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(K' [B, K, F, D], V' [B, K, F, E]) and which slots hold anything, [B, F]."""
    by = factor[:, None, None, None]
    real = (factor > 0)[:, None].expand(-1, e.shape[-2])
    return ((e @ k * by).to(k.dtype), (g @ v * by).to(v.dtype)), real


@register(
    "linformer",
    summary="softmax over a fixed number of learned mixtures of the keys; linear, not causal",
    source="Wang et al. 2020, arXiv:2006.04768",
    pick="encoders of a fixed maximum length",
    stability="as softmax, over a fixed number of slots",
)
class LinformerAttention(Variant):
    """Softmax over learned mixtures of the keys.

    Args:
        rank: F, number of mixtures.
        max_length: most keys it can take; longer sequences are an error.
        sharing: "none", "headwise", "key_value" or "layerwise", see the head of this file.
        renormalise: make up for masked keys before the last real one.
    """

    can = frozenset({"bidirectional", "cross", "mass", "dropout"})
    anchor = "start"

    def __init__(
        self,
        heads: Heads,
        *,
        rank: int = 256,
        max_length: int = 4096,
        sharing: str = "headwise",
        renormalise: bool = False,
    ):
        super().__init__(heads)
        check_whole("rank", rank)
        check_whole("max_length", max_length)
        if sharing not in SHARING:
            raise ValueError(f"unknown sharing {sharing!r}{nearest(sharing, SHARING)}; known: {', '.join(SHARING)}")
        self.rank, self.max_length, self.sharing, self.renormalise = rank, max_length, sharing, renormalise
        self.tied = ("mix",) if sharing == "layerwise" else ()
        shape = (heads.key, rank, max_length) if sharing == "none" else (rank, max_length)
        self.mix = nn.Parameter(torch.empty(shape))
        self.mix_values = nn.Parameter(torch.empty(shape)) if sharing in ("none", "headwise") else None
        for table in self.parameters():
            nn.init.normal_(table, std=rank**-0.5)

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
        length = k.shape[2]
        if causal:
            raise ValueError("linformer cannot be causal: every slot mixes all positions, the future included")
        if length > self.max_length:
            raise ValueError(f"linformer was built for at most {self.max_length} keys, got {length}; raise max_length")
        asked = {"mass": return_mass, "dropout": dropout > 0}
        needs = tuple(name for name, wanted in asked.items() if wanted)
        choice = resolve("linformer", backend, q.device.type, q.dtype, needs)
        # A slice would be another case where length = max_length, and break the export of a dynamic length.
        e, g = (F.pad(one, (0, length - self.max_length)).to(k.dtype) for one in self._tables())
        factor = self._factor(key_mask, k)
        return choice.run(q, hide(k, key_mask), hide(v, key_mask), e, g, factor, dropout)

    def _tables(self) -> tuple[Tensor, Tensor]:
        return self.mix, self.mix if self.mix_values is None else self.mix_values

    def _factor(self, key_mask: Tensor | None, k: Tensor) -> Tensor:
        """[B], by what the slots are scaled: 1, or the make-up for masked keys; 0 where there is no key."""
        ones = torch.ones(k.shape[0], dtype=accumulator(k.dtype), device=k.device)
        if k.shape[2] == 0:
            return ones * 0
        if key_mask is None:
            return ones
        count = key_mask.sum(-1).to(ones.dtype)
        if not self.renormalise:
            return (count > 0).to(ones.dtype)
        # Up to the last real key: padding behind it takes columns that shorter sequences would not have used.
        last = (key_mask * torch.arange(1, k.shape[2] + 1, device=k.device)).amax(-1)
        return last / count.clamp(min=1)

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        keys = length if keys is None else keys
        h = self.heads
        both = h.width + h.value_width
        used = sum(one.numel() // self.max_length * min(keys, self.max_length) for one in self.parameters())
        return Cost(
            flops=2 * batch * self.rank * (h.key * keys + h.query * length) * both,
            bytes_moved=element_bytes * (batch * (h.query * length + h.key * keys) * both + used),
            parameters=sum(one.numel() for one in self.parameters()),
        )
