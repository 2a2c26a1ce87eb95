r"""Sliding-window attention: softmax over the nearest keys.

    key j is visible to query i  iff  |i - j| < window, and j <= i if causal

so a causal query sees `window` keys, itself included, and a two-sided one 2 window - 1. Time and memory are linear in
the length. The decoding state is the last `window - 1` keys and values.

Source:
    Beltagy et al. 2020 (Longformer), arXiv:2004.05150

Where we differ:
    Other libraries count the window to one side without the query's own position (window - 1 here).
"""

from torch import Tensor

from core.attention import kernels
from core.attention.autocast import lowered
from core.attention.backends import FLEX, honours, implementation, resolve
from core.attention.blocked.window import window_forward
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    State,
    Variant,
    check_inputs,
    check_whole,
    hide,
    near,
    repeat_heads,
    visible,
)
from core.attention.packing import Pack
from core.attention.positions import alibi_bias
from core.attention.registry import register
from core.attention.ring import empty_ring, extend_ring, keep_ring
from core.attention.variants import softmax


def reference(q, k, v, window, causal, key_mask, scale, bias=None) -> Attended:
    """The definition: softmax under a dense band; k and v have as many heads as q."""
    seen = visible(q.shape[2], k.shape[2], causal=causal, window=window, key_mask=key_mask, device=q.device)
    return softmax.reference(q, k, v, seen, scale, bias)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = False,
    key_mask: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    return_mass: bool = False,
    backend: str = "auto",
) -> Tensor | Attended:
    """Attention to the nearest keys only, in time linear in the length.

    Args:
        q: queries [B, H, L, D].
        k: keys [B, K, M, D]; H is a multiple of K.
        v: values [B, K, M, E].
        window: query i sees key j iff |i + M - L - j| < window, and j <= i + M - L if causal; at least 1.
        causal: one-sided; then L and M may differ (the last query sees the last key).
        key_mask: bool [B, M], True where a key is real.
        slopes: [H] ALiBi slopes; adds -slope_h |i + M - L - j| to the scores.
        scale: factor of the scores, default 1/sqrt(D).
        return_mass: return `Attended` with the log mass.
        backend: "auto", "torch" or "reference"; on CUDA also "triton" or "flex".

    Returns:
        [B, H, L, E] in the dtype of v, or `Attended`. A query that sees no key gives 0 and mass -inf.

    Raises:
        ValueError: window < 1, shapes disagree, or two-sided with L != M, where no key is "nearest".
    """
    options = {"causal": causal, "key_mask": key_mask, "slopes": slopes, "scale": scale, "backend": backend}
    attended = attend(*lowered(q, k, v), window, **options)
    return attended if return_mass else attended.out


def attend(
    q, k, v, window, *, causal, key_mask=None, slopes=None, scale=None, backend="auto", pack: Pack | None = None
) -> Attended:
    """`sliding_window_attention`, always with the mass, which comes for nothing, also of packs."""
    check_inputs(q, k, v, key_mask, slopes)
    check_window(window)
    check_nearest(q, k, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    needs = () if pack is None else ("packs",)
    choice = resolve("window", backend, q.device.type, q.dtype, needs, (q.shape[3], v.shape[3]))
    given = {} if pack is None else {"pack": pack}
    return choice.run(q, hide(k, key_mask), hide(v, key_mask), window, causal, key_mask, slopes, scale, **given)


def check_window(window: int) -> None:
    """Raise ValueError unless `window` is a whole number of at least 1."""
    check_whole("window", window, what=" (1 = the position itself)")


def check_nearest(q: Tensor, k: Tensor, causal: bool) -> None:
    """Raise ValueError where no key is the nearest to a query: two-sided, with L != M."""
    if not causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"a two-sided window needs as many queries as keys (nearest to what?), got L={q.shape[2]}, M={k.shape[2]}"
        )


