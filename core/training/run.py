"""Run folders: what is in them, and how a finished run comes back to life.

recipe.yaml       resolved and complete         checkpoints/best.ckpt, last.ckpt
metrics.json      {"val", "test", "floors", "cost"}, written last: a run that has it is finished
metrics.csv       a row per epoch               model.safetensors, config.json   weights for use in Python
environment.json  versions, machine, command    data.json                        what the data part reported
log.txt           what happened                 failure.json                     why a run ended early
metrics-unfinished.json   as metrics.json, from `longspan test` of a run whose training is not over
"""

import contextlib
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from core.attention.measurement import processor
from core.training.app import App, get_app
from core.training.checkpoint import UnreadableCheckpoint, newest_checkpoint, read_checkpoint
from core.training.differences import differing, flat, harmless
from core.training.durable import locked, temporary_name, write_atomically, write_text
from core.training.errors import UserError
from core.training.recipe import Recipe, build_recipe, dump
from core.training.task import Task
from core.training.yaml_values import read_yaml


@dataclass
class RunResult:
    """What `fit` returns."""

    run_dir: Path
    metrics: dict[str, Any]
    status: str = "ok"
    seconds: float = 0.0
    epochs: int = 0
    files: list[Path] = field(default_factory=list)


@dataclass
class LoadedRun:
    """A trained run, ready to be used: the task is in evaluation mode with its evaluation weights, on the CPU."""

    run_dir: Path
    recipe: Recipe
    app: App
    task: Task
    spec: dict[str, Any]


class RunFolder:
    """The files of one run by name."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe, self.log = path / "recipe.yaml", path / "log.txt"
        self.metrics, self.rows = path / "metrics.json", path / "metrics.csv"
        self.unfinished = path / "metrics-unfinished.json"
        self.environment, self.data, self.failure = path / "environment.json", path / "data.json", path / "failure.json"
        self.weights, self.config = path / "model.safetensors", path / "config.json"
        self.checkpoints = path / "checkpoints"
        self.best, self.last = self.checkpoints / "best.ckpt", self.checkpoints / "last.ckpt"

    def check(self, recipe: Recipe, *, resume: bool) -> None:
        """Whether the folder can be had for this recipe; changes nothing.

        Raises:
            UserError: it holds a run and `resume` is off, or the run there has another recipe.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--run-dir {self.path} is a file")
        if self.recipe.is_file() and local_rank() == 0:
            if not resume:
                raise UserError(
                    f"{self.path} already holds a run; add --resume to continue it, or choose another --run-dir"
                )
            self._same_recipe(recipe)

    @contextlib.contextmanager
    def taken(self, recipe: Recipe) -> Iterator[None]:
        """The folder is there, has its recipe, and is ours until the end."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {self.path}: {error.strerror}") from error
        with self.locked():
            fresh = not self.recipe.is_file()
            if fresh:
                write_text(self.recipe, dump(recipe))
            self.failure.unlink(missing_ok=True)
            try:
                yield
            except UserError:
                # A mistake that only training could find, such as weights that do not fit: the name stays free.
                if fresh and not any(self.checkpoints.iterdir()):
                    self.recipe.unlink(missing_ok=True)
                raise

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """One process per folder."""
        return locked(self.path, f"another process is training in {self.path}")

    def _same_recipe(self, recipe: Recipe) -> None:
        there = flat(build_recipe(read_yaml(self.recipe), source=str(self.recipe)).model_dump(mode="json"))
        here = flat(recipe.model_dump(mode="json"))
        changed = [key for key in differing(there, here) if not harmless(key)]
        if changed:
            key = changed[0]
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise UserError(
                f"{self.path} was started with {key}={there.get(key)!r}, now it is {here.get(key)!r}{more}; "
                "resume with the same recipe, or choose another --run-dir"
            )

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """metrics.csv from the start: after a resume it has the rows up to the checkpoint, each once."""
        if not rows:
            self.rows.unlink(missing_ok=True)
            return

        columns = _columns(rows)

        def write(file: Any) -> None:
            file.write(_csv_line(columns) + b"".join(_csv_line([row.get(c, "") for c in columns]) for row in rows))

        write_atomically(self.rows, write)

    def add_row(self, rows: list[dict[str, Any]]) -> None:
        """The last of the rows is new: one line more in metrics.csv, or all anew where it has columns of its own."""
        *before, row = rows
        columns = _columns(before)
        if not before or not row.keys() <= set(columns):
            self.write_rows(rows)
            return
        with self.rows.open("ab") as file:
            file.write(_csv_line([row.get(column, "") for column in columns]))


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Columns of metrics.csv: those of any row, as a task may report other figures in a later epoch."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _csv_line(values: list[Any]) -> bytes:
    import io

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def local_rank() -> int:
    """Number of this process in its group on this machine; 0 when it is alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, whole or not at all.

    Raises:
        ValueError: NaN or infinity, which are not JSON and which nobody should read as a result.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def default_run_dir(recipe: Recipe) -> Path:
    """runs/<app>-<recipe>-<time> below the working folder."""
    return Path("runs") / f"{recipe.app}-{Path(recipe.source).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def environment(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the figures: versions, machine, command, commit."""
    packages = ("longspan", "torch", "pytorch-lightning", "numpy")
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "recipe": recipe.source,
        "command": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": cuda or "cpu",
    }


