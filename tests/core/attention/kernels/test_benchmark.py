"""The GPU benchmark rehearsed on a CPU, so that the first minute on a GPU is not lost to a typo."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from core.attention.kernels import INTERPRETED
from core.attention.recurrence import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))  # programs run from the repository, they are not installed

from benchmarks.gpu import aims, contenders, course
from benchmarks.gpu.checks import fault
from benchmarks.gpu.scale import DRY

interpreted = pytest.mark.skipif(not INTERPRETED, reason="a rehearsal is interpreted, and here is a GPU")


def rehearse(tmp_path, only, **options):
    out = tmp_path / "found.json"
    given = {"dry": True, "check": False, "once": False, "minutes": 9.0, "only": only, "out": out, **options}
    status = course.run(**given)
    return status, json.loads(out.read_text()) if out.exists() else None


@interpreted
@pytest.mark.parametrize("only", ["linear both", pytest.param("", marks=pytest.mark.slow)])
def test_checks_times_and_writes(only, tmp_path):
    status, found = rehearse(tmp_path, only)
    assert status == 0
    groups = {one.group for one in contenders.ours() if only in one.group}
    assert groups == {row["group"] for row in found["rows"] if row["name"].startswith("longspan")}
    assert found["stopped"] is None
    assert all(row["forward_ms"] > 0 < row["both_ms"] for row in found["rows"])
    assert (tmp_path / "found.png").stat().st_size > 1000


@interpreted
def test_stops_in_time_and_writes_what_it_has(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(course, "checked", lambda scale, field, only: (field, 0))
    status, found = rehearse(tmp_path, "linear both", minutes=0.0)
    assert status == 0
    assert found["stopped"] == "in decoding"
    assert found["rows"] == []
    assert "stopped after 0 minutes" in capsys.readouterr().out


@interpreted
def test_a_wrong_kernel_is_never_timed(tmp_path, capsys, monkeypatch):
    def wrong(*tensors, backend, **options):
        return right(*tensors, backend="torch", **options) * (1.001 if backend == "triton" else 1.0)

    right = contenders.linear_attention
    monkeypatch.setattr(contenders, "linear_attention", wrong)
    status, found = rehearse(tmp_path, "linear both")
    assert status == 1
    assert found is None
    assert "out is off by" in capsys.readouterr().out


def test_aims_are_judged_by_the_worst_ratio():
    def row(group, name, length, ms):
        shape = {"heads": 2, "width": 8, "length": length}
        return {"group": group, "name": name, **shape, "forward_ms": ms, "both_ms": ms, "forward_of_roofline": 0.9}

    rows = [row("linear decay", aims.OURS, n, 1.0) for n in (512, 4096, 8192)]
    rows += [row("linear decay", "fla simple_gla", n, ms) for n, ms in ((512, 0.1), (4096, 3.0), (8192, 1.1))]
    rows += [row(group, aims.OURS, 512, ms) for group, ms in (("hybrid", 2.0), ("linear causal", 1.0), ("window", 1.5))]
    steps = [{"group": "linear", "batch": 1, "heads": 2, "width": 8, "after": n, "step_ms": 1.0} for n in (4, 8)]
    found = {one["aim"]: one for one in aims.verdicts(rows, steps)}
    decay = next(one for text, one in found.items() if text.startswith("linear decay") and text.endswith("forward"))
    assert decay["ratio"] == pytest.approx(1.1)  # 512 does not count, and a mean would pass
    assert decay["met"] is False
    hybrid = next(one for text, one in found.items() if text.startswith("hybrid: linear causal + window apart"))
    assert hybrid["ratio"] == pytest.approx(1.25)
    assert hybrid["met"] is True
    assert found["a step takes no longer after a long context"]["met"] is True
    assert next(one for text, one in found.items() if text.startswith("window2d"))["met"] is None


def sums(q, k, v, g, scale, beta=None):
    """A recurrence token by token, positions before heads as the peers have them."""
    q, k, v, g = (x.transpose(1, 2) for x in (q * scale, k, v, g))
    return reference(q, k, v, g, None if beta is None else beta.transpose(1, 2))[0].transpose(1, 2), None


def linear_attn(q, k, v, scale, normalize):
    out, _ = sums(q, k, v, torch.zeros_like(q[..., 0]), scale)
    return (out / (q * k.cumsum(1)).sum(-1, keepdim=True) if normalize else out), None


def gated_delta(q, k, v, g, beta, scale):
    return sums(q, k, v, g, scale, beta)


def plain_delta(q, k, v, beta, scale):
    return sums(q, k, v, torch.zeros_like(beta), scale, beta)


def ssd(x, dt, A, B, C, chunk_size):
    return sums(C, B, x * dt.unsqueeze(-1), dt * A, 1.0)[0]


def flash(q, k, v, causal, window_size):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    behind = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


STAND_INS = {
    "fla.ops.simple_gla": {"chunk_simple_gla": sums},
    "fla.ops.linear_attn": {"chunk_linear_attn": linear_attn},
    "fla.ops.gla": {"chunk_gla": sums},
    "fla.ops.delta_rule": {"chunk_delta_rule": plain_delta},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": gated_delta},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": ssd},
    "flash_attn": {"flash_attn_func": flash},
}
"""What the peers compute, in their own layouts and argument names (fla 0.4, mamba-ssm 2, flash-attn 2)."""


@pytest.fixture
def importable(monkeypatch):
    modules = {name: ModuleType(name) for name in STAND_INS}
    for name, module in modules.items():
        vars(module).update(STAND_INS[name])
    monkeypatch.setattr(contenders, "find_spec", lambda name: name in ("fla", "mamba_ssm", "flash_attn"))
    monkeypatch.setattr(contenders, "import_module", lambda name: modules[name])


def test_peers_get_their_layout_and_the_same_task(importable):
    """An adapter that mixes up heads and positions, a scale or a sign is off by far more than rounding."""
    compared = [one for one in contenders.peers("cpu") if one.exact and not one.name.startswith("sdpa")]
    assert len(compared) == 9
    for one in compared:
        assert fault(DRY, one, 8) == "", one.name


def test_every_aim_names_what_is_timed(importable):
    field = {(one.group, one.name) for one in (*contenders.ours(), *contenders.peers("cpu"))}
    for aim in aims.AIMS:
        against = [(aim.group, name) for name in aim.names] + [(group, aims.OURS) for group in aim.apart]
        assert {(aim.mine, aims.OURS), *against} <= field
