r"""Attention on an image grid: softmax inside a two-sided 2-D window, alone or with a linear tail for all other tokens.

    W(i) = keys of the grid with max(|r_i - r_j|, |c_i - c_j|) < window, and all tokens before the grid

          sum_{j in W} exp(scale q_i.k_j) v_j + gamma_h sum_{j not in W} phi(q_i).phi(k_j) v_j
    o_i = -------------------------------------------------------------------------------------
          sum_{j in W} exp(scale q_i.k_j)     + gamma_h sum_{j not in W} phi(q_i).phi(k_j)

`window2d` leaves the second sums out. A query inside the image sees (2 window - 1)^2 keys. Tokens before the grid
(class, registers) belong to no place: every query sees them exactly, and they see every key exactly, as in softmax.
The parts are disjoint key sets and meet in `merge`. Without a grid a line is an image of one row, so that `window2d`
is then a two-sided `window`. Time and memory are linear in the number of tokens, see `core.attention.blocked.tiles`.

Source:
    Windows: Ramachandran et al. 2019, arXiv:1906.05909; Hassani et al. 2022 (NAT), arXiv:2204.07143. The linear tail:
    see `hybrid`.

Where we differ:
    NAT shifts the window at the border, so that every query sees as many keys; here the window is cut off there, which
    makes the pairs symmetric. Images are two-sided: there is no causal form.
"""

import torch
from torch import Tensor

from core.attention import kernels
from core.attention.backends import FLEX, implementation, resolve
from core.attention.blocked import tiles
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    Sees,
    Variant,
    accumulator,
    check_inputs,
    hide,
    merge,
    repeat_heads,
    visible,
)
from core.attention.feature_maps import FeatureMap
from core.attention.feature_projection import featured
from core.attention.learned_maps import LearnedMap
from core.attention.registry import register
from core.attention.variants import linear, softmax
from core.attention.variants.hybrid import HybridAttention
from core.attention.variants.window import band_pairs, check_window


def near(first: int, columns: int, window: int) -> Sees:
    """The pattern W; `first` tokens stand before the grid."""

    def sees(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        a, b = i - first, j - first
        close = (a // columns - b // columns).abs() < window
        close = close & ((a % columns - b % columns).abs() < window)
        return close | (a < 0) | (b < 0)

    return sees


def near_by_definition(length: int, grid: tuple[int, int], window: int, device=None) -> Tensor:
    """W as a dense mask [L, L], tokens before the grid included. For references only."""
    return visible(length, length, sees=near(length - grid[0] * grid[1], grid[1], window), device=device)


def reference(q, k, v, grid, window, key_mask, scale) -> Attended:
    """The definition of `window2d`: softmax under a dense mask; k and v have as many heads as q."""
    inside = near_by_definition(q.shape[2], grid, window, q.device)
    return softmax.reference(q, k, v, inside & visible(*inside.shape, key_mask=key_mask, device=q.device), scale)


def hybrid_reference(q, k, v, fq, fk, near, seen, gate, scale, turned=None, level=None, floor=0.0) -> Attended:
    """The definition of `hybrid2d`, dense; turned, level and floor as in `hybrid.reference`."""
    gamma = torch.exp(gate.to(q.dtype)[:, None, None] + (0.0 if level is None else level.unsqueeze(-1)))
    inside = torch.exp(scale * q @ k.mT).masked_fill(~(near & seen), 0.0)
    normal = (fq @ fk.mT).masked_fill(near | ~seen, 0.0)
    tail = normal if turned is None else (turned[0] @ turned[1].mT).masked_fill(near | ~seen, 0.0)
    sums = normal.sum(-1, keepdim=True)
    least = floor * (seen & ~near).sum(-1, keepdim=True)
    tail = tail * sums / torch.maximum(sums, least).masked_fill(sums == 0, 1.0)
    mass = (inside + gamma * normal).sum(-1)
    empty = mass == 0
    out = (inside + gamma * tail) @ v.to(mass.dtype) / mass.masked_fill(empty, 1.0).unsqueeze(-1)
    return Attended(out.to(v.dtype), mass.masked_fill(empty, 1.0).log().masked_fill(empty, -torch.inf))


@implementation("window2d", "reference")
def _window_reference(q, k, v, grid, window, key_mask, scale) -> Attended:
    return reference(q, repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1]), grid, window, key_mask, scale)


