"""Two processes are one: half the batch on each of two devices makes the steps of the whole batch on one."""

import csv
import json
import subprocess
import sys

import pytest

from core.training.fit import fit


@pytest.mark.slow
def test_two_processes_equal_one(toy, toy_environment):
    common = ["model.quiet=true", "data.items=90", "optim.ema=0.9"]
    fit("toy/demo", overrides=[*common, "trainer.batch_size=18"], run_dir="one")
    words = ["fit", "toy/demo", *common, "trainer.batch_size=9", "trainer.devices=2", "--run-dir", "two"]
    done = subprocess.run(
        [sys.executable, "-m", "apps", *words], env=toy_environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    tables = []
    for name in ("one", "two"):
        with (toy / name / "metrics.csv").open() as file:
            tables.append([(int(r["step"]), float(r["train_loss"]), float(r["val_mse"])) for r in csv.DictReader(file)])
    assert [row[0] for row in tables[1]] == [5, 10, 15]
    assert tables[1] == [pytest.approx(row, rel=1e-5) for row in tables[0]]
    one, two = (json.loads((toy / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["test"]["mse"] == pytest.approx(one["test"]["mse"], rel=1e-5)
    assert two["floors"] == one["floors"]
