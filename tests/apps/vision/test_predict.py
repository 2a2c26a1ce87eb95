"""`predict` on a user's images: names and sizes kept, the same answers as in the test, flips, windows, mistakes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from apps.vision.images import normalised, read_image
from apps.vision.predict import segment
from apps.vision.tiling import slide
from core.training.errors import UserError
from core.training.predict import inspect, predict
from core.training.run import load_run


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


def test_the_receptive_field_of_a_window_is_smaller_than_that_of_softmax(colours, tmp_path):
    from apps.vision.inspect import receptive_field
    from apps.vision.task import build_task
    from core.training.recipe import load_recipe

    spec = {"task": "classes", "classes": ["a", "b"], "counts": [1, 1], "size": [64, 64], "mean": [0.5] * 3}
    spec |= {"std": [0.2] * 3, "reading": {}}
    shares = {}
    for attention in ("softmax", "window2d", "hybrid2d"):
        torch.manual_seed(0)
        given = [f"attention={attention}", "data.size=64", "model.patch=8", "model.stem=patch", "backbone.depth=1"]
        more = ["attention.window=2"] if attention != "softmax" else []
        task = build_task(load_recipe("vision/folder", [*given, *more]), spec).eval()
        shares[attention] = (receptive_field(task, torch.randn(1, 3, 64, 64)) > 0).float().mean().item()
    assert shares["softmax"] == shares["hybrid2d"] == 1.0
    assert shares["window2d"] == 9 / 64


def test_a_table_of_a_run_that_skips_broken_images_names_them(classifier, tmp_path):
    run = json.loads((classifier / "config.json").read_text())
    assert run["recipe"]["data"]["on_broken"] == "error"  # settings of reading are the run's; predict.* may change
    with pytest.raises(UserError, match=r"predict"):
        predict(classifier, tmp_path, tmp_path / "o.csv", ["data.on_broken=skip"])
