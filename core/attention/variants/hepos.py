r"""HEPOS: cross-attention in which every head reads its own part of the encoder's positions.

    key j is visible to head h  iff  floor(j / r) mod s = h mod s,    r = 1 (kind "stride") or block_size ("block")

    s = 2, M = 8     stride           block of 2       (1 = read)
    even heads       1 0 1 0 1 0 1 0  1 1 0 0 1 1 0 0
    odd heads        0 1 0 1 0 1 0 1  0 0 1 1 0 0 1 1

and softmax over what is visible. Together the heads read every position; time and cached keys are 1/s of softmax
attention. A state of a remembered context holds the picked keys only.

Source:
    Huang et al. 2021, arXiv:2104.02112

Where we differ:
    The published code pads the encoder to a multiple of s with zeros that receive weight; here padding is masked.
    Blocks are dealt out in turn (as positions are in "stride") instead of one long block per head, so that padding on
    the right changes no head's part. With fewer key than query heads, the part belongs to the query head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.backends import implementation, resolve
from core.attention.contract import (
    NO_INPUTS,
    Attended,
    Cost,
    Heads,
    State,
    Variant,
    check_inputs,
    hide,
    repeat_heads,
    visible,
)
from core.attention.registry import nearest, register
from core.attention.variants import softmax

KINDS = ("stride", "block")


def reference(q, k, v, stride, run, key_mask, scale) -> Attended:
    """The definition, dense; k and v have as many heads as q."""
    part = torch.arange(k.shape[2], device=k.device) // run % stride
    mine = part == torch.arange(q.shape[1], device=q.device)[:, None, None] % stride  # [H, 1, M]
    seen = visible(q.shape[2], k.shape[2], key_mask=key_mask, device=q.device)
    return softmax.reference(q, k, v, seen & mine, scale)


def pick(x: Tensor, index: Tensor, stride: int, run: int) -> Tensor:
    """x [B, K, M, X] -> [B, s, n, ceil(M / s r) r, X], the positions of residue 0, 1, ... for the heads that read them.

    index: [s n], the key head times s plus the residue that each of them reads.
    """
    turns = F.pad(x, (0, 0, 0, -x.shape[2] % (stride * run))).unflatten(2, (-1, stride, run))
    by_head_and_residue = turns.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, K s, ., X]
    return by_head_and_residue[:, index].unflatten(1, (stride, -1))


def fold(x: Tensor, stride: int) -> Tensor:
    """[B, H, ...] -> [B s, H / s, ...]: the heads of one residue h mod s as a batch item of their own."""
    return x.unflatten(1, (-1, stride)).transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, stride: int) -> Tensor:
    """The inverse of `fold`."""
    return x.unflatten(0, (-1, stride)).transpose(1, 2).flatten(1, 2)


def attend_picked(q: Tensor, state: State, stride: int, **options) -> Attended:
    """Softmax attention of q [B, H, L, D] to picked keys."""
    k, v = state["keys"].flatten(0, 1), state["values"].flatten(0, 1)
    mask = state["mask"].flatten(0, 1) if "mask" in state else None
    out, mass = softmax.attend(fold(q, stride), k, v, key_mask=mask, **options)
    return Attended(unfold(out, stride), None if mass is None else unfold(mass, stride))


@implementation("hepos", "reference", serves=("mass",))
def _reference(variant: "HeposAttention", q, k, v, key_mask, dropout) -> Attended:
    k, v = repeat_heads(hide(k, key_mask), q.shape[1]), repeat_heads(hide(v, key_mask), q.shape[1])
    return reference(q, k, v, variant.stride, variant.run, key_mask, q.shape[-1] ** -0.5)


@implementation("hepos", "sdpa", serves=("dropout",))
def _sdpa(variant: "HeposAttention", q, k, v, key_mask, dropout) -> Attended:
    state = variant.remember(k, v, key_mask=key_mask)
    return attend_picked(q, state, variant.stride, dropout=dropout, backend="sdpa")


@implementation("hepos", "torch", serves=("mass",))
def _torch(variant: "HeposAttention", q, k, v, key_mask, dropout) -> Attended:
    state = variant.remember(k, v, key_mask=key_mask)
    return attend_picked(q, state, variant.stride, return_mass=True, backend="torch")


@register(
    "hepos",
    summary="cross-attention whose heads read every s-th key each, all keys together; quadratic / s",
    source="Huang et al. 2021, arXiv:2104.02112",
    pick="the decoder reads a very long encoder output and memory is the limit",
    stability="as softmax, over a stride of the keys",
)
class HeposAttention(Variant):
    """Softmax cross-attention with head-wise positional strides.

    Args:
        stride: s, dividing the number of heads.
        kind: "stride" deals out single positions to the heads, "block" blocks of `block_size`.
        block_size: positions per block; None: 64. Goes with "block" only.
    """

    can = frozenset({"cross", "mass", "dropout"})
    anchor = "start"
    growth = "quadratic"
    index: Tensor

    def __init__(self, heads: Heads, *, stride: int = 4, kind: str = "stride", block_size: int | None = None):
        super().__init__(heads)
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1 or heads.query % stride:
            valid = [n for n in range(1, heads.query + 1) if heads.query % n == 0]
            raise ValueError(f"stride must divide the {heads.query} heads, got {stride!r}; valid: {valid}")
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
        if block_size is not None and kind != "block":
            raise ValueError(f"block_size={block_size!r} goes with kind='block', got kind={kind!r}")
        self.stride, self.run = stride, 1
        if kind == "block":
            self.run = 64 if block_size is None else block_size
        if isinstance(self.run, bool) or not isinstance(self.run, int) or self.run < 1:
            raise ValueError(f"block_size must be a whole number of at least 1, got {block_size!r}")
        residue = torch.arange(stride)[:, None]
        if heads.group % stride == 0:  # every residue is read by whole groups, so key heads stay shared
            key_head = torch.arange(heads.key)
        else:
            key_head = (torch.arange(heads.query // stride) * stride + residue) // heads.group
        self.register_buffer("index", (key_head * stride + residue).flatten(), persistent=False)

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
        needs = (("mass",) if return_mass else ()) + (("dropout",) if dropout else ())
        choice = resolve("hepos", backend, q.device.type, q.dtype, needs)
        return choice.run(self, q, k, v, key_mask, dropout)

    def remember(self, k, v, *, key_mask=None, backend="auto") -> State:
        picks = self.index, self.stride, self.run
        state = {"keys": pick(hide(k, key_mask), *picks), "values": pick(hide(v, key_mask), *picks)}
        whole = k.shape[2] % (self.stride * self.run) == 0
        if key_mask is None and not whole:
            key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        if key_mask is not None:
            every = torch.arange(self.stride, device=k.device)
            state["mask"] = pick(key_mask[:, None, :, None], every, self.stride, self.run)[:, :, 0, :, 0]
        return state

    def recall(self, q, state: State, *, backend="auto", inputs=NO_INPUTS) -> Attended:
        return attend_picked(q, state, self.stride, backend=backend)

    def cost(self, batch, length, keys=None, *, causal=False, positions=None, element_bytes=4) -> Cost:
        keys = length if keys is None else keys
        h = self.heads
        read = -(-keys // (self.stride * self.run)) * self.run  # by each head
        picked = len(self.index) * read * (h.width + h.value_width)
        return Cost(
            flops=2 * batch * h.query * length * read * (h.width + h.value_width),
            bytes_moved=batch * element_bytes * (h.query * length * (h.width + h.value_width) + picked),
        )
