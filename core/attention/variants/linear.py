r"""Linear attention: a kernel phi(q).phi(k) in place of exp(q.k), so keys and values sum up before any query asks.

    o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j),    log_mass_i = log of the denominator

Time linear in the length, bidirectional, causal and cross. The decoding state is S = sum_j phi(k_j) [v_j, 1]^T.

With ALiBi slopes every weight is multiplied by exp(-slope_h |i - j|): a constant decay per head. With rotary positions
see `core.attention.positions`: functions of q.k (taylor, cosine) rotate before phi; other maps rotate phi, in the
numerator only.

Source:
    Katharopoulos et al. 2020, arXiv:2006.16236

Where we differ:
    No epsilon is added to the denominator. Maps that can vanish (relu) have a floor of 1e-6 per visible key instead,
    so its strength does not depend on the length and the log mass stays exact. A masked key leaves numerator and
    denominator (masking the values alone does not).
"""

from functools import partial

import torch
from torch import Tensor

from core.attention import kernels
from core.attention.autocast import lowered
from core.attention.backends import honours, implementation, resolve
from core.attention.blocked.linear import CHUNK, least_denominator, linear_forward
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
)
from core.attention.feature_maps import FEATURE_MAPS, FeatureMap
from core.attention.feature_maps import feature_map as phi_named
from core.attention.feature_projection import FeatureProjection, featured
from core.attention.grid import ValueConvolution, last_positions
from core.attention.learned_maps import Focused, LearnedMap
from core.attention.packing import Pack
from core.attention.registry import register


def reference(fq, fk, v, seen, normalize=True, floor=0.0) -> Attended:
    """The definition, dense: features fq [B, H, L, F], fk [B, H, M, F]; seen weighs pairs, [.., L, M], 0 = hidden.

    floor: the least denominator per visible key, for maps that can vanish; the mass is that of the true sum.
    """
    a = fq @ fk.transpose(-1, -2) * seen
    mass = a.sum(-1).clamp(min=0)  # 1 + cos of opposite vectors may round below 0
    empty = mass == 0
    out = a @ v.to(a.dtype)
    if normalize:
        least = floor * (seen != 0).sum(-1, dtype=mass.dtype)
        out = out / torch.maximum(mass, least).masked_fill(empty, 1.0).unsqueeze(-1)
    return Attended(out.to(v.dtype), mass.masked_fill(empty, 1.0).log().masked_fill(empty, -torch.inf))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    key_mask: Tensor | None = None,
    slopes: Tensor | None = None,
    normalize: bool = True,
    state: State | None = None,
    return_state: bool = False,
    return_mass: bool = False,
    backend: str = "auto",
) -> Tensor | Attended | tuple[Tensor | Attended, State]:
    """Attention in time linear in the length: every query reads a running (or total) sum over the keys.

    Args:
        q: queries [B, H, L, D]; any scale lives in the feature map.
        k: keys [B, K, M, D]; H is a multiple of K.
        v: values [B, K, M, E].
        feature_map: name of phi, one of `core.attention.feature_maps.FEATURE_MAPS`; those with parameters need a layer.
        causal: query i sees key j iff j <= i + M - L.
        key_mask: bool [B, M], True where a key is real.
        slopes: [H] ALiBi slopes; weights decay by exp(-slope_h |i + M - L - j|). Two-sided needs L = M.
        normalize: divide by the sum of the weights; without it there is no mass.
        state: what earlier keys summed to, from `return_state`; with `causal` a continuation, without it a
            precomputed context (k and v may then be empty).
        return_state: also return the state after these keys.
        return_mass: return `Attended` with the log mass.
        backend: "auto", "torch" or "reference".

    Returns:
        [B, H, L, E] in the dtype of v, or `Attended`; with `return_state` a pair with the state: "sum"
        [B, K, F, E + 1] and "count" [B], in float32 (float64 for float64 inputs). K is H with slopes.

    Raises:
        ValueError: shapes disagree, unknown map, a mass that does not exist, or two-sided decay with a state.
    """
    check_inputs(q, k, v, key_mask, slopes)
    phi = phi_named(feature_map)
    if normalize and not phi.positive:
        raise ValueError(
            f"feature map {feature_map!r} is signed, so its weights have no sum to divide by; use normalize=False"
        )
    if return_mass and not normalize:
        raise ValueError("linear attention has no mass without its normaliser: return_mass needs normalize=True")
    if causal and state is not None and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"more queries than new keys after a state: where would the first {q.shape[2] - k.shape[2]} stand? "
            f"got L={q.shape[2]}, M={k.shape[2]}"
        )
    two_sided = slopes is not None and not causal
    if two_sided and (state is not None or return_state):
        raise ValueError("two-sided decay depends on where each query stands, so it has no state; use causal=True")
    if two_sided and q.shape[2] != k.shape[2]:
        raise ValueError(f"two-sided decay needs as many queries as keys, got L={q.shape[2]}, M={k.shape[2]}")
    options = {"key_mask": key_mask, "slopes": slopes, "normalize": normalize, "backend": backend}
    attended, new = attend(*lowered(q, k, v), phi, causal=causal, state=state, keep=return_state, **options)
    result = attended if return_mass else attended.out
    return (result, new) if return_state and new is not None else result


