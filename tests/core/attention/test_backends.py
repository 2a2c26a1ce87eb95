"""The choice of an implementation: by the rule, aloud, and never quietly another one."""

import logging

import pytest
import torch

from core.attention import backends, explain_backend, set_backend, sliding_window_attention, softmax_attention


@pytest.fixture(autouse=True)
def _free_choice(monkeypatch):
    monkeypatch.setattr(backends, "_forced", {})
    monkeypatch.setattr(backends, "_said", set())


def qkv(length=6):
    return [torch.randn(1, 2, length, 4) for _ in range(3)]


def test_auto_takes_the_first_that_serves_everything_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="longspan.attention"):
        softmax_attention(*qkv())
        softmax_attention(*qkv())
        softmax_attention(*qkv(), return_mass=True)
    assert [record.message for record in caplog.records] == [
        "softmax attention: sdpa (cpu, float32; first in order)",
        "softmax attention: torch (cpu, float32; sdpa does not serve mass)",
    ]


def test_an_explicit_choice_that_cannot_serve_is_an_error_that_names_who_can():
    with pytest.raises(
        ValueError, match="backend 'sdpa' of softmax attention does not serve mass; reference, torch does"
    ):
        softmax_attention(*qkv(), return_mass=True, backend="sdpa")
    with pytest.raises(ValueError, match="window attention has no backend 'sdpa'; it has reference, torch"):
        sliding_window_attention(*qkv(), window=2, backend="sdpa")
    with pytest.raises(ValueError, match="no backend of softmax attention serves this request"):
        softmax_attention(*qkv(), return_mass=True, dropout=0.5)


def test_set_backend_forces_and_gives_back():
    set_backend("reference", "softmax")
    assert "reference: serves  <- runs (asked for)" in explain_backend("softmax")
    set_backend(None, "softmax")
    assert "sdpa: serves  <- runs" in explain_backend("softmax")
    with pytest.raises(ValueError, match=r"unknown backend 'tritn' \(did you mean 'triton'\?\)"):
        set_backend("tritn")
    with pytest.raises(ValueError, match=r"unknown mechanism 'sofmax' \(did you mean 'softmax'\?\)"):
        set_backend("torch", "sofmax")


def test_a_new_implementation_joins_by_one_decorator(monkeypatch):
    monkeypatch.setattr(backends, "_table", {name: dict(row) for name, row in backends._table.items()})

    @backends.implementation("window", "fla", dtypes=(torch.float16,))
    def fast(*_):
        return "fast"

    assert backends.resolve("window", "auto", "cuda", torch.float16, ()).run is fast
    assert backends.resolve("window", "auto", "cuda", torch.float32, ()).name == "torch"
    assert "fla: does not serve float32" in explain_backend("window", device="cuda")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(6, 6), (1, 6), (3, 6), (6, 3)])
def test_every_backend_of_softmax_gives_the_same(causal, masked, sizes):
    q = torch.randn(2, 4, sizes[0], 4)
    k, v = torch.randn(2, 2, sizes[1], 4), torch.randn(2, 2, sizes[1], 4)
    mask = torch.ones(2, sizes[1], dtype=torch.bool)
    mask[0, 1:] = False
    mask[1] = False
    options = {"causal": causal, "key_mask": mask if masked else None}
    want = softmax_attention(q, k, v, backend="reference", **options)
    torch.testing.assert_close(softmax_attention(q, k, v, backend="torch", **options), want)
    torch.testing.assert_close(softmax_attention(q, k, v, **options), want)


def test_a_confirmed_backend_leads_on_cuda_alone(monkeypatch):
    """One line turns `auto` on for a kernel that a GPU has confirmed; what it cannot serve goes on to the next."""
    from core.attention import backends, explain_backend

    monkeypatch.setitem(backends.CONFIRMED, "window", "flex")
    assert "flex: serves  <- runs" in explain_backend("window", device="cuda")
    assert "torch: serves  <- runs" in explain_backend("window", device="cuda", dtype=torch.float64)
    assert "torch: serves  <- runs" in explain_backend("window", device="cpu")
    assert "torch: serves  <- runs" in explain_backend("linear", device="cuda")
