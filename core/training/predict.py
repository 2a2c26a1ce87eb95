"""`predict`: the app's predictions for a user's file, from a run folder or a checkpoint file alone."""

from pathlib import Path

from core.training.errors import UserError
from core.training.run import load_run


def predict(run: str | Path, input: str | Path, output: str | Path) -> list[Path]:
    """Predict for a file.

    Args:
        run: run folder (its best epoch) or .ckpt file.
        input: the user's file, in the form that the app's README describes.
        output: file to write; its folder is made if needed.

    Returns:
        The files that were written.

    Raises:
        UserError: the input is missing, or cannot be what the run was trained on.
    """
    source, target = Path(input), Path(output)
    if not source.exists():
        raise UserError(f"there is no input file {str(input)!r}")
    loaded = load_run(run)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder of {str(output)!r}: {error.strerror}") from error
    return loaded.app.part("predict")(loaded, source, target)