@implementation("window2d", "torch")
def _window_torch(q, k, v, grid, window, key_mask, scale) -> Attended:
    return _joined(_near(q, k, v, grid, window, key_mask, scale), q, k, v, key_mask, scale)


@implementation("window2d", "flex", **FLEX)
def _window_flex(q, k, v, grid, window, key_mask, scale) -> Attended:
    from core.attention import flex

    first = q.shape[2] - grid[0] * grid[1]
    return flex.attend(q, k, v, near, (first, grid[1], window), causal=False, key_mask=key_mask, scale=scale)


def _window_triton(q, k, v, grid, window, key_mask, scale) -> Attended:
    from core.attention.kernels.window2d import window2d_forward

    return Attended(*window2d_forward(q, k, v, key_mask, *grid, window, scale))


@implementation("hybrid2d", "reference")
def _hybrid_reference(q, k, v, tail_q, tail_k, grid, window, phi, gate, key_mask, scale, rotary) -> Attended:
    inside = near_by_definition(q.shape[2], grid, window, q.device)
    seen = visible(*inside.shape, key_mask=key_mask, device=q.device)
    tail_q, tail_k, phi, turning, level = featured(tail_q, hide(tail_k, key_mask), phi, rotary)
    k, v, tail_k = (repeat_heads(x, q.shape[1]) for x in (k, v, tail_k))
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    features = phi.features(tail_q), phi.features(tail_k)
    turned = None if turning is None else tuple(turn(x) for turn, x in zip(turning, features))
    return hybrid_reference(q, k, v, *features, inside, seen, gate, scale, turned, level, phi.floor)


@implementation("hybrid2d", "torch")
def _hybrid_torch(q, k, v, tail_q, tail_k, grid, window, phi, gate, key_mask, scale, rotary) -> Attended:
    tail = _tail(tail_q, tail_k, v, grid, window, phi, key_mask, rotary)
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    inside = _near(q, k, v, grid, window, key_mask, scale)
    return _joined(merge(inside, linear.shifted(tail, gate)), q, k, v, key_mask, scale)


def _hybrid_triton(q, k, v, tail_q, tail_k, grid, window, phi, gate, key_mask, scale, rotary) -> Attended:
    """The window by its kernel, the tail by torch's own products (`tiles.outside`), joined by `merge`."""
    tail = _tail(tail_q, tail_k, v, grid, window, phi, key_mask, rotary)
    if rotary is not None:
        q, k = rotary[0](q), rotary[1](k)
    inside = _window_triton(q, k, v, grid, window, key_mask, scale)
    assert inside.log_mass is not None
    first = q.shape[2] - grid[0] * grid[1]
    parts = Attended(inside.out[:, :, first:], inside.log_mass[:, :, first:]), linear.shifted(tail, gate)
    return _behind(inside, first, merge(*parts))


if kernels.PRESENT:
    given = {"devices": kernels.DEVICES, "dtypes": kernels.DTYPES, "widths": (1, kernels.WIDEST)}
    implementation("window2d", "triton", **given)(_window_triton)
    implementation("hybrid2d", "triton", **given)(_hybrid_triton)


def _near(q, k, v, grid, window, key_mask, scale) -> Attended:
    """Queries and keys of the grid, the window only."""
    first = q.shape[2] - grid[0] * grid[1]
    k, v = (repeat_heads(x[:, :, first:], q.shape[1]) for x in (k, v))
    mask = None if key_mask is None else key_mask[:, first:]
    return Attended(*tiles.near_forward(q[:, :, first:], k, v, mask, *grid, window, scale))


