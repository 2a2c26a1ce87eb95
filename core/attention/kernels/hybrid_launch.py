# pyright: reportCallIssue=false, reportArgumentType=false
# A kernel is launched by Triton, whose call a type checker cannot see through.
"""The launches of one call of the hybrid, and their block sizes; `hybrid` says what they compute."""

import torch
from torch import Tensor

from core.attention.feature_maps import FEATURE_MAPS
from core.attention.kernels import INTERPRETED
from core.attention.kernels.hybrid_blocks import forward, write
from core.attention.kernels.hybrid_gradients import key_gradient, query_gradient
from core.attention.kernels.launch import Blocks, choose, padded, products, rows_contiguous
from core.attention.kernels.packs import Layout, layout
from core.attention.kernels.prefix import prefix
from core.attention.kernels.window import delta_of
from core.attention.packing import Pack

BLOCKS = {
    None: Blocks(16, 16, 4, 1),
    "interpreter": Blocks(16, 16, 4, 1),
    ("hopper", 64, 2): Blocks(64, 64, 4, 2),
    ("hopper", 128, 2): Blocks(64, 64, 8, 2),
    ("hopper", "taylor", 2): Blocks(64, 64, 8, 2),
    ("ampere", 64, 2): Blocks(64, 64, 4, 2),
    ("ampere", 128, 2): Blocks(64, 32, 8, 1),
}
"""Rows of a program, keys it meets at once, warps and stages by (class of device, widest padded width or "taylor",
bytes per element). Chosen by the registers and shared memory that ptxas reports (docs/kernels.md); not yet timed on a
GPU."""

ROWS = {
    None: Blocks(16, 16, 4, 1),
    "interpreter": Blocks(16, 16, 4, 1),
    ("hopper", 64, 2): Blocks(64, 64, 8, 2),
    ("hopper", 128, 2): Blocks(64, 32, 8, 2),
    ("hopper", "taylor", 2): Blocks(64, 32, 8, 2),
    ("ampere", 64, 2): Blocks(64, 32, 8, 1),
    ("ampere", 128, 2): Blocks(32, 32, 8, 1),
}
"""The same for the gradient at the queries."""

KEYS = {
    None: Blocks(16, 16, 4, 1),
    "interpreter": Blocks(16, 16, 4, 1),
    ("hopper", 64, 2): Blocks(64, 32, 8, 2),
    ("hopper", 128, 2): Blocks(32, 32, 8, 2),
    ("hopper", "taylor", 2): Blocks(64, 32, 8, 2),
    ("ampere", 64, 2): Blocks(32, 32, 8, 1),
    ("ampere", 128, 2): Blocks(32, 16, 8, 1),
}
"""For the gradient at the keys: keys of a program, rows it meets at once, and so on."""


def segment(features: int, values: int) -> int:
    """Positions per segment: a wide state costs more to move, so more keys are met one by one instead."""
    if INTERPRETED:
        return 32
    return 256 if features * values <= 64 * 64 else 512


