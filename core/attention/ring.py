"""A decoding state of keys and values: all of them, or the last few as a ring, whose shape never changes."""

import torch
from torch import Tensor

from core.attention.contract import Heads, State, hide


def empty_ring(heads: Heads, batch: int, size: int, device, dtype) -> State:
    """Room for `size` keys and values, none of them real yet; 0 for a cache, which grows."""
    return {
        "keys": torch.zeros(batch, heads.key, size, heads.width, device=device, dtype=dtype),
        "values": torch.zeros(batch, heads.key, size, heads.value_width, device=device, dtype=dtype),
        "mask": torch.zeros(batch, size, dtype=torch.bool, device=device),
    }


def extend_ring(state: State, k: Tensor, v: Tensor, key_mask: Tensor | None) -> State:
    """The ring's keys followed by the new ones, with their masks."""
    if key_mask is None:
        key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    return {
        "keys": torch.cat((state["keys"], hide(k, key_mask)), 2),
        "values": torch.cat((state["values"], hide(v, key_mask)), 2),
        "mask": torch.cat((state["mask"], key_mask), 1),
    }


def keep_ring(all_keys: State, size: int) -> State:
    """The last `size` of these keys."""
    start = all_keys["mask"].shape[1] - size
    return {
        "keys": all_keys["keys"][:, :, start:].contiguous(),
        "values": all_keys["values"][:, :, start:].contiguous(),
        "mask": all_keys["mask"][:, start:].contiguous(),
    }
