"""What happens around the training steps: measuring, the progress bar, and the keeper of epochs and checkpoints.

Checkpoints are saved at two places only, because Lightning resumes exactly from these: after an optimiser step that
is not the last of its epoch, and at the end of an epoch. The stage in the record says which:

    "steps"      in the middle of an epoch
    "validate"   the epoch's training is done, its validation is not (a signal came)
    "epoch"      the epoch is done
"""

import logging
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core.training.app import App
from core.training.data import Loader
from core.training.errors import Interrupted, UserError
from core.training.interrupt import Stop
from core.training.optim import WeightAverage
from core.training.randomness import random_state, set_random_state
from core.training.recipe import Recipe
from core.training.run import RunFolder
from core.training.task import Task

log = logging.getLogger(__name__)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU's allocator, or of this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter(Callback):
    """Time and throughput of the training part of each epoch; validation and saving are not counted."""

    def __init__(self, order_items: int, batch_size: int, tokens_per_item: float):
        self.items, self.batch_size, self.tokens_per_item = order_items, batch_size, tokens_per_item
        self.epoch_seconds = 0.0  # of this epoch before the process was interrupted
        self.seconds = 0.0  # of all finished epochs
        self.batches = 0
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The clock starts here for an epoch that is continued in its middle."""
        self._since = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The clock starts here for a whole epoch."""
        self._since, self.epoch_seconds, self.batches = time.perf_counter(), 0.0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count."""
        self.batches += 1

    def finish_epoch(self, device: torch.device) -> dict[str, float | int]:
        """Columns of metrics.csv for the epoch that ends."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = self._elapsed()
        self.seconds += seconds
        items = min(self.items, self.batches * self.batch_size)
        return {
            "tokens_per_s": round(items * self.tokens_per_item / seconds, 1),
            "step_ms": round(1000 * seconds / max(1, self.batches), 3),
            "peak_bytes": peak_bytes(device),
        }

    def _elapsed(self) -> float:
        return self.epoch_seconds + time.perf_counter() - self._since

    def state_dict(self) -> dict[str, Any]:
        """Seconds and batches, so that a resumed epoch is measured as a whole."""
        return {"epoch_seconds": self._elapsed(), "seconds": self.seconds, "batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.epoch_seconds, self.seconds = state_dict["epoch_seconds"], state_dict["seconds"]
        self.batches = state_dict["batches"]


class Keeper(Checkpoint):
    """Ends epochs: validation, best epoch, early stopping, the row in metrics.csv, and all saving.

    Args:
        folder: where to save.
        base: the part of the record that does not change (recipe, spec, ...).
        loader: the training batches; its order is set per epoch.
        validate: metrics of the val part; None: there is none, and the last epoch is the best.
        stop: what the signal handlers leave.
        record: of the checkpoint that the run continues from; None: a new run.
    """

    def __init__(
        self,
        folder: RunFolder,
        app: App,
        recipe: Recipe,
        base: dict[str, Any],
        loader: Loader,
        validate: Callable[[], dict[str, float]] | None,
        stop: Stop,
        meter: Meter,
        record: dict[str, Any] | None = None,
    ):
        self.folder, self.app, self.recipe, self.base, self.loader = folder, app, recipe, base, loader
        self.validate, self.stop, self.meter, self.resumed = validate, stop, meter, record
        self.saves, self.stage = 0, "epoch"
        self.rows: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {}  # of an epoch whose validation is still to come
        self.best: dict[str, Any] | None = None  # the row of the best epoch
        self.wait = 0  # epochs since then
        self.finished: str | None = None  # why training is over
        self.random: dict[str, Any] | None = None
        if record is not None:
            self.saves, self.stage, self.rows, self.row = (
                record["saves"],
                record["stage"],
                record["rows"],
                record["row"],
            )
            self.best, self.wait, self.finished = record["best"], record["wait"], record["finished"]

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Signals wait from here on; a resumed run gets back what is not Lightning's to restore."""
        task: Task = pl_module
        if self.recipe.optim.ema:
            task.average = WeightAverage(task, self.recipe.optim.ema)
        if self.resumed is not None:
            if task.average is not None:
                task.average.load_state_dict(self.resumed["average"])
            sums = self.resumed["sums"]
            task.loss_sum = None if sums["loss"] is None else sums["loss"].to(task.device)
            task.extra_sums = {name: total.to(task.device) for name, total in sums["extras"].items()}
            task.batches = sums["batches"]
            set_random_state(self.resumed["random"])
        self.stop.install()
        self.stop.deferring = True
        if self.stage == "validate":
            self._finish_epoch(trainer, task)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The order of the batches is that of this epoch."""
        self.loader.order.seek(trainer.current_epoch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimiser step: save if it is time, stop if a signal came. The epoch's last step is not ours."""
        done = batch_idx + 1
        if done == trainer.num_training_batches or done % self.recipe.trainer.accumulate:
            return
        step, settings = trainer.global_step, self.recipe.trainer
        if settings.max_steps is not None and step >= settings.max_steps:
            trainer.should_stop = True
            return
        stopping = self._stopping(trainer)
        if stopping or (settings.checkpoint_every and step % settings.checkpoint_every == 0):
            pl_module.check_finite()
            self.stage, self.random = "steps", random_state()
            self._save(trainer)
        if stopping:
            self._leave()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the epoch's training, then validate it."""
        task: Task = pl_module
        task.check_finite()
        means = {
            name: float(trainer.strategy.reduce(torch.tensor(value), reduce_op="mean"))
            for name, value in task.read_sums().items()
        }
        self.row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            **{f"train_{name}": value for name, value in means.items()},
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            **self.meter.finish_epoch(task.device),
        }
        self.stage, self.random = "validate", random_state()
        if self._stopping(trainer):
            self._save(trainer)
            self._leave()
        self._finish_epoch(trainer, task)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Nothing is in the air any more; signals act at once again."""
        self.stop.deferring = False

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """As `on_train_end`."""
        self.stop.deferring = False

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the record beside what Lightning saves."""
        checkpoint["longspan"] = self.record(pl_module)

    def record(self, task: Task) -> dict[str, Any]:
        """All that is ours in a checkpoint, in types that `weights_only` loading accepts."""
        return {
            **self.base,
            "saves": self.saves,
            "stage": self.stage,
            "rows": self.rows,
            "row": self.row,
            "best": self.best,
            "wait": self.wait,
            "finished": self.finished,
            "seconds": self.meter.seconds,
            "random": self.random,
            "average": None if task.average is None else task.average.state_dict(),
            "sums": {"loss": task.loss_sum, "extras": task.extra_sums, "batches": task.batches},
        }

    # -- the end of an epoch ---------------------------------------------------------------------------------------

    def _finish_epoch(self, trainer: pl.Trainer, task: Task) -> None:
        if self.validate is not None:
            try:
                # The ranks of a group all evaluate everything; the first one's numbers decide for all.
                values = trainer.strategy.broadcast(self.validate())
            except Interrupted:
                self._save(trainer)
                self._leave()
            if self.app.metric not in values:
                raise UserError(
                    f"app {self.app.name!r} names {self.app.metric!r} as its metric, "
                    f"but eval_compute gave: {', '.join(values) or 'nothing'}"
                )
            self.row |= {f"val_{name}": value for name, value in values.items()}
        key = f"val_{self.app.metric}"
        row, self.row = self.row, {}
        improved = key not in row or self.app.improves(row[key], self.best[key] if self.best else None)
        self.best, self.wait = (row, 0) if improved else (self.best, self.wait + 1)
        self.rows.append(row)
        self.finished = self._reason_to_end(row)
        self.stage = "epoch"
        self._save(trainer, best=improved)
        if trainer.is_global_zero:
            self.folder.add_row(row, first=len(self.rows) == 1)
        log.info("%s", _epoch_line(row, self.recipe.trainer.epochs, best=improved))
        if self.finished:
            trainer.should_stop = True
            log.info("training ends: %s", self.finished)

    def _reason_to_end(self, row: dict[str, Any]) -> str | None:
        settings = self.recipe.trainer
        if settings.max_steps is not None and row["step"] >= settings.max_steps:
            return f"max_steps={settings.max_steps} reached"
        if row["epoch"] + 1 >= settings.epochs:
            return f"epochs={settings.epochs} reached"
        if settings.early_stopping and self.wait >= settings.early_stopping:
            return f"no better val {self.app.metric} for {self.wait} epochs"
        return None

    def _save(self, trainer: pl.Trainer, *, best: bool = False) -> None:
        self.saves += 1
        trainer.save_checkpoint(
            self.folder.last, weights_only=False, storage_options={"also": self.folder.best} if best else None
        )

    def _stopping(self, trainer: pl.Trainer) -> bool:
        # Every process of a group must stop at the same step; a group of one needs no talk.
        signalled = self.stop.signum is not None
        return trainer.strategy.reduce_boolean_decision(signalled, all=False) if trainer.world_size > 1 else signalled

    def _leave(self) -> None:
        signum = self.stop.signum or 15
        raise Interrupted(signum, f"stopped by signal {signum}; saved {self.folder.last}, continue with --resume")


