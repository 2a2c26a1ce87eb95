"""The training part of `fit`: Lightning's Trainer with our callbacks, from the start or on from a checkpoint."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from core.training.app import App
from core.training.callbacks import Display, Meter
from core.training.checkpoint import AtomicCheckpointIO, newest_checkpoint
from core.training.data import Data, check_unchanged, eval_loader, train_loader
from core.training.durable import remove_leftovers
from core.training.errors import UserError
from core.training.evaluation import run_evaluation
from core.training.interrupt import Stop
from core.training.keeper import Keeper
from core.training.logs import quiet_lightning
from core.training.recipe import Recipe
from core.training.run import RunFolder, environment, local_rank, write_json
from core.training.task import Task

log = logging.getLogger(__name__)


@dataclass
class Session:
    """One run while it is made: what was asked, and what was built for it."""

    recipe: Recipe
    app: App
    device: torch.device
    folder: RunFolder
    stop: Stop
    console: Console | None
    data: Data
    task: Task


class Training:
    """Built before the run folder is taken (mistakes show), run after."""

    def __init__(self, session: Session):
        self.session = session
        settings, data, task = session.recipe.trainer, session.data, session.task
        if settings.early_stopping and data.val is None:
            raise UserError("trainer.early_stopping needs a validation part, and the data has none; set it to 0")
        self.loader = train_loader(
            data,
            batch_size=settings.batch_size,
            seed=session.recipe.seed,
            workers=settings.workers,
            rank=local_rank(),
            world=settings.devices,
        )
        self.val_loader = None
        if data.val is not None:
            self.val_loader = eval_loader(data, "val", batch_size=settings.batch_size, workers=settings.workers)
        steps = -(-len(self.loader) // settings.accumulate) * settings.epochs
        task.total_steps = min(steps, settings.max_steps or steps)
        self.cost = task.cost()
        if not any(session.folder.checkpoints.glob("*.ckpt")):
            task.bring_weights()

    def run(self) -> dict[str, Any]:
        """Train to the end, or on from the newest checkpoint; returns the record of the last checkpoint."""
        session, settings = self.session, self.session.recipe.trainer
        source, checkpoint = _continue_from(session.folder)
        record = checkpoint.get("longspan")
        if record is not None:
            check_unchanged(record["spec"], session.data.spec, session.folder.path)
        if record is not None and record["finished"]:
            return record
        # Every rank reads as much as this one, so the group's tokens are this rank's times the devices.
        tokens = self.cost["tokens_per_item"] * settings.devices
        meter = Meter(self.loader.order.items, settings.batch_size, tokens, settings.accumulate)
        validate = self._validate if self.val_loader is not None else None
        keeper = Keeper(session, self.loader, validate, meter, record)
        if record is not None:
            self.loader.load_state_dict(checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0])
        if local_rank() == 0:
            session.folder.write_rows(keeper.rows)
            write_json(session.folder.data, session.data.summary)
            if record is None:
                write_json(session.folder.environment, environment(session.recipe, session.device))
        for key, value in session.data.summary.items():
            log.info("data  %s: %s", key, _in_words(value))
        log.info(
            "%s: %s parameters, %d steps on %s",
            session.recipe.source,
            f"{self.cost['parameters']:,}",
            session.task.total_steps,
            session.device,
        )
        del checkpoint, record  # Lightning reads the file itself; two copies of a large model are one too many
        with quiet_lightning():
            trainer = self._trainer([meter, Display(session.console, settings.epochs, settings.log_every), keeper])
            trainer.fit(session.task, self.loader, ckpt_path=str(source) if source else None)
        session.stop.check()
        return keeper.record(session.task)

    def _validate(self) -> dict[str, float]:
        assert self.val_loader is not None
        return run_evaluation(self.session.task, self.val_loader, "val", self.session.stop)

    def _trainer(self, callbacks: list[Callback]) -> pl.Trainer:
        settings = self.session.recipe.trainer
        return pl.Trainer(
            accelerator="gpu" if self.session.device.type == "cuda" else "cpu",
            devices=settings.devices,
            strategy=settings.strategy,
            precision=settings.precision,
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.accumulate,
            deterministic=settings.deterministic,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=self.session.folder.path,
            # Ours: metrics.csv, the bar, the order of the data, and the evaluation pass.
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )


def _in_words(value: Any) -> str:
    """A value of the data's summary on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(map(_in_words, value)) or "none"
    return str(value)


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
