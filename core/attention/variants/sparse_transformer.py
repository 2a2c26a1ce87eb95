r"""The two patterns of the Sparse Transformer: nearby keys, and a few far ones that carry on what others have read.

    strided   key j is visible to query i  iff  |i - j| < stride, or i - j is a multiple of stride
    fixed     key j is visible to query i  iff  they are in the same block of `stride`, or j is among the last
              `summary` positions of its block;  both with j <= i if causal

Here stride 3, summary 1, causal (1 = visible):

    strided                fixed
    1 . . . . . .          1 . . . . . .
    1 1 . . . . .          1 1 . . . . .
    1 1 1 . . . .          1 1 1 . . . .      Two steps connect any two positions: over a neighbour of the key that lies
    1 1 1 1 . . .          . . 1 1 . . .      a multiple of the stride away, or over the last position of its block.
    . 1 1 1 1 . .          . . 1 1 1 . .
    . . 1 1 1 1 .          . . 1 1 1 1 .
    1 . . 1 1 1 1          . . 1 . . 1 1

A query sees about stride + L / stride keys (fixed: stride + summary L / stride). With a stride near the root of the
length that is L^1.5 work in all; at a given stride it grows like L^2 / stride. Memory is linear. The decoding state is
the cache of all keys and values, of which a step reads those that the pattern shows.

Source:
    Child et al. 2019, arXiv:1904.10509

Where we differ:
    One softmax over the union of both key sets per head, instead of interleaving them over heads or layers. The paper
    is causal; two-sided attention drops the condition j <= i and nothing else. `strided` counts from each query, so
    padding changes nothing; `fixed` counts its blocks from the start.
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
from core.attention.registry import register
from core.attention.ring import empty_ring, extend_ring
from core.attention.variants import softmax
from core.attention.variants.window import band_pairs


def shown(pattern: str, stride: int, summary: int) -> Sees:
    """The pattern "strided" or "fixed"."""
    if pattern == "strided":
        return lambda head, i, j: near(stride)(head, i, j) | ((i - j) % stride == 0)
    return lambda head, i, j: (i // stride == j // stride) | (j % stride >= stride - summary)


def reference(q, k, v, pattern, stride, summary, causal, key_mask) -> Attended:
    """The definition: softmax under the dense pattern; k and v have as many heads as q."""
    given = {"sees": shown(pattern, stride, summary), "causal": causal, "key_mask": key_mask, "device": q.device}
    return softmax.reference(q, k, v, visible(q.shape[2], k.shape[2], **given), q.shape[-1] ** -0.5)


def attend(q, k, v, pattern, stride, summary=0, *, causal, key_mask=None, backend="auto") -> Attended:
    """Attention under "strided" or "fixed", with its mass.

    q [B, H, L, D], k [B, K, M, D], v [B, K, M, E]; causal is bottom-right aligned, L <= M; two-sided needs L = M.
    """
    check_inputs(q, k, v, key_mask)
    if q.shape[2] > k.shape[2] or (not causal and q.shape[2] != k.shape[2]):
        raise ValueError(f"{pattern} attention needs L {'<=' if causal else '='} M, got L={q.shape[2]}, M={k.shape[2]}")
    choice = resolve(pattern, backend, q.device.type, q.dtype, (), (q.shape[3], v.shape[3]))
    return choice.run(q, hide(k, key_mask), hide(v, key_mask), pattern, stride, summary, causal, key_mask)


@implementation("strided", "reference")
@implementation("fixed", "reference")
def _reference(q, k, v, pattern, stride, summary, causal, key_mask) -> Attended:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return reference(q, k, v, pattern, stride, summary, causal, key_mask)


@implementation("strided", "torch")
@implementation("fixed", "torch")
def _torch(q, k, v, pattern, stride, summary, causal, key_mask) -> Attended:
    scale = q.shape[-1] ** -0.5
    return Attended(*pattern_forward(q, k, v, key_mask, None, pattern, summary, stride, causal, scale))


@implementation("strided", "flex", **FLEX)
@implementation("fixed", "flex", **FLEX)
def _flex(q, k, v, pattern, stride, summary, causal, key_mask) -> Attended:
    from core.attention import flex

    given = {"causal": causal, "key_mask": key_mask, "scale": q.shape[-1] ** -0.5}
    return flex.attend(q, k, v, shown, (pattern, stride, summary), **given)


class _SparseTransformer(Variant):
    """What the two patterns share: a cache of keys and values, and the pattern over it."""

    can = frozenset({"causal", "bidirectional", "recurrent", "mass"})
    positions = frozenset({"rope"})
    growth = "quadratic"

    def __init__(self, heads: Heads, stride: int, summary: int):
        super().__init__(heads)
        check_whole("stride", stride)
        self.stride, self.summary = stride, summary

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
        options = {"causal": causal, "key_mask": key_mask, "backend": backend}
        return attend(q, k, v, self.name, self.stride, self.summary, **options)

    def init_state(self, batch: int, *, positions=None, device=None, dtype=None) -> State:
        return empty_ring(self.heads, batch, 0, device, dtype)

    def resume(
        self, q, k, v, state: State, *, key_mask=None, rotary=None, slopes=None, backend="auto", inputs=NO_INPUTS
    ):
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        known = extend_ring(state, k, v, key_mask)
        options = {"causal": True, "key_mask": known["mask"], "backend": backend}
        return attend(q, known["keys"], known["values"], self.name, self.stride, self.summary, **options), known

    def pairs(self, length: int, causal: bool) -> int:
        """Number of visible (query, key) pairs."""
        raise NotImplementedError

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h = self.heads
        both = h.width + h.value_width
        return Cost(
            flops=2 * batch * h.query * self.pairs(length, causal) * both,
            bytes_moved=batch * element_bytes * (h.query + h.key) * length * both,
            state_bytes=batch * length * (h.key * element_bytes * both + 1) if causal else 0,
        )


@register(
    "strided",
    summary="softmax over the nearest keys and every stride-th one; L^2 / stride",
    source="Child et al. 2019, arXiv:1904.10509",
    pick="data with a period: images as lines, hourly series",
    stability="as softmax, over two disjoint key sets",
)
class StridedAttention(_SparseTransformer):
    """Softmax over a window and the positions a multiple of the stride away.

    Args:
        stride: width of the window and distance of the far keys; best near the root of the usual length.
    """

    def __init__(self, heads: Heads, *, stride: int = 128):
        super().__init__(heads, stride, 0)

    def pairs(self, length: int, causal: bool) -> int:
        whole, longer = divmod(length, self.stride)
        far = longer * whole * (whole + 1) // 2 + (self.stride - longer) * whole * (whole - 1) // 2
        return band_pairs(length, self.stride, causal) + (far if causal else 2 * far)


@register(
    "fixed",
    summary="softmax over the own block and the last keys of the others; L^2 / stride",
    source="Child et al. 2019, arXiv:1904.10509",
    pick="as strided, with a few summary positions per block",
    stability="as softmax, over two disjoint key sets",
)
class FixedAttention(_SparseTransformer):
    """Softmax over the own block and the summary positions of all others.

    Args:
        stride: length of a block; best near the root of the usual length.
        summary: so many last positions of each block are seen from everywhere; at most the stride.
    """

    anchor = "start"

    def __init__(self, heads: Heads, *, stride: int = 128, summary: int = 8):
        super().__init__(heads, stride, summary)
        check_whole("summary", summary)
        if summary > stride:
            raise ValueError(f"summary must be from 1 to the stride {stride}, got {summary}")

    def pairs(self, length: int, causal: bool) -> int:
        whole, rest = divmod(length, self.stride)
        size, shown = self.stride, self.summary
        some = max(0, rest - (size - shown))  # summaries of the last, shorter block
        if causal:
            own = whole * size * (size + 1) // 2 + rest * (rest + 1) // 2
            return own + shown * (size * whole * (whole - 1) // 2 + rest * whole)
        own = whole * size**2 + rest**2
        return own + shown * whole * (length - size) + some * (length - rest)
