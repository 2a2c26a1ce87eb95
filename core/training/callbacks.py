"""What watches the training steps without taking part: time, memory, the progress bar."""

import logging
import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU's allocator, or of this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter(Callback):
    """Time and throughput of the training part of each epoch; validation and saving are not counted."""

    def __init__(self, items: int, batch_size: int, tokens_per_item: float, accumulate: int = 1):
        self.items, self.batch_size, self.tokens_per_item = items, batch_size, tokens_per_item
        self.accumulate = accumulate  # batches per optimiser step
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
            "step_ms": round(1000 * seconds / max(1, -(-self.batches // self.accumulate)), 3),
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


class Display(Callback):
    """A progress bar on a terminal; elsewhere a line in the log every `log_every` batches."""

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
