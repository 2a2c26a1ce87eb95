"""Which images there are: class folders, split folders, lists, tables, archives, image and mask folders, the hub."""

import logging
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from apps.vision.images import SUFFIXES, BrokenImage
from apps.vision.recipe import DataSection
from core.attention.registry import nearest
from core.training.errors import UserError
from core.training.hub import HUB, names_split, splits
from core.training.rows import Row, read_rows

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}


@dataclass
class Item:
    """One image before it is read.

    name: how it is called in messages and in the table of predictions.   image, mask: what `Store.read` takes.
    where: the row of a table that names it, or "".
    label: name of its class, names of its classes, boxes (class, left, top, right, bottom) in pixels, or None.
    part: train, val, test, or "" where the shares decide.   shape: rows and columns as they were read, upright.
    """

    name: str
    image: Any
    label: Any = None
    mask: Any = None
    part: str = ""
    shape: tuple[int, int] | None = None
    where: str = ""

    def told(self) -> str:
        """How messages call it: by the row that names it, too."""
        return f"{self.name} ({self.where})" if self.where and self.where != self.name else self.name


@dataclass
class Found:
    """All items, where they are read from, and what was noticed on the way."""

    store: "Store"
    items: list[Item]
    notes: dict[str, Any] = field(default_factory=dict)


class Store:
    """Files below a folder by their relative names."""

    def __init__(self, root: Path):
        self.root = root

    def names(self) -> list[str]:
        """All files that may be images, sorted; hidden ones are left out, folders that are links are followed."""
        found: list[str] = []
        above = {str(self.root): {os.path.realpath(self.root)}}
        for place, folders, files in os.walk(self.root, followlinks=True):
            # A link back to a folder above would lead round in circles; two links to one folder are two classes.
            chain = above.pop(place)
            targets = {f: os.path.realpath(Path(place, f)) for f in sorted(folders) if f[0] != "."}
            folders[:] = [f for f, target in targets.items() if target not in chain]
            above |= {os.path.join(place, f): chain | {targets[f]} for f in folders}
            below = PurePosixPath(*Path(place).relative_to(self.root).parts)
            found += [str(below / file) for file in files if file[0] != "." and Path(file).suffix.lower() in SUFFIXES]
        return sorted(found)

    def read(self, image: Any) -> Any:
        """What `read_image` takes: a path, or an image that a table held."""
        if isinstance(image, str):
            return self.root / image
        if isinstance(image, dict) and (image.get("bytes") or image.get("path")):  # the hub's undecoded form
            return image.get("bytes") or self.root / image["path"]
        if not image:
            raise BrokenImage("the cell is empty")
        return image


