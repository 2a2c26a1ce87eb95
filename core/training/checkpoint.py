"""Checkpoints: written so that a crash at any moment leaves a whole one, read so that a file cannot run code.

Writing goes to a temporary file in the same folder, which is fsynced and then renamed over the old one; a rename is
all or nothing. Reading is `weights_only=True`, from local files, and every reason for refusing one is told.
"""

import contextlib
import errno
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from core.training.errors import RunFailed, UserError

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


class _Sink:
    """A binary file over a descriptor that remembers why writing failed (torch wraps the reason in its own error)."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as error:
            self.error = error
            raise
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing is buffered here."""


def write_atomically(path: Path, write: Callable[[Any], Any], *, also: Path | None = None) -> None:
    """Let `write(file)` fill a temporary file, make it durable, and put it in the place of `path`.

    Args:
        path: the file to replace; at every moment it is either the old one or the new one, whole.
        write: gets an object with `write(bytes)`.
        also: a second name for the new file, put in place first.

    Raises:
        RunFailed: the disk is full or failing; the old files are untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    sink = _Sink(descriptor)
    try:
        try:
            write(sink)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if also is not None:
            _second_name(temporary, also)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        reason = sink.error or (error if isinstance(error, OSError) else None)
        if reason is None:
            raise
        raise RunFailed(_disk_line(path, reason)) from error


def _disk_line(path: Path, reason: OSError) -> str:
    if reason.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free / 2**20
        return (
            f"no space left on the disk while writing {path} ({free:.0f} MiB free); "
            "what was saved before is intact: make room and continue with --resume"
        )
    return f"cannot write {path}: {reason.strerror or reason}; what was saved before is intact"


def _second_name(file: Path, name: Path) -> None:
    """Make `name` the same file; a copy where the file system has no hard links."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(file, temporary)
    except OSError:
        shutil.copyfile(file, temporary)
        with temporary.open("rb") as copy:
            os.fsync(copy.fileno())
    os.replace(temporary, name)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; Windows cannot open folders and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a process that was killed while it wrote."""
    for path in folder.glob(".*.tmp"):
        path.unlink()
