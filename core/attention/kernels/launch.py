"""How kernels are launched: block sizes per class of device, precision of products, segments of a long sequence.

Nothing here looks at the length to choose a configuration, and nothing is tuned at run time: a new length never
compiles or measures anything.
"""

import contextlib
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.attention.kernels import INTERPRETED


class Blocks(NamedTuple):
    """Positions per chunk, value columns per program, warps, stages of the software pipeline."""

    chunk: int
    values: int
    warps: int
    stages: int


@cache
def arch(device: torch.device) -> str:
    """Class of device that the tables are keyed by."""
    if device.type != "cuda":
        return "interpreter"
    major = torch.cuda.get_device_capability(device)[0]
    return {8: "ampere", 9: "hopper"}.get(major, "other")


@cache
def processors(device: torch.device) -> int:
    """Programs that run at once; a few under the interpreter, so that tests cross segments."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def choose(table: dict, device: torch.device, *key) -> Blocks:
    """The entry for this class of device and key, else for any device, else the safe default under None."""
    if INTERPRETED:
        return table["interpreter"]
    return table.get((arch(device), *key)) or table.get(key) or table[None]


def products(*tensors: Tensor, bounded: bool = False) -> dict:
    """Type of the operands of products and their precision, as arguments of a kernel.

    bfloat16 is multiplied as it is. float16 is widened to TF32, which has its digits and the range of float32: sums
    over a long sequence pass 65504, and their inverses fall below its smallest number; only where all operands are
    `bounded`, as softmax weights are, it is multiplied as it is. float32 keeps all its digits.
    """
    kinds = {x.dtype for x in tensors}
    if kinds == {torch.bfloat16}:
        return {"DOT": tl.bfloat16, "PRECISION": "tf32"}
    if kinds == {torch.float16} and bounded:
        return {"DOT": tl.float16, "PRECISION": "tf32"}
    return {"DOT": tl.float32, "PRECISION": "tf32" if kinds == {torch.float16} else "ieee"}


def segments(length: int, chunk: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(number of segments, positions in each): enough to occupy the device twice, each at least four chunks long."""
    wanted = -(-2 * processors(device) // max(1, programs))
    size = max(4 * chunk, -(-length // wanted))
    size = -(-size // chunk) * chunk
    return max(1, -(-length // size)), size


def padded(width: int, least: int = 16) -> int:
    """The power of two, at least 16, that a block over `width` takes."""
    return max(least, triton.next_power_of_2(max(1, width)))


def rows_contiguous(x: Tensor) -> Tensor:
    """x with neighbouring numbers in its last dimension; other strides are the kernel's business."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def on(device: torch.device):
    """Launch on the device of the tensors, not on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
