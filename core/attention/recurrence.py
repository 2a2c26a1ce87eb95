r"""What gated recurrences share: one state that is decayed, written and read position by position.

    S_t = decay_t(S_{t-1}) + k_t x_t^T,    o_t = S_t^T q_t,    x_t = v_t  or  beta_t (v_t - decay_t(S_{t-1})^T k_t)

A variant says what its decay is, how it is learned, and what follows the reading; `blocked.scan` computes
it in chunks and lists the kinds of decay and of writing.

Two-sided use reads the past with the own position, and the future without it: a second recurrence runs from the end,
and position t reads decay_t(S_{t+1}) before it writes. So the diagonal counts once, and with a constant decay a weight
is e^{-rate |i - j|} on both sides. Both directions share their weights.
"""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention import kernels
from core.attention.backends import honours, implementation, resolve
from core.attention.blocked import full_precision
from core.attention.blocked.scan import CHUNK, scan
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
)
from core.attention.packing import Pack

LEAST_GATE = -50.0
"""Log-gates are clamped here: e^-50 forgets all that float32 can hold, and a sum of such gates keeps its digits."""


def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None = None, state: Tensor | None = None):
    """The definition, token by token: shapes of `blocked.scan.scan`; gives (o, last state)."""
    heads, length = q.shape[1], q.shape[2]
    s = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state.to(k.dtype)
    read = []
    for t in range(length):
        decay = g[:, :, t, None, None] if g.dim() == 3 else g[:, :, t, :, None]
        key, value = k[:, :, t, :, None], v[:, :, t, None, :]
        s = s * decay.exp()
        write = value if beta is None else beta[:, :, t, None, None] * (value - key.mT @ s)
        s = s + key * write
        read.append(q[:, :, t, None, :] @ repeat_heads(s, heads))
    return torch.cat(read, 2), s


def _reference(kind, q, k, v, *gates, state=None):
    return reference(q, k, v, *gates, state=state)


for _kind in CHUNK:
    implementation(_kind, "reference", serves=("state", "wide features"))(_reference)
    implementation(_kind, "torch", serves=("state", "wide features"))(scan)


def _triton(kind, q, k, v, *gates, state=None, pack=None):
    from core.attention.kernels import decay, delta, gated

    if pack is not None:
        return decay.scan(q, k, v, *gates, state=state, pack=pack)
    fused = delta if kind.endswith("delta") else decay if kind == "decay" else gated
    return fused.scan(q, k, v, *gates, state=state)


if kernels.PRESENT:
    for _kind in CHUNK:
        serves = ("state", "packs") if _kind == "decay" else ("state",)
        implementation(_kind, "triton", serves=serves, devices=kernels.DEVICES, dtypes=kernels.DTYPES)(_triton)


def _needs(q: Tensor, state: Tensor | None) -> tuple[str, ...]:
    wide = q.shape[3] > kernels.WIDEST
    return ("state",) * (state is not None) + ("wide features",) * wide