def _tail(q, k, v, grid, window, phi: FeatureMap | LearnedMap, key_mask, rotary) -> Attended:
    """Queries and keys of the grid, all but the window; without the gate."""
    heads, first, acc = q.shape[1], q.shape[2] - grid[0] * grid[1], accumulator(v.dtype)
    q, k, phi, turning, level = featured(q, hide(k, key_mask), phi, rotary)
    fq, fk = phi.features(q.to(acc)), hide(phi.features(k.to(acc)), key_mask)

    def sums(fq: Tensor, fk: Tensor, values: Tensor) -> Tensor:
        fk, values = (repeat_heads(x[:, :, first:], heads) for x in (fk, values))
        return tiles.outside(fq[:, :, first:], fk, values, *grid, window)

    values, ones = v.to(acc), torch.ones_like(v[..., :1], dtype=acc)
    if turning is None:
        both = sums(fq, fk, torch.cat((values, ones), -1))
        num, den = both[..., :-1], both[..., -1]
    else:  # other maps are rotated in the numerator only, see `core.attention.positions`
        num, den = sums(turning[0](fq), turning[1](fk), values), sums(fq, fk, ones)[..., 0]
    den = den.clamp(min=0)  # 1 + cos of opposite vectors may round below 0
    empty = den == 0
    whole = den.masked_fill(empty, 1.0)
    if phi.floor:
        real = torch.ones_like(den[:1, 0]) if key_mask is None else key_mask[:, first:].to(acc)
        whole = torch.maximum(whole, phi.floor * _outside_count(real, grid, window).unsqueeze(1))
    tail = Attended(
        (num / whole.unsqueeze(-1)).to(v.dtype), den.masked_fill(empty, 1.0).log().masked_fill(empty, -torch.inf)
    )
    return linear.raised(tail, None if level is None else level[..., first:])


def _outside_count(real: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """How many of the real keys [b, N] lie outside of each query's window, [b, N]."""
    rows, columns = grid
    upto = torch.nn.functional.pad(real.view(-1, rows, columns), (1, 0, 1, 0)).cumsum(1).cumsum(2)

    def borders(length: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(length, device=real.device)
        return (at - window + 1).clamp(min=0), (at + window).clamp(max=length)

    (top, bottom), (left, right) = borders(rows), borders(columns)
    strip = upto[:, bottom] - upto[:, top]
    return (real.sum(-1)[:, None, None] - strip[:, :, right] + strip[:, :, left]).flatten(1)


def _joined(grid: Attended, q, k, v, key_mask, scale) -> Attended:
    """The grid's queries with the keys before the grid, and the queries before the grid with all keys."""
    first = q.shape[2] - grid.out.shape[2]
    if first == 0:
        return grid
    options = {"scale": scale, "return_mass": True, "backend": "torch"}
    mask = None if key_mask is None else key_mask[:, :first]
    before = softmax.attend(q[:, :, first:], k[:, :, :first], v[:, :, :first], key_mask=mask, **options)
    own = softmax.attend(q[:, :, :first], k, v, key_mask=key_mask, **options)
    return _behind(own, first, merge(grid, before))


def _behind(before: Attended, first: int, grid: Attended) -> Attended:
    """The results of the grid behind those of the `first` tokens, which are the first in `before`."""
    assert before.log_mass is not None
    assert grid.log_mass is not None
    parts = (before.out[:, :, :first], grid.out), (before.log_mass[:, :, :first], grid.log_mass)
    return Attended(*(torch.cat(pair, 2) for pair in parts))


def _pairs(length: int, window: int, grid: tuple[int, int] | None) -> int:
    """Number of near pairs; without a grid those of a line, as `Variant.cost` has them."""
    rows, columns = (1, length) if grid is None else grid
    first = length - rows * columns
    return band_pairs(rows, window, False) * band_pairs(columns, window, False) + first * (2 * length - first)


def _checked(q, k, v, key_mask, window: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    check_inputs(q, k, v, key_mask)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"a 2-D window needs as many queries as keys, got L={q.shape[2]}, M={k.shape[2]}")
    return (1, q.shape[2]) if grid is None else grid


@register(
    "window2d",
    summary="softmax over the nearest tokens of an image grid; linear",
    source="Ramachandran et al. 2019, arXiv:1906.05909; Hassani et al. 2022, arXiv:2204.07143",
    pick="images at high resolution where what matters is near; or as the cheap half of a layered mix",
    stability="as softmax; never more than a window of weights",
)
class Window2dAttention(Variant):
    """Softmax over a two-sided 2-D window of the grid and over the tokens before it.

    Args:
        window: keys nearer than this in rows and in columns are seen: (2 window - 1)^2 of them.
    """

    can = frozenset({"bidirectional", "mass", "grid"})
    positions = frozenset({"rope"})

    def __init__(self, heads: Heads, *, window: int = 8):
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
    ) -> Attended:
        grid = _checked(q, k, v, key_mask, self.window, inputs.grid)
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        run = resolve("window2d", backend, q.device.type, q.dtype, (), (q.shape[3], v.shape[3])).run
        return run(q, hide(k, key_mask), hide(v, key_mask), grid, self.window, key_mask, q.shape[-1] ** -0.5)

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4, grid=None) -> Cost:
        h = self.heads
        pairs = _pairs(length, self.window, grid)
        return Cost(
            flops=2 * batch * h.query * pairs * (h.width + h.value_width),
            bytes_moved=batch * element_bytes * (h.query + h.key) * length * (h.width + h.value_width),
        )


