"""The recall probe: its tasks can be answered from what is shown, and tell mechanisms apart."""

from dataclasses import replace

import pytest
import torch

from core.training import recall
from core.training.recall import BLANK, FIRST_KEY, NEEDLE, NOT_ASKED, PROBES, Recaller, accuracy, measure, train


def drawn(name, level, rows=50, seed=0):
    probe = PROBES[name]
    return probe, *probe.draw(rows, level, probe, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("number", PROBES["pairs"].levels)
def test_every_key_is_shown_once_and_asked_once(number):
    probe, tokens, targets = drawn("pairs", number)
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        shown = dict(zip(row[0 : 2 * number : 2], row[1 : 2 * number : 2]))
        assert len(shown) == number
        assert all(FIRST_KEY <= key < FIRST_KEY + probe.keys for key in shown)
        asked = {row[at]: target for at, target in enumerate(wanted) if target != NOT_ASKED}
        assert asked == {key: value - FIRST_KEY - probe.keys for key, value in shown.items()}
        rest = [token for token, target in zip(row[2 * number :], wanted[2 * number :]) if target == NOT_ASKED]
        assert set(rest) <= {BLANK}
        assert all(target == NOT_ASKED for target in wanted[: 2 * number])


def test_gaps_follow_a_power_law():
    _, _, targets = drawn("pairs", 2, rows=2000)
    gaps = (targets != NOT_ASKED).nonzero()[:, 1] - 4
    near, far = ((gaps < 10).sum() / 10).item(), ((gaps >= 46).sum() / 30).item()
    assert near > 5 * far > 0


@pytest.mark.parametrize("depth", PROBES["needle"].levels)
def test_one_needle_lies_at_its_depth_and_is_asked_for_at_the_end(depth):
    probe, tokens, targets = drawn("needle", depth)
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        at = row.index(NEEDLE)
        assert row.count(NEEDLE) == 2
        assert row[-1] == NEEDLE
        assert abs(at / (probe.length - 3) - depth) < 0.03
        assert wanted[:-1] == [NOT_ASKED] * (probe.length - 1)
        assert wanted[-1] == row[at + 1] - FIRST_KEY - probe.keys


def test_test_sequences_are_not_training_sequences():
    for name, probe in PROBES.items():
        for level in probe.levels:
            test = drawn(name, level, seed=recall.TEST_SEED)[1]
            assert not any(torch.equal(test, drawn(name, level, seed=seed)[1]) for seed in range(5))


def test_softmax_remembers_and_a_small_sum_does_not():
    probe = replace(PROBES["pairs"], length=64, levels=(2, 4, 8, 16), steps=110)
    exact = accuracy(train({"variant": "softmax"}, probe), probe)
    small = accuracy(train({"variant": "linear", "feature_dim": 2}, probe), probe)
    untrained = accuracy(Recaller({"variant": "softmax"}, probe).eval(), probe)
    assert min(exact.values()) > 0.95
    assert small[16] < 0.5
    assert max(untrained.values()) < 0.15, "the answer must come from training"


def test_a_seed_is_a_model_and_the_surroundings_keep_their_random_numbers():
    probe = replace(PROBES["needle"], steps=3, rows=4)
    torch.manual_seed(1)
    first = train({"variant": "linear"}, probe, seed=5)
    drawn_after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn_after, torch.rand(3))
    again, other = (train({"variant": "linear"}, probe, seed=seed) for seed in (5, 6))
    weights = [model.head.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_rows_name_what_was_measured_and_layouts_take_part():
    probes = [replace(probe, steps=5, rows=2) for probe in PROBES.values()]
    attentions = {"a": {"variant": "window", "window": 4, "short_conv": 3}, "b": {"layout": "sandwich"}}
    rows = list(measure(attentions, [3, 4], probes=probes))
    assert [(row["task"], row["variant"], row["seed"]) for row in rows] == [
        (task, label, seed) for task in ("pairs", "needle") for label in "ab" for seed in (3, 4)
    ]
    assert list(rows[0]["accuracy"]) == ["4", "8", "16", "24"]
    assert list(rows[-1]["accuracy"]) == ["0", "0.25", "0.5", "0.75", "1"]
    assert rows[0]["state_bytes"] == Recaller(attentions["a"], probes[0]).encoder.cost(1, 80).state_bytes


def test_what_cannot_be_causal_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(recall, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="no option 'windw'"):
        next(measure({"a": {"variant": "softmax"}, "b": {"variant": "window", "windw": 3}}, [0]))
