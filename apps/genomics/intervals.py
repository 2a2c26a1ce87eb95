"""Places in a genome: BED (0-based, half open) and GFF3 (1-based, inclusive), here always 0-based and half open."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from core.training.errors import UserError
from core.training.rows import decoding, open_text


@dataclass(frozen=True)
class Place:
    """An interval of a contig.

    Attributes:
        where: for messages.   contig: its name.   start, end: 0-based, end excluded.
        strand: "+", "-" or "" where it does not matter.
        key: name of a BED row, type of a GFF feature.
        parent: lines of one feature share it (the ID of a GFF line); None: a feature of its own.
        phase: bases before the next codon starts, GFF column 8.
    """

    where: str
    contig: str
    start: int
    end: int
    strand: str = ""
    key: str | None = None
    parent: str | None = None
    phase: int = 0


def place_of(where: str, contig: str, start: object, end: object, strand: str = "", **more) -> Place:
    """A checked place; start and end as text or numbers, 0-based and half open.

    Raises:
        UserError: no numbers, an empty or negative interval, or a strand that is none.
    """
    try:
        first, last = int(str(start)), int(str(end))
    except ValueError as error:
        raise UserError(f"{where}: start and end must be whole numbers, got {start!r} and {end!r}") from error
    if not 0 <= first < last:
        raise UserError(f"{where}: the interval {first}-{last} is empty, turned round or negative")
    if not contig:
        raise UserError(f"{where}: the name of the contig is missing")
    if strand not in ("+", "-", ".", "?", ""):
        raise UserError(f"{where}: strand must be +, - or ., got {strand!r}")
    return Place(where, contig, first, last, strand if strand in "+-" else "", **more)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with open_text(path) as file:
        for number, line in enumerate(decoding(path, file), 1):
            yield f"{path}, line {number}", line.rstrip("\r\n")


def read_bed(path: Path) -> Iterator[Place]:
    """Rows of a BED file; the key is the name in column 4.

    Raises:
        UserError: a row with fewer than three columns or a bad interval.
    """
    for where, line in _lines(path):
        if not line.strip() or line.startswith(("#", "track", "browser")):
            continue
        cells = line.split("\t") if "\t" in line else line.split()
        if len(cells) < 3:
            raise UserError(f"{where}: a BED row has at least contig, start and end, got {line[:60]!r}")
        yield place_of(
            where, *cells[:3], strand=cells[5] if len(cells) > 5 else "", key=cells[3] if len(cells) > 3 else None
        )


def read_gff(path: Path) -> Iterator[Place]:
    """Features of a GFF3 file; reading ends at its ##FASTA part.

    Raises:
        UserError: a line without nine columns, or a bad interval.
    """
    for where, line in _lines(path):
        if line.startswith("##FASTA"):
            return
        if not line.strip() or line.startswith("#"):
            continue
        cells = line.split("\t")
        if len(cells) != 9:
            raise UserError(f"{where}: a GFF line has 9 columns separated by tabs, got {len(cells)}")
        try:
            first = int(cells[3]) - 1
        except ValueError as error:
            raise UserError(f"{where}: start must be a whole number, got {cells[3]!r}") from error
        attributes = dict(part.split("=", 1) for part in cells[8].split(";") if "=" in part)
        yield place_of(
            where,
            unquote(cells[0]),
            first,
            cells[4],
            cells[6],
            key=cells[2],
            parent=unquote(attributes["ID"]) if "ID" in attributes else None,
            phase=int(cells[7]) if cells[7] in ("0", "1", "2") else 0,
        )
