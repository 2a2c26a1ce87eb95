"""Packs that kernels read by their offsets: every sequence as it is alone, values and gradients, and nothing else."""

import pytest
import torch

from core.attention import Attention
from core.attention.blocked import linear as blocked
from core.attention.blocked import window as blocked_window
from core.attention.blocked.scan import scan
from core.attention.contract import Attended, merge
from core.attention.feature_maps import feature_map as phi_named
from core.attention.kernels import decay, hybrid, linear, packs, window
from core.attention.packing import pack_of
from core.attention.positions import alibi_slopes
from core.attention.variants import linear as linear_variant

LENGTHS = {"odd": (21, 0, 1, 66, 5), "one": (19,), "empty": (0, 5, 0), "tokens": (1, 1, 1)}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def apart(function, tensors, lengths, key_lengths):
    """Outputs of `function`, called with every sequence alone, and laid end to end; tensors [1, H, T, D]."""
    cut = [x.split(list(key_lengths if n else lengths), 2) for n, x in enumerate(tensors)]
    return tuple(torch.cat(parts, 2) for parts in zip(*(function(*one) for one in zip(*cut))))


def test_the_table_cuts_every_sequence_and_no_two_at_once(device):
    for lengths, size in (((37, 0, 1, 70, 12), 16), ((0, 0), 16), ((5, 3), 16), (tuple(range(140)), 48)):
        total = sum(lengths)
        x = torch.zeros(1, 1, total, 1, device=device)
        pack = pack_of(x, x, offsets(lengths))
        made = packs.layout(pack, "past", total, pack.longest, size, -2)
        found = [tuple(x) for x in made.table.tolist()]
        want, before = [], [0]
        for n, length in enumerate(lengths):
            steps, first = max(0, length - 2), sum(lengths[:n])
            pieces = range(max(1, -(-steps // size)))
            want += [(n, p * size, first, length, first, length, steps, 2, 0) for p in pieces]
            before.append(len(want))
        assert made.slots.tolist() == before
        assert found == want + [(0,) * 9] * (made.number - len(want))


SWEEPS = {
    "past": ("elu", "past", 0, False),
    "delayed": ("relu", "past", -7, False),
    "future": ("elu", "future", 5, True),
    "both": ("relu", "both", 0, False),
}
"""Feature map, direction, offset, whether weights decay."""


def run_linear(name, lengths, compare, device, dtype=torch.float32):
    (phi, direction, offset, decays), lengths = SWEEPS[name], LENGTHS[lengths]
    key_lengths = (20, 5, 0, 17, 66)[: len(lengths)] if direction == "both" else lengths
    kept = 2 if decays else 1
    sizes = zip((2, kept, kept), (lengths, key_lengths, key_lengths), (6, 6, 5 if direction == "past" else 20))
    q, k, v = (torch.randn(1, h, sum(n), width) for h, n, width in sizes)
    decay = torch.linspace(0.05, 0.7, 2) if decays else None
    pack = pack_of(q, k, offsets(lengths), offsets(key_lengths) if direction == "both" else None)

    def alone(*x):
        return blocked.linear_forward(*x, None, decay, None, None, phi, direction, offset, True)[:2]

    def whole(q, k, v):
        rate = None if decay is None else decay.to(device)
        given = (q, k, v, None, rate, None, None, phi, direction, offset, True, None)
        return linear.linear_forward(*given, pack.offsets.to(device), pack.keys.to(device), pack.longest)[:2]

    compare(whole, lambda *x: apart(alone, x, lengths, key_lengths), [q, k, v], dtype, device)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "future")) for n in SWEEPS])
def test_linear(name, compare, device):
    run_linear(name, "odd", compare, device)


