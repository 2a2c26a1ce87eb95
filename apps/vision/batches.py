"""One part of the data as batches: how an item is read, brought to size and put together with others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apps.vision.augment import Augment
from apps.vision.boxes import BoxAugment
from apps.vision.images import BrokenImage, fitted, read_image, read_mask, read_values, resized_mask, shrunk
from apps.vision.native import bordered
from apps.vision.sources import Item, Store
from core.training.errors import UserError

Fitted = tuple[Tensor, tuple[int, int]]
"""An image at the size that a model sees, and how many of its rows and columns are real."""
READING = ("channels", "resize", "crop_ratio", "shrink", "ignore")
"""Options of `data` that say how an image is read; `predict` reads the next one in the same way. With resize=native
"patch" is there, too: the side of the model's patches."""


class Images(Dataset):
    """One part: images, their classes or masks, as whole batches.

    Items are kept as read (uint8, as large as data.shrink leaves them) with `cache`, else read each time. A batch
    is {"image": uint8 [B, C, H, W], "real": [B, 2] rows and columns that are no border, "index": [B]}, at other sizes
    "sizes", {name: (image, real)}, and "label" [B]
    or [B, K]; or "mask" [B, H, W] in training, and in evaluation a list of masks in their own size; or "boxes", a list
    of [M, 5] per image (see `boxes.py`), in training of what is seen, in evaluation of the whole images, and "shape".
    """

    def __init__(self, part: str, reader: "Reader", items: list[Item], targets: list[Any], augment: Augment | None):
        self.part, self.reader, self.items, self.targets, self.augment = part, reader, items, targets, augment
        self.kept: list[tuple[Tensor, Tensor | None]] | None = None
        self.sizes: list[tuple[int, int]] = []  # others at which the part is scored, too

    def __len__(self) -> int:
        return len(self.items)

    def get(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Image and mask as they are read."""
        try:
            image, mask = self.kept[index] if self.kept is not None else self.reader.read(self.items[index])
        except BrokenImage as error:  # with data.cache=false only the heads of the files were looked at
            raise UserError(
                f"cannot read {self.items[index].told()}: {error}; data.cache=true finds such files before training"
            ) from error
        return image, mask.long() if mask is not None and not mask.is_floating_point() else mask

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        images, masks = [], []
        others: dict[str, list[Fitted]] = {}
        for index in indices:
            image, mask = self.get(index)
            if isinstance(self.augment, BoxAugment):
                image, mask, real = self.augment.boxed(image, self.targets[index])
            elif self.augment is not None:
                smaller = mask if mask is None else resized_mask(mask, (image.shape[1], image.shape[2]))
                image, mask, real = self.augment(image, smaller)
            else:
                for size in self.sizes:
                    others.setdefault(f"at_{size[0]}x{size[1]}", []).append(self.reader.fitted(image, size))
                image, real = self.reader.fitted(image)
            images.append((image, real))
            masks.append(mask)
        x, real = as_batch(images)
        batch: dict[str, Any] = {"image": x, "real": real, "index": torch.tensor(indices), "part": self.part}
        if others:
            batch["sizes"] = {name: as_batch(some) for name, some in others.items()}
        if self.reader.task == "boxes":
            batch["boxes"] = masks if self.augment is not None else [self.targets[index] for index in indices]
            batch["shape"] = [self.items[index].shape for index in indices]
        elif masks[0] is None:
            batch["label"] = torch.stack([torch.as_tensor(self.targets[index]) for index in indices])
        else:
            batch["mask"] = torch.stack(masks) if self.augment is not None else masks
        return batch


def as_batch(images: Sequence[Fitted]) -> tuple[Tensor, Tensor]:
    """Images as `fitted` gives them, as [B, C, H, W] and their real rows and columns [B, 2]."""
    return bordered([image for image, _ in images]), torch.tensor([real for _, real in images])


class Reader:
    """How items are read and brought to size, the same for training and for `predict`."""

    def __init__(self, store: Store | None, task: str, size: tuple[int, int], reading: dict[str, Any]):
        self.store, self.task, self.size, self.reading = store, task, size, reading
        self.classes: int | None = None  # once they are known: masks that are read after that are held against them

    def read(self, item: Item) -> tuple[Tensor, Tensor | None]:
        """Image uint8 [C, H, W] and mask [H, W] of an item.

        Raises:
            BrokenImage: it cannot be read, or the mask has another size than the image.
        """
        assert self.store is not None
        image = read_image(self.store.read(item.image), self.reading["channels"])
        item.shape = (image.shape[1], image.shape[2])
        if item.mask is None:
            return shrunk(image, self.reading["shrink"]), None
        mask = (read_mask if self.task == "segments" else read_values)(self.store.read(item.mask))
        if mask.shape != image.shape[1:]:
            raise BrokenImage(f"its mask has {list(mask.shape)} pixels, the image {list(image.shape[1:])}")
        if self.task == "segments":
            self._check(mask)
            if int(mask.max()) < 256:
                mask = mask.to(torch.uint8)  # an eighth of the memory
        return shrunk(image, self.reading["shrink"]), mask

    def _check(self, mask: Tensor) -> None:
        if self.classes is None:
            return
        wrong = mask[
            (mask >= self.classes) & (mask != (-1 if self.reading["ignore"] is None else self.reading["ignore"]))
        ]
        if len(wrong):
            raise BrokenImage(f"its mask holds the number {int(wrong[0])}; known: 0 to {self.classes - 1}")

    def fitted(self, image: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
        """The image at the model's size, see `images.fitted`."""
        reading = self.reading
        return fitted(image, size or self.size, reading["resize"], reading["crop_ratio"], reading.get("patch", 1))
