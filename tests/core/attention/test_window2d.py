"""2-D windows and their linear tail on a grid: the rule of the tokens before it, borders, masks, gradients, memory."""

import pytest
import torch

from core.attention import Attention
from core.attention.contract import Heads, Inputs
from core.attention.registry import build
from core.attention.variants.window2d import near_by_definition

MAPS = ("elu", "relu", "taylor", "cosine", "favor", "hedgehog", "focused")
BUILDS = [("window2d", {}), *(("hybrid2d", {"feature_map": name, "feature_dim": 4}) for name in MAPS)]
GRIDS = [(1, 1), (5, 7), (13, 3), (17, 19), (2, 70)]


def visible_by_hand(grid, window, first):
    """Lists of the keys that each query sees, by the letter."""
    rows, columns = grid
    total = first + rows * columns
    seen = []
    for i in range(total):
        near = []
        for j in range(total):
            if i < first or j < first:
                near.append(j)
                continue
            (r, c), (s, d) = divmod(i - first, columns), divmod(j - first, columns)
            if max(abs(r - s), abs(c - d)) < window:
                near.append(j)
        seen.append(near)
    return seen


def test_the_definition_is_the_chebyshev_window_and_all_tokens_before_the_grid():
    near = near_by_definition(2 + 12, (3, 4), 2)
    assert [row.nonzero().flatten().tolist() for row in near] == visible_by_hand((3, 4), 2, 2)


@pytest.mark.parametrize(
    ("name", "options"), BUILDS, ids=lambda x: x if isinstance(x, str) else x.get("feature_map", "")
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("first", [0, 3])
def test_tiles_equal_the_definition_with_gradients(name, options, grid, first):
    window = 3 if grid != (17, 19) else 4
    variant = build(name, Heads(4, 2, 8, 8, 32), window=window, **options).double()
    length = first + grid[0] * grid[1]
    mask = torch.rand(2, length) > 0.3
    inputs = Inputs(None, grid)
    tensors = [torch.randn(2, heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    weights = [p for p in variant.parameters() if p.requires_grad]
    for key_mask in (None, mask):
        results = []
        for backend in ("torch", "reference"):
            out, mass = variant(*tensors, key_mask=key_mask, backend=backend, return_mass=True, inputs=inputs)
            mass = mass.masked_fill(mass == -torch.inf, 0.0)
            grads = torch.autograd.grad(out.sin().sum() + mass.cos().sum(), [*tensors, *weights], allow_unused=True)
            results.append((out, mass, *(g if g is not None else torch.zeros(()) for g in grads)))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want.expand_as(got), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["window2d", "hybrid2d"])
def test_a_window_as_wide_as_the_image_is_softmax(name):
    q, k, v = (torch.randn(1, 2, 2 + 63, 8) for _ in range(3))
    wide = build(name, Heads(2, 2, 8, 8), window=9)
    want = build("softmax", Heads(2, 2, 8, 8))(q, k, v).out
    torch.testing.assert_close(wide(q, k, v, inputs=Inputs(None, (7, 9))).out, want, rtol=1e-5, atol=1e-6)
    narrow = build(name, Heads(2, 2, 8, 8), window=8)
    assert not torch.allclose(narrow(q, k, v, inputs=Inputs(None, (7, 9))).out, want, atol=1e-4)


def test_what_is_far_reaches_the_tail_but_not_the_window():
    for name, reached in (("window2d", False), ("hybrid2d", True)):
        layer = Attention(32, 4, name, window=3)
        x = torch.randn(1, 400, 32)
        changed = x.clone()
        changed[:, -1] += 10
        before, after = layer(x, grid=(20, 20)), layer(changed, grid=(20, 20))
        assert torch.equal(before[:, :300], after[:, :300]) is not reached
        assert not torch.allclose(before[:, -22], after[:, -22])


@pytest.mark.parametrize("name", ["window2d", "hybrid2d"])
def test_turning_the_image_turns_the_result(name):
    layer = Attention(32, 4, name, window=3).double()
    x = torch.randn(1, 6 * 15, 32, dtype=torch.float64)
    turned = x.unflatten(1, (6, 15)).transpose(1, 2).flatten(1, 2)
    want = layer(x, grid=(6, 15)).unflatten(1, (6, 15)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(layer(turned, grid=(15, 6)), want)


@pytest.mark.parametrize("name", ["window2d", "hybrid2d"])
def test_padding_at_the_right_and_below_changes_nothing(name):
    layer = Attention(32, 4, name, window=3).double()
    x = torch.randn(1, 9, 11, 32, dtype=torch.float64)
    padded = torch.full((1, 13, 16, 32), torch.nan, dtype=torch.float64)
    padded[:, :9, :11] = x
    mask = torch.zeros(1, 13, 16, dtype=torch.bool)
    mask[:, :9, :11] = True
    got = layer(padded.flatten(1, 2), key_mask=mask.flatten(1), grid=(13, 16)).unflatten(1, (13, 16))[:, :9, :11]
    torch.testing.assert_close(got.flatten(1, 2), layer(x.flatten(1, 2), grid=(9, 11)))


@pytest.mark.parametrize("name", ["window2d", "hybrid2d"])
def test_rope2d_depends_on_differences_only(name):
    layer = Attention(32, 4, name, window=3, positions="rope2d").double()
    x = torch.randn(1, 42, 32, dtype=torch.float64)
    at = torch.cartesian_prod(torch.arange(6), torch.arange(7))
    got = layer(x, grid=(6, 7), coordinates=at)
    torch.testing.assert_close(layer(x, grid=(6, 7), coordinates=at + 5), got)
    assert not torch.allclose(layer(x, grid=(6, 7), coordinates=at * 2), got)
