"""`fit`: from a recipe to a run folder; and `evaluate`, its last part on its own."""

import errno
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console

from core.training.app import App, get_app
from core.training.callbacks import Display, Keeper, Meter
from core.training.checkpoint import FORMAT, AtomicCheckpointIO, newest_checkpoint, remove_leftovers
from core.training.data import Data, eval_loader, train_loader
from core.training.errors import RunFailed, UserError
from core.training.evaluation import local_rank, pick_device, run_evaluation
from core.training.interrupt import Stop
from core.training.logs import logging_to, quiet_lightning
from core.training.randomness import seed_all
from core.training.recipe import Recipe, load_recipe
from core.training.run import (
    RunFolder,
    RunResult,
    default_run_dir,
    environment,
    export,
    load_run,
    restore_weights,
    run_checkpoint,
    write_json,
)
from core.training.task import Task

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
    if isinstance(recipe, Recipe):
        if overrides:
            raise UserError("overrides go with a recipe's reference or path; change a Recipe object itself")
    else:
        recipe = load_recipe(recipe, overrides)
    app = get_app(recipe.app)
    device = pick_device(recipe)
    # Lightning starts the other processes of a group by running the same command again; the first one owns the folder.
    first = local_rank() == 0
    if run_dir is None:
        run_dir = default_run_dir(recipe) if first else os.environ[_GROUP_FOLDER]
    folder = RunFolder(Path(run_dir))
    stop, console = Stop(), _console(quiet) if first else None
    if first:
        os.environ[_GROUP_FOLDER] = str(run_dir)
        folder.begin(recipe, resume=resume)
    with (
        folder.locked() if first else nullcontext(),
        logging_to(folder.log, console),
        _threads(recipe),
        stop.watching(),
    ):
        if folder.metrics.is_file():
            log.info("%s is finished already", folder.path)
            return _finished(folder)
        started = time.perf_counter()
        try:
            data = app.part("data")(recipe)
            record = _train(recipe, app, data, folder, stop, console, device)
            if not first:
                return RunResult(folder.path, {})
            return _report(recipe, app, data, folder, stop, device, record, floors, started)
        except Exception as error:
            raise _told(error, recipe, folder) from error


def evaluate(run: str | Path, *, floors: bool = True) -> dict[str, Any]:
    """Test a run again from its checkpoint: metrics, plots and weights are written anew.

    Args:
        run: the folder of a run that has a checkpoint; training need not be finished.
        floors: as for `fit`; False keeps those that metrics.json has.

    Returns:
        What `metrics.json` holds: {"val", "test", "floors", "cost"}.
    """
    started = time.perf_counter()
    run_dir, _, checkpoint = run_checkpoint(run)
    if not Path(run).is_dir():
        raise UserError(f"{run} is a checkpoint file; give the folder of the run, its results are written there")
    loaded = load_run(run_dir)
    folder, stop, recipe = RunFolder(run_dir), Stop(), loaded.recipe
    device = pick_device(recipe)
    with folder.locked(), logging_to(folder.log, _console(None)), _threads(recipe), stop.watching():
        data = loaded.app.part("data")(recipe)
        _, newest, _ = newest_checkpoint(folder.checkpoints)
        record = (newest or checkpoint)["longspan"]
        return _report(recipe, loaded.app, data, folder, stop, device, record, floors, started).metrics


_GROUP_FOLDER = "LONGSPAN_RUN_DIR"  # tells the other processes of a group which folder the first one chose


def _train(
    recipe: Recipe,
    app: App,
    data: Data,
    folder: RunFolder,
    stop: Stop,
    console: Console | None,
    device: torch.device,
) -> dict[str, Any]:
    """Train to the end, or on from the newest checkpoint; returns the record of the last checkpoint."""
    settings = recipe.trainer
    if settings.early_stopping and data.val is None:
        raise UserError("trainer.early_stopping needs a validation part, and the data has none; set it to 0")
    source, checkpoint = _continue_from(folder)
    record = checkpoint.get("longspan")
    if record is not None and record["finished"]:
        return record
    seed_all(recipe.seed)
    task = build_task(recipe, app, data.spec)
    loader = train_loader(
        data,
        batch_size=settings.batch_size,
        seed=recipe.seed,
        workers=settings.workers,
        rank=local_rank(),
        world=settings.devices,
    )
    steps = -(-len(loader) // settings.accumulate) * settings.epochs
    task.total_steps = min(steps, settings.max_steps or steps)
    validate = None
    if data.val is not None:
        val_loader = eval_loader(data, "val", batch_size=settings.batch_size, workers=settings.workers)

        def validate() -> dict[str, float]:
            return run_evaluation(task, val_loader, "val", stop)

    cost = task.cost()
    base = {
        "format": FORMAT,
        "app": app.name,
        "source": recipe.source,
        "recipe": recipe.model_dump(mode="json"),
        "spec": data.spec,
    }
    meter = Meter(loader.order.items, settings.batch_size, cost["tokens_per_item"])
    keeper = Keeper(folder, app, recipe, base, loader, validate, stop, meter, record)
    if record is not None:
        loader.load_state_dict(checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0])
    if local_rank() == 0:
        folder.write_rows(keeper.rows)
        write_json(folder.data, data.summary)
        if record is None:
            write_json(folder.environment, environment(recipe, device))
    log.info("%s: %s parameters, %d steps on %s", recipe.source, f"{cost['parameters']:,}", task.total_steps, device)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=settings.devices,
            strategy=settings.strategy,
            precision=settings.precision,
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.accumulate,
            deterministic=settings.deterministic,
            callbacks=[meter, Display(console, settings.epochs, settings.log_every), keeper],
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder.path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(task, loader, ckpt_path=str(source) if source else None)
    stop.check()
    return keeper.record(task)


