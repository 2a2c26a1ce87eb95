"""Reading images and masks of all sorts, and bringing them to size."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from apps.vision.images import (
    BrokenImage,
    check_image,
    fitted,
    normalised,
    read_image,
    read_mask,
    read_values,
    resized_mask,
    shrunk,
)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp() -> np.ndarray:
    return np.arange(6 * 8, dtype=np.uint8).reshape(6, 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_grey_is_read_as_colours_and_as_grey(kind):
    data = saved(Image.fromarray(ramp()), kind)
    assert torch.equal(read_image(data, "grey")[0], torch.from_numpy(ramp()))
    assert torch.equal(read_image(data, "rgb"), torch.from_numpy(ramp()).expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_keep_their_upper_half(kind):
    deep = ramp().astype(np.uint16) * 1000 + 77
    assert torch.equal(
        read_image(saved(Image.fromarray(deep), kind), "grey")[0].int(), torch.from_numpy(deep >> 8).int()
    )


def test_a_camera_that_was_held_sideways():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it upright
    data = saved(Image.fromarray(ramp()), "TIFF", exif=exif)
    assert torch.equal(read_image(data, "grey")[0], torch.from_numpy(np.rot90(ramp(), -1).copy()))


def test_palette_and_transparency_become_colours():
    picture = Image.fromarray(np.full((4, 4, 4), (10, 200, 30, 0), dtype=np.uint8), "RGBA")
    assert read_image(saved(picture, "PNG"), "rgb")[:, 0, 0].tolist() == [10, 200, 30]
    assert read_image(saved(Image.fromarray(ramp()).convert("P"), "GIF"), "rgb").shape == (3, 6, 8)


def test_broken_files_say_why():
    whole = saved(Image.fromarray(np.random.randint(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")
    with pytest.raises(BrokenImage, match="truncated"):
        read_image(whole[: len(whole) // 2], "rgb")
    for data in (b"", b"no image at all"):
        with pytest.raises(BrokenImage, match="not an image"):
            read_image(data, "rgb")
        with pytest.raises(BrokenImage, match="not an image"):
            check_image(data)
    check_image(whole)
    with pytest.raises(BrokenImage, match="floating-point values outside of 0 to 1"):
        read_image(saved(Image.fromarray(np.full((4, 4), 3.0, dtype=np.float32)), "TIFF"), "grey")


def test_masks_hold_numbers_and_values_hold_floats():
    palette = Image.fromarray(ramp() % 4).convert("P")
    palette.putdata((ramp() % 4).flatten().tolist())
    assert torch.equal(read_mask(saved(palette, "PNG")), torch.from_numpy(ramp() % 4).long())
    assert int(read_mask(saved(Image.fromarray(ramp().astype(np.uint16) * 100), "PNG")).max()) == 4700
    with pytest.raises(BrokenImage, match="class numbers"):
        read_mask(saved(Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)), "PNG"))
    depth = np.linspace(-3, 9, 20, dtype=np.float32).reshape(4, 5)
    assert torch.equal(read_values(saved(Image.fromarray(depth), "TIFF")), torch.from_numpy(depth))
    assert float(read_values(saved(Image.fromarray(np.full((2, 2), 65535, dtype=np.uint16)), "PNG")).max()) == 1.0


def test_the_three_ways_to_size():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :, 60:] = 255  # bright right quarter
    cropped, real = fitted(image, (20, 20), "crop")
    assert real == (20, 20)
    assert cropped.shape == (3, 20, 20)
    assert int(cropped[:, :, :-1].max()) == 0  # the middle knows nothing of the right quarter
    stretched, _ = fitted(image, (20, 20), "stretch")
    assert stretched[0, 10].gt(128).sum() == 5
    padded, real = fitted(image, (20, 20), "pad")
    assert real == (10, 20)
    assert int(padded[:, 10:].max()) == 0
    assert padded[0, 5].gt(128).sum() == 5
    narrow, _ = fitted(image, (20, 20), "crop", 0.5)
    assert narrow.shape == (3, 20, 20)


def test_shrinking_keeps_the_shape_and_never_enlarges():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    assert shrunk(image, 20).shape == (3, 20, 40)
    assert shrunk(image, 50) is image


def test_masks_are_never_blended():
    mask = torch.tensor([[0, 9], [9, 0]])
    assert set(resized_mask(mask, (7, 5)).unique().tolist()) == {0, 9}


def test_normalised_values_have_mean_and_deviation():
    images = torch.randint(0, 256, (4, 3, 50, 50), dtype=torch.uint8)
    values = images.double() / 255
    mean, std = values.mean((0, 2, 3)).float(), values.std((0, 2, 3)).float()
    x = normalised(images, mean, std)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
