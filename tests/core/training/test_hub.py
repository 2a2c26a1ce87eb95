"""Data sets of the hub's library: class names for class numbers, images undecoded, splits by name; no network."""

import datasets
import numpy as np
import pytest
from PIL import Image

from core.training.errors import UserError
from core.training.hub import named, names_split, splits
from core.training.rows import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same four rows saved as a data set, as one with two splits, and as the Parquet files of a repository."""
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("hub")
    kinds = datasets.ClassLabel(names=["zebra", "ant"])
    features = datasets.Features(
        {"image": datasets.Image(), "label": kinds, "tags": datasets.List(datasets.ClassLabel(names=["x", "y"]))}
    )
    images = [Image.fromarray(np.full((8, 8, 3), 30 * n, np.uint8)) for n in range(4)]
    values = {"image": images, "label": [0, 1, 1, -1], "tags": [[0], [0, 1], [], [1]]}
    train = datasets.Dataset.from_dict(values, features=features)
    both = datasets.DatasetDict({"train": train, "validation": train.select([0])})
    train.save_to_disk(str(folder / "one"))
    both.save_to_disk(str(folder / "both"))
    (folder / "repo" / "data").mkdir(parents=True)
    for name, part in both.items():
        part.to_parquet(str(folder / "repo" / "data" / f"{name}-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize("place", ["one", "both", "both:train", "repo", "repo/data/train-00000-of-00001.parquet"])
def test_class_numbers_become_names_and_images_stay_undecoded(folder, place, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    source = folder / place if place.endswith("parquet") else f"hub:{folder / place}"
    rows = list(read_rows(source, columns=["image", "label"]))
    # The number -1 says that nobody knows.
    assert [row.values["label"] for row in rows] == ["zebra", "ant", "ant", None]
    assert [row.values["tags"] for row in rows] == [["x"], ["x", "y"], [], ["y"]]
    assert rows[1].values["image"]["bytes"][1:4] == b"PNG"
    assert rows[1].where == f"{source}, row 2"


def test_splits_go_by_name_and_an_unknown_one_is_named(folder):
    assert splits(f"hub:{folder / 'both'}") == ["train", "validation"]
    assert splits(f"hub:{folder / 'one'}") == ["train"]
    assert len(list(read_rows(f"hub:{folder / 'both'}:validation"))) == 1
    assert names_split("hub:org/name@cfg:test[:10]")
    assert not names_split("hub:org/name@cfg")
    with pytest.raises(UserError, match=r"no split 'valdation' \(did you mean 'validation'\?\); splits: train, valid"):
        read_rows(f"hub:{folder / 'both'}:valdation")
    with pytest.raises(UserError, match=r"no column 'labl'.*did you mean 'label'"):
        read_rows(f"hub:{folder / 'both'}", columns=["labl"])


def test_names_are_found_at_any_depth():
    kind = datasets.ClassLabel(names=["a", "b"])
    features = {"things": datasets.List({"kind": kind, "size": datasets.Value("int64")}), "free": kind}
    given = {"things": [{"kind": 1, "size": 1}, {"kind": 0, "size": 0}], "free": None}
    assert named(given, features) == {"things": [{"kind": "b", "size": 1}, {"kind": "a", "size": 0}], "free": None}
