r"""Delta-rule attention: a write first takes out what its key already recalls, so a memory is corrected, not piled up.

    S_t = decay_t(S_{t-1}) + beta_t k_t (v_t - decay_t(S_{t-1})^T k_t)^T,    o_t = scale S_t^T q_t,    |k_t| = |q_t| = 1

    delta         no decay                                                      Yang et al. 2024, arXiv:2406.06484
    gated_delta   one decay per token and head, as in SSD                       Yang et al. 2024, arXiv:2412.06464
    kda           a decay per token and feature (Kimi delta attention)          Kimi Team 2025, arXiv:2510.26692

beta_t = sigmoid(W x_t) is how much of the old value is replaced: 0 leaves S, 1 recalls v_t exactly. beta up to 2
(`negative=True`) lets a write turn the sign, which parity-like tasks need (Grazzi et al. 2024, arXiv:2411.12537). The
decoding state is S, constant in the length.

Where we differ:
    The papers' convolutions are the layer's option `short_conv`. Two-sided use (not in the papers) reads a second
    recurrence from the end before each position's own write, see `core.attention.recurrence`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.contract import Heads
from core.attention.recurrence import GateLinear, Recurrence, by_head, log_gate, silent
from core.attention.registry import register
from core.attention.variants.gated import LowRank, StepSizes


class _Delta(Recurrence):
    """What the three share: unit keys and queries, and the writing strength.

    Args:
        heads: head geometry.
        negative: let beta reach 2.
    """

    kind = "delta"

    def __init__(self, heads: Heads, *, negative: bool = False, norm: bool = True, gate: bool = True):
        super().__init__(heads, norm=norm, gate=gate)
        self.most = 2.0 if negative else 1.0
        self.strength = GateLinear(heads.input_width(self.name), heads.key)

    def prepare(self, q, k, v, x, key_mask):
        beta = self.most * torch.sigmoid(self.strength(x)).transpose(1, 2)
        q = F.normalize(q, dim=-1, eps=1e-6) * q.shape[-1] ** -0.5
        return q, F.normalize(k, dim=-1, eps=1e-6), v, log_gate(self.decay_of(k, x), key_mask), silent(beta, key_mask)

    def decay_of(self, k: Tensor, x: Tensor) -> Tensor:
        """The log-gate [B, K, L] or [B, K, L, D]."""
        return k.new_zeros(k.shape[:3])


@register(
    "delta",
    summary="a write corrects what its key recalls (DeltaNet); linear",
    source="Yang et al. 2024, arXiv:2406.06484",
    pick="keys are written again with new values: recall, state tracking",
    stability="unit keys and beta up to 1 keep every step a contraction",
)
class DeltaAttention(_Delta):
    """The delta rule without forgetting."""

    def __init__(self, heads: Heads, *, negative: bool = False, norm: bool = True, gate: bool = True):
        super().__init__(heads, negative=negative, norm=norm, gate=gate)


@register(
    "gated_delta",
    summary="the delta rule with a learned decay per token; linear",
    source="Yang et al. 2024, arXiv:2412.06464",
    pick="as delta, over long sequences in which old facts should fade",
    stability="as delta, times a decay at most 1",
)
class GatedDeltaAttention(_Delta):
    """The delta rule with Mamba-2's decay."""

    def __init__(self, heads: Heads, *, negative: bool = False, norm: bool = True, gate: bool = True):
        super().__init__(heads, negative=negative, norm=norm, gate=gate)
        self.steps = StepSizes(heads.input_width("gated_delta"), heads.key)

    def decay_of(self, k, x):
        return self.steps(x)[1]


@register(
    "kda",
    summary="the delta rule with a learned decay per token and feature (Kimi); linear",
    source="Kimi Team 2025, arXiv:2510.26692",
    pick="as gated_delta, with a decay per feature",
    stability="as delta and gla",
)
class KimiDeltaAttention(_Delta):
    """Kimi delta attention.

    Args:
        gate_rank: inner width of the decay's projection.
    """

    kind = "vector_delta"
    activation = staticmethod(torch.sigmoid)

    def __init__(
        self, heads: Heads, *, gate_rank: int = 16, negative: bool = False, norm: bool = True, gate: bool = True
    ):
        super().__init__(heads, negative=negative, norm=norm, gate=gate)
        if gate_rank < 1:
            raise ValueError(f"gate_rank must be at least 1, got {gate_rank}")
        self.decay = LowRank(heads.input_width("kda"), gate_rank, heads.key * heads.width)
        with torch.no_grad():  # softplus of it: steps log-uniform in [1e-3, 1e-1] over the features of a head
            step = torch.logspace(-3, -1, heads.width)
            self.decay.wide.bias.copy_((step + torch.log(-torch.expm1(-step))).repeat(heads.key))
        self.log_rate = nn.Parameter(torch.zeros(heads.key))

    def decay_of(self, k, x):
        return -F.softplus(by_head(self.decay(x), self.heads.key)) * self.log_rate.exp()[:, None, None]
