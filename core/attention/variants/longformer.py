r"""Longformer: a sliding window, and a few global tokens that see everything and are seen by everything.

    local query i    sees key j  iff  |i - j| < window or j is global
    global query i   sees every key j, by projections of its own: q_g, k_g and v_g, read from the layer's input

both with j <= i if causal. Here window 2, the first token global, two-sided (G = by global projections):

    G G G G G G
    1 1 1 . . .        Time and memory are linear in the length. A local query merges two disjoint key sets: its window
    1 1 1 1 . .        without the global keys, and the global keys by their local projections. Global queries are few
    1 . 1 1 1 .        and read all keys.
    1 . . 1 1 1
    1 . . . 1 1

Global are the first `global_tokens` real tokens, and those in the layer's `global_mask`, whose number a compiled
program cannot know: there is room for `max_global` in each sequence, and more are an error.

Source:
    Beltagy et al. 2020, arXiv:2004.05150

Where we differ:
    The published global projections start as copies of the local ones; those belong to the layer, so ours start like
    them (Xavier, no bias yet). The layer's qk_norm, short_conv and ALiBi do not reach the global projections, so ALiBi
    is left out altogether; rotary positions turn both. A two-sided window counts window - 1 keys to each side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention.backends import FLEX, implementation, resolve
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    Variant,
    accumulator,
    check_inputs,
    check_whole,
    hide,
    merge,
    repeat_heads,
    visible,
)
from core.attention.positions import Rotation
from core.attention.registry import register
from core.attention.variants import softmax, window


def reference(local, wide, width, marked, causal, key_mask) -> Attended:
    """The definition: local and wide are (q, k, v) of one number of heads by both projections; marked bool [B, L]."""
    (q, k, v), (q_g, k_g, v_g), scale = local, wide, local[0].shape[-1] ** -0.5
    real = torch.ones_like(marked) if key_mask is None else key_mask
    full = visible(q.shape[2], q.shape[2], causal=causal, key_mask=real, device=q.device)
    near = visible(q.shape[2], q.shape[2], window=width, device=q.device)
    own = softmax.reference(q, k, v, full & (near | marked[:, None, None, :]), scale)
    every, row = softmax.reference(q_g, k_g, v_g, full, scale), marked[:, None, :]
    assert own.log_mass is not None
    assert every.log_mass is not None
    out = torch.where(row.unsqueeze(-1), every.out, own.out)
    return Attended(out, torch.where(row, every.log_mass, own.log_mass))


@implementation("longformer", "reference")
def _reference(variant, q, k, v, x, marked, room, rotary, causal, key_mask) -> Attended:
    wide = variant.queries(x), *variant.keys(x)
    if rotary is not None:
        wide = rotary[0](wide[0]), rotary[1](wide[1]), wide[2]
    local, wide = ((queries, *(repeat_heads(y, q.shape[1]) for y in others)) for queries, *others in ((q, k, v), wide))
    return reference(local, wide, variant.window, marked, causal, key_mask)


@implementation("longformer", "torch")
def _torch(*arguments) -> Attended:
    return _merged(*arguments, backend="torch")


@implementation("longformer", "flex", **FLEX)
def _flex(*arguments) -> Attended:
    return _merged(*arguments, backend="flex")


def _merged(variant, q, k, v, x, marked, room, rotary, causal, key_mask, *, backend) -> Attended:
    """The window by a backend of its own; the few global rows and columns in blocks; and their merge."""
    real = marked.new_ones(marked.shape) if key_mask is None else key_mask
    near = window.attend(q, k, v, variant.window, causal=causal, key_mask=real & ~marked, backend=backend)
    if room == 0:
        return near
    index, valid = _slots(marked, room)
    position = torch.arange(q.shape[2], device=q.device)
    ahead = index[:, None, None, :] > position[:, None]  # [B, 1, L, G]: a global key in the future
    bias = ahead.new_zeros(ahead.shape, dtype=accumulator(q.dtype)).masked_fill(ahead, -torch.inf) if causal else None
    far = softmax.attend(
        q, _take(k, index), _take(v, index), key_mask=valid, bias=bias, return_mass=True, backend="torch"
    )
    local = merge(near, far)

    queries = variant.queries(_take(x.unsqueeze(1), index).squeeze(1)).to(q.dtype)
    keys, values = (y.to(v.dtype) for y in variant.keys(x))
    if rotary is not None:
        queries, keys = _turned(rotary[0], index)(queries), rotary[1](keys)
    ahead = position > index[:, None, :, None]  # [B, 1, G, L]: a key in the future of a global query
    bias = ahead.new_zeros(ahead.shape, dtype=accumulator(q.dtype)).masked_fill(ahead, -torch.inf) if causal else None
    wide = softmax.attend(queries, keys, values, key_mask=real, bias=bias, return_mass=True, backend="torch")

    # Slots without a token write to a row before the first.
    target = torch.where(valid, index + 1, 0)[:, None, :, None]
    assert local.log_mass is not None
    assert wide.log_mass is not None
    out = _put(local.out, target, wide.out)
    return Attended(out, _put(local.log_mass.unsqueeze(-1), target, wide.log_mass.unsqueeze(-1)).squeeze(-1))


def _slots(marked: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Positions of the marked tokens [B, room], in order, and which of these slots hold one."""
    rank = torch.where(marked, marked.cumsum(-1) - 1, room)
    position = torch.arange(marked.shape[1], device=marked.device).expand_as(rank)
    index = torch.zeros(marked.shape[0], room + 1, dtype=torch.int64, device=marked.device)
    index = index.scatter(1, rank, position)[:, :room]
    return index, torch.arange(room, device=marked.device) < marked.sum(-1, keepdim=True)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, L, X] at positions [B, G] -> [B, H, G, X]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _turned(rotation: Rotation, index: Tensor) -> Rotation:
    """The rotation at the positions `index` [B, G] of its own."""
    at = rotation.coordinates
    each = at.unsqueeze(-1) if rotation.planes == 1 else at
    each = (each.unsqueeze(0) if each.dim() == 2 else each).expand(index.shape[0], -1, -1)
    taken = _take(each.unsqueeze(1), index).squeeze(1)
    return rotation._replace(coordinates=taken.squeeze(-1) if rotation.planes == 1 else taken)


