"""runs.jsonl is the memory of a comparison: nothing that was in it may be lost, nothing half-written may count."""

import errno
import os
from dataclasses import replace

import pytest

from core.training.errors import UserError
from core.training.ledger import Plan, Run, append_run, read_curve, read_plan, read_runs, write_plan

PLAN = Plan(
    recipe="toy/demo",
    app="toy",
    metric="mse",
    better="lower",
    variants={"softmax": {"variant": "softmax"}, "window:window=8": {"variant": "window", "window": 8}},
    seeds=(0, 3),
    settings=(("data.width=4",), ("data.width=8",)),
    baseline="softmax",
    configs=({"data": {"width": 4}}, {"data": {"width": 8}}),
)
RUN = Run(
    variant="softmax",
    seed=3,
    overrides=("attention=softmax", "seed=3"),
    status="ok",
    error=None,
    metrics={"test": {"mse": 0.1234567890123456}},
    cost={"step_ms": 1.5},
    seconds=2.0,
    run_dir="softmax/seed-3",
    setting=("data.width=4",),
)


def test_plan_and_runs_come_back_equal(tmp_path):
    write_plan(tmp_path, PLAN)
    append_run(tmp_path, RUN)
    assert read_plan(tmp_path) == PLAN
    assert read_runs(tmp_path) == {(("data.width=4",), "softmax", 3): RUN}


def test_seeds_turn_slowest_so_that_an_interrupted_comparison_holds_pairs():
    plan = replace(PLAN, settings=((),))
    assert [(label, seed) for _, label, seed in plan.planned()] == [
        ("softmax", 0),
        ("window:window=8", 0),
        ("softmax", 3),
        ("window:window=8", 3),
    ]


def test_the_last_line_of_a_run_counts(tmp_path):
    append_run(tmp_path, replace(RUN, status="failed", error="the disk was full"))
    append_run(tmp_path, RUN)
    assert [run.status for run in read_runs(tmp_path).values()] == ["ok"]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_rest_kept(tmp_path):
    append_run(tmp_path, RUN)
    whole = (tmp_path / "runs.jsonl").read_bytes()
    second = replace(RUN, seed=0)
    for cut in (1, 20, len(whole) - 1):
        (tmp_path / "runs.jsonl").write_bytes(whole + whole[:cut])
        assert list(read_runs(tmp_path)) == [RUN.key]
        append_run(tmp_path, second)
        assert list(read_runs(tmp_path)) == [RUN.key, second.key]


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    append_run(tmp_path, RUN)
    before = (tmp_path / "runs.jsonl").read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            append_run(tmp_path, replace(RUN, seed=0))
    assert (tmp_path / "runs.jsonl").read_bytes() == before


def test_a_damaged_line_is_named(tmp_path):
    append_run(tmp_path, RUN)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write("{not json}\n")
    with pytest.raises(UserError, match=r"runs\.jsonl, line 2 cannot be read"):
        read_runs(tmp_path)


def test_a_damaged_plan_is_named(tmp_path):
    (tmp_path / "compare.json").write_text('{"recipe": 1')
    with pytest.raises(UserError, match=r"compare\.json is damaged"):
        read_plan(tmp_path)


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    append_run(tmp_path, replace(RUN, status="nan", metrics={"test": {"mse": float("nan")}}))
    assert "NaN" not in (tmp_path / "runs.jsonl").read_text()
    assert read_runs(tmp_path)[RUN.key].metrics == {"test": {"mse": None}}


def test_curves_leave_out_what_is_not_there(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,val_mse\n10,1,0.5\n20,2,\n30,3,nan\n40,4,0.25\n")
    assert read_curve(path, "val_mse") == [(10.0, 0.5), (40.0, 0.25)]
    assert read_curve(path, "val_mae") == []
    assert read_curve(tmp_path / "none.csv", "val_mse") == []
