"""`fit`: from a recipe to a run folder; and `evaluate`, its last part on its own."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from core.attention.registry import LAYER_OPTIONS
from core.attention.variants.auto import settle
from core.training.app import get_app
from core.training.checkpoint import newest_checkpoint
from core.training.data import Data, check_unchanged, eval_loader
from core.training.errors import RunFailed, UserError
from core.training.evaluation import pick_device, run_evaluation
from core.training.failures import told
from core.training.interrupt import Stop
from core.training.logs import logging_to
from core.training.randomness import seed_all
from core.training.recipe import Recipe, load_recipe
from core.training.run import (
    RunFolder,
    RunResult,
    build_task,
    default_run_dir,
    export,
    load_run,
    local_rank,
    restore_weights,
    run_checkpoint,
    write_json,
)
from core.training.train import Session, Training

log = logging.getLogger(__name__)


def fit(
    recipe: str | Path | Recipe,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    quiet: bool | None = None,
    floors: bool = True,
) -> RunResult:
    """Train what a recipe says, test the best epoch, and leave everything in a run folder.

    Args:
        recipe: reference ("timeseries/etth1"), path, or a recipe made in Python.
        run_dir: the folder; None: runs/<app>-<recipe>-<time>.
        resume: continue a run that is there, bit for bit as if it had not been interrupted; a finished one is
            returned as it is, and an empty folder is started.
        overrides: "key=value", for a reference or path.
        quiet: nothing on the terminal; None: quiet unless stderr is a terminal.
        floors: also compute the app's floors (they depend on the data alone, so `compare` does it once).

    Returns:
        The folder and `metrics.json` as a dictionary.

    Raises:
        UserError: the request cannot be met; nothing was trained.
        RunFailed: NaN, out of memory, a full disk; the folder says why and keeps its checkpoints.
        Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
    """
    recipe = _resolved(recipe, overrides)
    app, device = get_app(recipe.app).judged_for(recipe), pick_device(recipe)
    with _torch_settings(recipe):
        recipe = _settled(recipe, device)
    folder = RunFolder(_run_dir(recipe, run_dir))
    folder.check(recipe, resume=resume)
    # Lightning starts the other processes of a group by running the same command again; the first one owns the folder.
    first = local_rank() == 0
    stop, console = Stop(), _console(quiet) if first else None
    started = time.perf_counter()
    with logging_to(console) as journal, _torch_settings(recipe), stop.watching():
        if folder.metrics.is_file():
            log.info("%s is finished already", folder.path)
            return _finished(folder)
        try:
            # All that can be wrong with the request shows before the folder is taken, so that the mended one finds
            # its name free.
            data = _plain(app.part("data")(recipe), app.name)
            seed_all(recipe.seed)
            session = Session(recipe, app, device, folder, stop, console, data, build_task(recipe, app, data.spec))
            training = Training(session)
            if not first:
                training.run()
                return RunResult(folder.path, {})
            with folder.taken(recipe):
                journal.open(folder.log)
                return _report(session, training.run(), floors, started)
        except Exception as error:
            failure = told(error, recipe, folder)
            if failure is error:
                raise
            raise failure from error


def evaluate(run: str | Path, *, floors: bool = True) -> dict[str, Any]:
    """Test a run again from its checkpoint: metrics, plots and weights are written anew.

    Args:
        run: the folder of a run that has a checkpoint. Where training is not finished, the figures so far are written
            to metrics-unfinished.json, and `fit` with `resume` still goes on.
        floors: as for `fit`; False keeps those that metrics.json has.

    Returns:
        What `metrics.json` holds: {"val", "test", "floors", "cost"}.

    Raises:
        UserError: no run, no readable checkpoint of its best epoch, or data that it was not trained on.
    """
    started = time.perf_counter()
    if Path(run).is_file():
        raise UserError(f"{run} is a checkpoint file; give the folder of the run, its results are written there")
    loaded = load_run(run)
    recipe, folder, stop, console = loaded.recipe, RunFolder(loaded.run_dir), Stop(), _console(None)
    device = pick_device(recipe)
    with folder.locked(), logging_to(console) as journal, _torch_settings(recipe), stop.watching():
        journal.open(folder.log)
        data = _plain(loaded.app.part("data")(recipe), loaded.app.name)
        check_unchanged(loaded.spec, data.spec, folder.path)
        session = Session(recipe, loaded.app, device, folder, stop, console, data, loaded.task)
        _, checkpoint, skipped = newest_checkpoint(folder.checkpoints)
        for line in skipped:
            log.warning("passed over: %s", line)
        if not checkpoint["longspan"]["finished"]:
            log.warning("training is not finished, these figures are those of the best epoch so far")
        return _report(session, checkpoint["longspan"], floors, started).metrics


def _resolved(recipe: str | Path | Recipe, overrides: Sequence[str]) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise UserError("overrides go with a recipe's reference or path; change a Recipe object itself")
    return recipe


def _settled(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with `auto` replaced by what it chooses here: the run's folder names it and loads on any machine."""
    width = recipe.backbone.dim // recipe.backbone.heads

    def settled(chosen: dict[str, Any]) -> dict[str, Any]:
        if "variant" not in chosen:
            return {letter: settled(one) for letter, one in chosen.items()}
        if chosen["variant"] != "auto":
            return chosen
        kept = {key: value for key, value in chosen.items() if key in LAYER_OPTIONS}
        given = {key: value for key, value in chosen.items() if key != "variant" and key not in kept}
        try:
            return {"variant": settle(width, **{"device": device.type, **given}), **kept}
        except ValueError as error:
            raise UserError(f"{recipe.source}: attention: {error}") from error

    return recipe.model_copy(update={"attention": settled(recipe.attention)})


