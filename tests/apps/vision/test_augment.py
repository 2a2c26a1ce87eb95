"""What training does to images: crops, mirrors, colours, mixing; image and mask move together."""

import pytest
import torch

from apps.vision.augment import Augment, Mixing
from apps.vision.images import BORDER, fitted, fitted_mask
from apps.vision.recipe import AugmentSection

MIDDLE = [128.0] * 3


def split_image(rows=40, columns=48, edge=20):
    """Dark at the left, bright at the right, and the mask of it."""
    mask = torch.zeros(rows, columns, dtype=torch.int64)
    mask[:, edge:] = 1
    return (mask * 255).to(torch.uint8).expand(3, -1, -1).clone(), mask


@pytest.mark.parametrize(
    "options", [{"crop": (0.2, 0.9)}, {"flip": True, "flip_rows": True}, {"crop": (0.5, 1), "colour": 0.2}]
)
def test_the_mask_moves_with_its_image(options):
    image, mask = split_image()
    augment = Augment(AugmentSection(**options), (32, 24), "crop", MIDDLE)
    seen = set()
    for _ in range(20):
        changed, moved, real = augment(image, mask)
        assert (changed.shape, moved.shape, real) == ((3, 32, 24), (32, 24), (32, 24))
        bright = changed.float().mean(0) > 128
        assert (bright == (moved == 1)).float().mean() > 0.93  # they differ at the blurred edge only
        seen.add((int(moved.sum()), int(moved[:, 0].sum())))
    assert len(seen) > 1


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_without_a_crop_an_image_is_brought_to_size_as_in_the_evaluation(resize):
    image, mask = split_image()
    augment = Augment(AugmentSection(flip=False), (32, 32), resize, MIDDLE)
    changed, moved, real = augment(image, mask)
    want, shown = fitted(image, (32, 32), resize)
    assert torch.equal(changed, want)
    assert real == shown
    inside = moved[: real[0], : real[1]]
    assert ((changed[0, : real[0], : real[1]] > 128) == (inside == 1)).float().mean() > 0.95
    assert (moved == BORDER).sum() == 32 * 32 - real[0] * real[1]


def test_a_border_of_values_is_not_a_number():
    assert fitted_mask(torch.ones(4, 8), (8, 8), "pad")[4:].isnan().all()


def test_colours_change_but_not_the_shape_of_things():
    image, _ = split_image()
    augment = Augment(AugmentSection(flip=False, colour=0.3), (40, 48), "crop", MIDDLE)
    one, two = augment(image)[0], augment(image)[0]
    assert not torch.equal(one, two)
    assert (one[:, :, 24:].float().mean() - one[:, :, :16].float().mean()) > 100
    grey = Augment(AugmentSection(flip=False, colour=0.3), (40, 48), "crop", [128.0])(image[:1])[0]
    assert grey.shape == (1, 40, 48)


def test_rand_augment_is_timms_and_repeats_with_the_generators():
    import random

    import numpy as np

    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    augment = Augment(AugmentSection(flip=False, rand_augment="rand-m9-mstd0.5-inc1"), (32, 32), "crop", MIDDLE)

    def run():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return torch.stack([augment(image)[0] for _ in range(4)])

    assert torch.equal(run(), run())
    assert not torch.equal(run()[0], run()[1])


def test_a_crop_covers_the_share_of_the_area_that_was_asked_for():
    augment = Augment(AugmentSection(crop=(0.25, 0.5)), (20, 20), "crop", MIDDLE)
    boxes = torch.tensor([augment._box(100, 100) for _ in range(200)])
    share = boxes[:, 2] * boxes[:, 3] / 1e4
    assert 0.24 < share.min() < 0.3
    assert 0.45 < share.max() < 0.51
    assert (boxes[:, 0] + boxes[:, 2] <= 100).all()
    narrow = Augment(AugmentSection(crop=(0.9, 1.0), ratio=(3.0, 4.0)), (20, 20), "crop", MIDDLE)
    assert narrow._box(10, 100) == (0, 45, 10, 10)  # no such crop exists: the largest in shape, from the middle


@pytest.mark.parametrize("number", [4, 5])
def test_mixing_keeps_the_sum_of_the_classes_and_mixes_as_it_says(number):
    images = torch.arange(number).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    labels = torch.arange(number) % 4
    mixed, soft = Mixing(AugmentSection(mixup=1.0), 4)(images.clone(), labels)
    torch.testing.assert_close(soft.sum(1), torch.ones(number))
    # An image that is a share of i and one of j has the classes in these shares.
    wanted = (soft[:4] * torch.arange(4)).sum(1)
    torch.testing.assert_close(mixed[:4, 0, 0, 0], wanted, rtol=0, atol=1e-5)
    if number == 5:
        assert torch.equal(mixed[4], images[4])
    plain, hard = Mixing(AugmentSection(smoothing=0.2), 4)(images.clone(), labels)
    assert torch.equal(plain, images)
    torch.testing.assert_close(hard[1], torch.tensor([0.05, 0.85, 0.05, 0.05]))
