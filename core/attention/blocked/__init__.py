"""The `torch` backend: exact attention in blocks that stay in cache, in memory linear in the length.

Each file is one operation as a pair of `torch.library` custom ops, forward and backward; `pairs` joins the two. They
are opaque to torch.compile and torch.export, so a loop over blocks costs no graph nodes, a new length recompiles
nothing, and eager and compiled runs compute the same bits. All arithmetic is float32 (float64 for float64 inputs)
whatever the inputs are: a block is widened when it is read. The backwards recompute weights from the saved mass and
keep no [L, M] tensor. They are not differentiable themselves; asking for second derivatives is an error.
"""

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 1 << 18
"""Elements of the largest temporary of a block: 1 MiB in float32, measured best of 2^17..2^22 on a CPU core with
512 KiB of L2 (2026-11-21); a GPU wants larger blocks, see `block_elements`."""


def block_elements(device: torch.device) -> int:
    """Elements of the largest temporary of a block on this device."""
    return BLOCK_ELEMENTS if device.type == "cpu" else BLOCK_ELEMENTS * 64


def batches(batch: int, elements_per_item: int, device: torch.device) -> Iterator[slice]:
    """Slices over the batch such that a block over one slice stays near `block_elements`."""
    step = max(1, block_elements(device) // max(1, elements_per_item))
    for start in range(0, batch, step):
        yield slice(start, min(batch, start + step))


def full_precision(device: torch.device):
    """Turn autocast off inside an op: a block is widened on purpose and must not be narrowed again."""
    return torch.autocast(device.type, enabled=False)