@register(
    "hybrid2d",
    summary="softmax over the nearest tokens of an image grid and a linear tail over all others; linear",
    source="this project's mass form; parts: arXiv:2204.07143, arXiv:2006.16236",
    pick="images at high resolution: near tokens exactly, far ones roughly",
    stability="one normaliser for both parts; the tail is a sum of positive terms, never a difference",
)
class Hybrid2dAttention(HybridAttention):
    """A softmax window on the grid and a linear tail with a learned weight per head.

    Args:
        window: as in `window2d`.
        feature_map, feature_dim, features, seed, redraw_every: of the tail, see `LinearAttention`.
        conv: taps of a depth-wise conv x conv convolution of the values that is added to the output, odd; 0: none.
    """

    can = frozenset({"bidirectional", "mass", "grid"})
    positions = frozenset({"rope"})

    def __init__(
        self,
        heads: Heads,
        *,
        window: int = 8,
        feature_map: str = "elu",
        feature_dim: int | None = None,
        features: int | None = None,
        seed: int = 0,
        redraw_every: int = 0,
        conv: int = 0,
    ):
        drawn = {"features": features, "seed": seed, "redraw_every": redraw_every}
        super().__init__(heads, window=window, feature_map=feature_map, feature_dim=feature_dim, conv=conv, **drawn)
        self.can = type(self).can

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
        grid = _checked(q, k, v, key_mask, self.window, inputs.grid)
        run = resolve("hybrid2d", backend, q.device.type, q.dtype, (), (q.shape[3], v.shape[3])).run
        tail_q, tail_k = self.project(q, k)
        hidden = hide(k, key_mask), hide(v, key_mask)
        given = (grid, self.window, self.map, self.gate, key_mask, q.shape[-1] ** -0.5, rotary)
        attended = run(q, *hidden, tail_q, tail_k, *given)
        if self.convolution is None:
            return attended
        return self.convolution.add_to(attended, v, causal=False, key_mask=key_mask, grid=inputs.grid)

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4, grid=None) -> Cost:
        h, width = self.heads, self.project.width
        tail = linear.sums_cost(h, self.map, width, batch, length, length, False, positions, element_bytes)
        total = self.project.cost(batch, length, length)
        if self.convolution is not None:
            total += self.convolution.cost(batch, length, h.key, False, element_bytes)
        pairs = _pairs(length, self.window, grid)
        return total + Cost(
            flops=tail.flops + 2 * batch * h.query * pairs * (h.width + h.value_width),
            bytes_moved=2 * tail.bytes_moved,
            parameters=h.query,
        )
