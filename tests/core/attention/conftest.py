"""What the attention tests share: an oracle that knows nothing of the package, and the error bound it calibrates.

The oracle walks over queries one at a time in float64 and follows the definitions by the letter. It shares no code with
`core.attention`, its references included.
"""

import math

import pytest
import torch


def features(name: str, x: torch.Tensor) -> torch.Tensor:
    """phi of one vector [D], by the letter."""
    d = x.shape[0]
    if name == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    if name == "relu":
        return x.clamp(min=0)
    products = [x[i] * x[j] / math.sqrt(d) for i in range(d) for j in range(i + 1, d)]
    parts = [torch.ones(1, dtype=x.dtype), x / d**0.25, x * x / math.sqrt(2 * d)]
    return torch.cat([*parts, torch.stack(products)] if products else parts)


def weight(kind: str, q, k, distance: int, *, window, phi, gate, scale, slope) -> torch.Tensor:
    """Un-normalised weight of one visible pair, `distance` = how far the key stands behind the query."""
    decay = math.exp(-slope * abs(distance))
    near = window is not None and abs(distance) < window
    if kind == "softmax" or (kind in ("window", "hybrid") and near):
        return torch.exp(scale * q.dot(k)) * decay
    if kind == "window":
        return torch.zeros((), dtype=q.dtype)
    tail = features(phi, q).dot(features(phi, k)) * decay
    return tail if kind == "linear" else tail * torch.exp(gate)


def attend_by_hand(
    kind, q, k, v, *, causal=False, key_mask=None, window=None, phi="elu", gate=None, scale=None, slopes=None
):
    """(out, log_mass) in float64, one query at a time; differentiable."""
    q, k, v = (x.double() for x in (q, k, v))
    batch, heads, length, width = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    scale = width**-0.5 if scale is None else scale
    outs, masses = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                at = i + keys - length
                total, mean = torch.zeros((), dtype=q.dtype), torch.zeros(v.shape[-1], dtype=q.dtype)
                for j in range(keys):
                    if (causal and j > at) or (key_mask is not None and not key_mask[b, j]):
                        continue
                    w = weight(
                        kind,
                        q[b, h, i],
                        k[b, h // group, j],
                        at - j,
                        window=window,
                        phi=phi,
                        gate=None if gate is None else gate[h].double(),
                        scale=scale,
                        slope=0.0 if slopes is None else float(slopes[h]),
                    )
                    total, mean = total + w, mean + w * v[b, h // group, j]
                seen = bool(total > 0)
                outs.append(mean / total if seen else torch.zeros_like(mean))
                masses.append(total.log() if seen else torch.full_like(total, -math.inf))
    shape = (batch, heads, length)
    return torch.stack(outs).view(*shape, -1), torch.stack(masses).view(shape)


@pytest.fixture(scope="session")
def by_hand():
    """The oracle: `attend_by_hand(kind, q, k, v, ...)`."""
    return attend_by_hand


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
