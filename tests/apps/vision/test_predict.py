"""`predict` on a user's images: names and sizes kept, the same answers as in the test, flips, windows, mistakes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from apps.vision.images import normalised, read_image, read_values
from apps.vision.predict import segment
from apps.vision.tiling import slide
from core.training.errors import UserError
from core.training.fit import fit
from core.training.predict import inspect, predict
from core.training.recipe import load_recipe
from core.training.run import load_run
from tests.apps.vision.conftest import SMALL


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_folder_becomes_a_table_with_the_answers_of_the_test(classifier, colours, tmp_path):
    (written,) = predict(classifier, colours, tmp_path / "out" / "answers.csv")
    rows = {row["image"]: row for row in table(written)}
    assert len(rows) == 40
    assert list(rows["red/red0.png"]) == ["image", "predicted", "p_blue", "p_red"]
    for tested in table(classifier / "test_predictions.csv"):
        assert float(rows[tested["image"]]["p_red"]) == pytest.approx(float(tested["p_red"]), abs=2e-5)
    assert all(row["predicted"] == row["image"].split("/")[0] for row in rows.values())


def test_one_file_flips_and_another_size(classifier, colours, tmp_path):
    file = colours / "red" / "red1.png"
    plain, flipped, larger = (
        table(predict(classifier, file, tmp_path / f"{n}.csv", more)[0])[0]
        for n, more in enumerate([[], ["predict.flips=true"], ["predict.size=64"]])
    )
    assert plain["image"] == "red1.png"
    assert plain["predicted"] == flipped["predicted"] == "red"
    assert plain["p_red"] != flipped["p_red"] != larger["p_red"]
    with pytest.raises(
        UserError, match=r"predict.size=\[50, 50\] does not divide into patches of 8; the nearest size is \[48, 48\]"
    ):
        predict(classifier, file, tmp_path / "x.csv", ["predict.size=50"])


def test_flips_make_the_answer_the_same_for_the_mirror_image(classifier, colours, tmp_path):
    image = Image.open(colours / "blue" / "blue1.png")
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "a.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "in" / "b.png")
    one, two = table(predict(classifier, tmp_path / "in", tmp_path / "o.csv", ["predict.flips=true"])[0])
    assert float(one["p_red"]) == pytest.approx(float(two["p_red"]), abs=2e-5)


def test_masks_have_the_size_and_names_of_their_images(segmenter, halves, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    Image.open(halves / "test" / "0.png").resize((75, 50)).save(tmp_path / "in" / "deep" / "scan.png")
    files = predict(segmenter, tmp_path / "in", tmp_path / "masks")
    assert [str(file.relative_to(tmp_path / "masks")) for file in files] == ["deep/scan.png", "deep/scan_overlay.png"]
    mask = np.array(Image.open(files[0]))
    assert mask.shape == (50, 75)
    truth = np.array(Image.open(halves / "testannot" / "0.png").resize((75, 50), Image.Resampling.NEAREST))
    known = truth != 255
    assert (mask == truth)[known].mean() > 0.85
    assert np.array(Image.open(files[1])).shape == (50, 75, 3)


def test_no_answer_takes_the_place_of_an_image_or_of_another_answer(segmenter, halves, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.open(halves / "test" / "0.png").save(photos / "a.png")
    before = (photos / "a.png").read_bytes()
    with pytest.raises(UserError, match="is the input itself"):
        predict(segmenter, photos, photos)
    with pytest.raises(UserError, match=r"a\.png would be written over; choose another folder"):
        predict(segmenter, photos / "a.png", photos)
    Image.open(halves / "test" / "1.png").convert("RGB").save(photos / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg and a\.png would both be answered in .*masks/a\.png; rename one"):
        predict(segmenter, photos, tmp_path / "masks")
    assert (photos / "a.png").read_bytes() == before
    assert not (tmp_path / "masks").exists()


def test_a_window_that_holds_the_image_gives_what_the_whole_gives(segmenter, halves, monkeypatch):
    run = load_run(segmenter)
    image = read_image(halves / "test" / "1.png", "rgb")[:, :32, :32]
    whole = segment(run.task, run.recipe, image)
    run.recipe.predict.window = 32
    with torch.no_grad():
        torch.testing.assert_close(segment(run.task, run.recipe, image), whole)
        # Larger images are seen window by window, and every pixel gets an answer.
        larger = read_image(halves / "test" / "1.png", "rgb")
        answer = segment(run.task, run.recipe, larger)
    assert answer.shape == (2, 40, 48)
    assert torch.isfinite(answer).all()
    bright = normalised(larger[None], run.task.mean, run.task.std)[0].mean(0) > 0
    assert (answer.argmax(0) == bright).float().mean() > 0.85


@pytest.mark.parametrize(("high", "wide"), [(20, 20), (23, 41), (10, 64), (64, 7)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_sliding_equals_the_whole_where_an_answer_needs_its_pixel_only(high, wide, overlap):
    def pixelwise(x):
        return torch.stack((x.sum(1), x[:, 0] * 2), 1)

    x = torch.randn(3, high, wide)
    got = slide(pixelwise, x, (16, 12), overlap=overlap, batch=3)
    torch.testing.assert_close(got, pixelwise(x[None])[0])


def test_mistakes_name_the_file_and_what_would_be_right(classifier, segmenter, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read .*broken.png: not an image"):
        predict(classifier, tmp_path / "broken.png", tmp_path / "o.csv")
    with pytest.raises(UserError, match=r"classes are written to a .csv file"):
        predict(classifier, tmp_path / "broken.png", tmp_path / "o.png")
    with pytest.raises(UserError, match=r"masks are written to a folder"):
        predict(segmenter, tmp_path / "broken.png", tmp_path / "o.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images; known suffixes"):
        predict(classifier, tmp_path / "empty", tmp_path / "o.csv")
    run = load_run(segmenter)
    run.recipe.predict.window = 30
    with pytest.raises(UserError, match=r"predict.window=\[30, 30\] does not divide into patches of 8"):
        segment(run.task, run.recipe, torch.zeros(3, 40, 40, dtype=torch.uint8))


def test_inspect_draws_attention_and_field_of_every_image(classifier, segmenter, colours, halves, tmp_path):
    files = inspect(classifier, colours / "red" / "red0.png", tmp_path / "look")
    files += inspect(segmenter, halves / "test" / "0.png", tmp_path / "look")
    assert [file.name for file in files] == [
        "red0_attention.png",
        "red0_field.png",
        "0_attention.png",
        "0_field.png",
    ]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)


def test_a_table_of_a_run_that_skips_broken_images_names_them(classifier, tmp_path):
    run = json.loads((classifier / "config.json").read_text())
    assert run["recipe"]["data"]["on_broken"] == "error"  # settings of reading are the run's; predict.* may change
    with pytest.raises(UserError, match=r"predict"):
        predict(classifier, tmp_path, tmp_path / "o.csv", ["data.on_broken=skip"])


@pytest.fixture(scope="module")
def labeller(colours, tmp_path_factory):
    """A run that says which colours an image has: red, blue, or both; "bright" is never there in training."""
    folder = tmp_path_factory.mktemp("labels")
    draw = np.random.default_rng(3)
    lines = ["path,label"]
    for n in range(48):
        kinds = [["red"], ["blue"], ["red", "blue"]][n % 3]
        values = np.zeros((24, 32, 3)) + 40
        for kind in kinds:
            values[:, slice(0, 16) if kind == "red" else slice(16, 32), 0 if kind == "red" else 2] = 220
        Image.fromarray((values + draw.integers(-20, 21, values.shape)).clip(0, 255).astype(np.uint8)).save(
            folder / f"{n}.png"
        )
        lines.append(f"{n}.png,{';'.join(kinds)}")
    (folder / "t.csv").write_text("\n".join(lines))
    more = ["model.task=labels", "augment.cutmix=0", "augment.smoothing=0", "augment.flip=false", "augment.crop=null"]
    more += ["data.resize=stretch", "data.classes=[red,blue,none]", "optim.lr=1e-2", "trainer.epochs=8", "optim.ema=0"]
    run = tmp_path_factory.mktemp("runs") / "labeller"
    torch.manual_seed(0)
    fit(
        load_recipe("vision/folder", [f"data.path={folder / 't.csv'}", *SMALL, *more]),
        run_dir=run,
        quiet=True,
        floors=False,
    )
    return run, folder


def test_several_labels_each_have_their_own_probability(labeller, tmp_path):
    run, folder = labeller
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, n in (("both.png", 2), ("deep/blue.png", 1), ("red.png", 0)):
        Image.open(folder / f"{n}.png").resize((80, 44)).save(tmp_path / "in" / name)
    rows = {row["image"]: row for row in table(predict(run, tmp_path / "in", tmp_path / "o.csv")[0])}
    assert {name: row["predicted"] for name, row in rows.items()} == {
        "both.png": "red;blue",
        "deep/blue.png": "blue",
        "red.png": "red",
    }
    assert list(rows["red.png"]) == ["image", "predicted", "p_red", "p_blue", "p_none"]
    sums = {name: sum(float(row[f"p_{kind}"]) for kind in ("red", "blue", "none")) for name, row in rows.items()}
    assert sums["both.png"] > 1.2  # no share of one: each label stands for itself
    for row in table(run / "test_predictions.csv"):
        (one,) = table(predict(run, folder / row["image"], tmp_path / "one.csv")[0])
        assert one["predicted"] == row["predicted"]
        assert float(one["p_red"]) == pytest.approx(float(row["p_red"]), abs=2e-5)
    # Where nothing is likely the cell is empty, and the probabilities say so.
    Image.fromarray(np.full((24, 32, 3), 40, np.uint8)).save(tmp_path / "dark.png")
    (dark,) = table(predict(run, tmp_path / "dark.png", tmp_path / "dark.csv")[0])
    assert all(float(dark[f"p_{kind}"]) <= 0.5 for kind in ("red", "blue", "none")) == (dark["predicted"] == "")


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """A run that gives the brightness of each pixel as a value."""
    folder = tmp_path_factory.mktemp("levels")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for n in range(20):
        level = np.full((32, 32), 20 + 11 * n, dtype=np.uint8)
        level[:, 16:] //= 2
        Image.fromarray(level).save(folder / "images" / f"{n}.png")
        Image.fromarray(level).save(folder / "masks" / f"{n}.png")
    more = ["model.task=values", "model.class_balance=0", "augment.colour=0", "trainer.epochs=30", "optim.lr=1e-2"]
    more += ["model.head=plain", "optim.ema=0", "data.resize=stretch"]
    run = tmp_path_factory.mktemp("runs") / "levels"
    torch.manual_seed(0)
    fit(
        load_recipe("vision/segmentation", [f"data.path={folder}", *SMALL, *more]),
        run_dir=run,
        quiet=True,
        floors=False,
    )
    return run, folder


@pytest.mark.parametrize("more", [[], ["predict.window=32"], ["predict.flips=true"]])
def test_values_come_as_floats_in_the_size_and_under_the_name_of_their_image(levels, tmp_path, more):
    run, _ = levels
    (tmp_path / "in" / "deep").mkdir(parents=True)
    picture = np.full((40, 56), 180, np.uint8)
    picture[:, 28:] = 60
    Image.fromarray(picture).save(tmp_path / "in" / "deep" / "scan.tif")
    Image.fromarray(picture).save(tmp_path / "in" / "scan.jpg")
    files = predict(run, tmp_path / "in", tmp_path / "out", more)
    assert [str(file.relative_to(tmp_path / "out")) for file in files] == ["deep/scan.tif", "scan.tif"]
    for file in files:
        with Image.open(file) as image:
            assert image.mode == "F"
            values = np.array(image)
        assert values.shape == (40, 56)
        assert values[:, :20].mean() > values[:, 36:].mean() + 0.2
        assert values[:, :20].mean() == pytest.approx(180 / 255, abs=0.15)
    # What predict writes can be read as data again.
    assert torch.equal(read_values(files[0]), torch.from_numpy(np.array(Image.open(files[0]))))


def test_one_value_everywhere_comes_back_as_one_value(levels, tmp_path):
    run, _ = levels
    image = Image.fromarray(np.full((24, 80), 128, np.uint8))
    image.save(tmp_path / "flat.png")
    (file,) = predict(run, tmp_path / "flat.png", tmp_path / "out")
    assert file.name == "flat.tif"
    values = np.array(Image.open(file))
    assert values.shape == (24, 80)
    assert values.std() < 0.1
    assert values.mean() == pytest.approx(128 / 255, abs=0.15)
    with pytest.raises(UserError, match=r"masks are written to a folder"):
        predict(run, tmp_path / "flat.png", tmp_path / "o.tif")
