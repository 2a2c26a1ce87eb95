r"""Infini-attention: softmax inside the current segment, and a compressive memory of all segments before it.

With sigma(x) = elu(x) + 1, S and z what earlier segments of `segment` positions left, and g = sigmoid(gate_h),

    A_local = softmax attention of a query to the keys of its segment up to itself
    A_mem   = sigma(q) S / sigma(q) z, and 0 in the first segment
    o       = g A_mem + (1 - g) A_local

and after the segment, z <- z + sum_j sigma(k_j) and

    S <- S + sum_j sigma(k_j) v_j^T                                    update "plain"
    S <- S + sum_j sigma(k_j) (v_j - sigma(k_j) S / sigma(k_j) z)^T    update "delta": only what S does not hold yet

Two normalisers are mixed by a gate, so there is no joint mass. Time is L segment, memory linear. The decoding state is
S, z and the keys and values of the unfinished segment.

Source:
    Munkhdalai et al. 2024, arXiv:2404.07143

Where we differ:
    The paper leaves 0 / 0 in the first segment open: an empty memory contributes 0, and the gate still applies.
    Rotary positions and ALiBi act inside a segment; as in the paper, none act on the memory.
"""

import torch
from torch import Tensor, nn

from core.attention.backends import implementation, resolve
from core.attention.blocked.memory import memory_forward, read, write
from core.attention.blocked.patterns import pattern_forward
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    State,
    Variant,
    accumulator,
    check_inputs,
    hide,
    repeat_heads,
    visible,
)
from core.attention.feature_maps import FEATURE_MAPS
from core.attention.positions import alibi_bias
from core.attention.registry import nearest, register
from core.attention.ring import empty_ring, extend_ring
from core.attention.variants import softmax

UPDATES = ("delta", "plain")
SIGMA = FEATURE_MAPS["elu"]


def reference(q, k, v, fq, fk, segment, gate, delta, seen, scale, bias=None) -> Tensor:
    """The definition, one segment after the other; fq and fk are features, 0 for masked keys; seen [.., L, L] bool."""
    s, z = fk.new_zeros(*fk.shape[:2], fk.shape[3], v.shape[3]), fk.new_zeros(*fk.shape[:2], fk.shape[3], 1)

    def recalled(f):
        total = f @ z
        return f @ s / total.masked_fill(total == 0, 1.0)

    outs = []
    for a in range(0, q.shape[2], segment):
        at = slice(a, a + segment)
        local = softmax.reference(
            q[:, :, at], k[:, :, at], v[:, :, at], seen[..., at, at], scale, None if bias is None else bias[:, at, at]
        ).out
        outs.append(gate * recalled(fq[:, :, at]) + (1 - gate) * local)
        x = v[:, :, at] - recalled(fk[:, :, at]) if delta else v[:, :, at]
        s, z = s + fk[:, :, at].mT @ x, z + fk[:, :, at].sum(2).unsqueeze(-1)
    return torch.cat(outs, 2)


@implementation("infini", "reference")
def _reference(q, k, v, segment, gate, delta, key_mask, rotary, slopes) -> Tensor:
    k, v = (repeat_heads(hide(x, key_mask), q.shape[1]) for x in (k, v))
    fq, fk = SIGMA.features(q), hide(SIGMA.features(k), key_mask)
    seen = visible(q.shape[2], k.shape[2], causal=True, key_mask=key_mask, device=q.device)
    bias = None if slopes is None else alibi_bias(slopes.to(q.dtype), q.shape[2], k.shape[2])
    scale, gate = q.shape[-1] ** -0.5, gate.to(q.dtype)[:, None, None]
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    return reference(q, k, v, fq, fk, segment, gate, delta, seen, scale, bias)


@implementation("infini", "torch", serves=("state",))
def _torch(q, k, v, segment, gate, delta, key_mask, rotary, slopes) -> Tensor:
    k, v = hide(k, key_mask), hide(v, key_mask)
    fq, fk = features(q, k, key_mask)
    memory, _ = remembered(fq, fk, v, empty_memory(fk, v), segment, delta)
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    return mix(gate, memory, local(q, k, v, segment, key_mask, slopes))


