"""What training does to an image and its mask. All chance is drawn from the process's generators, which a run saves."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apps.vision.images import fitted, fitted_mask, resized, resized_mask
from apps.vision.native import bordered, native_size, without_border
from apps.vision.recipe import AugmentSection
from core.training.errors import UserError


class Augment:
    """Random crop, mirror, colours and timm's RandAugment, of one image at a time.

    Args:
        options: the recipe's section.
        size: (rows, columns) of the result.
        resize: data.resize, what is done where no random crop is asked for.
        fill: mean of the data per channel, 0 to 255: what RandAugment shows beyond the border.
        patch: side of the model's patches; only resize=native, whose images have sizes of their own, needs it.
    """

    def __init__(self, options: AugmentSection, size: tuple[int, int], resize: str, fill: list[float], patch: int = 1):
        self.options, self.size, self.resize, self.patch = options, size, resize, patch
        self.policy = None
        if options.rand_augment:
            from timm.data.auto_augment import rand_augment_transform

            mean = tuple(round(value) for value in (fill if len(fill) == 3 else fill * 3))
            how = {"translate_const": 0.3 * min(size), "img_mean": mean}
            try:
                self.policy = rand_augment_transform(options.rand_augment, how)
            except (AssertionError, ValueError, KeyError) as error:
                said = f"augment.rand_augment: timm does not know {options.rand_augment!r} {error}".strip()
                raise UserError(f"{said}; it reads words such as rand-m9-mstd0.5-inc1") from error

    def __call__(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """uint8 [C, H, W] and its mask [H, W] -> the same at `size`, and how many rows and columns of it are real."""
        options, real = self.options, self.size
        if options.crop is not None:
            box = self._box(image.shape[1], image.shape[2])
            rows, columns = slice(box[0], box[0] + box[2]), slice(box[1], box[1] + box[3])
            if self.resize == "native":
                real = native_size((box[2], box[3]), self.size, self.patch)
            image = resized(image[:, rows, columns], real)
            mask = None if mask is None else resized_mask(mask[rows, columns], real)
        else:
            image, real = fitted(image, self.size, self.resize, patch=self.patch)
            mask = None if mask is None else fitted_mask(mask, self.size, self.resize)
        for wanted, dim in ((options.flip, -1), (options.flip_rows, -2)):
            if wanted and real == tuple(image.shape[1:]) and torch.rand(()) < 0.5:
                image, mask = image.flip(dim), None if mask is None else mask.flip(dim)
        if options.colour:
            image = self._coloured(image)
        if self.policy is not None:
            image = self._by_policy(image)
        return image, mask, real

    def _box(self, high: int, wide: int) -> tuple[int, int, int, int]:
        """(top, left, rows, columns) of a random crop with about the shape of the result."""
        crop, ratio = self.options.crop, self.options.ratio
        assert crop is not None
        shape = wide / high if self.resize == "native" else self.size[1] / self.size[0]
        for _ in range(10):
            area = high * wide * float(torch.empty(()).uniform_(*crop))
            aspect = shape * float(torch.exp(torch.empty(()).uniform_(*(float(np.log(end)) for end in ratio))))
            rows, columns = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
            if 0 < rows <= high and 0 < columns <= wide:
                top, left = (int(torch.randint(0, spare + 1, ())) for spare in (high - rows, wide - columns))
                return top, left, rows, columns
        columns = min(wide, max(1, round(high * shape)))  # the largest one of the result's shape
        rows = min(high, max(1, round(columns / shape)))
        return (high - rows) // 2, (wide - columns) // 2, rows, columns

    def _coloured(self, image: Tensor) -> Tensor:
        """Brightness, contrast and saturation changed by random factors: blends with black, mean and grey."""
        brightness, contrast, saturation = torch.empty(3).uniform_(1 - self.options.colour, 1 + self.options.colour)
        x = image.float() * brightness
        x = x.mean() * (1 - contrast) + x * contrast
        if len(x) == 3:
            grey = (x * torch.tensor(GREY).view(3, 1, 1)).sum(0)
            x = grey * (1 - saturation) + x * saturation
        return x.clamp(0, 255).to(torch.uint8)

    def _by_policy(self, image: Tensor) -> Tensor:
        picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        changed = torch.from_numpy(np.array(self.policy(picture))).permute(2, 0, 1)  # type: ignore[misc]
        return changed if image.shape[0] == 3 else changed[:1]


GREY = (0.299, 0.587, 0.114)
"""Share of each colour in its grey (ITU-R BT.601)."""


class Mixing:
    """timm's Mixup and CutMix over a batch, and label smoothing: images and classes -> images and soft classes.

    native: images have sizes of their own; timm's mixing for NaFlexViT mixes what two of them have in common.
    """

    def __init__(self, options: AugmentSection, classes: int, *, native: bool = False):
        from timm.data.mixup import Mixup
        from timm.data.naflex_mixup import NaFlexMixup

        self.classes, self.smoothing, self.native = classes, options.smoothing, native
        given: dict[str, Any] = {"mixup_alpha": options.mixup, "cutmix_alpha": options.cutmix}
        given |= {"label_smoothing": self.smoothing, "num_classes": classes}
        self.mixup = (NaFlexMixup if native else Mixup)(**given) if options.mixup or options.cutmix else None

    def __call__(self, images: Tensor, labels: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images [B, C, H, W], of native ones `real` [B, 2], may be changed; the classes come back as [B, K]."""
        from timm.data.mixup import mixup_target

        if self.native and self.mixup is not None and real is not None:
            mixed, soft = self.mixup(without_border(images, real), labels)  # type: ignore[arg-type]
            return bordered(mixed), torch.stack(list(soft))

        def alone(labels: Tensor) -> Tensor:
            return mixup_target(labels, self.classes, 1.0, self.smoothing)

        even = len(images) // 2 * 2 if self.mixup is not None else 0  # timm mixes pairs; an odd one stays as it is
        parts = [alone(labels[even:])] if even < len(images) else []
        if even:
            images[:even], mixed = self.mixup(images[:even], labels[:even])  # type: ignore[misc]
            parts.insert(0, mixed)  # type: ignore[arg-type]
        return images, torch.cat(parts)
