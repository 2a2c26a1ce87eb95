# pyright: reportCallIssue=false, reportArgumentType=false
# A kernel is launched by Triton, whose call a type checker cannot see through.
"""Hybrid attention in one kernel: softmax over the window, a linear tail beyond it, one normaliser; either direction.

    o_i = (sum_{j near} e^{s_ij} v_j + gamma_i phi(q_i)^T S_i) / e^{l_i}
    e^{l_i} = sum_{j near} e^{s_ij} + gamma_i phi(q_i)^T z_i
    S_i = sum_j phi(k_j) v_j^T and z_i = sum_j phi(k_j) over j <= t_i - W and, two-sided, j >= t_i + W;  t_i = i + M - L

Keys are cut into segments. `write` sums each of them, a prefix in fixed order turns the sums into the states at their
borders, from both ends where two-sided. Then every block of rows is a program of its own: it reads the state of the
whole segments behind it (and ahead of it), meets the tail's keys up to its window one by one, then the window's, with
a running maximum that the tail starts, and divides once. Sums of both ends are disjoint, never a total less a window.

Rotary positions turn the features in the numerator only: it then takes rotated features that were computed before (x of
queries, y of keys), the normaliser plain ones. Maps that are functions of q.k are rotated before, as the window is.

Backward from l: the gradient at a near score, before the division, is e^{s_ij - l_i} (do.v_j - delta_i), that at
phi(q_i).phi(k_j) is gamma_i e^{-l_i} (do.v_j - delta_i), delta = <do, o> - dl. Rows are cut into segments as well: the
gradient at a state is a sum over the rows that read it. One kernel by rows gives dq and the gate's gradient, one by
keys dk and dv over the heads of a group in order. Neither part's output or mass is ever written. No atomics.

Bytes per position and head, e per element, R positions per segment: forward e (3 D + 3 E) and 16 F (E + 1) / R of
states (24 two-sided); backward e (8 D + 9 E) and twice the states' bytes, blocks next to each other sharing theirs in
the L2 cache. FLOPs forward 2 (W + BM + R / 2) (D + E) + 4 F E. The two kernels of `merge` write both parts' outputs and
read them again, 3 e E more forward, but hold the state on chip.

Serves, when asked for and `prefers` says so: float32, float16 and bfloat16; `launch.products` states the precision.
"""

import torch
from torch import Tensor

from core.attention.blocked.pairs import join
from core.attention.feature_maps import FEATURE_MAPS, FeatureMap
from core.attention.kernels import INTERPRETED
from core.attention.kernels.features import MAPS
from core.attention.kernels.hybrid_blocks import forward, write
from core.attention.kernels.hybrid_gradients import key_gradient, query_gradient
from core.attention.kernels.launch import Blocks, choose, on, padded, products, rows_contiguous
from core.attention.kernels.prefix import prefix
from core.attention.kernels.window import delta_of

BLOCKS = {
    None: Blocks(16, 16, 4, 1),
    "interpreter": Blocks(16, 16, 4, 1),
    ("hopper", 64, 2): Blocks(64, 64, 4, 2),
    ("hopper", 128, 2): Blocks(64, 64, 8, 2),
    ("hopper", 256, 2): Blocks(32, 32, 8, 1),
    ("ampere", 64, 2): Blocks(64, 64, 4, 2),
    ("ampere", 128, 2): Blocks(64, 32, 8, 1),
}
"""Rows of a program, keys it meets at once, warps and stages by (class of device, widest padded width, bytes per
element). Chosen by the registers and shared memory that ptxas reports (docs/kernels.md); not yet timed on a GPU."""

GRADIENTS = {
    None: Blocks(16, 16, 4, 1),
    "interpreter": Blocks(16, 16, 4, 1),
    ("hopper", 64, 2): Blocks(64, 64, 8, 2),
    ("hopper", 128, 2): Blocks(64, 64, 8, 1),
    ("hopper", 256, 2): Blocks(32, 32, 8, 1),
    ("ampere", 64, 2): Blocks(64, 64, 8, 1),
    ("ampere", 128, 2): Blocks(32, 32, 8, 1),
}
"""The same for the backward: rows, or keys, of a program, and what it meets of the other at once."""


def segment(features: int, values: int) -> int:
    """Positions per segment: a wide state costs more to move, so more keys are met one by one instead."""
    if INTERPRETED:
        return 32
    return 256 if features * values <= 64 * 64 else 512


