"""Where messages go: log.txt always, the terminal if there is one; and which of Lightning's are left out, and why."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from rich.console import Console

OURS = ("core", "apps")

# What Lightning says about every run of ours, by the start of its text, with the reason why it is left out.
HARMLESS = (
    # Seen on machines with many cores. Data in memory is read fastest without worker processes; other data has
    # `trainer.workers`.
    r"The '\w+_dataloader' does not have many workers",
    # The recipe chooses the accelerator; environment.json says which it was.
    r"GPU available but not used",
    # torch renamed a class of its tree utilities that Lightning 2.6 still uses.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Inside, Lightning's notes on hardware and tips are off, and so are the warnings of `HARMLESS`; others pass."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in HARMLESS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is reported by the next checkpoint, once, instead of by a traceback per line of the log."""


class _Terminal(logging.Handler):
    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage(), markup=False, highlight=False)


class Journal:
    """log.txt: keeps what is said until the run has a folder, then writes there."""

    def __init__(self) -> None:
        self.waiting = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self.file: _LogFile | None = None

    def open(self, path: Path) -> None:
        """Write to this file from now on, what was said before first."""
        self.file = _LogFile(path, encoding="utf-8")
        self.file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.waiting.setTarget(self.file)
        self.waiting.flush()
        self.waiting.flushLevel = logging.NOTSET  # every line goes through at once

    def close(self) -> None:
        """Close the file."""
        self.waiting.close()
        if self.file is not None:
            self.file.close()


@contextmanager
def logging_to(console: Console | None) -> Iterator[Journal]:
    """Inside, messages of core and apps go to the journal that is yielded, and to the terminal if there is one."""
    journal = Journal()
    handlers: list[logging.Handler] = [journal.waiting, *([_Terminal(console)] if console else [])]
    loggers = [logging.getLogger(name) for name in OURS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield journal
    finally:
        for logger, (level, propagate) in zip(loggers, before):
            logger.setLevel(level)
            logger.propagate = propagate
            for handler in handlers:
                logger.removeHandler(handler)
        journal.close()
