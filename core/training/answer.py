"""The answer in words: which variant to use, what is not separable from it, what to know before believing it.

The table compares with the baseline, which was named before the runs. The sentence compares with the variant that
turned out best; as the data chose that one, its pairs are Holm-adjusted over all pairs of variants, except the pair
with the baseline, which keeps the table's verdict so that the two never disagree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from core.training import units
from core.training.ledger import Plan
from core.training.statistics import Verdict, holm, paired_difference, verdict

if TYPE_CHECKING:  # summary calls this module
    from core.training.summary import Row, Table


def headline(plan: Plan, table: Table) -> str:
    """The answer in a sentence: which variant to use, what is not separable from it, whether a floor does as well."""
    finished = [row for row in table.rows if row.metric]
    if not finished:
        return "No run has finished, so there is no answer yet."
    best = next(row for row in finished if row.variant == table.best)
    others = [row for row in finished if row is not best]
    most = max(len(row.values) for row in finished)
    score = _score(plan, table, best)
    if table.best_floor and best.floor and best.floor.verdict != "better":
        floor = f"{table.best_floor[0]} ({plan.metric} {units.fixed(table.best_floor[1], table.decimals)})"
        above = [row for row in others if row.floor and row.floor.verdict == "better"]
        if above:
            said = "is worse than it" if best.floor.verdict == "worse" else "is not separable from it"
            return f"{_those(plan, table, above)} better than the floor {floor}; {best.variant} ({score}) {said}."
        if best.floor.verdict == "worse":
            return f"Use no variant here: the floor {floor} beats the best of them, {best.variant} ({score})."
        if most > 1:
            return (
                f"No variant has shown its worth here: the best, {best.variant} ({score}), "
                f"is not separable from the floor {floor}."
            )
    if len(finished) == 1:
        which = "The only variant" if len(table.rows) == 1 else "The only variant with a finished run"
        return f"{which}, {best.variant}, reaches {score}."
    if most == 1 and len({_score(plan, table, row) for row in finished}) == 1:
        return f"One seed cannot separate variants: all of them reach {score}; run at least three seeds."
    if most == 1:
        return f"One seed cannot separate variants: {best.variant} comes out first ({score}); run at least three seeds."
    return _recommendation(plan, table, best, others, score)


def _recommendation(plan: Plan, table: Table, best: Row, others: Sequence[Row], score: str) -> str:
    beaten, ahead = _separable(plan, best, others)
    if ahead:  # their failures keep them from being the answer, but not from being named
        rows = [row for row in others if row.variant in ahead]
        settle = "; settle the failed runs before you choose" if any(row.failed for row in rows) else ""
        return (
            f"{_those(plan, table, rows)} better than {best.variant} ({score}) in the seeds that both finished{settle}."
        )
    rivals = [row for row in others if row.variant not in beaten]
    if not rivals:
        return f"Use {best.variant} here: {score}, better than {_listing([row.variant for row in others])}."
    if beaten:
        lead = (
            f"Use {best.variant} here: {score}, better than {_listing([r.variant for r in others if r not in rivals])}"
        )
        if len(rivals) == 1:
            (rival,) = rivals
            time = f" and takes {_times(rival, best)} the time" if _timed(rival, best) else ""
            return f"{lead}; {rival.variant} is not separable from it{time}."
        priced = [
            f"{row.variant} ({_times(row, best)} its time)" if _timed(row, best) else row.variant for row in rivals
        ]
        return f"{lead}; {_listing(priced)} are not separable from it."
    lead = _undecided(plan, table, best, rivals, score)
    cheaper = [row for row in rivals if _timed(row, best) and _step_ms(row) < 0.95 * _step_ms(best)]
    if cheaper:
        cheapest = min(cheaper, key=_step_ms)
        return f"{lead}, {cheapest.variant} takes the least time ({_times(cheapest, best)} that of {best.variant})."
    if all(_timed(row, best) for row in rivals):
        return f"{lead}, and none takes clearly less time, so use {best.variant}."
    return f"{lead}."


def _undecided(plan: Plan, table: Table, best: Row, rivals: Sequence[Row], score: str) -> str:
    """Which variant comes first where it beats none, without denying what the table says of the baseline."""
    assert best.metric is not None
    sign = 1 if plan.better == "lower" else -1
    missed = [row for row in rivals if row.metric and sign * (row.metric.mean - best.metric.mean) < 0]
    first = "comes first in the seeds that are shared" if missed else "has the best mean"
    if any(row.failed for row in missed):
        first = "comes first of those that fail least"
    better = [row for row in rivals if row.baseline and row.baseline.verdict == "better"]
    if better:
        return (
            f"{best.variant} {first} ({score}), not separable from the others; "
            f"{_those(plan, table, better)} better than the baseline {plan.baseline}"
        )
    if any(row.baseline and row.baseline.verdict == "worse" for row in rivals):
        return f"{best.variant} {first} ({score}), not separable from any other"
    return f"The variants are not separable here: {best.variant} {first} ({score})"


def _separable(plan: Plan, best: Row, others: Sequence[Row]) -> tuple[set[str], set[str]]:
    """Labels that the best variant beats, and those that beat it in the seeds that both finished."""
    rows = [best, *others]
    pairs = {(a.variant, b.variant): paired_difference(a.values, b.values) for a, b in combinations(rows, 2)}
    adjusted = holm({pair: difference.p for pair, difference in pairs.items()})
    found: dict[str, set[str]] = {"better": set(), "worse": set(), "not separable": set()}
    for row in others:
        pair = (best.variant, row.variant)
        said = verdict(pairs[pair], adjusted[pair], plan.better)
        if best.variant == plan.baseline and row.baseline is not None:
            said = _OPPOSITE[row.baseline.verdict]
        elif row.variant == plan.baseline and best.baseline is not None:
            said = best.baseline.verdict
        found[said].add(row.variant)
    return found["better"], found["worse"]


_OPPOSITE: dict[Verdict, Verdict] = {"better": "worse", "worse": "better", "not separable": "not separable"}


def warnings(plan: Plan, table: Table) -> list[str]:
    """What a reader must know before believing the table, most important first."""
    found = []
    finished = [row for row in table.rows if row.metric]
    beats = [row.variant for row in finished if row.floor and row.floor.verdict == "better"]
    if table.best_floor and finished and not beats:
        name, value = table.best_floor
        floor = f"the best floor ({name}, {plan.metric} {units.fixed(value, table.decimals)})"
        if max(len(row.values) for row in finished) == 1:
            found.append(f"One seed cannot tell whether a variant beats {floor}.")
        else:
            found.append(f"No variant beats {floor} by more than seed noise.")
    if finished and not table.best_floor:
        found.append("There is no floor to compare with: the runs report none for this metric and part.")
    total = len(plan.seeds)
    missing = sum(len(row.missing) for row in table.rows)
    if missing and finished:
        found.append(f"{missing} of {total * len(table.rows)} runs have not run yet, so the answer may change.")
    found += [
        f"{row.variant}: {len(row.failed)} of {total} runs failed or went NaN; its mean leaves them out."
        for row in table.rows
        if row.failed
    ]
    if len(plan.seeds) < 3:
        found.append("Fewer than three seeds show little: use three or more before you believe a difference.")
    if not table.data_agree:
        found.append(
            "Runs report other data or floors than others: they did not see the same data; do not compare them."
        )
    if plan.jobs > 1:
        found.append(
            f"{plan.jobs} runs shared this machine, so step times, tokens/s and seconds are disturbed; "
            "compare them only from a comparison made with one job."
        )
    return found


def _score(plan: Plan, table: Table, row: Row) -> str:
    assert row.metric is not None
    mean = units.fixed(row.metric.mean, table.decimals)
    if row.metric.sd is None:
        return f"{plan.metric} {mean}"
    return f"{plan.metric} {mean} ± {units.fixed(row.metric.sd, table.decimals)} over {_seeds(row.metric.n)}"


def _those(plan: Plan, table: Table, rows: Sequence[Row]) -> str:
    """Rows with their scores and failed runs, and the verb."""
    told = []
    for row in rows:
        failed = f"; {len(row.failed)} of {len(plan.seeds)} runs failed or went NaN" if row.failed else ""
        told.append(f"{row.variant} ({_score(plan, table, row)}{failed})")
    return f"{_listing(told)} {'is' if len(rows) == 1 else 'are'}"


def _step_ms(row: Row) -> float:
    return row.cost["step_ms"] or math.inf


def _timed(row: Row, reference: Row) -> bool:
    return bool(row.cost["step_ms"] and reference.cost["step_ms"])


def _times(row: Row, reference: Row) -> str:
    return units.ratio(row.cost["step_ms"], reference.cost["step_ms"])


def _listing(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def overall(plan: Plan, tables: Sequence[Table]) -> str:
    """The answer over all settings: the one table's sentence, or which variant comes out first how often."""
    if len(tables) == 1:
        return tables[0].headline
    firsts = Counter(table.best for table in tables if table.best)
    if not firsts:
        return "No run has finished, so there is no answer yet."
    counts = [f"{label}'s in {times}" for label, times in firsts.most_common()]
    if len(firsts) == 1:
        named = f"{next(iter(firsts))}'s in all {len(tables)}"
    else:
        named = f"{_listing(counts)} of {len(tables)}"
    return f"The first place by {plan.metric} is {named} settings; each says below what is separable."