class GateLinear(nn.Linear):
    """A linear map in the precision of its input, whatever that of its weights: gates stay float32 in a half model."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        nn.init.xavier_uniform_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Recurrence(Variant):
    """A variant whose state is one [F, E] matrix per key head.

    A subclass names its `kind` and implements `prepare`; `finish` applies the output's norm and gate.

    Args:
        heads: head geometry.
        norm: RMS-normalise each head's output, with a learned gain.
        gate: multiply the output by an activation of a projection of the layer's input.
    """

    can = frozenset({"causal", "bidirectional", "recurrent"})
    kind: ClassVar[str]
    activation: ClassVar = staticmethod(F.silu)
    exclusive: ClassVar[bool] = False
    """Whether a position reads the state before its own decay and write."""
    by_position: ClassVar[bool] = True
    """Whether all but the scan looks at one position at a time, so that a pack needs no more than a scan of packs."""

    def __init__(self, heads: Heads, *, norm: bool = True, gate: bool = True):
        super().__init__(heads)
        self.norm = nn.RMSNorm(heads.value_width, eps=1e-5) if norm else None
        self.gate = nn.Linear(heads.input_width(self.name), heads.query * heads.value_width) if gate else None
        if self.gate is not None:
            nn.init.xavier_uniform_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, key_mask: Tensor | None) -> tuple[Tensor, ...]:
        """(q, k, v, gates...) of `scan`, from inputs in the accumulator's precision, masked keys being 0 already."""
        raise NotImplementedError

    def own(self, parts: tuple[Tensor, ...], v: Tensor) -> Tensor | None:
        """What a position adds of itself [B, H, L, E], from what `prepare` gave and v as it came; None: nothing."""
        return None

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
        pack=None,
    ) -> Attended:
        parts = self._parts(q, k, v, key_mask, rotary, inputs)
        out, _ = self._run(parts, None, backend, v.dtype, pack)
        if not causal:
            out = out + self._from_the_end(parts, backend, v.dtype, pack)
        return Attended(self.finish(self._with_own(out, parts, hide(v, key_mask)), v, inputs), None)

    def reads_packs(self, q, v, *, backend="auto") -> bool:
        return self.by_position and honours(self.kind, "packs", backend, q, v, _needs(q, None))

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        h, acc = self.heads, accumulator(dtype or torch.float32)
        return {"sum": torch.zeros(batch, h.key, self.features, self.columns, device=device, dtype=acc)}

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        parts = self._parts(q, k, v, key_mask, rotary, inputs)
        out, end = self._run(parts, state["sum"], backend, v.dtype)
        return Attended(self.finish(self._with_own(out, parts, hide(v, key_mask)), v, inputs), None), {"sum": end}

    def finish(self, out: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """What was read [B, H, L, E] -> the head's output in the dtype of v."""
        if self.norm is not None:
            with full_precision(out.device):  # and not in float16, which holds no sum above 65504
                out = F.rms_norm(out, self.norm.normalized_shape, self.norm.weight.to(out.dtype), self.norm.eps)
        if self.gate is not None:
            gate = self.activation(self.gate(_given(inputs, self.name)))
            out = out * gate.unflatten(-1, (self.heads.query, -1)).transpose(1, 2)
        return out.to(v.dtype)

    @property
    def features(self) -> int:
        """F, rows of the state."""
        return self.heads.width

    @property
    def columns(self) -> int:
        """Columns of the state: E, and one more where a normaliser is summed."""
        return self.heads.value_width

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h, features, columns = self.heads, self.features, self.columns
        chunk = min(CHUNK[self.kind], max(1, length))
        flops = h.query * (2 * chunk * (features + columns) + 2 * features * columns) + h.key * 2 * features * columns
        if self.kind.endswith("delta"):
            flops += h.key * (2 * chunk * features + chunk * columns + 2 * features * columns)
        learned = sum(p.numel() for p in self.parameters())
        matrices = sum(p.numel() for p in self.parameters() if p.dim() > 1)
        return Cost(
            flops=batch * length * ((1 if causal else 2) * flops + 2 * matrices),
            bytes_moved=batch * element_bytes * length * (h.query + h.key) * (h.width + h.value_width),
            state_bytes=batch * h.key * features * columns * max(4, element_bytes) if causal else 0,
            parameters=learned,
        )

    def _with_own(self, out: Tensor, parts, v: Tensor) -> Tensor:
        own = self.own(parts, v.to(out.dtype))
        return out if own is None else out + own

    def _parts(self, q, k, v, key_mask, rotary, inputs: Inputs) -> tuple[Tensor, ...]:
        check_inputs(q, k, v, key_mask)
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"attention {self.name!r} needs as many queries as keys, got L={q.shape[2]}, M={k.shape[2]}"
            )
        acc = accumulator(q.dtype)
        with full_precision(q.device):
            x = _given(inputs, self.name).to(acc)
            if key_mask is not None:
                x = torch.where(key_mask.unsqueeze(-1), x, 0.0)
            k, v = hide(k, key_mask), hide(v, key_mask)
            q, k, *rest = self.prepare(q.to(acc), k.to(acc), v.to(acc), x, key_mask)
        if rotary is not None:  # after any activation, so that only differences of positions matter
            q, k = rotary[0](q), rotary[1](k)
        return q, k, *rest

    def _run(self, parts, state: Tensor | None, backend: str, given: torch.dtype, pack: Pack | None = None):
        """Resolve and run, (out, last state); given: the dtype of the layer's values."""
        run = _resolved(self.kind, backend, parts[0], state, given, pack)
        return _before(run, self.kind, *parts, state=state) if self.exclusive else run(self.kind, *parts, state=state)

    def _from_the_end(self, parts, backend: str, given: torch.dtype, pack: Pack | None = None) -> Tensor:
        q, k, v, g, *beta = (part.flip(2) for part in parts)
        if not self.exclusive:
            decay = repeat_heads(g.unsqueeze(-1) if g.dim() == 3 else g, q.shape[1])
            q = q * decay.exp()
        pack = None if pack is None else pack.reversed()
        run = _resolved(self.kind, backend, q, None, given, pack)
        return _before(run, self.kind, q, k, v, g, *beta, pack=pack)[0].flip(2)


