"""Positions by their defining properties, and how they compose with linear attention."""

import math

import pytest
import torch

from core.attention import Attention
from core.attention.positions import LearnedPositions, Rotation, alibi_slopes, sinusoidal


def test_sinusoidal_by_the_letter():
    table = sinusoidal(torch.arange(50), 8)
    for p, i in ((0, 0), (7, 1), (49, 3)):
        assert table[p, 2 * i] == pytest.approx(math.sin(p / 10000 ** (2 * i / 8)), abs=1e-5)
        assert table[p, 2 * i + 1] == pytest.approx(math.cos(p / 10000 ** (2 * i / 8)), abs=1e-5)
    with pytest.raises(ValueError, match="even width"):
        sinusoidal(torch.arange(3), 5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_rotary_scores_depend_on_differences_only(interleaved, planes):
    q, k = torch.randn(1, 1, 6, 8, dtype=torch.float64), torch.randn(1, 1, 6, 8, dtype=torch.float64)
    at = torch.randint(0, 30, (6,) if planes == 1 else (6, 2))
    shift = 11 if planes == 1 else torch.tensor([11, -4])

    def scores(coordinates):
        rotation = Rotation(coordinates, interleaved=interleaved, planes=planes)
        return rotation(q) @ rotation(k).transpose(-1, -2)

    torch.testing.assert_close(scores(at), scores(at + shift))
    assert not torch.allclose(scores(at), scores(at * 2))
    rotation = Rotation(at, interleaved=interleaved, planes=planes)
    torch.testing.assert_close(rotation(q).norm(dim=-1), q.norm(dim=-1))


def test_the_two_rotary_layouts_are_one_up_to_a_permutation():
    x, at = torch.randn(1, 2, 5, 8), torch.arange(5)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    half, paired = Rotation(at)(x), Rotation(at, interleaved=True)(x[..., order])
    torch.testing.assert_close(half[..., order], paired)


def test_rotary_refuses_odd_widths():
    with pytest.raises(ValueError, match="1-D need a width divisible by 2, got 5"):
        Rotation(torch.arange(2))(torch.zeros(1, 1, 2, 5))
    with pytest.raises(ValueError, match="2-D need a width divisible by 4, got 6"):
        Rotation(torch.zeros(2, 2), planes=2)(torch.zeros(1, 1, 2, 6))


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == pytest.approx([2.0**-i for i in range(1, 9)])
    twelve = alibi_slopes(12).tolist()
    assert twelve[:8] == pytest.approx([2.0**-i for i in range(1, 9)])
    assert twelve[8:] == pytest.approx([2.0 ** -(i + 0.5) for i in range(4)])


def test_learned_positions_resample_smoothly():
    table = LearnedPositions(16, 4)
    with torch.no_grad():
        table.table.copy_(torch.linspace(0, 1, 16)[:, None].expand(16, 4))
    assert torch.equal(table(16), table.table)
    longer = table(32)
    assert longer.shape == (32, 4)
    assert (longer[1:] >= longer[:-1]).all()
    assert longer[0, 0] == 0
    assert longer[-1, 0] == 1
    grid = LearnedPositions((4, 6), 3)
    assert torch.equal(grid((4, 6)), grid.table.flatten(0, 1))
    assert grid((8, 3)).shape == (24, 3)
    with pytest.raises(ValueError, match="grid of 2 dimensions"):
        grid(5)


def weights(attention: Attention, x):
    """Implicit attention weights [L, L] of head 0, read off with one-hot values."""
    length = x.shape[1]
    q, k, _ = attention._project(x, x)
    v = torch.eye(length, dtype=x.dtype).expand(1, q.shape[1], -1, -1)
    at = torch.arange(length)
    rotary = (Rotation(at), Rotation(at)) if attention.positions == "rope" else None
    given = attention.variant(q, k, v, causal=attention.causal, rotary=rotary, slopes=attention.slopes)
    return given.out[0, 0]


@pytest.mark.parametrize("causal", [False, True])
def test_alibi_is_a_decay_of_linear_weights(causal):
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    plain, decayed = (Attention(16, 2, "linear", causal=causal, positions=p).double() for p in (None, "alibi"))
    decayed.load_state_dict(plain.state_dict())
    distance = (torch.arange(9)[:, None] - torch.arange(9)[None, :]).abs()
    want = weights(plain, x) * torch.exp(-alibi_slopes(2)[0] * distance)
    torch.testing.assert_close(weights(decayed, x), want / want.sum(-1, keepdim=True), rtol=1e-6, atol=1e-9)


def test_rotary_linear_weights_sum_to_one_for_kernel_maps_only():
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    taylor = Attention(16, 2, "linear", feature_map="taylor", positions="rope").double()
    elu = Attention(16, 2, "linear", feature_map="elu", positions="rope").double()
    torch.testing.assert_close(weights(taylor, x).sum(-1), torch.ones(9, dtype=torch.float64))
    assert (weights(taylor, x) > 0).all()
    assert (weights(elu, x).sum(-1) - 1).abs().max() > 1e-3


def test_rotary_positions_of_a_layer_are_relative():
    for variant in ("softmax", "window", "linear", "hybrid"):
        attention = Attention(16, 2, variant, positions="rope", causal=True).double()
        x = torch.randn(1, 9, 16, dtype=torch.float64)
        torch.testing.assert_close(attention(x), attention(x, coordinates=torch.arange(9) + 100))
        order = attention(x, coordinates=torch.arange(9) * 3)
        assert not torch.allclose(attention(x), order)


def test_two_dimensional_rotation_through_the_layer():
    attention = Attention(16, 2, positions="rope2d").double()
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    grid = torch.stack((rows.flatten(), columns.flatten()), -1)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(attention(x, coordinates=grid), attention(x, coordinates=grid + 7))
    order = torch.randperm(12)
    torch.testing.assert_close(
        attention(x[:, order], coordinates=grid[order]), attention(x, coordinates=grid)[:, order]
    )