class Archive(Store):
    """The same of a .tar(.gz) or .zip file, whose images are held in memory."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.content: dict[str, bytes] = {}
        try:
            for name, data in _members(path):
                clean = str(PurePosixPath(name))
                if PurePosixPath(clean).suffix.lower() in SUFFIXES and not PurePosixPath(clean).name.startswith("."):
                    self.content[clean] = data
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise UserError(f"{path}: not a whole archive ({error})") from error

    def names(self) -> list[str]:
        """All files that may be images, sorted."""
        return sorted(self.content)

    def read(self, image: Any) -> Any:
        """The content of a file, or an image that a table held."""
        return self.content[image] if isinstance(image, str) else super().read(image)


def _members(path: Path) -> Iterable[tuple[str, bytes]]:
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            yield from ((name, archive.read(name)) for name in archive.namelist() if not name.endswith("/"))
        return
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()


def find_items(path: Path | str, options: DataSection, task: str) -> Found:
    """Every image of a recipe's data with its class or mask and its part.

    Args:
        path: folder, archive, table, or "hub:..." address.

    Raises:
        UserError: nothing is found, a mask is missing, a list or table names what is not there.
    """
    text = str(path)
    if options.boxes is not None and not Path(path).is_dir():
        raise UserError(f"{path}: data.boxes go with a folder of images")
    if Path(path).suffix.lower() in SUFFIXES and Path(path).is_file():
        raise UserError(f"{path} is one image; data.path is a folder of class folders, an archive of it, or a table")
    if text.startswith(HUB) or (Path(path).is_file() and not _is_archive(Path(path))):
        return _from_table(path, options, task)
    path = Path(path)
    empty = [] if path.is_file() or options.masks or options.boxes else _without_images(path, options)
    notes = {"without_images": empty} if empty else {}
    store = Archive(path) if path.is_file() else Store(path)
    names = store.names()
    if not names:
        raise UserError(f"{path}: no images; known suffixes: {' '.join(SUFFIXES)}")
    if options.boxes is not None:
        from apps.vision.boxes import items_with_boxes

        items = items_with_boxes(names, options, path)
    else:
        items = (_with_classes if options.masks is None else _with_masks)(names, options, path)
    found = Found(store, items, notes)
    if options.lists is not None:
        _apply_lists(found, options.lists, path if path.is_dir() else path.parent)
    return found


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() in (".zip", ".tar", ".tgz") or path.name.lower().endswith(
        (".tar.gz", ".tar.bz2", ".tar.xz")
    )


def _with_classes(names: list[str], options: DataSection, path: Path) -> list[Item]:
    """Items whose class is the name of their folder."""
    items = []
    wanted = options.images.strip("/")
    places = {part: PurePosixPath(wanted.replace("PART", part)).parts for part in PARTS} if wanted else {}
    tops = {name.split("/")[0].lower() for name in names}
    # train/ and a second part make split folders; a class that is called train does not.
    split = (
        not wanted and "train" in {_alias(top) for top in tops} and len({_alias(top) for top in tops} & set(PARTS)) > 1
    )
    for name in names:
        parts, part = PurePosixPath(name).parts, ""
        if wanted:
            match = next((p for p, place in places.items() if parts[: len(place)] == place), None)
            if match is None:
                continue
            parts, part = parts[len(places[match]) :], match if "PART" in wanted else ""
        elif split:
            part = _alias(parts[0].lower()) or ""
            if part not in PARTS:
                continue
            parts = parts[1:]
        if len(parts) >= 2:
            items.append(Item(name, name, label=parts[0], part=part))
    if not items:
        where = f"{path}/{wanted}" if wanted else str(path)
        raise UserError(f"{where}: no class folders with images (class/image.jpg); {len(names)} images lie elsewhere")
    return items


def _alias(name: str) -> str | None:
    return next((part for part, names in ALIASES.items() if name in names), None)


def _with_masks(names: list[str], options: DataSection, path: Path) -> list[Item]:
    """Items whose mask has the same name, whatever its suffix, in the folder of the masks."""
    given, masks = options.images.strip("/") or "images", (options.masks or "").strip("/")
    by_stem: dict[tuple[str, ...], str] = {PurePosixPath(name).with_suffix("").parts: name for name in names}
    split = "PART" in given or "PART" in masks
    items, missing = [], []
    for part in PARTS if split else ("",):
        folder, beside = (PurePosixPath(one.replace("PART", part)).parts for one in (given, masks))
        for name in names:
            parts = PurePosixPath(name).parts
            if parts[: len(folder)] != folder or parts[: len(beside)] == beside:
                continue
            mask = by_stem.get((*beside, *PurePosixPath(*parts[len(folder) :]).with_suffix("").parts))
            if mask is None:
                missing.append(name)
            else:
                items.append(Item(name, name, mask=mask, part=part))
    if missing:
        raise UserError(
            f"{path}: {len(missing)} images have no mask of the same name in {masks}, the first is {missing[0]}"
        )
    if not items:
        folders = sorted({str(PurePosixPath(name).parent) for name in names})
        raise UserError(
            f"{path}: no images in {given}{nearest(given, folders)}; folders with images: {', '.join(folders[:8])}"
        )
    return items


def _apply_lists(found: Found, lists: Mapping[Any, str], root: Path) -> None:
    """Keep the items that the lists name, in the part whose list it is; what they name beyond that is counted."""
    names, full = {}, {}
    for item in found.items:
        for key in {PurePosixPath(item.name).name, PurePosixPath(item.name).stem}:  # VOC's lists have no suffix
            names.setdefault(key, []).append(item)
        full[item.name] = item
    part_of: dict[str, str] = {}
    absent = Counter()
    for part, file in lists.items():
        path = root / file
        if not path.is_file():
            beside = [p.name for p in root.iterdir()] if root.is_dir() else []
            raise UserError(f"data.lists: there is no file {path}{nearest(file, beside)}")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name = re.split(r"[\s,]", line.strip(), maxsplit=1)[0]
            if not name:
                continue
            matches = [full[name]] if name in full else names.get(PurePosixPath(name).name, [])
            if len(matches) > 1:
                raise UserError(f"{path}, line {number}: {name} is there {len(matches)} times; name its folder, too")
            if not matches:
                absent[part] += 1
                continue
            before = part_of.setdefault(matches[0].name, part)
            if before != part:
                raise UserError(f"{path}, line {number}: {name} is in the list of {before}, too")
    if not part_of:
        raise UserError(f"data.lists name none of the {len(found.items)} images below {root}")
    unlisted = sum(item.name not in part_of for item in found.items)
    found.items = [item for item in found.items if item.name in part_of]
    for item in found.items:
        item.part = part_of[item.name]
    found.notes |= {"listed_but_absent": dict(absent), "there_but_not_listed": unlisted}


def _from_table(path: Path | str, options: DataSection, task: str) -> Found:
    """Items of the rows of a table; paths are relative to its folder, or to `data.images` below it."""
    root = Path(".") if str(path).startswith(HUB) else Path(path).parent
    notes: dict[str, Any] = {}
    columns = [options.image_column, options.label_column if task in ("classes", "labels") else options.masks or "mask"]
    columns += [options.part_column] if options.part_column else []
    items, lines = [], {}
    for row, own in _rows(path, columns, options, notes):
        image, target = row.values[columns[0]], row.values[columns[1]]
        name = (
            image if isinstance(image, str) else (image.get("path") if isinstance(image, dict) else None) or row.where
        )
        if isinstance(image, str):
            if not image.strip():
                raise UserError(f"{row.where}: {columns[0]} is empty")
            image = str(PurePosixPath(options.images or ".") / image)
            before = lines.setdefault(image, row.where)
            if before != row.where:
                raise UserError(f"{row.where}: {name} stands in {before}, too; each image has one row")
        part = own
        if options.part_column:
            given = str(row.values[options.part_column]).strip().lower()
            part = _alias(given) or ""
            if not part:
                raise UserError(f"{row.where}: {options.part_column} is {given!r}; known: train, val, test")
        if task in ("segments", "values"):
            if target is None:
                raise UserError(f"{row.where}: {columns[1]} is empty")
            items.append(Item(str(name), image, mask=target, part=part, where=row.where))
            continue
        if task == "classes" and _is_nothing(target) and str(target) not in (options.classes or ()):
            said = str(target or "").strip() or "empty"
            raise UserError(f"{row.where}: {options.label_column} is {said}, which is no class")
        if task == "labels":
            labels = target if isinstance(target, list) else str(target).split(options.separator)
            labels = [] if _is_nothing(target) else labels  # an image may have none
            label: Any = [str(one).strip() for one in labels if str(one).strip()]
        else:
            label = str(target).strip()
        items.append(Item(str(name), image, label=label, part=part, where=row.where))
    if not items:
        raise UserError(f"{path}: no rows")
    return Found(Store(root), items, notes)


def _is_nothing(target: Any) -> bool:
    """Whether a cell holds no class: empty, or how tables write a missing number."""
    return target is None or str(target).strip().lower() in ("", "nan", "none", "null")


def _without_images(path: Path, options: DataSection) -> list[str]:
    """Folders beside those of the classes that hold no image: forgotten ones, or images of another form."""
    places = {options.images.strip("/").replace("PART", part) for part in PARTS} if options.images else {""}
    tops = [top for place in places if (path / place).is_dir() for top in (path / place).iterdir() if top.is_dir()]
    parts = [top for top in tops if _alias(top.name.lower()) is not None]
    if any(_alias(top.name.lower()) == "train" for top in parts):  # split folders: classes are one below
        tops = [below for top in parts for below in top.iterdir() if below.is_dir()]
    found = []
    for top in sorted(tops):
        if top.name[0] == "." or Store(top).names():
            continue
        suffixes = sorted({file.suffix.lower() for file in top.rglob("*") if file.is_file() and file.suffix})
        found.append(str(top.relative_to(path)) + (f" ({' '.join(suffixes[:5])})" if suffixes else " (empty)"))
    if found:
        log.warning("folders without an image that can be read are no class: %s", ", ".join(found[:8]))
    return found


def _rows(
    path: Path | str, columns: list[str], options: DataSection, notes: dict[str, Any]
) -> Iterator[tuple[Row, str]]:
    """Rows and the part that each belongs to, "" where nothing says it; of a hub data set its splits say it."""
    address = str(path)
    if not address.startswith(HUB) or names_split(address) or options.part_column:
        yield from ((row, "") for row in read_rows(path, columns=columns))
        return
    names = splits(address)
    parts = {name: part for name in names if (part := _alias(name.lower())) is not None}
    if "train" not in parts.values():
        raise UserError(
            f"{address}: no split is called train; name one of {', '.join(names)}, as in {address}:{names[0]}"
        )
    if len(parts) < len(names):
        notes["splits_not_read"] = [name for name in names if name not in parts]
    for name, part in parts.items():
        rows = read_rows(f"{address}:{name}", columns=columns)
        yield from ((row, part if len(parts) > 1 else "") for row in rows)
