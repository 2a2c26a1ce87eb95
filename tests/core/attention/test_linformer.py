"""Linformer by the letter: sharing, lengths below the maximum, masks, precisions."""

import math

import pytest
import torch

from core.attention.contract import Heads
from core.attention.registry import build
from core.attention.variants.linformer import SHARING

HEADS = Heads(4, 2, 4, 3)


def tensors(length, keys):
    sizes = (2, 4, length, 4), (2, 2, keys, 4), (2, 2, keys, 3)
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def by_hand(q, k, v, e, g, key_mask, renormalise):
    """(out, log_mass): slots, then scores, one number at a time; e, g [2, F, n_max] per key head."""
    outs, masses = [], []
    for b in range(q.shape[0]):
        real = [j for j in range(k.shape[2]) if key_mask is None or key_mask[b, j]]
        factor = (max(real) + 1) / len(real) if renormalise and real else 1.0
        for h in range(q.shape[1]):
            head = h // 2
            slots = [factor * sum(e[head, f, j] * k[b, head, j] for j in real) for f in range(e.shape[1])]
            values = [factor * sum(g[head, f, j] * v[b, head, j] for j in real) for f in range(e.shape[1])]
            for i in range(q.shape[2]):
                weights = [torch.exp(q[b, h, i].dot(slot) / math.sqrt(q.shape[-1])) for slot in slots if real]
                total = sum(weights)
                outs.append(sum(w * x for w, x in zip(weights, values)) / total if real else v.new_zeros(3))
                masses.append(total.log() if real else v.new_tensor(-math.inf))
    shape = q.shape[:3]
    return torch.stack(outs).view(*shape, -1), torch.stack(masses).view(shape)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("renormalise", [False, True])
def test_equals_the_definition_forward_and_backward(sharing, renormalise):
    variant = build("linformer", HEADS, rank=3, max_length=9, sharing=sharing, renormalise=renormalise).double()
    e = variant.mix.expand(2, -1, -1)
    g = e if variant.mix_values is None else variant.mix_values.expand(2, -1, -1)
    assert len(list(variant.parameters())) == (2 if sharing in ("none", "headwise") else 1)
    for length, keys in ((6, 6), (4, 9), (3, 1)):
        mask = torch.rand(2, keys) > 0.4
        mask[0, 0], mask[1] = True, mask[1] & (keys > 6)
        for key_mask in (None, mask):
            q, k, v = tensors(length, keys)
            got = variant(q, k, v, key_mask=key_mask, return_mass=True)
            want = by_hand(q, k, v, e, g, key_mask, renormalise)
            seen = torch.isfinite(want[1])
            assert torch.equal(torch.isfinite(got[1]), seen)
            torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(got[1][seen], want[1][seen], rtol=1e-10, atol=1e-12)
            inputs = (q, k, v, *variant.parameters())
            mine, theirs = (torch.autograd.grad(o.sin().sum() + m[seen].sum(), inputs) for o, m in (got, want))
            for a, b in zip(mine, theirs):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_padding_may_hold_anything_also_when_renormalised():
    variant = build("linformer", HEADS, rank=3, max_length=20, renormalise=True).double()
    q, k, v = (x.detach() for x in tensors(5, 12))
    mask = torch.tensor([[True, False, True, True] + [False] * 8, [True] * 7 + [False] * 5])
    junk = torch.where(mask[:, None, :, None], 0.0, torch.nan)
    dirty = [(x + junk).requires_grad_() for x in (k, v)]
    got = variant(q, *dirty, key_mask=mask).out
    assert torch.equal(got, variant(q, k, v, key_mask=mask).out)
    for gradient in torch.autograd.grad(got.sum(), dirty):
        assert (gradient.transpose(1, 2)[~mask] == 0).all()
    short = variant(q[:1], k[:1, :, :4], v[:1, :, :4], key_mask=mask[:1, :4]).out
    torch.testing.assert_close(got[:1], short)


def test_equal_shares_of_masked_keys_are_made_up_for():
    # With constant columns a slot is a plain sum, so half of the keys, doubled, are all keys.
    variant = build("linformer", HEADS, rank=2, max_length=8, renormalise=True).double()
    with torch.no_grad():
        for table in variant.parameters():
            table.fill_(0.25)
    k, v = torch.ones(1, 2, 8, 4, dtype=torch.float64), torch.ones(1, 2, 8, 3, dtype=torch.float64)
    mask = torch.tensor([[False, True] * 4])
    q = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(variant(q, k, v, key_mask=mask).out, variant(q, k, v).out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 10])
def test_errors_stay_near_those_of_the_plain_formula(dtype, scale):
    variant = build("linformer", Heads(4, 2, 16, 8), rank=16, max_length=300)
    exact = [torch.randn(2, heads, 200, width) * scale for heads, width in ((4, 16), (2, 16), (2, 8))]
    exact = [x.to(dtype).double() for x in exact]
    want = variant.double()(*exact, backend="reference").out
    variant.to(dtype)
    plain, got = (variant(*(x.to(dtype) for x in exact), backend=name).out for name in ("reference", "torch"))
    assert got.dtype == dtype
    # Rounded weights differ from the exact ones in both; only what the rounded slots add is ours.
    bound = 2 * (plain.double() - want).abs().max() + 1e-5 * scale
    assert (got.double() - want).abs().max() <= bound


def test_what_it_cannot_do_is_an_error_that_says_why():
    for options, text in [
        ({"sharing": "head_wise"}, r"unknown sharing 'head_wise' \(did you mean 'headwise'\?\); known: none, headwise"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"max_length": 2.5}, r"max_length must be a whole number \(default \d+\), got 2.5"),
    ]:
        with pytest.raises(ValueError, match=text):
            build("linformer", HEADS, **options)
    variant = build("linformer", HEADS, max_length=5).double()
    q, k, v = tensors(6, 6)
    with pytest.raises(ValueError, match="built for at most 5 keys, got 6; raise max_length"):
        variant(q, k, v)
    with pytest.raises(ValueError, match="cannot be causal: every slot mixes all positions"):
        variant(q, k, v, causal=True)
