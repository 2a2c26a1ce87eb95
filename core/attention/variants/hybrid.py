r"""Hybrid attention: exact softmax for near keys, a linear tail for all the others, under one normaliser.

With W(i) the window of query i and R(i) all other visible keys,

          sum_{j in W} exp(scale q_i.k_j) v_j + gamma_h sum_{j in R} phi(q_i).phi(k_j) v_j
    o_i = -------------------------------------------------------------------------------
          sum_{j in W} exp(scale q_i.k_j)     + gamma_h sum_{j in R} phi(q_i).phi(k_j)

which is merge(window, tail) with log gamma_h = gate_h added to the tail's log mass. Causally R(i) is all keys at least
`window` behind i, so the tail is linear attention over keys delayed by `window`; two-sided it is that and its mirror
image. Time and memory are linear. The decoding state is the last `window` keys and values, and the sums of those that
left: a key enters the sums exactly when it leaves the ring, in prefill and in step alike.

Source:
    The combination of a window with a linear tail: Arora et al. 2024 (Based), arXiv:2402.18668, across layers; Zhang
    et al. 2024 (LoLCATs), arXiv:2410.10254, inside a layer.

Where we differ:
    LoLCATs subtracts the window's maximum before mixing and so loses the window's level against the tail; here both
    parts keep their true mass, which makes the result independent of how the keys are split.
"""

import torch
from torch import Tensor, nn

from core.attention import kernels
from core.attention.autocast import lowered
from core.attention.backends import honours, implementation, resolve
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    State,
    Variant,
    check_inputs,
    hide,
    merge,
    repeat_heads,
    visible,
)
from core.attention.feature_maps import FeatureMap
from core.attention.feature_maps import feature_map as phi_named
from core.attention.feature_projection import FeatureProjection, featured
from core.attention.grid import ValueConvolution, last_positions
from core.attention.learned_maps import LearnedMap
from core.attention.positions import alibi_bias
from core.attention.registry import register
from core.attention.ring import empty_ring, extend_ring, keep_ring
from core.attention.variants import linear
from core.attention.variants.window import attend as attend_window
from core.attention.variants.window import band_pairs, check_nearest, check_window


