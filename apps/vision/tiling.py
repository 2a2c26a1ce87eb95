"""Sliding windows: an image of any size through a model that sees a window at a time, its answers blended."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def slide(
    model: Callable[[Tensor], Tensor], x: Tensor, window: tuple[int, int], *, overlap: float = 0.5, batch: int = 8
) -> Tensor:
    """Logits [K, H, W] of one normalised image [C, H, W], window by window.

    Windows lie at equal steps that overlap by `overlap` at least, the last ones flush with the border. Where they
    overlap, answers are weighted by a pyramid that falls towards a window's edge, which sees least around it. An image
    that fits one window is run whole, padded by zeros to the window's size; the result is then that of the model.

    Args:
        model: [B, C, h, w] -> [B, K, h, w], for h, w = window.
        x: the image.   window: rows and columns.   overlap: share of a window, below 1.   batch: windows at a time.
    """
    high, wide = x.shape[1:]
    padded = F.pad(x, (0, max(0, window[1] - wide), 0, max(0, window[0] - high)))
    corners = [
        (r, c)
        for r in _starts(padded.shape[1], window[0], overlap)
        for c in _starts(padded.shape[2], window[1], overlap)
    ]
    if len(corners) == 1:
        return model(padded[None])[0, :, :high, :wide]
    weight = _pyramid(window).to(x.device)
    total, weights = None, torch.zeros(padded.shape[1:], device=x.device)
    for start in range(0, len(corners), batch):
        some = corners[start : start + batch]
        answers = model(torch.stack([padded[:, r : r + window[0], c : c + window[1]] for r, c in some])).float()
        if total is None:
            total = torch.zeros(answers.shape[1], *padded.shape[1:], device=x.device)
        for (r, c), answer in zip(some, answers):
            total[:, r : r + window[0], c : c + window[1]] += answer * weight
            weights[r : r + window[0], c : c + window[1]] += weight
    assert total is not None
    return (total / weights)[:, :high, :wide]


def _starts(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of the windows along one side."""
    if length <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    number = -(-(length - window) // step) + 1
    return [round(n * (length - window) / (number - 1)) for n in range(number)]


def _pyramid(window: tuple[int, int]) -> Tensor:
    rows, columns = (torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).float() for n in window)
    return torch.minimum(rows[:, None] / rows.max(), columns / columns.max())
