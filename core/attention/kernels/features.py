# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles this file by rules of its own, which a type checker does not know.
"""Pieces that the linear kernels share: features and their gradient, running log-decay, products, row scalars.

The Taylor features are monomials c_f x_a(f) x_b(f), with x = 1 for an absent index, in the order of
`core.attention.feature_maps`: 153 of them for D = 16, in a block of 256. Inside a chunk their product is taken as
1 + s + s^2 / 2 from s = q.k / sqrt(D), which costs D products instead of F.
"""

import triton
import triton.language as tl

MAPS = ("elu", "relu", "silu", "taylor", "identity", "given", "given_floored")
"""Feature maps that a kernel computes while it loads; others are computed before and come as `given`."""


@triton.jit
def product(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, summed in float32."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def monomials(f, D: tl.constexpr):
    """(first index or -1, second index or -1, factor) of Taylor features f."""
    n = f - 2 * D - 1
    m: tl.constexpr = 2 * D - 1
    # Line r of the upper triangle starts at r (m - r) / 2; the small number guards the root's rounding.
    root = tl.sqrt(tl.maximum(m * m - 8 * n, 0).to(tl.float32))
    r = tl.floor((m - root) * 0.5 + 1e-3).to(tl.int32)
    c = n - (r * (m - r)) // 2 + r + 1
    first = tl.where(f <= D, f - 1, tl.where(f <= 2 * D, f - D - 1, r))
    second = tl.where(f <= D, -1, tl.where(f <= 2 * D, f - D - 1, c))
    factor = tl.where(f == 0, 1.0, tl.where(f <= D, D**-0.25, tl.where(f <= 2 * D, (2 * D) ** -0.5, D**-0.5)))
    return first, second, factor


@triton.jit
def _directed(value, factor, here):
    """(r over its largest number, that number, the length of the first, that of its cube) for the map focused."""
    r = tl.where(here, (tl.maximum(value, 0.0) + 1e-6) * factor[None, :], 0.0)
    top = tl.maximum(tl.max(r, 1), 1e-30)[:, None]
    share = r / top
    cube = share * share * share
    length, of = tl.sqrt(tl.sum(share * share, 1)), tl.sqrt(tl.sum(cube * cube, 1))
    return share, top, tl.maximum(length, 1e-30)[:, None], tl.maximum(of, 1e-30)[:, None]


@triton.jit
def features(x, at, ok, f, D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, factor=None):
    """phi [rows, features] in float32 of the rows that begin at x + at; 0 where not ok. factor: of `factor_of`."""
    here = ok[:, None] & (f < F)[None, :]
    if MAP == "taylor":
        first, second, factor = monomials(f, D)
        a = tl.load(x + at[:, None] + first[None, :], mask=here & (first >= 0)[None, :], other=1.0).to(tl.float32)
        b = tl.load(x + at[:, None] + second[None, :], mask=here & (second >= 0)[None, :], other=1.0).to(tl.float32)
        phi = tl.where(here, a * b * factor[None, :], 0.0)
    else:
        phi = tl.load(x + at[:, None] + f[None, :], mask=here, other=0.0).to(tl.float32)
        if MAP == "elu":
            phi = tl.where(here, tl.where(phi > 0, phi + 1, tl.exp(tl.minimum(phi, 0.0))), 0.0)
        if MAP == "relu":
            phi = tl.maximum(phi, 0.0)
        if MAP == "silu":
            phi = phi / (1 + tl.exp(-phi))
        if MAP == "focused":
            share, top, length, of = _directed(phi, factor, here)
            phi = share * share * share * (top * length / of)
    return phi


@triton.jit
def factor_of(factors, kept, f, F: tl.constexpr, MAP: tl.constexpr):
    """The factor [features] of a key head for the map focused, which other maps have not."""
    if MAP == "focused":
        return tl.load(factors + kept * F + f, mask=f < F, other=0.0)
    return tl.zeros_like(f).to(tl.float32)


@triton.jit
def through_features(
    x, at, ok, f, c, d, D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """The gradient [rows, dimensions c] at x from d [rows, features f] at phi(x)."""
    here = ok[:, None] & (f < F)[None, :]
    if MAP == "taylor":
        first, second, factor = monomials(f, D)
        a = tl.load(x + at[:, None] + first[None, :], mask=here & (first >= 0)[None, :], other=1.0).to(tl.float32)
        b = tl.load(x + at[:, None] + second[None, :], mask=here & (second >= 0)[None, :], other=1.0).to(tl.float32)
        d = tl.where(here, d * factor[None, :], 0.0)
        d = product(d * b, (first[:, None] == c[None, :]).to(tl.float32), DOT, PRECISION) + product(
            d * a, (second[:, None] == c[None, :]).to(tl.float32), DOT, PRECISION
        )
    elif MAP == "elu" or MAP == "relu" or MAP == "silu":
        value = tl.load(x + at[:, None] + f[None, :], mask=here, other=0.0).to(tl.float32)
        if MAP == "elu":
            d = d * tl.where(value > 0, 1.0, tl.exp(tl.minimum(value, 0.0)))
        if MAP == "relu":
            d = tl.where(value > 0, d, 0.0)
        if MAP == "silu":
            gate = 1 / (1 + tl.exp(-value))
            d = d * gate * (1 + value * (1 - gate))
    return d


@triton.jit
def through_focused(x, at, ok, f, d, factor, F: tl.constexpr):
    """The gradients at x [rows, F] and at the factor [F] from d [rows, F] at the map focused of x."""
    here = ok[:, None] & (f < F)[None, :]
    value = tl.load(x + at[:, None] + f[None, :], mask=here, other=0.0).to(tl.float32)
    share, _, length, of = _directed(value, factor, here)
    unit = share * share * share / of
    along = tl.sum(d * unit, 1)[:, None]
    d = along * share / length + 3 * length / of * share * share * (d - unit * along)
    d = tl.where(here, d, 0.0)
    return tl.where(value > 0, d * factor[None, :], 0.0), tl.sum(d * (tl.maximum(value, 0.0) + 1e-6), 0)


@triton.jit
def weights(a, c, D: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """(phi(q) phi(k)^T, its derivative by q k^T) from features, or for Taylor from q and k themselves."""
    s = product(a, tl.trans(c), DOT, PRECISION)
    if MAP == "taylor":
        s *= D**-0.5
        return 1 + s + 0.5 * s * s, (1 + s) * D**-0.5
    return s, tl.zeros_like(s)


@triton.jit
def log_decay(g, rate, u0, u, T, C: tl.constexpr, DECAY: tl.constexpr):
    """(running sum of the log-gates since u0, at u; the sum over the chunk). All exponents are <= 0."""
    if DECAY == "constant":
        steps = tl.minimum(u, T - 1) - u0 + 1
        return -rate * steps.to(tl.float32), -rate * (tl.minimum(T, u0 + C) - u0).to(tl.float32)
    gates = tl.load(g + u, mask=u < T, other=0.0).to(tl.float32)
    return tl.cumsum(gates, 0), tl.sum(gates, 0)


@triton.jit
def upstream(d_out, scale, d_den, at, row, ok, e, E: tl.constexpr, NORMALIZE: tl.constexpr):
    """(d num [rows, values], d den [rows]) in float32 from d out and the row scalars of `row_gradients`."""
    d = tl.load(d_out + at[:, None] + e[None, :], mask=ok[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
    if NORMALIZE:
        d = d * tl.load(scale + row, mask=ok, other=0.0)[:, None]
        return d, tl.load(d_den + row, mask=ok, other=0.0)
    return d, tl.zeros_like(tl.sum(d, 1))


@triton.jit
def row_gradients(
    d_out, out, den, floor, d_mass, scale, d_den,
    db, dh, dl, floor_b, H, L,
    E: tl.constexpr, FLOOR: tl.constexpr, MASS: tl.constexpr, C: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Per row: 1 / denominator and the gradient at the denominator, (d mass - <d out, out>) / denominator.

    Where the floor divided, not the denominator, the outputs give it no gradient. One read of d_out and out.
    """
    blocks = tl.cdiv(L, C)
    bh = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks) * C + tl.arange(0, C)
    ok, e = i < L, tl.arange(0, EP)
    b, h, row = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh.to(tl.int64) * L + i
    z = tl.load(den + row, mask=ok, other=0.0)
    low = tl.full([C], 1.1754943508222875e-38, tl.float32)
    if FLOOR:
        low = tl.load(floor + b * floor_b + i, mask=ok, other=1.0)
    dot = tl.zeros([C], tl.float32)
    for e0 in range(0, E, EP):
        here = ok[:, None] & (e0 + e < E)[None, :]
        d = tl.load(d_out + b * db + h * dh + i.to(tl.int64)[:, None] * dl + (e0 + e)[None, :], mask=here, other=0.0)
        o = tl.load(out + row[:, None] * E + (e0 + e)[None, :], mask=here, other=0.0)
        dot += tl.sum(d.to(tl.float32) * o.to(tl.float32), 1)
    inverse = tl.where(z > 0, 1 / tl.maximum(z, low), 0.0)
    d = tl.where(z > low, -dot * inverse, 0.0)
    if MASS:
        d += tl.where(z > 0, tl.load(d_mass + row, mask=ok, other=0.0) / tl.where(z > 0, z, 1.0), 0.0)
    tl.store(scale + row, inverse, mask=ok)
    tl.store(d_den + row, d, mask=ok)
