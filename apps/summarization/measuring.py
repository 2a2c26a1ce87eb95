"""What it costs to summarise one document: seconds, tokens per second, and the peak of memory above what was held."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apps.summarization.documents import Example
from apps.summarization.items import AbstractiveItems, ExtractiveItems, collate_abstractive, collate_extractive

if TYPE_CHECKING:
    from apps.summarization.task import SummaryTask


def batch_of(task: "SummaryTask", example: Example) -> dict[str, Any]:
    """A batch of this document alone, on the CPU."""
    if "tokenizer" in task.spec:
        return collate_abstractive([AbstractiveItems([example], task.spec, "alone", task.worth())[0]])
    return collate_extractive([ExtractiveItems([example], task.spec, None, "alone")[0]])


def measure(task: "SummaryTask", example: Example) -> dict[str, Any]:
    """Summarise a document alone, its features and tokens made before.

    Returns:
        words_per_s, tokens_per_s: of the source (a token is a word for extractive models).
        peak_mb: of the model's device, on Linux the process above what it held before; None where it cannot be known.
    """
    batch = batch_of(task, example)
    tokens = len(batch["words"].ids) if "words" in batch else int((batch["document"].ids != 0).sum())
    moved = task.transfer_batch_to_device(batch, task.device, 0)
    with torch.no_grad():
        (outcome,), peak = with_peak(lambda: task.summarise(moved), task.device)
    seconds = max(outcome.seconds, 1e-9)
    return {
        "words_per_s": round(example.source.words / seconds),
        "tokens_per_s": round(tokens / seconds),
        "peak_mb": None if peak is None else round(peak / 2**20, 1),
    }


def with_peak(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """Result of `run()`, and how many bytes it held at most beside those that were held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if sys.platform != "linux":
        return run(), None
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what libc keeps of freed memory would hide the peak
    try:
        reset.write_text("5")  # the high-water mark falls to what is resident now
    except OSError:
        return run(), None
    before = _high_water()
    result = run()
    return result, _high_water() - before


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
