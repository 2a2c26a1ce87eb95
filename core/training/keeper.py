"""The keeper ends epochs: validation, best epoch, early stopping, the row in metrics.csv, and all saving.

Checkpoints are saved at two places only, because Lightning resumes exactly from these: after an optimiser step that
is not the last of its epoch, and at the end of an epoch. The stage in the record says which:

    "steps"      in the middle of an epoch
    "validate"   the epoch's training is done, its validation is not (a signal came)
    "epoch"      the epoch is done
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from core.training.callbacks import Meter
from core.training.checkpoint import FORMAT
from core.training.data import Loader
from core.training.errors import Interrupted, UserError
from core.training.optim import WeightAverage
from core.training.randomness import random_state, set_random_state
from core.training.task import Task

if TYPE_CHECKING:
    from core.training.train import Session

log = logging.getLogger(__name__)


class Keeper(Checkpoint):
    """The callback that decides and saves.

    Args:
        session: the run: where to save, which metric counts, what the signal handlers leave.
        loader: the training batches; its order is set per epoch.
        validate: metrics of the val part; None: there is none, and the last epoch is the best.
        meter: what the epoch cost.
        record: of the checkpoint that the run continues from; None: a new run.
    """

    def __init__(
        self,
        session: "Session",
        loader: Loader,
        validate: Callable[[], dict[str, float]] | None,
        meter: Meter,
        record: dict[str, Any] | None = None,
    ):
        self.folder, self.app, self.recipe, self.stop = session.folder, session.app, session.recipe, session.stop
        self.spec, self.loader, self.validate, self.meter, self.resumed = (
            session.data.spec,
            loader,
            validate,
            meter,
            record,
        )
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
            sums: dict[str, Any] = self.resumed["sums"]
            task.loss_sum = None if sums["loss"] is None else sums["loss"].to(task.device)
            task.extra_sums = {name: total.to(task.device) for name, total in sums["extras"].items()}
            task.batches = sums["batches"]
            had = "counts" in sums  # checkpoints of earlier versions have none
            task.extra_counts = sums["counts"] if had else dict.fromkeys(task.extra_sums, int(sums["batches"]))
            set_random_state(self.resumed["random"])
            self.resumed = None
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
        means = task.read_sums()
        if trainer.world_size > 1:
            means = {name: self._mean_over_ranks(trainer, value) for name, value in means.items()}
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
            "format": FORMAT,
            "app": self.app.name,
            "source": self.recipe.source,
            "recipe": self.recipe.model_dump(mode="json"),
            "spec": self.spec,
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
            "sums": {
                "loss": task.loss_sum,
                "extras": task.extra_sums,
                "counts": task.extra_counts,
                "batches": task.batches,
            },
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
            self.folder.add_row(self.rows)
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

    def _mean_over_ranks(self, trainer: pl.Trainer, value: float) -> float:
        return float(
            trainer.strategy.reduce(torch.tensor(value, device=trainer.strategy.root_device), reduce_op="mean")
        )

    def _leave(self) -> None:
        signum = self.stop.signum or 15
        raise Interrupted(signum, f"stopped by signal {signum}; saved {self.folder.last}, continue with --resume")


def _epoch_line(row: dict[str, Any], epochs: int, *, best: bool) -> str:
    shown = {k: v for k, v in row.items() if k.startswith(("train_", "val_"))}
    values = "  ".join(f"{name} {value:.5g}" for name, value in shown.items())
    return f"epoch {row['epoch'] + 1}/{epochs}  {values}  {row['step_ms']:.1f} ms/step{'  *' if best else ''}"