def attend(
    q, k, v, phi: FeatureMap | LearnedMap, *, causal, state=None, keep=False, **options
) -> tuple[Attended, State | None]:
    """`linear_attention` without its checks, with the options of `sums`; always gives a pair."""
    slopes, normalize = options.get("slopes"), options.get("normalize", True)
    if causal:
        offset = k.shape[2] - q.shape[2] if options.get("pack") is None else 0
        return sums(q, k, v, phi, "past", offset, state=state, keep=keep, **options)
    if slopes is None:
        return sums(q, k, v, phi, "both", 0, state=state, keep=keep, **options)
    past, _ = sums(q, k, v, phi, "past", 0, **options)  # with the diagonal
    future, _ = sums(q, k, v, phi, "future", 1, **options)
    if normalize:
        return merge(past, further(future, slopes)), None
    return Attended(past.out + future.out * torch.exp(-slopes.to(v.dtype))[:, None, None], None), None


def further(attended: Attended, slopes: Tensor | None, distance: int = 1) -> Attended:
    """The same keys seen from `distance` further away: decay takes a constant off the mass and leaves the mean."""
    if slopes is None:
        return attended
    return shifted(attended, -distance * slopes)


def shifted(attended: Attended, by: Tensor) -> Attended:
    """Add `by` [H] to the log mass, which is there."""
    return raised(attended, by[:, None])


def raised(attended: Attended, by: Tensor | None) -> Attended:
    """Add `by` [.., H, L] to the log mass, which is there."""
    if by is None:
        return attended
    assert attended.log_mass is not None
    return Attended(attended.out, attended.log_mass + by.to(attended.log_mass.dtype))


def sums(
    q, k, v, phi: FeatureMap | LearnedMap, direction: str, offset: int, *, key_mask=None, slopes=None,
    rotary: tuple | None = None, state=None, keep=False, normalize=True, backend="auto", pack: Pack | None = None,
) -> tuple[Attended, State | None]:  # fmt: skip
    """Sums over all keys ("both"), keys j <= i + offset ("past") or j >= i + offset ("future").

    With slopes a weight decays by exp(-slope |i + offset - j|). Rotary positions act before phi for kernel maps; for
    other maps on the features, in the numerator only. normalize=False is for maps without parameters: the features of
    favor are known up to a factor per query only. pack: q, k and v are packs; without a state, which is of a sequence.
    """
    k, v = hide(k, key_mask), hide(v, key_mask)
    needs = ("state",) if state is not None or keep else ()
    needs += ("packs",) if pack is not None else ()
    fuses = isinstance(phi, Focused) and resolve("linear", backend, q.device.type, q.dtype, needs).name == "triton"
    fuses = fuses and q.shape[3] <= kernels.WIDEST and (state is None or q.shape[2] > 1)  # the step takes features
    level = None
    if not fuses:
        q, k, phi, rotary, level = featured(q, k, phi, rotary)
    if slopes is not None:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    needs += ("wide features",) if phi.width(q.shape[3]) > kernels.WIDEST else ()
    name, run, _ = resolve("linear", backend, q.device.type, q.dtype, needs)
    run = run if pack is None else partial(run, pack=pack)
    before = (None, None) if state is None else (state["sum"], state["count"])

    def whole(attended, total):  # no types, which would stop a trace
        return raised(attended, level), {"sum": total, "count": counted(q, k, key_mask, before[1])} if keep else None

    if rotary is None:
        return whole(*run(q, k, v, phi, direction, offset, key_mask, slopes, normalize, *before))
    if name == "triton" and (direction, offset, normalize) == ("past", 0, True):
        from core.attention.kernels.linear_entry import turned_step

        one = turned_step(q, k, v, phi, key_mask, slopes, rotary, *before)
        if one is not None:
            return whole(*one)
    assert isinstance(phi, FeatureMap)  # a fused map meets no rotation
    acc = accumulator(v.dtype)
    fq, fk = phi.features(q.to(acc)), hide(phi.features(k.to(acc)), key_mask)
    # Two runs share one state: the rotated sum's columns for the values, the plain sum's for the ones. An undivided
    # sum would overflow float16, so it is kept in the accumulator's precision.
    plain = None if state is None else state["sum"][..., -1:]
    wide, same = v.to(acc), FEATURE_MAPS["identity"]
    turned, total = run(rotary[0](fq), rotary[1](fk), wide, same, direction, offset, key_mask, slopes, False, *before)
    mass, ones = run(q, k, v[..., :0], phi, direction, offset, key_mask, slopes, True, plain, before[1])
    out = turned.out
    if normalize:
        least = least_denominator(q, k, key_mask, before[1], phi.name, direction, offset, pack)
        den = torch.maximum(mass.log_mass.exp(), least)
        out = out * torch.where(mass.log_mass == -torch.inf, 0.0, 1 / den).unsqueeze(-1)
    return whole(Attended(out.to(v.dtype), mass.log_mass), torch.cat((total[..., :-1], ones), -1) if keep else total)


