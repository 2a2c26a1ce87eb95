"""What `inspect` and the contact sheet show: rows and fields lie where their query is, on images of any shape."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from apps.vision.drawings import _colours, _panel, draw_attention, draw_strip, draw_strips
from apps.vision.task import build_task
from apps.vision.views import look_at, receptive_field, rows_of, special_token
from core.attention import available
from core.attention.registry import variant_class
from core.training.errors import UserError
from core.training.ledger import Plan, Run, append_run, write_plan
from core.training.predict import inspect
from core.training.recipe import load_recipe

SIZE, PATCH = (64, 96), 8
GRID = (8, 12)
TWO_SIDED = [name for name in available() if "bidirectional" in variant_class(name).can and name != "auto"]


def build(*given, depth=2):
    torch.manual_seed(0)
    small = ["backbone.dim=16", "backbone.heads=2", "backbone.mlp_dim=32", f"backbone.depth={depth}"]
    more = [f"data.size={list(SIZE)}", f"model.patch={PATCH}", "model.stem=patch", "model.stem_width=null"]
    spec = {"task": "classes", "classes": ["a", "b"], "counts": [1, 1], "size": list(SIZE), "mean": [0.5] * 3}
    spec |= {"std": [0.2] * 3, "reading": {}}
    return build_task(load_recipe("vision/folder", [*small, *more, *given]), spec).eval().model


def picture(model, real=None):
    shown = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    limits = None if real is None else torch.tensor([real])
    return look_at(model, shown, shown[None] / 50 - 2.5, limits)


def within(query, radius):
    rows, columns = (torch.arange(n) for n in GRID)
    return ((rows - query[0]).abs() <= radius)[:, None] & ((columns - query[1]).abs() <= radius)


@pytest.mark.parametrize("before", [[], ["model.registers=2", "model.pool=token"]])
@pytest.mark.parametrize("query", [(3, 7), (0, 11), (7, 0)])
def test_the_row_of_a_window_lies_around_its_query(before, query):
    model = build("attention=window2d", "attention.window=2", *before)
    image = picture(model)
    assert (image.grid, image.first) == (GRID, 3 if before else 0)
    for rows in rows_of(model, image, [query], special=False):
        assert torch.equal(rows.grid[0] > 0, within(query, 1))
        torch.testing.assert_close(rows.grid[0].sum() + rows.before[0], torch.tensor(1.0))
    alone = build("attention=window2d", "attention.window=1", *before)
    assert torch.equal(rows_of(alone, picture(alone), [query], special=False)[0].grid[0] > 0, within(query, 0))


def test_the_class_token_of_the_own_and_of_a_timm_model_comes_first():
    own = build("attention=window2d", "attention.window=1", "model.registers=2", "model.pool=token")
    assert special_token(own, picture(own)) == "class token"
    registers = build("attention=softmax", "model.registers=2")
    assert special_token(registers, picture(registers)) == "first register"
    plain = build("attention=softmax")
    assert special_token(plain, picture(plain)) is None
    more = ["model.timm=test_vit", "model.patch=16", "attention=window2d", "attention.window=1"]
    timm = build(*more)
    image = picture(timm)
    assert (image.grid, image.first, special_token(timm, image)) == ((4, 6), 1, "class token")
    token, other = rows_of(timm, image, [(2, 5)], special=True)[0].grid
    assert (token > 0).all()  # it sees every token, and is seen by every token
    assert other.argmax() == 2 * 6 + 5
    assert (other > 0).sum() == 1


@pytest.mark.parametrize("query", [(3, 7), (0, 11)])
@pytest.mark.parametrize(("depth", "window"), [(1, 2), (2, 2), (2, 3)])
def test_the_field_of_windows_ends_at_depth_times_radius(query, depth, window):
    model = build("attention=window2d", f"attention.window={window}", depth=depth)
    field = receptive_field(model, picture(model), query)
    assert field.shape == SIZE
    assert field.max() == 1
    touched = field.unflatten(0, (GRID[0], PATCH)).unflatten(2, (GRID[1], PATCH)).amax((1, 3)) > 0
    assert torch.equal(touched, within(query, depth * (window - 1)))


@pytest.mark.parametrize("given", [["attention=softmax"], ["attention=hybrid2d", "attention.window=2"]])
def test_the_field_of_what_sees_all_is_the_whole_image(given):
    model = build(*given, depth=1)
    assert (receptive_field(model, picture(model), (3, 7)) > 0).all()


@pytest.mark.parametrize("variant", TWO_SIDED)
def test_every_two_sided_attention_has_rows_and_a_field(variant):
    model = build(f"attention={{variant: {variant}}}", depth=1)
    image = picture(model)
    (rows,) = rows_of(model, image, [(3, 7), (0, 0)], special=False)
    assert rows.variant == variant
    assert rows.grid.shape == (2, *GRID)
    assert torch.isfinite(rows.grid).all()
    assert rows.grid.abs().sum() > 0
    if variant in ("softmax", "linear", "window", "window2d", "hybrid", "hybrid2d", "inline", "lolcats"):
        torch.testing.assert_close(rows.grid.sum((1, 2)), torch.ones(2), atol=1e-4, rtol=1e-4)
    field = receptive_field(model, image, (3, 7))
    assert torch.isfinite(field).all()
    assert field[3 * PATCH : 4 * PATCH, 7 * PATCH : 8 * PATCH].max() > 0, "a token feels its own pixels"


def test_a_border_is_neither_read_nor_asked(tmp_path):
    model = build("attention=softmax", "data.resize=pad", "model.texture=false")
    image = picture(model, real=(40, 96))
    assert image.tokens([(0.5, 0.5), (1, 1), (0, 0)]) == [(2, 6), (4, 11), (0, 0)]
    (rows, _) = rows_of(model, image, [(2, 6)], special=False)
    assert (rows.grid[0, 5:] == 0).all()
    assert (receptive_field(model, image, (2, 6))[40:] == 0).all()


def test_the_panel_of_a_query_has_its_cross_on_the_query():
    model = build("attention=window2d", "attention.window=1")
    image, query = picture(model), (6, 2)
    axes = Figure().subplots()
    _panel(axes, image, rows_of(model, image, [query], special=False)[0], 0, query)
    left, right, bottom, top = axes.images[-1].get_extent()
    assert (left, right, bottom, top) == (-0.5, SIZE[1] - 0.5, SIZE[0] - 0.5, -0.5)
    drawn = axes.images[-1].get_array()
    hot = np.unravel_index(drawn[..., 3].argmax(), GRID)
    assert hot == query
    (x,), (y,) = axes.lines[0].get_data()
    assert (int((y + 0.5) // PATCH), int((x + 0.5) // PATCH)) == query
    assert axes.get_xlabel() == "max 1, sum 1.00"


def test_colours_tell_what_is_negative_from_what_is_large():
    red, _, blue, _ = np.moveaxis(_colours(np.array([[0.0, 1.0, -1.0, 0.01]])), -1, 0)[:, 0]
    assert red[0] < 0.1 > blue[0]  # dark
    assert red[1] > 0.9  # yellow
    assert blue[2] > 2 * red[2]
    assert red[3] > red[0], "a hundredth of the largest weight shows"


def test_pictures_of_one_and_of_several_models(tmp_path):
    models = {"softmax": build("attention=softmax"), "linear": build("attention=linear")}
    images = {label: picture(model) for label, model in models.items()}
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    draw_strip(one, models["softmax"], images["softmax"])
    draw_strips(two, models, images, [(0.5, 0.5)])
    with Image.open(one) as a, Image.open(two) as b:
        assert a.size[0] == b.size[0]
        assert b.size[1] > 1.5 * a.size[1]
    draw_attention(tmp_path / "all.png", models["linear"], images["linear"])


def test_every_run_leaves_a_strip_of_its_first_test_image(classifier, segmenter):
    for run in (classifier, segmenter):
        with Image.open(run / "inside.png") as strip:
            assert strip.size[0] > 3 * strip.size[1]


def test_a_comparison_is_inspected_side_by_side(classifier, colours, tmp_path):
    folder = tmp_path / "compared"
    folder.mkdir()
    plan = Plan("vision/folder", "vision", "accuracy", "higher", {"softmax": {}, "linear:conv=3": {}}, (0, 1))
    write_plan(folder, plan)
    with pytest.raises(UserError, match="holds no finished run yet"):
        inspect(folder, colours / "red" / "red0.png", tmp_path / "look")
    for label in plan.variants:
        append_run(folder, Run(label, 1, (), "ok", None, {}, {}, 1.0, str(classifier)))
    files = inspect(folder, colours / "red" / "red0.png", tmp_path / "look", ["predict.places=[[0.5,0.5],[0,1]]"])
    assert [str(file.relative_to(tmp_path / "look")) for file in files] == [
        "softmax/red0_attention.png",
        "softmax/red0_field.png",
        "linear-conv=3/red0_attention.png",
        "linear-conv=3/red0_field.png",
        "red0_sheet.png",
    ]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)


def test_two_images_under_one_name_are_refused(classifier, colours, tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.open(colours / "red" / "red0.png").save(tmp_path / name)
    with pytest.raises(UserError, match=r"a.jpg and a.png would be written under one name; rename one of them"):
        inspect(classifier, tmp_path, tmp_path / "look")
