"""Generated scenes: two small striped marks, far apart in a busy image, and the question whether their stripes agree.

Each mark alone says nothing about the label, and neither does the mean of the image: a model has to find both and to
compare them over a distance of more than a third of the scene. The stripes are as bright and as dark one way as the
other, so colour histograms are blind to the label, and they are finer than a thumbnail's pixels. A known share of the
labels is wrong, so the best possible accuracy is known, too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.vision.recipe import GeneratedSection, pair

CLASSES = ("same", "different")
KINDS = ("background", "horizontal", "vertical")
MARK = 16
"""Side of a mark in pixels."""
STRIPE = 4
"""Pixels of a bright and a dark stripe together."""


@dataclass(frozen=True)
class Scenes:
    """All scenes.

    images: uint8 [N, 3, H, W].   labels: [N], what is learned and scored.   truth: [N], without the flips.
    masks: uint8 [N, H, W], see `KINDS`.
    """

    images: Tensor
    labels: Tensor
    truth: Tensor
    masks: Tensor


def generate(options: GeneratedSection) -> Scenes:
    """The scenes of a recipe: a pure function of its section."""
    rows, columns = pair(options.size)
    if rows < 2 * MARK or columns < 4 * MARK:
        raise ValueError(
            f"data.generated.size must be at least {2 * MARK} x {4 * MARK} for two marks, got {rows} x {columns}"
        )
    generator = torch.Generator().manual_seed(options.seed)
    number = options.images

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    images = torch.empty(number, 3, rows, columns, dtype=torch.uint8)
    masks = torch.zeros(number, rows, columns, dtype=torch.uint8)
    kinds = torch.randint(0, 2, (number, 2), generator=generator)
    phase = torch.randint(0, STRIPE, (number, 2), generator=generator)
    top = torch.randint(0, rows - MARK + 1, (number, 2), generator=generator)
    third = columns // 3 - MARK + 1
    left = torch.stack(
        [low + torch.randint(0, max(1, third), (number,), generator=generator) for low in (0, 2 * columns // 3)], 1
    ).clamp(max=columns - MARK)
    at = torch.arange(MARK)
    for n in range(number):
        scene = 0.35 + 0.3 * F.interpolate(uniform(1, 3, 4, 4), size=(rows, columns), mode="bilinear")[0]
        for _ in range(6):  # blocks of colour that mean nothing
            r, c, h, w = (int(x) for x in (uniform(4) * torch.tensor([rows, columns, rows / 3, columns / 3])))
            scene[:, r : r + h + 2, c : c + w + 2] = 0.3 + 0.4 * uniform(3, 1, 1)
        scene += 0.04 * (uniform(3, rows, columns) - 0.5)
        for side in range(2):
            bright = ((at + int(phase[n, side])) % STRIPE < STRIPE // 2).float()
            stripes = bright[:, None].expand(MARK, MARK) if kinds[n, side] == 0 else bright[None].expand(MARK, MARK)
            r, c = int(top[n, side]), int(left[n, side])
            scene[:, r : r + MARK, c : c + MARK] = 0.1 + 0.8 * stripes
            masks[n, r : r + MARK, c : c + MARK] = 1 + int(kinds[n, side])
        images[n] = (scene.clamp(0, 1) * 255).to(torch.uint8)
    truth = (kinds[:, 0] != kinds[:, 1]).long()
    flipped = uniform(number) < options.flipped
    return Scenes(images, truth ^ flipped.long(), truth, masks)
