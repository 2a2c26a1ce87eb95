"""One matrix for all: every registered variant keeps what `core.attention.contract` promises, through `Attention`."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim, export

from core.attention import Attention, available
from core.attention.contract import state_bytes
from core.attention.registry import entry, variant_class

SMALL = {"window": 3, "feature_dim": 4}
"""Options that make blocks and rings small enough to be crossed, where a variant has them."""


def options(name: str, **more) -> dict:
    return {**{key: SMALL[key] for key in entry(name).options if key in SMALL}, **more}


def builds() -> list:
    """Every variant with every value of its feature map, each with every position it composes with."""
    found = []
    for name in available():
        maps = ("elu", "relu", "taylor") if "feature_map" in entry(name).options else (None,)
        for phi, positions in itertools.product(maps, (None, *sorted(variant_class(name).positions))):
            more = {} if phi is None else {"feature_map": phi}
            found.append(pytest.param(name, more, positions, id="-".join(filter(None, (name, phi, positions)))))
    return found


BUILDS = builds()


def layer(name, more, positions, *, causal, dtype=torch.float64, **given) -> Attention:
    torch.manual_seed(1)
    arguments = {"num_kv_heads": 2, "causal": causal, "positions": positions, **options(name, **more), **given}
    return Attention(32, 4, name, **arguments).to(dtype)


def test_there_are_variants_to_test():
    assert {"softmax", "window", "linear", "hybrid"} <= set(available())
    assert len(BUILDS) >= 24


@pytest.mark.parametrize(("name", "more", "positions"), BUILDS)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_its_reference_with_gradients(name, more, positions, causal):
    fast = layer(name, more, positions, causal=causal)
    slow = layer(name, more, positions, causal=causal, backend="reference")
    x = torch.randn(2, 13, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 13) > 0.3
    for key_mask in (None, mask):
        got, want = fast(x, key_mask=key_mask), slow(x, key_mask=key_mask)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        got = torch.autograd.grad(got.sin().sum(), [x, *fast.parameters()])
        want = torch.autograd.grad(want.sin().sum(), [x, *slow.parameters()])
        for mine, theirs in zip(got, want):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("name", "more", "positions"), BUILDS)
@settings(max_examples=5)
@given(data=st.data())
def test_the_future_does_not_reach_the_past(name, more, positions, data):
    length = data.draw(st.integers(2, 70))
    cut = data.draw(st.integers(1, length - 1))
    attention = layer(name, more, positions, causal=True)
    x = torch.randn(1, length, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, cut:] += torch.randn(1, length - cut, 32, dtype=torch.float64)
    before, after = attention(x), attention(changed)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.allclose(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize(("name", "more", "positions"), BUILDS)
@settings(max_examples=5)
@given(data=st.data())
def test_padding_changes_nothing(name, more, positions, data):
    left, length, right = (data.draw(st.integers(low, 40)) for low in (0, 1, 0))
    causal = data.draw(st.booleans())
    attention = layer(name, more, positions, causal=causal)
    x = torch.randn(1, length, 32, dtype=torch.float64)
    junk = torch.randn(1, left + length + right, 32, dtype=torch.float64) * 50
    junk[:, left : left + length] = x
    mask = torch.zeros(1, left + length + right, dtype=torch.bool)
    mask[:, left : left + length] = True
    got = attention(junk, key_mask=mask)[:, left : left + length]
    torch.testing.assert_close(got, attention(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "more", "positions"), BUILDS)
@settings(max_examples=5)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=7), causal=st.booleans())
def test_a_pack_is_a_loop_over_its_sequences(name, more, positions, lengths, causal):
    attention = layer(name, more, positions, causal=causal)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    x = torch.randn(1, int(offsets[-1]), 32, dtype=torch.float64, requires_grad=True)
    got = attention(x, cu_seqlens=offsets)
    parts = [attention(x[:, a:b]) for a, b in itertools.pairwise(offsets.tolist()) if b > a]
    want = torch.cat([x[:, :0], *parts], 1)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    if x.shape[1]:
        mine, theirs = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want))
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "more", "positions"), BUILDS)
@settings(max_examples=4)
@given(pieces=st.lists(st.integers(1, 17), min_size=1, max_size=6))
def test_prefill_and_steps_equal_one_pass(name, more, positions, pieces):
    if "recurrent" not in variant_class(name).can:
        with pytest.raises(ValueError, match="cannot do 'recurrent'"):
            layer(name, more, positions, causal=True).init_state(1)
        return
    attention = layer(name, more, positions, causal=True)
    x = torch.randn(2, sum(pieces), 32, dtype=torch.float64)
    want = attention(x)
    state, got, at = attention.init_state(2), [], 0
    for size in pieces:
        if size == 1:
            y, state = attention.step(x[:, at], state)
            y = y.unsqueeze(1)
        else:
            y, state = attention.prefill(x[:, at : at + size], state)
        got.append(y)
        at += size
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "more", "positions"), BUILDS)
def test_an_old_state_stays_usable(name, more, positions):
    attention = layer(name, more, positions, causal=True)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    _, state = attention.prefill(x[:, :6], attention.init_state(1))
    first, _ = attention.prefill(x[:, 6:], state)
    again, _ = attention.prefill(x[:, 6:], state)
    assert torch.equal(first, again)


@pytest.mark.parametrize(("name", "more", "positions"), BUILDS)
def test_masked_keys_do_not_enter_the_state(name, more, positions):
    attention = layer(name, more, positions, causal=True)
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False, True, True, True]])
    want = attention(x, key_mask=mask)[:, -1]
    _, state = attention.prefill(x[:, :7], attention.init_state(1), key_mask=mask[:, :7])
    got, _ = attention.step(x[:, 7], state)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "more", "positions"), BUILDS)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_cost_is_what_is_measured(name, more, positions, key_heads):
    attention = layer(name, more, positions, causal=True, dtype=torch.float32, num_kv_heads=key_heads)
    cost = attention.cost(3, 29)
    assert cost.parameters == sum(p.numel() for p in attention.parameters())
    _, state = attention.prefill(torch.randn(3, 29, 32), attention.init_state(3))
    assert cost.state_bytes == state_bytes(state)
    assert cost.flops > 0
    assert cost.bytes_moved > 0
    longer = attention.cost(3, 2048).flops / attention.cost(3, 1024).flops
    assert longer == pytest.approx(2.0, rel=0.02) or name == "softmax"


@pytest.mark.parametrize("name", available())
def test_grouped_heads_equal_repeated_heads(name):
    grouped = Attention(32, 4, name, num_kv_heads=2, **options(name)).double()
    full = Attention(32, 4, name, num_kv_heads=4, **options(name)).double()
    weights = grouped.state_dict()
    for which in ("key", "value"):
        for kind in ("weight", "bias"):
            table = weights[f"{which}.{kind}"].unflatten(0, (2, 8))
            weights[f"{which}.{kind}"] = table.repeat_interleave(2, 0).flatten(0, 1)
    for learned in [key for key in weights if key.startswith("variant.") and weights[key].shape[:1] == (2,)]:
        weights[learned] = weights[learned].repeat_interleave(2, 0)
    full.load_state_dict(weights)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in available() if "cross" in variant_class(name).can])
def test_cross_attention_masks_the_context_and_packs(name):
    attention = Attention(32, 4, name, **options(name)).double()
    slow = Attention(32, 4, name, backend="reference", **options(name)).double()
    slow.load_state_dict(attention.state_dict())
    x, context = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 11, 32, dtype=torch.float64)
    mask = torch.rand(2, 11) > 0.3
    torch.testing.assert_close(attention(x, context, key_mask=mask), slow(x, context, key_mask=mask))
    order = torch.randperm(11)
    torch.testing.assert_close(attention(x, context[:, order]), attention(x, context))
    offsets, context_offsets = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 11])
    got = attention(x[:1], context[:1], cu_seqlens=offsets, cu_seqlens_context=context_offsets)
    want = torch.cat([attention(x[:1, :2], context[:1, :4]), attention(x[:1, 2:], context[:1, 4:])], 1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", [name for name in available() if "cross" not in variant_class(name).can])
def test_what_cannot_cross_says_who_can(name):
    with pytest.raises(ValueError, match="cannot do 'cross'; linear, softmax can"):
        Attention(32, 4, name)(torch.zeros(1, 4, 32), torch.zeros(1, 6, 32))


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_autocast_trains_with_float32_states(name, dtype, causal):
    attention = Attention(32, 4, name, causal=causal, qk_norm=True, positions="rope", **options(name))
    x = torch.randn(2, 50, 32)
    exact = attention(x)
    with torch.autocast("cpu", dtype=dtype):
        y = attention(x)
        y.float().square().sum().backward()
        if causal:
            _, state = attention.prefill(x, attention.init_state(2))
            assert all(state[key].dtype == torch.float32 for key in state if key in ("sum", "count"))
    assert y.dtype == dtype
    assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in attention.parameters())


@pytest.mark.parametrize("name", available())
def test_strided_inputs_and_repeats_give_the_same_bits(name):
    from core.attention.contract import Heads
    from core.attention.registry import build

    variant = build(name, Heads(4, 4, 8, 8), **options(name))
    q, k, v = (torch.randn(2, 70, 4, 8).transpose(1, 2) for _ in range(3))
    first = variant(q, k, v, causal=True).out
    assert torch.equal(first, variant(q, k, v, causal=True).out)
    torch.testing.assert_close(first, variant(q.contiguous(), k.contiguous(), v.contiguous(), causal=True).out)


def exported(name, more, positions, causal, backend):
    attention = layer(name, more, positions, causal=causal, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=backend)
    for length in (40, 17):
        x = torch.randn(2, length, 32, requires_grad=True)
        got, want = compiled(x), attention(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        mine, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (got, want))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    attention.eval()
    with torch.no_grad():
        length = Dim("length", min=2, max=4096)
        program = export(attention, (torch.randn(2, 40, 32),), dynamic_shapes=({1: length},)).module()
        for size in (2, 301):
            x = torch.randn(2, size, 32)
            torch.testing.assert_close(program(x), attention(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("causal", [False, True])
def test_compiles_whole_and_exports_with_dynamic_length(name, causal):
    exported(name, {}, "rope" if causal else None, causal, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more", "positions"), BUILDS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_build_compiles_with_inductor(name, more, positions, causal):
    exported(name, more, positions, causal, "inductor")


def test_the_steps_state_does_not_grow_where_cost_says_so():
    for name in available():
        attention = Attention(32, 4, name, causal=True, **options(name))
        grows = attention.cost(1, 1000).state_bytes != attention.cost(1, 2000).state_bytes
        assert grows == (name == "softmax")
