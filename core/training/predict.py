"""`predict` and `inspect`: what an app makes of a user's file, from a run folder or a checkpoint file alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

from core.training.errors import UserError
from core.training.ledger import PLAN, file_names, read_plan, read_runs
from core.training.run import LoadedRun, load_run


def predict(run: str | Path, input: str | Path, output: str | Path, overrides: Sequence[str] = ()) -> list[Path]:
    """Predict for a file.

    Args:
        run: run folder (its best epoch) or .ckpt file.
        input: the user's file, in the form that the app's README describes.
        output: file to write; its folder is made if needed.
        overrides: "predict.key=value", settings of the recipe's section `predict`.

    Returns:
        The files that were written.

    Raises:
        UserError: the input is missing, or cannot be what the run was trained on; or the output is the input, or a
            folder where a file is wanted.
    """
    return _ask(run, input, output, overrides, lambda loaded: loaded.app.part("predict"))


def inspect(run: str | Path, input: str | Path, output: str | Path, overrides: Sequence[str] = ()) -> list[Path]:
    """Look inside a run while it reads a file: attention maps, saliency, whatever the app's README names.

    Args and errors as for `predict`; `output` is a folder. An app may have nothing to show, which is an error.
    `run` may also be the folder of a comparison: then every variant gets a folder below `output` (the run of its first
    seed that is there), and an app that can draw them side by side does.
    """
    if (Path(run) / PLAN).is_file():
        return _inspect_all(Path(run), input, Path(output), overrides)

    def part(loaded: LoadedRun) -> Callable:
        if loaded.app.inspect is None:
            raise UserError(f"the app {loaded.app.name!r} has nothing to inspect")
        if Path(output).is_file():
            raise UserError(f"--output {output} is a file; a folder is wanted")
        Path(output).mkdir(parents=True, exist_ok=True)
        return loaded.app.part("inspect")

    return _ask(run, input, output, overrides, part)


def _inspect_all(folder: Path, input: str | Path, output: Path, overrides: Sequence[str]) -> list[Path]:
    runs = _runs_of(folder, overrides)
    files = []
    for name, run in zip(file_names(list(runs)), runs.values()):
        files += inspect(run.run_dir, input, output / name, overrides)
    app = next(iter(runs.values())).app
    if app.side_by_side is not None:
        files += app.part("side_by_side")(runs, Path(input), output)
    return files


def _runs_of(folder: Path, overrides: Sequence[str]) -> dict[str, LoadedRun]:
    """One finished run of every variant (and setting) of a comparison, by its label."""
    plan = read_plan(folder)
    assert plan is not None
    runs, chosen = read_runs(folder), {}
    for key in plan.planned():
        if key in runs and runs[key].status == "ok":
            chosen.setdefault(" ".join([key[1], *key[0]]), folder / runs[key].run_dir)
    if not chosen:
        raise UserError(f"{folder} holds no finished run yet; continue it with: {plan.command}")
    return {label: load_run(path, overrides) for label, path in chosen.items()}


def _ask(
    run: str | Path,
    input: str | Path,
    output: str | Path,
    overrides: Sequence[str],
    part: Callable[[LoadedRun], Callable[[LoadedRun, Path, Path], list[Path]]],
) -> list[Path]:
    source, target = Path(input), Path(output)
    if not source.exists():
        raise UserError(f"there is no input file {str(input)!r}")
    if target.exists() and target.samefile(source):
        raise UserError(f"--output {output} is the input itself, which would be lost; choose another name")
    loaded = load_run(run, overrides)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        function = part(loaded)
    except OSError as error:
        raise UserError(f"cannot make the folder of {str(output)!r}: {error.strerror}") from error
    try:
        return function(loaded, source, target)
    except IsADirectoryError as error:
        raise UserError(f"--output {error.filename or output} is a folder; a file is wanted") from error
