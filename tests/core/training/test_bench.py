"""`longspan bench`: what it measures is kept, read by `auto`, and told."""

import json

import pytest
import torch

from core.attention import Attention, measurement
from core.training import bench as benches
from core.training.bench import attention_of, bench, recall_table
from core.training.command import main
from core.training.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_speed_is_kept_and_read_by_auto(tmp_path, capsys, caplog):
    result = bench("speed", variants=["window:window=8"], lengths=(16, 48), device="cpu", out=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == result
    kept = measurement.load("cpu")
    assert kept is not None
    assert set(kept["ms"]) == {"softmax", "hybrid", "window", "linear", "window:window=8"}
    assert all(set(times) == {16, 48} for kinds in kept["ms"].values() for times in kinds.values())
    assert all(0 < ms < 1e4 for kinds in kept["ms"].values() for times in kinds.values() for ms in times.values())
    printed = capsys.readouterr().out
    assert printed.count("tokens") == 5 * 2 * 2
    assert "kept for `auto` in" in printed
    with caplog.at_level("INFO", "longspan.attention"):
        Attention(128, 2, "auto", length=20, device="cpu")
    assert "measured on" in caplog.text


def test_what_would_take_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(benches, "best_ms", lambda functions, device: dict.fromkeys(functions, 1000.0))
    found = bench("speed", lengths=(100, 200, 500), device="cpu")["ms"]
    assert list(found["linear"]["causal"]) == ["100", "200", "500"]  # 1000 ms * 2.5 is within the limit of 4000
    assert list(found["softmax"]["causal"]) == ["100", "200"]  # 1000 ms * 2.5^2 is not
    assert measurement.load("cpu") is not None


def test_the_best_of_several_rounds_counts_and_the_first_call_does_not():
    import time

    naps = iter([0.05, 0.02, 0.001, 0.02, 0.02, 0.02])
    assert 1 <= benches.best_ms({"a": lambda: time.sleep(next(naps))}, "cpu")["a"] < 15


def test_labels_are_attention_sections():
    assert attention_of("hybrid:window=16:feature_map=taylor") == {
        "variant": "hybrid",
        "window": 16,
        "feature_map": "taylor",
    }
    assert attention_of("based") == {"layout": "based"}
    assert attention_of("gla:short_conv=3") == {"variant": "gla", "short_conv": 3}


def test_recall_prints_rows_and_a_table(monkeypatch, capsys):
    def measured(attentions, seeds, *, probes, device):
        assert [probe.name for probe in probes] == ["pairs"]
        for seed in seeds:
            accuracy = {"2": 1.0, "16": 0.5 + seed / 10}
            yield {
                "task": "pairs",
                "variant": "linear",
                "seed": seed,
                "accuracy": accuracy,
                "state_bytes": 1500,
                "seconds": 1.0,
            }

    monkeypatch.setattr(benches.recall, "measure", measured)
    result = bench("recall", variants=["linear"], seeds=(0, 1, 2), tasks=["pairs"], device="cpu")
    assert [row["seed"] for row in result["rows"]] == [0, 1, 2]
    assert {name: probe["values"] for name, probe in result["probes"].items()} == {"pairs": 32}
    assert capsys.readouterr().out.endswith(
        "| pairs | pairs 2 | pairs 16 | decoding state |\n|---|---|---|---|\n"
        "| `linear` | 100 (100 to 100) | 60 (50 to 70) | 1.5 kB |\n| chance | 3 | 3 | |\n"
    )
    assert "| `linear` | 100 | 50 |" in recall_table(result["rows"][:1])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--suite", "sped"], "unknown suite 'sped' (did you mean 'speed'?); known: speed, recall"),
        (
            ["--suite", "recall", "--variants", "linaer"],
            "--variants: unknown attention 'linaer' (did you mean 'linear'?)",
        ),
        (["--variants", "based"], "speed measures one layer; 'based' is a layout of several"),
        (["--variants", "window:windw=3"], "--variants: attention 'window' has no option 'windw'"),
        (["--variants", "window:window"], "must have the form name or name:option=value"),
        (["--tasks", "needle"], "--tasks goes with --suite recall"),
        (
            ["--suite", "recall", "--tasks", "needel"],
            "--tasks: unknown task 'needel' (did you mean 'needle'?); known: pairs, needle",
        ),
        (["--seeds", "3"], "--seeds goes with --suite recall"),
        (["--out", "no/where.json"], "--out no/where.json: there is no folder no"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        bench("speed", device="cuda")