class Display(Callback):
    """A progress bar on a terminal; elsewhere a line in the log every `log_every` steps."""

    def __init__(self, console: Console | None, epochs: int, log_every: int):
        self.console, self.epochs, self.log_every = console, epochs, log_every
        self.bar: Progress | None = None
        self._drawn = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar."""
        if self.console is not None:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=self.console, transient=True, auto_refresh=False)
            self.bar.start()
            self.line = self.bar.add_task("", total=int(trainer.num_training_batches))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ten times a second at most; reading the loss makes a GPU wait."""
        if self.bar is None:
            if (batch_idx + 1) % self.log_every == 0:
                loss = float(outputs["loss"])
                log.info("epoch %d batch %d: loss %.5g", trainer.current_epoch + 1, batch_idx + 1, loss)
            return
        now = time.monotonic()
        if now - self._drawn > 0.1:
            self._drawn = now
            said = f"epoch {trainer.current_epoch + 1}/{self.epochs}  loss {float(outputs['loss']):.4g}"
            self.bar.update(self.line, completed=batch_idx + 1, description=said)
            self.bar.refresh()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """As `on_train_end`: the error line must not be drawn over."""
        if self.bar is not None:
            self.bar.stop()


def _epoch_line(row: dict[str, Any], epochs: int, *, best: bool) -> str:
    shown = {k: v for k, v in row.items() if k.startswith(("train_", "val_"))}
    values = "  ".join(f"{name} {value:.5g}" for name, value in shown.items())
    return f"epoch {row['epoch'] + 1}/{epochs}  {values}  {row['step_ms']:.1f} ms/step{'  *' if best else ''}"
