"""Runs of a comparison as processes: started side by side, watched, stopped cleanly, and read when they end.

A run is its own process so that nothing of one run (caches, random state, memory, a crash) reaches the next.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.training.errors import Interrupted, UserError
from core.training.interrupt import Stop
from core.training.ledger import Run, Status

POLL_S = 0.1
GRACE_S = 60.0  # a run that is told to stop writes a checkpoint first
USAGE = 2  # the exit code of a command that was asked for something impossible


@dataclass(frozen=True)
class Job:
    """One run to be made.

    Attributes:
        recipe: file of the resolved recipe, relative to the compare folder as `run_dir` is.
        overrides: what turns the recipe that the user named into this run; kept for the record.
        floors: whether this run computes the floors.
        threads: of the CPU; None: as many as it likes.
    """

    recipe: str
    variant: str
    seed: int
    overrides: tuple[str, ...]
    run_dir: str
    metric: str
    setting: tuple[str, ...] = ()
    floors: bool = True
    threads: int | None = None

    def command(self, folder: Path) -> list[str]:
        """The process to start; `--resume` continues what an interrupted comparison left."""
        words = [sys.executable, "-m", "apps", "fit", str(folder / self.recipe), f"seed={self.seed}"]
        if self.threads is not None:
            words.append(f"trainer.threads={self.threads}")
        words += ["--run-dir", str(folder / self.run_dir), "--resume"]
        return words if self.floors else [*words, "--no-floors"]


@dataclass
class Worker:
    """A job while its process runs."""

    job: Job
    process: subprocess.Popen
    slot: int
    output: Path
    fresh: bool
    started: float = field(default_factory=time.monotonic)


Start = Callable[[Job, Path, int], Worker]


def start(job: Job, folder: Path, slot: int) -> Worker:
    """Start the process of a job; what it prints goes to a file beside its run folder.

    The process gets its own session, so that Ctrl-C in the terminal reaches compare alone, which then tells the runs.
    """
    run_dir = folder / job.run_dir
    fresh = not run_dir.exists()
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    output = run_dir.with_name(f"{run_dir.name}.out.txt")
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            job.command(folder),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(job, slot),
            start_new_session=True,
        )
    return Worker(job, process, slot, output, fresh)


def work(
    jobs: Iterable[Job],
    folder: Path,
    *,
    side_by_side: int,
    stop: Stop,
    record: Callable[[Run], None],
    watch: Callable[[Sequence[Worker]], None],
    start: Start = start,
) -> None:
    """Make all runs, at most `side_by_side` at a time, and hand each one to `record` as it ends.

    Args:
        jobs: asked for one after the other, each only when there is a place for it.
        folder: the compare folder.
        side_by_side: number of places.
        stop: says when a signal came.
        record: writes the run down.
        watch: called several times a second with what runs now.
        start: how a job becomes a process.

    Raises:
        Interrupted: after all running processes have been told to stop and have stopped.
        UserError: a run could not even begin and none has succeeded so far, so the request itself is wrong.
    """
    waiting = iter(jobs)
    running: list[Worker] = []
    succeeded = False
    more = True
    try:
        while running or more:
            stop.check()
            while more and len(running) < side_by_side:
                job = next(waiting, None)
                if job is None:
                    more = False
                    break
                taken = {worker.slot for worker in running}
                running.append(start(job, folder, next(slot for slot in range(side_by_side) if slot not in taken)))
            for worker in [worker for worker in running if worker.process.poll() is not None]:
                running.remove(worker)
                run = outcome(worker, folder)
                if worker.process.returncode == USAGE:
                    _clear(worker, folder)
                    if not succeeded:
                        raise UserError(f"{run.variant}, seed {run.seed}: {run.error}")
                succeeded = succeeded or run.status == "ok"
                record(run)
            watch(running)
            if running:
                time.sleep(POLL_S)
    finally:
        _end(running)


def outcome(worker: Worker, folder: Path) -> Run:
    """What a process that has ended left: its metrics, or the one-line reason why there are none."""
    job, code = worker.job, worker.process.returncode
    run_dir = folder / job.run_dir
    metrics = _json(run_dir / "metrics.json") if code == 0 else {}
    failure = _json(run_dir / "failure.json") if code != 0 else {}
    status: Status
    if code == 0:
        status, error = _judge(metrics, job.metric)
    else:
        status = "nan" if failure.get("status") == "nan" else "failed"
        error = failure.get("error") or _reason(code, worker.output)
    if status == "ok":
        worker.output.unlink(missing_ok=True)
    return Run(
        variant=job.variant,
        seed=job.seed,
        overrides=job.overrides,
        status=status,
        error=error,
        metrics={part: values for part, values in metrics.items() if part != "cost"},
        cost=metrics.get("cost", {}),
        seconds=round(time.monotonic() - worker.started, 3),
        run_dir=job.run_dir,
        setting=job.setting,
        data=_fingerprint(_json(run_dir / "data.json")),
    )


def _fingerprint(summary: dict[str, Any]) -> str | None:
    """A short text that is the same for runs that read the same data; None where a run said nothing of it."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [rounded(inner) for inner in value]
        return f"{value:.6g}" if isinstance(value, float) else value  # the last digits depend on the threads

    text = json.dumps(rounded(summary), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if summary else None


def places(side_by_side: int, cores: int) -> int | None:
    """CPU threads for each of several runs; None for a run that has the machine to itself."""
    return None if side_by_side == 1 else max(1, cores // side_by_side)


def _judge(metrics: dict[str, Any], metric: str) -> tuple[Status, str | None]:
    values = [part[metric] for name in ("test", "val") if metric in (part := metrics.get(name) or {})]
    if not values:
        return "failed", f"the run ended well but its metrics.json has no {metric}"
    if any(value is None or not math.isfinite(value) for value in values):
        return "nan", f"{metric} is not finite"
    return "ok", None


def _reason(code: int, output: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory: fewer jobs or a smaller trainer.batch_size" if code == -9 else ""
        return f"ended by {name}{hint}"
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("longspan: ") if lines else f"ended with exit code {code} and no message"


def _environment(job: Job, slot: int) -> dict[str, str]:
    """The environment of a process: the same program, its share of the threads, one of several GPUs."""
    # A folder called `apps` or `core` in the working directory must not come before ours.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file():  # a source tree, which need not be the one that is installed
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    if job.threads is None:
        return environment
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(job.threads)
    devices = _gpus()
    if len(devices) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment


def _gpus() -> list[str]:
    """Names of the GPUs that runs may use, asked for without loading torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    found = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(found.iterdir())))] if found.is_dir() else []


def _clear(worker: Worker, folder: Path) -> None:
    """Remove the folder that a run made before it was refused, so that a corrected request finds a free place."""
    if worker.fresh:
        shutil.rmtree(folder / worker.job.run_dir, ignore_errors=True)


def _end(running: Sequence[Worker]) -> None:
    """Tell the runs to stop and wait for their checkpoints; a second Ctrl-C, or `GRACE_S`, ends them at once."""
    for worker in running:
        worker.process.terminate()
    deadline = time.monotonic() + GRACE_S
    try:
        for worker in running:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, Interrupted):
        pass
    finally:
        for worker in running:
            if worker.process.poll() is None:
                _kill(worker)


def _kill(worker: Worker) -> None:
    try:
        os.killpg(worker.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself in the meantime
    worker.process.wait()


def _json(path: Path) -> dict[str, Any]:
    """The object in a run's file; empty where there is none or a crash left half of it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
