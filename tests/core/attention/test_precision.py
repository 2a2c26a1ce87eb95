"""No variant gives NaN or infinity in half precision at loud inputs, up to long lengths."""

import pytest
import torch

from core.attention import Attention, available
from core.attention.registry import variant_class

MODES = [
    (name, causal)
    for name in available()
    for causal, ability in ((False, "bidirectional"), (True, "causal"))
    if ability in variant_class(name).can
]


def check_finite(name, causal, dtype, length):
    torch.manual_seed(0)
    options = {"max_length": length} if name == "linformer" else {}
    attention = Attention(32, 2, name, causal=causal, **options).to(dtype)
    x = (10 * torch.randn(1, length, 32)).to(dtype).requires_grad_()
    y = attention(x)
    y.float().square().mean().backward()
    assert torch.isfinite(y).all()
    for leaf in (x, *attention.parameters()):
        assert leaf.grad is None or torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(("name", "causal"), MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loud_inputs_stay_finite(name, causal, dtype):
    check_finite(name, causal, dtype, 300)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "causal"), MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_loud_inputs_stay_finite(name, causal, dtype):
    # Quadratic ones take minutes at 64k; what could overflow there grows with the number of keys, not of queries.
    check_finite(name, causal, dtype, 8_192 if variant_class(name).growth == "quadratic" else 65_536)