def commit() -> str | None:
    """Commit of the source tree, with "+" when it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "") if head.returncode == 0 else None


def build_task(recipe: Recipe, app: App, spec: dict[str, Any]) -> Task:
    """The app's task; a value that a part of the model refuses is a mistake in the recipe."""
    try:
        return app.part("task")(recipe, spec)
    except ValueError as error:
        raise UserError(f"{recipe.source}: {error}") from error


def restore_weights(task: Task, checkpoint: dict[str, Any]) -> None:
    """Give the task the evaluation weights of a checkpoint: the running mean where there is one."""
    task.load_state_dict(checkpoint["state_dict"])
    average = checkpoint["longspan"]["average"]
    if average is not None:
        with torch.no_grad():
            parameters = dict(task.named_parameters())
            for name, mean in average["mean"].items():
                parameters[name].copy_(mean)
    task.average = None


def run_checkpoint(run: str | Path) -> tuple[Path, Path, dict[str, Any]]:
    """Folder, checkpoint file and content for a run folder (its best epoch) or a .ckpt file.

    A run that was stopped in its first epoch has no best one yet: then it is the newest checkpoint.

    Raises:
        UserError: neither; or the best epoch's checkpoint is damaged or gone, for another epoch is another result.
    """
    path = Path(run)
    if "://" in str(run) or path.is_file() or path.suffix == ".ckpt":
        return path.parent.parent if path.parent.name == "checkpoints" else path.parent, path, read_checkpoint(run)
    if not path.is_dir():
        raise UserError(f"there is no run folder or checkpoint {str(run)!r}")
    folder = RunFolder(path)
    lost = ""
    if folder.best.is_file():
        try:
            return path, folder.best, read_checkpoint(folder.best)
        except UnreadableCheckpoint as error:
            lost = str(error)
    found, checkpoint, _ = newest_checkpoint(folder.checkpoints)
    if found is None:
        raise UserError(f"{path} holds no checkpoint; is it the folder of a run?")
    if lost or checkpoint["longspan"]["best"] is not None:
        raise UserError(
            f"{path}: the checkpoint of the best epoch cannot be used ({lost or f'there is no {folder.best.name}'}); "
            f"bring it back, or to take another epoch on purpose copy {found.name} to {folder.best}"
        )
    return path, found, checkpoint


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """A trained run from its folder, or from one of its checkpoint files alone.

    Args:
        run: the folder or the .ckpt file.
        overrides: "predict.key=value"; whatever else the recipe says is what the weights were trained with.

    Raises:
        UserError: no run, no readable checkpoint, its app is not installed, or an override of something else.
    """
    for override in overrides:
        if not override.startswith("predict."):
            raise UserError(f"override {override!r}: a trained run can only be given predict.KEY=VALUE")
    run_dir, _, checkpoint = run_checkpoint(run)
    record = checkpoint["longspan"]
    recipe = build_recipe(record["recipe"], overrides, source=record["source"])
    app = get_app(recipe.app).judged_for(recipe)
    task = build_task(recipe, app, record["spec"])
    restore_weights(task, checkpoint)
    task.eval()
    return LoadedRun(run_dir, recipe, app, task, record["spec"])


def export(folder: RunFolder, recipe: Recipe, task: Task) -> None:
    """model.safetensors and config.json: all that `load_model` needs."""
    config = {"format": 1, "source": recipe.source, "recipe": recipe.model_dump(mode="json"), "spec": task.spec}
    write_json(folder.config, config)
    temporary = temporary_name(folder.weights)
    safetensors.torch.save_model(task.model, str(temporary))
    os.replace(temporary, folder.weights)


def load_model(run: str | Path) -> nn.Module:
    """The model of a run in evaluation mode, from `model.safetensors` and `config.json` alone.

    Raises:
        UserError: one of the two files is missing or not what it should be.
    """
    folder = RunFolder(Path(run))
    for path in (folder.config, folder.weights):
        if not path.is_file():
            raise UserError(f"{folder.path} has no {path.name}; it is written when a run finishes")
    try:
        config = json.loads(folder.config.read_text())
        recipe = build_recipe(config["recipe"], source=config["source"])
        task = build_task(recipe, get_app(recipe.app), config["spec"])
        safetensors.torch.load_model(task.model, str(folder.weights))
    except (json.JSONDecodeError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder.path}: config.json and model.safetensors do not form a model ({error})") from error
    return task.model.eval()
