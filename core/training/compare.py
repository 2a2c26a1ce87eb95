"""`compare`: the same recipe with several attentions and seeds, and an honest answer to which one to use.

Every run is a process of its own with the same data order and budget; nothing but the attention differs, which is
checked on the resolved recipes before the first run starts. The runs read those, written to recipes/, so that editing
the original in the meantime changes nothing. What is finished stays: started again with the same
folder, compare makes the runs that are missing, tries failed ones once more, and writes the report anew. A run that
went NaN is a result (the same seed would end the same way); delete its folder and its line in runs.jsonl to try again.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from core.training.differences import differing, flat, harmless
from core.training.durable import locked, write_text
from core.training.errors import Interrupted, UserError
from core.training.interrupt import Stop
from core.training.ledger import Key, Plan, Run, append_run, file_names, read_plan, read_runs, write_plan
from core.training.plan import attention_overrides, command_of, flow, make_plan
from core.training.progress import Board
from core.training.report import load_summary, report, write_report
from core.training.summary import Summary
from core.training.workers import Job, Start, start, work
from core.training.yaml_values import write_yaml

__all__ = ["CompareResult", "compare", "report"]


@dataclass(frozen=True)
class CompareResult:
    """What `compare` returns: the folder, the numbers and words, and the files of the report."""

    run_dir: Path
    summary: Summary
    files: list[Path]

    @property
    def failures(self) -> list[Run]:
        """Runs that failed or went NaN."""
        return self.summary.failures


def compare(
    recipe_ref: str | Path,
    *,
    variants: Sequence[str],
    seeds: int | Sequence[int] = 3,
    jobs: int = 1,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    baseline: str | None = None,
    grid: Sequence[str] = (),
    quiet: bool | None = None,
    start: Start = start,
) -> CompareResult:
    """Run a recipe with several attentions and seeds and report what the runs tell.

    Args:
        recipe_ref: "app/name" or the path of a YAML file.
        variants: names, with options after colons where wanted ("hybrid:window=16:feature_map=taylor"); "recipe" is
            the recipe's own attention as it stands.
        seeds: how many (0, 1, 2, ...), or which.
        jobs: runs side by side; more than one disturbs the measured times, and the report says so.
        run_dir: the folder; None: runs/compare-<app>-<recipe>-<time>. One with finished runs is continued.
        overrides: "key=value" of all runs.
        baseline: the variant that the others are compared with; None: the first, and where a comparison is continued
            the one that it has.
        grid: "key=value,value" whose values are compared one beside the other; several give all combinations.
        quiet: no progress on the terminal; None: quiet unless stderr is a terminal.
        start: how a job becomes a process; tests put their own here.

    Raises:
        UserError: the request cannot be met; the text says what would be right.
        Interrupted: Ctrl-C or SIGTERM; running processes have saved a checkpoint, the report shows what is finished.
    """
    plan = make_plan(
        recipe_ref, variants=variants, seeds=seeds, jobs=jobs, overrides=overrides, baseline=baseline, grid=grid
    )
    asked = plan.planned()
    stem = Path(str(recipe_ref)).stem
    folder = Path(run_dir) if run_dir is not None else Path("runs") / f"compare-{plan.app}-{stem}-{_stamp()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the compare folder {folder}: {error.strerror}") from error
    stop = Stop()
    stop.deferring = True
    with locked(folder, f"another compare is running in {folder}"), stop.watching():
        plan = _continue(folder, plan, keep_baseline=baseline is None)
        plan = replace(plan, command=f"{command_of(plan)} --run-dir {shlex.quote(str(folder))}")
        write_plan(folder, plan)
        _freeze(folder, plan)
        runs = read_runs(folder)
        with Board(quiet, plan, total=len(asked), epochs=plan.configs[0]["trainer"]["epochs"], folder=folder) as board:

            def record(run: Run) -> None:
                append_run(folder, run)
                runs[run.key] = run
                board.finished(run)

            for run in (runs[key] for key in asked if _is_done(runs.get(key))):
                board.finished(run)
            missing = [key for key in asked if not _is_done(runs.get(key))]
            try:
                queue = _jobs(plan, missing, runs)
                work(queue, folder, side_by_side=jobs, stop=stop, record=record, watch=board.watch, start=start)
            except Interrupted as error:
                write_report(folder, load_summary(folder))
                done = sum(_is_done(runs.get(key)) for key in asked)
                raise Interrupted(
                    error.signum, f"stopped; {done} of {len(asked)} runs are finished, continue with: {plan.command}"
                ) from error
        summary = load_summary(folder)
        return CompareResult(folder, summary, write_report(folder, summary))


def _continue(folder: Path, plan: Plan, *, keep_baseline: bool) -> Plan:
    """The plan joined with the one that the folder already has, which must be the same question with other runs."""
    old = read_plan(folder)
    if old is None or not read_runs(folder):
        return plan
    configs = dict(zip(old.settings, old.configs))
    if old.app != plan.app or configs.keys().isdisjoint(plan.settings):
        raise UserError(f"{folder} holds another comparison ({old.command}); choose another --run-dir")
    for setting, config in zip(plan.settings, plan.configs):
        for key in differing(configs.get(setting, config), config):
            if harmless(key):
                continue
            there, here = (flat(side).get(key) for side in (configs[setting], config))
            raise UserError(
                f"{folder} holds a comparison with {key}={there!r}, now it is {here!r}; "
                "continue with the same recipe, or choose another --run-dir"
            )
    for label in old.variants.keys() & plan.variants.keys():
        there, here = old.variants[label], plan.variants[label]
        if there != here:
            raise UserError(
                f"{folder} holds a comparison where {label} is {flow(there)}, now it is {flow(here)}; "
                "choose another --run-dir"
            )
    configs |= dict(zip(plan.settings, plan.configs))
    return replace(
        plan,
        baseline=old.baseline if keep_baseline else plan.baseline,
        variants=old.variants | plan.variants,
        seeds=tuple(sorted({*old.seeds, *plan.seeds})),
        settings=tuple(configs),
        configs=tuple(configs.values()),
        jobs=max(old.jobs, plan.jobs),  # the disturbed times of earlier runs are still in the report
    )


def _freeze(folder: Path, plan: Plan) -> None:
    """Write the recipe of every variant as it was checked; the runs add the seed."""
    (folder / "recipes").mkdir(exist_ok=True)
    files = _recipe_files(plan)
    for setting, config in zip(plan.settings, plan.configs):
        for label, attention in plan.variants.items():
            chosen = {key: value for key, value in attention.items() if key != "layout"}
            backbone = {**config["backbone"], "layout": attention.get("layout")}
            frozen = {**config, "backbone": backbone, "attention": chosen}
            write_text(folder / files[setting, label], write_yaml(frozen))


def _recipe_files(plan: Plan) -> dict[tuple[tuple[str, ...], str], str]:
    asked = [(setting, label) for setting in plan.settings for label in plan.variants]
    names = file_names([" ".join([*setting, label]) for setting, label in asked])
    return {pair: f"recipes/{name}.yaml" for pair, name in zip(asked, names)}


def _is_done(run: Run | None) -> bool:
    return run is not None and run.status in ("ok", "nan")


def _jobs(plan: Plan, keys: Sequence[Key], runs: dict[Key, Run]) -> Iterator[Job]:
    """One job after the other; floors go with the first run of each setting, as they depend on the data alone."""
    asked: set[tuple[str, ...]] = set()
    files = _recipe_files(plan)
    settings = dict(zip(plan.settings, file_names([" ".join(setting) for setting in plan.settings])))
    labels = dict(zip(plan.variants, file_names(list(plan.variants))))
    own = {setting: config["trainer"]["threads"] for setting, config in zip(plan.settings, plan.configs)}
    for setting, label, seed in keys:
        known = any(run.metrics.get("floors") for run in runs.values() if run.setting == setting)
        failed = any(run.status != "ok" for run in runs.values() if run.setting == setting)
        floors = not known and (setting not in asked or failed)
        asked.add(setting)
        yield Job(
            recipe=files[setting, label],
            variant=label,
            seed=seed,
            overrides=(*plan.overrides, *setting, *attention_overrides(label), f"seed={seed}"),
            run_dir="/".join([*([settings[setting]] if setting else []), labels[label], f"seed-{seed}"]),
            metric=plan.metric,
            setting=setting,
            floors=floors,
            threads=plan.threads and (own[setting] or plan.threads),
        )


def _stamp() -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}"
