"""Reformer by the letter: who meets whom, unions of rounds, lone tokens, precisions, what the state_dict keeps."""

import math

import pytest
import torch

from core.attention import Attention
from core.attention.blocked import buckets
from core.attention.blocked.buckets import bucket_forward
from core.attention.contract import Heads
from core.attention.registry import build

HEADS = Heads(4, 2, 4, 3)
OPTIONS = {"window": 3, "buckets": 4, "rounds": 3}


def tensors(length, heads=HEADS):
    sizes = (2, heads.query, length, heads.width), (2, heads.key, length, heads.value_width)
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def met(variant, q, real, causal):
    """[B][H][i] -> set of the keys that query i sees, by walking through the members of its bucket in every round."""
    half = variant.buckets // 2
    found = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = [set() for _ in range(q.shape[2])]
            for r in range(variant.rounds):
                planes = variant.planes[h, :, r * half : (r + 1) * half]
                members = {}
                for i in range(q.shape[2]):
                    side = q[b, h, i] / q[b, h, i].norm() @ planes
                    if real[b, i]:
                        members.setdefault(int(torch.cat((side, -side)).argmax()), []).append(i)
                for group in members.values():
                    for n, i in enumerate(group):
                        after = n + 1 if causal else n + variant.window
                        keys[i] |= set(group[max(0, n - variant.window + 1) : after]) - {i}
            found.append([seen or ({i} if real[b, i] else set()) for i, seen in enumerate(keys)])
    return found


def by_hand(variant, q, v, real, causal):
    """(out, log_mass), one query at a time."""
    outs, masses = [], []
    for n, rows in enumerate(met(variant, q, real, causal)):
        b, h = divmod(n, q.shape[1])
        for i, seen in enumerate(rows):
            total, mean = q.new_zeros(()), q.new_zeros(v.shape[-1])
            for j in sorted(seen):
                weight = torch.exp(q[b, h, i].dot(q[b, h, j] / q[b, h, j].norm()))
                total, mean = total + weight, mean + weight * v[b, h // 2, j]
            outs.append(mean / total if seen else mean)
            masses.append(total.log() if seen else total.new_tensor(-math.inf))
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(masses).view(q.shape[:3])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("budget", [1 << 18, 100])
def test_equals_the_definition_forward_and_backward(causal, masked, budget, monkeypatch):
    monkeypatch.setattr(buckets, "block_elements", lambda device: budget)
    variant = build("reformer", HEADS, **OPTIONS).double()
    for length in (1, 2, 17, 24):
        q, v = tensors(length)
        real = torch.rand(2, length) > 0.3 if masked else torch.ones(2, length, dtype=torch.bool)
        real[0, 0] = True
        got = variant(q, torch.zeros_like(v[..., :1]).expand(-1, -1, -1, 4), v, causal=causal, key_mask=real)
        want = by_hand(variant, q, v, real, causal)
        seen = torch.isfinite(want[1])
        assert torch.equal(torch.isfinite(got[1]), seen)
        torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got[1][seen], want[1][seen], rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(o.sin().sum() + m[seen].cos().sum(), (q, v)) for o, m in (got, want)]
        for mine, theirs in zip(*grads):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_one_bucket_pair_and_a_wide_window_is_softmax_without_the_own_key():
    variant = build("reformer", HEADS, window=40, buckets=2, rounds=12).double()
    q, v = (x.detach() for x in tensors(30))
    q += 4  # no two are nearly opposite
    seen = met(variant, q, torch.ones(2, 30, dtype=torch.bool), False)
    assert all(len(keys) == 29 for rows in seen for keys in rows)  # twelve draws put every pair together once
    s = (q @ torch.nn.functional.normalize(q, dim=-1).transpose(-1, -2)).masked_fill(torch.eye(30).bool(), -math.inf)
    want = s.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(variant(q, torch.zeros_like(q[:, :2]), v).out, want)


def test_equal_vectors_find_each_other_at_any_distance():
    q, v = torch.randn(1, 1, 2000, 16), torch.zeros(1, 1, 2000, 2)
    q[0, 0, 1990] = q[0, 0, 5] = 10 * q[0, 0, 5]
    v[0, 0, 5] = 1.0
    out = build("reformer", Heads(1, 1, 16, 2), window=300, buckets=32, rounds=2)(q, q, v, causal=True).out
    assert out[0, 0, 1990].min() > 0.99
    assert out[0, 0, 1500].max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 10])
def test_errors_stay_near_those_of_the_dense_formula(dtype, scale):
    heads = Heads(4, 2, 16, 8)
    exact = [(x.detach() * scale).to(dtype).double() for x in tensors(150, heads)]
    tiny = 1e-5 * max(1, scale)
    variant = build("reformer", heads, window=12, buckets=8, rounds=2).double()
    buckets_of = variant.hash(torch.nn.functional.normalize(exact[0], dim=-1), None)
    variant.hash = lambda k, key_mask: buckets_of  # rounding may hash differently; that is not the error in question

    def run(kind, backend):
        q, v = (x.to(kind).requires_grad_() for x in exact)
        out = variant(q, q[:, :2].detach(), v, causal=True, backend=backend).out
        assert out.dtype == kind
        return [x.double() for x in (out, *torch.autograd.grad(out.double().square().sum(), (q, v)))]

    wanted, plain, got = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "torch")
    for a, b, truth, factor in zip(got, plain, wanted, (2, 3, 3), strict=True):
        limit = factor * (b - truth).abs().nan_to_num(nan=math.inf).max() + tiny * (1 + truth.abs().max())
        error = (a - truth).abs().max()
        assert error <= limit, f"error {error:.2e}, the plain formula's bound is {limit:.2e}"


def test_the_planes_come_from_the_seed_and_stay_in_the_state_dict():
    first, again, other = (build("reformer", HEADS, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.planes, again.planes)
    assert not torch.equal(first.planes, other.planes)
    other.load_state_dict(first.state_dict())
    q, v = (x.detach().float() for x in tensors(40))
    assert torch.equal(first.train()(q, q[:, :2], v).out, other.eval()(q, q[:, :2], v).out)


def test_what_the_layer_has_for_keys_is_frozen():
    layer = Attention(16, 4, "reformer", qk_norm=True, short_conv=3, **OPTIONS)
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {"key.weight", "key.bias", "key_norm.weight", "convolutions.key.weight"}
    layer(torch.randn(1, 9, 16)).square().sum().backward()
    assert all((p.grad is None) == (name in frozen) for name, p in layer.named_parameters())


def test_bad_options_name_what_is_valid():
    for options, text in [
        ({"buckets": 5}, "must be even, got 5"),
        ({"window": 1}, r"window must be a whole number of at least 2 \(1 sees nobody\), got 1"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            build("reformer", HEADS, **options)
    q, v = tensors(5)
    with pytest.raises(ValueError, match="L and M must agree, got L=4, M=5"):
        build("reformer", HEADS)(q[:, :, :4], q[:, :2], v)


def test_opcheck():
    q, k = (torch.randn(1, 4, 9, 4, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 2, 9, 4, requires_grad=True)
    order, codes = build("reformer", Heads(4, 2, 4, 4), **OPTIONS).hash(q.detach(), None)
    arguments = (q, k, v, order, codes, torch.rand(1, 9) > 0.3, 3, True, 1.0)
    torch.library.opcheck(
        bucket_forward, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