@pytest.mark.parametrize("lengths", ["one", "empty", pytest.param("tokens", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["past", "both"])
def test_linear_at_the_edges(name, lengths, compare, device):
    run_linear(name, lengths, compare, device)


def run_window(lengths, causal, compare, device, dtype=torch.float32):
    lengths = LENGTHS[lengths]
    q, k, v = (torch.randn(1, h, sum(lengths), width) for h, width in ((2, 6), (1, 6), (1, 5)))
    slopes, pack = alibi_slopes(2), pack_of(q, k, offsets(lengths))

    def alone(*x):
        return blocked_window.window_forward(*x, None, slopes, 9, causal, 0.7)

    def whole(*x):
        packed = pack.offsets.to(device), pack.longest
        return window.window_forward(*x, None, slopes.to(device), 9, causal, 0.7, *packed)

    compare(whole, lambda *x: apart(alone, x, lengths, lengths), [q, k, v], dtype, device)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_window(lengths, compare, device):
    run_window(lengths, lengths != "odd", compare, device)


@pytest.mark.parametrize("lengths", ["odd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("one", "empty"))])
def test_decay(lengths, compare, device):
    lengths = LENGTHS[lengths]
    q, k, v = (torch.randn(1, h, sum(lengths), width) for h, width in ((2, 6), (1, 6), (1, 5)))
    gates, pack = torch.rand(1, 1, sum(lengths), 1), pack_of(q, k, offsets(lengths))

    def alone(q, k, v, g):
        return (scan("decay", q, k, v, -g[..., 0])[0],)

    def whole(q, k, v, g):
        packed = pack._replace(offsets=pack.offsets.to(device), keys=pack.keys.to(device))
        return (decay.scan(q, k, v, -g[..., 0].float(), pack=packed)[0],)

    compare(whole, lambda *x: apart(alone, x, lengths, lengths), [q, k, v, gates], torch.float32, device)


HYBRIDS = {
    "causal": (True, "elu", 9, False),
    "two-sided": (False, "elu", 5, False),
    "rotary": (True, "elu", 9, True),
    "taylor": (False, "taylor", 9, False),
}
"""Causal, feature map, window, whether features are turned."""


def run_hybrid(name, lengths, compare, device):
    (causal, phi, near, turned), lengths = HYBRIDS[name], LENGTHS[lengths]
    total, one = sum(lengths), phi_named(phi)
    q, k, v, gate = (torch.randn(1, h, total, n) for h, n in ((2, 4), (1, 4), (1, 5), (2, 1)))
    pack = pack_of(q, k, offsets(lengths))

    def alone(q, k, v, gate):
        turn = (lambda x: x * 1.5,) * 2 if turned else None
        tail = [linear_variant.sums(q, k, v, one, "past", -near, rotary=turn, backend="torch")[0]]
        if not causal:
            tail.append(linear_variant.sums(q, k, v, one, "future", near, backend="torch")[0])
        out, mass = blocked_window.window_forward(q, k, v, None, None, near, causal, 0.7)
        return merge(Attended(out, mass), *(linear_variant.raised(x, gate[..., 0]) for x in tail))

    def whole(q, k, v, gate):
        x = [1.5 * one.features(x.float()).to(q.dtype) for x in (q, k)] if turned else [None, None]
        tails = [q, k] if turned else [None, None]
        packed = pack.offsets.to(device), pack.longest
        given = q, k, v, *tails, *x, None, gate[..., 0].float(), None, phi, near, causal, 0.7, False, *packed
        return hybrid.hybrid_forward(*given)[:2]

    compare(whole, lambda *x: apart(alone, x, lengths, lengths), [q, k, v, gate], torch.float32, device)


@pytest.mark.parametrize("name", [n if n == "two-sided" else pytest.param(n, marks=pytest.mark.slow) for n in HYBRIDS])
def test_hybrid(name, compare, device):
    run_hybrid(name, "odd", compare, device)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [name for name in LENGTHS if name != "odd"])
def test_hybrid_at_the_edges(lengths, compare, device):
    run_hybrid("causal", lengths, compare, device)


def test_halves(compare, device):
    run_linear("past", "one", compare, device, torch.float16)
    run_window("odd", True, compare, device, torch.float16)


def layers(variant, device, **options):
    torch.manual_seed(0)
    made = Attention(8, 2, variant, num_kv_heads=1, **options).to(device)
    return made, torch.randn(1, 40, 8, device=device)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("linear", {"causal": True, "positions": "rope"}),
        pytest.param("linear", {"positions": "alibi", "feature_map": "focused"}, marks=pytest.mark.slow),
        pytest.param("window", {"window": 3, "positions": "rope"}, marks=pytest.mark.slow),
        ("retnet", {"causal": False}),
        ("hybrid", {"causal": True, "window": 5, "positions": "rope"}),
        pytest.param("hybrid", {"causal": True, "window": 5, "positions": "alibi"}, marks=pytest.mark.slow),
    ],
)
def test_a_layer_gives_the_whole_pack_to_kernels_and_hides_the_neighbours(variant, options, device, monkeypatch):
    layer, x = layers(variant, device, backend="triton", **options)
    x, ends = x.requires_grad_(), torch.tensor([0, 17, 17, 18, 40])
    alone = [layer(part) for part in (x[:, :17], x[:, 17:18], x[:, 18:])]
    monkeypatch.setattr("core.attention.layer.attend_packed", None)
    torch.testing.assert_close(layer(x, cu_seqlens=ends), torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
    holed = x.detach().clone()
    holed[:, 18:] = torch.nan
    holed, results = holed.requires_grad_(), []
    for y, given in ((layer(holed, cu_seqlens=ends)[:, :18], holed), (torch.cat(alone[:2], 1), x)):
        (slope,) = torch.autograd.grad(y.square().sum(), given)
        results.append((y, slope[:, :18]))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["linear", "window", "hybrid", "retnet"])
def test_a_layer_of_packs_compiles_into_one_graph(variant, device):
    layer, x = layers(variant, device, backend="triton", causal=True)
    whole = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for ends in ((0, 17, 40), (0, 3, 20)):
        part, ends = x[:, : ends[-1]], torch.tensor(ends, device=device)
        pairs = [
            (y, *torch.autograd.grad(y.square().sum(), list(layer.parameters())))
            for y in (whole(part, cu_seqlens=ends), layer(part, cu_seqlens=ends))
        ]
        for got, want in zip(*pairs):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_offsets_that_are_wrong_are_named(device):
    layer, x = layers("linear", device, backend="triton")
    for ends, said in (((0, 7), "must rise from 0 to 40"), ((0, 9, 5, 40), "must rise"), ((1, 40), "must rise")):
        with pytest.raises(ValueError, match=said):
            layer(x, cu_seqlens=torch.tensor(ends))
    with pytest.raises(ValueError, match="a pack has batch 1"):
        layer(x.expand(2, -1, -1), cu_seqlens=torch.tensor([0, 40]))


def operators(device):
    """name -> (operator, arguments) of a pack of three sequences."""
    q, k, v, gate = (torch.randn(1, h, 9, n, device=device) for h, n in ((2, 4), (1, 4), (1, 3), (2, 1)))
    ends, factor = torch.tensor([0, 4, 4, 9], device=device), torch.rand(1, 4, device=device)
    for x in (q, k, v, gate, factor):
        x.requires_grad_()
    g = -torch.rand(1, 1, 9, device=device)
    options = None, None, None, None, "focused", "both", 0, True, factor, ends, ends, 5
    return {
        "linear": (linear.linear_forward, (q, k, v, *options)),
        "window": (window.window_forward, (q, k, v, None, None, 3, True, 0.5, ends, 5)),
        "decay": (decay.decay_forward, (q, k, v, g.requires_grad_(), None, ends, 5)),
        "hybrid": (
            hybrid.hybrid_forward,
            (q, k, v, *[None] * 5, gate[..., 0], None, "elu", 3, True, 0.5, False, ends, 5),
        ),
    }


OTHERS = ("window", "decay", "hybrid")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
@pytest.mark.parametrize("name", ["linear", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_operators_are_what_they_say(name, device):
    torch.library.opcheck(*operators(device)[name])
