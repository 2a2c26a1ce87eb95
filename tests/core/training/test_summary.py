"""What the report says in words, for comparisons whose answer is known beforehand."""

from dataclasses import replace

import pytest

from core.training.ledger import Plan, Run
from core.training.summary import Table, summarize

NOISE = (0.000, 0.010, -0.006, 0.004, -0.003)  # shared by all variants of a seed
OWN = (0.0001, -0.0002, 0.0003, -0.0001, 0.0002)  # of one variant alone


def runs_of(plan: Plan, values: dict[str, list[float | None]], floors=None, step_ms=None) -> dict:
    """Runs whose test metric is given per seed; None is a run that went NaN."""
    runs = {}
    for label, by_seed in values.items():
        for seed, value in zip(plan.seeds, by_seed):
            runs[(), label, seed] = Run(
                variant=label,
                seed=seed,
                overrides=(),
                status="nan" if value is None else "ok",
                error="loss is nan at step 7" if value is None else None,
                metrics={} if value is None else {"test": {"mse": value}, "floors": floors or {}},
                cost={"step_ms": (step_ms or {}).get(label)},
                seconds=1.0,
                run_dir=f"{label}/seed-{seed}",
            )
    return runs


def plan_of(labels, seeds=5, **changes) -> Plan:
    plan = Plan("toy/demo", "toy", "mse", "lower", {label: {"variant": label} for label in labels}, tuple(range(seeds)))
    return replace(plan, baseline=labels[0], **changes)


def noisy(level: float, sign: float = 1, seeds: int = 5) -> list[float]:
    return [level + shared + sign * own for shared, own in zip(NOISE[:seeds], OWN)]


def table_of(plan: Plan, values, **more) -> Table:
    (table,) = summarize(plan, runs_of(plan, values, **more)).tables
    return table


def test_a_clear_winner_is_named_with_what_it_beats_and_what_ties():
    plan = plan_of(["softmax", "window", "linear"])
    values = {"softmax": noisy(0.40, sign=2), "window": noisy(0.38), "linear": noisy(0.3803, sign=-1)}
    table = table_of(
        plan, values, step_ms={"softmax": 50.0, "window": 20.0, "linear": 12.0}, floors={"ridge": {"mse": 0.5}}
    )
    assert table.headline == (
        "Use window here: mse 0.381 ± 0.006 over 5 seeds, better than softmax; "
        "linear is not separable from it and takes 0.60× the time."
    )
    assert table.warnings == []
    assert [row.baseline and row.baseline.verdict for row in table.rows] == [None, "better", "better"]


def test_pairs_separate_what_spreads_overlap():
    # The spread over seeds (0.006) is three times the difference (0.002): unpaired, nobody could tell.
    table = table_of(plan_of(["softmax", "linear"]), {"softmax": noisy(0.400), "linear": noisy(0.398, sign=-1)})
    row = table.rows[1]
    assert row.baseline is not None
    assert row.baseline.verdict == "better"
    assert row.metric is not None
    assert row.metric.sd > 0.002


def test_holm_makes_the_verdict_stricter_as_variants_are_added():
    close = [0.4 - 0.0011 + 3 * own for own in OWN]
    alone = table_of(plan_of(["softmax", "a"]), {"softmax": [0.4] * 5, "a": close})
    assert alone.rows[1].baseline.verdict == "better"
    many = {f"v{i}": [0.4 + 0.001 * own * i for own in NOISE] for i in range(1, 6)}
    crowd = table_of(plan_of(["softmax", "a", *many]), {"softmax": [0.4] * 5, "a": close, **many})
    assert crowd.rows[1].baseline.difference == alone.rows[1].baseline.difference
    assert crowd.rows[1].baseline.verdict == "not separable"


def test_nothing_separable_names_the_cheapest():
    values = {"softmax": noisy(0.38), "linear": noisy(0.3803, sign=-1)}
    table = table_of(plan_of(["softmax", "linear"]), values, step_ms={"softmax": 50.0, "linear": 10.0})
    assert table.headline == (
        "The variants are not separable here: softmax has the best mean (mse 0.381 ± 0.006 over 5 seeds), "
        "linear takes the least time (0.20× that of softmax)."
    )


def test_a_little_less_time_is_no_reason():
    values = {"softmax": noisy(0.38), "linear": noisy(0.3803, sign=-1)}
    table = table_of(plan_of(["softmax", "linear"]), values, step_ms={"softmax": 50.0, "linear": 49.0})
    assert table.headline.endswith("and none takes clearly less time, so use softmax.")


def test_higher_may_be_better():
    plan = replace(plan_of(["softmax", "linear"]), better="higher")
    table = table_of(
        plan, {"softmax": noisy(0.38), "linear": noisy(0.40, sign=-1)}, floors={"a": {"mse": 0.3}, "b": {"mse": 0.2}}
    )
    assert table.headline.startswith("Use linear here")
    assert table.best_floor == ("a", 0.3)
    assert table.rows[1].floor.verdict == "better"


