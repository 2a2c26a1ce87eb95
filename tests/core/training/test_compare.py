"""compare with a small program in the place of the training run, and once with the real one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.training.compare import compare
from core.training.errors import Interrupted, UserError
from core.training.ledger import read_runs
from core.training.recipe import load_recipe
from core.training.report import report
from core.training.workers import Job, _environment, start

# Stands for `python -m apps fit`: writes what a run writes, in milliseconds. What it does comes from the environment:
# FAKE_PLAN maps "variant/seed-n" to an action.
FAKE = """
import json, os, pathlib, signal, sys, time
run_dir = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
name = "/".join(run_dir.parts[-2:])
action = json.loads(os.environ.get("FAKE_PLAN", "{}")).get(name, "")
with open(run_dir.parents[1] / "started.txt", "a") as file:
    file.write(name + (" bare" if "--no-floors" in sys.argv else "") + "\\n")
run_dir.mkdir(parents=True, exist_ok=True)
if action == "nan":
    (run_dir / "failure.json").write_text(json.dumps({"status": "nan", "error": "loss is nan at step [7]"}))
    sys.exit(1)
if action == "usage":
    print("longspan: data.path: there is no file 'mine.csv'", file=sys.stderr)
    sys.exit(2)
if action == "crash":
    raise RuntimeError("the driver is gone")
if action == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if action == "empty":
    (run_dir / "metrics.json").write_text('{"test": {"other": 1}}')
    sys.exit(0)
if action == "slow":
    signal.signal(signal.SIGTERM, lambda *_: ((run_dir / "saved").write_text("checkpoint"), sys.exit(143)))
    (run_dir / "ready").write_text(str(os.getpid()))
    time.sleep(60)
if action == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run_dir / "ready").write_text(str(os.getpid()))
    time.sleep(60)