@implementation("window", "reference")
def _reference(q, k, v, window, causal, key_mask, slopes, scale) -> Attended:
    bias = None if slopes is None else alibi_bias(slopes.to(q.dtype), q.shape[2], k.shape[2])
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return reference(q, k, v, window, causal, key_mask, scale, bias)


@implementation("window", "torch")
def _torch(q, k, v, window, causal, key_mask, slopes, scale) -> Attended:
    return Attended(*window_forward(q, k, v, key_mask, slopes, window, causal, scale))


@implementation("window", "flex", **FLEX)
def _flex(q, k, v, window, causal, key_mask, slopes, scale) -> Attended:
    from core.attention import flex

    given = {"causal": causal, "key_mask": key_mask, "slopes": slopes, "scale": scale}
    return flex.attend(q, k, v, near, (window,), **given)


def _triton(q, k, v, window, causal, key_mask, slopes, scale, pack=None) -> Attended:
    from core.attention.kernels.window import window_forward

    packed = () if pack is None else (pack.offsets, pack.longest)
    return Attended(*window_forward(q, k, v, key_mask, slopes, window, causal, scale, *packed))


if kernels.PRESENT:
    given = {"devices": kernels.DEVICES, "dtypes": kernels.DTYPES, "widths": (1, kernels.WIDEST)}
    implementation("window", "triton", serves=("packs",), **given)(_triton)


@register(
    "window",
    summary="softmax over the nearest keys; linear",
    source="Beltagy et al. 2020, arXiv:2004.05150",
    pick="what matters is near: local texture, short-range dependence; or as the cheap half of a layered mix",
    stability="as softmax; never more than a window of weights",
)
class WindowAttention(Variant):
    """Softmax over a sliding window; the decoding state is the last window - 1 keys and values."""

    can = frozenset({"causal", "bidirectional", "recurrent", "mass"})
    positions = frozenset({"rope", "alibi"})

    def __init__(self, heads: Heads, *, window: int = 64):
        super().__init__(heads)
        check_window(window)
        self.window = window

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
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        options = {"causal": causal, "key_mask": key_mask, "slopes": slopes, "backend": backend, "pack": pack}
        return attend(q, k, v, self.window, **options)

    def reads_packs(self, q, v, *, backend="auto") -> bool:
        return honours("window", "packs", backend, q, v)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        return empty_ring(self.heads, batch, self.window - 1, device, dtype)

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        choice = resolve("window", backend, q.device.type, q.dtype, (), (q.shape[3], v.shape[3]))
        if choice.name == "triton":
            from core.attention.kernels.ring_step import window_step
            from core.attention.kernels.step import is_step

            ring = state["keys"], state["values"], state["mask"]
            if is_step(q, k, v, *ring[:2]):
                out, mass, *ring = window_step(q, k, v, key_mask, slopes, *ring, q.shape[3] ** -0.5)
                return Attended(out, mass), dict(zip(("keys", "values", "mask"), ring))
        all_keys = extend_ring(state, k, v, key_mask)
        options = {"key_mask": all_keys["mask"], "slopes": slopes, "backend": backend}
        attended = attend(q, all_keys["keys"], all_keys["values"], self.window, causal=True, **options)
        return attended, keep_ring(all_keys, self.window - 1)

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h = self.heads
        pairs = band_pairs(length, self.window, causal)
        ring = self.window - 1
        return Cost(
            flops=2 * batch * h.query * pairs * (h.width + h.value_width),
            bytes_moved=batch * element_bytes * (h.query + h.key) * length * (h.width + h.value_width),
            state_bytes=batch * ring * (h.key * element_bytes * (h.width + h.value_width) + 1) if causal else 0,
        )


def band_pairs(length: int, window: int, causal: bool) -> int:
    """Number of visible (query, key) pairs of a square band."""
    reach = min(window, length)
    one_side = length * reach - reach * (reach - 1) // 2
    return one_side if causal else 2 * one_side - length