def test_a_floor_that_wins_is_the_answer():
    floors = {"last value": {"mse": 1.3}, "ridge": {"mse": 0.30}, "other": {"mae": 0.1}}
    table = table_of(plan_of(["softmax", "linear"]), {"softmax": noisy(0.40), "linear": noisy(0.38)}, floors=floors)
    assert table.headline.startswith("Use no variant here: the floor ridge (mse 0.300) beats the best of them, linear")
    assert table.warnings[0] == "No variant beats the best floor (ridge, mse 0.300) by more than seed noise."


def test_the_optimum_is_no_rival_as_nothing_can_beat_it():
    floors = {"ridge": {"mse": 0.5}, "optimum": {"mse": 0.1}}
    values = {"softmax": noisy(0.40, sign=2), "linear": noisy(0.38)}
    table = table_of(plan_of(["softmax", "linear"]), values, floors=floors)
    assert (table.best_floor, table.optimum) == (("ridge", 0.5), 0.1)
    assert table.headline.startswith("Use linear here")
    assert table.warnings == []


def test_a_floor_within_the_noise_is_said():
    table = table_of(
        plan_of(["softmax", "linear"]),
        {"softmax": noisy(0.40), "linear": noisy(0.38)},
        floors={"ridge": {"mse": 0.3815}},
    )
    assert "is not separable from the floor ridge (mse 0.382)." in table.headline
    assert table.warnings[0].startswith("No variant beats the best floor")


def test_one_seed_separates_nothing():
    table = table_of(
        plan_of(["softmax", "linear"], seeds=1), {"softmax": [0.9], "linear": [0.1]}, floors={"r": {"mse": 5.0}}
    )
    assert (
        table.headline
        == "One seed cannot separate variants: linear comes out first (mse 0.1000); run at least three seeds."
    )
    assert table.rows[1].baseline.verdict == "not separable"
    assert table.warnings[0] == "One seed cannot tell whether a variant beats the best floor (r, mse 5.0000)."
    alike = table_of(plan_of(["softmax", "linear"], seeds=1), {"softmax": [0.5], "linear": [0.5]})
    assert alike.headline.startswith("One seed cannot separate variants: all of them reach mse 0.5000;")


def test_a_variant_that_fails_now_and_then_is_no_answer():
    values = {"softmax": noisy(0.40), "linear": [*noisy(0.30)[:4], None]}
    table = table_of(plan_of(["softmax", "linear"]), values)
    assert table.best == "softmax"
    assert table.rows[1].failed == [4]
    assert table.rows[1].baseline.difference.n == 4
    assert "linear: 1 of 5 runs failed or went NaN; its mean leaves them out." in table.warnings


SOFTMAX, LINEAR = [0.30, 0.31, 0.32, 0.31, 0.30], [0.20, 0.22, 0.21, 0.215]


def test_a_variant_that_is_better_where_it_finishes_is_named_with_its_failures():
    table = table_of(plan_of(["softmax", "linear"]), {"softmax": SOFTMAX, "linear": [*LINEAR, None]})
    assert table.rows[1].baseline.verdict == "better"
    assert table.headline == (
        "linear (mse 0.211 ± 0.009 over 4 seeds; 1 of 5 runs failed or went NaN) is better than softmax (mse 0.308 ± "
        "0.008 over 5 seeds) in the seeds that both finished; settle the failed runs before you choose."
    )


def test_a_missing_run_does_not_make_another_variant_the_best():
    table = table_of(
        plan_of(["softmax", "linear"]), {"softmax": SOFTMAX, "linear": LINEAR}, floors={"r": {"mse": 0.25}}
    )
    assert table.best == "linear"
    assert table.headline.startswith("Use linear here: mse 0.211 ± 0.009 over 4 seeds, better than softmax")
    failed = {"softmax": SOFTMAX, "linear": [*LINEAR, None]}
    table = table_of(plan_of(["softmax", "linear"]), failed, floors={"r": {"mse": 0.25}})
    assert table.headline.startswith(
        "linear (mse 0.211 ± 0.009 over 4 seeds; 1 of 5 runs failed or went NaN) is better"
    )
    assert table.headline.endswith(
        "than the floor r (mse 0.250); softmax (mse 0.308 ± 0.008 over 5 seeds) is worse than it."
    )


