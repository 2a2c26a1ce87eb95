"""`auto` chooses once, by length and measurement, says so, and never loads the weights of another choice."""

import json
import logging

import pytest
import safetensors.torch
import torch

from core.attention import Attention, measurement
from core.attention.variants import auto


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of our own, and a log that has said nothing."""
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    auto._say.cache_clear()
    return tmp_path


def measured(**hybrid_at_4k):
    """A measurement where softmax grows with the square and hybrid is linear; they meet where the test says."""
    lengths = (256, 1024, 4096)
    softmax = {str(n): (n / 4096) ** 2 * 100 for n in lengths}
    hybrid = {kind: {str(n): n / 4096 * ms for n in lengths} for kind, ms in hybrid_at_4k.items()}
    ms = {"softmax": dict.fromkeys(measurement.DIRECTIONS, softmax), "hybrid": hybrid}
    return {"date": "2026-01-01", "heads": 2, "width": 64, "ms": ms}


def chosen(length, dim=256, **options) -> str:
    return Attention(dim, 4, "auto", length=length, device="cpu", **options).variant.chosen


def test_without_a_measurement_the_written_rule_decides():
    crossover = auto.CROSSOVERS["cpu"]
    assert [chosen(n) for n in (1, crossover - 1, crossover, 100_000)] == ["softmax", "softmax", "hybrid", "hybrid"]
    assert Attention(256, 4, "auto", device="cpu").variant.chosen == chosen(4096)
    wider = crossover * (128 + 64) // 128
    assert [chosen(n, dim=512) for n in (wider - 1, wider)] == ["softmax", "hybrid"]


def test_a_measurement_of_this_device_decides():
    # softmax takes 100 (n / 4096)^2 ms, hybrid 50 n / 4096 causally and 200 n / 4096 two-sided: they meet at 8192.
    measurement.save("cpu", measured(**{"causal": 50, "two-sided": 200}))
    assert [chosen(n) for n in (4096, 8191, 8193, 100_000)] == ["softmax", "softmax", "hybrid", "hybrid"]
    assert [chosen(n, dim=512) for n in (12_280, 12_290)] == ["softmax", "hybrid"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:40],
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"threads": ', '"threads": 1'),
        lambda text: text.replace('"ms"', '"sm"'),
        lambda text: "[]",
    ],
)
def test_a_measurement_that_cannot_be_used_is_told_and_left(change, caplog):
    path = measurement.save("cpu", measured(**{"causal": 1e-3, "two-sided": 1e-3}))
    assert chosen(64) == "hybrid"
    path.write_text(change(path.read_text()))
    with caplog.at_level(logging.WARNING, "longspan.attention"):
        assert chosen(64) == "softmax"
    assert "is not used" in caplog.text
    assert "longspan bench" in caplog.text


def test_half_a_measurement_does_not_decide():
    found = measured(**{"causal": 1e-3, "two-sided": 1e-3})
    del found["ms"]["hybrid"]["two-sided"]
    measurement.save("cpu", found)
    assert chosen(64) == "softmax"


def test_other_threads_are_another_device():
    measurement.save("cpu", measured(**{"causal": 1e-3, "two-sided": 1e-3}))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert chosen(64) == "softmax"
    finally:
        torch.set_num_threads(threads)
    assert chosen(64) == "hybrid"


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    assert measurement.cache_folder() == tmp_path
    monkeypatch.delenv("LONGSPAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert measurement.cache_folder() == tmp_path / "shared" / "longspan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measurement.cache_folder() == tmp_path / ".cache" / "longspan"
    assert json.loads(json.dumps(measurement.identity("cpu")))["threads"] == torch.get_num_threads()


def test_times_lie_on_straight_lines_between_logarithms():
    ms = {100: 2.0, 1000: 20.0, 10_000: 2000.0}
    for length, want in ((100, 2.0), (10, 0.2), (300, 6.0), (1000, 20.0), (2000, 80.0), (100_000, 200_000.0)):
        assert measurement.time_at(ms, length) == pytest.approx(want)


def test_the_choice_is_logged_once_and_shown(caplog):
    with caplog.at_level(logging.INFO, "longspan.attention"):
        layers = [Attention(256, 4, "auto", length=100, device="cpu") for _ in range(3)]
    (line,) = [record.message for record in caplog.records]
    assert line == (
        "auto attention: softmax for 100 tokens on cpu "
        "(built-in rule for cpu: hybrid from 2048 tokens at head width 64)"
    )
    assert "chosen=softmax" in repr(layers[0])


@pytest.mark.parametrize("choice", auto.CANDIDATES)
def test_it_is_the_chosen_variant_whatever_the_input(choice):
    torch.manual_seed(0)
    layer = Attention(32, 2, "auto", choice=choice, causal=True)
    torch.manual_seed(0)
    plain = Attention(32, 2, choice, causal=True)
    for length in (1, 40, 300):
        x = torch.randn(1, length, 32)
        assert torch.equal(layer(x), plain(x))
    assert layer.cost(1, 100) == plain.cost(1, 100)
    assert layer.variant.growth == plain.variant.growth


def test_weights_of_another_choice_are_refused(tmp_path):
    there = Attention(32, 2, "auto", choice="hybrid")
    safetensors.torch.save_model(there, str(tmp_path / "weights"))
    torch.save(there.state_dict(), tmp_path / "weights.pt")
    here = Attention(32, 2, "auto", length=16, device="cpu")
    with pytest.raises(ValueError, match=r"auto's choice 'hybrid', this layer chose 'softmax'.* choice='hybrid'"):
        here.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    again = Attention(32, 2, "auto", choice="hybrid")
    safetensors.torch.load_model(again, str(tmp_path / "weights"))
    x = torch.randn(1, 20, 32)
    assert torch.equal(again(x), there(x))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"choice": "hybird"}, r"unknown choice 'hybird' for auto \(did you mean 'hybrid'\?\); known: softmax, hybrid"),
        ({"length": 0}, "length must be a whole number of tokens, at least 1, got 0"),
        ({"length": 10.5}, "length must be a whole number"),
        ({"device": "cpi"}, r"unknown device 'cpi' for auto \(did you mean 'cpu'\?\); known: cpu, cuda"),
    ],
)
def test_bad_options(options, told):
    with pytest.raises(ValueError, match=told):
        Attention(32, 2, "auto", **options)
