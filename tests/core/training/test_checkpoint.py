"""Files that are whole or not there, and checkpoints that cannot run code."""

import os
import pickle
import zipfile

import pytest
import torch

from core.training.checkpoint import (
    UnreadableCheckpoint,
    newest_checkpoint,
    read_checkpoint,
)
from core.training.durable import remove_leftovers, write_atomically
from core.training.errors import RunFailed, UserError


def save(path, saves=1, **more):
    checkpoint = {"longspan": {"format": 1, "saves": saves}, "weight": torch.arange(1000.0), **more}
    write_atomically(path, lambda file: torch.save(checkpoint, file))
    return path


def test_what_is_written_is_read(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path / "a.ckpt", saves=7))
    assert checkpoint["longspan"]["saves"] == 7
    assert torch.equal(checkpoint["weight"], torch.arange(1000.0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(when, tmp_path, monkeypatch):
    path = save(tmp_path / "a.ckpt", saves=1)
    before = path.read_bytes()

    def broken(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, when, broken)
        with pytest.raises(
            RunFailed, match=r"cannot write .*a.ckpt: Input/output error; what was saved before is intact"
        ):
            save(path, saves=2)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"], "the temporary file is gone"


def test_the_order_is_write_sync_rename_sync(tmp_path, monkeypatch):
    done = []
    for name in ("write", "fsync", "replace", "link"):
        real = getattr(os, name)

        def noted(*args, name=name, real=real):
            if name != "write" or done[-1:] != ["write"]:
                done.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, noted)
    save(tmp_path / "a.ckpt")
    assert done == ["write", "fsync", "replace", "fsync"]
    done.clear()
    write_atomically(tmp_path / "a.ckpt", lambda file: file.write(b"x"), also=tmp_path / "b.ckpt")
    assert done == ["write", "fsync", "link", "replace", "replace", "fsync"]


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_is_the_same_file_and_stays_when_the_first_moves_on(links, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    last, best = tmp_path / "last", tmp_path / "best"
    write_atomically(last, lambda file: file.write(b"one"), also=best)
    assert last.read_bytes() == best.read_bytes() == b"one"
    assert last.samefile(best) == links
    write_atomically(last, lambda file: file.write(b"two"))
    assert (last.read_bytes(), best.read_bytes()) == (b"two", b"one")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def old_pickle(path):
    path.write_bytes(pickle.dumps(Evil()))


def zip_of_pickle(path):
    torch.save({"longspan": {"format": 1, "saves": 9}, "x": Evil()}, path)


def half(path):
    save(path)
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    save(path)
    with zipfile.ZipFile(path) as archive:
        data = max(archive.infolist(), key=lambda item: item.file_size)
    content = bytearray(path.read_bytes())
    content[data.header_offset + 1000] ^= 1
    path.write_bytes(content)


def later_format(path):
    torch.save({"longspan": {"format": 2, "saves": 9}}, path)


BROKEN = [
    (old_pickle, r"x.ckpt \(\d+ bytes\) is an old pickle file, which could run code when loaded"),
    (zip_of_pickle, "x.ckpt holds pickled Python objects, which could run code when loaded"),
    (half, r"x.ckpt \(\d+ bytes\) is cut off or not a checkpoint"),
    (flipped, r"x.ckpt is damaged \(checksum of '.*' does not fit\)"),
    (lambda path: path.write_bytes(b""), r"x.ckpt is empty \(0 bytes\), probably cut off while written"),
    (lambda path: path.write_text("hello"), "is cut off or not a checkpoint"),
    (lambda path: torch.save(torch.zeros(3), path), "x.ckpt is a torch file, but not one that Longspan wrote"),
    (lambda path: torch.save({"state_dict": {}}, path), "x.ckpt is a torch file, but not one that Longspan wrote"),
    (later_format, "x.ckpt has format 2, this version of Longspan reads 1"),
    (lambda path: path.mkdir(), "there is no checkpoint"),
]


@pytest.mark.parametrize(("spoil", "told"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_what_cannot_be_trusted_is_refused_with_the_reason(spoil, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.ckpt"
    spoil(path)
    with pytest.raises(UnreadableCheckpoint, match=told):
        read_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("address", ["https://example.org/a.ckpt", "s3://bucket/a.ckpt", "hf://who/what"])
def test_an_address_is_never_fetched(address):
    with pytest.raises(UnreadableCheckpoint, match="is an address, and checkpoints are only read from local files"):
        read_checkpoint(address)


def test_the_newest_readable_one_is_taken_and_the_others_are_named(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, {}, [])
    save(tmp_path / "best.ckpt", saves=3)
    save(tmp_path / "last.ckpt", saves=5)
    os.utime(tmp_path / "last.ckpt", (0, 0))  # what the clock said is not what counts
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "last.ckpt"
    half(tmp_path / "last.ckpt")
    path, checkpoint, skipped = newest_checkpoint(tmp_path)
    assert (path, checkpoint["longspan"]["saves"]) == (tmp_path / "best.ckpt", 3)
    assert len(skipped) == 1
    assert skipped[0].startswith("last.ckpt (")
    old_pickle(tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"can be read: best.ckpt .* is an old pickle file.*; last.ckpt .* is cut off"):
        newest_checkpoint(tmp_path)


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    save(tmp_path / "last.ckpt")
    (tmp_path / ".last.ckpt.123.tmp").write_bytes(b"half")
    (tmp_path / ".notes.tmp").write_text("of another program")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.tmp", "last.ckpt"]
