r"""InLine attention: weights that a linear kernel shifts to a sum of one, by subtraction instead of division.

With n_i visible keys, kbar_i the mean of their phi(k_j) and vbar_i that of their values,

    w_ij = (phi(q_i).phi(k_j) - phi(q_i).kbar_i) / (n_i sqrt(D)) + 1 / n_i,      o_i = sum_j w_ij v_j

so rows sum to one, weights may be negative, and different queries have different weights, which is what division by a
positive sum cannot promise. There is no mass. Written as sums over keys,

    o_i = A_i / n_i + (1 - a_i / n_i) vbar_i,    [A_i, a_i] = phi(q_i)^T sum_j phi(k_j) [v_j, 1]^T / sqrt(D)

so the state is that sum, [F, E + 1], and sum_j [v_j, 1]; causally the latter is a running sum along the length.

residual adds a depth-wise convolution of the values, 3 x 3 on an image grid and 3 on a line, whose kernel is predicted
per sample from the mean of the layer's input:

    r = W_2 gelu(W_1 mean(x) + b_1) + b_2,    W per head

Source:
    Han et al. 2024 (Bridging the divide), arXiv:2412.06590

Where we differ:
    The causal form, running means in place of means, is ours and experimental. A masked position leaves the means of
    keys, of values and of x. On a line only the middle row of the predicted kernels is used. Tokens before the grid
    have no neighbours there, so they get no residual.
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
    Inputs,
    State,
    Variant,
    accumulator,
    check_inputs,
    hide,
    repeat_heads,
    visible,
)
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.grid import depthwise
from core.attention.registry import register
from core.attention.variants import linear
from core.attention.variants.transnormer import elementwise_map


def reference(fq, fk, v, seen) -> Tensor:
    """The definition, dense: features already divided by D^(1/4); k and v have as many heads as q; seen is bool."""
    seen = seen.to(fq.dtype)
    number = seen.sum(-1, keepdim=True).clamp(min=1)
    mean = (seen @ fk) / number
    weights = (fq @ fk.mT - (fq * mean).sum(-1, keepdim=True) + 1) / number * seen
    return weights @ v


@implementation("inline", "reference")
def _reference(fq, fk, v, causal, key_mask, state) -> tuple[Tensor, None]:
    seen = visible(fq.shape[2], fk.shape[2], causal=causal, key_mask=key_mask, device=fq.device)
    fk, v = (repeat_heads(x, fq.shape[1]) for x in (fk, hide(v, key_mask)))
    return reference(fq, fk, v.to(fq.dtype), seen), None


@implementation("inline", "torch", serves=("state",))
def _torch(fq, fk, v, causal, key_mask, state) -> tuple[Tensor, State | None]:
    values = hide(F.pad(v.to(fq.dtype), (0, 1), value=1.0), key_mask)
    if causal:
        total = values.cumsum(2) if state is None else values.cumsum(2) + state["total"].unsqueeze(2)
        read = F.pad(total, (0, 0, fq.shape[2] - v.shape[2], 0))  # queries stand at the last positions of the keys
    else:
        total = read = values.sum(2, keepdim=True)
    before = None
    if state is not None:  # the sums of `linear` have a column of ones of their own, without a gradient
        before = {"sum": F.pad(state["sum"], (0, 1)), "count": torch.zeros_like(state["total"][:, 0, 0])}
    options = {"key_mask": key_mask, "normalize": False, "backend": "torch", "state": before, "keep": state is not None}
    attended, new = linear.attend(fq, fk, values, FEATURE_MAPS["identity"], causal=causal, **options)
    each, read = attended.out.unflatten(1, (fk.shape[1], -1)), read.unsqueeze(2)
    number = read[..., -1:].clamp(min=1)
    out = (each[..., :-1] + (1 - each[..., -1:] / number) * read[..., :-1]) / number
    kept = None if new is None else {"sum": new["sum"][..., :-1].contiguous(), "total": total[:, :, -1].contiguous()}
    return out.flatten(1, 2), kept


@register(
    "inline",
    summary="linear attention made to sum to one by subtraction, with a predicted local residual; linear",
    source="Han et al. 2024 (InLine), arXiv:2412.06590",
    pick="vision encoders",
    stability="no division at all; rows sum to one, weights may be negative",
)
class InLineAttention(Variant):
    """Sums of keys and values, and their means.

    Args:
        feature_map: "identity", "elu", "relu" or "silu".
        residual: add the convolution that is predicted from the layer's input; for self-attention that is not causal.
    """

    can = frozenset({"causal", "bidirectional", "cross", "recurrent", "grid"})
    positions = frozenset({"rope"})

    def __init__(self, heads: Heads, *, feature_map: str = "identity", residual: bool = False):
        super().__init__(heads)
        self.map = elementwise_map(feature_map)
        self.residual = LocalResidual(heads) if residual else None
        # The kernel is a function of the whole input: of the future, if there were one.
        self.can = frozenset({"bidirectional", "grid"}) if residual else type(self).can - {"grid"}

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
        out, _ = self._read(q, k, v, causal, key_mask, rotary, backend)
        if self.residual is not None:
            if causal:
                raise ValueError("the local residual of inline attention reads the whole input: it cannot be causal")
            out = out + self.residual(v, inputs, key_mask)
        return Attended(out.to(v.dtype), None)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        h, acc = self.heads, accumulator(dtype or torch.float32)
        placed = {"device": device, "dtype": acc}
        return {
            "sum": torch.zeros(batch, h.key, h.width, h.value_width + 1, **placed),
            "total": torch.zeros(batch, h.key, h.value_width + 1, **placed),
        }

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        out, new = self._read(q, k, v, True, key_mask, rotary, backend, state)
        return Attended(out.to(v.dtype), None), new

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        keys = length if keys is None else keys
        h = self.heads
        total = linear.sums_cost(h, self.map, h.width, batch, length, keys, causal, None, element_bytes)
        state = batch * max(4, element_bytes) * h.key * (h.width + 1) * (h.value_width + 1) if causal else 0
        total = Cost(total.flops, total.bytes_moved, state)
        return total if self.residual is None else total + self.residual.cost(batch, length)

    def _read(self, q, k, v, causal, key_mask, rotary, backend, state=None) -> tuple[Tensor, State | None]:
        acc = accumulator(v.dtype)
        features = [self.map.features(x.to(acc)) for x in (q, hide(k, key_mask))]
        if rotary is not None:
            features = [turn(x) for turn, x in zip(rotary, features)]
        fq, fk = (x * q.shape[-1] ** -0.25 for x in features)
        run = resolve("inline", backend, q.device.type, q.dtype, () if state is None else ("state",)).run
        with torch.autocast(q.device.type, enabled=False):
            return run(fq, hide(fk, key_mask), v, causal, key_mask, state)


class LocalResidual(nn.Module):
    """A 3 x 3 depth-wise convolution of the values [B, K, L, E], whose kernels are predicted from the mean of x."""

    def __init__(self, heads: Heads):
        super().__init__()
        model, self.heads = heads.input_width("inline"), heads
        if model % heads.key:
            raise ValueError(f"residual needs key heads that divide the input's width: {heads.key} and {model}")
        part, kernels = model // heads.key, heads.value_width * 9
        self.enter = nn.Parameter(torch.empty(heads.key, part, part))
        self.leave = nn.Parameter(torch.empty(heads.key, part, kernels))
        self.enter_bias = nn.Parameter(torch.zeros(heads.key, part))
        self.leave_bias = nn.Parameter(torch.zeros(heads.key, kernels))
        for table in (self.enter, self.leave):
            nn.init.uniform_(table, -(part**-0.5), part**-0.5)

    def forward(self, v: Tensor, inputs: Inputs, key_mask: Tensor | None) -> Tensor:
        """[B, H, L, E]."""
        if inputs.x is None or inputs.x.shape[1] != v.shape[2]:
            raise ValueError("the local residual of inline attention needs the layer's input (Inputs.x) of v's length")
        x = inputs.x.to(self.enter.dtype)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if key_mask is None else key_mask
        with torch.autocast(x.device.type, enabled=False):
            mean = torch.where(mask[..., None], x, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            parts = mean.unflatten(-1, (self.heads.key, 1, -1))  # [B, K, 1, C / K]
            parts = F.gelu(parts @ self.enter + self.enter_bias.unsqueeze(1))
            kernels = parts @ self.leave + self.leave_bias.unsqueeze(1)
        weight = kernels.squeeze(2).unflatten(-1, (self.heads.value_width, 3, 3))
        y = depthwise(v, weight, mask=key_mask, grid=inputs.grid)
        return y.repeat_interleave(self.heads.group, 1)

    def cost(self, batch: int, length: int) -> Cost:
        """Cost on a line; on a grid the convolution is three times that."""
        tables = self.enter.numel() + self.leave.numel()
        taps = 2 * length * self.heads.key * self.heads.value_width * 3
        return Cost(flops=batch * (2 * tables + taps), parameters=sum(p.numel() for p in self.parameters()))
