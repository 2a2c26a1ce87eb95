# pyright: reportCallIssue=false, reportArgumentType=false
# A kernel is launched by Triton, whose call a type checker cannot see through.
"""The launches of one call of linear attention or of a scan with decay; `linear` says what they compute."""

import torch
from torch import Tensor

from core.attention.blocked.linear import least_denominator
from core.attention.feature_maps import feature_map as phi_named
from core.attention.kernels.features import MAPS, row_gradients
from core.attention.kernels.launch import Blocks, choose, padded, products, rows_contiguous, segments
from core.attention.kernels.linear_gradients import key_gradient, query_gradient
from core.attention.kernels.linear_sweeps import forward, write
from core.attention.kernels.packs import Layout, layout
from core.attention.kernels.prefix import prefix
from core.attention.packing import Pack

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


def seen_by_sums(name: str) -> str:
    """The map without parameters that has the width and the floor of this one."""
    return "given_floored" if name == "focused" else name


class Sweep:
    """The launches of one call: what all of them share, and the timeline.

    factor: [K, D] of the map "focused".   pack: q, k and v are packs, [1, H, T, D] and so on.
    """

    def __init__(
        self, q, k, v, key_mask, rate, gate, name: str, direction: str, offset: int, normalize, ones,
        factor: Tensor | None = None, pack: Pack | None = None,
    ):  # fmt: skip
        self.q, self.k, self.v = (rows_contiguous(x) for x in (q, k, v))
        self.batch, self.heads, self.queries, width = q.shape
        self.key_heads, self.keys, self.values = k.shape[1], k.shape[2], v.shape[3]
        self.group, self.device, self.causal = self.heads // self.key_heads, q.device, direction != "both"
        if name not in MAPS and (name != "focused" or factor is None):
            raise ValueError(f"no kernel for the feature map {name!r}; it is for {', '.join(MAPS)}")
        self.pack, self.direction, self.offset = pack, direction, offset
        ahead = offset if direction == "past" else -offset
        if pack is not None and (self.batch > 1 or key_mask is not None or ahead > 0):
            raise ValueError("a pack is one batch item without a mask, and no row of it sees past its own position")
        if rate is not None and (not self.causal or self.group > 1):
            raise ValueError("a decay per query head needs a direction and as many key heads as query heads")
        self.map = seen_by_sums(name)
        self.features = phi_named(self.map).width(width)
        self.columns = self.values + (1 if ones else 0)
        self.mask = q if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.mask_stride = 0 if key_mask is None else self.mask.stride(0)
        self.rate = q if rate is None else rate.float().contiguous()
        self.gate = q if gate is None else gate.float().contiguous()
        self.factor = q if factor is None else factor.float().contiguous()
        self.floored = normalize and phi_named(self.map).floor > 0
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
        if name == "focused":  # its rows stand in registers several times: else up to 1,032 bytes a thread spill
            blocks = blocks._replace(chunk=min(blocks.chunk, 64 if padded_features <= 64 else 32), warps=8)
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
            "PACK": pack is not None,
            **products(q, k, v),
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }

    def cut(self, over: str, heads: int) -> Layout:
        """The segments of rows, keys or the timeline; without a pack they need no table."""
        length = {"rows": self.queries, "keys": self.keys}.get(over, self.time)
        parts, size = segments(length, self.chunk, self.batch * heads * self.tiles, self.device)
        if self.pack is None:
            return Layout(self.q, self.q, parts, size)
        return layout(self.pack, over, length, self.pack.longest, size, self.offset)

    def whole(self, cut: Layout) -> bool:
        """Whether no sequence is cut."""
        return cut.number == 1 if self.pack is None else self.pack.longest <= cut.size

    @property
    def sequences(self) -> int:
        """Items that have a state of their own."""
        return self.batch if self.pack is None else self.pack.offsets.shape[0] - 1

    def empty(self, *shape: int) -> Tensor:
        """A float32 buffer."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def floor(self, key_mask, count) -> Tensor:
        """Least denominator per row, which only maps that can vanish have."""
        if not self.floored:
            return self.q
        where = self.map, self.direction, self.offset, self.pack
        return least_denominator(self.q, self.k, key_mask, count, *where)[:, 0].contiguous()

    def before(self, state: Tensor | None, cut: Layout) -> tuple[Tensor, Tensor]:
        """(state before each segment of keys, state after all)."""
        table, _, parts, size = cut
        sums, totals = self.empty(self.batch, self.key_heads, parts, self.features, self.columns), self._totals(parts)
        write[(self.tiles * parts * self.batch * self.key_heads,)](
            self.k, self.v, self.mask, self.gate, self.rate, self.factor, self.q, self.q, self.q, table, sums, totals,
            *self.k.stride()[:3], *self.v.stride()[:3], self.key_heads, 1, self.keys, self.time, self.key0, self.step,
            self.tiles, parts, size, self.mask_stride, REVERSE=False, **self.shape, **self.kind,
        )  # fmt: skip
        return self._prefix(sums, totals, state, self.key_heads, cut, reverse=False)

    def after(self, rows: tuple, d_end: Tensor | None, time: int, cut: Layout) -> tuple[Tensor, Tensor]:
        """(gradient of the state after each segment of rows, of the state before all), per query head."""
        (d_out, scale, d_den), (table, _, parts, size) = rows, cut
        sums, totals = self.empty(self.batch, self.heads, parts, self.features, self.columns), self._totals(parts)
        write[(self.tiles * parts * self.batch * self.heads,)](
            self.q, d_out, self.q, self.gate, self.rate, self.factor, d_out, scale, d_den, table, sums, totals,
            *self.q.stride()[:3], *d_out.stride()[:3], self.heads, self.group, self.queries, time, self.row0, self.step,
            self.tiles, parts, size, 0, REVERSE=True, **self.shape, **{**self.kind, "MASK": False},
        )  # fmt: skip
        return self._prefix(sums, totals, d_end, self.heads, cut, reverse=True)

    def _totals(self, parts: int) -> Tensor:
        return self.empty(self.batch, self.heads, parts) if self.kind["DECAY"] != "none" else self.q

    def _prefix(self, sums, totals, first, heads: int, cut: Layout, reverse: bool) -> tuple[Tensor, Tensor]:
        states, end = torch.empty_like(sums), self.empty(self.sequences, heads, self.features, self.columns)
        size, blocks = self.features * self.columns, -(-self.features * self.columns // 1024)
        if size:
            prefix[(blocks * self.sequences * heads,)](
                sums, totals, self.q if first is None else first, end, states, cut.slots, cut.number, blocks, heads,
                N=size, BLOCK=1024, FIRST=first is not None, DECAY=self.kind["DECAY"] != "none", REVERSE=reverse,
                PACK=self.pack is not None,
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
        cut = self.cut(self.direction if self.causal else "keys", self.key_heads)
        if not self.causal:
            _, end = self.before(state, cut)
            state, time = end, self.queries
            cut = self.cut("rows", self.heads)
        elif not self.whole(cut):
            state, end = self.before(state, cut)
        else:
            keep, end = self.pack is None, self.empty(self.batch, self.key_heads, self.features, self.columns)
        if self.causal and self.pack is not None:
            end = self.empty(0)
        table, _, parts, size = cut
        if self.batch and time:
            forward[(self.tiles * parts * self.batch * self.heads,)](
                self.q, self.k, self.v, self.mask, self.gate, self.rate, self.factor, floor, table,
                self.q if state is None else state, out, mass, den, end,
                *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3],
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
        """(dq, dk, dv, d state before all [B, H, ..], <q, dq> and <k, dk> where the decay varies, d factor)."""
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
        cut = self.cut(self.direction if self.causal else "rows", self.heads)
        keep, d_first = False, end
        if not self.causal:
            state = end
            after, d_first = self.after(rows, d_end, time, cut)
        elif not self.whole(cut):
            state, _ = self.before(state, cut)
            after, d_first = self.after(rows, d_end, time, cut)
        else:
            keep, d_first = self.pack is None, self.empty(b, h, self.features, self.columns)
            after = d_end
        strides = *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *d_out.stride()[:3]
        shared = self.q, self.k, self.v, *rows, self.mask, self.gate, self.rate, self.factor
        sizes = self.heads, self.group, self.queries, self.keys
        line = self.row0, self.key0, self.step, self.tiles
        options = {"CAUSAL": self.causal, **self.wide, **self.kind}
        half = {**options, "C": max(16, self.chunk // 2)}  # two products more on chip than the others
        d_factors = []
        if b and time:
            table, _, parts, size = cut
            d_factors.append(self.factors(parts))
            query_gradient[(self.tiles * parts * b * h,)](
                *shared, table, self.q if state is None else state, dq, along_q, d_factors[-1], *strides,
                *sizes, time, *line, parts, size, self.mask_stride, b, STATE=state is not None, **options,
            )  # fmt: skip
        if not self.causal:
            time, after = self.keys, d_first
            cut = self.cut("keys", self.heads)
        if b and time:
            table, _, parts, size = cut
            d_factors.append(self.factors(parts))
            key_gradient[(self.tiles * parts * b * h,)](
                *shared, table, self.q if after is None else after, dk, dv, along_k, d_factors[-1], d_first,
                *strides, *sizes, time, *line, parts, size, self.mask_stride, b, STATE=after is not None, KEEP=keep,
                **half,
            )  # fmt: skip
        elif keep:
            d_first.zero_() if after is None else d_first.copy_(after)
        dq = (dq[0] if self.tiles == 1 else dq.sum(0)).to(self.q.dtype)
        dk = (dk[0] if alone else dk.unflatten(2, (self.key_heads, self.group)).sum((0, 3))).to(self.k.dtype)
        dv = (dv if self.group == 1 else dv.unflatten(1, (self.key_heads, self.group)).sum(2)).to(self.v.dtype)
        d_first = d_first if self.group == 1 else d_first.unflatten(1, (self.key_heads, self.group)).sum(2)
        d_factor = self.empty(0)
        if self.kind["MAP"] == "focused":
            d_factor = sum((x.sum((0, 2, 3, 4)) for x in d_factors), torch.zeros_like(self.factor))
        return dq, dk, dv, d_first, along_q, along_k, d_factor

    def factors(self, parts: int) -> Tensor:
        """The gradient at the factor of a map, of each program."""
        if self.kind["MAP"] != "focused":
            return self.q
        return self.empty(self.batch, self.key_heads, self.group, parts, self.tiles, self.features)
