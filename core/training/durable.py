"""Files that are whole or not there, and folders that one process has at a time. No torch here.

Writing goes to a temporary file in the same folder, which is fsynced and then renamed over the old one; a rename is
all or nothing.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.training.errors import RunFailed, UserError


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """One process per folder; the lock goes with the process, however it ends.

    Raises:
        UserError: another process has it; the text is `refusal`.
    """
    if os.name != "posix":
        yield  # Windows has no flock; there the user keeps two processes apart
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        yield


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def temporary_name(path: Path) -> Path:
    """Where the new content of `path` waits until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a process that was killed while it wrote, and no other hidden file."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink()


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
    temporary = temporary_name(path)
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
    temporary = temporary_name(name)
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
