"""What a run that failed tells its user: one line, and failure.json in its folder."""

import errno
import logging
from contextlib import suppress

import torch

from core.training.errors import RunFailed, UserError
from core.training.recipe import Recipe
from core.training.run import RunFolder, write_json

log = logging.getLogger(__name__)


def told(error: Exception, recipe: Recipe, folder: RunFolder) -> Exception:
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
    if not folder.recipe.is_file():
        return told  # the run had not begun
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
