# pyright: reportCallIssue=false, reportArgumentType=false
# A kernel is launched by Triton, whose call a type checker cannot see through.
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
from torch import Tensor

from core.attention.kernels.features import MAPS
from core.attention.kernels.hybrid_sweeps import forward, key_gradient, query_gradient
from core.attention.kernels.launch import Blocks, choose, on, padded, products, rows_contiguous, segments
from core.attention.kernels.linear import Sweep
from core.attention.kernels.window import delta_of

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
        forward[(parts * self.batch * self.heads,)](
            self.q, self.k, self.v, self.a, self.c, self.mask, self.gate, mass if states is None else states, out, mass,
            *self.strides, self.mask_stride, *self.sizes, self.row_time, parts, size, STATE=states is not None,
            **self.options,
        )  # fmt: skip
        return out, mass

    def backward(self, d_out: Tensor, d_mass: Tensor | None, out: Tensor, mass: Tensor) -> tuple[Tensor, ...]:
        """(dq, dk, dv, d tail q, d tail k, d gate); without a tail of their own the fourth and fifth hold nothing."""
        d_out = rows_contiguous(d_out)
        delta = delta_of(d_out, out, d_mass)
        # The factor of phi.phi in a weight, capped near the end of float32, where phi.phi is below e^-80 itself.
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
        query_gradient[(parts * self.batch * self.heads,)](
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
        key_gradient[(parts * self.batch * self.heads,)](
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
    saved = ctx.saved_tensors  # read once: gradient checkpointing hands out each tensor a single time
    dq, dk, dv, da, dc, d_gate = hybrid_backward(d_out, d_mass, *saved, *ctx.options)
    if saved[3] is None:
        da = dc = None
    return dq, dk, dv, da, dc, None, d_gate, None, None, None


hybrid_forward.register_autograd(_backward, setup_context=_setup)
