"""Killed and resumed = never interrupted, bit for bit; and signals leave a checkpoint to go on from."""

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from core.training.checkpoint import read_checkpoint
from core.training.errors import Interrupted, UserError
from core.training.fit import fit
from core.training.run import load_run

# Everything that has a state: dropout and two foreign generators (the toy's loss), EMA, accumulation, early stopping,
# a schedule, a last batch that is smaller.
RECIPE = [
    "data.items=90",
    "trainer.epochs=4",
    "trainer.batch_size=8",
    "trainer.accumulate=2",
    "trainer.checkpoint_every=2",
    "trainer.early_stopping=3",
    "optim.ema=0.9",
    "optim.warmup=3",
]


def command(run_dir, *overrides):
    words = ["fit", "toy/demo", *RECIPE, *overrides, "--run-dir", str(run_dir), "--resume"]
    return [sys.executable, "-m", "apps", *words]


def start(environment, run_dir, *overrides):
    return subprocess.Popen(
        command(run_dir, *overrides), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def remove_trap(run_dir):
    recipe = run_dir / "recipe.yaml"
    text = recipe.read_text()
    assert "trap: " in text
    recipe.write_text(re.sub("trap: .*", "trap: null", text))


def rows(run_dir):
    """metrics.csv without the columns that measure time and memory."""
    with (run_dir / "metrics.csv").open() as file:
        measured = ("tokens_per_s", "step_ms", "peak_bytes")
        return [{k: v for k, v in row.items() if k not in measured} for row in csv.DictReader(file)]


def same_state(a, b):
    """Whether two nested states are equal bit for bit; returns the path of the first difference, or None."""
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else "tensor"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"keys {a.keys() ^ b.keys()}"
        return next((f"{k}: {d}" for k in a if (d := same_state(a[k], b[k]))), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return "length"
        return next((f"{i}: {d}" for i, (x, y) in enumerate(zip(a, b)) if (d := same_state(x, y))), None)
    return None if a == b else f"{a!r} != {b!r}"


def assert_same_run(run_dir, reference):
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run_dir, reference))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same_state(ours[part], theirs[part]) is None, part
    for part in ("average", "random", "wait", "finished"):
        assert same_state(ours["longspan"][part], theirs["longspan"][part]) is None, part
    assert rows(run_dir) == rows(reference)
    assert (run_dir / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (run_dir, reference))
    assert (ours["val"], ours["test"]) == (theirs["val"], theirs["test"])