seed = int(run_dir.name.removeprefix("seed-"))
level = {"softmax": 0.4, "linear": 0.3, "window": 0.35}[run_dir.parts[-2].split("-")[0]]
floors = {} if "--no-floors" in sys.argv else {"ridge": {"mse": 0.5}}
mse = level + 0.01 * seed + 0.001 * (seed % 2) * level
cost = {"step_ms": 10 * level, "parameters": 100, "threads": os.environ.get("OMP_NUM_THREADS")}
rows = 10 if action == "other data" else 100
(run_dir / "data.json").write_text(json.dumps({"rows": rows, "padding": 0.1 * seed}))
(run_dir / "environment.json").write_text(json.dumps({"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}))
(run_dir / "metrics.json").write_text(json.dumps({"test": {"mse": mse}, "floors": floors, "cost": cost}))
"""


@pytest.fixture
def fake(toy, monkeypatch):
    """A comparison of the toy recipe whose runs are the program above; `fake(plan={...}, **changes)`."""
    program = toy / "fake.py"
    program.write_text(FAKE)

    def fake_start(job, folder, slot):
        class Fake(type(job)):
            def command(self, folder):
                return [sys.executable, "-S", "-E", str(program), *super().command(folder)[3:]]

        return start(Fake(**vars(job)), folder, slot)

    def run(plan=None, **changes):
        monkeypatch.setenv("FAKE_PLAN", json.dumps(plan or {}))
        request = {"variants": ["softmax", "linear"], "seeds": 3, "run_dir": toy / "cmp", "start": fake_start}
        return compare("toy/demo", **{**request, **changes})

    return run


def started(folder: Path) -> list[str]:
    """Runs that were started, in order, since the last call."""
    path = folder / "started.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def statuses(folder: Path) -> dict[str, str]:
    return {run.run_dir: run.status for run in read_runs(folder).values()}


def test_all_runs_are_made_pairs_first_and_reported(fake, toy):
    result = fake()
    assert [line.split()[0] for line in started(toy / "cmp")] == [
        f"{variant}/seed-{seed}" for seed in range(3) for variant in ("softmax", "linear")
    ]
    assert set(statuses(toy / "cmp").values()) == {"ok"}
    assert result.summary.tables[0].headline.startswith("Use linear here")
    assert {path.name for path in result.files} >= {"summary.csv", "summary.json", "report.md", "report.html"}
    assert result.failures == []
    line = json.loads((toy / "cmp" / "runs.jsonl").read_text().splitlines()[0])
    assert line["overrides"] == ["attention=softmax", "seed=0"]
    assert line["run_dir"] == "softmax/seed-0"
    assert line["metrics"]["test"] == {"mse": 0.4}


def test_floors_are_computed_once(fake, toy):
    result = fake()
    assert [line.endswith("bare") for line in started(toy / "cmp")] == [False, True, True, True, True, True]
    assert result.summary.tables[0].best_floor == ("ridge", 0.5)


def test_floors_go_to_the_next_run_when_the_first_fails(fake, toy):
    result = fake({"softmax/seed-0": "crash"})
    assert [line.endswith("bare") for line in started(toy / "cmp")] == [False, False, True, True, True, True]
    assert result.summary.tables[0].best_floor == ("ridge", 0.5)


def test_started_again_only_what_is_missing_runs(fake, toy):
    fake(seeds=2)
    started(toy / "cmp")
    before = (toy / "cmp" / "runs.jsonl").read_bytes()
    fake(seeds=2)
    assert started(toy / "cmp") == []
    assert (toy / "cmp" / "runs.jsonl").read_bytes() == before
    result = fake(seeds=3, variants=["softmax", "window"])
    assert [line.split()[0] for line in started(toy / "cmp")] == [
        "window/seed-0",
        "window/seed-1",
        "softmax/seed-2",
        "window/seed-2",
    ]
    # What earlier starts made stays in the report, and what they did not is counted as missing.
    rows = {row.variant: row for row in result.summary.tables[0].rows}
    assert {label: (len(row.values), row.missing) for label, row in rows.items()} == {
        "softmax": (3, []),
        "linear": (2, [2]),
        "window": (3, []),
    }


def test_failures_are_recorded_with_their_reason_and_tried_again(fake, toy):
    plan = {"linear/seed-0": "nan", "linear/seed-1": "crash", "softmax/seed-2": "killed", "linear/seed-2": "empty"}
    result = fake(plan)
    found = {run.run_dir: (run.status, run.error) for run in result.failures}
    assert found == {
        "linear/seed-0": ("nan", "loss is nan at step [7]"),
        "linear/seed-1": ("failed", "RuntimeError: the driver is gone"),
        "softmax/seed-2": (
            "failed",
            "ended by SIGKILL; the machine may be out of memory: fewer jobs or a smaller trainer.batch_size",
        ),
        "linear/seed-2": ("failed", "the run ended well but its metrics.json has no mse"),
    }
    page = (toy / "cmp" / "report.md").read_text()
    for run_dir, (_, error) in found.items():
        assert f"`{run_dir}`" in page
        assert error in page
    started(toy / "cmp")
    (toy / "cmp" / "linear" / "seed-2" / "metrics.json").unlink()
    fake()
    # NaN is a result: the same seed would end the same way.
    assert [line.split()[0] for line in started(toy / "cmp")] == ["linear/seed-1", "softmax/seed-2", "linear/seed-2"]
    assert statuses(toy / "cmp")["linear/seed-1"] == "ok"


def test_progress_tells_failures_at_once_and_is_quiet_in_a_pipe(fake, toy, capsys):
    fake({"linear/seed-0": "nan"}, seeds=1)
    assert capsys.readouterr() == ("", "")
    fake({"linear/seed-1": "nan"}, seeds=2, quiet=False)
    errors = capsys.readouterr().err
    assert "✗ linear/seed-1: loss is nan at step [7]" in errors  # brackets are markup to rich


def test_a_request_that_no_run_can_meet_stops_at_once_and_leaves_the_place_free(fake, toy):
    with pytest.raises(UserError, match=r"softmax, seed 0: data\.path: there is no file 'mine\.csv'"):
        fake({"softmax/seed-0": "usage"})
    assert started(toy / "cmp") == ["softmax/seed-0"]
    assert read_runs(toy / "cmp") == {}
    assert not (toy / "cmp" / "softmax" / "seed-0").exists()
    assert fake(overrides=["optim.lr=0.5"]).failures == []


def test_jobs_share_threads_and_gpus(fake, toy, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr("core.training.plan._cores", lambda: 6)
    result = fake(jobs=2)
    assert {run.cost["threads"] for run in result.summary.runs} == {"3"}
    gpus = {json.loads(path.read_text())["gpu"] for path in (toy / "cmp").rglob("environment.json")}
    assert gpus == {"2", "5"}
    assert any("2 runs shared this machine" in warning for warning in result.summary.tables[0].warnings)


def test_a_grid_gets_a_folder_per_setting(fake, toy):
    result = fake(grid=["data.width=4,8"], seeds=2)
    assert len(result.summary.runs) == 8
    assert (toy / "cmp" / "data.width=8" / "linear" / "seed-1" / "metrics.json").is_file()
    assert [table.setting for table in result.summary.tables] == [("data.width=4",), ("data.width=8",)]


def test_settings_whose_names_look_alike_stay_apart(fake, toy):
    grid = ["model.trap=d/a,d-a"]  # both would be called d-a
    result = fake(grid=grid, seeds=1)
    assert {run.run_dir for run in result.summary.runs} == {
        f"model.trap=d-a{number}/{label}/seed-0" for number in ("", "-2") for label in ("linear", "softmax")
    }
    traps = [load_recipe(file).model.trap for file in (toy / "cmp" / "recipes").iterdir()]
    assert sorted(traps) == ["d-a", "d-a", "d/a", "d/a"]
    plots = [path.name for path in result.files if path.parent.name == "plots"]
    assert len(plots) == len(set(plots)) > 0


def test_a_comparison_that_is_continued_keeps_its_baseline_and_its_command_says_all(fake, toy):
    fake(seeds=2, baseline="linear")
    result = fake(seeds=1, variants=["softmax", "window"])
    assert result.summary.plan.baseline == "linear"
    asked = "--variants softmax,linear,window --seeds 2 --baseline linear --jobs 1"
    assert result.summary.plan.command == f"longspan compare toy/demo {asked} --run-dir {toy}/cmp"
    assert fake(seeds=1, baseline="softmax").summary.plan.baseline == "softmax"


def test_threads_that_the_user_asks_for_are_given(fake, toy):
    result = fake(jobs=2, seeds=1, overrides=["trainer.threads=5"])
    assert {run.cost["threads"] for run in result.summary.runs} == {"5"}


def test_runs_that_read_other_data_are_found_out(fake, toy):
    assert not any("did not see the same data" in said for said in fake(seeds=1).summary.tables[0].warnings)
    result = fake({"linear/seed-1": "other data"}, seeds=2)
    assert any("did not see the same data" in said for said in result.summary.tables[0].warnings)


def test_a_folder_called_apps_in_the_working_directory_does_no_harm(toy, toy_environment, monkeypatch):
    (toy / "apps").mkdir()
    (toy / "apps" / "__init__.py").write_text("raise SystemExit('the wrong apps')")
    environment = _environment(Job("r.yaml", "softmax", 0, (), "run", "mse"), 0)
    done = subprocess.run(
        [sys.executable, "-m", "apps", "list", "apps"], cwd=toy, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, "timeseries" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"overrides": ["optim.lr=0.5"]}, r"optim\.lr=0\.01, now it is 0\.5"),
        ({"grid": ["data.width=4,8"]}, "holds another comparison"),
    ],
)
def test_another_question_needs_another_folder(fake, toy, changes, says):
    fake(seeds=1)
    with pytest.raises(UserError, match=says):
        fake(seeds=1, **changes)
    fake(
        seeds=1, overrides=["trainer.threads=1", "predict.scale=2"]
    )  # say how fast and what later, not what is learned


def interrupt(toy_environment, toy, plan: dict, *, first: int, second: int | None = None) -> tuple[int, str, float]:
    """Start a comparison as a process of its own, signal it when its runs are up; exit code, stderr, seconds to end."""
    script = toy / "script.py"
    script.write_text(
        "import sys, core.training.workers as workers\n"
        "from core.training.command import main\n"
        "real = workers.Job.command\n"
        "workers.Job.command = lambda self, folder: [sys.executable, '-S', '-E', 'fake.py', *real(self, folder)[3:]]\n"
        "sys.exit(main('compare toy/demo --variants softmax,linear --seeds 3 --jobs 2 --run-dir cmp'.split()))\n"
    )
    (toy / "fake.py").write_text(FAKE)
    environment = {**toy_environment, "FAKE_PLAN": json.dumps(plan)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, cwd=toy, env=environment, stderr=subprocess.PIPE, text=True) as process:
        waiting = [toy / "cmp" / name / "ready" for name in plan]
        deadline = time.monotonic() + 60
        while not all(path.exists() and path.read_text() for path in waiting):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline, "the runs did not start"
            time.sleep(0.05)
        at = time.monotonic()
        process.send_signal(first)
        if second is not None:
            time.sleep(1)
            assert process.poll() is None, "it did not wait for its runs"
            process.send_signal(second)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors, time.monotonic() - at


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_runs_cleanly_and_keeps_what_is_finished(toy, toy_environment, signum, code):
    plan = {"softmax/seed-1": "slow", "linear/seed-1": "slow"}
    returned, errors, seconds = interrupt(toy_environment, toy, plan, first=signum)
    assert returned == code
    assert seconds < 30
    assert "2 of 6 runs are finished, continue with: longspan compare toy/demo" in errors
    assert "Traceback" not in errors
    assert statuses(toy / "cmp") == {"softmax/seed-0": "ok", "linear/seed-0": "ok"}
    for name in plan:
        assert (toy / "cmp" / name / "saved").read_text() == "checkpoint"
    assert "4 of 6 runs have not run yet" in (toy / "cmp" / "report.md").read_text()


def test_a_second_signal_does_not_wait_for_stubborn_runs(toy, toy_environment):
    plan = {"softmax/seed-0": "stubborn", "linear/seed-0": "slow"}
    returned, errors, seconds = interrupt(toy_environment, toy, plan, first=signal.SIGINT, second=signal.SIGINT)
    assert (returned, "Traceback" in errors) == (130, False)
    assert seconds < 30
    for name in plan:
        with pytest.raises(ProcessLookupError):
            os.kill(int((toy / "cmp" / name / "ready").read_text()), 0)


def test_editing_the_recipe_meanwhile_changes_nothing(toy, monkeypatch):
    own = toy / "own.yaml"
    own.write_text("app: toy\nattention: {variant: window, window: 8}\noptim: {lr: 0.5}\n")
    seen = []

    def edited(job, folder, slot):
        own.write_text("app: toy\noptim: {lr: 0.1}\n")
        seen.append(load_recipe(folder / job.recipe, [f"seed={job.seed}"]))
        raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted):
        compare(own, variants=["hybrid", "linear"], seeds=[3], run_dir=toy / "cmp", start=edited)
    (recipe,) = seen
    assert (recipe.optim.lr, recipe.seed, recipe.attention["window"]) == (0.5, 3, 8)
    assert recipe.attention["variant"] == "hybrid"


def test_two_comparisons_do_not_share_a_folder(fake, toy):
    import fcntl

    (toy / "cmp").mkdir()
    with (toy / "cmp" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another compare is running"):
            fake()


# Two fresh processes import torch and Lightning: half a minute of CPU, minutes on a machine that is busy.
@pytest.mark.timeout(600)
def test_the_real_thing(toy, toy_environment):
    """Two variants, two steps, as processes, through the command; then a report from the folder alone."""
    command = "compare toy/demo trainer.max_steps=2 --variants softmax,linear --seeds 1 --jobs 2 --run-dir cmp"
    done = subprocess.run(
        [sys.executable, "-m", "apps", *command.split()], cwd=toy, env=toy_environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = list(read_runs(toy / "cmp").values())
    assert sorted((run.variant, run.seed, run.status) for run in runs) == [("linear", 0, "ok"), ("softmax", 0, "ok")]
    assert all(run.cost["step_ms"] > 0 and run.cost["peak_bytes"] > 0 for run in runs)
    # The toy model has no attention, so they must agree to the last bit: same order, same budget, same start.
    assert runs[0].metrics["test"]["mse"] == runs[1].metrics["test"]["mse"]
    assert sum("zero" in run.metrics["floors"] for run in runs) == 1
    page = (toy / "cmp" / "report.html").read_text()
    assert len(re.findall("<svg", page)) == 3
    assert str(toy) not in page
    assert {path.name for path in report(toy / "cmp")} >= {"report.html", "report.md"}