def build_task(recipe: Recipe, app: App, spec: dict[str, Any]) -> Task:
    """The app's task; a value that a part of the model refuses is a mistake in the recipe."""
    try:
        return app.part("task")(recipe, spec)
    except ValueError as error:
        raise UserError(f"{recipe.source}: {error}") from error


def _continue_from(folder: RunFolder) -> tuple[Path | None, dict[str, Any]]:
    """The newest readable checkpoint, if the folder has any; says which, and which were passed over."""
    source, checkpoint, skipped = newest_checkpoint(folder.checkpoints)
    if local_rank() == 0:
        remove_leftovers(folder.checkpoints)
        remove_leftovers(folder.path)
    for line in skipped:
        log.warning("passed over: %s", line)
    if source is not None:
        step = checkpoint["global_step"]
        log.info("continuing from %s (epoch %d, step %d)", source.name, checkpoint["epoch"] + 1, step)
    return source, checkpoint


def _report(
    recipe: Recipe,
    app: App,
    data: Data,
    folder: RunFolder,
    stop: Stop,
    device: torch.device,
    record: dict[str, Any],
    floors: bool,
    started: float,
) -> RunResult:
    """Test the best epoch, write metrics.json and the weights."""
    task = build_task(recipe, app, data.spec)
    restore_weights(task, run_checkpoint(folder.path)[2])
    export(folder, recipe, task)
    task.to(device)
    metrics: dict[str, Any] = {"val": {}, "test": {}, "floors": {}, "cost": {}}
    best = record["best"] or {}
    metrics["val"] = {key.removeprefix("val_"): value for key, value in best.items() if key.startswith("val_")}
    files = [folder.weights, folder.config]
    if data.test is not None:
        loader = eval_loader(data, "test", batch_size=recipe.trainer.batch_size, workers=recipe.trainer.workers)
        metrics["test"] = run_evaluation(task, loader, "test", stop)
        files += task.artifacts(folder.path)
        if floors:
            metrics["floors"] = app.part("floors")(recipe, data)
    rows = record["rows"]
    if not metrics["floors"] and folder.metrics.is_file():
        metrics["floors"] = json.loads(folder.metrics.read_text())["floors"]
    measured = {key: median(row[key] for row in rows) for key in ("tokens_per_s", "step_ms")} if rows else {}
    peak = {"peak_bytes": max(row["peak_bytes"] for row in rows)} if rows else {}
    metrics["cost"] = task.cost() | measured | peak | {"seconds": round(record["seconds"], 2)}
    write_json(folder.metrics, metrics)
    shown = "  ".join(f"{name} {value:.5g}" for name, value in metrics["test"].items())
    log.info("test  %s", shown or "(no test part)")
    return RunResult(
        folder.path, metrics, "ok", round(time.perf_counter() - started, 2), len(rows), [folder.metrics, *files]
    )


def _finished(folder: RunFolder) -> RunResult:
    metrics = json.loads(folder.metrics.read_text())
    with folder.rows.open() as rows:
        epochs = max(0, sum(1 for _ in rows) - 1)
    return RunResult(folder.path, metrics, "ok", metrics["cost"].get("seconds", 0.0), epochs, [folder.metrics])


def _told(error: Exception, recipe: Recipe, folder: RunFolder) -> Exception:
    """The error as the user should see it, written to failure.json if a run failed by it."""
    if isinstance(error, UserError):
        return error
    told = error
    if _is_out_of_memory(error):
        told = RunFailed(_out_of_memory_line(error, recipe))
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        told = RunFailed(f"no space left on the disk of {folder.path}; checkpoints are intact, continue with --resume")
    status = told.status if isinstance(told, RunFailed) else "failed"
    said = str(told) if isinstance(told, RunFailed) else f"{type(told).__name__}: {told}"
    with suppress(RunFailed):  # on a full disk this file has no room either; the line on stderr tells
        write_json(folder.failure, {"status": status, "error": said})
    log.error("%s", said, exc_info=None if isinstance(told, RunFailed) else error)
    return told


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator has no error class of its own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _out_of_memory_line(error: Exception, recipe: Recipe) -> str:
    settings = recipe.trainer
    half = max(1, settings.batch_size // 2)
    lengths = [name for name in ("lookback", "length", "max_length") if name in type(recipe.data).model_fields]
    shorter = f" or a smaller data.{lengths[0]}" if lengths else ""
    precise = " or trainer.precision=bf16-mixed" if settings.precision == "32-true" else ""
    reason = " ".join(str(error).split())[:160]
    return (
        f"out of memory ({reason}); try (1) trainer.batch_size={half}, "
        f"(2) with it trainer.accumulate={settings.accumulate * 2}, which keeps the step the same{precise}, "
        f"(3) backbone.checkpoint=true{shorter}"
    )


def _console(quiet: bool | None) -> Console | None:
    console = Console(stderr=True)
    return None if quiet or (quiet is None and not console.is_terminal) else console


@contextmanager
def _threads(recipe: Recipe) -> Iterator[None]:
    """torch's CPU threads as the recipe wants them, and as they were afterwards."""
    before = torch.get_num_threads()
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
