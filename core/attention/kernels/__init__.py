"""The `triton` backend: fused kernels for GPUs of the H100 class, forward and backward.

Each file is one operation with the signature and the meaning of its namesake in `core.attention.blocked`. Triton is
imported by these files alone, and they only when one is called, so that a machine without it never notices. Under
TRITON_INTERPRET=1 the same kernels run on a CPU, slowly, for tests; there only when asked for by name.
"""

import os
from importlib.util import find_spec

import torch

PRESENT = find_spec("triton") is not None
"""Whether Triton can be imported; without it no kernel is entered among the backends."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)

DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
"""The interpreter's bfloat16 products are wrong (triton-lang/triton#11584)."""

WIDEST = 256
"""Largest head or feature width that a kernel keeps on chip."""
