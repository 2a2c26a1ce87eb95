"""Who is timed: our mechanisms by backend, and the peers that this machine can import, on the same inputs.

A contender is a function of (q, k, v), each [B, H, L, D], to the output [B, H, L, D]; the layout that a library wants
is made inside. `exact` names the mechanism whose float64 reference it must equal; peers that compute something of their
own (fla's decay has no normaliser) are timed and named, not compared.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.packed import NAMES as PACKED
from benchmarks.gpu.packed import by_offsets, by_padding
from core.attention import hybrid_attention, linear_attention, sliding_window_attention
from core.attention.backends import resolve
from core.attention.contract import Heads, Inputs
from core.attention.feature_maps import feature_map
from core.attention.learned_maps import Focused
from core.attention.positions import Rotation, alibi_slopes
from core.attention.registry import build, variant_class
from core.attention.variants import linear
from core.attention.variants.hybrid import merged

WINDOW = 128
SIDE = 8
"""Window on an image grid, whose sides are the two nearest powers of two: 15 x 15 keys per query."""
SPARSE = {
    "dilated": {"window": WINDOW, "dilation": 4},
    "strided": {"stride": WINDOW},
    "fixed": {"stride": WINDOW},
    "bigbird": {},
}
"""Variants with a pattern of keys, and their options."""
QUADRATIC, LOOPING = 65536, 16384
"""Longest sequences for contenders that are quadratic, and that loop over blocks in Python."""


@dataclass(frozen=True)
class Contender:
    """One line of the plot.

    group: what it is compared within.   run: (q, k, v) -> out.   exact: key of `REFERENCES`, or "".
    longest: sequence that it is timed on; a quadratic form or a loop over blocks would take minutes beyond.
    """

    name: str
    group: str
    run: Callable
    exact: str = ""
    longest: int = 1 << 20
    options: dict = field(default_factory=dict)

    def __call__(self, q, k, v):
        return self.run(q, k, v, **self.options)


def _slopes(q):
    return alibi_slopes(q.shape[1]).to(q.device)


def _decayed(q, k, v, backend):
    return linear_attention(q, k, v, causal=True, slopes=_slopes(q), backend=backend)


def _scan(q, k, v, backend):
    variant_class("ssd")  # importing it enters the implementations of "decay"
    g = -_slopes(q)[None, :, None].expand(q.shape[0], -1, q.shape[2])
    return resolve("decay", backend, q.device.type, q.dtype, ()).run("decay", q, k, v, g)[0]


def gates(group: str, q) -> list[torch.Tensor]:
    """Log-gates and writing strengths of a recurrence: a rate per head, spread over the features of a vector gate."""
    g = -_slopes(q)[None, :, None].expand(q.shape[0], -1, q.shape[2])
    if group == "vector decay":
        return [(g.unsqueeze(-1) * torch.linspace(0.2, 1.8, q.shape[3], device=q.device)).contiguous()]
    return [g.contiguous() if group == "gated delta" else torch.zeros_like(g), torch.full_like(g, 0.5)]


def recurrence(q, k, v, group: str, backend: str, state=None):
    """(out, state) of the groups vector decay, delta and gated delta; keys have length 1 where they are taken off."""
    variant_class("gla")  # importing it enters the implementations
    kind = "vector_decay" if group == "vector decay" else "delta"
    k = k if kind == "vector_decay" else F.normalize(k, dim=-1)
    needs = () if state is None else ("state",)
    run = resolve(kind, backend, q.device.type, q.dtype, needs).run
    return run(kind, q, k, v, *gates(group, q), state=state)


def _recurrence(q, k, v, group, backend):
    return recurrence(q, k, v, group, backend)[0]


def _hybrid_by_two(q, k, v, causal):
    phi, scale = feature_map("elu"), q.shape[3] ** -0.5
    gate = torch.full((q.shape[1],), phi.log_gate(q.shape[3]), device=q.device)
    return merged(q, k, v, q, k, WINDOW, phi, gate, causal, None, None, scale, None, backend="triton").out


def _image(q, k, v, backend):
    rows = 1 << (q.shape[2].bit_length() - 1) // 2
    variant = build("window2d", Heads(q.shape[1], k.shape[1], q.shape[3], v.shape[3]), window=SIDE)
    return variant(q, k, v, backend=backend, inputs=Inputs(None, (rows, q.shape[2] // rows))).out


@cache
def _focused_map(heads: Heads, device: torch.device) -> Focused:
    return Focused(heads, heads.width).to(device)


def _focused(q, k, v, backend):
    phi = _focused_map(Heads(q.shape[1], k.shape[1], q.shape[3], v.shape[3]), q.device)
    return linear.attend(q, k, v, phi.to(torch.promote_types(q.dtype, torch.float32)), causal=True, backend=backend)[
        0
    ].out


RECURRENCES = ("vector decay", "delta", "gated delta")
RINGS = ("window", "hybrid", "hybrid rotary")
"""What decodes from a ring of the last keys."""


def ringed(group: str, q, at: torch.Tensor):
    """(variant, rotary) of a group of `RINGS`, for tokens of q's heads that stand at `at`."""
    heads = Heads(q.shape[1], q.shape[1], q.shape[3], q.shape[3])
    variant = build(group.removesuffix(" rotary"), heads, window=WINDOW).to(q.device)
    return variant, (Rotation(at), Rotation(at)) if group.endswith("rotary") else None