def _plain(data: Data, app: str) -> Data:
    """The data with spec and summary as JSON gives them back, so that training sees what a loaded run will see."""
    try:
        spec, summary = (json.loads(json.dumps(value, allow_nan=False)) for value in (data.spec, data.summary))
    except (TypeError, ValueError) as error:
        raise TypeError(f"app {app!r}: spec and summary of its data must be plain JSON values: {error}") from error
    return replace(data, spec=spec, summary=summary)


_GROUP_FOLDER = "LONGSPAN_RUN_DIR"  # tells the other processes of a group which folder the first one chose


def _run_dir(recipe: Recipe, given: str | Path | None) -> Path:
    if given is None and local_rank() > 0:
        if _GROUP_FOLDER not in os.environ:
            raise UserError("several processes on one run need --run-dir, so that all have the same folder")
        return Path(os.environ[_GROUP_FOLDER])
    chosen = Path(given) if given is not None else default_run_dir(recipe)
    if recipe.trainer.devices > 1:
        os.environ[_GROUP_FOLDER] = str(chosen)
    return chosen


def _report(session: Session, record: dict[str, Any], floors: bool, started: float) -> RunResult:
    """Test the best epoch, write metrics.json (metrics-unfinished.json while training is not over) and the weights."""
    recipe, data, folder, task = session.recipe, session.data, session.folder, session.task
    checkpoint = run_checkpoint(folder.path)[2]
    restore_weights(task, checkpoint)
    export(folder, recipe, task)
    task.to(session.device)
    metrics: dict[str, Any] = {"val": {}, "test": {}, "floors": {}, "cost": {}}
    # The last row of the checkpoint whose weights are tested: val and test speak of the same epoch.
    row = (checkpoint["longspan"]["rows"] or [{}])[-1]
    metrics["val"] = {key.removeprefix("val_"): value for key, value in row.items() if key.startswith("val_")}
    target = folder.metrics if record["finished"] else folder.unfinished
    files = [target, folder.weights, folder.config]
    if data.test is not None:
        loader = eval_loader(data, "test", batch_size=recipe.trainer.batch_size, workers=recipe.trainer.workers)
        metrics["test"] = run_evaluation(task, loader, "test", session.stop)
        files += task.artifacts(folder.path)
        if floors:
            metrics["floors"] = _finite_floors(session)
        elif target.is_file():
            metrics["floors"] = json.loads(target.read_text())["floors"]
    metrics["cost"] = task.cost() | _measured(record)
    write_json(target, metrics)
    if record["finished"]:
        folder.unfinished.unlink(missing_ok=True)
        folder.failure.unlink(missing_ok=True)
    shown = "  ".join(f"{name} {value:.5g}" for name, value in metrics["test"].items())
    log.info("test  %s", shown or "(no test part)")
    seconds = round(time.perf_counter() - started, 2)
    return RunResult(folder.path, metrics, "ok", seconds, len(record["rows"]), files)


def _finite_floors(session: Session) -> dict[str, dict[str, float]]:
    floors = session.app.part("floors")(session.recipe, session.data)
    for name, values in floors.items():
        for metric, value in values.items():
            if not math.isfinite(value):
                raise RunFailed(f"the floor {name!r} has {metric} {value}; --no-floors leaves the floors out")
    return floors


def _measured(record: dict[str, Any]) -> dict[str, float]:
    """Speed of the middle epoch, peak memory and time of training, over all epochs of the run."""
    rows = record["rows"]
    speed = {key: median(row[key] for row in rows) for key in ("tokens_per_s", "step_ms")} if rows else {}
    peak = {"peak_bytes": max(row["peak_bytes"] for row in rows)} if rows else {}
    return speed | peak | {"seconds": round(record["seconds"], 2)}


def _finished(folder: RunFolder) -> RunResult:
    metrics = json.loads(folder.metrics.read_text())
    with folder.rows.open() as rows:
        epochs = max(0, sum(1 for _ in rows) - 1)
    return RunResult(folder.path, metrics, "ok", metrics["cost"].get("seconds", 0.0), epochs, [folder.metrics])


def _console(quiet: bool | None) -> Console | None:
    console = Console(stderr=True)
    return None if quiet or (quiet is None and not console.is_terminal) else console


@contextmanager
def _torch_settings(recipe: Recipe) -> Iterator[None]:
    """CPU threads and determinism as the recipe wants them, and as they were afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