def _put(rows: Tensor, target: Tensor, new: Tensor) -> Tensor:
    """rows [B, H, L, X] with some replaced by new [B, H, G, X]; target [B, 1, G, 1] counts rows from 1, 0 is none."""
    padded = F.pad(rows, (0, 0, 1, 0))
    return padded.scatter(2, target.expand_as(new), new.to(rows.dtype))[:, :, 1:]


@register(
    "longformer",
    summary="a sliding window and global tokens with projections of their own; linear",
    source="Beltagy et al. 2020, arXiv:2004.05150",
    pick="documents with a few special tokens: a question, a class token, separators",
    stability="as window; global rows are plain softmax",
)
class LongformerAttention(Variant):
    """A sliding window and a few global tokens.

    Args:
        window: as in "window".
        global_tokens: so many first real tokens are global, a class token or a question; 0: only those of a mask.
        max_global: room for tokens in `global_mask`, per sequence.
    """

    can = frozenset({"causal", "bidirectional", "mass", "global"})
    positions = frozenset({"rope"})

    def __init__(self, heads: Heads, *, window: int = 64, global_tokens: int = 1, max_global: int = 64):
        super().__init__(heads)
        check_whole("window", window, what=" (1 = the position itself)")
        check_whole("global_tokens", global_tokens, 0)
        check_whole("max_global", max_global)
        self.window, self.global_tokens, self.max_global = window, global_tokens, max_global
        model = heads.input_width("longformer")
        self.query = nn.Linear(model, heads.query * heads.width)
        self.key = nn.Linear(model, heads.key * heads.width)
        self.value = nn.Linear(model, heads.key * heads.value_width)
        for one in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(one.weight)
            nn.init.zeros_(one.bias)

    def queries(self, x: Tensor) -> Tensor:
        """Global queries [B, H, ., D] of x [B, ., C]."""
        return self.query(x).unflatten(-1, (self.heads.query, -1)).transpose(1, 2)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Global keys [B, K, ., D] and values [B, K, ., E] of x [B, ., C]."""
        k, v = (one(x).unflatten(-1, (self.heads.key, -1)).transpose(1, 2) for one in (self.key, self.value))
        return k, v

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
        check_inputs(q, k, v, key_mask)
        x = inputs.x
        if x is None or q.shape[2] != k.shape[2]:
            raise ValueError(
                f"longformer needs the layer's input and as many queries as keys, "
                f"got x {None if x is None else list(x.shape)}, L={q.shape[2]}, M={k.shape[2]}"
            )
        if rotary is not None:
            q, k = rotary[0](q), rotary[1](k)
        if key_mask is not None:
            k, v, x = hide(k, key_mask), hide(v, key_mask), torch.where(key_mask.unsqueeze(-1), x, 0.0)
        marked, room = self._marked(inputs.marked, key_mask, x)
        choice = resolve("longformer", backend, q.device.type, q.dtype, (), (q.shape[3], v.shape[3]))
        return choice.run(self, q, k, v, x, marked, room, rotary, causal, key_mask)

    def _marked(self, given: Tensor | None, key_mask: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
        """Which tokens are global, bool [B, L], and the most that one sequence can have."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if key_mask is None else key_mask
        marked = real & (real.cumsum(-1) <= self.global_tokens)
        if given is None:
            return marked, self.global_tokens if x.shape[1] else 0
        marked, room = marked | (given & real), self.global_tokens + self.max_global if x.shape[1] else 0
        fits = ((given & real).sum(-1) <= self.max_global).all()
        text = f"more than {self.max_global} global tokens in a sequence; raise max_global"
        if torch.compiler.is_compiling():
            torch.ops.aten._assert_async.msg(fits, text)
        elif not fits:
            raise ValueError(text)
        return marked, room

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        h, some = self.heads, min(self.global_tokens, length)
        own = window.band_pairs(length - some, self.window, causal) + (length - some) * some
        pairs = own + (some * (some + 1) // 2 if causal else some * length)
        both, model = h.width + h.value_width, h.input_width("longformer")
        parameters = sum(p.numel() for p in self.parameters())
        projected = some * h.query * h.width + length * h.key * both
        return Cost(
            flops=2 * batch * (h.query * pairs * both + model * projected),
            bytes_moved=element_bytes * (batch * length * ((h.query + h.key) * both + model) + parameters),
            parameters=parameters,
        )
