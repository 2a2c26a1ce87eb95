"""flex-attention under the patterns: what torch's unfused form computes on a CPU, and the blocks that a GPU reads.

The unfused form asks the pattern pair by pair and never looks at the blocks; those are compared with the dense mask.
"""

import pytest
import torch
from torch.nn.attention import flex_attention as torchs

from core.attention import Attention, backends, flex, sliding_window_attention
from core.attention.contract import Heads, Inputs, visible
from core.attention.registry import build, variant_class
from core.attention.variants.bigbird import listed
from core.attention.variants.dilated import spread
from core.attention.variants.sparse_transformer import shown
from core.attention.variants.window import near

VARIANTS = [
    ("window", {"window": 5}),
    ("dilated", {"window": 3, "dilation": 4}),
    ("strided", {"stride": 6}),
    ("fixed", {"stride": 7, "summary": 2}),
    ("bigbird", {"block": 4, "random": 2}),
    ("longformer", {"window": 4, "global_tokens": 2}),
]
PATTERNS = [
    (near, (40,), 1),
    (near, (1,), 1),
    (spread, (3, 60), 1),
    (shown, ("strided", 100, 0), 1),
    (shown, ("fixed", 130, 9), 1),
    (listed, (16, 1, 2, 0, False, 3), 3),
    (listed, (16, 0, 1, 7, True, 2), 2),
]


@pytest.fixture
def unfused(monkeypatch):
    """Let flex run here: without torch.compile, with gradients, at any width, in float64."""
    monkeypatch.setattr(flex, "_kernel", lambda: torchs.flex_attention)
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torchs, "_validate_device", lambda *_: None)
    for mechanism in (*(name for name, _ in VARIANTS), "window2d"):
        variant_class(mechanism)  # its file enters its implementations
        row = backends._table[mechanism]
        monkeypatch.setitem(row, "flex", row["flex"]._replace(devices=None, dtypes=None, widths=None))


def results(variant, backend, tensors, **given):
    """Output, mass and gradients through both."""
    out, mass = variant(*tensors, backend=backend, return_mass=True, **given)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    loss = (out * weights).sum() + (torch.where(mass == -torch.inf, 0.0, mass) * weights[..., 0]).sum()
    return out, mass, *torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_equals_the_definition_with_gradients(name, options, causal, unfused):
    variant = build(name, Heads(4, 2, 4, 3, 8), **options).double()
    for length, keys, masked in [(1, 1, False), (47, 47, False), (61, 61, True), (3, 14, True)]:
        if keys != length and (not causal or "recurrent" not in variant.can):
            continue
        sizes = (4, length, 4), (2, keys, 4), (2, keys, 3)
        tensors = [torch.randn(2, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
        given = {"causal": causal, "inputs": Inputs(torch.randn(2, length, 8, dtype=torch.float64))}
        if masked:
            given["key_mask"] = torch.rand(2, keys) > 0.4
            given["key_mask"][:, :4] = False  # causal, the first queries see nothing
            given["key_mask"][1, :] = False
        if "alibi" in variant.positions:
            given["slopes"] = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)
        want, got = (results(variant, backend, tensors, **given) for backend in ("reference", "flex"))
        assert not masked or (want[1] == -torch.inf).any()
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a.to(b.dtype))


