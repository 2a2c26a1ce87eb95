"""Packs for the benchmark: sequences of mixed lengths laid end to end, read by their offsets or as padded batches.

The inputs [B, H, L, D] are looked at as one pack [1, H, B L, D], without a copy: they are random numbers in any order.
"""

from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from core.attention import hybrid_attention, linear_attention, sliding_window_attention
from core.attention.feature_maps import feature_map
from core.attention.packing import attend_packed, pack_of
from core.attention.variants import hybrid, linear, window

SHARES = (2, 16, 5, 64, 3, 9, 24, 4, 12, 40)
"""A document of a mix is a batch row's length over one of these, in turn: few long ones, many short ones."""
NAMES = ("linear packs", "linear both packs", "window packs", "hybrid packs")


def ends(total: int, length: int) -> Tensor:
    """Offsets [N + 1] of a mix of `total` positions, on the host."""
    found, at = [0], 0
    for share in cycle(SHARES):
        at = min(total, at + max(1, length // share))
        found.append(at)
        if at == total:
            return torch.tensor(found)
    raise AssertionError


def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, offsets) of a pack."""
    batch, _, length, _ = q.shape
    q, k, v = (x.reshape(1, x.shape[1], batch * length, x.shape[3]) for x in (q, k, v))
    return q, k, v, ends(batch * length, length)


def by_offsets(q: Tensor, k: Tensor, v: Tensor, group: str, near: int) -> Tensor:
    """The pack as the kernels read it."""
    shape = q.shape
    q, k, v, offsets = packed(q, k, v)
    options, phi = {"backend": "triton", "pack": pack_of(q, k, offsets)}, feature_map("elu")
    if group == "window packs":
        out = window.attend(q, k, v, near, causal=True, **options).out
    elif group == "hybrid packs":
        gate = torch.full((q.shape[1],), phi.log_gate(q.shape[3]), device=q.device)
        tail = {"window": near, "phi": phi, "gate": gate, "scale": q.shape[3] ** -0.5}
        given = {"causal": True, "key_mask": None, "slopes": None, **tail, **options}
        out = hybrid.attend(q, k, v, q, k, **given).out
    else:
        out = linear.attend(q, k, v, phi, causal=group == "linear packs", **options)[0].out
    return out.reshape(*shape[:3], v.shape[3])


def by_padding(q: Tensor, k: Tensor, v: Tensor, group: str, near: int, backend: str) -> Tensor:
    """The pack as a few padded batches, what mechanisms without such kernels do."""
    shape = q.shape
    run = {
        "linear packs": partial(linear_attention, causal=True),
        "linear both packs": linear_attention,
        "window packs": partial(sliding_window_attention, window=near, causal=True),
        "hybrid packs": partial(hybrid_attention, window=near, causal=True),
    }[group]

    def attend(q, k, v, key_mask, rows):
        return run(q, k, v, key_mask=key_mask, return_mass=True, backend=backend)

    out = attend_packed(attend, *packed(q, k, v)).out
    return out.reshape(*shape[:3], v.shape[3])
