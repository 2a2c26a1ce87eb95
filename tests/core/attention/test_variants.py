"""One matrix for all: every registered variant keeps what `core.attention.contract` promises, through `Attention`."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim, export

from core.attention import Attention, available
from core.attention.contract import Heads, Inputs, state_bytes
from core.attention.registry import build, entry, variant_class

SMALL = {"window": 3, "feature_dim": 4, "features": 6, "block": 4, "stride": 2, "summary": 1, "dilation": 3}
SMALL |= {"buckets": 4, "rounds": 2, "segment": 5, "rank": 5, "max_length": 4096, "hidden": 6, "choice": "softmax"}
"""Options that make blocks and rings small enough to be crossed, where a variant has them."""

CHOICES = {
    "feature_map": ("elu", "relu", "taylor"),
    "score": ("dot", "general", "concat"),
    "choice": ("softmax", "hybrid"),
    "sharing": ("none", "headwise", "key_value", "layerwise"),
}
"""Options whose every value is tested with everything else."""

CHOOSERS = {"hard", "reformer"}
"""Variants that choose keys: a rounding may choose another."""

MAPS = ("cosine", "dpfp", "elu", "favor", "favor_relu", "focused", "hedgehog", "relu", "t2r", "taylor")
CHOICES_OF = {
    ("linear", "feature_map"): MAPS,
    ("hybrid", "feature_map"): MAPS,
    ("norm", "feature_map"): ("elu", "identity", "relu", "silu"),
    ("inline", "feature_map"): ("elu", "identity", "relu", "silu"),
}
"""The same for one variant."""


def options(name: str, **more) -> dict:
    given = {**{key: SMALL[key] for key in entry(name).options if key in SMALL}, **more}
    if "feature_map" in entry(name).options and given.get("feature_map") not in ("favor", "favor_relu", "t2r"):
        given.pop("features", None)  # how many there are is for these maps to choose
    return given


def builds() -> list:
    """Every variant with every value of its `CHOICES`, each with every position it composes with."""
    found = []
    for name in available():
        kept = [option for option in CHOICES if option in entry(name).options]
        for values in itertools.product(*(CHOICES_OF.get((name, option), CHOICES[option]) for option in kept)):
            more = dict(zip(kept, values))
            variant = build(name, Heads(4, 2, 8, 8, 32), **options(name, **more))
            found += [
                pytest.param(name, more, positions, id="-".join(filter(None, (name, *values, positions))))
                for positions in (None, *sorted(variant.positions))
            ]
    return found


BUILDS = builds()


def that_can(*abilities: str, builds=BUILDS) -> list:
    """The builds whose variant has all these abilities."""
    return [one for one in builds if set(abilities) <= variant_class(one.values[0]).can]


DIRECTED = [
    pytest.param(*one.values, causal, id=f"{one.id}-{'causal' if causal else 'two-sided'}")
    for causal, ability in ((False, "bidirectional"), (True, "causal"))
    for one in that_can(ability)
]
NAMES = [
    pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'two-sided'}")
    for name in available()
    for causal, ability in ((False, "bidirectional"), (True, "causal"))
    if ability in variant_class(name).can
]


def layer(name, more, positions, *, causal, dtype=torch.float64, **given) -> Attention:
    torch.manual_seed(1)
    arguments = {"num_kv_heads": 2, "causal": causal, "positions": positions, **options(name, **more), **given}
    return Attention(32, 4, name, **arguments).to(dtype).eval()


def test_there_are_variants_to_test():
    assert {"softmax", "window", "linear", "hybrid"} <= set(available())
    assert len(BUILDS) >= 24


@pytest.mark.parametrize(("name", "more", "positions", "causal"), DIRECTED)
def test_equals_its_reference_with_gradients(name, more, positions, causal):
    fast = layer(name, more, positions, causal=causal)
    slow = layer(name, more, positions, causal=causal, backend="reference")
    x = torch.randn(2, 13, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 13) > 0.3
    for key_mask in (None, mask):
        got, want = fast(x, key_mask=key_mask), slow(x, key_mask=key_mask)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        mine, theirs = ([x, *(p for p in one.parameters() if p.requires_grad)] for one in (fast, slow))
        got = torch.autograd.grad(got.sin().sum(), mine)
        want = torch.autograd.grad(want.sin().sum(), theirs)
        for mine, theirs in zip(got, want):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("name", "more", "positions"), that_can("causal"))
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
    torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=0, atol=1e-12)
    # What chooses keys may choose none of the changed ones.
    assert name in CHOOSERS or not torch.allclose(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize(
    ("name", "more", "positions", "causal"),
    [one for one in DIRECTED if variant_class(one.values[0]).anchor != "length"],
)
@settings(max_examples=5)
@given(data=st.data())
def test_padding_changes_nothing(name, more, positions, causal, data):
    left, length, right = (data.draw(st.integers(low, 40)) for low in (0, 1, 0))
    left = 0 if variant_class(name).anchor == "start" else left
    attention = layer(name, more, positions, causal=causal)
    x = torch.randn(1, length, 32, dtype=torch.float64)
    junk = torch.randn(1, left + length + right, 32, dtype=torch.float64) * 50
    junk[:, left : left + length] = x
    mask = torch.zeros(1, left + length + right, dtype=torch.bool)
    mask[:, left : left + length] = True
    got = attention(junk, key_mask=mask)[:, left : left + length]
    torch.testing.assert_close(got, attention(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "more", "positions", "causal"), DIRECTED)
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=7))
def test_a_pack_is_a_loop_over_its_sequences(name, more, positions, causal, lengths):
    attention = layer(name, more, positions, causal=causal)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    x = torch.randn(1, int(offsets[-1]), 32, dtype=torch.float64, requires_grad=True)
    got = attention(x, cu_seqlens=offsets)
    parts = [attention(x[:, a:b]) for a, b in itertools.pairwise(offsets.tolist()) if b > a]
    want = torch.cat([x[:, :0], *parts], 1)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    if x.shape[1]:
        mine, theirs = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want))
        # Looser: a relu query that hardly sees a key divides by a denominator near its floor.
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", available())
def test_what_has_no_state_says_who_does(name):
    if "causal" in variant_class(name).can and "recurrent" not in variant_class(name).can:
        with pytest.raises(ValueError, match="cannot do 'recurrent'"):
            layer(name, {}, None, causal=True).init_state(1)
    elif "causal" not in variant_class(name).can:
        with pytest.raises(ValueError, match="cannot do 'causal'"):
            layer(name, {}, None, causal=True)


@pytest.mark.parametrize(("name", "more", "positions"), that_can("recurrent"))
@pytest.mark.parametrize("short_conv", [0, 3])
@settings(max_examples=4)
@given(pieces=st.lists(st.integers(1, 17), min_size=1, max_size=6))
def test_prefill_and_steps_equal_one_pass(name, more, positions, short_conv, pieces):
    attention = layer(name, more, positions, causal=True, short_conv=short_conv)
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


@pytest.mark.parametrize(("name", "more", "positions"), that_can("recurrent"))
def test_an_old_state_stays_usable(name, more, positions):
    attention = layer(name, more, positions, causal=True)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    _, state = attention.prefill(x[:, :6], attention.init_state(1))
    first, _ = attention.prefill(x[:, 6:], state)
    again, _ = attention.prefill(x[:, 6:], state)
    assert torch.equal(first, again)


@pytest.mark.parametrize(("name", "more", "positions"), that_can("recurrent"))
def test_masked_keys_do_not_enter_the_state(name, more, positions):
    attention = layer(name, more, positions, causal=True)
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False, True, True, True]])
    want = attention(x, key_mask=mask)[:, -1]
    _, state = attention.prefill(x[:, :7], attention.init_state(1), key_mask=mask[:, :7])
    got, _ = attention.step(x[:, 7], state)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "more", "positions", "causal", "key_heads"),
    # The number of key heads is one thing, options and positions another.
    [pytest.param(*one.values, 2, id=one.id) for one in DIRECTED]
    + [
        pytest.param(one.values[0], {}, None, one.values[1], heads, id=f"{one.id}-{heads}")
        for one in NAMES
        for heads in (4, 1)
    ],
)
def test_cost_is_what_is_measured(name, more, positions, causal, key_heads):
    more = {**more, "short_conv": 3} if key_heads == 2 else more
    attention = layer(name, more, positions, causal=causal, dtype=torch.float32, num_kv_heads=key_heads)
    cost = attention.cost(3, 29)
    assert cost.parameters == sum(p.numel() for p in attention.parameters())
    if causal and "recurrent" in attention.variant.can:
        _, state = attention.prefill(torch.randn(3, 29, 32), attention.init_state(3))
        assert cost.state_bytes == state_bytes(state)
    else:
        assert cost.state_bytes == 0
    assert cost.flops > 0
    assert cost.bytes_moved > 0
    inner = [attention.variant.cost(3, length, causal=causal, positions=positions).flops for length in (2048, 4096)]
    low, high = {"linear": (1.98, 2.02), "log-linear": (2, 2.3), "root": (2.6, 3), "quadratic": (3.5, 4.02)}[
        attention.variant.growth
    ]
    assert low <= inner[1] / inner[0] <= high


@pytest.mark.parametrize(("name", "causal"), NAMES)
def test_a_short_convolution_goes_with_every_variant(name, causal):
    attention = layer(name, {"short_conv": 3}, None, causal=causal)
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 12:] += 1
    padded = torch.cat((x[:, :12], torch.full_like(x[:, 12:], torch.nan)), 1)
    mask = torch.arange(20)[None] < 12
    if causal:
        torch.testing.assert_close(attention(changed)[:, :12], attention(x)[:, :12], rtol=0, atol=1e-12)
    if variant_class(name).anchor != "length":
        torch.testing.assert_close(attention(padded, key_mask=mask)[:, :12], attention(x[:, :12]))
    offsets = torch.tensor([0, 12, 20])
    want = torch.cat((attention(x[:, :12]), attention(x[:, 12:])), 1)
    torch.testing.assert_close(attention(x, cu_seqlens=offsets), want)


@pytest.mark.parametrize(("name", "causal"), NAMES)
def test_grouped_heads_equal_repeated_heads(name, causal):
    grouped = Attention(32, 4, name, num_kv_heads=2, causal=causal, **options(name)).double().eval()
    full = Attention(32, 4, name, num_kv_heads=4, causal=causal, **options(name)).double().eval()
    weights, wanted = grouped.state_dict(), full.state_dict()
    for key, table in weights.items():
        for dim, size in enumerate(table.shape):
            if wanted[key].shape[dim] == 2 * size:  # its rows belong to key heads: 2 groups become 4
                repeated = table.unflatten(dim, (2, -1)).repeat_interleave(2, dim)
                weights[key] = repeated.flatten(dim, dim + 1)
    full.load_state_dict(weights)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in available() if "cross" in variant_class(name).can])
def test_cross_attention_masks_the_context_and_packs(name):
    attention = Attention(32, 4, name, **options(name)).double().eval()
    slow = Attention(32, 4, name, backend="reference", **options(name)).double().eval()
    slow.load_state_dict(attention.state_dict())
    x, context = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 11, 32, dtype=torch.float64)
    mask = torch.rand(2, 11) > 0.3
    torch.testing.assert_close(attention(x, context, key_mask=mask), slow(x, context, key_mask=mask))
    padded = torch.cat((context, torch.full_like(context, torch.nan)), 1)
    real = torch.arange(22)[None].expand(2, -1) < 11
    torch.testing.assert_close(attention(x, padded, key_mask=real), attention(x, context))
    if not attention.variant.anchor:
        order = torch.randperm(11)
        torch.testing.assert_close(attention(x, context[:, order]), attention(x, context))
    offsets, context_offsets = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 11])
    got = attention(x[:1], context[:1], cu_seqlens=offsets, cu_seqlens_context=context_offsets)
    want = torch.cat([attention(x[:1, :2], context[:1, :4]), attention(x[:1, 2:], context[:1, 4:])], 1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", [name for name in available() if "cross" in variant_class(name).can])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_remembered_context_equals_the_context(name, key_heads):
    attention = Attention(32, 4, name, num_kv_heads=key_heads, qk_norm=True, **options(name)).double().eval()
    x, context = torch.randn(3, 7, 32, dtype=torch.float64), torch.randn(3, 11, 32, dtype=torch.float64)
    mask = torch.rand(3, 11) > 0.3
    mask[2] = False
    context[~mask] = torch.nan
    want, state = attention(x, context, key_mask=mask), attention.remember(context, key_mask=mask)
    parts = [attention.recall(x[:, a:b], state) for a, b in ((0, 1), (1, 2), (2, 7))]
    torch.testing.assert_close(torch.cat(parts, 1), want)
    assert all(len(tensor) == 3 for tensor in state.values())  # batch first, so that beams can be reordered
    torch.testing.assert_close(
        attention.recall(x, attention.remember(x)), attention(x, x.clone()), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("name", [name for name in available() if "cross" not in variant_class(name).can])
def test_what_cannot_cross_says_who_can(name):
    causal = "bidirectional" not in variant_class(name).can
    with pytest.raises(ValueError, match=r"cannot do 'cross'; .*linear, .*softmax can"):
        Attention(32, 4, name, causal=causal, **options(name))(torch.zeros(1, 4, 32), torch.zeros(1, 6, 32))


@pytest.mark.parametrize(("name", "causal"), NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_with_float32_states(name, dtype, causal):
    positions = "rope" if "rope" in variant_class(name).positions else None
    attention = Attention(32, 4, name, causal=causal, qk_norm=True, positions=positions, **options(name)).eval()
    x = torch.randn(2, 50, 32)
    exact = attention(x)
    with torch.autocast("cpu", dtype=dtype):
        y = attention(x)
        y.float().square().sum().backward()
        if causal and "recurrent" in attention.variant.can:
            _, state = attention.prefill(x, attention.init_state(2))
            assert all(state[key].dtype == torch.float32 for key in state if key in ("sum", "count"))
    assert y.dtype == dtype
    error = (y.float() - exact).abs()
    assert (error.median() if name in CHOOSERS else error.max()) < 0.05 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in attention.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "causal"), NAMES)
def test_strided_inputs_and_repeats_give_the_same_bits(name, causal):
    variant = build(name, Heads(4, 4, 8, 8, 32), **options(name)).eval()
    given = {"causal": causal, "inputs": Inputs(torch.randn(2, 70, 32))}
    q, k, v = (torch.randn(2, 70, 4, 8).transpose(1, 2) for _ in range(3))
    first = variant(q, k, v, **given).out
    assert torch.equal(first, variant(q, k, v, **given).out)
    torch.testing.assert_close(first, variant(q.contiguous(), k.contiguous(), v.contiguous(), **given).out)


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


COMPILED = [one for one in NAMES if not variant_class(one.values[0]).uncompiled]
ONCE = [one for one in COMPILED if one.values[1] or "causal" not in variant_class(one.values[0]).can]
"""Compiling takes seconds: causal where it can be, the other direction in the slow tests."""


@pytest.mark.parametrize(
    ("name", "causal"),
    [one if one in ONCE else pytest.param(*one.values, id=one.id, marks=pytest.mark.slow) for one in COMPILED],
)
def test_compiles_whole_and_exports_with_dynamic_length(name, causal):
    positions = "rope" if causal and "rope" in variant_class(name).positions else None
    exported(name, {}, positions, causal, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more", "positions", "causal"), [one for one in DIRECTED if not variant_class(one.values[0]).uncompiled]
)
def test_every_build_compiles_with_inductor(name, more, positions, causal):
    exported(name, more, positions, causal, "inductor")


def test_the_steps_state_grows_only_where_it_is_a_cache_of_keys():
    for name in available():
        if {"causal", "recurrent"} <= variant_class(name).can:
            attention = Attention(32, 4, name, causal=True, **options(name))
            grows = attention.cost(1, 1000).state_bytes != attention.cost(1, 2000).state_bytes
            assert grows == (variant_class(name).growth != "linear"), name
