"""Sparse patterns against masks that are written down pair by pair: outputs, masses, gradients, precisions, costs."""

import math

import pytest
import torch

from core.attention import Attention
from core.attention.blocked import tables
from core.attention.blocked.patterns import pattern_forward
from core.attention.blocked.tables import plan, table_forward
from core.attention.contract import Heads, Inputs
from core.attention.registry import build


def dilated(window, dilation):
    return lambda i, j: (i - j) % dilation == 0 and abs(i - j) < window * dilation


def strided(stride):
    return lambda i, j: abs(i - j) < stride or (i - j) % stride == 0


def fixed(stride, summary):
    return lambda i, j: i // stride == j // stride or j % stride >= stride - summary


PATTERNS = [
    ("dilated", {"window": 3, "dilation": 2}, dilated(3, 2)),
    ("dilated", {"window": 1, "dilation": 4}, dilated(1, 4)),
    ("dilated", {"window": 2, "dilation": 1}, dilated(2, 1)),
    ("dilated", {"window": 9, "dilation": 30}, dilated(9, 30)),
    ("strided", {"stride": 1}, strided(1)),
    ("strided", {"stride": 3}, strided(3)),
    ("strided", {"stride": 40}, strided(40)),
    ("fixed", {"stride": 4, "summary": 1}, fixed(4, 1)),
    ("fixed", {"stride": 5, "summary": 3}, fixed(5, 3)),
    ("fixed", {"stride": 3, "summary": 3}, fixed(3, 3)),
    ("fixed", {"stride": 40, "summary": 2}, fixed(40, 2)),
]
CASES = [pytest.param(*one, id=f"{one[0]}-{'-'.join(map(str, one[1].values()))}") for one in PATTERNS]


def dense(sees, length, keys, causal):
    """The mask [L, M] by the letter; the last query stands at the last key."""
    at = range(keys - length, keys)
    return torch.tensor([[bool(sees(i, j)) and (j <= i or not causal) for j in range(keys)] for i in at])


def by_mask(q, k, v, seen, slopes=None):
    """(out, log_mass) of softmax over `seen` [B, 1 or H, L, M] in float64."""
    length, keys = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, h // group] for h in range(q.shape[1])], 1) for x in (k, v))
    s = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    if slopes is not None:
        distance = torch.arange(keys - length, keys)[:, None] - torch.arange(keys)
        s = s - slopes[:, None, None] * distance.abs()
    weights = s.exp() * seen
    total = weights.sum(-1)
    safe = torch.where(total > 0, total, 1.0)
    return (weights / safe[..., None]) @ v, torch.where(total > 0, safe.log(), -math.inf)


