"""A decoding step is one launch that equals its parts run apart, token by token: rings, and turned features."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.attention import Attention
from core.attention.backends import resolve
from core.attention.contract import Heads
from core.attention.kernels import ring_step, step
from core.attention.positions import Rotation, alibi_slopes
from core.attention.registry import build, variant_class

STEPS = 2


def tokens(length, heads, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads.query, heads.width), (heads.key, heads.width), (heads.key, heads.value_width)
    return [torch.randn(2, n, length, d, generator=generator).to(device) for n, d in sizes]


def decoded(variant, parts, mask, backend, dtype, start=None, slopes=None, before=6):
    """Outputs, masses and states: `before` tokens by torch, then single ones by `backend`."""
    variant = variant.to(dtype)
    positions = None if slopes is None else "alibi"
    state, results = variant.init_state(2, positions=positions, device=parts[0].device, dtype=dtype), []
    for t, after in [(0, before), *((t, t + 1) for t in range(before, before + STEPS))]:
        rotary = None
        if start is not None:
            at = (start.to(parts[0].device) + torch.arange(t, after, device=parts[0].device))[:, -(after - t) :]
            rotary = Rotation(at), Rotation(at)
        own = [x[:, :, t:after].to(dtype) for x in parts]
        seen = None if mask is None else mask[:, t:after]
        attended, state = variant.resume(
            *own, state, key_mask=seen, rotary=rotary, slopes=slopes, backend=backend if t else "torch"
        )
        results.append({"out": attended.out, "mass": attended.log_mass, **state})
    return results[1:]


def agree(got, want, **limit):
    for one, other in zip(got, want):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype or other[name].dtype == torch.float64, name
            torch.testing.assert_close(
                one[name].double(), other[name].double(), **limit, msg=lambda text, name=name: f"{name}: {text}"
            )


def holed(device):
    """Masks in which keys that leave, stay and come are hidden, and a sequence that sees nothing for long."""
    mask = torch.rand(2, 6 + STEPS, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[1, :7] = False
    return mask.to(device)


CASES = {
    "elu": {"feature_map": "elu"},
    "relu, masked": {"feature_map": "relu", "masked": True},
    "elu, rotary, masked": {"feature_map": "elu", "positions": "rope", "masked": True},
    "taylor, rotary": {"feature_map": "taylor", "positions": "rope", "feature_dim": 4},
    "elu, alibi, masked": {"feature_map": "elu", "positions": "alibi", "masked": True},
    "one key near": {"feature_map": "elu", "window": 1, "positions": "rope"},
    "window": {"name": "window", "masked": True},
    "window, alibi": {"name": "window", "positions": "alibi"},
    "window of one": {"name": "window", "window": 1},
    "linear, rotary, masked": {"name": "linear", "feature_map": "relu", "positions": "rope", "masked": True},
}
MORE = {
    "hedgehog, rotary": {"feature_map": "hedgehog", "positions": "rope"},
    "relu, rotary": {"feature_map": "relu", "positions": "rope"},
    "linear hedgehog, rotary": {"name": "linear", "feature_map": "hedgehog", "positions": "rope"},
    "linear dpfp, rotary": {"name": "linear", "feature_map": "dpfp", "positions": "rope"},
    "favor": {"feature_map": "favor", "features": 8},
    "dpfp": {"feature_map": "dpfp"},
    "one key head": {"feature_map": "elu", "heads": Heads(6, 1, 5, 3), "masked": True},
    "wide": {"feature_map": "elu", "heads": Heads(2, 2, 256, 160), "positions": "rope"},
    "wide taylor": {"feature_map": "taylor", "heads": Heads(2, 1, 16, 48), "window": 40},
    "window, rotary": {"name": "window", "positions": "rope", "window": 40, "heads": Heads(6, 1, 6, 37)},
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_step_equals_its_parts(case, device, launched):
    options = {"name": "hybrid", "window": 3, "heads": Heads(4, 2, 6, 37), **(CASES | MORE)[case]}
    masked, positions, heads = options.pop("masked", False), options.pop("positions", None), options.pop("heads")
    name = options.pop("name")
    if name == "linear":
        options.pop("window")
    variant = build(name, heads, **options).to(device).requires_grad_(False)
    for gate in variant.parameters(recurse=False):
        gate += torch.linspace(-1, 1, heads.query, device=device)
    given = {"mask": holed(device) if masked else None}
    given["start"] = torch.tensor([[0], [5]]) if positions == "rope" else None
    given["slopes"] = alibi_slopes(heads.query).to(device) if positions == "alibi" else None
    parts = tokens(6 + STEPS, heads, device)
    got = decoded(variant, parts, backend="triton", dtype=torch.float32, **given)
    assert launched == ["_step" if name == "linear" else "_ring_step"] * STEPS
    agree(got, decoded(variant, parts, backend="torch", dtype=torch.float64, **given), rtol=2e-5, atol=2e-5)


def test_halves_step_as_their_exact_numbers(device):
    heads = Heads(4, 2, 16, 8)
    variant = build("hybrid", heads, window=3).to(device).requires_grad_(False)
    parts = [x.half() for x in tokens(6 + STEPS, heads, device)]
    given = {"mask": None, "start": torch.tensor([[0], [5]])}
    got = decoded(variant, parts, backend="triton", dtype=torch.float16, **given)
    agree(got, decoded(variant, parts, backend="torch", dtype=torch.float16, **given), rtol=2e-2, atol=2e-2)


def test_far_positions_turn_as_rotations_do(device):
    """At position 50,000 an angle in float32 is known to 0.004, and one wrong bit of a frequency would double that."""
    heads = Heads(1, 1, 16, 8)
    variant = build("hybrid", heads, window=2).to(device).requires_grad_(False)
    given = {"mask": None, "start": torch.tensor([[50_000]]), "dtype": torch.float32}
    parts = tokens(6 + STEPS, heads, device)
    got, want = (decoded(variant, parts, backend=backend, **given) for backend in ("triton", "torch"))
    agree(got, want, rtol=1e-2, atol=1e-2)


def test_what_asks_for_a_gradient_does_not_step(device, launched):
    """Of the gate, the ring, the sums or the query: by the kernels that have one, with the gradient of torch's."""
    heads = Heads(2, 1, 4, 3)
    variant = build("hybrid", heads, window=2).to(device)
    q, k, v = (x[:, :, :1] for x in tokens(1, heads, device))
    shapes = {name: x.shape for name, x in variant.init_state(2).items() if x.is_floating_point()}
    slopes = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        state = {
            name: torch.rand(shape, device=device, requires_grad=name != "count") for name, shape in shapes.items()
        }
        state["mask"] = torch.ones(2, 2, dtype=torch.bool, device=device)
        attended, new = variant.resume(q, k, v, state, backend=backend)
        loss = attended.out.square().sum() + new["sum"].square().sum()
        slopes.append(torch.autograd.grad(loss, (variant.gate, state["keys"], state["values"], state["sum"])))
    assert "_ring_step" not in launched
    for got, want in zip(*slopes):
        torch.testing.assert_close(got, want)
    variant.requires_grad_(False)
    fixed = {name: x.detach() for name, x in state.items()}
    for name in ("keys", "values", "sum"):
        some = {**fixed, name: state[name]}
        assert variant.resume(q, k, v, some, backend="triton")[0].out.requires_grad
    assert variant.resume(q.requires_grad_(), k, v, fixed, backend="triton")[0].out.requires_grad
    assert "_ring_step" not in launched
    with torch.no_grad():
        variant.resume(q, k, v, state, backend="triton")
    assert launched[-1] == "_ring_step"


