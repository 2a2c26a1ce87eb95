r"""Gated linear attention: running sums that forget, by a constant or by a learned number per step, head or feature.

    S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t,    out_t = act(W x_t) * RMSNorm(o_t)

Without a denominator: the norm of the output takes its place. They differ in the log-gate g_t <= 0 of head h:

    retnet      g = log(1 - 2^{-5-h}), constant                                  Sun et al. 2023, arXiv:2307.08621
    lightning   g = -slope_h (1 - l / (layers - 1) + 1e-5), q and k through SiLU  Qin et al. 2024, arXiv:2401.04658
    ssd         g = Delta_t A_h, v = Delta_t v_t, + D_h v_t (Mamba-2)             Dao and Gu 2024, arXiv:2405.21060
    gla         g = logsigmoid(W2 W1 x_t + b) / 16, per feature                   Yang et al. 2024, arXiv:2312.06635
    rwkv6       g = -exp(w + W2 tanh(W1 x_t)), per feature; the own token is read with the bonus u instead of 1
                                                                                  Peng et al. 2024, arXiv:2404.05892

The decoding state is S alone: constant in the length. Two-sided use is defined in `core.attention.recurrence`.

Where we differ:
    The papers' blocks around the recurrence (token shift, their own expansion of the width) are not copied: key and
    value width are the layer's, and `short_conv` gives the convolution that SSD has on x, B and C. RetNet's rotation
    is the layer's (positions="rope"). All take grouped key heads, masks and packs. The output gate of lightning is a
    sigmoid; published models differ there. The Mamba-2 block multiplies by the gate before the norm, here it is after.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.contract import Heads, repeat_heads
from core.attention.positions import alibi_slopes
from core.attention.recurrence import GateLinear, Recurrence, by_head, log_gate, silent
from core.attention.registry import register


@register(
    "retnet",
    summary="running sums with a constant decay per head (retention); linear",
    source="Sun et al. 2023, arXiv:2307.08621",
    pick="a simple recurrent decoder with known memory lengths is wanted",
    stability="decay at most 1; per-head norm after the sum",
)
class RetNetAttention(Recurrence):
    """Retention: decay 1 - 2^(-5-h) for key head h, so memories from 32 to 2^(4+K) steps long."""

    kind = "decay"
    positions = frozenset({"rope"})
    rates: Tensor

    def __init__(self, heads: Heads, *, norm: bool = True, gate: bool = True):
        super().__init__(heads, norm=norm, gate=gate)
        rates = torch.log1p(-(2.0 ** -(5.0 + torch.arange(heads.key, dtype=torch.float64))))
        self.register_buffer("rates", rates.float())

    def prepare(self, q, k, v, x, key_mask):
        return q * q.shape[-1] ** -0.5, k, v, _constant(self.rates, k, key_mask)


@register(
    "lightning",
    summary="running sums with a constant decay per head and SiLU features; linear",
    source="Qin et al. 2024, arXiv:2401.04658",
    pick="as retnet, with decays that weaken in later layers",
    stability="as retnet",
)
class LightningAttention(Recurrence):
    """Lightning attention: ALiBi's slopes as decay, weaker in later layers.

    Args:
        layer, layers: which layer of how many this is, counted from 0; the decay falls to nearly nothing in the last.
    """

    kind = "decay"
    positions = frozenset({"rope"})
    activation = staticmethod(torch.sigmoid)
    rates: Tensor

    def __init__(self, heads: Heads, *, layer: int = 0, layers: int = 1, norm: bool = True, gate: bool = True):
        super().__init__(heads, norm=norm, gate=gate)
        if not 0 <= layer < layers:
            raise ValueError(f"layer counts from 0 to layers - 1: got layer={layer}, layers={layers}")
        share = 1 - layer / max(layers - 1, 1) + 1e-5
        self.register_buffer("rates", -alibi_slopes(heads.key) * share)

    def prepare(self, q, k, v, x, key_mask):
        return F.silu(q) * q.shape[-1] ** -0.5, F.silu(k), v, _constant(self.rates, k, key_mask)


@register(
    "ssd",
    summary="running sums with a learned step size per token (Mamba-2); linear",
    source="Dao and Gu 2024, arXiv:2405.21060",
    pick="language-like causal sequences, with short_conv=4",
    stability="log-decay from softplus, never positive; per-head norm",
)
class SSDAttention(Recurrence):
    """State-space duality: queries are C, keys B, values x; one step size per token and key head."""

    kind = "decay"

    def __init__(self, heads: Heads, *, norm: bool = True, gate: bool = True):
        super().__init__(heads, norm=norm, gate=gate)
        self.steps = StepSizes(heads.input_width("ssd"), heads.key)
        self.skip = nn.Parameter(torch.ones(heads.key))

    def prepare(self, q, k, v, x, key_mask):
        step, g = self.steps(x)
        return q, k, v * step.unsqueeze(-1), log_gate(g, key_mask)

    def own(self, parts, v):
        return repeat_heads(v * self.skip[:, None, None], self.heads.query)


@register(
    "gla",
    summary="running sums with a learned decay per token and feature; linear",
    source="Yang et al. 2024, arXiv:2312.06635",
    pick="recency differs by feature and by token",
    stability="no exponent above 0 in sub-blocks, above 40 where a chunk is mild",
)
class GLAAttention(Recurrence):
    """Gated linear attention.

    Args:
        gate_rank: inner width of the gate's projection.
        temperature: divides the log-gate; larger forgets less.
    """

    kind = "vector_decay"

    def __init__(
        self,
        heads: Heads,
        *,
        gate_rank: int = 16,
        temperature: float = 16.0,
        norm: bool = True,
        gate: bool = True,
    ):
        super().__init__(heads, norm=norm, gate=gate)
        if gate_rank < 1 or temperature <= 0:
            raise ValueError(f"gate_rank >= 1 and temperature > 0, got {gate_rank} and {temperature}")
        self.temperature = temperature
        self.decay = LowRank(heads.input_width("gla"), gate_rank, heads.key * heads.width)

    def prepare(self, q, k, v, x, key_mask):
        g = by_head(F.logsigmoid(self.decay(x)), self.heads.key) / self.temperature
        return q * q.shape[-1] ** -0.5, k, v, log_gate(g, key_mask)


@register(
    "rwkv6",
    summary="running sums with a learned decay per token and feature, and a bonus for the own token; linear",
    source="Peng et al. 2024, arXiv:2404.05892",
    pick="as gla, with the own token read apart",
    stability="log-decay is -exp(.), clamped at -50",
)
class RWKV6Attention(Recurrence):
    """The time mixing of RWKV-6 (its state and read-out; the token shift belongs to the block).

    Args:
        gate_rank: inner width of the decay's projection.
    """

    kind = "vector_decay"
    exclusive = True

    def __init__(self, heads: Heads, *, gate_rank: int = 16, norm: bool = True, gate: bool = True):
        super().__init__(heads, norm=norm, gate=gate)
        if gate_rank < 1:
            raise ValueError(f"gate_rank must be at least 1, got {gate_rank}")
        self.narrow = GateLinear(heads.input_width("rwkv6"), gate_rank, bias=False)
        self.wide = GateLinear(gate_rank, heads.key * heads.width)
        with torch.no_grad():
            self.wide.weight.mul_(0.1)  # what a token says moves its decay little at first
            # half-lives from a token to a few hundred, spread over the features of a head
            self.wide.bias.copy_(torch.linspace(-6, -1, heads.width).repeat(heads.key))
        self.bonus = nn.Parameter(torch.full((heads.key, heads.width), 0.5))

    def prepare(self, q, k, v, x, key_mask):
        g = -by_head(self.wide(torch.tanh(self.narrow(x))), self.heads.key).clamp(max=5.0).exp()
        return q * q.shape[-1] ** -0.5, k, v, log_gate(g, key_mask)

    def own(self, parts, v):
        q, k, v, _ = parts
        grouped = q.unflatten(1, (self.heads.key, -1))
        score = (grouped * (self.bonus[:, None, :] * k).unsqueeze(2)).sum(-1, keepdim=True)
        return (score * v.unsqueeze(2)).flatten(1, 2)


class StepSizes(nn.Module):
    """Mamba-2's step sizes: Delta = softplus(W x + b) and the log-gate Delta A, A = -exp(log_rate).

    Args:
        model: C, width of the input.   heads: K.
    """

    def __init__(self, model: int, heads: int):
        super().__init__()
        self.project = GateLinear(model, heads, bias=False)
        # Delta log-uniform in [1e-3, 1e-1] and A uniform in [1, 16], both spread evenly over the heads.
        even = (torch.arange(heads) + 0.5) / heads
        step = torch.exp(torch.log(torch.tensor(1e-3)) * (1 - even) + torch.log(torch.tensor(1e-1)) * even)
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.log_rate = nn.Parameter(torch.log(1 + 15 * even.flip(0)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L, C] -> (Delta [B, K, L], log-gate [B, K, L])."""
        # softplus(y) = -logsigmoid(-y); compiled, torch 2.15's softplus gives gradients of other strides than it says.
        step = -F.logsigmoid(-self.project(x) - self.bias).transpose(1, 2)
        return step, -step * self.log_rate.exp()[:, None]


class LowRank(nn.Module):
    """Two linear maps through a narrow middle, the usual shape of a gate's projection."""

    def __init__(self, inputs: int, rank: int, outputs: int):
        super().__init__()
        self.narrow, self.wide = GateLinear(inputs, rank, bias=False), GateLinear(rank, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return self.wide(self.narrow(x))


def _constant(rates: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """The same log-gate [K] at every real position."""
    return silent(rates.to(k.dtype)[None, :, None].expand(k.shape[0], -1, k.shape[2]), key_mask)