def tensors(length, keys=None, *, batch=2, heads=4, key_heads=2, width=4, values=3):
    keys = length if keys is None else keys
    sizes = (batch, heads, length, width), (batch, key_heads, keys, width), (batch, key_heads, keys, values)
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def agree(got, want, inputs):
    """Outputs, masses and gradients of both."""
    seen = torch.isfinite(want[1])
    assert seen.any()
    assert torch.equal(torch.isfinite(got[1]), seen)
    assert (got[1][~seen] == -math.inf).all()
    assert (got[0].transpose(1, 2)[~seen.transpose(1, 2)] == 0).all()
    torch.testing.assert_close(got[0], want[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got[1][seen], want[1][seen], rtol=1e-9, atol=1e-11)
    mine, theirs = (torch.autograd.grad(o.sin().sum() + m[seen].cos().sum(), inputs) for o, m in (got, want))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "options", "sees"), CASES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_softmax_under_the_mask(name, options, sees, causal, masked):
    variant = build(name, Heads(4, 2, 4, 3), **options)
    for length, keys in ((1, 1), (13, 13), *([(1, 14), (6, 17), (2, 3)] if causal else [])):
        q, k, v = tensors(length, keys)
        mask = torch.rand(2, keys) > 0.4 if masked else None
        if mask is not None:
            mask[0, 0] = True
        seen = dense(sees, length, keys, causal) & (True if mask is None else mask[:, None, None, :])
        if seen.any():
            agree(variant(q, k, v, causal=causal, key_mask=mask), by_mask(q, k, v, seen), (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_alibi_counts_positions_not_steps_of_the_dilation(causal):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    q, k, v = tensors(19)
    got = build("dilated", Heads(4, 2, 4, 3), window=3, dilation=4)(q, k, v, causal=causal, slopes=slopes)
    agree(got, by_mask(q, k, v, dense(dilated(3, 4), 19, 19, causal), slopes), (q, k, v))


@pytest.mark.parametrize(("name", "options", "sees"), CASES)
@pytest.mark.parametrize("causal", [False, True])
def test_cost_counts_the_visible_pairs(name, options, sees, causal):
    variant = build(name, Heads(4, 2, 4, 3), **options)
    for length in (1, 13, 30, 47):
        pairs = int(dense(sees, length, length, causal).sum())
        assert variant.cost(2, length, causal=causal).flops == 2 * 2 * 4 * pairs * (4 + 3)


def within_twice_the_plain_error(variant, length, dtype, scale, **given):
    """Forward error at most twice, gradient error at most three times that of the dense formula in the same dtype."""
    h = variant.heads
    exact = tensors(length, heads=h.query, key_heads=h.key, width=h.width, values=h.value_width)
    exact = [(x.detach() * scale).to(dtype).double().requires_grad_() for x in exact]
    tiny = 1e-5 * max(1.0, scale)

    def run(kind, backend):
        given_x = [x.detach().to(kind).requires_grad_() for x in exact]
        given["inputs"] = Inputs(given["inputs"].x.to(kind))
        out = variant.to(kind)(*given_x, backend=backend, **given).out
        assert out.dtype == kind
        loss = out.double().square().sum()
        grads = torch.autograd.grad(loss, given_x, materialize_grads=True)
        return [x.double() for x in (out, *grads)]

    wanted, plain, got = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "torch")
    for a, b, truth, factor in zip(got, plain, wanted, (2, 3, 3, 3), strict=True):
        limit = factor * (b - truth).abs().nan_to_num(nan=math.inf).max() + tiny * (1 + truth.abs().max())
        error = (a - truth).abs().max()
        assert error <= limit, f"error {error:.2e}, the plain formula's bound is {limit:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dilated", {"window": 9, "dilation": 4}),
        ("strided", {"stride": 16}),
        ("fixed", {"stride": 16, "summary": 4}),
        ("longformer", {"window": 9, "global_tokens": 2}),
        ("bigbird", {"block": 8}),
    ],
)
def test_errors_stay_near_those_of_the_dense_formula(name, options, dtype, scale):
    variant = build(name, Heads(4, 2, 16, 8, 64), **options)
    inputs = Inputs(torch.randn(2, 150, 64).to(dtype).double())
    within_twice_the_plain_error(variant, 150, dtype, scale, causal=True, inputs=inputs)


def test_dilation_one_is_the_window_and_a_long_stride_is_softmax():
    q, k, v = (x.detach() for x in tensors(30))
    for causal in (False, True):
        one = build("dilated", Heads(4, 2, 4, 3), window=5, dilation=1)(q, k, v, causal=causal)
        torch.testing.assert_close(one, build("window", Heads(4, 2, 4, 3), window=5)(q, k, v, causal=causal))
        full = build("softmax", Heads(4, 2, 4, 3))(q, k, v, causal=causal, return_mass=True)
        for name, options in (("strided", {"stride": 30}), ("fixed", {"stride": 7, "summary": 7})):
            torch.testing.assert_close(build(name, Heads(4, 2, 4, 3), **options)(q, k, v, causal=causal), full)


GLOBALS = [
    pytest.param({"window": 3, "global_tokens": 1}, None, id="first"),
    pytest.param({"window": 2, "global_tokens": 0, "max_global": 4}, [[3, 7, 8], [0]], id="marked"),
    pytest.param({"window": 4, "global_tokens": 2, "max_global": 3}, [[1, 11], []], id="both"),
    pytest.param({"window": 1, "global_tokens": 20}, None, id="all"),
]


def marks(rows, length):
    marked = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, row in enumerate(rows):
        marked[b, row] = True
    return marked