def test_the_old_state_stays_as_it_was(device):
    heads = Heads(2, 1, 4, 3)
    variant = build("hybrid", heads, window=2).to(device).requires_grad_(False)
    parts = tokens(5, heads, device)
    _, state = variant.resume(*(x[:, :, :4] for x in parts), variant.init_state(2, device=device), backend="torch")
    before = {name: x.clone() for name, x in state.items()}
    _, after = variant.resume(*(x[:, :, 4:] for x in parts), state, backend="triton")
    assert all(torch.equal(x, before[name]) for name, x in state.items())
    assert not {x.data_ptr() for x in state.values()} & {x.data_ptr() for x in after.values()}


def test_a_layer_decodes_in_one_graph(device):
    """Traced whole, whatever the position; sequences of a batch stand at their own."""
    layer = Attention(8, 2, "hybrid", num_kv_heads=1, causal=True, positions="rope", window=2, backend="triton").to(
        device
    )
    torch.compiler.reset()
    one = torch.compile(lambda x, state: layer.step(x, state), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 8, device=device)
    with torch.no_grad():
        _, state = layer.prefill(x[:, :4], layer.init_state(2))
        for t in (4, 5):
            got, _ = one(x[:, t], state)
            want, state = layer.step(x[:, t], state)
            torch.testing.assert_close(got, want)


