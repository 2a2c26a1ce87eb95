"""`cost().flops` against torch's own counter, which sees every product of matrices that really runs."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.attention import Attention, available
from core.attention.registry import variant_class

BANDS = (
    "dilated",
    "fixed",
    "hybrid",
    "infini",
    "lolcats",
    "hybrid2d",
    "longformer",
    "reformer",
    "strided",
    "window",
    "window2d",
    "auto",
    "bigbird",
    "hard",
)
"""Their blocks overhang the keys that are seen: `cost` counts what is seen, so at most what runs."""

UNSEEN = {
    ("additive", False): "tanh, most of its work, is not a product",
    ("additive", True): "tanh, most of its work, is not a product",
    ("softmax", True): "the counter takes a causal SDPA for a full one",
    ("luong", True): "the counter takes a causal SDPA for a full one",
    ("diagonal", True): "the counter takes a causal SDPA for a full one",
}

MODES = [
    (name, causal)
    for name in available()
    for causal, ability in ((False, "bidirectional"), (True, "causal"))
    if ability in variant_class(name).can and (name, causal) not in UNSEEN
]


SOLVE = torch.ops.aten.linalg_solve_triangular


def solve_flops(matrix, right, *_given, **_named) -> int:
    """Row after row, each a product with the rows above it."""
    rows, columns = right[-2:]
    return math.prod(right[:-2]) * rows * rows * columns


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_flops_are_those_that_run(name, causal, monkeypatch):
    # The counter does not look into operators, so their bodies are called as plain functions.
    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", lambda op, *given, **named: op._init_fn(*given, **named))
    attention = Attention(128, 2, name, causal=causal).eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={SOLVE: solve_flops}) as counter:
        attention(torch.randn(2, 1024, 128))
    outside = 2 * 2 * 1024 * 4 * 128 * 128
    counted, stated = counter.get_total_flops() - outside, attention.cost(2, 1024).flops - outside
    assert stated <= 1.05 * counted
    if name not in BANDS:
        assert stated >= 0.95 * counted
