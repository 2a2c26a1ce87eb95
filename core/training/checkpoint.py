"""Checkpoints: written so that a crash at any moment leaves a whole one, read so that a file cannot run code.

Writing is `durable.write_atomically`. Reading is `weights_only=True`, from local files, and every reason for refusing
one is told.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from core.training.durable import write_atomically
from core.training.errors import UserError

FORMAT = 1  # of the "longspan" record inside a checkpoint


class UnreadableCheckpoint(UserError):
    """A file that is not a checkpoint which can be loaded; the text says why."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writer and reader of checkpoints, atomic and without pickled objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `path`; `storage_options={"also": other}` makes `other` the same file, before `path` changes."""
        also = (storage_options or {}).get("also")
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file), also=also)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", **_: Any) -> dict[str, Any]:
        """Read a checkpoint of ours; what Lightning asks for beside the path cannot make it less strict."""
        return read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of Longspan on the CPU, as the plain dictionary that was saved.

    Raises:
        UnreadableCheckpoint: a URL, missing, empty, cut off, damaged, with pickled objects, or of another program.
    """
    if "://" in str(path):
        raise UnreadableCheckpoint(
            f"{path} is an address, and checkpoints are only read from local files: "
            "download it from a source that you trust, then give its path"
        )
    path = Path(path)
    if not path.is_file():
        raise UnreadableCheckpoint(f"there is no checkpoint {path}")
    if path.stat().st_size == 0:
        raise UnreadableCheckpoint(f"{path.name} is empty (0 bytes), probably cut off while written")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"
        what = "an old pickle file, which could run code when loaded" if pickled else "cut off or not a checkpoint"
        raise UnreadableCheckpoint(f"{path.name} ({path.stat().st_size} bytes) is {what}") from error
    if damaged:
        raise UnreadableCheckpoint(f"{path.name} is damaged (checksum of {damaged!r} does not fit)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, KeyError, ... for what it does not like
        words = " ".join(str(error).split())
        if "weights_only" in words or "WeightsUnpickler" in words or "Unsupported" in words:
            raise UnreadableCheckpoint(
                f"{path.name} holds pickled Python objects, which could run code when loaded; "
                "Longspan loads tensors and plain values only"
            ) from error
        raise UnreadableCheckpoint(f"{path.name} cannot be read: {words[:200]}") from error
    record = checkpoint.get("longspan") if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict):
        raise UnreadableCheckpoint(f"{path.name} is a torch file, but not one that Longspan wrote")
    if record.get("format") != FORMAT:
        raise UnreadableCheckpoint(
            f"{path.name} has format {record.get('format')}, this version of Longspan reads {FORMAT}"
        )
    return checkpoint


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest readable checkpoint of a run.

    Returns:
        Its path (None when the folder holds none at all, readable or not), its content, and a line for each file
        that was passed over.

    Raises:
        UserError: there are checkpoints, but none can be read.
    """
    skipped: list[str] = []
    newest: tuple[int, Path, dict[str, Any]] | None = None
    files = sorted(folder.glob("*.ckpt"))
    for path in files:
        try:
            checkpoint = read_checkpoint(path)
        except UnreadableCheckpoint as error:
            skipped.append(str(error))
            continue
        saves = checkpoint["longspan"]["saves"]
        if newest is None or saves > newest[0]:
            newest = (saves, path, checkpoint)
    if newest is None:
        if files:
            raise UserError(f"no checkpoint in {folder} can be read: {'; '.join(skipped)}")
        return None, {}, []
    return newest[1], newest[2], skipped