@implementation("linear", "reference", serves=("wide features",))
def _reference(q, k, v, phi, direction, offset, key_mask, slopes, normalize, state, count) -> tuple[Attended, None]:
    ahead = torch.arange(q.shape[2], device=q.device)[:, None] + offset - torch.arange(k.shape[2], device=q.device)
    seen = {"both": torch.ones_like(ahead), "past": ahead >= 0, "future": ahead <= 0}[direction].to(q.dtype)
    if slopes is not None:
        seen = seen * torch.exp(-slopes.to(q.dtype)[:, None, None] * ahead.abs())
    if key_mask is not None:
        seen = seen * key_mask[:, None, None, :]
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return reference(phi.features(q), phi.features(k), v, seen, normalize, phi.floor), None


@implementation("linear", "torch", serves=("state", "wide features"))
def _torch(q, k, v, phi, direction, offset, key_mask, slopes, normalize, state, count) -> tuple[Attended, Tensor]:
    out, mass, _, total = linear_forward(
        q, k, v, key_mask, slopes, state, count, phi.name, direction, offset, normalize
    )
    return Attended(out, mass), total


def _triton(*given, pack=None) -> tuple[Attended, Tensor]:
    from core.attention.kernels.linear_entry import run

    return run(*given, pack=pack)


if kernels.PRESENT:
    serves = ("state", "packs")
    implementation("linear", "triton", serves=serves, devices=kernels.DEVICES, dtypes=kernels.DTYPES)(_triton)


def counted(q: Tensor, k: Tensor, key_mask: Tensor | None, before: Tensor | None) -> Tensor:
    """Keys summed so far, [B]."""
    if key_mask is None:
        first = torch.zeros(k.shape[0], dtype=accumulator(q.dtype), device=k.device) if before is None else before
        return first + k.shape[2]
    new = key_mask.sum(-1, dtype=accumulator(q.dtype))
    return new if before is None else new + before


