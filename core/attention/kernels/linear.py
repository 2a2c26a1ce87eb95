# pyright: reportCallIssue=false, reportArgumentType=false
# A kernel is launched by Triton, whose call a type checker cannot see through.
"""Linear attention with its log mass on a GPU: `core.attention.blocked.linear`, fused, with decay that may vary.

    S_u = e^{g_u} S_{u-1} + phi(k_u) [v_u, 1]^T,    [num_u, den_u] = phi(q_u)^T S_u,    o_u = num_u / den_u

Positions are put on a timeline u = 0..T-1 on which key j = key0 + step u meets row i = row0 + step u, so that "past"
(step 1) and "future" (step -1), with any offset, are one causal sweep; "both" sums first and reads then. One program
has one query head, one segment of the timeline and a tile of value columns, and keeps S [F, values] and z [F] on chip
in float32. phi is computed while loading; weights inside a chunk never leave the chip.

Segments: a sum over each (`write`), a prefix over those sums in fixed order (`prefix`), then all segments at once.
One segment, without these passes, where batch x heads fills the device by itself. Always deterministic, no atomics.

Bytes moved, e per element, n = value tiles (1 up to the table's width): forward e L (2 n D + 2 E), and e L (D + E) more
with several segments; backward e L (5 D + 5 E), the same more, and 4 n L D more for n > 1 or grouped heads, whose key
gradients are summed in a fixed order outside. S is summed again in the backward instead of kept.

Serves, when asked for: float32, float16 and bfloat16 up to 256 features; `launch.products` states the precision.
"""

import torch
from torch import Tensor

from core.attention.blocked.linear import least_denominator
from core.attention.blocked.pairs import join_sums
from core.attention.feature_maps import feature_map as phi_named
from core.attention.kernels.features import MAPS, row_gradients
from core.attention.kernels.launch import Blocks, choose, on, padded, products, rows_contiguous, segments
from core.attention.kernels.linear_sweeps import forward, key_gradient, query_gradient, write
from core.attention.kernels.prefix import prefix

BLOCKS = {
    None: Blocks(16, 32, 8, 1),
    ("hopper", 16, 2): Blocks(64, 64, 4, 2),
    ("hopper", 32, 2): Blocks(64, 64, 4, 2),
    ("hopper", 64, 2): Blocks(64, 64, 4, 2),
    ("hopper", 128, 2): Blocks(64, 128, 8, 2),
    ("hopper", 256, 2): Blocks(32, 32, 8, 2),
    "interpreter": Blocks(16, 16, 4, 1),
}
"""Keyed by (class of device, padded features, bytes per element). Chosen by the registers and shared memory that ptxas
reports for sm_90a (2026-11-21); not yet timed on a GPU."""


