"""Images of the hub's data sets: classes by name, parts by split, images and masks from their bytes."""

import datasets
import numpy as np
import pytest
from PIL import Image

from apps.vision.data import build_data
from core.training.data import train_loader
from core.training.errors import UserError
from core.training.recipe import load_recipe

KINDS = datasets.ClassLabel(names=["red", "blue"])


def coloured(kinds):
    draw = np.random.default_rng(len(kinds))
    middle = [(200, 60, 60), (60, 60, 200)]
    return [
        Image.fromarray((np.array(middle[k]) + draw.integers(-20, 21, (12, 16, 3))).astype(np.uint8)) for k in kinds
    ]


def saved(folder, splits, **columns):
    """A data set of coloured images on disk; splits: how many rows each has."""
    datasets.disable_progress_bars()
    found = {}
    for name, number in splits.items():
        kinds = [n % 2 for n in range(number)]
        values = {"image": coloured(kinds), "label": kinds} | {key: make(kinds) for key, (make, _) in columns.items()}
        features = {"image": datasets.Image(), "label": KINDS} | {key: kind for key, (_, kind) in columns.items()}
        found[name] = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    datasets.DatasetDict(found).save_to_disk(str(folder))
    return f"hub:{folder}"


def data_of(address, *more, recipe="vision/folder"):
    given = [f"data.path={address}", "data.image_column=image", "data.size=16", "model.patch=8"]
    return build_data(load_recipe(recipe, [*given, *more]))


def test_splits_are_parts_and_classes_have_their_names(tmp_path):
    address = saved(tmp_path, {"train": 12, "validation": 4, "test": 6, "unsupervised": 2})
    data = data_of(address)
    assert data.spec["classes"] == ["blue", "red"]
    assert data.spec["counts"] == [6, 6]
    assert data.summary["images"] == {"train": 12, "val": 4, "test": 6}
    assert data.summary["splits_not_read"] == ["unsupervised"]
    batch = next(iter(train_loader(data, batch_size=12, seed=0)))
    redder = batch["image"][:, 0].float().mean((1, 2)) > batch["image"][:, 2].float().mean((1, 2))
    assert (redder.long() == batch["label"]).all()
    # One split alone is cut by the shares.
    assert data_of(f"{address}:train").summary["images"] == {"train": 8, "val": 2, "test": 2}
    with pytest.raises(UserError, match=r"no split is called train; name one of full, as in .*:full"):
        data_of(saved(tmp_path / "other", {"full": 4}))


def test_labels_and_masks_come_from_their_features_too(tmp_path):
    many = (lambda kinds: [[k, 2] for k in kinds], datasets.List(datasets.ClassLabel(names=["red", "blue", "any"])))
    mask = (lambda kinds: [Image.fromarray(np.full((12, 16), k, np.uint8)) for k in kinds], datasets.Image())
    address = saved(tmp_path, {"train": 12, "test": 6}, tags=many, annotation=mask)
    quiet = ["augment.cutmix=0", "augment.smoothing=0"]
    data = data_of(address, "model.task=labels", "data.label_column=tags", *quiet)
    assert data.spec["classes"] == ["any", "blue", "red"]
    assert data.test.targets[0] == [1.0, 0.0, 1.0]
    data = data_of(address, "data.masks=annotation", recipe="vision/segmentation")
    assert data.spec["classes"] == ["0", "1"]
    assert data.test.get(1)[1].unique().tolist() == [1]


def test_rows_without_a_class_or_an_image_are_named(tmp_path):
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": KINDS})
    rows = {"image": coloured([0, 1, 0, 1]), "label": [0, 1, -1, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"row 3: label is empty"):
        data_of(f"hub:{tmp_path / 'a'}")
    without = datasets.Dataset.from_dict({"image": coloured([0, 1]), "mask": [None, None]})
    without.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "m"))
    with pytest.raises(UserError, match=r"row 1: mask is empty"):
        data_of(f"hub:{tmp_path / 'm'}", "data.masks=mask", recipe="vision/segmentation")
    images = [{"bytes": b"no image", "path": "bad.png"}, None, *coloured([0, 1, 0, 1, 0, 1])]
    rows = {"image": images, "label": [0, 1, 0, 1, 0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"cannot read bad.png \(hub:.*, row 1\): not an image \(and 1 more\); data"):
        data_of(f"hub:{tmp_path / 'b'}")
    summary = data_of(f"hub:{tmp_path / 'b'}", "data.on_broken=skip", "data.test_share=0").summary
    assert summary["broken"]["files"] == [
        f"bad.png (hub:{tmp_path / 'b'}:train, row 1): not an image",
        f"hub:{tmp_path / 'b'}:train, row 2: the cell is empty",
    ]
