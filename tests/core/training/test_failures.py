"""What ends a run early says so in one line, with the right exit code, and leaves what was saved intact."""

import errno
import json
import os

import pytest
import torch

from core.training.checkpoint import read_checkpoint
from core.training.command import main
from core.training.errors import RunFailed, UserError
from core.training.fit import fit
from core.training.run import load_model, load_run


def failed(capsys, words, code=1) -> str:
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("longspan: ")
    return lines[0]


# 6 batches of 16 an epoch: batch 7 of the run is batch 1 of epoch 1.
@pytest.mark.parametrize(
    ("trap", "told"),
    [
        (
            "nan@7",
            "the loss is not a finite number at batch 1 of epoch 1 (step 7): loss nan, gradient norm of the step",
        ),
        ("grad@7", "the gradient is not a finite number at batch 1 of epoch 1 (step 7): loss "),
        ("nanval@4", "val mse is nan: the model's outputs are no longer numbers"),
    ],
)
def test_nan_stops_the_run_and_says_where(trap, told, toy, capsys):
    line = failed(capsys, ["fit", "toy/demo", f"model.trap={trap}", "--run-dir", "run"])
    assert told in line
    failure = json.loads((toy / "run" / "failure.json").read_text())
    assert failure["status"] == "nan"
    assert told in failure["error"]
    assert not (toy / "run" / "metrics.json").exists()
    weights = read_checkpoint(toy / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_nan_gradient_is_named_with_its_norm(toy):
    with pytest.raises(RunFailed, match=r"loss \d.*, gradient norm nan; try a lower optim.lr") as failure:
        fit("toy/demo", overrides=["model.trap=grad@0"], run_dir="run")
    assert failure.value.status == "nan"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_nan_is_found_in_an_accumulated_batch_too(precision, toy):
    overrides = ["model.trap=nan@2", "trainer.accumulate=2", f"trainer.precision={precision}"]
    with pytest.raises(RunFailed, match=r"at batch 2 of epoch 0 \(step 1\)"):
        fit("toy/demo", overrides=overrides, run_dir="run")


def test_out_of_memory_names_three_knobs(toy, capsys):
    words = ["fit", "toy/demo", "model.trap=oom@3", "trainer.batch_size=12", "--run-dir", "run"]
    line = failed(capsys, words)
    assert "out of memory (CUDA out of memory. Tried to allocate 20.00 GiB)" in line
    for knob in (
        "trainer.batch_size=6",
        "trainer.accumulate=2",
        "trainer.precision=bf16-mixed",
        "backbone.checkpoint=true",
    ):
        assert knob in line
    assert json.loads((toy / "run" / "failure.json").read_text())["status"] == "failed"


def test_unexpected_error_is_one_line_and_its_traceback_is_in_the_log(toy, capsys, monkeypatch):
    from longspan_toy.task import ToyTask

    def broken(self, batch):
        raise KeyError("a bug")

    monkeypatch.setattr(ToyTask, "loss", broken)
    line = failed(capsys, ["fit", "toy/demo", "--run-dir", "run"])
    assert line == "longspan: unexpected KeyError: 'a bug' (--debug shows where)"
    assert json.loads((toy / "run" / "failure.json").read_text()) == {"status": "failed", "error": "KeyError: 'a bug'"}
    log = (toy / "run" / "log.txt").read_text()
    assert "Traceback" in log
    assert "in broken" in log
    with pytest.raises(KeyError):
        main(["fit", "toy/demo", "--run-dir", "run2", "--debug"])


@pytest.fixture
def small_disk(monkeypatch):
    """The disk takes `left` more bytes of checkpoints, then it is full."""
    disk = {"left": None, "written": 0}
    real = os.write

    def write(descriptor, data):
        if disk["left"] is not None:
            if disk["left"] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = memoryview(data)[: disk["left"]]  # a full disk takes a part before it refuses
            disk["left"] -= len(data)
        disk["written"] += len(data)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    return disk


def test_full_disk_while_saving_keeps_the_checkpoint_that_was_there(toy, capsys, small_disk, monkeypatch):
    from core.training.keeper import Keeper

    saves = []
    real = Keeper._save

    def save(self, trainer, *, best=False):
        if len(saves) == 1:
            small_disk["left"] = 5000  # the second checkpoint does not fit
        real(self, trainer, best=best)
        saves.append((self.folder.last.read_bytes(), self.folder.best.read_bytes()))

    monkeypatch.setattr(Keeper, "_save", save)
    line = failed(capsys, ["fit", "toy/demo", "--run-dir", "run"])
    assert "no space left on the disk while writing run/checkpoints/last.ckpt" in line
    assert "continue with --resume" in line
    checkpoints = toy / "run" / "checkpoints"
    assert ((checkpoints / "last.ckpt").read_bytes(), (checkpoints / "best.ckpt").read_bytes()) == saves[0]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]
    # Room is made: the run goes on as if nothing had been.
    small_disk["left"] = None
    monkeypatch.setattr(Keeper, "_save", real)
    resumed = fit("toy/demo", run_dir="run", resume=True)
    whole = fit("toy/demo", run_dir="whole")
    assert resumed.metrics["test"] == whole.metrics["test"]
    assert not (toy / "run" / "failure.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_the_error_of_a_real_full_device_is_understood(toy):
    from core.training.durable import _Sink

    descriptor = os.open("/dev/full", os.O_WRONLY)
    sink = _Sink(descriptor)
    try:
        with pytest.raises(Exception) as raised:  # noqa: PT011  (torch wraps it as it likes)
            torch.save({"x": torch.zeros(100_000)}, sink)
    finally:
        os.close(descriptor)
    assert isinstance(raised.value, (OSError, RuntimeError))
    assert sink.error is not None
    assert sink.error.errno == errno.ENOSPC


def test_mistakes_leave_no_folder(toy, capsys):
    for words, told in [
        (["data.items=0"], "the train part of the data has no items"),
        (["trainer.early_stopping=2", "data.with_val=false"], "early_stopping needs a validation part"),
        (["data.width=7"], "toy width must be even, got 7"),
    ]:
        line = failed(capsys, ["fit", "toy/demo", *words, "--run-dir", "run"], code=2)
        assert told in line
        assert not (toy / "run").exists()


def test_no_gpu_is_said(toy, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    line = failed(capsys, ["fit", "toy/demo", "trainer.accelerator=gpu", "--run-dir", "run"], code=2)
    assert "trainer.accelerator=gpu with trainer.devices=1, but torch sees 0 GPUs" in line


def test_fp16_on_a_cpu_is_refused(toy, capsys):
    line = failed(capsys, ["fit", "toy/demo", "trainer.precision=16-mixed", "--run-dir", "run"], code=2)
    assert "trainer.precision=16-mixed needs a GPU; on a CPU use 32-true or bf16-mixed" in line


def test_run_without_validation_keeps_its_last_epoch(toy):
    result = fit("toy/demo", overrides=["data.with_val=false"], run_dir="run")
    assert result.metrics["val"] == {}
    assert result.metrics["test"]["mse"] > 0
    best, last = (read_checkpoint(toy / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert best["global_step"] == last["global_step"] == 18


def test_no_readable_checkpoint_is_an_error_not_a_new_start(toy):
    fit("toy/demo", overrides=["trainer.epochs=1"], run_dir="run", floors=False)
    (toy / "run" / "metrics.json").unlink()
    for name in ("best", "last"):
        (toy / "run" / "checkpoints" / f"{name}.ckpt").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no checkpoint in run/checkpoints can be read: best.ckpt is empty \(0 bytes\)"
    ):
        fit("toy/demo", overrides=["trainer.epochs=1"], run_dir="run", resume=True)
    with pytest.raises(UserError, match="can be read"):
        load_run("run")


def test_data_must_be_plain_and_is_seen_in_training_as_after_loading(toy, monkeypatch):
    import longspan_toy.data
    import longspan_toy.task
    from longspan_toy.task import ToyTask

    build = longspan_toy.data.build_data
    seen = []

    def with_spec(extra):
        def build_data(recipe):
            data = build(recipe)
            data.spec["extra"] = extra
            return data

        monkeypatch.setattr(longspan_toy.data, "build_data", build_data)

    class Looking(ToyTask):
        def __init__(self, recipe, spec):
            seen.append(spec["extra"])
            super().__init__(recipe, spec)

    monkeypatch.setattr(longspan_toy.task, "ToyTask", Looking)
    with_spec((1, 2))
    fit("toy/demo", overrides=["trainer.epochs=1"], run_dir="run", floors=False)
    load_run("run")
    load_model("run")
    assert seen == [[1, 2]] * 3
    for bad in (torch.zeros(1), float("nan"), {1, 2}):
        with_spec(bad)
        with pytest.raises(TypeError, match="app 'toy': spec and summary of its data must be plain JSON values"):
            fit("toy/demo", run_dir="bad")
        assert not (toy / "bad").exists()


def test_a_floor_that_is_no_number_is_not_written(toy, monkeypatch):
    import longspan_toy.data

    monkeypatch.setattr(longspan_toy.data, "floors", lambda recipe, data: {"zero": {"mse": float("nan")}})
    with pytest.raises(RunFailed, match="the floor 'zero' has mse nan"):
        fit("toy/demo", overrides=["trainer.epochs=1"], run_dir="run")
    assert fit("toy/demo", overrides=["trainer.epochs=1"], run_dir="run", resume=True, floors=False).metrics["test"]


def test_settings_of_torch_are_as_before(toy):
    assert not torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    fit("toy/demo", overrides=["trainer.epochs=1", "trainer.deterministic=true", "trainer.threads=2"], run_dir="run")
    assert json.loads((toy / "run" / "environment.json").read_text())["threads"] == 2
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
