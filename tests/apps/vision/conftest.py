"""What the tests of the vision app share: folders of small images, and a run that was trained on one of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.training.fit import fit
from core.training.recipe import load_recipe

SMALL = [
    "data.size=32",
    "data.shrink=null",
    "model.patch=8",
    "model.stem=patch",
    "model.stem_width=null",
    "backbone.dim=16",
    "backbone.depth=2",
    "backbone.heads=2",
    "backbone.mlp_dim=32",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.epochs=2",
    "trainer.batch_size=8",
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 48), noise: int = 20) -> Path:
    """A noisy image of one colour; size is (rows, columns)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.array(colour) + np.random.randint(-noise, noise + 1, (*size, 3))
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """Class folders red and blue with 20 images each."""
    folder = tmp_path_factory.mktemp("colours")
    np.random.seed(1)
    for name, colour in (("red", (200, 60, 60)), ("blue", (60, 60, 200))):
        for n in range(20):
            paint(folder / name / f"{name}{n}.png", colour)
    return folder


@pytest.fixture(scope="session")
def halves(tmp_path_factory) -> Path:
    """Images whose left or right part is bright, with masks of it (class 1), in train, val and test folders."""
    folder = tmp_path_factory.mktemp("halves")
    np.random.seed(2)
    for part, number in (("train", 16), ("val", 4), ("test", 4)):
        for n in range(number):
            mask = np.zeros((40, 48), dtype=np.uint8)
            edge = np.random.randint(16, 32)
            mask[:, :edge] = 1
            mask[0] = 255
            (folder / part).mkdir(exist_ok=True)
            (folder / f"{part}annot").mkdir(exist_ok=True)
            image = np.where(mask[..., None] == 1, 200, 50) + np.random.randint(-20, 21, (40, 48, 3))
            Image.fromarray(image.astype(np.uint8)).save(folder / part / f"{n}.png")
            Image.fromarray(mask).save(folder / f"{part}annot" / f"{n}.png")
    return folder


@pytest.fixture(scope="session")
def classifier(colours, tmp_path_factory) -> Path:
    """A run that tells red from blue."""
    torch.manual_seed(0)
    recipe = load_recipe("vision/folder", [f"data.path={colours}", *SMALL, "optim.lr=3e-3", "trainer.epochs=6"])
    run = tmp_path_factory.mktemp("runs") / "classifier"
    fit(recipe, run_dir=run, quiet=True, floors=False)
    return run


@pytest.fixture(scope="session")
def segmenter(halves, tmp_path_factory) -> Path:
    """A run that finds the bright part."""
    torch.manual_seed(0)
    given = [f"data.path={halves}", "data.images=PART", "data.masks=PARTannot", "data.ignore=255"]
    quick = ["optim.lr=5e-3", "trainer.epochs=8", "data.resize=stretch", "model.head=multiscale", "model.head_width=8"]
    recipe = load_recipe("vision/segmentation", [*given, *SMALL, *quick])
    run = tmp_path_factory.mktemp("runs") / "segmenter"
    fit(recipe, run_dir=run, quiet=True, floors=False)
    return run