@pytest.mark.parametrize(("options", "rows"), GLOBALS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_longformer_by_the_letter(options, rows, causal, masked):
    variant = build("longformer", Heads(4, 2, 4, 3, 10), **options).double()
    length = 12
    q, k, v = tensors(length)
    x = torch.randn(2, length, 10, dtype=torch.float64, requires_grad=True)
    given = None if rows is None else marks(rows, length)
    mask = torch.tensor([[False] * 2 + [True] * 10, [True] * 9 + [False, True, False]]) if masked else None
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    first = [[j for j in range(length) if real[b, j]][: options["global_tokens"]] for b in range(2)]
    chosen = (marks(first, length) if given is None else marks(first, length) | given) & real
    assert chosen.any()

    local = torch.zeros(2, 1, length, length, dtype=torch.bool)
    for b in range(2):
        for i in range(length):
            for j in range(length):
                near = abs(i - j) < options["window"]
                local[b, 0, i, j] = (near or chosen[b, j]) and real[b, j] and (j <= i or not causal)
    every = dense(lambda i, j: True, length, length, causal) & real[:, None, None, :]
    wide = [x @ one.weight.T + one.bias for one in (variant.query, variant.key, variant.value)]
    wide = [y.unflatten(-1, (heads, -1)).transpose(1, 2) for y, heads in zip(wide, (4, 2, 2))]
    near, far = by_mask(q, k, v, local), by_mask(*wide, every)
    row = chosen[:, None, :]
    want = torch.where(row[..., None], far[0], near[0]), torch.where(row, far[1], near[1])
    got = variant(q, k, v, causal=causal, key_mask=mask, inputs=Inputs(x, None, given))
    agree(got, want, (q, k, v, x, *variant.parameters()))


def test_gradient_reaches_the_global_projections_and_only_from_global_rows():
    variant = build("longformer", Heads(2, 2, 4, 4, 8), window=2, global_tokens=0, max_global=3)
    q, k, v = (x.detach().float() for x in tensors(9, heads=2, values=4))
    x = torch.randn(2, 9, 8)
    out = variant(q, k, v, inputs=Inputs(x, None, marks([[4], [2, 6]], 9))).out
    for at, reached in ((4, True), (3, False)):
        grads = torch.autograd.grad(out[0, :, at].square().sum(), [*variant.parameters()], retain_graph=True)
        assert all(
            grad.any() == reached for name, grad in zip(dict(variant.named_parameters()), grads) if "bias" not in name
        )


def test_global_tokens_in_packs_in_padding_and_beyond_their_room():
    torch.manual_seed(3)
    layer = Attention(16, 4, "longformer", num_kv_heads=2, positions="rope", window=3, max_global=2).double()
    x, marked = torch.randn(1, 20, 16, dtype=torch.float64), marks([[0, 5, 11, 19]], 20)
    offsets = torch.tensor([0, 8, 20])
    want = [layer(x[:, a:b], global_mask=marked[:, a:b]) for a, b in ((0, 8), (8, 20))]
    torch.testing.assert_close(layer(x, cu_seqlens=offsets, global_mask=marked), torch.cat(want, 1))
    padded = torch.cat((torch.full_like(x[:, :3], torch.nan), x[:, :8], torch.full_like(x[:, :4], torch.nan)), 1)
    mask = marks([list(range(3, 11))], 15)
    got = layer(padded, key_mask=mask, global_mask=torch.nn.functional.pad(marked[:, :8], (3, 4), value=True))
    torch.testing.assert_close(got[:, 3:11], want[0])
    assert not torch.allclose(want[0], layer(x[:, :8]))
    with pytest.raises(ValueError, match="more than 2 global tokens in a sequence; raise max_global"):
        layer(x, global_mask=marked)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[:, :8], global_mask=marked[:, :8]), want[0])
    with pytest.raises(RuntimeError, match="more than 2 global tokens"):
        compiled(x[:, :20], global_mask=marked)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("near", [0, 1, 2])
def test_bigbirds_plan_draws_different_blocks_from_those_left(causal, near):
    drawn = set()
    for blocks in (9, 12, 40):
        table = plan(3, blocks, near, 3, 5, causal)
        for head in range(3):
            for a in range(1, blocks - 1):
                read = [block for block in table[head, a].tolist() if block >= 0]
                assert len(read) == len(set(read))
                always = {0} | set(range(max(0, a - near), a + 1 if causal else min(blocks, a + near + 1)))
                always |= set() if causal else {blocks - 1}
                others = set(range(1, a - near)) | (set() if causal else set(range(a + near + 1, blocks - 1)))
                assert always <= set(read)
                assert set(read) - always <= others
                assert len(set(read) - always) == min(3, len(others))
        drawn.add(tuple(table[:, -2, :3].flatten().tolist()))
        assert not torch.equal(table[0], table[1])
        assert not torch.equal(table, plan(3, blocks, near, 3, 6, causal))
        assert torch.equal(table, plan(3, blocks, near, 3, 5, causal))
    assert len(drawn) == 3


def test_bigbirds_random_blocks_are_drawn_evenly():
    table = plan(2000, 24, 1, 3, 0, False)
    counts = torch.bincount(table[:, 10, :3].flatten(), minlength=24)
    others = [*range(1, 9), *range(12, 23)]
    expected = 2000 * 3 / len(others)  # 316; a standard deviation is 16
    assert counts.sum() == counts[others].sum() == 6000
    assert (counts[others] - expected).abs().max() < 4.5 * 16


def sees_blocks(block, blocks, table):
    """What one head sees: the ends, everything from the ends, and the table; all of a short sequence."""
    ends = (0, blocks - 1)
    return lambda i, j: blocks < 9 or i // block in ends or j // block in ends or j // block in table[i // block]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("budget", [1 << 18, 300])
