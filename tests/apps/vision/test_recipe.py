"""What a recipe may not say, in one line each."""

import pytest

from core.training.errors import UserError
from core.training.recipe import load_recipe


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["data.path=x", "data.generated={images: 20}"], "give one of the two"),
        (["data.val_share=0.6", "data.test_share=0.5"], "must leave training images"),
        (["data.mean=[0.5,0.5,0.5]"], "mean and std go together"),
        (["data.masks=masks"], "belong to model.task=segments or values"),
        (["model.task=segments"], "needs data.masks"),
        (["model.task=labels"], "are for task=classes, the task is labels; say augment.cutmix=0 augment.smoothing=0"),
        (["augment.crop=[0.9,0.2]"], r"crop must be \[smallest, largest\]"),
        (["augment.crop=[0.9,1.2]"], "at most 1"),
        (["model.weights=x.pth"], "name it in model.timm"),
        (["model.convert_from=run", "model.pretrained=run"], "brings its own weights"),
        (["model.head=multiscale"], "head=multiscale is for segments and values"),
        (["model.patch=12"], "patch must be a power of 2, got 12"),
        (["model.stem=patch", "model.stem_width=8"], "stem_width belongs to stem=conv and stem=residual"),
        (["model.stem=residual", "model.patch=12"], "stem=residual halves the image, so patch must be a power of 2"),
        (["model.stem=patch", "model.texture=true"], "texture reads the maps of the stem, so it wants stem=residual"),
        (["model.texture=true", "data.resize=pad"], "model.texture would read the border of data.resize=pad"),
        (
            ["model.timm=vit_tiny_patch16_224"],
            "stem belongs to the plain backbone, .* has its own; say model.stem=patch",
        ),
        (["data.size=0"], r"data.size: a size is a number of pixels, or \[rows, columns\], each at least 1; got 0"),
        (["model.eval_sizes=[[3]]"], r"model.eval_sizes.0: a size is a number of pixels, .*; got \[3\]"),
        (["data.classes=[red,blue,red]"], "classes has 'red' twice"),
        (["predict.places=[[0.5,1.5]]"], "places.* less than or equal to 1, got 1.5"),
        (["data.ignore=255"], "data.masks names none"),
        (["model.stemm=conv"], "did you mean 'stem'"),
    ],
)
def test_what_contradicts_itself_is_refused(given, text):
    with pytest.raises(UserError, match=text) as error:
        load_recipe("vision/folder", given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["augment.rand_augment=rand-m9"], "move or hide pixels without their mask"),
        (["augment.mixup=0.5"], "augment.mixup is for task=classes, the task is segments; say augment.mixup=0"),
        (["model.timm=vit_tiny_patch16_224", "model.stem=patch", "data.resize=pad"], "use crop or stretch"),
    ],
)
def test_what_masks_do_not_go_with(given, text):
    with pytest.raises(UserError, match=text):
        load_recipe("vision/segmentation", given)


def test_each_task_is_judged_by_its_own_metric():
    metrics = {
        "vision/folder": None,
        "vision/segmentation": ("miou", "higher"),
    }
    for name, judge in metrics.items():
        assert load_recipe(name).judged_by() == judge
    given = ["model.task=labels", "augment.cutmix=0", "augment.smoothing=0"]
    assert load_recipe("vision/folder", given).judged_by() == ("f1_macro", "higher")
    assert load_recipe("vision/segmentation", ["model.task=values"]).judged_by() == ("mse", "lower")