def reference(
    q, k, v, fq, fk, window, gate, causal, key_mask, scale, slopes=None, turned=None, level=None, floor=0.0
) -> Attended:
    """The definition, dense: one weight per visible pair, exponential inside the window and gamma phi.phi outside.

    turned: rotated features of the tail's numerator, where they differ from the normaliser's (`positions`).
    level: [B, H, L] log of a factor of each query's tail weights that its features leave out.   floor: as in `linear`.
    """
    length, keys = q.shape[2], k.shape[2]
    seen = visible(length, keys, causal=causal, key_mask=key_mask, device=q.device)
    near = seen & visible(length, keys, window=window, device=q.device)
    log_decay = 0.0 if slopes is None else alibi_bias(slopes.to(q.dtype), length, keys)
    inside = torch.exp(scale * q @ k.transpose(-1, -2) + log_decay)
    gamma = torch.exp(gate.to(q.dtype)[:, None, None] + log_decay)
    gamma = gamma if level is None else gamma * torch.exp(level).unsqueeze(-1)

    near_weights = inside.masked_fill(~near, 0.0)
    tail_weights = (gamma * (fq @ fk.transpose(-1, -2))).masked_fill(near | ~seen, 0.0)
    mass = (near_weights + tail_weights).sum(-1)
    empty = mass == 0
    whole = mass.masked_fill(empty, 1.0)
    if turned is not None:
        tail_weights, normal = (gamma * (turned[0] @ turned[1].mT)).masked_fill(near | ~seen, 0.0), tail_weights
    else:
        normal = tail_weights
    past = visible(length, keys, causal=True, device=q.device)
    nearest = 0.0 if slopes is None else slopes.to(q.dtype) * window
    unit = torch.exp(gate.to(q.dtype) - nearest)[:, None, None]
    for side in (past, ~past):  # each side of the tail is a mean of its own, with the floor of `linear`
        weight = (normal * side).sum(-1, keepdim=True)
        least = floor * unit * (seen & ~near & side).sum(-1, keepdim=True)
        share = weight / torch.maximum(weight, least).masked_fill(weight == 0, 1.0)
        tail_weights = torch.where(side, tail_weights * share, tail_weights)
    weights = near_weights + tail_weights
    out = weights @ v.to(weights.dtype) / whole.unsqueeze(-1)
    return Attended(out.to(v.dtype), whole.log().masked_fill(empty, -torch.inf))


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    feature_map: str = "elu",
    gate: Tensor | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    state: State | None = None,
    return_state: bool = False,
    return_mass: bool = False,
    backend: str = "auto",
) -> Tensor | Attended | tuple[Tensor | Attended, State]:
    """Softmax over the nearest keys and linear attention over all others, under one normaliser.

    Args:
        q: queries [B, H, L, D].
        k: keys [B, K, M, D]; H is a multiple of K.
        v: values [B, K, M, E].
        window: a key is near iff |i + M - L - j| < window; at least 1.
        feature_map: phi of the tail, one that is positive.
        gate: [H] log weight gamma of the tail; receives a gradient. None: 0 for maps that estimate exp (taylor), else
            minus the log of the feature width.
        causal: query i sees key j iff j <= i + M - L; then L and M may differ.
        key_mask: bool [B, M], True where a key is real.
        slopes: [H] ALiBi slopes: a bias in the window, the same decay in the tail.
        scale: factor of the window's scores, default 1/sqrt(D); the tail's scale lives in phi.
        state: from `return_state`, to continue a causal sequence.
        return_state: also return the state after these keys (causal only).
        return_mass: return `Attended` with the log mass.
        backend: "auto", "torch" or "reference".

    Returns:
        [B, H, L, E] in the dtype of v, or `Attended`; with `return_state` a pair with the state.

    Raises:
        ValueError: window < 1, shapes disagree, a signed map, two-sided with L != M or with a state.
    """
    heads = check_inputs(q, k, v, key_mask, slopes)
    q, k, v = lowered(q, k, v)
    check_window(window)
    phi = positive_map(feature_map)
    if gate is None:
        gate = torch.full((heads.query,), phi.log_gate(heads.width), device=q.device)
    elif gate.shape != (heads.query,):
        raise ValueError(f"gate must be [{heads.query}], one log weight per head, got {list(gate.shape)}")
    if not causal and (state is not None or return_state):
        raise ValueError("a two-sided hybrid has no state: its tail also comes from the future; use causal=True")
    if (state is not None or return_state) and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"more queries than new keys with a state: where would the first {q.shape[2] - k.shape[2]} stand? "
            f"got L={q.shape[2]}, M={k.shape[2]}"
        )
    check_nearest(q, k, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    parts = {"window": window, "phi": phi, "gate": gate, "slopes": slopes, "scale": scale, "backend": backend}
    if state is None and not return_state:
        attended = attend(q, k, v, q, k, causal=causal, key_mask=key_mask, **parts)
        return attended if return_mass else attended.out
    if state is None:
        positions = None if slopes is None else "alibi"
        state = empty_state(heads, phi.width(heads.width), window, q.shape[0], positions, q.device, k.dtype)
    attended, state = resume(q, k, v, q, lambda keys: keys, state, key_mask=key_mask, **parts)
    return (attended if return_mass else attended.out), state


def positive_map(name: str) -> FeatureMap:
    """The feature map `name`, which must have a mass."""
    return _check_positive(name, phi_named(name))


def _check_positive(name: str, phi):
    if not phi.positive:
        raise ValueError(f"feature map {name!r} is signed: a hybrid needs one whose weights have a mass")
    return phi


def attend(
    q, k, v, tail_q, tail_k, *, window, phi, gate, causal, key_mask, slopes, scale, backend, rotary=None, **packed
) -> Attended:
    """Both parts and their merge; tail_q and tail_k are what phi acts on. packed: pack=, of packs."""
    run = resolve("hybrid", backend, q.device.type, q.dtype, _needs(q, v, tail_q, phi, **packed)).run
    return run(q, k, v, tail_q, tail_k, window, phi, gate, causal, key_mask, slopes, scale, rotary, **packed)


def _needs(q: Tensor, v: Tensor, tail_q: Tensor, phi, pack=None) -> tuple[str, ...]:
    widest = max(q.shape[3], v.shape[3], phi.width(tail_q.shape[3]))
    return ("wide features",) * (widest > kernels.WIDEST) + ("packs",) * (pack is not None)


@implementation("hybrid", "reference", serves=("wide features",))
def _reference(q, k, v, tail_q, tail_k, window, phi, gate, causal, key_mask, slopes, scale, rotary) -> Attended:
    tail_q, tail_k, phi, turning, level = featured(tail_q, hide(tail_k, key_mask), phi, rotary)
    k, v, tail_k = (repeat_heads(x, q.shape[1]) for x in (hide(k, key_mask), hide(v, key_mask), tail_k))
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    features = phi.features(tail_q), phi.features(tail_k)
    turned = None if turning is None else tuple(turn(x) for turn, x in zip(turning, features))
    return reference(q, k, v, *features, window, gate, causal, key_mask, scale, slopes, turned, level, phi.floor)


@implementation("hybrid", "torch", serves=("state", "wide features"))
def _torch(*arguments) -> Attended:
    return merged(*arguments, backend="torch")


def _triton(q, k, v, tail_q, tail_k, window, phi, gate, causal, key_mask, slopes, scale, rotary, pack=None) -> Attended:
    from core.attention.kernels.hybrid_entry import by_one_kernel, fused

    parts = q, k, v, tail_q, tail_k, window, phi, gate, causal, key_mask
    if by_one_kernel(q, v, tail_q, phi, slopes):
        return fused(*parts, scale, rotary, pack=pack)[0]
    return merged(*parts, slopes, scale, rotary, backend="triton", pack=pack)


if kernels.PRESENT:
    serves = ("state", "packs")
    implementation("hybrid", "triton", serves=serves, devices=kernels.DEVICES, dtypes=kernels.DTYPES)(_triton)


def merged(
    q, k, v, tail_q, tail_k, window, phi, gate, causal, key_mask, slopes, scale, rotary, *, backend, pack=None
) -> Attended:
    """The window and the tail, each by its own kernel, and their merge."""
    behind = k.shape[2] - q.shape[2] - window  # the newest key of query 0's tail
    tail_q, tail_k, phi, turning, level = featured(tail_q, hide(tail_k, key_mask), phi, rotary)  # once for both sides
    options = {"key_mask": key_mask, "slopes": slopes, "rotary": turning, "backend": backend, "pack": pack}
    parts = [linear.sums(tail_q, tail_k, v, phi, "past", behind, **options)[0]]
    if not causal:
        parts.append(linear.sums(tail_q, tail_k, v, phi, "future", window, **options)[0])
    tails = [linear.raised(weighted(part, gate, slopes, window), level) for part in parts]
    return merge(near(q, k, v, window, causal, key_mask, slopes, scale, rotary, backend, pack), *tails)


def near(q, k, v, window, causal, key_mask, slopes, scale, rotary, backend="torch", pack=None) -> Attended:
    """The window's part."""
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    options = {"causal": causal, "key_mask": key_mask, "slopes": slopes, "scale": scale, "backend": backend}
    return attend_window(q, k, v, window, pack=pack, **options)


def weighted(tail: Attended, gate: Tensor, slopes: Tensor | None, window: int) -> Attended:
    """A tail with its gate, its nearest key being `window` away."""
    return linear.shifted(linear.further(tail, slopes, window), gate)


def resume(
    q, k, v, tail_q, tail_of, state: State, *, window, phi, gate, key_mask, slopes, scale, backend, rotary=None
) -> tuple[Attended, State]:
    """Causal continuation: new keys stand behind the ring's, and the oldest leave the ring for the sums.

    tail_of: what phi acts on, from keys; applied to each key when it leaves.
    """
    backend = resolve("hybrid", backend, q.device.type, q.dtype, ("state", *_needs(q, v, tail_q, phi))).name
    if backend == "triton":
        from core.attention.kernels.hybrid_entry import stepped

        one = stepped(q, k, v, tail_q, tail_of, state, window, phi, gate, key_mask, slopes, scale, rotary)
        if one is not None:
            return one
    leaving = k.shape[2]  # as many as come
    ring = extend_ring(state, k, v, key_mask)
    if rotary is not None:
        rotary = (rotary[0], rotary[1].extended(window))
    if backend == "triton" and q.shape[2] > 1:
        from core.attention.kernels.hybrid_entry import by_one_kernel, fused

        if by_one_kernel(q, v, tail_q, phi, slopes):
            keys, mask = ring["keys"], ring["mask"]
            parts = q, keys, ring["values"], tail_q, tail_of(keys), window, phi, gate, True, mask, scale, rotary
            attended, total = fused(*parts, state["sum"], keep=True)
            count = linear.counted(q, keys[:, :, :leaving], mask[:, :leaving], state["count"])
            return attended, {**keep_ring(ring, window), "sum": total, "count": count}
    attended = near(q, ring["keys"], ring["values"], window, True, ring["mask"], slopes, scale, rotary, backend)
    tail, past = linear.sums(
        tail_q,
        tail_of(ring["keys"][:, :, :leaving]),
        ring["values"][:, :, :leaving],
        phi,
        "past",
        leaving - q.shape[2],
        key_mask=ring["mask"][:, :leaving],
        slopes=slopes,
        rotary=None if rotary is None else (rotary[0], rotary[1].first(leaving)),
        state={"sum": state["sum"], "count": state["count"]},
        keep=True,
        backend=backend,
    )
    return merge(attended, weighted(tail, gate, slopes, window)), {**keep_ring(ring, window), **(past or {})}


def empty_state(heads: Heads, features: int, window: int, batch: int, positions, device, dtype) -> State:
    """An empty ring of `window` keys and values, and empty sums."""
    return {
        **empty_ring(heads, batch, window, device, dtype),
        **linear.empty_sum(heads, features, batch, positions, device, dtype),
    }


@register(
    "hybrid",
    summary="softmax over the nearest keys and a linear tail over all others, one normaliser; linear",
    source="this project's mass form; parts: arXiv:2402.18668, arXiv:2410.10254",
    pick="a sequence is long, near tokens matter exactly and far ones roughly; the default beyond softmax",
    stability="one normaliser for both parts; the gate starts where both masses have one scale",
)
class HybridAttention(Variant):
    """A softmax window and a linear tail with a learned weight per head.

    Args:
        window: keys nearer than this are attended exactly.
        feature_map, feature_dim, features, seed, redraw_every: of the tail, see `LinearAttention`.
        conv: taps of a depth-wise convolution of the values that is added to the output, odd; 0: none.
    """

    can = frozenset({"causal", "bidirectional", "recurrent", "mass", "grid"})
    positions = frozenset({"rope", "alibi"})

    def __init__(
        self,
        heads: Heads,
        *,
        window: int = 64,
        feature_map: str = "elu",
        feature_dim: int | None = None,
        features: int | None = None,
        seed: int = 0,
        redraw_every: int = 0,
        conv: int = 0,
    ):
        super().__init__(heads)
        check_window(window)
        self.window = window
        drawn = {"features": features, "seed": seed, "redraw_every": redraw_every}
        self.project = FeatureProjection(heads, feature_map, feature_dim, **drawn)
        _check_positive(feature_map, self.map)
        self.gate = nn.Parameter(torch.full((heads.query,), self.map.log_gate(self.project.width)))
        self.convolution = ValueConvolution(heads.value_width, conv) if conv else None
        self.can = type(self).can - (frozenset() if conv else {"grid"})

    @property
    def map(self) -> FeatureMap | LearnedMap:
        """phi."""
        return self.project.map

    def forward(
        self, q, k, v, *, causal=False, key_mask=None, rotary=None, slopes=None, dropout=0.0, return_mass=False,
        backend="auto", inputs=NO_INPUTS, pack=None,
    ) -> Attended:  # fmt: skip
        parts = {**self._parts(q, slopes, backend), **({} if pack is None else {"pack": pack})}
        attended = attend(q, k, v, *self.project(q, k), causal=causal, key_mask=key_mask, rotary=rotary, **parts)
        if self.convolution is None:
            return attended
        return self.convolution.add_to(attended, v, causal=causal, key_mask=key_mask, grid=inputs.grid)

    def reads_packs(self, q, v, *, backend="auto") -> bool:
        tail_q = q.new_empty(0, 0, 0, self.project.width)
        return self.convolution is None and honours("hybrid", "packs", backend, q, v, _needs(q, v, tail_q, self.map))

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        features = self.map.width(self.project.width)
        state = empty_state(self.heads, features, self.window, batch, positions, device, dtype)
        if self.convolution is not None:
            state |= self.convolution.init_state(batch, self.heads.key, device=device, dtype=dtype)
        return state

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        parts = self._parts(q, slopes, backend)
        tail_q = self.project.queries(q)
        attended, new = resume(q, k, v, tail_q, self.project.keys, state, key_mask=key_mask, rotary=rotary, **parts)
        if self.convolution is None:
            return attended, new
        before = state["before"]
        attended = self.convolution.add_to(attended, v, causal=True, key_mask=key_mask, grid=None, before=before)
        return attended, {**new, "before": last_positions(v, key_mask, before)}

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h, width = self.heads, self.project.width
        tail = linear.sums_cost(h, self.map, width, batch, length, length, True, positions, element_bytes)
        sides = 1 if causal else 2
        pairs = band_pairs(length, self.window, causal)
        ring = self.window * (h.key * element_bytes * (h.width + h.value_width) + 1)
        total = self.project.cost(batch, length, length)
        if self.convolution is not None:
            total += self.convolution.cost(batch, length, h.key, causal, element_bytes)
        return total + Cost(
            flops=sides * tail.flops + 2 * batch * h.query * pairs * (h.width + h.value_width),
            bytes_moved=(1 + sides) * tail.bytes_moved,
            state_bytes=batch * ring + tail.state_bytes if causal else 0,
            parameters=h.query,
        )

    def _parts(self, q: Tensor, slopes: Tensor | None, backend: str) -> dict:
        parts = {"window": self.window, "phi": self.map, "gate": self.gate, "slopes": slopes, "backend": backend}
        return {**parts, "scale": q.shape[-1] ** -0.5}
