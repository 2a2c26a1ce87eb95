r"""LoLCATs attention: softmax for near keys and a linear tail for the others, mixed at a fixed level.

With W(i) the window of query i, R(i) all earlier keys, m_i = max_{j in W} scale q_i.k_j and sigma_h = sigmoid(gate_h),

          sigma_h sum_{j in W} exp(scale q_i.k_j - m_i) v_j + rest_h sum_{j in R} phi(q_i).phi(k_j) v_j
    o_i = ---------------------------------------------------------------------------------------------
          sigma_h sum_{j in W} exp(scale q_i.k_j - m_i)     + rest_h sum_{j in R} phi(q_i).phi(k_j)

with rest_h = 1, or 1 - sigma_h. It is the form in which trained softmax models are made linear (their weights fit it by
distillation), and `hybrid` with a tail raised by m_i + log(rest_h / sigma_h). Subtracting the maximum makes the result
blind to the level of the window's scores, so there is no mass. Time and memory are linear; the decoding state is the
last `window` keys and values, and the sums of those that left.

Source:
    Zhang et al. 2024, arXiv:2410.10254

Where we differ:
    The window slides by one position in training and decoding alike; the published kernels also move it a block at a
    time. The rotary positions of an elementwise phi act after it and in the numerator only, as in `linear`; the paper
    rotates before phi, which makes its tail depend on absolute positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.backends import implementation, resolve
from core.attention.blocked.window import window_top
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
    merge,
    repeat_heads,
    visible,
)
from core.attention.feature_maps import FeatureMap
from core.attention.feature_projection import FeatureProjection, featured
from core.attention.learned_maps import LearnedMap
from core.attention.registry import register
from core.attention.ring import extend_ring, keep_ring
from core.attention.variants import hybrid, linear
from core.attention.variants.window import band_pairs, check_window


def reference(q, k, v, fq, fk, window, ratio, key_mask, scale, turned=None, level=None, floor=0.0) -> Tensor:
    """The definition, dense, with numerator and denominator divided by sigma_h exp(-m_i).

    ratio: [H] log(rest_h / sigma_h).   turned, level, floor: of the tail, as in `hybrid.reference`.
    """
    near = visible(q.shape[2], k.shape[2], causal=True, window=window, key_mask=key_mask, device=q.device)
    top = (scale * q @ k.mT).masked_fill(~near, -torch.inf).amax(-1)
    raised = top.masked_fill(top == -torch.inf, 0.0) + ratio[:, None]
    raised = raised if level is None else raised + level.to(q.dtype)
    parts = {"turned": turned, "level": raised, "floor": floor}
    return hybrid.reference(q, k, v, fq, fk, window, torch.zeros_like(ratio), True, key_mask, scale, **parts).out


@implementation("lolcats", "reference")
def _reference(q, k, v, tail_q, tail_k, window, phi, ratio, key_mask, scale, rotary) -> Tensor:
    tail_q, tail_k, phi, turning, level = featured(tail_q, hide(tail_k, key_mask), phi, rotary)
    k, v, tail_k = (repeat_heads(x, q.shape[1]) for x in (hide(k, key_mask), hide(v, key_mask), tail_k))
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    features = phi.features(tail_q).to(q.dtype), phi.features(tail_k).to(q.dtype)
    turned = None if turning is None else tuple(turn(x) for turn, x in zip(turning, features))
    return reference(q, k, v, *features, window, ratio.to(q.dtype), key_mask, scale, turned, level, phi.floor)


@implementation("lolcats", "torch", serves=("state",))
def _torch(q, k, v, tail_q, tail_k, window, phi, ratio, key_mask, scale, rotary) -> Tensor:
    behind = k.shape[2] - q.shape[2] - window  # the newest key of query 0's tail
    tail, _ = linear.sums(tail_q, tail_k, v, phi, "past", behind, key_mask=key_mask, rotary=rotary, backend="torch")
    return mix(q, k, v, tail, window, ratio, key_mask, scale, rotary)


def mix(q, k, v, tail: Attended, window, ratio, key_mask, scale, rotary) -> Tensor:
    """The window's part and the tail, which is raised to the window's level."""
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    k, v = hide(k, key_mask), hide(v, key_mask)
    near = hybrid.near(q, k, v, window, True, key_mask, None, scale, None)
    top = highest(q, k, window, key_mask, scale)
    return merge(near, linear.raised(tail, top + ratio.to(top.dtype)[:, None])).out


def highest(q: Tensor, k: Tensor, window: int, key_mask: Tensor | None, scale: float) -> Tensor:
    """m_i [B, H, L], 0 where a window is empty; its gradient goes to the one pair that attains it."""
    batch, heads, _, _ = q.shape
    at = window_top(q.detach(), k.detach(), key_mask, window, True, scale)
    item = torch.arange(batch, device=q.device)[:, None, None]
    key_head = torch.arange(heads, device=q.device)[:, None] // (heads // k.shape[1])
    acc = accumulator(q.dtype)
    top = scale * (q.to(acc) * k[item, key_head, at.clamp(min=0)].to(acc)).sum(-1)
    return torch.where(at < 0, 0.0, top)


@register(
    "lolcats",
    summary="softmax over the nearest keys and a linear tail, as trained softmax models are converted; linear",
    source="Zhang et al. 2024, arXiv:2410.10254",
    pick="a trained softmax model is converted",
    stability="the window's maximum is taken out of both parts, so the window's level is lost",
)
class LolcatsAttention(Variant):
    """A softmax window and a linear tail, the window's level removed.

    Args:
        window: keys nearer than this are attended exactly.
        feature_map, feature_dim: of the tail, see `LinearAttention`.
        complement: whether the tail weighs 1 - sigma instead of 1.
    """

    can = frozenset({"causal", "recurrent"})
    positions = frozenset({"rope"})

    def __init__(
        self,
        heads: Heads,
        *,
        window: int = 64,
        feature_map: str = "hedgehog",
        feature_dim: int | None = None,
        complement: bool = False,
    ):
        super().__init__(heads)
        check_window(window)
        self.window, self.complement = window, complement
        self.project = FeatureProjection(heads, feature_map, feature_dim)
        if not self.map.positive:
            raise ValueError(f"feature map {feature_map!r} is signed: the shared denominator needs a positive one")
        self.gate = nn.Parameter(torch.full((heads.query,), torch.logit(torch.tensor(0.1)).item()))

    @property
    def map(self) -> FeatureMap | LearnedMap:
        """phi."""
        return self.project.map

    @property
    def ratio(self) -> Tensor:
        """log(rest / sigma), [H]."""
        return -self.gate if self.complement else -F.logsigmoid(self.gate)

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
        run = resolve("lolcats", backend, q.device.type, q.dtype, ()).run
        tails, scale = self.project(q, hide(k, key_mask)), q.shape[-1] ** -0.5
        return Attended(run(q, k, v, *tails, self.window, self.map, self.ratio, key_mask, scale, rotary), None)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        features = self.map.width(self.project.width)
        return hybrid.empty_state(self.heads, features, self.window, batch, positions, device, dtype)

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        resolve("lolcats", backend, q.device.type, q.dtype, ("state",))
        leaving = k.shape[2]  # as many as come
        ring = extend_ring(state, k, v, key_mask)
        early = None
        if rotary is not None:
            rotary = (rotary[0], rotary[1].extended(self.window))
            early = (rotary[0], rotary[1].first(leaving))
        tail, past = linear.sums(
            self.project.queries(q),
            self.project.keys(ring["keys"][:, :, :leaving]),
            ring["values"][:, :, :leaving],
            self.map,
            "past",
            0,
            key_mask=ring["mask"][:, :leaving],
            rotary=early,
            state={"sum": state["sum"], "count": state["count"]},
            keep=True,
            backend="torch",
        )
        scale = q.shape[-1] ** -0.5
        out = mix(q, ring["keys"], ring["values"], tail, self.window, self.ratio, ring["mask"], scale, rotary)
        return Attended(out, None), {**keep_ring(ring, self.window), **(past or {})}

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h, width = self.heads, self.project.width
        tail = linear.sums_cost(h, self.map, width, batch, length, length, True, positions, element_bytes)
        pairs = band_pairs(length, self.window, True)
        ring = self.window * (h.key * element_bytes * (h.width + h.value_width) + 1)
        return self.project.cost(batch, length, length) + Cost(
            flops=tail.flops + 2 * batch * h.query * (pairs * (h.width + h.value_width) + length * h.width),
            bytes_moved=2 * tail.bytes_moved,
            state_bytes=batch * ring + tail.state_bytes,
            parameters=h.query,
        )
