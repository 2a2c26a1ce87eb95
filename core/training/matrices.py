"""Matrices as plain JSON types, exactly: a spec, which the checkpoint carries, holds nothing else."""

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pack(matrix: Tensor | np.ndarray) -> dict[str, Any]:
    """A float32 matrix as shape and text."""
    array = np.asarray(matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix).astype("<f4")
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode("ascii")}


def unpack(packed: dict[str, Any]) -> Tensor:
    """The matrix that `pack` packed."""
    array = np.frombuffer(base64.b64decode(packed["float32"]), dtype="<f4").reshape(packed["shape"])
    return torch.from_numpy(array.copy())
