"""From the runs of a comparison to numbers and words: one row per variant, the best floor, the answer in a sentence.

Two families of comparisons are kept apart, each Holm-adjusted on its own: every variant against the baseline, which
was named before the runs, and every variant against the best floor. The sentence at the top compares with the variant
that turned out best; as the data chose that one, its pairs are adjusted over all pairs of variants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.training import answer, units
from core.training.ledger import Key, Plan, Run
from core.training.statistics import (
    Difference,
    Spread,
    Verdict,
    difference_to,
    holm,
    paired_difference,
    spread,
    verdict,
)

OPTIMUM = "optimum"
"""The name under which an app reports, among its floors, the figure that no method can better: what generated data
leaves to chance, or an oracle that has read the answer. It is shown beside the floors and never counted as one to
beat."""

COSTS = ("parameters", "flops_per_item", "state_bytes", "tokens_per_s", "step_ms", "peak_bytes", "seconds")


@dataclass(frozen=True)
class Compared:
    """A difference with its Holm-adjusted p value and the verdict in words."""

    difference: Difference
    p_holm: float | None
    verdict: Verdict


@dataclass
class Row:
    """One variant in one setting. Fields are None where no run of it finished.

    Attributes:
        variant: its label.
        attention: its resolved attention section.
        values: primary metric by seed, of the runs that finished well.
        failed: seeds whose last run failed or went NaN.
        missing: seeds that have not run yet.
        metric: mean and SD of `values`.
        metrics: the same for every metric of the part that is reported.
        cost: median over the runs of every cost.
        baseline: comparison with the baseline; None for the baseline itself.
        floor: comparison with the best floor; None where there is no floor.
    """

    variant: str
    attention: dict[str, Any]
    values: dict[int, float]
    failed: list[int]
    missing: list[int]
    metric: Spread | None
    metrics: dict[str, Spread]
    cost: dict[str, float | None]
    baseline: Compared | None = None
    floor: Compared | None = None


@dataclass
class Table:
    """All variants under one setting (a point of the grid), and what follows from them.

    Attributes:
        setting: the `key=value` of this point; empty where there is no grid.
        part: "test", or "val" where the runs have no test metric.
        rows: in the order of the plan.
        floors: metrics by floor, on the same part.
        optimum: the value of the primary metric that nobody can beat, where it is known.
        data_agree: whether runs with the same seed tell the same of their data, and all report the same floors.
        best_floor: (name, value) of the best one by the primary metric.
        best: label of the variant that comes out first among those with the fewest failed runs.
        decimals: of the primary metric, so that columns align.
        headline: the answer in a sentence or two.
        warnings: what a reader must know before believing the table.
    """

    setting: tuple[str, ...]
    part: str
    rows: list[Row]
    floors: dict[str, dict[str, float]]
    optimum: float | None
    data_agree: bool
    best_floor: tuple[str, float] | None
    best: str | None
    decimals: int
    headline: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass
class Summary:
    """The whole comparison: the plan, the runs as they are, a table per setting."""

    plan: Plan
    runs: list[Run]
    tables: list[Table]

    @property
    def failures(self) -> list[Run]:
        """Runs that did not finish well, each with its reason."""
        return [run for run in self.runs if run.status != "ok"]


def summarize(plan: Plan, runs: Mapping[Key, Run]) -> Summary:
    """Compute all tables; runs that are not part of the plan are left out."""
    planned = [key for key in plan.planned() if key in runs]
    return Summary(plan, [runs[key] for key in planned], [_table(plan, setting, runs) for setting in plan.settings])


def _table(plan: Plan, setting: tuple[str, ...], runs: Mapping[Key, Run]) -> Table:
    ok = [runs[key] for key in plan.planned() if key in runs and key[0] == setting and runs[key].status == "ok"]
    part = "test" if all(plan.metric in run.metrics.get("test", {}) for run in ok) else "val"
    rows = [_row(plan, setting, label, part, runs) for label in plan.variants]
    # Floors have no seed: those of one run stand for all. They belong to the test part; val is another yardstick.
    reported = [run.metrics["floors"] for run in ok if run.metrics.get("floors")] if part == "test" else []
    floors = reported[0] if reported else {}
    values = {name: metrics[plan.metric] for name, metrics in floors.items() if plan.metric in metrics}
    scored = [(value, name) for name, value in values.items() if name != OPTIMUM]
    best = (min if plan.better == "lower" else max)(scored, default=None)
    spreads = [row.metric for row in rows if row.metric]
    decimals = units.decimals_for([s.mean for s in spreads], [s.sd for s in spreads if s.sd is not None])
    table = Table(
        setting=setting,
        part=part,
        rows=rows,
        floors=floors,
        data_agree=all(other == floors for other in reported) and _same_data(ok),
        optimum=values.get(OPTIMUM),
        best_floor=(best[1], best[0]) if best else None,
        best=_best(plan, rows),
        decimals=decimals,
    )
    _compare_rows(plan, table)
    table.headline = answer.headline(plan, table)
    table.warnings = answer.warnings(plan, table)
    return table


def _row(plan: Plan, setting: tuple[str, ...], label: str, part: str, runs: Mapping[Key, Run]) -> Row:
    by_seed = {seed: runs[setting, label, seed] for seed in plan.seeds if (setting, label, seed) in runs}
    ok = {seed: run for seed, run in by_seed.items() if run.status == "ok"}
    scores = {seed: run.metrics[part] for seed, run in ok.items()}
    values = {seed: float(score[plan.metric]) for seed, score in scores.items()}
    names = [name for name in next(iter(scores.values()), {}) if all(_number(s.get(name)) for s in scores.values())]
    costs = {name: [run.cost[name] for run in ok.values() if _number(run.cost.get(name))] for name in COSTS}
    return Row(
        variant=label,
        attention=plan.variants[label],
        values=values,
        failed=[seed for seed, run in by_seed.items() if run.status != "ok"],
        missing=[seed for seed in plan.seeds if seed not in by_seed],
        metric=spread(list(values.values())) if values else None,
        metrics={name: spread([float(score[name]) for score in scores.values()]) for name in names},
        cost={name: float(np.median(found)) if found else None for name, found in costs.items()},
    )


def _same_data(runs: Sequence[Run]) -> bool:
    """Within each seed: what a run tells of its data may depend on the seed, such as the padding of its batches."""
    told: dict[int, set[str]] = {}
    for run in runs:
        if run.data is not None:
            told.setdefault(run.seed, set()).add(run.data)
    return all(len(found) == 1 for found in told.values())


def _best(plan: Plan, rows: Sequence[Row]) -> str | None:
    """The variant that comes out first among those that fail least: one that fails now and then is no answer.

    Runs that are still to come are no failures. Where seeds are missing, variants are ranked by their differences
    within seeds, as a mean over other seeds is another yardstick.
    """
    finished = [row for row in rows if row.metric]
    if not finished:
        return None
    most = max(len(row.values) for row in finished)
    # One seed decides nothing where others have several.
    tried = [row for row in finished if len(row.values) >= min(2, most)]
    candidates = [row for row in tried if len(row.failed) == min(len(one.failed) for one in tried)]
    fullest = [row for row in candidates if len(row.values) == max(len(one.values) for one in candidates)]
    reference = next((row for row in fullest if row.variant == plan.baseline), fullest[0])
    apart = {row.variant: paired_difference(row.values, reference.values).mean for row in candidates}
    ranked = [(mean, label) for label, mean in apart.items() if mean is not None]
    return (min if plan.better == "lower" else max)(ranked)[1]


def _compare_rows(plan: Plan, table: Table) -> None:
    by_label = {row.variant: row for row in table.rows}
    reference = by_label[plan.baseline].values
    others = {
        row.variant: paired_difference(row.values, reference) for row in table.rows if row.variant != plan.baseline
    }
    for label, compared in _judge(plan, others).items():
        by_label[label].baseline = compared
    if table.best_floor:
        floor = table.best_floor[1]
        to_floor = {row.variant: difference_to(row.values, floor) for row in table.rows if row.values}
        for label, compared in _judge(plan, to_floor).items():
            by_label[label].floor = compared


def _judge(plan: Plan, differences: Mapping[str, Difference]) -> dict[str, Compared]:
    adjusted = holm({label: difference.p for label, difference in differences.items()})
    return {
        label: Compared(difference, adjusted[label], verdict(difference, adjusted[label], plan.better))
        for label, difference in differences.items()
    }


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
