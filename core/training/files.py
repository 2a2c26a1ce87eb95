"""Where a recipe's files are: the path that the user gives, else a public file below the folder LONGSPAN_DATA."""

import os
from pathlib import Path

from core.attention.registry import nearest
from core.training.errors import UserError


def find_file(
    given: str | None, *, app: str, public: str | None = None, origin: str | None = None, key: str = "data.path"
) -> Path:
    """The file or folder that a recipe means.

    Args:
        given: path from the user; it wins.
        app: name of the app; public files may lie in a folder of this name.
        public: relative path of a public file or folder, looked for below LONGSPAN_DATA/<app>, LONGSPAN_DATA, and by
            its bare name in LONGSPAN_DATA.
        origin: where the public file can be had, for the error message.
        key: the recipe key that names `given`.

    Raises:
        UserError: nothing is given, or it is not on this machine; the text says where to get a public file.
    """
    if given is not None:
        path = Path(given).expanduser()
        if path.is_symlink() and not path.exists():
            raise UserError(f"{key}: {given!r} is a link to {str(path.readlink())!r}, which is not there")
        if not path.exists():
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"{key}: there is no file {given!r}{nearest(path.name, beside)}")
        return path
    if public is None:
        raise UserError(f"{key} is missing: name your file, as in {key}=FILE")
    folder = os.environ.get("LONGSPAN_DATA")
    if folder:
        for below in (Path(app) / public, Path(public), Path(Path(public).name)):
            if (Path(folder) / below).exists():
                return Path(folder) / below
    where = f"not in LONGSPAN_DATA={folder}" if folder else "LONGSPAN_DATA is not set"
    source = f"; get it from {origin}" if origin else ""
    raise UserError(f"{public} is not here ({where}): say {key}=FILE{source}")
