r"""TransNormer: linear attention that is normalised after the sum, and softmax inside of blocks.

NormAttention has no denominator: with n_i the number of visible keys,

    x_i = sum_j phi(q_i).phi(k_j) v_j  (over n_i where not causal),    o_i = g x_i / sqrt(mean(x_i^2) + 1e-6)

with a gain g [E] per head. Weights may be negative, so there is no mass; the state is S = sum_j phi(k_j) v_j^T.

DiagAttention is softmax among the positions of one block of `block`, blocks counted from the start: query i sees key
j iff i // block = j // block, and j <= i if causal (i + M - L in place of i where L and M differ). Its state is what
has been seen of the current block.

The paper stacks them, diagonal below and norm above: its early layers look nearby.

Source:
    Qin et al. 2022 (The devil in linear transformer), arXiv:2210.10340

Where we differ:
    Bidirectional sums are means, which the norm undoes but for its epsilon. Positions are rotary or ALiBi's constant
    decay where asked for, not the paper's learned ones. DiagAttention is the softmax form only.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.backends import implementation, resolve
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
from core.attention.ring import extend_ring, keep_ring
from core.attention.variants import linear, softmax

ELEMENTWISE = ("elu", "identity", "relu", "silu")
"""Feature maps that act on each number, which is all that a norm or a difference instead of a quotient asks for."""


def elementwise_map(name: str):
    """The feature map `name`.

    Raises:
        ValueError: it is not one of `ELEMENTWISE`.
    """
    if name not in ELEMENTWISE:
        raise ValueError(
            f"feature_map must be one of {', '.join(ELEMENTWISE)}{nearest(name, ELEMENTWISE)}, got {name!r}"
        )
    return FEATURE_MAPS[name]


@implementation("norm", "reference")
def _norm_reference(q, k, v, phi, causal, key_mask, slopes, state) -> tuple[Tensor, None]:
    seen = visible(q.shape[2], k.shape[2], causal=causal, key_mask=key_mask, device=q.device).to(q.dtype)
    if slopes is not None:
        seen = seen * torch.exp(alibi_bias(slopes.to(q.dtype), q.shape[2], k.shape[2]))
    k, v = (repeat_heads(hide(x, key_mask), q.shape[1]) for x in (k, v))
    return (phi.features(q) @ phi.features(k).mT * seen) @ v, None


@implementation("norm", "torch", serves=("state",))
def _norm_torch(q, k, v, phi, causal, key_mask, slopes, state) -> tuple[Tensor, Tensor | None]:
    # The sums of `linear` have a column of ones for a denominator, which has no place in this state.
    before = None
    if state is not None:
        before = {"sum": F.pad(state, (0, 1)), "count": torch.zeros(q.shape[0], dtype=state.dtype, device=q.device)}
    options = {"key_mask": key_mask, "slopes": slopes, "normalize": False, "backend": "torch"}
    attended, new = linear.attend(q, k, v, phi, causal=causal, state=before, keep=state is not None, **options)
    return attended.out, None if new is None else new["sum"][..., :-1].contiguous()


@register(
    "norm",
    summary="linear attention without a denominator, RMS-normalised instead; linear",
    source="Qin et al. 2022 (TransNormer), arXiv:2210.10340",
    pick="linear attention diverged: early training in low precision",
    stability="no denominator; RMS norm in float32",
)
class NormAttention(Variant):
    """Sums of keys and values, read and then normalised per head.

    Args:
        feature_map: "elu", "identity", "relu" or "silu".
        gain: whether the norm has a learned gain per head and channel; without it this is SimpleRMSNorm.
    """

    can = frozenset({"causal", "bidirectional", "cross", "recurrent"})
    positions = frozenset({"rope", "alibi"})

    def __init__(self, heads: Heads, *, feature_map: str = "elu", gain: bool = True):
        super().__init__(heads)
        self.map = elementwise_map(feature_map)
        self.gain = nn.Parameter(torch.ones(heads.query, heads.value_width)) if gain else None

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
        x, _ = self._sums(q, k, v, causal, key_mask, rotary, slopes, backend)
        if not causal:
            mask = torch.ones(1, k.shape[2], device=k.device) if key_mask is None else key_mask
            x = x / mask.sum(-1).clamp(min=1).view(-1, 1, 1, 1)
        return self._normed(x, v.dtype)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        h, acc = self.heads, accumulator(dtype or torch.float32)
        per = h.query if positions == "alibi" else h.key
        return {"sum": torch.zeros(batch, per, h.width, h.value_width, device=device, dtype=acc)}

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        x, new = self._sums(q, k, v, True, key_mask, rotary, slopes, backend, state["sum"])
        return self._normed(x, v.dtype), {"sum": new}

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        keys = length if keys is None else keys
        h, size = self.heads, max(4, element_bytes)
        sums = linear.sums_cost(h, self.map, h.width, batch, length, keys, causal, positions, element_bytes)
        per = h.query if positions == "alibi" else h.key
        state = batch * size * per * h.width * h.value_width if causal else 0
        return replace(sums, state_bytes=state, parameters=0 if self.gain is None else self.gain.numel())

    def _sums(self, q, k, v, causal, key_mask, rotary, slopes, backend, state=None) -> tuple[Tensor, Tensor | None]:
        """x_i, not yet a mean, in the accumulator's precision, because a sum may leave float16; and the new state."""
        check_inputs(q, k, v, key_mask, slopes)
        if slopes is not None and not causal and q.shape[2] != k.shape[2]:
            raise ValueError(f"two-sided decay needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
        acc, phi = accumulator(v.dtype), self.map
        if rotary is not None:
            k = hide(k, key_mask)
            q, k = (turn(phi.features(x.to(acc))) for turn, x in zip(rotary, (q, k)))
            phi = FEATURE_MAPS["identity"]
        needs = () if state is None else ("state",)
        run = resolve("norm", backend, q.device.type, q.dtype, needs).run
        return run(q, k, v.to(acc), phi, causal, key_mask, slopes, state)

    def _normed(self, x: Tensor, dtype: torch.dtype) -> Attended:
        with torch.autocast(x.device.type, enabled=False):
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            y = y if self.gain is None else y * self.gain.to(y.dtype).unsqueeze(1)
        return Attended(y.to(dtype), None)


@implementation("diagonal", "reference")
def _diagonal_reference(q, k, v, block, causal, key_mask, slopes) -> Attended:
    at = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    together = at.div(block, rounding_mode="floor") == torch.arange(k.shape[2], device=q.device)[None] // block
    seen = together & visible(q.shape[2], k.shape[2], causal=causal, key_mask=key_mask, device=q.device)
    bias = None if slopes is None else alibi_bias(slopes.to(q.dtype), q.shape[2], k.shape[2])
    k, v = (repeat_heads(hide(x, key_mask), q.shape[1]) for x in (k, v))
    return softmax.reference(q, k, v, seen, q.shape[-1] ** -0.5, bias)


@implementation("diagonal", "torch", serves=("state",))
def _diagonal_torch(q, k, v, block, causal, key_mask, slopes) -> Attended:
    k, v = hide(k, key_mask), hide(v, key_mask)
    scale = q.shape[-1] ** -0.5
    return Attended(*pattern_forward(q, k, v, key_mask, slopes, "blocks", block, block, causal, scale))


@register(
    "diagonal",
    summary="softmax among the positions of one block; linear",
    source="Qin et al. 2022 (TransNormer's DiagAttention), arXiv:2210.10340",
    pick="early layers of a mix whose later layers are linear",
    stability="as softmax, in blocks",
)
class DiagAttention(Variant):
    """Softmax inside of blocks that do not overlap.

    Args:
        block: positions of a block, counted from the start.
    """

    can = frozenset({"causal", "bidirectional", "recurrent", "mass"})
    positions = frozenset({"rope", "alibi"})
    anchor = "start"

    def __init__(self, heads: Heads, *, block: int = 64):
        super().__init__(heads)
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"block must be a whole number of at least 1, got {block!r}")
        self.block = block

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
        if not causal and q.shape[2] != k.shape[2]:
            raise ValueError(f"blocks need as many queries as keys, got L={q.shape[2]}, M={k.shape[2]}")
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        run = resolve("diagonal", backend, q.device.type, q.dtype, ()).run
        return run(q, k, v, self.block, causal, key_mask, slopes)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        h, size = self.heads, self.block - 1
        return {
            "keys": torch.zeros(batch, h.key, size, h.width, device=device, dtype=dtype),
            "values": torch.zeros(batch, h.key, size, h.value_width, device=device, dtype=dtype),
            "mask": torch.zeros(batch, size, dtype=torch.bool, device=device),
            "seen": torch.zeros(batch, dtype=torch.int64, device=device),
        }

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        run = resolve("diagonal", backend, q.device.type, q.dtype, ("state",)).run
        length, size = k.shape[2], self.block - 1
        last = extend_ring(state, k, v, key_mask)
        # Where the current block starts in `last` is known to the device only: gather from there.
        into = state["seen"] % self.block
        at = torch.arange(size + length, device=q.device) + (size - into)[:, None]
        index = at.clamp(max=size + length - 1)
        out, mass = run(
            _take(q, (index - size).clamp(min=0)),
            _take(last["keys"], index),
            _take(last["values"], index),
            self.block,
            True,
            last["mask"].gather(1, index) & (at < size + length),
            slopes,
        )
        rows = into[:, None] + torch.arange(length, device=q.device)
        attended = Attended(_take(out, rows), _take(mass.unsqueeze(-1), rows).squeeze(-1))
        return attended, {**keep_ring(last, size), "seen": state["seen"] + length}

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h, rest = self.heads, length % self.block
        pairs = length // self.block * self.block**2 + rest**2
        pairs = (pairs + length) // 2 if causal else pairs
        kept = (self.block - 1) * (h.key * element_bytes * (h.width + h.value_width) + 1) + 8
        return Cost(
            flops=2 * batch * h.query * pairs * (h.width + h.value_width),
            bytes_moved=batch * element_bytes * (h.query + h.key) * length * (h.width + h.value_width),
            state_bytes=batch * kept if causal else 0,
        )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, L, D] at positions [B, N] -> [B, H, N, D]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