def test_where_seeds_are_missing_variants_are_ranked_within_seeds():
    # linear has only seen the two easy seeds: its mean is the best, its differences are not.
    table = table_of(plan_of(["softmax", "linear"]), {"softmax": [0.1, 0.12, 0.5, 0.6, 0.7], "linear": [0.11, 0.14]})
    assert table.best == "softmax"
    assert "softmax comes first in the seeds that are shared" in table.headline
    one = table_of(plan_of(["softmax", "linear"]), {"softmax": noisy(0.4), "linear": [0.1]})
    assert one.best == "softmax", "one seed decides nothing"


def test_the_sentence_does_not_deny_what_the_table_separates():
    # window comes first with much noise of its own; linear is behind it and surely better than softmax.
    values = {"softmax": [0.4] * 5, "window": [0.1, 0.45, 0.2, 0.5, 0.3], "linear": [0.379, 0.38, 0.381, 0.38, 0.379]}
    table = table_of(plan_of(["softmax", "window", "linear"]), values)
    assert [row.baseline and row.baseline.verdict for row in table.rows] == [None, "not separable", "better"]
    assert table.headline.startswith("window has the best mean (mse 0.31")
    assert "linear (mse 0.380 ± 0.001 over 5 seeds) is better than the baseline softmax" in table.headline


def test_a_variant_alone_is_not_recommended_over_those_that_failed():
    table = table_of(plan_of(["softmax", "linear"]), {"softmax": noisy(0.40), "linear": [None] * 5})
    assert table.headline == "The only variant with a finished run, softmax, reaches mse 0.401 ± 0.006 over 5 seeds."
    alone = table_of(plan_of(["softmax"]), {"softmax": noisy(0.40)})
    assert alone.headline.startswith("The only variant, softmax")


def test_missing_runs_are_counted_and_nothing_finished_is_said():
    plan = plan_of(["softmax", "linear"])
    table = table_of(plan, {"softmax": noisy(0.4), "linear": noisy(0.4)[:2]})
    assert table.rows[1].missing == [2, 3, 4]
    assert "3 of 10 runs have not run yet, so the answer may change." in table.warnings
    (nothing,) = summarize(plan, {}).tables
    assert nothing.headline == "No run has finished, so there is no answer yet."
    all_bad = table_of(plan, {"softmax": [None] * 5, "linear": [None] * 5})
    assert all_bad.headline == nothing.headline
    assert len(all_bad.warnings) == 2


def test_identical_variants_are_not_separable_from_each_other():
    table = table_of(plan_of(["softmax", "linear"]), {"softmax": noisy(0.4), "linear": noisy(0.4)})
    compared = table.rows[1].baseline
    assert (compared.verdict, compared.difference.low, compared.difference.high) == ("not separable", 0.0, 0.0)


def test_runs_side_by_side_disturb_the_times():
    values = {"softmax": noisy(0.4), "linear": noisy(0.3)}
    assert not any("disturbed" in w for w in table_of(plan_of(["softmax", "linear"]), values).warnings)
    assert any("disturbed" in w for w in table_of(plan_of(["softmax", "linear"], jobs=2), values).warnings)


def test_floors_that_differ_betray_different_data():
    plan = plan_of(["softmax", "linear"])
    runs = runs_of(plan, {"softmax": noisy(0.4), "linear": noisy(0.3)}, floors={"ridge": {"mse": 0.5}})
    key = ((), "linear", 0)
    runs[key] = replace(runs[key], metrics={**runs[key].metrics, "floors": {"ridge": {"mse": 0.6}}})
    (table,) = summarize(plan, runs).tables
    assert any("did not see the same data" in warning for warning in table.warnings)


def test_the_sentence_and_the_table_agree_about_the_baseline():
    # With six variants the pairs of the best are adjusted over 15 comparisons, the table over 5; the pair with the
    # baseline is in both and must not be separable in one and not in the other.
    labels = ["softmax", "a", "b", "c", "d", "e"]
    values = {"softmax": [0.4] * 5, "a": [0.4 - 0.0022 + 4 * own for own in OWN]}
    values |= {label: [0.4 + 0.0004 * (i + 1) + (0.5 + i) * own for own in NOISE] for i, label in enumerate(labels[2:])}
    table = table_of(plan_of(labels), values)
    assert table.best == "a"
    assert table.rows[1].baseline.verdict == "better"
    assert "better than softmax" in table.headline


@pytest.mark.parametrize("part", ["test", "val"])
def test_without_a_test_part_validation_is_judged_and_floors_are_left_out(part):
    plan = plan_of(["softmax", "linear"], seeds=3)
    runs = {
        key: replace(run, metrics={part: run.metrics["test"], "floors": run.metrics["floors"]})
        for key, run in runs_of(
            plan, {"softmax": noisy(0.4, seeds=3), "linear": noisy(0.3, seeds=3)}, floors={"r": {"mse": 1.0}}
        ).items()
    }
    (table,) = summarize(plan, runs).tables
    assert table.part == part
    assert (table.best_floor is None) == (part == "val")
