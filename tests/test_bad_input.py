"""What a user gets for a mistake: one clear line, exit code 2, no traceback, and nothing that was there is lost."""

import pickle
import re
import zipfile
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

from core.training.command import main

SMALL = ["data.lookback=48", "data.horizon=24", "trainer.max_steps=2", "trainer.accelerator=cpu"]


def table(rows=600):
    start = datetime(2024, 1, 1)
    return [["date", "load", "OT"]] + [
        [f"{start + timedelta(hours=i):%Y-%m-%d %H:%M:%S}", f"{i % 24}", f"{i / 10}"] for i in range(rows)
    ]


@pytest.fixture
def own_file(tmp_path):
    def write(rows) -> Path:
        path = tmp_path / "own.csv"
        path.write_text("".join(",".join(row) + "\n" for row in rows))
        return path

    return write


def refused(capsys, words, code=2) -> str:
    """Run the command; its only line on stderr, after checking the exit code and that no traceback is shown."""
    assert main([str(word) for word in words]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("longspan: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fti", "timeseries/demo"], r"did you mean 'fit'|choose from .*fit"),
        (["fit", "timeseries/demoo"], r"unknown recipe .* \(did you mean 'timeseries/demo'\?\)"),
        (["fit", "timeserie/demo"], r"did you mean 'timeseries/demo'"),
        (["fit", "nowhere.yaml"], r"there is no recipe file 'nowhere.yaml'"),
        (["fit", "timeseries/demo", "optim.lrr=1"], r"unknown key 'optim.lrr' \(did you mean 'lr'\?\)"),
        (["fit", "timeseries/demo", "optim.lr=fast"], r"optim.lr must be .*number, got 'fast'"),
        (["fit", "timeseries/demo", "trainer.epochs='3'"], r"trainer.epochs must be .*integer, got '3'"),
        (["fit", "timeseries/demo", "attention=linaer"], r"unknown attention 'linaer' \(did you mean 'linear'\?\)"),
        (
            ["fit", "timeseries/demo", "attention={variant: window, windw: 3}"],
            r"no option 'windw' \(did you mean 'window'",
        ),
        (["fit", "timeseries/demo", "attention={variant: window, window: 0}"], r"window must be at least 1"),
        (["fit", "timeseries/demo", "attention={variant: linear, feature_map: tailor}"], r"did you mean 'taylor'"),
        (["fit", "timeseries/demo", "backbone.dim=32", "backbone.heads=5"], r"heads must divide dim: 5 .* 32; try"),
        (
            ["fit", "timeseries/demo", "backbone.positions=rop"],
            r"positions must be .*, got 'rop' \(did you mean 'rope'",
        ),
        (["fit", "timeseries/demo", "backbone.layout=lz"], r"layout"),
        (["compare", "timeseries/demo", "--variants", "softmax,linaer"], r"did you mean 'linear'"),
        (["compare", "timeseries/demo", "--variants", "softmax", "--seeds", "many"], r"--seeds must be"),
        (["test", "runs/nowhere"], r"there is no run folder"),
        (["report", "runs/nowhere"], r"there is no folder of a comparison"),
        (["schema", "timeserie"], r"did you mean 'timeseries'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_in_the_request(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, words)
    assert re.search(told, line), line
    assert list(tmp_path.iterdir()) == [], "a refused request leaves nothing behind"


def spoil_cell(rows):
    rows[100][1] = "n/a?"


def repeat_row(rows):
    rows.insert(50, rows[49])


def swap_rows(rows):
    rows[10], rows[20] = rows[20], rows[10]


def empty_cell(rows):
    rows[200][2] = ""


def keep_thirty(rows):
    del rows[31:]


def leave_it(rows):
    assert len(rows) == 601


@pytest.mark.parametrize(
    ("spoil", "overrides", "told"),
    [
        (leave_it, ["data.targets=[OTT]"], r"'OTT' does not exist \(did you mean 'OT'\?\)"),
        (leave_it, ["data.time=when"], r"no time column 'when'; columns: date, load, OT"),
        (spoil_cell, [], r"row 100 \(line 101\), column 'load': 'n/a\?' is not a number"),
        (repeat_row, [], r"is there twice \(rows 49 and 50\)"),
        (swap_rows, [], r"not sorted"),
        (empty_cell, [], r"'OT' has 1 missing values .*data.missing=error.*data.missing=mask"),
        (keep_thirty, [], r"too short: look-back 48 \+ horizon 24"),
        (lambda rows: rows.clear(), [], r"is empty \(0 bytes\)"),
    ],
)
def test_a_mistake_in_the_file(spoil, overrides, told, own_file, capsys, tmp_path):
    rows = table()
    spoil(rows)
    path = own_file(rows)
    before = path.read_bytes()
    line = refused(
        capsys, ["fit", "timeseries/csv", f"data.path={path}", *SMALL, *overrides, "--run-dir", tmp_path / "r"]
    )
    assert re.search(told, line), line
    assert "own.csv" in line or "too short" in line
    assert path.read_bytes() == before
    assert not (tmp_path / "r").exists(), "the mended request must find its run folder free"


def test_a_missing_file_is_named_with_its_neighbour(own_file, capsys, tmp_path):
    path = own_file(table())
    line = refused(
        capsys, ["fit", "timeseries/csv", f"data.path={path.with_name('owm.csv')}", "--run-dir", tmp_path / "r"]
    )
    assert re.search(r"no file .*owm\.csv' \(did you mean 'own\.csv'\?\)", line), line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "run"
    assert main(["fit", "timeseries/demo", *SMALL, "--no-floors", "--run-dir", str(folder)]) == 0
    return folder


def truncated(path, good):
    path.write_bytes(good[: len(good) // 2])


def emptied(path, good):
    path.write_bytes(b"")


def pickled(path, good):
    path.write_bytes(pickle.dumps({"state_dict": {}}))


def of_another_program(path, good):
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)


def with_objects(path, good):
    torch.save({"longspan": {"format": 1}, "recipe": datetime(2024, 1, 1)}, path)


def flipped(path, good):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    spoiled = bytearray(good)
    spoiled[largest.header_offset + 300] ^= 0xFF
    path.write_bytes(bytes(spoiled))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncated, r"cut off"),
        (emptied, r"empty \(0 bytes\)"),
        (pickled, r"pickle file, which could run code"),
        (of_another_program, r"not one that Longspan wrote"),
        (with_objects, r"pickled Python objects"),
        (flipped, r"damaged"),
    ],
)
def test_a_checkpoint_that_cannot_be_read(damage, told, trained, tmp_path, own_file, capsys):
    good = (trained / "checkpoints" / "best.ckpt").read_bytes()
    path = tmp_path / "some.ckpt"
    path.write_bytes(good)
    damage(path, good)
    output = tmp_path / "forecast.csv"
    output.write_text("mine")
    line = refused(capsys, ["predict", path, "--input", own_file(table()), "--output", output])
    assert re.search(told, line), line
    assert "some.ckpt" in line
    assert output.read_text() == "mine"


def test_a_checkpoint_from_the_net_is_not_fetched(own_file, capsys, tmp_path):
    output = tmp_path / "f.csv"
    line = refused(capsys, ["predict", "https://example.org/x.ckpt", "--input", own_file(table()), "--output", output])
    assert "is an address" in line


def test_a_folder_with_a_run_is_not_overwritten(trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    line = refused(capsys, ["fit", "timeseries/demo", *SMALL, "--run-dir", trained])
    assert "already holds a run; add --resume" in line
    line = refused(capsys, ["fit", "timeseries/demo", *SMALL, "optim.lr=0.5", "--resume", "--run-dir", trained])
    assert "was started with optim.lr=" in line
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
