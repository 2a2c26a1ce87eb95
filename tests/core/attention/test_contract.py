"""Merging, masses and masks: the algebra that windows, tails, shards and states rely on."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from core.attention import (
    Attended,
    hybrid_attention,
    linear_attention,
    merge,
    sliding_window_attention,
    softmax_attention,
)
from core.attention.contract import Heads, visible

KINDS = {
    "softmax": lambda q, k, v: softmax_attention(q, k, v, return_mass=True),
    "linear": lambda q, k, v: linear_attention(q, k, v, return_mass=True),
    "taylor": lambda q, k, v: linear_attention(q, k, v, feature_map="taylor", return_mass=True),
}


def qkv(length=5, keys=12, width=4):
    sizes = (2, 3, length, width), (2, 3, keys, width), (2, 3, keys, 2)
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
@given(cuts=st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_merging_shards_of_the_keys_equals_the_whole(kind, cuts):
    q, k, v = qkv()
    bounds = [0, *sorted(cuts), 12]
    parts = [KINDS[kind](q, k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise(bounds)]
    got, want = merge(*parts), KINDS[kind](q, k, v)
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.log_mass, want.log_mass)

    def gradients(attended):
        return torch.autograd.grad(attended.out.sin().sum() + attended.log_mass.cos().sum(), (q, k, v))

    for mine, theirs in zip(gradients(got), gradients(want)):
        torch.testing.assert_close(mine, theirs)


def part(empty=False):
    out = torch.randn(1, 2, 3, 2, dtype=torch.float64)
    mass = torch.randn(1, 2, 3, dtype=torch.float64)
    return Attended(torch.zeros_like(out), torch.full_like(mass, -math.inf)) if empty else Attended(out, mass)


def same(a: Attended, b: Attended):
    torch.testing.assert_close(a.out, b.out)
    torch.testing.assert_close(a.log_mass, b.log_mass)


def test_merge_is_commutative_associative_and_has_a_neutral_element():
    a, b, c = part(), part(), part()
    same(merge(a, b), merge(b, a))
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    same(merge(a, b, c), merge(merge(a, b), c))
    same(merge(a, part(empty=True)), a)
    same(merge(part(empty=True), part(empty=True)), part(empty=True))
    same(merge(a, a), Attended(a.out, a.log_mass + math.log(2)))
    shifted = merge(Attended(a.out, a.log_mass + 3), Attended(b.out, b.log_mass + 3))
    same(shifted, Attended(merge(a, b).out, merge(a, b).log_mass + 3))


def test_merge_survives_masses_far_apart():
    a, b = part(), part()
    same(merge(a, Attended(b.out, b.log_mass - 1e5)), a)
    huge = merge(Attended(a.out, a.log_mass + 1e5), Attended(b.out, b.log_mass + 1e5))
    torch.testing.assert_close(huge.out, merge(a, b).out, rtol=1e-8, atol=1e-8)


def test_gradcheck_of_merge_with_empty_rows():
    parts = [tensor.requires_grad_() for _ in range(3) for tensor in part()]

    def function(*flat):
        return tuple(merge(*(Attended(a, b) for a, b in zip(flat[0::2], flat[1::2]))))

    assert torch.autograd.gradcheck(function, parts)
    a, empty = part(), part(empty=True)
    leaves = [tensor.requires_grad_() for tensor in (*a, *empty)]
    merged = merge(Attended(*leaves[:2]), Attended(*leaves[2:]))
    gradients = torch.autograd.grad(merged.out.sum() + merged.log_mass.sum(), leaves)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert (gradients[2] == 0).all()
    assert (gradients[3] == 0).all()


def test_merge_refuses_what_it_cannot_weigh():
    with pytest.raises(ValueError, match="part 1 has no mass"):
        merge(part(), Attended(part().out, None))
    with pytest.raises(ValueError, match=r"part 1 has out \[1, 2, 2, 2\].*expected \[1, 2, 3, 2\]"):
        merge(part(), Attended(*(x[:, :, :2] for x in part())))
    with pytest.raises(ValueError, match="at least one"):
        merge()


def test_the_picture_in_visible_is_true():
    plain = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    band = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(visible(3, 5, causal=True), plain)
    assert torch.equal(visible(3, 5, causal=True, window=2), band)


@given(length=st.integers(1, 70), causal=st.booleans())
def test_a_window_as_wide_as_the_sequence_is_softmax(length, causal):
    q, k, v = qkv(length, length)
    want = softmax_attention(q, k, v, causal=causal)
    for window in (length, length + 5, 10 * length):
        torch.testing.assert_close(sliding_window_attention(q, k, v, window=window, causal=causal), want)
        torch.testing.assert_close(hybrid_attention(q, k, v, window=window, causal=causal), want)


@pytest.mark.parametrize("causal", [False, True])
def test_a_hybrid_between_its_limits(causal):
    q, k, v = qkv(40, 40)
    closed = hybrid_attention(q, k, v, window=6, gate=torch.full((3,), -80.0), causal=causal)
    torch.testing.assert_close(closed, sliding_window_attention(q, k, v, window=6, causal=causal))
    # with the window's scores far below, only the tail is left; window 1 leaves out the position itself
    low = torch.cat((q, torch.full_like(q[..., :1], -100.0)), -1), torch.cat((k, torch.ones_like(k[..., :1])), -1)
    open_ = hybrid_attention(*low, v, window=1, scale=50.0, gate=torch.zeros(3), causal=causal, feature_map="elu")
    a = (F.elu(low[0]) + 1) @ (F.elu(low[1]) + 1).transpose(-1, -2) * (1 - torch.eye(40))
    a = a.tril() if causal else a
    torch.testing.assert_close(open_[:, :, 1:], (a @ v / a.sum(-1, keepdim=True))[:, :, 1:])


@pytest.mark.parametrize("kind", ["softmax", "window", "linear", "hybrid"])
def test_weighted_means_are_linear_in_the_values_and_keep_constants(kind):
    q, k, v = (x.detach() for x in qkv(30, 30))
    function = {
        "softmax": softmax_attention,
        "window": lambda *x, **y: sliding_window_attention(*x, window=4, **y),
        "linear": linear_attention,
        "hybrid": lambda *x, **y: hybrid_attention(*x, window=4, **y),
    }[kind]
    for causal in (False, True):
        torch.testing.assert_close(function(q, k, torch.ones_like(v), causal=causal), torch.ones_like(v))
        torch.testing.assert_close(function(q, k, 2 * v + 1, causal=causal), 2 * function(q, k, v, causal=causal) + 1)


def test_permuting_the_keys_changes_nothing_and_their_number_may_differ():
    q, k, v = qkv()
    order = torch.randperm(12)
    for function in KINDS.values():
        same(function(q, k, v), function(q, k[:, :, order], v[:, :, order]))


def test_softmax_ignores_a_shift_of_its_scores_and_the_mass_does_not():
    q, k, v = qkv()
    shifted = softmax_attention(q, k, v, bias=torch.full((1,), 3.0, dtype=torch.float64), return_mass=True)
    plain = softmax_attention(q, k, v, return_mass=True)
    torch.testing.assert_close(shifted.out, plain.out)
    torch.testing.assert_close(shifted.log_mass, plain.log_mass + 3)


def test_a_precomputed_context_costs_no_keys():
    q, k, v = qkv()
    whole = linear_attention(q, k, v)
    _, state = linear_attention(q[:, :, :0], k, v, return_state=True)
    got = linear_attention(q, k[:, :, :0], v[:, :, :0], state=state)
    torch.testing.assert_close(got, whole)


def test_the_functional_hybrid_continues_from_its_state():
    q, k, v = (x.detach() for x in qkv(20, 20))
    want = hybrid_attention(q, k, v, window=3, feature_map="taylor", causal=True)
    state, got = None, []
    for a, b in ((0, 7), (7, 8), (8, 20)):
        y, state = hybrid_attention(
            q[:, :, a:b],
            k[:, :, a:b],
            v[:, :, a:b],
            window=3,
            feature_map="taylor",
            causal=True,
            state=state,
            return_state=True,
        )
        got.append(y)
    torch.testing.assert_close(torch.cat(got, 2), want)
    with pytest.raises(ValueError, match="two-sided hybrid has no state"):
        hybrid_attention(q, k, v, window=3, return_state=True)


def test_heads_must_fit():
    with pytest.raises(ValueError, match="multiple of num_kv_heads: 6 is not a multiple of 4"):
        Heads(6, 4, 8, 8)
