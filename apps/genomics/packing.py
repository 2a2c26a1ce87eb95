"""Several sequences end to end in one row, without attention between them, in place of one in each padded row.

    padded     a a a .        packed     a a a|b|c c c c         (with the stem: a a a _ _ b _ _ c c c c)
               b . . .
               c c c c

Convolutions of the stem look at neighbours, so for them the sequences stand a gap apart, which counts as padding does.
The encoder is told where each sequence ends (`cu_seqlens`); `core.attention.packing` says how a pack is attended.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.training.data import padding_share


def laid_out(ids: Tensor, mask: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """The sequences of a padded batch in one row: ids [1, T]; mask [1, T], False in the gap after each of them.

    Args:
        ids, mask: [B, N], padding at the end.   gap: empty places after each sequence.
    """
    wide_ids, wide_mask = (F.pad(x, (0, gap)) for x in (ids, mask))
    kept = torch.arange(wide_ids.shape[1], device=ids.device) < mask.sum(1, keepdim=True) + gap
    return wide_ids[kept].unsqueeze(0), wide_mask[kept].unsqueeze(0)


def offsets(mask: Tensor) -> Tensor:
    """Where each sequence of a pack starts, and where the last ends, [B + 1]; on the CPU, where attention reads it."""
    return F.pad(mask.sum(1).cumsum(0), (1, 0)).cpu()


def padded_again(x: Tensor, mask: Tensor) -> Tensor:
    """A pack [1, T, D] as the padded batch [B, N, D] that it was made of, zeros where the mask is False."""
    found = x.new_zeros(*mask.shape, x.shape[-1])
    found[mask] = x[0]
    return found


def attention_padding(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """Share of padding inside attention, where a pack is unpacked into batches of one power of two of the length."""
    groups: list[list[int]] = []
    for batch in batches:
        alike: dict[int, list[int]] = {}
        for index in batch:
            alike.setdefault(int(lengths[index]).bit_length(), []).append(index)
        groups += alike.values()
    return padding_share(lengths, groups)