class Sweep:
    """The launches of one call: what all of them share, and the timeline."""

    def __init__(self, q, k, v, key_mask, rate, gate, name: str, direction: str, offset: int, normalize, ones):
        self.q, self.k, self.v = (rows_contiguous(x) for x in (q, k, v))
        self.batch, self.heads, self.queries, width = q.shape
        self.key_heads, self.keys, self.values = k.shape[1], k.shape[2], v.shape[3]
        self.group, self.device, self.causal = self.heads // self.key_heads, q.device, direction != "both"
        if name not in MAPS:
            raise ValueError(f"no kernel for the feature map {name!r}; it is for {', '.join(MAPS)}")
        if rate is not None and (not self.causal or self.group > 1):
            raise ValueError("a decay per query head needs a direction and as many key heads as query heads")
        self.features = phi_named(name).width(width)
        self.columns = self.values + (1 if ones else 0)
        self.mask = q if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.mask_stride = 0 if key_mask is None else self.mask.stride(0)
        self.rate = q if rate is None else rate.float().contiguous()
        self.gate = q if gate is None else gate.float().contiguous()
        self.floored = normalize and phi_named(name).floor > 0
        if direction == "past":
            self.row0, self.key0, self.step, self.time = -offset, 0, 1, self.queries + offset
        elif direction == "future":
            self.row0, self.key0, self.step, self.time = self.keys - 1 - offset, self.keys - 1, -1, self.keys - offset
        else:
            self.row0, self.key0, self.step, self.time = 0, 0, 1, self.keys
        self.time = max(0, self.time)
        self.complete = not self.causal or (offset >= 0 if direction == "past" else self.time >= self.queries)
        padded_features = padded(self.features)
        blocks = choose(BLOCKS, self.device, padded_features, q.element_size())
        self.chunk, tile = blocks.chunk, min(blocks.values, padded(self.values))
        self.tiles = max(1, -(-self.values // tile))
        self.shape = {"D": width, "F": self.features, "E": self.values, "FP": padded_features, "BE": tile}
        self.wide = {**self.shape, "DP": padded(width) if name == "taylor" else padded_features}
        self.kind = {
            "C": self.chunk,
            "MAP": name,
            "DECAY": "constant" if rate is not None else "none" if gate is None else "given",
            "ONES": ones,
            "MASK": key_mask is not None,
            "NORMALIZE": normalize,
            **products(q, k, v),
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }

    def parts(self, length: int, heads: int) -> tuple[int, int]:
        """(number of segments, steps in each)."""
        return segments(length, self.chunk, self.batch * heads * self.tiles, self.device)

    def empty(self, *shape: int) -> Tensor:
        """A float32 buffer."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def floor(self, key_mask, count, name: str, direction: str, offset: int) -> Tensor:
        """Least denominator per row, which only maps that can vanish have."""
        if not self.floored:
            return self.q
        return least_denominator(self.q, self.k, key_mask, count, name, direction, offset)[:, 0].contiguous()

    def before(self, state: Tensor | None, parts: int, size: int) -> tuple[Tensor, Tensor]:
        """(state before each segment of keys, state after all)."""
        sums, totals = self.empty(self.batch, self.key_heads, parts, self.features, self.columns), self._totals(parts)
        write[(self.tiles * parts * self.batch * self.key_heads,)](
            self.k, self.v, self.mask, self.gate, self.rate, self.q, self.q, self.q, sums, totals,
            *self.k.stride()[:3], *self.v.stride()[:3], self.key_heads, 1, self.keys, self.time, self.key0, self.step,
            self.tiles, parts, size, self.mask_stride, REVERSE=False, **self.shape, **self.kind,
        )  # fmt: skip
        return self._prefix(sums, totals, state, self.key_heads, reverse=False)

    def after(self, rows: tuple, d_end: Tensor | None, time: int, parts: int, size: int) -> tuple[Tensor, Tensor]:
        """(gradient of the state after each segment of rows, of the state before all), per query head."""
        d_out, scale, d_den = rows
        sums, totals = self.empty(self.batch, self.heads, parts, self.features, self.columns), self._totals(parts)
        write[(self.tiles * parts * self.batch * self.heads,)](
            self.q, d_out, self.q, self.gate, self.rate, d_out, scale, d_den, sums, totals,
            *self.q.stride()[:3], *d_out.stride()[:3], self.heads, self.group, self.queries, time, self.row0, self.step,
            self.tiles, parts, size, 0, REVERSE=True, **self.shape, **{**self.kind, "MASK": False},
        )  # fmt: skip
        return self._prefix(sums, totals, d_end, self.heads, reverse=True)

    def _totals(self, parts: int) -> Tensor:
        return self.empty(self.batch, self.heads, parts) if self.kind["DECAY"] != "none" else self.q

    def _prefix(self, sums, totals, first, heads: int, reverse: bool) -> tuple[Tensor, Tensor]:
        states, end = torch.empty_like(sums), self.empty(self.batch, heads, self.features, self.columns)
        size, blocks = self.features * self.columns, -(-self.features * self.columns // 1024)
        if size:
            prefix[(blocks * self.batch * heads,)](
                sums, totals, self.q if first is None else first, end, states, sums.shape[2], blocks,
                N=size, BLOCK=1024, FIRST=first is not None, DECAY=self.kind["DECAY"] != "none", REVERSE=reverse,
            )  # fmt: skip
        return states, end

    def forward(self, state: Tensor | None, floor: Tensor, out_dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(out, log mass, denominator, state after all keys); without ones column the middle two are not written."""
        fill = torch.empty if self.complete else torch.zeros
        rows = (self.batch, self.heads, self.queries)
        out = fill(*rows, self.values, dtype=out_dtype, device=self.device)
        den = fill(rows, dtype=torch.float32, device=self.device)
        mass = self.empty(*rows) if self.complete else torch.full_like(den, -torch.inf)
        state = None if state is None else state.float().contiguous()
        end, keep, time = None, False, self.time
        parts, size = self.parts(time, self.key_heads)
        if not self.causal:
            _, end = self.before(state, parts, size)
            state, time = end, self.queries
            parts, size = self.parts(time, self.heads)
        elif parts > 1:
            state, end = self.before(state, parts, size)
        else:
            keep, end = True, self.empty(self.batch, self.key_heads, self.features, self.columns)
        if self.batch and time:
            forward[(self.tiles * parts * self.batch * self.heads,)](
                self.q, self.k, self.v, self.mask, self.gate, self.rate, floor, self.q if state is None else state,
                out, mass, den, end, *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3],
                self.heads, self.group, self.queries, self.keys, time, self.row0, self.key0, self.step, self.tiles,
                parts, size, self.mask_stride, self.floor_stride(floor), CAUSAL=self.causal, STATE=state is not None,
                KEEP=keep, FLOOR=self.floored, **self.wide, **self.kind,
            )  # fmt: skip
        elif keep:
            end.zero_() if state is None else end.copy_(state)
        return out, mass, den, end

    def floor_stride(self, floor: Tensor) -> int:
        """Stride over the batch, 0 where all items have the same floor."""
        return floor.stride(0) if self.floored and floor.shape[0] > 1 else 0

    def rows(self, d_out: Tensor, out: Tensor, den: Tensor, floor: Tensor, d_mass: Tensor | None) -> tuple:
        """(d_out, 1 / denominator, gradient at the denominator), the last two [B, H, L]."""
        d_out = rows_contiguous(d_out)
        if not self.kind["NORMALIZE"]:
            return d_out, self.q, self.q
        scale, d_den = torch.empty_like(den), torch.empty_like(den)
        if den.numel():
            row_gradients[(-(-self.queries // 32) * self.batch * self.heads,)](
                d_out, out, den, floor, self.q if d_mass is None else d_mass.contiguous(), scale, d_den,
                *d_out.stride()[:3], self.floor_stride(floor), self.heads, self.queries, E=self.values,
                FLOOR=self.floored, MASS=d_mass is not None, C=32, EP=min(128, padded(self.values)),
            )  # fmt: skip
        return d_out, scale, d_den

    def spread(self, d_end: Tensor | None) -> Tensor | None:
        """The state's gradient [B, K, ..] as that of the first head of each group, [B, H, ..]; all heads are summed."""
        if d_end is None or self.group == 1:
            return None if d_end is None else d_end.float().contiguous()
        each = self.empty(self.batch, self.key_heads, self.group, *d_end.shape[2:]).zero_()
        each[:, :, 0] = d_end
        return each.flatten(1, 2)

    def backward(self, rows: tuple, state: Tensor | None, end: Tensor, d_end: Tensor | None):
        """(dq, dk, dv, d state before all [B, H, ..], <q, dq> and <k, dk> where the decay varies)."""
        d_out, (b, h, m) = rows[0], (self.batch, self.heads, self.keys)
        alone, given = self.tiles == 1 and self.group == 1, self.kind["DECAY"] == "given"
        fill = torch.empty if self.complete else torch.zeros
        all_keys = torch.empty if not self.causal or self.time >= m else torch.zeros
        exact = {"dtype": torch.float32, "device": self.device}
        width = self.q.shape[3]
        dq = fill(
            self.tiles, b, h, self.queries, width, **({**exact, "dtype": self.q.dtype} if self.tiles == 1 else exact)
        )
        dk = all_keys(self.tiles, b, h, m, width, **({**exact, "dtype": self.k.dtype} if alone else exact))
        dv = all_keys(b, h, m, self.values, **({**exact, "dtype": self.v.dtype} if self.group == 1 else exact))
        along_q = self.empty(self.tiles, b, h, self.queries) if given else self.q
        along_k = self.empty(self.tiles, b, h, m) if given else self.q
        state = None if state is None else state.float().contiguous()
        d_end = self.spread(d_end)
        time = self.time if self.causal else self.queries
        parts, size = self.parts(time, self.heads)
        keep, d_first = False, end
        if not self.causal:
            state = end
            after, d_first = self.after(rows, d_end, time, parts, size)
        elif parts > 1:
            state, _ = self.before(state, parts, size)
            after, d_first = self.after(rows, d_end, time, parts, size)
        else:
            keep, d_first = True, self.empty(b, h, self.features, self.columns)
            after = d_end
        strides = *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *d_out.stride()[:3]
        shared = self.q, self.k, self.v, *rows, self.mask, self.gate, self.rate
        sizes = self.heads, self.group, self.queries, self.keys
        line = self.row0, self.key0, self.step, self.tiles
        options = {"CAUSAL": self.causal, **self.wide, **self.kind}
        half = {**options, "C": max(16, self.chunk // 2)}  # two products more on chip than the others
        if b and time:
            query_gradient[(self.tiles * parts * b * h,)](
                *shared, self.q if state is None else state, dq, along_q, *strides, *sizes, time, *line,
                parts, size, self.mask_stride, b, STATE=state is not None, **options,
            )  # fmt: skip
        if not self.causal:
            time, after = self.keys, d_first
            parts, size = self.parts(time, self.heads)
        if b and time:
            key_gradient[(self.tiles * parts * b * h,)](
                *shared, self.q if after is None else after, dk, dv, along_k, d_first, *strides, *sizes, time, *line,
                parts, size, self.mask_stride, b, STATE=after is not None, KEEP=keep, **half,
            )  # fmt: skip
        elif keep:
            d_first.zero_() if after is None else d_first.copy_(after)
        dq = (dq[0] if self.tiles == 1 else dq.sum(0)).to(self.q.dtype)
        dk = (dk[0] if alone else dk.unflatten(2, (self.key_heads, self.group)).sum((0, 3))).to(self.k.dtype)
        dv = (dv if self.group == 1 else dv.unflatten(1, (self.key_heads, self.group)).sum(2)).to(self.v.dtype)
        d_first = d_first if self.group == 1 else d_first.unflatten(1, (self.key_heads, self.group)).sum(2)
        return dq, dk, dv, d_first, along_q, along_k


@torch.library.custom_op("longspan::linear_kernel_forward", mutates_args=())
def linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    decay: Tensor | None,
    state: Tensor | None,
    count: Tensor | None,
    feature_map: str,
    direction: str,
    offset: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `core.attention.blocked.linear.linear_forward`."""
    sweep = Sweep(q, k, v, key_mask, decay, None, feature_map, direction, offset, normalize, True)
    with on(q.device):
        return sweep.forward(state, sweep.floor(key_mask, count, feature_map, direction, offset), v.dtype)


@torch.library.custom_op("longspan::linear_kernel_backward", mutates_args=())
def linear_backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    den: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    decay: Tensor | None,
    state: Tensor | None,
    count: Tensor | None,
    feature_map: str,
    direction: str,
    offset: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d initial state)."""
    sweep = Sweep(q, k, v, key_mask, decay, None, feature_map, direction, offset, normalize, True)
    with on(q.device):
        floor = sweep.floor(key_mask, count, feature_map, direction, offset)
        return sweep.backward(sweep.rows(d_out, out, den, floor, d_mass), state, end, d_state)[:4]


join_sums(linear_forward, linear_backward)