def _pattern(q, k, v, name, backend):
    heads = Heads(q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    return build(name, heads, **SPARSE[name])(q, k, v, causal=True, backend=backend).out


def pairs(group: str, length: int) -> float:
    """Keys that a query sees exactly, in the mean."""
    if group in SPARSE:
        return build(group, Heads(1, 1, 1, 1), **SPARSE[group]).cost(1, length, causal=True).flops / (4 * length)
    exact = {"softmax": length / 2, "window": WINDOW, "window2d": (2 * SIDE - 1) ** 2}
    exact |= {"hybrid": WINDOW, "hybrid both": 2 * WINDOW, "window packs": WINDOW, "hybrid packs": WINDOW}
    return exact.get(group, 0)


REFERENCES = {
    **{group: partial(_recurrence, group=group, backend="reference") for group in RECURRENCES},
    "linear causal": partial(linear_attention, causal=True, backend="reference"),
    "linear both": partial(linear_attention, backend="reference"),
    "linear decay": partial(_decayed, backend="reference"),
    "linear focused": partial(_focused, backend="reference"),
    **{name: partial(by_padding, group=name, near=WINDOW, backend="reference") for name in PACKED},
    "scalar decay": partial(_scan, backend="reference"),
    "window": partial(sliding_window_attention, window=WINDOW, causal=True, backend="reference"),
    "window2d": partial(_image, backend="reference"),
    "hybrid": partial(hybrid_attention, window=WINDOW, causal=True, backend="reference"),
    "hybrid both": partial(hybrid_attention, window=WINDOW, backend="reference"),
    "softmax": partial(F.scaled_dot_product_attention, is_causal=True),
    **{name: partial(_pattern, name=name, backend="reference") for name in SPARSE},
}


def ours() -> list[Contender]:
    """Every mechanism with a kernel, by kernel, by flex-attention and by torch."""
    made = []
    for backend in ("triton", "torch"):
        add = partial(_ours, backend=backend)
        made += [
            add("linear causal", linear_attention, causal=True),
            add("linear both", linear_attention),
            add("linear decay", _decayed),
            add("linear focused", _focused),
            add("scalar decay", _scan),
            add("window", sliding_window_attention, window=WINDOW, causal=True),
            add("window2d", _image),
            add("hybrid", hybrid_attention, window=WINDOW, causal=True),
            add("hybrid both", hybrid_attention, window=WINDOW),
            *(add(group, partial(_recurrence, group=group)) for group in RECURRENCES),
        ]
    for group, causal in (("hybrid", True), ("hybrid both", False)):
        two = partial(_hybrid_by_two, causal=causal)
        made.append(Contender("longspan triton, two kernels", group, two, group))
    for name in PACKED:
        given = {"group": name, "near": WINDOW}
        made.append(Contender("longspan triton", name, partial(by_offsets, **given), name))
        for backend, longest in (("triton", 1 << 20), ("torch", LOOPING)):
            padded = partial(by_padding, **given, backend=backend)
            made.append(Contender(f"longspan {backend}, padded", name, padded, name, longest))
    made.append(_ours("window", sliding_window_attention, "flex", window=WINDOW, causal=True))
    made.append(_ours("window2d", _image, "flex"))
    return made + [_ours(name, _pattern, backend, name=name) for name in SPARSE for backend in ("flex", "torch")]


def _ours(group: str, run: Callable, backend: str, **options) -> Contender:
    longest = LOOPING if backend == "torch" else 1 << 20
    return Contender(f"longspan {backend}", group, run, group, longest, {"backend": backend, **options})


def peers(device: str) -> list[Contender]:
    """What else can be imported here."""
    found = [
        Contender(f"sdpa {kind.name.lower()}", "softmax", partial(_sdpa, kind=kind), "softmax", QUADRATIC)
        for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    ]
    found.append(Contender("two matmuls, torch.compile", "linear both", _two_products(device), "linear both"))
    if find_spec("flash_attn"):
        flash = import_module("flash_attn").flash_attn_func
        found += [
            Contender("flash-attn", "softmax", partial(_flash, flash=flash, window=-1), "softmax", QUADRATIC),
            Contender("flash-attn", "window", partial(_flash, flash=flash, window=WINDOW - 1), "window"),
        ]
    if find_spec("fla"):
        found += [
            Contender("fla simple_gla", "scalar decay", _simple_gla, "scalar decay"),
            Contender("fla simple_gla", "linear decay", _simple_gla),
            Contender("fla linear_attn", "linear causal", _fla_linear, "linear causal"),
            Contender("fla gla", "vector decay", partial(_fla, path="gla.chunk_gla"), "vector decay"),
            Contender("fla delta_rule", "delta", partial(_fla, path="delta_rule.chunk_delta_rule"), "delta"),
            Contender(
                "fla gated_delta_rule",
                "gated delta",
                partial(_fla, path="gated_delta_rule.chunk_gated_delta_rule"),
                "gated delta",
            ),
        ]
    if find_spec("mamba_ssm"):
        found.append(Contender("mamba-ssm ssd", "scalar decay", _ssd, "scalar decay"))
    return found


def _sdpa(q, k, v, kind):
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _two_products(device: str):
    def run(q, k, v):
        fq, fk = F.elu(q) + 1, F.elu(k) + 1
        mean = fk.mT @ v / k.shape[2]
        return (fq @ mean) / (fq @ fk.mean(2).unsqueeze(-1))

    return torch.compile(run, dynamic=True) if device == "cuda" else run  # the rehearsal compiles nothing


def _flash(q, k, v, flash, window):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash(q, k, v, causal=True, window_size=(window, 0 if window >= 0 else -1)).transpose(1, 2)


def _simple_gla(q, k, v):
    run = import_module("fla.ops.simple_gla").chunk_simple_gla
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    g = -_slopes(q.transpose(1, 2))[None, None].expand(q.shape[0], q.shape[1], -1).contiguous()
    return run(q=q, k=k, v=v, g=g, scale=1.0)[0].transpose(1, 2)


def _fla_linear(q, k, v):
    run = import_module("fla.ops.linear_attn").chunk_linear_attn
    q, k, v = ((F.elu(x) + 1 if n < 2 else x).transpose(1, 2).contiguous() for n, x in enumerate((q, k, v)))
    return run(q=q, k=k, v=v, scale=1.0, normalize=True)[0].transpose(1, 2)


def _fla(q, k, v, path):
    module, name = path.split(".")
    group = {"gla": "vector decay", "delta_rule": "delta"}.get(module, "gated delta")
    k = k if group == "vector decay" else F.normalize(k, dim=-1)
    g, *beta = (x.transpose(1, 2).contiguous() for x in gates(group, q))
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    given = {} if group == "delta" else {"g": g}
    given |= {"beta": beta[0].to(v.dtype)} if beta else {}
    return getattr(import_module(f"fla.ops.{module}"), name)(q=q, k=k, v=v, scale=1.0, **given)[0].transpose(1, 2)


def _ssd(q, k, v):
    run = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    rate = -_slopes(q).float()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    steps = torch.ones(q.shape[:3], device=q.device, dtype=torch.float32)
    return run(v, steps, rate, k, q, chunk_size=256).transpose(1, 2)