def prefers(phi, widest: int, element_bytes: int, *, decays: bool) -> bool:
    """Whether one kernel runs rather than two and a merge. By bytes and registers; not timed (2026-11-25).

    One kernel moves fewer bytes than two in every shape, so two run only where one cannot: with ALiBi (`decays`), whose
    states would be per query head; for maps with a floor, whose tail is a mean of its own; and where a block of rows
    and the accumulators of its gradients do not fit into the registers.

    Args:
        phi: what the sums see of the tail's map.   widest: the largest of D, F and E.   element_bytes: of q, k and v.
    """
    known = isinstance(phi, FeatureMap) and phi.name in MAPS and phi.positive and phi.floor == 0
    return known and not decays and widest <= (256 if element_bytes == 2 else 128)


class _Call:
    """Arguments that the launches of one call share."""

    def __init__(self, q, k, v, tails, turned, key_mask, gate, name: str, window: int, causal: bool, scale: float):
        self.same, turn = tails[0] is None, turned[0] is not None
        tails = (q, k) if self.same else tails
        tensors = (q, k, v, *tails, *(turned if turn else tails))
        self.q, self.k, self.v, self.a, self.c, self.x, self.y = (rows_contiguous(x) for x in tensors)
        self.gate = gate
        self.mask = q if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.batch, self.heads, self.rows = q.shape[:3]
        self.key_heads, self.keys, self.causal = k.shape[1], k.shape[2], causal
        self.group, window = self.heads // self.key_heads, min(window, max(self.rows, self.keys))
        self.held = 0 if self.keys <= window else self.keys - window if causal else self.keys
        width, (self.features, self.values) = (
            tails[0].shape[3],
            (FEATURE_MAPS[name].width(tails[0].shape[3]), v.shape[3]),
        )
        widths = padded(q.shape[3]), padded(self.features), padded(self.values)
        operand = padded(width) if name == "taylor" else widths[1]
        key = q.device, max(64, widths[0], widths[2], operand), q.element_size()
        self.blocks, self.back = choose(BLOCKS, *key), choose(GRADIENTS, *key)
        self.size = segment(self.features, self.values)
        self.parts, self.row_parts = (max(1, -(-n // self.size)) for n in (self.held, self.rows))
        self.column = min(64, widths[1], widths[2])  # of a state at once
        self.summed = {"G": width, "F": self.features, "E": self.values, "MAP": name, "TURN": turn, **products(q, k, v)}
        self.whole = {
            **self.summed, "D": q.shape[3], "DP": widths[0], "XP": operand, "FP": widths[1], "EP": widths[2],
            "BT": self.column, "CAUSAL": causal, "MASK": key_mask is not None,
            "NEAR": products(q, k, v, bounded=True)["DOT"],
        }  # fmt: skip
        self.tensors = self.q, self.k, self.v, self.a, self.c, self.x, self.y
        self.mask_stride = 0 if key_mask is None else self.keys
        self.strides = *(n for x in self.tensors for n in x.stride()[:3]), *gate.stride(), self.mask_stride
        sizes = self.heads, self.group, self.rows, self.keys, window, scale, self.held
        self.sizes = *sizes, self.size, self.parts, self.row_parts

    def by_rows(self, blocks: Blocks) -> tuple[tuple[int], dict]:
        """(grid, options) of a kernel with a block of rows per program."""
        return (-(-self.rows // blocks.chunk) * self.batch * self.heads,), self._options(blocks, "BM", "BN")

    def by_keys(self, blocks: Blocks) -> tuple[tuple[int], dict]:
        """(grid, options) of a kernel with a block of keys per program."""
        return (-(-self.keys // blocks.chunk) * self.batch * self.key_heads,), self._options(blocks, "BN", "BM")

    def _options(self, blocks: Blocks, own: str, met: str) -> dict:
        warps = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        return {**self.whole, own: blocks.chunk, met: blocks.values, **warps}

    def empty(self, *shape: int) -> Tensor:
        """A float32 buffer."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def sums(self, rows: tuple | None = None) -> Tensor:
        """What each segment of keys adds to the state; rows (d_out, mass, delta): of rows, to its gradient."""
        a, x, v, heads, number, parts = self.c, self.y, self.v, self.key_heads, self.held, self.parts
        mass = delta = self.q
        if rows is not None:
            (v, mass, delta), a, x = rows, self.a, self.x
            heads, number, parts = self.heads, self.rows, self.row_parts
        made = self.empty(self.batch, heads, parts, self.features * (self.values + 1))
        wide = self.whole["FP"] * self.whole["EP"] > 128 * 128 or self.q.element_size() > 2
        column = self.column if wide else self.whole["EP"]
        tiles = -(-self.values // column)
        write[(tiles * parts * self.batch * heads,)](
            a, x, v, self.mask, self.gate, mass, delta, made, *a.stride()[:3], *x.stride()[:3], *v.stride()[:3],
            *self.gate.stride(), self.mask_stride, heads, number, parts, self.size, tiles, FP=self.whole["FP"],
            BT=column, BN=self.blocks.values, MASK=self.whole["MASK"], ROWS=rows is not None, **self.summed,
            num_warps=self.blocks.warps, num_stages=self.blocks.stages,
        )  # fmt: skip
        return made

    def borders(self, sums: Tensor, first: Tensor | None, reverse: bool, keep: bool) -> tuple[Tensor, Tensor]:
        """(state before each segment, or after it where reverse; state past all of them), over `sums` unless kept."""
        states, size = torch.empty_like(sums) if keep else sums, sums.shape[3]
        end, blocks = self.empty(*sums.shape[:2], size), -(-size // 512)
        prefix[(blocks * sums.shape[0] * sums.shape[1],)](
            sums, sums, sums if first is None else first, end, states, sums.shape[2], blocks,
            N=size, BLOCK=512, FIRST=first is not None, DECAY=False, REVERSE=reverse,
        )  # fmt: skip
        return states, end

    def states(self, first: Tensor | None, keep: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(state before each segment of keys, after each of them, after all); None: there is nothing to hold."""
        if self.parts == 1 and first is None and not keep:
            return None, None, None
        sums = self.sums()
        future = None if self.causal else self.borders(sums, None, True, keep=True)[0]
        past, end = self.borders(sums, first, False, keep=False)
        return past, future, end

    def flat(self, state: Tensor | None) -> Tensor | None:
        """[B, K, F, E + 1] in the order that the kernels hold a state in."""
        return None if state is None else torch.cat((state[..., :-1].flatten(2), state[..., -1]), -1).float()

    def square(self, flat: Tensor) -> Tensor:
        """The opposite of `flat`."""
        s, z = flat.split((self.features * self.values, self.features), -1)
        return torch.cat((s.unflatten(-1, (self.features, self.values)), z.unsqueeze(-1)), -1)

    def forward(self, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(out [B, H, L, E], log mass [B, H, L], the state after all keys that left the window, or nothing)."""
        out = torch.empty(self.batch, self.heads, self.rows, self.values, dtype=self.v.dtype, device=self.q.device)
        mass = self.empty(*out.shape[:3])
        past, future, end = self.states(self.flat(state), keep)
        grid, options = self.by_rows(self.blocks)
        forward[grid](
            *self.tensors, self.mask, self.gate, mass if past is None else past, mass if future is None else future,
            out, mass, *self.strides, *self.sizes, STATE=past is not None, **options,
        )  # fmt: skip
        return out, mass, self.square(end) if keep and end is not None else mass.new_empty(0)

    def backward(self, d_out: Tensor, d_mass, d_end, out: Tensor, mass: Tensor, state: Tensor | None):
        """(dq, dk, dv, d tail q, d tail k, d x, d y, d gate, d state); what there is no input for holds nothing."""
        d_out = rows_contiguous(d_out)
        delta = delta_of(d_out, out, d_mass)
        past, future, _ = self.states(self.flat(state), False)
        turn = self.whole["TURN"]

        def like(x: Tensor, wanted: bool = True) -> Tensor:
            return torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)

        dq, dk, dv, da, dc = *map(like, (self.q, self.k, self.v)), *(like(x, not self.same) for x in (self.a, self.c))
        dx, dy, d_gate = like(self.x, turn), like(self.y, turn), self.empty(*mass.shape)
        shared = *self.tensors, d_out, mass, delta, self.mask, self.gate
        strides = *self.strides, *d_out.stride()[:3]
        grid, options = self.by_rows(self.back)
        query_gradient[grid](
            *shared, mass if past is None else past, mass if future is None else future, dq, da, dx, d_gate,
            *strides, *self.sizes, STATE=past is not None, SAME=self.same, **options,
        )  # fmt: skip
        del past, future
        after = before = d_state = None
        if state is not None or d_end is not None or (self.row_parts > 1 and self.held):
            last = None
            if d_end is not None:  # to the first head of each group; the sum over all heads is what counts
                last = self.empty(self.batch, self.key_heads, self.group, self.features * (self.values + 1)).zero_()
                last[:, :, 0] = self.flat(d_end)
                last = last.flatten(1, 2)
            sums = self.sums((d_out, mass, delta))
            before = None if self.causal else self.borders(sums, None, False, keep=True)[0]
            after, first = self.borders(sums, last, True, keep=False)
            d_state = self.square(first.unflatten(1, (self.key_heads, self.group)).sum(2))
        grid, options = self.by_keys(self.back)
        key_gradient[grid](
            *shared, mass if after is None else after, mass if before is None else before, dk, dv, dc, dy,
            *strides, *self.sizes, STATE=after is not None, SAME=self.same, **options,
        )  # fmt: skip
        return dq, dk, dv, da, dc, dx, dy, d_gate, self.empty(0) if state is None else d_state


def _empty(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return 0 in (*q.shape, k.shape[2], v.shape[3])


@torch.library.custom_op("longspan::hybrid_kernel_forward", mutates_args=())
def hybrid_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_q: Tensor | None,
    tail_k: Tensor | None,
    turned_q: Tensor | None,
    turned_k: Tensor | None,
    key_mask: Tensor | None,
    gate: Tensor,
    state: Tensor | None,
    feature_map: str,
    window: int,
    causal: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hybrid attention: (out [B, H, L, E], log mass [B, H, L], last state [B, K, F, E + 1] or [0]).

    Args:
        q: [B, H, L, D].   k: [B, K, M, D].   v: [B, K, M, E].   key_mask: [B, M].
        tail_q, tail_k: what phi acts on, [B, H, L, G] and [B, K, M, G]; None: q and k.
        turned_q, turned_k: rotated features for the tail's numerator, [B, H, L, F] and [B, K, M, F]; None: phi itself.
        gate: [B, H, L] log weight of the tail.   feature_map: one of `MAPS` that is positive and has no floor.
        state: [B, K, F, E + 1] sums over keys before these, all of them beyond the window of every query (causal).
        causal: two-sided needs L = M.   keep: also give the sums of all keys but the last `window` (causal).
    """
    if _empty(q, k, v):
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
        mass = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        wide = FEATURE_MAPS[feature_map].width((k if tail_k is None else tail_k).shape[3])
        end = mass.new_zeros(*k.shape[:2], wide, v.shape[3] + 1) if keep else mass.new_zeros(0)
        return out, mass, end if state is None or not keep else state.float().clone()
    tails, turned = (tail_q, tail_k), (turned_q, turned_k)
    with on(q.device):
        return _Call(q, k, v, tails, turned, key_mask, gate, feature_map, window, causal, scale).forward(state, keep)


@torch.library.custom_op("longspan::hybrid_kernel_backward", mutates_args=())
def hybrid_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    d_end: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail_q: Tensor | None,
    tail_k: Tensor | None,
    turned_q: Tensor | None,
    turned_k: Tensor | None,
    key_mask: Tensor | None,
    gate: Tensor,
    state: Tensor | None,
    out: Tensor,
    mass: Tensor,
    feature_map: str,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, both tails, both turned features, gate and state, [0] for what is None."""
    tails, turned = (tail_q, tail_k), (turned_q, turned_k)
    if _empty(q, k, v):
        given = q, k, v, *tails, *turned, gate
        zeros = [q.new_zeros(0) if x is None else torch.zeros_like(x) for x in given]
        last = None if state is None else torch.zeros_like(state) if d_end is None else d_end.to(state.dtype).clone()
        return *zeros, q.new_zeros(0) if last is None else last  # pyright: ignore[reportReturnType]
    with on(q.device):
        call = _Call(q, k, v, tails, turned, key_mask, gate, feature_map, window, causal, scale)
        return call.backward(d_out, d_mass, d_end, out, mass, state)  # pyright: ignore[reportReturnType]


def _shapes(
    q, k, v, tail_q, tail_k, turned_q, turned_k, key_mask, gate, state, feature_map, window, causal, scale, keep
):
    wide = FEATURE_MAPS[feature_map].width((k if tail_k is None else tail_k).shape[3])
    mass = q.new_empty(q.shape[:3], dtype=torch.float32)
    end = mass.new_empty(*k.shape[:2], wide, v.shape[3] + 1) if keep else mass.new_empty(0)
    return v.new_empty(*q.shape[:3], v.shape[3]), mass, end


def _gradient_shapes(d_out, d_mass, d_end, q, k, v, tail_q, tail_k, turned_q, turned_k, key_mask, gate, state, *_):
    given = q, k, v, tail_q, tail_k, turned_q, turned_k, gate, state
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _setup(ctx, inputs, output):
    *tensors, name, window, causal, scale, keep = inputs
    out, mass, end = output
    ctx.options, ctx.keep = (name, window, causal, scale), keep
    if not keep:
        ctx.mark_non_differentiable(end)
    ctx.save_for_backward(*tensors, out, mass)


def _backward(ctx, d_out, d_mass, d_end):
    saved = ctx.saved_tensors  # read once: gradient checkpointing hands out each tensor a single time
    found = hybrid_backward(d_out, d_mass, d_end if ctx.keep else None, *saved, *ctx.options)
    *grads, d_gate, d_state = (x if given is not None else None for x, given in zip(found, (*saved[:7], *saved[8:10])))
    return *grads, None, d_gate, d_state, None, None, None, None, None


join(hybrid_forward, hybrid_backward, _shapes, _gradient_shapes, _setup, _backward)