@pytest.fixture(scope="module")
def uninterrupted(toy_site, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    fit("toy/demo", overrides=RECIPE, run_dir=run_dir)
    return run_dir


# 12 batches an epoch: in the first steps, between two checkpoints, in the middle of a group of accumulated batches,
# on the last batch of an epoch, on the first of the next.
@pytest.mark.parametrize("batch", [1, 6, 17, 23, 24, 41])
def test_killed_in_a_step_and_resumed_is_never_interrupted(batch, uninterrupted, toy, monkeypatch):
    run_dir = toy / "run"

    class Killed(BaseException):
        pass

    def kill(pid, signum):
        raise Killed

    # In one process, so that many positions are cheap: at the n-th batch everything that is in memory is lost.
    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(Killed):
        fit("toy/demo", overrides=[*RECIPE, f"model.trap=kill@{batch}"], run_dir=run_dir)
    remove_trap(run_dir)
    fit("toy/demo", overrides=RECIPE, run_dir=run_dir, resume=True)
    assert_same_run(run_dir, uninterrupted)


# The fourth epoch (of 12 batches) looks best; after the seventh, patience ends.
EARLY = ["data.items=90", "trainer.batch_size=8", "trainer.epochs=10", "trainer.early_stopping=3", "model.best_epoch=3"]
EARLY += ["trainer.checkpoint_every=2"]


@pytest.fixture(scope="module")
def stopped_early(toy_site, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("stopped_early") / "run"
    fit("toy/demo", overrides=EARLY, run_dir=run_dir)
    record = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["longspan"]
    assert [row["epoch"] for row in record["rows"]] == [0, 1, 2, 3, 4, 5, 6]
    assert (record["best"]["epoch"], record["wait"]) == (3, 3)
    assert "no better val mse for 3 epochs" in (run_dir / "log.txt").read_text()
    return run_dir


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [False, True])
def test_best_epoch_patience_and_rows_are_restored(damage, workers, stopped_early, toy, monkeypatch):
    run_dir, overrides = toy / "run", [*EARLY, f"trainer.workers={workers}"]

    def kill(pid, signum):
        raise RuntimeError("killed")

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(RuntimeError, match="killed"):
        fit("toy/demo", overrides=[*overrides, "model.trap=kill@60"], run_dir=run_dir)  # the sixth epoch's first batch
    remove_trap(run_dir)
    assert [row["epoch"] for row in rows(run_dir)] == ["0", "1", "2", "3", "4"]
    if damage:  # then the best epoch's checkpoint is the newest, and a row of metrics.csv is of a future that is gone
        os.truncate(run_dir / "checkpoints" / "last.ckpt", 5000)
    fit("toy/demo", overrides=overrides, run_dir=run_dir, resume=True)
    assert ("passed over: last.ckpt (5000 bytes) is cut off" in (run_dir / "log.txt").read_text()) == damage
    assert_same_run(run_dir, stopped_early)


def test_sigkill_of_the_process_and_resume(uninterrupted, toy_environment, toy):
    run_dir = toy / "run"
    process = start(toy_environment, run_dir, "model.trap=kill@29")  # the third epoch's fifth batch
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, stderr
    assert not (run_dir / "metrics.json").exists()
    remove_trap(run_dir)
    (run_dir / "checkpoints" / ".last.ckpt.999.tmp").write_bytes(b"half a checkp")  # what a kill inside a write leaves
    fit("toy/demo", overrides=RECIPE, run_dir=run_dir, resume=True)
    assert "continuing from last.ckpt (epoch 3" in (run_dir / "log.txt").read_text()
    assert list((run_dir / "checkpoints").glob(".*")) == []
    assert_same_run(run_dir, uninterrupted)


# 12 batches an epoch and 5 of validation: in the middle of accumulation, on the last batch, in the first, middle and
# last batch of a validation, and after the test at the end.
@pytest.mark.parametrize("trap", ["term@6", "int@14", "term@23", "termval@0", "termval@7", "termval@9", "termend@0"])
def test_signal_saves_at_the_next_safe_point_and_resumes_bit_for_bit(trap, uninterrupted, toy):
    run_dir = toy / "run"
    # No checkpoint but the one that the signal causes.
    overrides = [*RECIPE, "trainer.checkpoint_every=0"]
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stopped:
        fit("toy/demo", overrides=[*overrides, f"model.trap={trap}"], run_dir=run_dir)
    assert stopped.value.exit_code == (130 if trap.startswith("int") else 143)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
    read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    remove_trap(run_dir)
    fit("toy/demo", overrides=overrides, run_dir=run_dir, resume=True)
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_signal_to_the_command_gives_one_line_and_its_code(signum, code, toy_environment, tmp_path):
    run_dir = tmp_path / "run"
    process = start(toy_environment, run_dir, "model.trap=slow@0", "trainer.epochs=200", "trainer.early_stopping=0")
    deadline = time.monotonic() + 150
    while not (run_dir / "metrics.csv").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert stderr.splitlines() == [
        f"longspan: stopped by signal {signum}; saved {run_dir}/checkpoints/last.ckpt, continue with --resume"
    ]
    saved = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert saved["longspan"]["stage"] in ("steps", "validate")
    assert saved["global_step"] > 0


def test_finished_run_is_returned_as_it_is(uninterrupted, toy):
    before = {
        path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file() and path.suffix != ".txt"
    }
    result = fit("toy/demo", overrides=RECIPE, run_dir=uninterrupted, resume=True)
    assert result.metrics == json.loads((uninterrupted / "metrics.json").read_text())
    assert result.epochs == 4
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == {**before, uninterrupted / ".lock": after[uninterrupted / ".lock"]}


def test_the_weights_that_a_run_starts_from_are_brought_once(toy, monkeypatch):
    from longspan_toy.task import ToyTask

    brought = []
    monkeypatch.setattr(ToyTask, "bring_weights", lambda self: brought.append(self.model[0].weight.data.fill_(0.5)))
    with pytest.raises(Interrupted):
        fit("toy/demo", overrides=["model.trap=term@7", "optim.lr=1e-9"], run_dir="run")
    saved = read_checkpoint("run/checkpoints/last.ckpt")["state_dict"]["model.0.weight"]
    assert torch.allclose(saved, torch.tensor(0.5), atol=1e-3)
    remove_trap(toy / "run")
    fit("toy/demo", overrides=["optim.lr=1e-9"], run_dir="run", resume=True)
    load_run("run")
    assert len(brought) == 1, "a resumed or loaded run has its own"


def test_run_folder_is_not_taken_twice(uninterrupted, toy):
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        fit("toy/demo", overrides=RECIPE, run_dir=uninterrupted)
    with pytest.raises(UserError, match=r"was started with optim.lr=0.01, now it is 0.02; resume with the same recipe"):
        fit("toy/demo", overrides=[*RECIPE, "optim.lr=0.02"], run_dir=uninterrupted, resume=True)


def test_resume_of_an_empty_folder_starts_the_run(toy):
    (toy / "run").mkdir()
    result = fit("toy/demo", overrides=["trainer.epochs=1"], run_dir=toy / "run", resume=True, floors=False)
    assert result.epochs == 1
    assert result.metrics["floors"] == {}


def test_two_processes_in_one_folder(toy):
    (toy / "run").mkdir()
    with (toy / "run" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training in"):
            fit("toy/demo", run_dir=toy / "run", resume=True)
    assert not (toy / "run" / "recipe.yaml").exists()