@register(
    "linear",
    summary="a feature map in place of exp: running sums, constant-size state; linear",
    source="Katharopoulos et al. 2020, arXiv:2006.16236; taylor: Arora et al. 2024, arXiv:2402.18668",
    pick="the sequence is long and a blurred whole is enough; cross-attention to a long context",
    stability="float32 sums, divided once; relu-like maps have a floor of 1e-6 per key",
)
class LinearAttention(Variant):
    """Normalised linear attention with any feature map of `core.attention.feature_maps` and `learned_maps`.

    Args:
        feature_map: one that is not signed: "elu", "relu", "taylor", "cosine", "dpfp", "dpfp-2", "dpfp-3", "favor",
            "favor_relu", "hedgehog", "t2r" or "focused".
        feature_dim: project q and k to this width first (learned, per head); None: 16 for maps that estimate exp
            (taylor, favor, favor_relu), else no projection.
        features: number of features of favor, favor_relu and t2r; None: their own default.
        seed: of the random features of favor and favor_relu.
        redraw_every: forward passes in training between two draws of these; 0: never.
        conv: taps of a depth-wise convolution of the values that is added to the output, odd; 0: none. It is
            conv x conv on an image grid.
    """

    can = frozenset({"causal", "bidirectional", "cross", "recurrent", "mass", "grid"})
    positions = frozenset({"rope", "alibi"})

    def __init__(
        self,
        heads: Heads,
        *,
        feature_map: str = "elu",
        feature_dim: int | None = None,
        features: int | None = None,
        seed: int = 0,
        redraw_every: int = 0,
        conv: int = 0,
    ):
        super().__init__(heads)
        drawn = {"features": features, "seed": seed, "redraw_every": redraw_every}
        self.project = FeatureProjection(heads, feature_map, feature_dim, **drawn)
        if not self.map.positive:
            raise ValueError(f"feature map {feature_map!r} is signed: normalised attention needs a positive one")
        self.convolution = ValueConvolution(heads.value_width, conv) if conv else None
        self.can = type(self).can - {"cross" if conv else "grid"}  # values of another sequence are no neighbours
        if isinstance(self.map, Focused):  # never 0 but next to it: a rotated numerator over that would explode
            self.positions = frozenset({"alibi"})

    @property
    def map(self) -> FeatureMap | LearnedMap:
        """phi."""
        return self.project.map

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
        q, k = self.project(q, k)
        options = {"key_mask": key_mask, "slopes": slopes, "rotary": rotary, "backend": backend, "pack": pack}
        attended, _ = attend(q, k, v, self.map, causal=causal, **options)
        if self.convolution is None:
            return attended
        return self.convolution.add_to(attended, v, causal=causal, key_mask=key_mask, grid=inputs.grid)

    def reads_packs(self, q, v, *, backend="auto") -> bool:
        wide = self.map.width(self.project.width) > kernels.WIDEST
        return self.convolution is None and honours("linear", "packs", backend, q, v, ("wide features",) * wide)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        state = empty_sum(self.heads, self.map.width(self.project.width), batch, positions, device, dtype)
        if self.convolution is not None:
            state |= self.convolution.init_state(batch, self.heads.key, device=device, dtype=dtype)
        return state

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        q, k = self.project(q, k)
        options = {"key_mask": key_mask, "slopes": slopes, "rotary": rotary, "backend": backend}
        attended, new = sums(q, k, v, self.map, "past", 0, state=state, keep=True, **options)
        if self.convolution is None or new is None:
            return attended, new
        before = state["before"]
        attended = self.convolution.add_to(attended, v, causal=True, key_mask=key_mask, grid=None, before=before)
        return attended, {**new, "before": last_positions(v, key_mask, before)}

    def remember(self, k, v, *, key_mask=None, backend="auto") -> State:
        q, k = self.project(k.new_zeros(k.shape[0], self.heads.query, 0, k.shape[3]), k)
        _, state = attend(q, k, v, self.map, causal=False, key_mask=key_mask, keep=True, backend=backend)
        return state or {}

    def recall(self, q, state: State, *, backend="auto", inputs=NO_INPUTS) -> Attended:
        empty = [q.new_zeros(q.shape[0], self.heads.key, 0, n) for n in (q.shape[3], self.heads.value_width)]
        q, k = self.project(q, empty[0])
        return attend(q, k, empty[1], self.map, causal=False, state=state, backend=backend)[0]

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        keys = length if keys is None else keys
        inner = sums_cost(
            self.heads, self.map, self.project.width, batch, length, keys, causal, positions, element_bytes
        )
        total = inner + self.project.cost(batch, length, keys)
        if self.convolution is None:
            return total
        return total + self.convolution.cost(batch, length, self.heads.key, causal, element_bytes)


def empty_sum(heads: Heads, features: int, batch: int, positions: str | None, device, dtype) -> State:
    """The sums before the first key; one per query head under ALiBi, whose decay differs per head."""
    acc = accumulator(dtype or torch.float32)
    per = heads.query if positions == "alibi" else heads.key
    return {
        "sum": torch.zeros(batch, per, features, heads.value_width + 1, device=device, dtype=acc),
        "count": torch.zeros(batch, device=device, dtype=acc),
    }


def sums_cost(heads: Heads, phi, width: int, batch, length, keys, causal, positions, element_bytes) -> Cost:
    """Cost of the sums themselves: chunked when causal, two products when not."""
    features, values = phi.width(width), heads.value_width + 1
    key_heads = heads.query if positions == "alibi" else heads.key
    state = 2 * features * values  # reading it for one query, or writing one key to it
    flops = heads.query * length * state + key_heads * keys * state
    if causal or positions == "alibi":
        chunk = min(CHUNK["past"], max(1, length))
        flops += heads.query * length * 2 * chunk * (features + values)
        flops *= 1 if causal else 2
    return Cost(
        flops=batch * flops,
        bytes_moved=batch * element_bytes * (heads.query * length + heads.key * keys) * (width + heads.value_width),
        state_bytes=batch * max(4, element_bytes) * (key_heads * features * values + 1) if causal else 0,
    )