@pytest.mark.parametrize("grid", [(5, 7), (1, 40), (6, 6)])
def test_an_image_equals_its_definition_with_gradients(grid, unfused):
    variant, first = build("window2d", Heads(4, 2, 4, 3), window=3).double(), 3
    length = first + grid[0] * grid[1]
    sizes = (4, length, 4), (2, length, 4), (2, length, 3)
    tensors = [torch.randn(2, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    given = {"key_mask": torch.rand(2, length) > 0.4, "inputs": Inputs(None, grid)}
    given["key_mask"][1, :] = False
    want, got = (results(variant, backend, tensors, **given) for backend in ("reference", "flex"))
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a.to(b.dtype))


@pytest.mark.parametrize(("pattern", "numbers", "heads"), PATTERNS)
@pytest.mark.parametrize("budget", [1 << 18, 1])
def test_blocks_are_those_that_the_dense_mask_shows(pattern, numbers, heads, budget, monkeypatch):
    monkeypatch.setattr(flex, "block_elements", lambda device: budget)  # 1: a strip for every row of blocks
    flex.block_mask.cache_clear()
    device = torch.device("cpu")
    for queries, keys, causal in [(700, 700, False), (700, 700, True), (1, 129, True), (130, 515, True)]:
        whole = numbers
        if pattern is listed:
            if queries != keys or causal != numbers[4]:
                continue
            whole = *numbers, queries, device
        mask = flex.block_mask(pattern, whole, heads, queries, keys, causal, device)
        dense = visible(queries, keys, causal=causal, sees=pattern(*whole), heads=heads).expand(heads, -1, -1)
        assert torch.equal(torchs.create_mask(mask.mask_mod, 1, heads, queries, keys, "cpu")[0], dense)
        padded = torch.nn.functional.pad(dense, (0, -keys % 128, 0, -queries % 128))
        tiles = padded.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
        some, full = tiles.any(4).any(2), tiles.all(4).all(2)
        kinds = (
            (mask.kv_num_blocks, mask.kv_indices, some & ~full),
            (mask.full_kv_num_blocks, mask.full_kv_indices, full),
        )
        for number, index, want in kinds:
            listed_blocks = torch.zeros_like(want)
            for head, row in torch.cartesian_prod(torch.arange(heads), torch.arange(want.shape[1])).tolist():
                listed_blocks[head, row, index[0, head, row, : number[0, head, row]].long()] = True
            assert torch.equal(listed_blocks, want)


def test_a_block_mask_is_built_once_for_a_shape_and_serves_training_after_validation(unfused):
    flex.block_mask.cache_clear()
    layer = Attention(16, 4, "dilated", causal=True, window=3, backend="flex")
    x, mask = torch.randn(2, 30, 16), torch.ones(2, 30, dtype=torch.bool)
    with torch.inference_mode():
        want = layer(x)
    for key_mask in (None, mask, mask):
        torch.testing.assert_close(layer(x, key_mask=key_mask), want.clone())
    layer(x).sum().backward()
    assert flex.block_mask.cache_info().misses == 1
    layer(x[:, :29])
    assert flex.block_mask.cache_info().misses == 2


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_layer_with_rotary_positions_packs_and_decoding(name, options, unfused):
    torch.manual_seed(0)
    given = {"num_kv_heads": 2, "positions": "rope", "causal": True, **options}
    layer = Attention(16, 4, name, backend="flex", **given).double()
    slow = Attention(16, 4, name, backend="reference", **given).double()
    slow.load_state_dict(layer.state_dict())
    x = torch.randn(1, 80, 16, dtype=torch.float64)
    offsets = torch.tensor([0, 7, 40, 80])
    torch.testing.assert_close(layer(x, cu_seqlens=offsets), slow(x, cu_seqlens=offsets))
    if "recurrent" in layer.variant.can:
        _, state = layer.prefill(x[:, :77], layer.init_state(1))
        y, _ = layer.step(x[:, 77], state)
        torch.testing.assert_close(y, slow(x[:, :78])[:, -1])


def test_is_only_taken_where_asked_for_and_says_what_it_cannot():
    q = torch.randn(1, 2, 6, 16)
    assert backends.resolve("window", "auto", "cuda", torch.bfloat16, (), (64, 64)).name == "torch"
    assert backends.resolve("window", "flex", "cuda", torch.bfloat16, (), (64, 64)).name == "flex"
    with pytest.raises(ValueError, match="'flex' of window attention does not serve device cpu; reference, torch"):
        sliding_window_attention(q, q, q, window=2, backend="flex")
    with pytest.raises(ValueError, match=r"does not serve heads 8 wide \(it takes 16 to 256\)"):
        backends.resolve("bigbird", "flex", "cuda", torch.bfloat16, (), (64, 8))
    with pytest.raises(ValueError, match="does not serve float64"):
        backends.resolve("strided", "flex", "cuda", torch.float64, (), (64, 64))


def test_says_why_it_stands_in_no_full_graph(unfused):
    layer = Attention(16, 4, "window", window=3, backend="flex")
    with pytest.raises(Exception, match="flex-attention compiles itself"):
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(1, 9, 16))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), VARIANTS[:5])
def test_compiled_for_a_cpu_reads_only_the_listed_blocks(name, options, unfused, monkeypatch):
    """torch compiles the forward, without the mass, for a CPU too (2.15); other lengths there only one by one."""
    compiled = torch.compile(torchs.flex_attention, fullgraph=True, dynamic=False)

    def kernel(*tensors, return_aux, **given):
        return compiled(*tensors, **given), torchs.AuxOutput(lse=torch.zeros(tensors[0].shape[:3]))

    monkeypatch.setattr(flex, "_kernel", lambda: kernel)
    variant = build(name, Heads(4, 2, 16, 32), **options)
    for length in (1, 300):
        q, k, v = (torch.randn(2, heads, length, width) for heads, width in ((4, 16), (2, 16), (2, 32)))
        given = {"causal": True, "key_mask": torch.rand(2, length) > 0.3}
        want = variant(q, k, v, backend="reference", **given).out
        torch.testing.assert_close(variant(q, k, v, backend="flex", **given).out, want)