class Launches(TorchDispatchMode):
    """Adds to the kernels that are launched torch's own operators, but for those that run nothing on a device."""

    FREE = (
        "aten::empty",
        "aten::empty_like",
        "aten::detach",
        "aten::promote_types",
        "aten::fill_",
    )  # fill_: the poison

    def __init__(self, launched):
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("longspan::"):
            with self:
                return OPERATORS[name]._init_fn(*args, **(kwargs or {}))
        if not func.is_view and name not in self.FREE:
            self.launched.append(name)
        return func(*args, **(kwargs or {}))


OPERATORS = {x._qualname: x for m in (ring_step, step) for x in vars(m).values() if hasattr(x, "_qualname")}
SCANS = {"decay": 0, "vector_decay": 6, "delta": 0, "vector_delta": 6}


def one_token(kind, device):
    """What decodes a token by the mechanism itself, from the q, k and v that it acts on."""
    heads = Heads(4, 2, 6, 5)
    q, k, v = tokens(1, heads, device)
    if kind in SCANS:
        variant_class("gla")  # importing it enters the implementations
        gates = [-torch.rand(2, 2, 1, *([SCANS[kind]] if SCANS[kind] else []), device=device)]
        gates += [torch.rand(2, 2, 1, device=device)] if "delta" in kind else []
        state, run = torch.zeros(2, 2, 6, 5, device=device), resolve(kind, "triton", device, q.dtype, ("state",)).run
        return lambda: run(kind, q, k, v, *gates, state=state)
    name, turned = kind.split()[0], kind.endswith("rotary")
    variant = build(name, heads, **({} if name == "linear" else {"window": 3})).to(device).requires_grad_(False)
    at, state = Rotation(torch.tensor([9], device=device)), variant.init_state(2, device=device)
    return lambda: variant.resume(q, k, v, state, backend="triton", rotary=(at, at) if turned else None)


@pytest.mark.parametrize("kind", ["hybrid", "hybrid rotary", "window", "linear", "linear rotary", *SCANS])
def test_a_step_is_one_launch(kind, device, launched):
    run = one_token(kind, device)
    with Launches(launched), torch.no_grad():
        run()
    if kind.startswith("linear"):  # the number of keys, [batch], is added by torch
        assert launched.pop() == "aten::add"
    assert launched == ["_ring_step" if kind.split()[0] in ("hybrid", "window") else "_step"]


STATES = ["linear", "window", "hybrid", "retnet", "lightning", "ssd", "gla", "rwkv6", "delta", "gated_delta", "kda"]


@pytest.mark.parametrize("name", [*STATES, "mlstm"])
def test_a_layer_with_a_state_steps_by_one_kernel(name, device, launched):
    layer = Attention(8, 2, name, num_kv_heads=1, causal=True, backend="triton").to(device)
    with torch.no_grad():
        layer.step(torch.randn(2, 8, device=device), layer.init_state(2))
    assert len(launched) == 1
