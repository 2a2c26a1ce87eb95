"""The two strands of DNA: how a batch is read on the other one, and how the answers come back.

    none      the strand that is given
    augment   in training either strand by chance, else the one that is given
    average   as augment in training; otherwise the mean of both answers
    tied      both strands always, with shared weights, joined before the head (as Caduceus-PS, Schiff et al. 2024,
              arXiv:2403.03234, does with its channels): equivariant by construction

Answers per sequence are then equal for both strands; answers per base are mirrored, and classes that name a strand
change places (`mirror`).
"""

import torch
from torch import Tensor

MODES = ("none", "augment", "average", "tied")


def flipped(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, N, ...] with the real positions of each row in reverse order; padding stays at the end."""
    at = torch.arange(mask.shape[1], device=mask.device)
    index = torch.where(mask, mask.sum(1, keepdim=True) - 1 - at, at)
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))


def other_strand(ids: Tensor, mask: Tensor, complement: Tensor) -> Tensor:
    """Letters [B, N] of the other strand, read in its own direction; `complement` maps id to id."""
    return torch.where(mask, complement[flipped(ids, mask)], ids)


def chosen(coin: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Rows of `theirs` where the coin [B] fell, else of `ours`."""
    return torch.where(coin.view(-1, *[1] * (ours.dim() - 1)), theirs, ours)