def _resolved(kind: str, backend: str, q: Tensor, state: Tensor | None, given: torch.dtype, pack: Pack | None = None):
    """What runs the scan; kernels take queries, keys and values as the layer has them, gates and state in float32."""
    choice = resolve(kind, backend, q.device.type, q.dtype, _needs(q, state) + ("packs",) * (pack is not None))
    run = choice.run if pack is None else partial(choice.run, pack=pack)
    if choice.name != "triton" or given not in kernels.DTYPES:
        return run
    # Products of widened halves would run on the slow units of a GPU. Sums, gates and states stay float32 there too.
    return lambda kind, *parts, state=None: run(kind, *(part.to(given) for part in parts[:3]), *parts[3:], state=state)


def _before(run, kind: str, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, state=None, pack: Pack | None = None):
    """Let every position read what the state was before its decay and write."""
    begins = _is_first(q, pack)
    if state is None:
        first = torch.zeros_like(q[:, :, :1, :1]).expand(-1, -1, -1, v.shape[3])
    else:
        first = q[:, :, :1].to(state.dtype) @ repeat_heads(state, q.shape[1])
    # The state before position t is the one after t - 1, so the queries move up by one. Rolled rather than sliced:
    # torch.export would exclude the length at which a slice is a single row.
    moved = q.roll(-1, 2)
    if pack is not None:  # the last position of a sequence has no query of its own to answer, whatever comes next
        moved = torch.where(begins.roll(-1, 0), 0.0, moved)
    out, end = run(kind, moved, k, v, *gates, state=state)
    return torch.where(begins, first.to(out.dtype), out.roll(1, 2)), end


def _is_first(x: Tensor, pack: Pack | None) -> Tensor:
    at = torch.arange(x.shape[2], device=x.device)
    return (at == 0 if pack is None else torch.isin(at, pack.offsets))[:, None]


def silent(gate: Tensor, key_mask: Tensor | None) -> Tensor:
    """Zero a gate [B, K, L] or [B, K, L, F] at masked keys: the state passes them unchanged."""
    if key_mask is None:
        return gate
    return torch.where(key_mask[:, None, :] if gate.dim() == 3 else key_mask[:, None, :, None], gate, 0.0)


def log_gate(g: Tensor, key_mask: Tensor | None) -> Tensor:
    """A log-gate [B, K, L, ...] <= 0, bounded below and silent at masked keys."""
    return silent(g.clamp(min=LEAST_GATE), key_mask)


def by_head(y: Tensor, heads: int) -> Tensor:
    """[B, L, heads * X] -> [B, heads, L, X]."""
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def _given(inputs: Inputs, name: str) -> Tensor:
    if inputs.x is None:
        raise ValueError(
            f"attention {name!r} reads the layer's input: call it through Attention, or give Inputs(x=...)"
        )
    return inputs.x