def features(q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """sigma of queries [B, K, G, L, D] and of keys [B, K, 1, M, D], 0 for masked ones, in the memory's precision."""
    acc = accumulator(q.dtype)
    fk = hide(SIGMA.features(k.to(acc)), key_mask)
    return SIGMA.features(q.to(acc)).unflatten(1, (k.shape[1], -1)), fk.unsqueeze(2)


def empty_memory(fk: Tensor, v: Tensor) -> Tensor:
    """S and z side by side before the first segment, [B, K, 1, F, E + 1]."""
    return fk.new_zeros(*fk.shape[:3], fk.shape[4], v.shape[3] + 1)


def remembered(fq, fk, v, total: Tensor, segment: int, delta: bool) -> tuple[Tensor, Tensor]:
    """A_mem [B, H, L, E] of whole segments from the memory `total` on, and the memory after the complete ones."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (fq, fk, v, total))
    out, total, _ = memory_forward(fq, fk, v.unsqueeze(2), total, segment, delta, keep)
    return out.flatten(1, 2), total


def local(q, k, v, segment: int, key_mask, slopes) -> Tensor:
    """A_local of whole segments."""
    size = torch.sym_max(1, torch.sym_min(segment, q.shape[2]))  # a short sequence is not filled up
    scale = q.shape[-1] ** -0.5
    return pattern_forward(q, k, v, key_mask, slopes, "blocks", size, size, True, scale)[0]


def mix(gate: Tensor, memory: Tensor, near: Tensor) -> Tensor:
    """g A_mem + (1 - g) A_local in the dtype of the latter."""
    share = gate.to(memory.dtype)[:, None, None]
    return (share * memory + (1 - share) * near).to(near.dtype)


@register(
    "infini",
    summary="softmax inside a segment and a gated compressive memory of all earlier ones; linear",
    source="Munkhdalai et al. 2024 (Infini-attention), arXiv:2404.07143",
    pick="streams that come in segments",
    stability="elu sums; no joint mass of memory and segment",
)
class InfiniAttention(Variant):
    """Local softmax attention and an associative memory, mixed by a learned gate per head.

    Args:
        segment: positions that attend to each other exactly, counted from the start.
        update: "delta" or "plain".
    """

    can = frozenset({"causal", "recurrent"})
    positions = frozenset({"rope", "alibi"})
    anchor = "start"

    def __init__(self, heads: Heads, *, segment: int = 2048, update: str = "delta"):
        super().__init__(heads)
        if isinstance(segment, bool) or not isinstance(segment, int) or segment < 1:
            raise ValueError(f"segment must be a whole number of at least 1, got {segment!r}")
        if update not in UPDATES:
            raise ValueError(f"unknown update {update!r}{nearest(update, UPDATES)}; known: {', '.join(UPDATES)}")
        self.segment, self.delta = segment, update == "delta"
        self.gate = nn.Parameter(torch.zeros(heads.query))

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
        check_inputs(q, k, v, key_mask, slopes)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"segments need as many queries as keys, got L={q.shape[2]}, M={k.shape[2]}")
        run = resolve("infini", backend, q.device.type, q.dtype, ()).run
        gate = torch.sigmoid(self.gate)
        return Attended(run(q, k, v, self.segment, gate, self.delta, key_mask, rotary, slopes), None)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        h, acc = self.heads, accumulator(dtype or torch.float32)
        total = torch.zeros(batch, h.key, h.width, h.value_width + 1, device=device, dtype=acc)
        return {**empty_ring(h, batch, 0, device, dtype), "sum": total}

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        resolve("infini", backend, q.device.type, q.dtype, ("state",))
        size, begun, length = self.segment, state["keys"].shape[2], k.shape[2]
        here = min(length, size - begun)  # new tokens of the segment that is under way
        last = extend_ring(state, k, v, key_mask)
        keys, values, mask = last["keys"], last["values"], last["mask"]
        fq, fk = features(q, keys, mask)
        total = state["sum"].unsqueeze(2)
        memory = [read(total, fq[..., :here, :]).flatten(1, 2)]
        if rotary is not None:
            q, keys = rotary[0](q), rotary[1].extended(begun)(keys)
        end = begun + here
        own = {"key_mask": mask[:, :end], "slopes": slopes, "causal": True}
        near = [softmax.attend(q[:, :, :here], keys[:, :, :end], values[:, :, :end], **own).out]
        if end == size:
            total = write(total, fk[..., :end, :], values[:, :, None, :end].to(total.dtype), self.delta)
        if here < length:
            rest, total = remembered(fq[..., here:, :], fk[..., end:, :], values[:, :, end:], total, size, self.delta)
            memory.append(rest)
            near.append(local(q[:, :, here:], keys[:, :, end:], values[:, :, end:], size, mask[:, end:], slopes))
        out = mix(torch.sigmoid(self.gate), torch.cat(memory, 2), torch.cat(near, 2))
        done = (begun + length) // size * size
        kept = {name: last[name][:, :, done:].contiguous() for name in ("keys", "values")}
        return Attended(out, None), {**kept, "mask": mask[:, done:].contiguous(), "sum": total.squeeze(2)}

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h, rest = self.heads, length % self.segment
        whole = length - rest
        pairs = (whole * (self.segment + 1) + rest * (rest + 1)) // 2
        cell = 2 * h.width * (h.value_width + 1)  # reading a memory for one position, or writing one
        begun = rest * (h.key * element_bytes * (h.width + h.value_width) + 1)
        return Cost(
            flops=batch
            * (
                2 * h.query * pairs * (h.width + h.value_width)
                + h.query * length * cell
                + h.key * whole * cell * (2 if self.delta else 1)
            ),
            bytes_moved=2 * batch * element_bytes * (h.query + h.key) * length * (h.width + h.value_width),
            state_bytes=batch * (begun + max(4, element_bytes) * h.key * h.width * (h.value_width + 1)),
            parameters=h.query,
        )
