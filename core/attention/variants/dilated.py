r"""Dilated sliding window: softmax over every `dilation`-th of the nearest keys.

    key j is visible to query i  iff  i - j is a multiple of dilation, |i - j| < window dilation, and j <= i if causal

so a query sees as many keys as under a window, spread `dilation` times as far. Here window 2, dilation 2 (1 = visible):

    1 . . . .
    . 1 . . .        Positions that agree modulo the dilation see each other and nobody else: each residue class is a
    1 . 1 . .        shorter sequence under a plain window. Time and memory are linear in the length. The decoding state
    . 1 . 1 .        is the last (window - 1) dilation keys and values.
    . . 1 . 1

Source:
    Beltagy et al. 2020 (Longformer), arXiv:2004.05150, section 3.1

Where we differ:
    Longformer gives each head its own dilation; here a layer has one, and a layout word mixes layers. ALiBi's penalty
    counts positions, not steps of the dilation.
"""

from core.attention.backends import FLEX, implementation, resolve
from core.attention.blocked.patterns import pattern_forward
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    Sees,
    State,
    Variant,
    check_inputs,
    check_whole,
    hide,
    near,
    repeat_heads,
    visible,
)
from core.attention.positions import alibi_bias
from core.attention.registry import register
from core.attention.ring import empty_ring, extend_ring, keep_ring
from core.attention.variants import softmax
from core.attention.variants.window import band_pairs, check_nearest, check_window


def spread(width: int, dilation: int) -> Sees:
    """The pattern."""
    return lambda head, i, j: near(width * dilation)(head, i, j) & ((i - j) % dilation == 0)


def reference(q, k, v, width, dilation, causal, key_mask, scale, bias=None) -> Attended:
    """The definition: softmax under a dense band with gaps; k and v have as many heads as q."""
    given = {"sees": spread(width, dilation), "causal": causal, "key_mask": key_mask, "device": q.device}
    return softmax.reference(q, k, v, visible(q.shape[2], k.shape[2], **given), scale, bias)


def attend(q, k, v, width, dilation, *, causal, key_mask=None, slopes=None, backend="auto") -> Attended:
    """Dilated window attention with its mass; `width` keys per query (2 width - 1 two-sided).

    q [B, H, L, D], k [B, K, M, D], v [B, K, M, E]; causal is bottom-right aligned, two-sided needs L = M.
    """
    check_inputs(q, k, v, key_mask, slopes)
    check_nearest(q, k, causal)
    choice = resolve("dilated", backend, q.device.type, q.dtype, (), (q.shape[3], v.shape[3]))
    return choice.run(q, hide(k, key_mask), hide(v, key_mask), width, dilation, causal, key_mask, slopes)


@implementation("dilated", "reference")
def _reference(q, k, v, width, dilation, causal, key_mask, slopes) -> Attended:
    bias = None if slopes is None else alibi_bias(slopes.to(q.dtype), q.shape[2], k.shape[2])
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return reference(q, k, v, width, dilation, causal, key_mask, q.shape[-1] ** -0.5, bias)


@implementation("dilated", "torch")
def _torch(q, k, v, width, dilation, causal, key_mask, slopes) -> Attended:
    scale = q.shape[-1] ** -0.5
    return Attended(*pattern_forward(q, k, v, key_mask, slopes, "dilated", width, dilation, causal, scale))


@implementation("dilated", "flex", **FLEX)
def _flex(q, k, v, width, dilation, causal, key_mask, slopes) -> Attended:
    from core.attention import flex

    given = {"causal": causal, "key_mask": key_mask, "slopes": slopes, "scale": q.shape[-1] ** -0.5}
    return flex.attend(q, k, v, spread, (width, dilation), **given)


@register(
    "dilated",
    summary="softmax over every dilation-th of the nearest keys; linear",
    source="Beltagy et al. 2020, arXiv:2004.05150",
    pick="the next layer sees the gaps: stacks of windows that reach far",
    stability="as window",
)
class DilatedAttention(Variant):
    """Softmax over a sliding window with gaps.

    Args:
        window: keys per query, itself included; two-sided 2 window - 1.
        dilation: distance between two neighbouring visible keys; 1 is the plain window.
    """

    can = frozenset({"causal", "bidirectional", "recurrent", "mass"})
    positions = frozenset({"rope", "alibi"})

    def __init__(self, heads: Heads, *, window: int = 64, dilation: int = 4):
        super().__init__(heads)
        check_window(window)
        check_whole("dilation", dilation, what=" (1 = a plain window)")
        self.window, self.dilation = window, dilation

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
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        options = {"causal": causal, "key_mask": key_mask, "slopes": slopes, "backend": backend}
        return attend(q, k, v, self.window, self.dilation, **options)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        return empty_ring(self.heads, batch, (self.window - 1) * self.dilation, device, dtype)

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        known = extend_ring(state, k, v, key_mask)
        options = {"key_mask": known["mask"], "slopes": slopes, "backend": backend}
        attended = attend(q, known["keys"], known["values"], self.window, self.dilation, causal=True, **options)
        return attended, keep_ring(known, (self.window - 1) * self.dilation)

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h = self.heads
        longer = length % self.dilation  # so many residue classes have one position more
        pairs = longer * band_pairs(length // self.dilation + 1, self.window, causal)
        pairs += (self.dilation - longer) * band_pairs(length // self.dilation, self.window, causal)
        ring = (self.window - 1) * self.dilation
        return Cost(
            flops=2 * batch * h.query * pairs * (h.width + h.value_width),
            bytes_moved=batch * element_bytes * (h.query + h.key) * length * (h.width + h.value_width),
            state_bytes=batch * ring * (h.key * element_bytes * (h.width + h.value_width) + 1) if causal else 0,
        )