class Call:
    """Arguments that the launches of one call share."""

    def __init__(
        self,
        q,
        k,
        v,
        tails,
        turned,
        key_mask,
        gate,
        name: str,
        window: int,
        causal: bool,
        scale: float,
        pack: Pack | None = None,
    ):
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
        widest = max(64, widths[0], widths[2], operand)
        key = q.device, "taylor" if name == "taylor" else widest, q.element_size()
        self.blocks, self.row_blocks, self.key_blocks = (choose(table, *key) for table in (BLOCKS, ROWS, KEYS))
        self.size = segment(self.features, self.values)
        self.pack, self.window, self.laid = pack, window, {}
        self.key_segments = self.cut("past" if causal and pack is not None else "held", self.size)
        self.row_segments = self.cut("rows", self.size)
        longest = None if pack is None else pack.longest
        self.single = self.held_of(longest) <= self.size, (self.rows if longest is None else longest) <= self.size
        self.column = min(32 if name == "taylor" else 64, widths[1], widths[2])  # of a state at once
        self.summed = {"G": width, "F": self.features, "E": self.values, "MAP": name, "TURN": turn, **products(q, k, v)}
        self.whole = {
            **self.summed, "D": q.shape[3], "DP": widths[0], "XP": operand, "FP": widths[1], "EP": widths[2],
            "BT": self.column, "CAUSAL": causal, "MASK": key_mask is not None,
            "NEAR": products(q, k, v, bounded=True)["DOT"], "PACK": pack is not None,
        }  # fmt: skip
        self.tensors = self.q, self.k, self.v, self.a, self.c, self.x, self.y
        self.mask_stride = 0 if key_mask is None else self.keys
        self.strides = *(n for x in self.tensors for n in x.stride()[:3]), *gate.stride(), self.mask_stride
        sizes = self.heads, self.group, self.rows, self.keys, window, scale, self.held
        self.sizes = *sizes, self.size, self.key_segments.number, self.row_segments.number

    def held_of(self, keys: int | None) -> int:
        """How many of so many keys, or of all, the tail may hold."""
        keys = self.keys if keys is None else keys
        return 0 if keys <= self.window else keys - self.window if self.causal else keys

    def cut(self, over: str, size: int) -> Layout:
        """The pieces of rows, of keys, or of the keys that the tail may hold; without a pack they need no table."""
        number = {"rows": self.rows, "keys": self.keys}.get(over, self.held)
        if self.pack is None:
            return Layout(self.q, self.q, max(1, -(-number // size)), size)
        over = "keys" if over == "held" else over
        if (over, size) not in self.laid:
            longest = self.held_of(self.pack.longest) if over == "past" else self.pack.longest
            shift = -self.window if over == "past" else 0
            self.laid[over, size] = layout(self.pack, over, self.keys, longest, size, shift)
        return self.laid[over, size]

    def by_rows(self, blocks: Blocks) -> tuple[tuple[int], Layout, dict]:
        """(grid, pieces, options) of a kernel with a block of rows per program."""
        cut = self.cut("rows", blocks.chunk)
        return (cut.number * self.batch * self.heads,), cut, self._options(blocks, "BM", "BN")

    def by_keys(self, blocks: Blocks) -> tuple[tuple[int], Layout, dict]:
        """(grid, pieces, options) of a kernel with a block of keys per program."""
        cut = self.cut("keys", blocks.chunk)
        return (cut.number * self.batch * self.key_heads,), cut, self._options(blocks, "BN", "BM")

    def _options(self, blocks: Blocks, own: str, met: str) -> dict:
        warps = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        return {**self.whole, own: blocks.chunk, met: blocks.values, **warps}

    def empty(self, *shape: int) -> Tensor:
        """A float32 buffer."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def sums(self, rows: tuple | None = None) -> Tensor:
        """What each segment of keys adds to the state; rows (d_out, mass, delta): of rows, to its gradient."""
        a, x, v, heads, number, cut = self.c, self.y, self.v, self.key_heads, self.held, self.key_segments
        mass = delta = self.q
        if rows is not None:
            (v, mass, delta), a, x = rows, self.a, self.x
            heads, number, cut = self.heads, self.rows, self.row_segments
        number, parts = number if self.pack is None else self.rows, cut.number
        made = self.empty(self.batch, heads, parts, self.features * (self.values + 1))
        # Many features take the columns of a state 32 at a time, and 32 positions; others all columns at once.
        many, narrow = self.whole["FP"] > 128, self.q.element_size() > 2
        column = self.column if many or narrow else min(128, self.whole["EP"])
        tiles = -(-self.values // column)
        write[(tiles * parts * self.batch * heads,)](
            a, x, v, self.mask, self.gate, mass, delta, cut.table, made,
            *a.stride()[:3], *x.stride()[:3], *v.stride()[:3], *self.gate.stride(),
            self.mask_stride, heads, number, parts, self.size, tiles, FP=self.whole["FP"],
            BT=column, BN=min(32, self.blocks.values) if many else self.blocks.values, MASK=self.whole["MASK"],
            ROWS=rows is not None, PACK=self.pack is not None, **self.summed,
            num_warps=8 if many else self.blocks.warps, num_stages=self.blocks.stages,
        )  # fmt: skip
        return made

    def borders(self, sums, first: Tensor | None, cut: Layout, reverse: bool, keep: bool) -> tuple[Tensor, Tensor]:
        """(state before each segment, or after it where reverse; state past all of them), over `sums` unless kept."""
        states, size = torch.empty_like(sums) if keep else sums, sums.shape[3]
        sequences = sums.shape[0] if self.pack is None else self.pack.offsets.shape[0] - 1
        end, blocks = self.empty(sequences, sums.shape[1], size), -(-size // 512)
        prefix[(blocks * sequences * sums.shape[1],)](
            sums, sums, sums if first is None else first, end, states, cut.slots, cut.number, blocks, sums.shape[1],
            N=size, BLOCK=512, FIRST=first is not None, DECAY=False, REVERSE=reverse, PACK=self.pack is not None,
        )  # fmt: skip
        return states, end

    def states(self, first: Tensor | None, keep: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(state before each segment of keys, after each of them, after all); None: there is nothing to hold."""
        if self.single[0] and first is None and not keep:
            return None, None, None
        sums, cut = self.sums(), self.key_segments
        future = None if self.causal else self.borders(sums, None, cut, True, keep=True)[0]
        past, end = self.borders(sums, first, cut, False, keep=False)
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
        grid, cut, options = self.by_rows(self.blocks)
        forward[grid](
            *self.tensors, self.mask, self.gate, cut.table, self.key_segments.slots,
            mass if past is None else past, mass if future is None else future, out, mass,
            *self.strides, *self.sizes, cut.number, STATE=past is not None, **options,
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
        grid, cut, options = self.by_rows(self.row_blocks)
        query_gradient[grid](
            *shared, cut.table, self.key_segments.slots,
            mass if past is None else past, mass if future is None else future, dq, da, dx, d_gate,
            *strides, *self.sizes, cut.number, STATE=past is not None, SAME=self.same, **options,
        )  # fmt: skip
        del past, future
        after = before = d_state = None
        if state is not None or d_end is not None or (not self.single[1] and self.held):
            last = None
            if d_end is not None:  # to the first head of each group; the sum over all heads is what counts
                last = self.empty(self.batch, self.key_heads, self.group, self.features * (self.values + 1)).zero_()
                last[:, :, 0] = self.flat(d_end)
                last = last.flatten(1, 2)
            sums, cut = self.sums((d_out, mass, delta)), self.row_segments
            before = None if self.causal else self.borders(sums, None, cut, False, keep=True)[0]
            after, first = self.borders(sums, last, cut, True, keep=False)
            d_state = self.square(first.unflatten(1, (self.key_heads, self.group)).sum(2))
        grid, cut, options = self.by_keys(self.key_blocks)
        key_gradient[grid](
            *shared, cut.table, self.row_segments.slots,
            mass if after is None else after, mass if before is None else before, dk, dv, dc, dy,
            *strides, *self.sizes, cut.number, STATE=after is not None, SAME=self.same, **options,
        )  # fmt: skip
        return dq, dk, dv, da, dc, dx, dy, d_gate, self.empty(0) if state is None else d_state
