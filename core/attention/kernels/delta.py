# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles the kernels by rules of its own, which a type checker does not know.
"""The delta rule on a GPU: the kinds `delta` and `vector_delta` of `core.attention.blocked.scan`.

    S_t = e^{g_t} S_{t-1} + k_t x_t^T,    x_t = beta_t z_t,    z_t = v_t - (e^{g_t} S_{t-1})^T k_t,    o_t = S_t^T q_t

with g_t a number, 0 for DeltaNet, or one per feature. Once x is known this is `decay` or `gated` with x for values, and
their sweeps do the reading, the state and nearly all of the backward. What is new here is x, chunk by chunk in the
UT / WY form. With b the running sum of g and M_ij = (k_i.k_j) e^{b_i - b_j} beta_j below the diagonal (`_couple`),

    T = (I + M)^{-1},    Z = T (V - (K e^b) S),    S <- e^{b_C} S + (K e^{b_C - b})^T X        (`_solve`)

T is found row by row, all chunks at once; products of powers of M would overflow where keys repeat. S depends on Z in
the chunk before, so `_solve` is one program per key head and tile of values, however long the sequence.

Backward: with dX from the outputs and the later state, Y = T^T (beta dX) is the gradient at V, and -Y that at what the
keys read, against time (`_solve_gradient`). To the sweeps the keys are then one more query head of their group, with
upstream -Y. They count the own position, which the reading of z leaves out; taking it off again gives

    dx_t = sweep + |k_t|^2 y_t,    dk_t = sweep + 2 (y_t.x_t) k_t,    dbeta_t = dx_t.z_t,    dv_t = y_t

Bytes, e per element: beside those of `decay` or `gated`, forward K L (e (F n + F + 3 E) + 8 C), n value tiles; backward
K L (e F (1 + n) + 8 E + 8 C) and H L (e F n + 4 E), and the sweeps with H + K heads in place of H. FLOPs beside theirs
forward K L (4 F E + 2 C (F + E) + 4 C^2), the last on vector units.

Serves, when asked for: float32, float16 and bfloat16 up to 256 features; `launch.products` states the precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.blocked.pairs import join_scan
from core.attention.kernels.decay import decay_backward, decay_forward
from core.attention.kernels.features import product
from core.attention.kernels.gated import cumulated, gated_backward, gated_forward, squares
from core.attention.kernels.gated_sweeps import decays, fall, load, square
from core.attention.kernels.launch import Blocks, choose, on, padded, products, rows_contiguous
from core.attention.kernels.step import delta_step, is_step

BLOCKS = {
    None: Blocks(16, 32, 8, 1),
    "interpreter": Blocks(16, 16, 4, 1),
    ("hopper", 16, 2): Blocks(32, 32, 4, 2),
    ("hopper", 32, 2): Blocks(32, 32, 4, 2),
    ("hopper", 64, 2): Blocks(32, 32, 4, 2),
    ("hopper", 128, 2): Blocks(32, 32, 8, 1),
}
"""Keyed by (class of device, padded features, bytes per element). Narrow tiles, because only heads and tiles fill the
device here. Chosen by the registers and shared memory that ptxas reports for sm_90a (2026-11-25); not yet timed on a
GPU."""


def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, state: Tensor | None = None):
    """As `core.attention.blocked.scan.scan("delta", ...)` or, with a gate per feature, "vector_delta"."""
    if state is not None and is_step(q, k, v, state, g, beta):
        return delta_step(q, k, v, g, beta, state)
    return delta_forward(q, k, v, g, beta, state)[:2]


@triton.jit
def _falls(b, u0, u, L, f, F: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr):
    """(e^b, e^{b_C - b}) at u and e^{b_C}, to be multiplied with rows of keys and with the state."""
    if VECTOR:
        run, last = decays(b, u0, u, L, f, F, C)
    else:
        run = tl.load(b + u, mask=u < L, other=0.0)[:, None]
        last = tl.load(b + tl.minimum(u0 + C, L) - 1 + tl.arange(0, 1))
    return fall(run), fall(last[None, :] - run), tl.exp(last)[:, None]


@triton.jit
def _differences(b, u, L, C: tl.constexpr):
    """e^{b_i - b_j} for j <= i, else 0, of one decay per head."""
    run, c = tl.load(b + u, mask=u < L, other=0.0), tl.arange(0, C)
    return tl.where(c[:, None] >= c[None, :], fall(run[:, None] - run[None, :]), 0.0)


@triton.jit
def _couple(
    k, b, beta, a, t, kb, kh, kl, K, L,
    F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """T [B, K, L, C] of one chunk, by rows: T_n = e_n - sum_{j<n} M_nj T_j."""
    blocks = tl.cdiv(L, C)
    bk, c, f = tl.program_id(0) // blocks, tl.arange(0, C), tl.arange(0, FP)
    u = (tl.program_id(0) % blocks).to(tl.int64) * C + c
    at = bk.to(tl.int64) * L
    if VECTOR:
        m = square(a + at * C, u, L, C).to(tl.float32)
    else:
        keys = load(k + (bk // K).to(tl.int64) * kb + (bk % K).to(tl.int64) * kh, u * kl, u < L, f, F)
        m = product(keys, tl.trans(keys), DOT, PRECISION) * _differences(b + at, u, L, C)
    m *= tl.load(beta + at + u, mask=u < L, other=0.0).to(tl.float32)[None, :]
    inverse = tl.where(c[:, None] == c[None, :], 1.0, 0.0)
    for n in range(1, C):
        row = tl.sum(tl.where((c[:, None] == n) & (c[None, :] < n), m, 0.0), 0)
        step = tl.sum(row[:, None] * inverse, 0)
        inverse = tl.where(c[:, None] == n, inverse - step[None, :], inverse)
    tl.store(t + (at + u)[:, None] * C + c[None, :], inverse, mask=(u < L)[:, None])


@triton.jit
def _solve(
    k, v, b, beta, t, state, z, written, kb, kh, kl, vb, vh, vl, K, L, tiles,
    F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
    STATE: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z and x = beta z [B, K, L, E] of one key head and a tile of values, x rounded as the sweeps will read it.

    The outputs are left to the sweeps. Here they would wait for each other, chunk after chunk, in the few programs that
    there are, and every tile of values would make q k^T again; the sweeps have a program per segment of the sequence.
    With q and a second accumulator the registers (242 of 255 for a gate per feature at 128) would not do either.
    """
    tile, bk = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    f, e = tl.arange(0, FP), tile * BE + tl.arange(0, BE)
    s = tl.zeros([FP, BE], tl.float32)
    if STATE:
        at = (bk * F + f)[:, None] * E + e[None, :]
        s = tl.load(state + at, mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
    k += bk // K * kb + bk % K * kh
    v += bk // K * vb + bk % K * vh
    b += bk * L * (F if VECTOR else 1)
    t += bk * L * C
    for u0 in range(0, L, C):
        u = (u0 + tl.arange(0, C)).to(tl.int64)
        enter, leave, whole = _falls(b, u0, u, L, f, F, C, VECTOR)
        keys = load(k, u * kl, u < L, f, F)
        new = load(v, u * vl, u < L, e, E) - product(keys * enter, s, DOT, PRECISION)
        found = product(square(t, u, L, C), new, DOT, PRECISION).to(z.dtype.element_ty)
        place, here = (bk * L + u)[:, None] * E + e[None, :], (u < L)[:, None] & (e < E)[None, :]
        tl.store(z + place, found, mask=here)
        strength = tl.load(beta + bk * L + u, mask=u < L, other=0.0).to(tl.float32)
        x = (found.to(tl.float32) * strength[:, None]).to(z.dtype.element_ty)
        tl.store(written + place, x, mask=here)
        s = s * whole + product(tl.trans(keys * leave), x, DOT, PRECISION)


@triton.jit
def _solve_gradient(
    q, k, d_out, b, beta, a, t, d_end, y, qb, qh, ql, kb, kh, kl, ob, oh, ol, K, GROUP, L, tiles,
    F: tl.constexpr, E: tl.constexpr, FP: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
    STATE: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, K, L, E] of one key head and a tile of values, against time with the gradient at the state."""
    tile, bk = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    f, e = tl.arange(0, FP), tile * BE + tl.arange(0, BE)
    s = tl.zeros([FP, BE], tl.float32)
    if STATE:
        at = (bk * F + f)[:, None] * E + e[None, :]
        s = tl.load(d_end + at, mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
    q += bk // K * qb
    k += bk // K * kb + bk % K * kh
    d_out += bk // K * ob
    b += bk * L * (F if VECTOR else 1)
    t += bk * L * C
    chunks = tl.cdiv(L, C)
    for n in range(chunks):
        u0 = (chunks - 1 - n) * C
        u = (u0 + tl.arange(0, C)).to(tl.int64)
        enter, leave, whole = _falls(b, u0, u, L, f, F, C, VECTOR)
        keys = load(k, u * kl, u < L, f, F)
        dx = product(keys * leave, s, DOT, PRECISION)
        s *= whole
        for member in range(GROUP):
            head = bk % K * GROUP + member
            asked = load(q + head * qh, u * ql, u < L, f, F)
            do = load(d_out + head * oh, u * ol, u < L, e, E)
            if VECTOR:
                w = square(a + (bk * GROUP + member) * L * C, u, L, C)
            else:
                w = product(asked, tl.trans(keys), DOT, PRECISION) * _differences(b, u, L, C)
            dx += product(tl.trans(w), do, DOT, PRECISION)
            s += product(tl.trans(asked * enter), do, DOT, PRECISION)
        strength = tl.load(beta + bk * L + u, mask=u < L, other=0.0).to(tl.float32)
        read = product(tl.trans(square(t, u, L, C)), dx * strength[:, None], DOT, PRECISION)
        tl.store(y + (bk * L + u)[:, None] * E + e[None, :], read, mask=(u < L)[:, None] & (e < E)[None, :])
        s -= product(tl.trans(keys * enter), read, DOT, PRECISION)


class _Chunks:
    """What the two solves share: running sums, T and the launch."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor):
        self.k, self.v, self.beta = rows_contiguous(k), rows_contiguous(v), beta.float().contiguous()
        self.batch, self.heads, self.length, width = k.shape
        values, self.vector = v.shape[3], g.dim() == 4
        blocks = choose(BLOCKS, k.device, padded(width), k.element_size())
        tile = min(blocks.values, padded(values))
        self.tiles, self.grid = -(-values // tile), (-(-values // tile) * self.batch * self.heads,)
        self.products = {**products(q, k, v), "num_warps": blocks.warps, "num_stages": blocks.stages}
        shape = {"F": width, "FP": padded(width), "C": blocks.chunk, "VECTOR": self.vector}
        self.kind = {**shape, "E": values, "BE": tile, **self.products}
        self.b = cumulated(g if self.vector else g.unsqueeze(-1), blocks.chunk, blocks.warps)
        self.t = torch.empty(self.batch, self.heads, self.length, blocks.chunk, dtype=torch.float32, device=k.device)
        _couple[(-(-self.length // blocks.chunk) * self.batch * self.heads,)](
            self.k, self.b, self.beta, self.squares(self.k), self.t, *self.k.stride()[:3], self.heads, self.length,
            **shape, **{**self.products, "num_warps": max(1, min(4, padded(width) // 64))},  # rows wait for each other
        )  # fmt: skip

    def squares(self, q: Tensor) -> Tensor:
        """Products with the keys, which one decay per head lets the kernels make themselves."""
        return squares(q, self.k, self.b, self.kind["C"], self.products, torch.float32) if self.vector else self.b

    def solve(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """(z, x) [B, K, L, E] in the dtype of v."""
        z, x = (torch.empty(self.v.shape, dtype=self.v.dtype, device=self.v.device) for _ in range(2))
        _solve[self.grid](
            self.k, self.v, self.b, self.beta, self.t, self.b if state is None else state, z, x,
            *self.k.stride()[:3], *self.v.stride()[:3], self.heads, self.length, self.tiles,
            STATE=state is not None, **self.kind,
        )  # fmt: skip
        return z, x

    def gradient(self, q: Tensor, d_out: Tensor, d_end: Tensor | None) -> Tensor:
        """y [B, K, L, E], float32."""
        q, d_out = rows_contiguous(q), rows_contiguous(d_out)
        y = torch.empty(self.v.shape, dtype=torch.float32, device=self.v.device)
        _solve_gradient[self.grid](
            q, self.k, d_out, self.b, self.beta, self.squares(q), self.t, self.b if d_end is None else d_end, y,
            *q.stride()[:3], *self.k.stride()[:3], *d_out.stride()[:3], self.heads, q.shape[1] // self.heads,
            self.length, self.tiles, STATE=d_end is not None, **self.kind,
        )  # fmt: skip
        return y


@torch.library.custom_op("longspan::delta_kernel_forward", mutates_args=())
def delta_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, L, E], last state [B, K, F, E], both float32; z [B, K, L, E] for the backward)."""
    state = None if state is None else state.float().contiguous()
    if 0 in (*k.shape, v.shape[3]):
        z = x = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    else:
        with on(q.device):
            z, x = _Chunks(q, k, v, g, beta).solve(state)
    out, end = (gated_forward if g.dim() == 4 else decay_forward)(q, k, x, g, state)
    return out, end, z


@torch.library.custom_op("longspan::delta_kernel_backward", mutates_args=())
def delta_backward(
    d_out: Tensor,
    d_end: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    end: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, d beta, d first state)."""
    keys = k.shape[1]
    d_end = None if d_end is None else d_end.float().contiguous()
    x = (z.float() * beta.float().unsqueeze(-1)).to(z.dtype)
    if 0 in (*k.shape, v.shape[3]):
        y = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    else:
        with on(q.device):
            y = _Chunks(q, k, v, g, beta).gradient(q, d_out, d_end)
    readers = torch.cat((q.unflatten(1, (keys, -1)), k.unsqueeze(2)), 2).flatten(1, 2)
    upstream = torch.cat((d_out.unflatten(1, (keys, -1)), -y.unsqueeze(2)), 2).flatten(1, 2)
    backward = gated_backward if g.dim() == 4 else decay_backward
    d_readers, dk, dx, dg, d_first = backward(upstream, d_end, readers, k, x, g, state, end)
    d_readers = d_readers.unflatten(1, (keys, -1))
    wide = k.float()
    d_beta = ((dx + wide.square().sum(-1, keepdim=True) * y) * z).sum(-1)
    dk = dk + d_readers[:, :, -1] + 2 * (y * x).sum(-1, keepdim=True) * wide
    dq = d_readers[:, :, :-1].flatten(1, 2).contiguous()
    return dq, dk.to(k.dtype), y.to(v.dtype), dg, d_beta.to(beta.dtype), d_first


join_scan(delta_forward, delta_backward, kept=1)
