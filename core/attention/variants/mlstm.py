r"""mLSTM: a matrix memory with exponential input gates, kept in range by a running maximum.

    C_t = f_t C_{t-1} + e^{i_t} k_t v_t^T,    n_t = f_t n_{t-1} + e^{i_t} k_t,    f_t = sigmoid(W_f x_t)
    o_t = scale C_t^T q_t / max(|scale n_t . q_t|, 1)

e^{i_t} overflows, so state and result are held times e^{-m_t}, m_t = max(log f_t + m_{t-1}, i_t): then every factor is
at most 1 and the bound 1 becomes e^{-m_t}. The result does not depend on m, so m takes no gradient. With
`input_gate="sigmoid"` the write is sigmoid(i_t) k_t v_t^T and m is not needed. The normaliser is one more column of the
state. Around it, RMSNorm per head and a sigmoid gate. The decoding state is C, n and m: constant in the length.

Source:
    Beck et al. 2024 (xLSTM), arXiv:2405.04517; chunked form: Beck et al. 2025 (TFLA), arXiv:2503.14376

Where we differ:
    Key width equals value width (the paper halves it). No epsilon is added to the normaliser: with one the result would
    depend on m. Two-sided, numerators and normalisers of both directions add up before the one division.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.contract import NO_INPUTS, Attended, Cost, Heads, State, repeat_heads
from core.attention.recurrence import GateLinear, Recurrence, by_head, log_gate
from core.attention.registry import register

INPUT_GATES = ("exp", "sigmoid")
CAP = 15.0
"""Pre-activations of the gates are softly limited to +-15: e^15 tells any two tokens apart."""


@register(
    "mlstm",
    summary="a matrix memory with exponential gates and a bounded normaliser (xLSTM); linear",
    source="Beck et al. 2024, arXiv:2405.04517",
    pick="a few tokens must be stored firmly: exponential input gates",
    stability="running maximum, normaliser bounded below; no epsilon",
)
class MLSTMAttention(Recurrence):
    """The mLSTM's memory.

    Args:
        input_gate: "exp" (stabilised by a running maximum) or "sigmoid".
    """

    kind = "decay"
    by_position = False  # its running maximum looks back
    activation = staticmethod(torch.sigmoid)

    def __init__(self, heads: Heads, *, input_gate: str = "exp", norm: bool = True, gate: bool = True):
        super().__init__(heads, norm=norm, gate=gate)
        if input_gate not in INPUT_GATES:
            raise ValueError(f"input_gate must be one of {', '.join(INPUT_GATES)}, got {input_gate!r}")
        self.input_gate = input_gate
        self.gates = GateLinear(heads.input_width("mlstm"), 2 * heads.key)
        with torch.no_grad():  # at first little is written and nearly nothing forgotten
            forget = torch.linspace(3, 6, heads.key)
            self.gates.bias.copy_(torch.stack((torch.full_like(forget, -10.0), forget), 1).flatten())

    @property
    def columns(self) -> int:
        return self.heads.value_width + 1

    def prepare(self, q, k, v, x, key_mask):
        """(q, k, [v, 1], log f, log of the input gate): the last is not yet in k."""
        i, f = by_head(CAP * torch.tanh(self.gates(x) / CAP), self.heads.key).unbind(-1)
        write = i if self.input_gate == "exp" else F.logsigmoid(i)
        if key_mask is not None:
            write = torch.where(key_mask[:, None, :], write, -torch.inf)
        values = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        return q * q.shape[-1] ** -0.5, k, values, log_gate(F.logsigmoid(f), key_mask), write

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
        parts = self._parts(q, k, v, key_mask, rotary, inputs)
        stable, top = _stabilised(*parts, plain=backend == "reference")
        read, _ = self._run(stable, None, backend, v.dtype)
        if not causal:
            # The other direction has its own maximum; both are brought to the larger of the two.
            mirrored, far = _stabilised(*(part.flip(2) for part in parts), plain=backend == "reference")
            other, far = self._from_the_end(tuple(part.flip(2) for part in mirrored), backend, v.dtype), far.flip(2)
            both = torch.maximum(top, far)
            read, top = _times(read, (top - both).exp()) + _times(other, (far - both).exp()), both
        return Attended(self.finish(_divided(read, top), v, inputs), None)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        state = super().init_state(batch, positions=positions, device=device, dtype=dtype)
        return {**state, "top": torch.zeros_like(state["sum"][..., 0, 0])}

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        stable, top = _stabilised(*self._parts(q, k, v, key_mask, rotary, inputs), first=state["top"])
        read, end = self._run(stable, state["sum"], backend, v.dtype)
        out = self.finish(_divided(read, top), v, inputs)
        return Attended(out, None), {"sum": end, "top": top[..., -1].to(state["top"].dtype)}

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        inner = super().cost(batch, length, keys, causal=causal, positions=positions, element_bytes=element_bytes)
        top = batch * self.heads.key * max(4, element_bytes) if causal else 0
        return inner + Cost(state_bytes=top)


def _stabilised(q, k, values, forget, write, first: Tensor | None = None, plain: bool = False):
    """What `scan` takes with the running maximum m taken out, and m [B, K, L]; first: m before these positions."""
    with torch.no_grad():
        # m is free to be anything, so long as writes and decays use the same one: its sums may be float64 for nothing.
        start = torch.zeros_like(write[..., :1]) if first is None else first.unsqueeze(-1)
        total = forget.double().cumsum(-1)
        top = total + torch.maximum(start.double(), (write.double() - total).cummax(-1).values)
        top = torch.zeros_like(top) if plain else top
        before = torch.where(torch.arange(top.shape[-1], device=top.device) == 0, start.double(), top.roll(1, -1))
        fall = before - top
    g = forget + fall.to(forget.dtype)
    k = k * (write - top.to(write.dtype)).exp().unsqueeze(-1)
    return (q, k, values, g), top.to(write.dtype)


def _times(read: Tensor, factor: Tensor) -> Tensor:
    """Read [B, H, L, E + 1] times a factor [B, K, L] of its key head."""
    return read * repeat_heads(factor.unsqueeze(-1), read.shape[1])


def _divided(read: Tensor, top: Tensor) -> Tensor:
    least = repeat_heads(top.clamp(min=-80.0).neg().exp().unsqueeze(-1), read.shape[1])
    return read[..., :-1] / torch.maximum(read[..., -1:].abs(), least)
