# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# Triton compiles the kernels by rules of its own, which a type checker does not know.
"""Causal hybrid attention in one kernel: softmax over the window, a linear tail behind it, one normaliser.

    o_i = (sum_{j near} e^{s_ij} v_j + gamma phi(q_i)^T S_i) / e^{l_i},    S_i = sum_{j <= t_i - W} phi(k_j) v_j^T
    e^{l_i} = sum_{j near} e^{s_ij} + gamma phi(q_i)^T z_i,    z_i = sum_{j <= t_i - W} phi(k_j),    t_i = i + M - L

A program walks over the rows of one head and one segment as in `linear`, S [F, E] and z [F] on chip, fed by the keys
that leave the window; at each block of rows it visits the window's blocks of keys as in `window`, and divides once.
Row i0 + n of a block meets key j0 + n, where j0 = i0 + M - L - W may be negative: those keys are absent.

Backward from l: weights are e^{s_ij - l_i} near and gamma phi.phi e^{-l_i} far, and the gradient at either, before the
division, is do.v_j - delta_i with delta = <do, o> - dl. So one sweep gives dq and the gate's gradient, one against time
dk and dv: neither part's output or mass is ever written.

Bytes, e per element, against the two kernels of `merge`: forward e L (2 D + 2 E) with q and v read twice on chip, where
those move e L (4 D + 5 E) and 8 L; backward e L (7 D + 7 E) / 1.6 of theirs. FLOPs are the same, 2 L W (D + E) and
L (4 F E + 2 C (F + E)). The window is swept by as many programs as the tail, though, and one program keeps all columns.

Serves, when asked for and `prefers` says so: float32, float16 and bfloat16; `launch.products` states the precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.kernels.features import MAPS, features, product, through_features, upstream
from core.attention.kernels.launch import Blocks, choose, on, padded, products, rows_contiguous, segments
from core.attention.kernels.linear import Sweep
from core.attention.kernels.linear_sweeps import load_state
from core.attention.kernels.window import LOG2E, delta_of, real, scores, tile

BLOCKS = {
    None: Blocks(16, 16, 8, 1),
    "interpreter": Blocks(16, 16, 4, 1),
    ("hopper", 64, 2): Blocks(64, 64, 8, 1),
    ("hopper", 128, 2): Blocks(32, 32, 8, 1),
}
"""Rows and keys per block, warps and stages by (class of device, widest padded width, bytes per element). Chosen by the
registers and shared memory that ptxas reports for sm_90a (2026-11-25); not yet timed on a GPU."""

WIDEST = 256
"""Most bytes in a row of a head: beyond, queries, window and the state of all columns spill out of the registers."""


def prefers(phi, widest: int, element_bytes: int, *, causal: bool, decays: bool, turns: bool) -> bool:
    """Whether one kernel is expected to be faster than two and a merge (by bytes and registers; not timed, 2026-11-25).

    Two-sided tails sweep in both directions, which one kernel cannot. Rotated features (`turns`) need two sums, ALiBi
    (`decays`) a state per query head, maps with a floor a mean of their own: the kernels of `linear` have these. Taylor
    features are multiplied there as D-wide products, here they would be F wide. Wide heads do not fit.

    Args:
        phi: the tail's map.   widest: the largest of D, F and E.   causal: as in attention.
        decays: whether weights fall with the distance.   turns: whether features are rotated, or learned.
    """
    plain = phi.name in MAPS and phi.name != "taylor" and phi.floor == 0
    return causal and plain and not decays and not turns and widest * element_bytes <= WIDEST


@triton.jit
def _forward(
    q, k, v, a, c, mask, gate, states, out, mass,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ab, ah, al, cb, ch, cl, mb,
    H, GROUP, L, M, W, scale, row0, key0, T, parts, size,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, STATE: tl.constexpr, MASK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and log mass of one segment from the tail's state before it."""
    part, bh = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h, bk = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh // GROUP
    d, f, e = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, EP)
    s, z = tl.zeros([FP, EP], tl.float32), tl.zeros([FP], tl.float32)
    if STATE:
        s, z = load_state(states, (bk * parts + part).to(tl.int64) * F * (E + 1), f, e, F, E, True)
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    a += b * ab + h * ah
    c += b * cb + h // GROUP * ch
    mask += b * mb
    weight = tl.load(gate + h).to(tl.float32) * LOG2E
    for u0 in range(part * size, tl.minimum(T, (part + 1) * size), BM):
        u = u0 + tl.arange(0, BM)
        i, j = (row0 + u).to(tl.int64), (key0 + u).to(tl.int64)
        row, key = (u < T) & (i >= 0) & (i < L), (u < T) & real(mask, j, M, MASK)
        ask, put = features(a, i * al, row, f, G, F, MAP), features(c, j * cl, key, f, G, F, MAP)
        value = tile(v, j * vl, key, e, E)
        w = product(ask, tl.trans(put), DOT, PRECISION)
        w = tl.where((u[:, None] >= u[None, :]) & key[None, :], w, 0.0)
        num = product(ask, s, DOT, PRECISION) + product(w, value, DOT, PRECISION)
        den = tl.maximum(tl.sum(ask * z[None, :], 1) + tl.sum(w, 1), 0.0)
        s += product(tl.trans(put), value, DOT, PRECISION)
        z += tl.sum(put, 0)
        # The tail is the first block of the running maximum: its mean, at the level of its mass.
        some = den > 0
        top = tl.where(some, weight + tl.log2(tl.where(some, den, 1.0)), float("-inf"))
        total = tl.where(some, 1.0, 0.0)
        acc = num / tl.where(some, den, 1.0)[:, None] * total[:, None]
        x, t = tile(q, i * ql, row, d, D), u + (row0 + M - L)
        first = tl.maximum(0, u0 + row0 + M - L - W + 1) // BN * BN
        last = tl.where(u0 + row0 + BM > 0, tl.minimum(M, u0 + row0 + BM + M - L), 0)
        for n0 in range(first, last, BN):
            n = n0 + tl.arange(0, BN)
            near = real(mask, n, M, MASK)
            keys = tile(k, n.to(tl.int64) * kl, near, d, D)
            y = scores(x, keys, t, n, row, near, W, scale, 0.0, True, False, DOT, PRECISION)
            higher = tl.maximum(top, tl.max(y, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            fall, p = tl.exp2(top - safe), tl.exp2(y - safe[:, None])
            total = total * fall + tl.sum(p, 1)
            acc = acc * fall[:, None] + product(p, tile(v, n.to(tl.int64) * vl, near, e, E), DOT, PRECISION)
            top = higher
        whole = tl.where(total > 0, total, 1.0)
        place = bh.to(tl.int64) * L + i
        tl.store(mass + place, tl.where(total > 0, (top + tl.log2(whole)) / LOG2E, float("-inf")), mask=row)
        spot = out + place[:, None] * E + e[None, :]
        tl.store(spot, (acc / whole[:, None]).to(out.dtype.element_ty), mask=row[:, None] & (e < E)[None, :])


@triton.jit
def _query_gradient(
    q, k, v, a, c, d_out, mass, delta, far, d_den, mask, states, dq, da, d_gate,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ab, ah, al, cb, ch, cl, ob, oh, ol, mb,
    H, GROUP, L, M, W, scale, row0, key0, T, parts, size,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, STATE: tl.constexpr, MASK: tl.constexpr,
    SAME: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, da and the gradient at the gate [B, H, L] of one segment; SAME: a is q, and dq is the sum."""
    part, bh = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h, bk = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh // GROUP
    d, f, e = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, EP)
    s, z = tl.zeros([FP, EP], tl.float32), tl.zeros([FP], tl.float32)
    if STATE:
        s, z = load_state(states, (bk * parts + part).to(tl.int64) * F * (E + 1), f, e, F, E, True)
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    a += b * ab + h * ah
    c += b * cb + h // GROUP * ch
    d_out += b * ob + h * oh
    mask += b * mb
    for u0 in range(part * size, tl.minimum(T, (part + 1) * size), BM):
        u = u0 + tl.arange(0, BM)
        i, j = (row0 + u).to(tl.int64), (key0 + u).to(tl.int64)
        row, key = (u < T) & (i >= 0) & (i < L), (u < T) & real(mask, j, M, MASK)
        place = bh.to(tl.int64) * L + i
        put, value = features(c, j * cl, key, f, G, F, MAP), tile(v, j * vl, key, e, E)
        du, dz = upstream(d_out, far, d_den, i * ol, place, row, e, E, True)
        dw = product(du, tl.trans(value), DOT, PRECISION) + dz[:, None]
        dw = tl.where((u[:, None] >= u[None, :]) & key[None, :], dw, 0.0)
        tail = product(du, tl.trans(s), DOT, PRECISION) + dz[:, None] * z[None, :] + product(dw, put, DOT, PRECISION)
        tl.store(d_gate + place, tl.sum(features(a, i * al, row, f, G, F, MAP) * tail, 1), mask=row)
        tail = through_features(a, i * al, row, f, f, tail, G, F, MAP, DOT, PRECISION)
        s += product(tl.trans(put), value, DOT, PRECISION)
        z += tl.sum(put, 0)
        x, do, t = tile(q, i * ql, row, d, D), tile(d_out, i * ol, row, e, E), u + (row0 + M - L)
        level, offset = tl.load(mass + place, mask=row, other=0.0), tl.load(delta + place, mask=row, other=0.0)
        level = tl.where(level == float("-inf"), 0.0, level * LOG2E)
        acc = tl.zeros([BM, DP], tl.float32)
        first = tl.maximum(0, u0 + row0 + M - L - W + 1) // BN * BN
        last = tl.where(u0 + row0 + BM > 0, tl.minimum(M, u0 + row0 + BM + M - L), 0)
        for n0 in range(first, last, BN):
            n = n0 + tl.arange(0, BN)
            near = real(mask, n, M, MASK)
            keys = tile(k, n.to(tl.int64) * kl, near, d, D)
            p = tl.exp2(scores(x, keys, t, n, row, near, W, scale, 0.0, True, False, DOT, PRECISION) - level[:, None])
            dp = product(do, tl.trans(tile(v, n.to(tl.int64) * vl, near, e, E)), DOT, PRECISION)
            acc += product(p * (dp - offset[:, None]), keys, DOT, PRECISION)
        acc *= scale
        if SAME:
            acc += tail
        else:
            spot = da + place[:, None] * G + f[None, :]
            tl.store(spot, tail.to(da.dtype.element_ty), mask=row[:, None] & (f < G)[None, :])
        spot = dq + place[:, None] * D + d[None, :]
        tl.store(spot, acc.to(dq.dtype.element_ty), mask=row[:, None] & (d < D)[None, :])


@triton.jit
def _key_gradient(
    q, k, v, a, c, d_out, mass, delta, far, d_den, mask, states, dk, dv, dc,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ab, ah, al, cb, ch, cl, ob, oh, ol, mb,
    H, GROUP, L, M, W, scale, row0, key0, T, parts, size,
    D: tl.constexpr, G: tl.constexpr, F: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, STATE: tl.constexpr, MASK: tl.constexpr,
    SAME: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and dc of one segment and query head, against time, with the gradient at the tail's state."""
    part, bh = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    d, f, e = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, EP)
    s, z = tl.zeros([FP, EP], tl.float32), tl.zeros([FP], tl.float32)
    if STATE:
        s, z = load_state(states, (bh * parts + part).to(tl.int64) * F * (E + 1), f, e, F, E, True)
    q += b * qb + h * qh
    k += b * kb + h // GROUP * kh
    v += b * vb + h // GROUP * vh
    a += b * ab + h * ah
    c += b * cb + h // GROUP * ch
    d_out += b * ob + h * oh
    mask += b * mb
    begin, end = part * size, tl.minimum(T, (part + 1) * size)
    blocks = tl.cdiv(end - begin, BM)
    for step in range(blocks):
        u0 = begin + (blocks - 1 - step) * BM
        u = u0 + tl.arange(0, BM)
        i, j = (row0 + u).to(tl.int64), (key0 + u).to(tl.int64)
        row, inside = (u < T) & (i >= 0) & (i < L), (u < T) & (j >= 0) & (j < M)
        key = inside & real(mask, j, M, MASK)
        put, value = features(c, j * cl, key, f, G, F, MAP), tile(v, j * vl, key, e, E)
        ask = features(a, i * al, row, f, G, F, MAP)
        du, dz = upstream(d_out, far, d_den, i * ol, bh.to(tl.int64) * L + i, row, e, E, True)
        seen = (u[:, None] >= u[None, :]) & key[None, :]
        w = tl.where(seen, product(ask, tl.trans(put), DOT, PRECISION), 0.0)
        dw = tl.where(seen, product(du, tl.trans(value), DOT, PRECISION) + dz[:, None], 0.0)
        tail = product(value, tl.trans(s), DOT, PRECISION) + z[None, :] + product(tl.trans(dw), ask, DOT, PRECISION)
        tail = through_features(c, j * cl, key, f, f, tail, G, F, MAP, DOT, PRECISION)
        d_value = product(put, s, DOT, PRECISION) + product(tl.trans(w), du, DOT, PRECISION)
        s += product(tl.trans(ask), du, DOT, PRECISION)
        z += tl.sum(ask * dz[:, None], 0)
        keys, acc = tile(k, j * kl, key, d, D), tl.zeros([BM, DP], tl.float32)
        first = tl.maximum(0, u0 + key0 + L - M) // BN * BN
        last = tl.where(u0 + key0 + BM > 0, tl.minimum(L, u0 + key0 + BM + L - M + W - 1), 0)
        for n0 in range(first, last, BN):
            n = n0 + tl.arange(0, BN)
            near, place = n < L, bh.to(tl.int64) * L + n
            x, do = tile(q, n.to(tl.int64) * ql, near, d, D), tile(d_out, n.to(tl.int64) * ol, near, e, E)
            level, offset = tl.load(mass + place, mask=near, other=0.0), tl.load(delta + place, mask=near, other=0.0)
            level = tl.where(level == float("-inf"), 0.0, level * LOG2E)
            y = scores(x, keys, n + (M - L), u + key0, near, key, W, scale, 0.0, True, False, DOT, PRECISION)
            p = tl.exp2(y - level[:, None])
            d_value += product(tl.trans(p), do, DOT, PRECISION)
            dp = product(do, tl.trans(value), DOT, PRECISION)
            acc += product(tl.trans(p * (dp - offset[:, None])), x, DOT, PRECISION)
        acc *= scale
        place = bh.to(tl.int64) * M + j
        if SAME:
            acc += tl.where(key[:, None], tail, 0.0)
        else:
            spot, tail = dc + place[:, None] * G + f[None, :], tl.where(key[:, None], tail, 0.0)
            tl.store(spot, tail.to(dc.dtype.element_ty), mask=inside[:, None] & (f < G)[None, :])
        spot = dk + place[:, None] * D + d[None, :]
        tl.store(spot, acc.to(dk.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
        spot = dv + place[:, None] * E + e[None, :]
        tl.store(spot, d_value.to(dv.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


class _Call:
    """Arguments that the launches of one call share; on the tail's timeline row u + row0 meets key u + key0."""

    def __init__(self, q, k, v, tail_q, tail_k, key_mask, gate, name: str, window: int, scale: float):
        self.same = tail_q is None
        tail_q, tail_k = (q, k) if tail_q is None else (tail_q, tail_k)
        self.q, self.k, self.v, self.a, self.c = (rows_contiguous(x) for x in (q, k, v, tail_q, tail_k))
        self.batch, self.heads, self.rows = q.shape[:3]
        self.key_heads, self.keys = k.shape[1:3]
        self.window = min(window, max(self.rows, self.keys))
        self.group = self.heads // self.key_heads
        offset = self.keys - self.rows - self.window
        # The sums of segments are those of `linear`, on a timeline that has a place for every row.
        self.sums = Sweep(self.a, self.c, v, key_mask, None, None, name, "past", offset, True, True)
        self.sums.row0, self.sums.key0 = -max(offset, 0), min(offset, 0)
        self.row_time = self.rows + max(offset, 0)
        self.key_time = self.row_time + self.window
        self.gate, self.mask = gate.float().contiguous(), self.sums.mask
        self.sizes = self.heads, self.group, self.rows, self.keys, self.window, scale, self.sums.row0, self.sums.key0
        widths = padded(q.shape[3]), padded(self.sums.features), padded(v.shape[3])
        blocks = choose(BLOCKS, q.device, max(64, *widths), q.element_size())
        self.chunk = blocks.chunk
        self.strides = [n for x in (self.q, self.k, self.v, self.a, self.c) for n in x.stride()[:3]]
        self.mask_stride = self.sums.mask_stride
        self.options = {
            "D": q.shape[3],
            "G": tail_q.shape[3],
            "F": self.sums.features,
            "E": v.shape[3],
            "MAP": name,
            "MASK": key_mask is not None,
            **dict(zip(("DP", "FP", "EP"), widths)),
            "BM": blocks.chunk,
            "BN": blocks.values,
            **products(q, k, v),
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }

    def parts(self, time: int) -> tuple[int, int]:
        """(number of segments, steps in each), whole blocks of the sums too."""
        chunk = max(self.chunk, self.sums.chunk)
        return segments(time, chunk, self.batch * self.heads, self.q.device)

    def before(self, parts: int, size: int) -> Tensor | None:
        """The tail's state before each segment of rows; None: there is one segment."""
        self.sums.time = self.row_time
        return self.sums.before(None, parts, size)[0] if parts > 1 else None

    def forward(self) -> tuple[Tensor, Tensor]:
        """(out [B, H, L, E], log mass [B, H, L])."""
        out = torch.empty(self.batch, self.heads, self.rows, self.v.shape[3], dtype=self.v.dtype, device=self.q.device)
        mass = torch.empty(out.shape[:3], dtype=torch.float32, device=self.q.device)
        parts, size = self.parts(self.row_time)
        states = self.before(parts, size)
        _forward[(parts * self.batch * self.heads,)](
            self.q, self.k, self.v, self.a, self.c, self.mask, self.gate, mass if states is None else states, out, mass,
            *self.strides, self.mask_stride, *self.sizes, self.row_time, parts, size, STATE=states is not None,
            **self.options,
        )  # fmt: skip
        return out, mass

    def backward(self, d_out: Tensor, d_mass: Tensor | None, out: Tensor, mass: Tensor) -> tuple[Tensor, ...]:
        """(dq, dk, dv, d tail q, d tail k, d gate); without a tail of their own the fourth and fifth hold nothing."""
        d_out = rows_contiguous(d_out)
        delta = delta_of(d_out, out, d_mass)
        # The factor of phi.phi in a weight. A mass below e^-80 has a tail below it: neither then reaches a gradient.
        far = torch.where(mass == -torch.inf, 0.0, (self.gate[:, None] - mass).clamp(max=80.0).exp())
        d_den = -far * delta
        shared = self.q, self.k, self.v, self.a, self.c, d_out, mass, delta, far, d_den, self.mask
        strides = *self.strides, *d_out.stride()[:3], self.mask_stride, *self.sizes
        rows, whole = (self.batch, self.heads), {"dtype": torch.float32, "device": self.q.device}
        none = (0,) if self.same else None
        dq = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        da = torch.empty(none or self.a.shape, dtype=self.a.dtype, device=self.q.device)
        d_gate = torch.empty(*rows, self.rows, **whole)
        parts, size = self.parts(self.row_time)
        states = self.before(parts, size)
        options = {**self.options, "SAME": self.same}
        _query_gradient[(parts * self.batch * self.heads,)](
            *shared, mass if states is None else states, dq, da, d_gate, *strides, self.row_time, parts, size,
            STATE=states is not None, **options,
        )  # fmt: skip
        alone = self.group == 1
        dk, dv, dc = (
            torch.empty(*rows, *x.shape[2:], **(whole | {"dtype": x.dtype if alone else torch.float32}))
            for x in (self.k, self.v, self.c[:, :, :, :0] if self.same else self.c)
        )
        parts, size = self.parts(self.key_time)
        states = None
        if parts > 1:
            states, _ = self.sums.after((d_out, far, d_den), None, self.key_time, parts, size)
        options["BM"] = max(16, self.chunk // 2)  # two sums more on chip than the others
        _key_gradient[(parts * self.batch * self.heads,)](
            *shared, mass if states is None else states, dk, dv, dc, *strides, self.key_time, parts, size,
            STATE=states is not None, **options,
        )  # fmt: skip
        dk, dv, dc = (
            x if alone else x.unflatten(1, (self.key_heads, self.group)).sum(2).to(y.dtype)
            for x, y in ((dk, self.k), (dv, self.v), (dc, self.c))
        )
        return dq, dk, dv, da, dc.flatten()[:0] if self.same else dc, d_gate.sum((0, 2))


@torch.library.custom_op("longspan::hybrid_kernel_forward", mutates_args=())
def hybrid_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_q: Tensor | None,
    tail_k: Tensor | None,
    key_mask: Tensor | None,
    gate: Tensor,
    feature_map: str,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal hybrid attention: (out [B, H, L, E], log mass [B, H, L]).

    Args:
        q: [B, H, L, D].   k: [B, K, M, D].   v: [B, K, M, E].   key_mask: [B, M].
        tail_q, tail_k: what phi acts on, [B, H, L, G] and [B, K, M, G]; None: q and k.
        gate: [H] log weight of the tail.   feature_map: one of `MAPS` but taylor, and without a floor.
    """
    if 0 in (*q.shape, k.shape[2], v.shape[3]):
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
        return out, torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    with on(q.device):
        return _Call(q, k, v, tail_q, tail_k, key_mask, gate, feature_map, window, scale).forward()


@torch.library.custom_op("longspan::hybrid_kernel_backward", mutates_args=())
def hybrid_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_q: Tensor | None,
    tail_k: Tensor | None,
    key_mask: Tensor | None,
    gate: Tensor,
    out: Tensor,
    mass: Tensor,
    feature_map: str,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d tail q, d tail k, d gate), the fourth and fifth [0] where there is no tail of their own."""
    if 0 in (*q.shape, k.shape[2], v.shape[3]):
        tails = (q.new_zeros(0), k.new_zeros(0)) if tail_q is None or tail_k is None else (tail_q, tail_k)
        dq, dk, dv, da, dc, d_gate = (torch.zeros_like(x) for x in (q, k, v, *tails, gate))
        return dq, dk, dv, da, dc, d_gate
    with on(q.device):
        call = _Call(q, k, v, tail_q, tail_k, key_mask, gate, feature_map, window, scale)
        *grads, d_gate = call.backward(d_out, d_mass, out, mass)
        dq, dk, dv, da, dc = grads
        return dq, dk, dv, da, dc, d_gate.to(gate.dtype)


@hybrid_forward.register_fake
def _(q, k, v, tail_q, tail_k, key_mask, gate, feature_map, window, scale):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@hybrid_backward.register_fake
def _(d_out, d_mass, q, k, v, tail_q, tail_k, key_mask, gate, out, mass, feature_map, window, scale):
    tails = (q.new_empty(0), k.new_empty(0)) if tail_q is None else (tail_q, tail_k)
    return tuple(x.new_empty(x.shape) for x in (q, k, v, *tails, gate))


def _setup(ctx, inputs, output):
    *tensors, name, window, scale = inputs
    ctx.options = name, window, scale
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, d_out, d_mass):
    dq, dk, dv, da, dc, d_gate = hybrid_backward(d_out, d_mass, *ctx.saved_tensors, *ctx.options)
    if ctx.saved_tensors[3] is None:
        da = dc = None
    return dq, dk, dv, da, dc, None, d_gate, None, None, None


hybrid_forward.register_autograd(_backward, setup_context=_setup)
