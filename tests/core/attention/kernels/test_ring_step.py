"""The step of a window and of a hybrid is one launch that equals the parts run apart, token by token."""

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from core.attention import Attention, kernels
from core.attention.contract import Heads
from core.attention.kernels import ring_step, step
from core.attention.positions import Rotation, alibi_slopes
from core.attention.registry import build

STEPS = 3


def tokens(length, heads, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads.query, heads.width), (heads.key, heads.width), (heads.key, heads.value_width)
    return [torch.randn(2, n, length, d, generator=generator).to(device) for n, d in sizes]


def decoded(variant, parts, mask, backend, dtype, start=None, slopes=None, before=6):
    """Outputs, masses and states: `before` tokens by torch, then single ones by `backend`."""
    variant = variant.to(dtype)
    positions = None if slopes is None else "alibi"
    state, results = variant.init_state(2, positions=positions, device=parts[0].device, dtype=dtype), []
    for t, after in [(0, before), *((t, t + 1) for t in range(before, before + STEPS))]:
        rotary = None
        if start is not None:
            at = (start.to(parts[0].device) + torch.arange(t, after, device=parts[0].device))[:, -(after - t) :]
            rotary = Rotation(at), Rotation(at)
        own = [x[:, :, t:after].to(dtype) for x in parts]
        seen = None if mask is None else mask[:, t:after]
        attended, state = variant.resume(
            *own, state, key_mask=seen, rotary=rotary, slopes=slopes, backend=backend if t else "torch"
        )
        results.append({"out": attended.out, "mass": attended.log_mass, **state})
    return results[1:]


def agree(got, want, **limit):
    for one, other in zip(got, want):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype or other[name].dtype == torch.float64, name
            torch.testing.assert_close(
                one[name].double(), other[name].double(), **limit, msg=lambda text, name=name: f"{name}: {text}"
            )


def holed(device):
    """Masks in which keys that leave, stay and come are hidden, and a sequence that sees nothing for long."""
    mask = torch.rand(2, 6 + STEPS, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[1, :7] = False
    return mask.to(device)


CASES = {
    "elu": {"feature_map": "elu"},
    "relu, masked": {"feature_map": "relu", "masked": True},
    "elu, rotary, masked": {"feature_map": "elu", "positions": "rope", "masked": True},
    "relu, rotary": {"feature_map": "relu", "positions": "rope"},
    "taylor, rotary": {"feature_map": "taylor", "positions": "rope", "feature_dim": 4},
    "hedgehog, rotary": {"feature_map": "hedgehog", "positions": "rope"},
    "favor": {"feature_map": "favor", "features": 8},
    "dpfp": {"feature_map": "dpfp"},
    "elu, alibi, masked": {"feature_map": "elu", "positions": "alibi", "masked": True},
    "one key near": {"feature_map": "elu", "window": 1, "positions": "rope"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_hybrid_steps_as_by_its_parts(name, device, monkeypatch):
    options = dict(CASES[name])
    masked, positions = options.pop("masked", False), options.pop("positions", None)
    heads, seen = Heads(4, 2, 6, 37), []
    variant = build("hybrid", heads, **{"window": 3, **options}).to(device).requires_grad_(False)
    with torch.no_grad():
        variant.gate += torch.linspace(-1, 1, 4, device=device)
    given = {"mask": holed(device) if masked else None}
    given["start"] = torch.tensor([[0], [1000]]) if positions == "rope" else None
    given["slopes"] = alibi_slopes(4).to(device) if positions == "alibi" else None
    parts = tokens(6 + STEPS, heads, device)
    launch = ring_step._launch
    monkeypatch.setattr(ring_step, "_launch", lambda *a: seen.append(a) or launch(*a))
    got = decoded(variant, parts, backend="triton", dtype=torch.float32, **given)
    assert len(seen) == STEPS
    exact = torch.float64 if positions != "rope" else torch.float32  # a far position has no more digits in float32
    agree(got, decoded(variant, parts, backend="torch", dtype=exact, **given), rtol=2e-5, atol=2e-5)
