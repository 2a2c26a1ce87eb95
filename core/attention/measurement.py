"""How long the variants take on this device: written by `longspan bench`, read by the variant `auto`.

One JSON file per device, torch version and number of threads, in the folder LONGSPAN_CACHE, else
XDG_CACHE_HOME/longspan, else ~/.cache/longspan:

    {"format": 1, "date": "2026-11-21", "device": "AMD EPYC", "torch": "2.15.0", "threads": 2, "heads": 2, "width": 64,
     "ms": {"softmax": {"causal": {"256": 1.3, "1024": 9.1}, "two-sided": {...}}, "hybrid": {...}}}

The times are of one layer, forward and backward, by length.
"""

import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
DIRECTIONS = ("causal", "two-sided")

log = logging.getLogger("longspan.attention")


def cache_folder() -> Path:
    """Where measurements are kept."""
    own = os.environ.get("LONGSPAN_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(shared) / "longspan"


def identity(device: str) -> dict[str, Any]:
    """What a measurement belongs to: another device, torch or number of threads has other times."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else processor() if kind == "cpu" else kind
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads() if kind == "cpu" else None}


def file_of(device: str) -> Path:
    """The file of this device's measurement, whether it is there or not."""
    words = "-".join(str(part) for part in identity(device).values() if part is not None)
    return cache_folder() / f"attention-{''.join(c if c.isalnum() or c in '.+-' else '-' for c in words)}.json"


def save(device: str, found: Mapping[str, Any]) -> Path:
    """Keep a measurement of this device: "date", "heads", "width" and "ms"; it replaces an older one."""
    path = file_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"format": FORMAT, **identity(device), **found}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def load(device: str) -> dict[str, Any] | None:
    """The measurement of this device; None if there is none that can be read, which is logged if a file is there."""
    path = file_of(device)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"it has format {found['format']}, this version reads {FORMAT}")
        if {key: found[key] for key in identity(device)} != identity(device):
            raise ValueError("it belongs to another device")
        found["ms"] = {
            name: {kind: {int(n): float(ms) for n, ms in times.items()} for kind, times in directions.items()}
            for name, directions in found["ms"].items()
        }
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is not used (%s); `longspan bench` writes it anew", path, error)
        return None


def time_at(ms: Mapping[int, float], length: float) -> float:
    """Time at a length, on straight lines through (log length, log ms), also beyond the ends.

    Args:
        ms: times by length, at least two.
    """
    lengths = sorted(ms)
    after = next((i for i, n in enumerate(lengths) if n >= length and i), len(lengths) - 1)
    low, high = lengths[after - 1], lengths[after]
    slope = math.log(ms[high] / ms[low]) / math.log(high / low)
    return ms[low] * (length / low) ** slope


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
