"""What a compare folder holds on disk: the plan (`compare.json`) and one line per run (`runs.jsonl`).

The ledger is the memory of a comparison: a run that has a line here is not made again, and the report is made from
these two files and the runs' `metrics.csv` alone. Lines are only ever added; where a run has two (it failed, then
succeeded when compare was started again), the last one counts.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from core.training.durable import write_text
from core.training.errors import UserError
from core.training.statistics import Better

Status = Literal["ok", "failed", "nan"]
Key = tuple[tuple[str, ...], str, int]

PLAN = "compare.json"
RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Plan:
    """What was asked: the question that the runs of this folder answer together.

    Attributes:
        recipe: recipe reference or path, as given.
        app: name of the app.
        metric: primary metric of the app.
        better: the direction in which the metric improves.
        variants: attention section by label ("hybrid:window=16"), as resolved from the recipe.
        seeds: seeds of the runs.
        settings: one tuple of `key=value` per point of the grid; a single empty one where there is no grid.
        baseline: label that the others are compared with.
        overrides: `key=value` of all runs.
        jobs: runs side by side.
        threads: CPU threads given to each run; None: not limited by compare.
        command: the command that starts this comparison again.
        configs: the resolved recipe per setting, without attention and seed, which is all that the runs differ in.
        environment: versions and machine, as text.
    """

    recipe: str
    app: str
    metric: str
    better: Better
    variants: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    settings: tuple[tuple[str, ...], ...] = ((),)
    baseline: str = ""
    overrides: tuple[str, ...] = ()
    jobs: int = 1
    threads: int | None = None
    command: str = ""
    configs: tuple[dict[str, Any], ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def planned(self) -> list[Key]:
        """Every run of the plan. Seeds turn slowest, so an interrupted comparison holds whole pairs."""
        return [(setting, label, seed) for setting in self.settings for seed in self.seeds for label in self.variants]


@dataclass(frozen=True)
class Run:
    """One finished run, good or bad.

    Attributes:
        variant: label of the variant.
        seed: its seed.
        overrides: all `key=value` that it was started with, attention and seed included.
        status: "ok"; "nan" where the loss or a metric was not finite; "failed" for any other end.
        error: the one-line reason where it is not ok.
        metrics: {"val": {...}, "test": {...}, "floors": {...}} of its metrics.json; may be empty where it is not ok.
        cost: {"parameters", "flops_per_item", "state_bytes", "tokens_per_s", "step_ms", "peak_bytes", "seconds"}.
        seconds: wall time of the process.
        run_dir: relative to the compare folder.
        setting: the point of the grid.
        data: the same for runs whose data.json says the same; None where it is not known.
    """

    variant: str
    seed: int
    overrides: tuple[str, ...]
    status: Status
    error: str | None
    metrics: dict[str, Any]
    cost: dict[str, Any]
    seconds: float
    run_dir: str
    setting: tuple[str, ...] = ()
    data: str | None = None

    @property
    def key(self) -> Key:
        """What makes the run different from the others."""
        return (self.setting, self.variant, self.seed)


def file_names(texts: Sequence[str]) -> list[str]:
    """Names for files and folders that say what is in them on any system; no two texts share one.

    The first of several that would gets the plain name, so names stay as they are when texts are added at the end.
    """
    taken: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        plain = "".join(letter if letter.isalnum() or letter in "=.-_" else "-" for letter in text)
        name, number = plain, 2
        while name.lower() in {other.lower() for other in taken.values()}:  # some file systems do not tell A from a
            name, number = f"{plain}-{number}", number + 1
        taken[text] = name
    return [taken[text] for text in texts]


def write_plan(folder: Path, plan: Plan) -> None:
    """Write the plan; a crash leaves the old one or the new one, never half of it."""
    write_text(folder / PLAN, json.dumps(asdict(plan), indent=2) + "\n")


def read_plan(folder: Path) -> Plan | None:
    """The folder's plan, None where it has none; UserError for a damaged one."""
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["seeds"], values["overrides"] = tuple(values["seeds"]), tuple(values["overrides"])
        values["settings"] = tuple(tuple(setting) for setting in values["settings"])
        values["configs"] = tuple(values["configs"])
        return Plan(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and start compare again") from None


def append_run(folder: Path, run: Run) -> None:
    """Add one line with a single write and force it to the disk; OSError (a full disk) leaves the file as it was."""
    line = (json.dumps(_finite(asdict(run)), allow_nan=False) + "\n").encode()
    path = folder / RUNS
    _drop_torn_line(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(f"could not write a whole line to {path}: is the disk full?")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def read_runs(folder: Path) -> dict[Key, Run]:
    """The last line of every run, by key, in order of first appearance.

    A last line without its newline was cut off while being written and does not count: its run is found again through
    its own metrics.json. Any other line that cannot be read is a UserError that names it.
    """
    path = folder / RUNS
    if not path.is_file():
        return {}
    runs: dict[Key, Run] = {}
    names = {entry.name for entry in fields(Run)}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            values = json.loads(line)
            values["overrides"], values["setting"] = tuple(values["overrides"]), tuple(values.get("setting", ()))
            run = Run(**{name: value for name, value in values.items() if name in names})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} cannot be read ({error}); remove that line") from None
        runs[run.key] = run
    return runs


def read_curve(path: Path, column: str) -> list[tuple[float, float]]:
    """(step, value) pairs of one column of a run's metrics.csv; rows where it is empty or not finite are left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row.get("step"), row.get(column)) for row in csv.DictReader(file)]
    points = [(float(step), float(value)) for step, value in rows if step and value]
    return [(step, value) for step, value in points if math.isfinite(value)]


def _drop_torn_line(path: Path) -> None:
    if not path.is_file() or not (content := path.read_bytes()) or content.endswith(b"\n"):
        return
    os.truncate(path, content.rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers become null, which reads back as "not there"."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
