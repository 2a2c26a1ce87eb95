"""What a finished run leaves behind, and that it comes back to life with the same numbers."""

import csv
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.training.app import get_app
from core.training.callbacks import Meter
from core.training.checkpoint import read_checkpoint
from core.training.data import eval_loader
from core.training.errors import Interrupted, UserError
from core.training.evaluation import run_evaluation
from core.training.fit import evaluate, fit
from core.training.interrupt import Stop
from core.training.ledger import read_curve
from core.training.predict import inspect, predict
from core.training.randomness import random_state
from core.training.recipe import load_recipe
from core.training.run import load_model, load_run
from core.training.task import Task


@pytest.fixture(scope="module")
def run(toy_site, tmp_path_factory):
    """A run whose best epoch is not its last, with averaged weights."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    overrides = ["trainer.epochs=5", "model.best_epoch=2", "optim.ema=0.8", "data.items=90"]
    return fit("toy/demo", overrides=overrides, run_dir=run_dir)


def points(run):
    data = run.app.part("data")(run.recipe)
    return data.test.x, data.test.y


def test_the_folder_holds_what_the_design_says(run):
    names = {str(path.relative_to(run.run_dir)) for path in run.run_dir.rglob("*") if path.is_file()}
    assert names == {
        *("recipe.yaml", "metrics.json", "metrics.csv", "environment.json", "data.json", "log.txt", ".lock"),
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "model.safetensors", "config.json", "plots/toy.csv"),
    }
    metrics = json.loads((run.run_dir / "metrics.json").read_text())
    assert metrics == run.metrics
    assert list(metrics) == ["val", "test", "floors", "cost"]
    assert metrics["floors"]["zero"]["mse"] > metrics["test"]["mse"]
    measured = {"tokens_per_s", "step_ms", "peak_bytes", "seconds"}
    assert set(metrics["cost"]) == {"parameters", "flops_per_item", "state_bytes", "tokens_per_item", *measured}
    assert all(metrics["cost"][name] > 0 for name in measured)
    assert json.loads((run.run_dir / "data.json").read_text()) == {"items": {"train": 90, "test": 50}}
    assert load_recipe(run.run_dir / "recipe.yaml").model_dump() == load_run(run.run_dir).recipe.model_dump()
    with (run.run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [
        ("0", "6"),
        ("1", "12"),
        ("2", "18"),
        ("3", "24"),
        ("4", "30"),
    ]
    assert [float(row["val_mse"]) for row in rows] == [3, 2, 1, 2, 3]
    assert float(rows[-1]["lr"]) == 0


def test_the_best_epoch_with_its_averaged_weights_is_what_counts(run):
    best, last = (read_checkpoint(run.run_dir / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert (best["global_step"], last["global_step"]) == (18, 30)
    loaded = load_run(run.run_dir)
    weight = loaded.task.model[0].weight.detach()
    assert torch.equal(weight, best["longspan"]["average"]["mean"]["model.0.weight"])
    assert not torch.equal(weight, best["state_dict"]["model.0.weight"])
    x, y = points(loaded)
    with torch.no_grad():
        mse = float(((loaded.task.model(x) - y) ** 2).mean())
        assert torch.equal(load_model(run.run_dir)(x), loaded.task.model(x))
    assert mse < run.metrics["floors"]["zero"]["mse"]


def test_training_improves_on_the_floor_and_evaluate_repeats_the_figure(toy):
    result = fit("toy/demo", run_dir="run", overrides=["optim.ema=0.5"])
    before = json.loads((toy / "run" / "metrics.json").read_text())
    loaded = load_run("run")
    x, y = points(loaded)
    with torch.no_grad():
        assert result.metrics["test"]["mse"] == pytest.approx(float(((loaded.task.model(x) - y) ** 2).mean()), rel=1e-5)
    (toy / "run" / "metrics.json").unlink()
    assert evaluate("run") == before
    assert evaluate("run", floors=False)["floors"] == before["floors"], "those that are there are kept"
    assert not loaded.task.training


def stop_in_the_second_epoch():
    with pytest.raises(Interrupted):
        fit("toy/demo", run_dir="run", overrides=["model.trap=term@7"])
    recipe = Path("run/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("trap: term@7", "trap: null"))


def test_evaluating_an_unfinished_run_does_not_finish_it(toy):
    stop_in_the_second_epoch()
    so_far = evaluate("run")
    assert so_far["test"]["mse"] > 0
    assert json.loads((toy / "run" / "metrics-unfinished.json").read_text()) == so_far
    assert not (toy / "run" / "metrics.json").exists()
    result = fit("toy/demo", run_dir="run", resume=True)
    assert result.epochs == 3
    assert not (toy / "run" / "metrics-unfinished.json").exists()
    (toy / "run" / "failure.json").write_text("{}")
    evaluate("run")
    assert not (toy / "run" / "failure.json").exists(), "a run that is finished and tested has not failed"


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_without_its_best_epoch_a_run_gives_no_figures(damage, run, toy):
    shutil.copytree(run.run_dir, toy / "copy")
    best, last = (toy / "copy" / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    if damage == "cut":
        best.write_bytes(best.read_bytes()[:5000])
    else:
        best.unlink()
    (toy / "in.txt").write_text(" ".join(["0.5"] * 8))
    before = (toy / "copy" / "metrics.json").read_bytes()
    told = "the checkpoint of the best epoch cannot be used .*copy last.ckpt to copy/checkpoints/best.ckpt"
    for ask in (lambda: predict("copy", "in.txt", "out.txt"), lambda: evaluate("copy"), lambda: load_run("copy")):
        with pytest.raises(UserError, match=told):
            ask()
    assert (toy / "copy" / "metrics.json").read_bytes() == before
    assert not (toy / "out.txt").exists()
    shutil.copy(last, best)
    assert evaluate("copy", floors=False)["val"]["mse"] == 3, "the figures are of the epoch whose weights are tested"


def test_data_that_changed_is_refused_on_resume_and_test(toy, monkeypatch):
    import longspan_toy.data

    build = longspan_toy.data.build_data

    def with_scale(mean, more=0):
        def build_data(recipe):
            data = build(recipe)
            data.spec |= {"scaler": {"mean": [0.0, mean]}, "fit": {"shape": [1], "float32": str(mean)}}
            data.spec |= {"new": 1} if more else {}
            return data

        monkeypatch.setattr(longspan_toy.data, "build_data", build_data)

    with_scale(1.5)
    stop_in_the_second_epoch()
    with_scale(15.0)
    told = r"run was trained on other data: scaler\.mean\.1 was 1\.5, now it is 15\.0; bring it back"
    with pytest.raises(UserError, match=told):
        fit("toy/demo", run_dir="run", resume=True)
    with pytest.raises(UserError, match=told):
        evaluate("run")
    with_scale(1.5 + 1e-9, more=1)  # summed in another order, by a later version
    assert fit("toy/demo", run_dir="run", resume=True).epochs == 3
    assert evaluate("run")["test"]


def test_a_checkpoint_file_alone_is_enough_to_predict(run, toy):
    shutil.copy(run.run_dir / "checkpoints" / "best.ckpt", toy / "alone.ckpt")
    (toy / "in.txt").write_text(" ".join(["0.5"] * 16))
    assert predict("alone.ckpt", "in.txt", "deep/out.txt") == [toy.relative_to(toy) / "deep" / "out.txt"]
    values = [float(line) for line in (toy / "deep" / "out.txt").read_text().split()]
    with torch.no_grad():
        expected = load_model(run.run_dir)(torch.full((2, 8), 0.5)).flatten().tolist()
    assert values == expected
    with pytest.raises(UserError, match=r"there is no input file 'nope\.txt'"):
        predict("alone.ckpt", "nope.txt", "out.txt")
    with pytest.raises(UserError, match="is a checkpoint file; give the folder of the run"):
        evaluate("alone.ckpt")


def test_the_users_own_file_is_never_written_over(run, toy):
    (toy / "in.txt").write_text(" ".join(["0.5"] * 8))
    (toy / "link.txt").symlink_to("in.txt")
    (toy / "folder.txt").mkdir()
    for output in ("in.txt", "./in.txt", "link.txt"):
        with pytest.raises(UserError, match="is the input itself, which would be lost; choose another name"):
            predict(run.run_dir, "in.txt", output)
    with pytest.raises(UserError, match=r"--output folder\.txt is a folder; a file is wanted"):
        predict(run.run_dir, "in.txt", "folder.txt")
    assert (toy / "in.txt").read_text() == " ".join(["0.5"] * 8)


def test_settings_of_predict_may_change_after_training_and_nothing_else(run, toy):
    (toy / "in.txt").write_text(" ".join(["0.5"] * 8))
    values = []
    for overrides in ([], ["predict.scale=3"]):
        predict(run.run_dir, "in.txt", "out.txt", overrides)
        values.append(float((toy / "out.txt").read_text()))
    assert values[1] == pytest.approx(3 * values[0])
    with pytest.raises(UserError, match=r"override 'model.dropout=0': .* only be given predict.KEY=VALUE"):
        predict(run.run_dir, "in.txt", "out.txt", ["model.dropout=0"])
    with pytest.raises(UserError, match=r"predict.scal=2.*did you mean 'scale'"):
        predict(run.run_dir, "in.txt", "out.txt", ["predict.scal=2"])


def test_a_mistake_that_training_finds_at_its_start_leaves_the_name_free(toy, monkeypatch):
    def refuse(self, stage):
        raise UserError("the weights do not fit")

    with monkeypatch.context() as patch:
        patch.setattr(Task, "setup", refuse)
        with pytest.raises(UserError, match="the weights do not fit"):
            fit("toy/demo", run_dir="again", quiet=True)
    assert fit("toy/demo", run_dir="again", quiet=True, overrides=["trainer.epochs=1"]).status == "ok"


def test_inspect_writes_into_a_folder_or_says_that_there_is_nothing(run, toy, monkeypatch):
    (toy / "in.txt").write_text("")
    assert [str(path) for path in inspect(run.run_dir, "in.txt", "deep/look", ["predict.scale=2"])] == [
        "deep/look/weights.txt"
    ]
    assert (toy / "deep" / "look" / "weights.txt").read_text() == "2.0 in.txt"
    (toy / "file").write_text("")
    with pytest.raises(UserError, match="--output file is a file; a folder is wanted"):
        inspect(run.run_dir, "in.txt", "file")
    blind = replace(get_app("toy"), inspect=None)
    monkeypatch.setattr("core.training.run.get_app", lambda _: blind)
    with pytest.raises(UserError, match="the app 'toy' has nothing to inspect"):
        inspect(run.run_dir, "in.txt", "look")


def test_same_seed_same_result_other_seed_another(toy):
    runs = [
        fit("toy/demo", overrides=[f"seed={s}"], run_dir=name, floors=False)
        for name, s in [("a", 0), ("b", 0), ("c", 1)]
    ]
    assert runs[0].metrics["test"] == runs[1].metrics["test"]
    assert runs[0].metrics["test"] != runs[2].metrics["test"]
    assert (toy / "a" / "model.safetensors").read_bytes() == (toy / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("16-mixed", marks=pytest.mark.gpu)])
def test_mixed_precision_learns_the_same_to_its_precision(precision, toy):
    common = ["model.quiet=true", "trainer.accelerator=auto"]
    exact = fit("toy/demo", run_dir="exact", overrides=common, floors=False)
    mixed = fit("toy/demo", run_dir="mixed", overrides=[*common, f"trainer.precision={precision}"], floors=False)
    assert mixed.metrics["test"] != exact.metrics["test"], "the precision was not used"
    assert mixed.metrics["test"]["mse"] == pytest.approx(exact.metrics["test"]["mse"], rel=0.05)


def test_accumulation_is_a_larger_batch(toy):
    """Two batches of 8 accumulated make the step that one of 16 makes (the toy draws nothing at dropout 0)."""
    plain = ["model.dropout=0", "model.quiet=true", "optim.warmup=3"]
    large = fit("toy/demo", run_dir="large", overrides=[*plain, "trainer.batch_size=16"], floors=False)
    small = fit(
        "toy/demo", run_dir="small", overrides=[*plain, "trainer.batch_size=8", "trainer.accumulate=2"], floors=False
    )
    assert small.metrics["test"]["mse"] == pytest.approx(large.metrics["test"]["mse"], rel=1e-4)


def test_a_step_is_one_of_the_optimiser(monkeypatch):
    meter = Meter(items=10, batch_size=2, tokens_per_item=1, accumulate=2)
    meter.batches = 5  # three steps
    monkeypatch.setattr(meter, "_elapsed", lambda: 3.0)
    assert meter.finish_epoch(torch.device("cpu"))["step_ms"] == 1000


def test_max_steps_ends_the_run_in_the_middle_of_an_epoch(toy):
    result = fit("toy/demo", run_dir="run", overrides=["trainer.max_steps=8"], floors=False)
    last = read_checkpoint(toy / "run" / "checkpoints" / "last.ckpt")
    assert (last["global_step"], last["longspan"]["finished"]) == (8, "max_steps=8 reached")
    assert result.epochs == 2
    with (toy / "run" / "metrics.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["lr"]) == 0, "the schedule is that of 8 steps"


def test_figures_that_come_and_go_keep_their_columns_and_their_means(toy, monkeypatch):
    """As where a model is converted: first one figure, later two others, and one of them only in some batches."""
    from longspan_toy.task import ToyTask

    real = ToyTask.loss

    def loss(self, batch):
        found, batch_idx = real(self, batch)[0], self.batches
        if self.current_epoch == 0:
            return found, {"transfer": torch.tensor(7.0)}
        return found, {"distance": torch.tensor(3.0)} | ({"rare": torch.tensor(5.0)} if batch_idx % 2 else {})

    monkeypatch.setattr(ToyTask, "loss", loss)
    fit("toy/demo", run_dir="run", floors=False)
    table = toy / "run" / "metrics.csv"
    assert read_curve(table, "train_transfer") == [(6, 7)]
    assert read_curve(table, "train_distance") == [(12, 3), (18, 3)]
    assert read_curve(table, "train_rare") == [(12, 5), (18, 5)]
    assert [step for step, _ in read_curve(table, "val_mse")] == [6, 12, 18]
    assert len({line.count(",") for line in table.read_text().splitlines()}) == 1


def test_clipping_bounds_the_gradient(toy, monkeypatch):
    norms = []
    step = Task.optimizer_step

    def look(self, *args, **kwargs):
        step(self, *args, **kwargs)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    monkeypatch.setattr(Task, "optimizer_step", look)
    fit("toy/demo", overrides=["optim.clip_norm=0.25", "trainer.epochs=1"], run_dir="clipped", floors=False)
    assert len(norms) == 6
    assert max(norms) == pytest.approx(0.25, rel=1e-3)
    norms.clear()
    fit("toy/demo", overrides=["optim.clip_norm=0", "trainer.epochs=1"], run_dir="free", floors=False)
    assert max(norms) > 1


def test_evaluation_is_a_pure_function_and_draws_nothing_from_training(run, monkeypatch):
    from longspan_toy.task import ToyTask

    def compute(self):
        self.start_evaluation()
        return {"mse": random.random(), "mae": float(np.random.rand()), "rand": float(torch.rand(()))}

    monkeypatch.setattr(ToyTask, "eval_compute", compute)
    loaded = load_run(run.run_dir)
    loader = eval_loader(loaded.app.part("data")(loaded.recipe), "test", batch_size=16)
    loaded.task.model[0].train()
    state = random_state()
    first = run_evaluation(loaded.task, loader, "test", Stop())
    after = random_state()
    assert (after["python"], after["numpy"][2]) == (state["python"], state["numpy"][2])
    assert torch.equal(after["torch"], state["torch"])
    assert torch.equal(after["numpy"][1], state["numpy"][1])
    torch.rand(3), random.random(), np.random.rand()
    assert run_evaluation(loaded.task, loader, "test", Stop()) == first
    assert len(set(first.values())) == 3
    assert loaded.task.model[0].training, "the modes of the modules are as before"
    assert not loaded.task.model[2].training


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_load_model_says_what_is_missing(missing, run, toy):
    shutil.copytree(run.run_dir, toy / "copy")
    (toy / "copy" / missing).unlink()
    with pytest.raises(UserError, match=f"has no {missing}; it is written when a run finishes"):
        load_model("copy")


def test_load_model_of_damaged_weights(run, toy):
    shutil.copytree(run.run_dir, toy / "copy")
    (toy / "copy" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="do not form a model"):
        load_model("copy")


def test_no_run_there(toy):
    (toy / "empty").mkdir()
    with pytest.raises(UserError, match="there is no run folder or checkpoint 'nowhere'"):
        load_run("nowhere")
    with pytest.raises(UserError, match="empty holds no checkpoint; is it the folder of a run"):
        load_run("empty")
    with pytest.raises(UserError, match="is an address"):
        load_run("hf://somebody/model.ckpt")


def test_auto_is_settled_before_training_and_the_run_names_its_choice(toy, monkeypatch):
    monkeypatch.setenv("LONGSPAN_CACHE", str(toy / "cache"))
    overrides = ["attention={variant: auto, length: 16, short_conv: 2}", "trainer.epochs=1"]
    run = fit("toy/demo", overrides=overrides, run_dir=toy / "run", floors=False)
    want = {"variant": "softmax", "short_conv": 2}
    assert load_recipe(run.run_dir / "recipe.yaml").attention == want
    assert load_run(run.run_dir).recipe.attention == want
    layered = ["attention={s: softmax, h: {variant: auto, length: 100000}}", "backbone.layout=hs", "trainer.epochs=1"]
    run = fit("toy/demo", overrides=layered, run_dir=toy / "layered", floors=False)
    assert load_run(run.run_dir).recipe.attention == {"s": {"variant": "softmax"}, "h": {"variant": "hybrid"}}
    with pytest.raises(UserError, match=r"toy/demo: attention: unknown choice 'hybird'"):
        fit("toy/demo", overrides=["attention={variant: auto, choice: hybird}"], run_dir=toy / "bad")
