"""Autocast, once, at the entrance of attention: what torch does to its own attention's inputs happens to ours.

Behind the entrance nothing is narrowed again. Operators compute in the dtypes that they are given, and what comes to
them wide is wide on purpose: features, gates, sums and states.
"""

import torch
from torch import Tensor


def lowered(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype where it is on; float64 stays as it is."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v