def test_bigbird_by_the_letter(causal, masked, budget, monkeypatch):
    monkeypatch.setattr(tables, "block_elements", lambda device: budget)
    options = {"block": 3, "window": 3, "random": 2, "seed": 7}
    variant = build("bigbird", Heads(4, 2, 4, 3), **options)
    for length in (1, 24, 25, 32):  # 9 blocks and more are sparse
        blocks = -(-length // 3)
        q, k, v = tensors(length)
        table = plan(4, blocks, 1, 2, 7, causal).tolist()

        mask = torch.rand(2, length) > 0.4 if masked else torch.ones(2, length, dtype=torch.bool)
        mask[:, 0] = True
        allowed = torch.stack([dense(sees_blocks(3, blocks, one), length, length, causal) for one in table])
        seen = allowed & mask[:, None, None, :]
        got = variant(q, k, v, causal=causal, key_mask=mask if masked else None)
        agree(got, by_mask(q, k, v, seen), (q, k, v))
        pairs = int(allowed.sum())
        assert variant.cost(2, length, causal=causal).flops == 2 * 2 * pairs * (4 + 3)
    short = build("softmax", Heads(4, 2, 4, 3))(*(x[:, :, :24] for x in (q, k, v)), causal=causal).out
    torch.testing.assert_close(variant(*(x[:, :, :24] for x in (q, k, v)), causal=causal).out, short)


def test_bigbird_draws_the_same_in_every_build_and_mode():
    q, k, v = (x.detach() for x in tensors(60))
    options = {"block": 4, "random": 2}
    first = build("bigbird", Heads(4, 2, 4, 3), **options).train()
    torch.manual_seed(99)
    second = build("bigbird", Heads(4, 2, 4, 3), **options).eval()
    assert torch.equal(first(q, k, v).out, second(q, k, v).out)
    other = build("bigbird", Heads(4, 2, 4, 3), seed=1, **options)
    assert not torch.allclose(first(q, k, v).out, other(q, k, v).out)


def test_bad_options_name_what_is_valid():
    heads = Heads(4, 2, 4, 3, 16)
    for name, options, text in [
        ("dilated", {"window": 0}, r"window must be a whole number of at least 1"),
        ("dilated", {"dilation": 0}, r"dilation must be a whole number of at least 1 \(1 = a plain window\), got 0"),
        ("strided", {"stride": 1.5}, r"stride must be a whole number \(default 128\), got 1.5"),
        ("fixed", {"stride": 4, "summary": 5}, r"summary must be from 1 to the stride 4, got 5"),
        ("bigbird", {"window": 4}, "window counts blocks around the own one and must be odd, got 4"),
        ("bigbird", {"block": 0}, "block must be a whole number of at least 1, got 0"),
        ("bigbird", {"random": -1}, "random must be a whole number of at least 0, got -1"),
        ("longformer", {"window": True}, r"window must be a whole number \(default 64\), got True"),
        ("longformer", {"global_tokens": -1}, r"global_tokens must be a whole number of at least 0, got -1"),
        ("fixed", {"stride": 4, "summary": 0}, r"summary must be a whole number of at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            build(name, heads, **options)
    with pytest.raises(ValueError, match="'longformer' reads the layer's input"):
        build("longformer", Heads(4, 2, 4, 3))
    q, k, v = tensors(5, 7)
    with pytest.raises(ValueError, match=r"longformer needs the layer's input .* got x None, L=5, M=7"):
        build("longformer", heads)(q, k, v)
    with pytest.raises(ValueError, match=r"needs as many queries as keys .*got L=5, M=7"):
        build("dilated", heads)(q, k, v)
    with pytest.raises(ValueError, match=r"strided attention needs L = M, got L=5, M=7"):
        build("strided", heads)(q, k, v)
    with pytest.raises(ValueError, match=r"fixed attention needs L <= M, got L=7, M=5"):
        build("fixed", heads)(*tensors(7, 5), causal=True)
    with pytest.raises(ValueError, match=r"bigbird needs as many queries as keys, got L=5, M=7"):
        build("bigbird", heads)(q, k, v)


def test_opcheck():
    def leaves():
        return [torch.randn(1, heads, 11, 4, requires_grad=True) for heads in (4, 2, 2)]

    mask, slopes = torch.rand(1, 11) > 0.3, torch.ones(4)
    calls = [
        (pattern_forward, (*leaves(), mask, slopes, "dilated", 2, 3, True, 0.5)),
        (pattern_forward, (*leaves(), mask, None, "strided", 0, 3, False, 0.5)),
        (pattern_forward, (*leaves(), None, None, "fixed", 2, 3, True, 0.5)),
        (table_forward, (*leaves(), mask, 1, 1, 2, 0, True, 0.5)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(
            op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )
