"""The 2-D window kernel against the definition in float64, tokens before the grid included."""

import pytest
import torch

from core.attention import kernels
from core.attention.contract import Heads, Inputs
from core.attention.kernels import window2d as fused
from core.attention.registry import build
from core.attention.variants import window2d

# batch, heads, key heads, grid, tokens before it, width, values, window
SHAPES = {
    "grouped": (1, 2, 1, (5, 6), 2, 6, 5, 2),
    "line": (1, 1, 1, (1, 40), 0, 4, 4, 5),
    "many before": (1, 1, 1, (5, 5), 18, 17, 20, 2),
    "all": (2, 1, 1, (4, 5), 1, 4, 3, 99),
    "high": (1, 2, 2, (21, 3), 1, 5, 5, 4),
    "one": (1, 1, 1, (1, 1), 0, 1, 1, 1),
}
QUICK = {"grouped", "line", "one"}


def run(name, dtype, device, compare):
    b, h, kh, grid, first, width, values, window = SHAPES[name]
    length = first + grid[0] * grid[1]
    q, k, v = torch.randn(b, h, length, width), torch.randn(b, kh, length, width), torch.randn(b, kh, length, values)
    mask = torch.rand(b, length) > 0.3

    def defined(q, k, v):
        k, v = (x.repeat_interleave(h // kh, 1) for x in (k, v))
        return tuple(window2d.reference(q, k, v, grid, window, mask, 0.7))

    compare(
        lambda q, k, v: fused.window2d_forward(q, k, v, mask.to(device), *grid, window, 0.7),
        defined,
        [q, k, v],
        dtype,
        device,
    )


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in SHAPES])
def test_every_shape(name, dtype, device, compare):
    run(name, dtype, device, compare)


@pytest.mark.parametrize("dtype", kernels.DTYPES[1:])
def test_half_precision(dtype, device, compare):
    run("line", dtype, device, compare)


def test_a_tile_covers_every_token_of_any_grid():
    for block in (16, 32, 64):
        for rows, columns in ((1, 1), (1, 500), (500, 1), (3, 70), (9, 9), (64, 64)):
            across = fused.wide(block, rows, columns)
            assert block % across == 0
            assert across < 2 * columns
    assert fused.wide(64, 1, 500) == 64
    assert fused.wide(64, 64, 64) == 8
    assert fused.wide(64, 500, 1) == 1


def build_and_run(name, backend, grid, device, tensors, mask):
    torch.manual_seed(0)
    variant = build(name, Heads(2, 1, 6, 5, 12), window=2).to(device)
    out, mass = variant(*tensors, key_mask=mask, backend=backend, return_mass=True, inputs=Inputs(None, grid))
    found = torch.autograd.grad(out.sin().sum() + mass.masked_fill(mass == -torch.inf, 0.0).cos().sum(), tensors)
    return out, mass, *found


@pytest.mark.parametrize("name", ["window2d", "hybrid2d"])
def test_the_variants_run_on_it_with_padding_of_any_content(name, device):
    """Masked keys hold NaN, the tensors any strides, and the same input gives the same bits."""
    grid, length = (4, 4), 17
    mask = torch.rand(1, length, device=device) > 0.3
    hole = torch.where(mask[:, None, :, None], 0.0, torch.nan)
    shapes = ((2, 6), (1, 6), (1, 5))
    q, k, v = (torch.randn(1, length, heads, width, device=device).transpose(1, 2) for heads, width in shapes)
    clean = [x.detach().requires_grad_() for x in (q, k, v)]
    holed = [x.detach().requires_grad_() for x in (q, k + hole, v.mT.contiguous().mT + hole)]
    want = build_and_run(name, "torch", grid, device, clean, mask)
    got, again = (build_and_run(name, "triton", grid, device, holed, mask) for _ in range(2))
    for mine, other, exact in zip(got, again, want):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_too_wide_heads_are_refused():
    q = torch.zeros(1, 1, 4, 257)
    with pytest.raises(ValueError, match="does not serve heads 257 wide"):
        build("window2d", Heads(1, 1, 257, 257))(q, q, q, backend="triton", inputs=Inputs(None, (2, 2)))
