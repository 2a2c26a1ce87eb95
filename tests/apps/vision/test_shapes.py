"""The table of image sizes by class, from decoded images and from heads alone; and the floor of sizes."""

import csv

import numpy as np
import pytest
from PIL import Image

from apps.vision.baselines import floors
from apps.vision.data import build_data
from core.training.recipe import load_recipe


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """Class folders whose images are told apart by their size, and by their kind."""
    folder = tmp_path_factory.mktemp("leaky")
    draw = np.random.default_rng(0)
    for name, shape, suffix in (("tall", (40, 24), ".png"), ("wide", (24, 40), ".jpg")):
        (folder / name).mkdir()
        for n in range(12):
            values = draw.integers(0, 255, (shape[0] + n % 3, shape[1], 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / name / f"{n}{suffix}")
    turned = Image.new("RGB", (90, 24))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn: 90 rows and 24 columns when upright
    turned.save(folder / "tall" / "turned.jpg", exif=exif)
    return folder


def recipe_of(folder, *more):
    return load_recipe("vision/folder", [f"data.path={folder}", "data.size=32", "model.patch=8", *more])


@pytest.mark.parametrize("cache", ["true", "false"])
def test_sizes_and_kinds_of_files_by_class(leaky, cache):
    data = build_data(recipe_of(leaky, f"data.cache={cache}", "data.shrink=8"))
    tall, wide = data.spec["image_sizes"]
    assert tall == {
        "class": "tall",
        "images": 13,
        "rows_least": 40,
        "rows_median": 41,
        "rows_most": 90,
        "columns_least": 24,
        "columns_median": 24,
        "columns_most": 24,
        "files": ".png:12 .jpg:1",
    }
    assert (wide["images"], wide["rows_most"], wide["files"]) == (12, 26, ".jpg:12")
    assert data.summary["median_rows_x_columns_by_class"] == {"tall": "41x24", "wide": "25x40"}


def test_a_floor_says_what_the_size_alone_gives_away(leaky, colours):
    recipe = recipe_of(leaky)
    found = floors(recipe, build_data(recipe))
    assert found["shape"]["accuracy"] == 1.0 > found["majority"]["accuracy"]
    recipe = recipe_of(colours)
    assert "shape" not in floors(recipe, build_data(recipe))  # where all are alike


def test_classes_of_masks_are_named_and_a_run_has_the_table(halves, segmenter):
    given = ["data.images=PART", "data.masks=PARTannot", "data.ignore=255", "data.classes=[dark,bright]"]
    data = build_data(load_recipe("vision/segmentation", [f"data.path={halves}", "data.size=32", *given]))
    assert [(row["class"], row["images"]) for row in data.spec["image_sizes"]] == [
        ("dark", 24),
        ("bright", 24),
        ("(ignored 255)", 24),
    ]
    rows = list(csv.DictReader((segmenter / "image_sizes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == ["0", "1", "(ignored 255)"]
    assert {row["rows_median"] for row in rows} == {"40"}
