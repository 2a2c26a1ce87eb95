"""Variants: VCF rows and mutation lists as single changes, each checked against the reference."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from apps.genomics.alphabet import DNA, Alphabet
from core.training.errors import UserError
from core.training.rows import decoding, kind, open_text, read_rows

LETTERS = re.compile(rf"[{DNA.letters}]+")
MUTATION = re.compile(r"(?P<ref>[A-Z*])(?P<at>\d+)(?P<alt>[A-Z*])")
COLUMNS = ("mutant", "mutation", "mutations", "variant")


@dataclass
class Variant:
    """One change of a reference sequence.

    Attributes:
        where: for messages.   id: of the row.   contig: the reference sequence.
        changes: (start, ref, alt) with start from 0, in rising order; several only in mutation lists (H24C:A42T).
        line: number of the row among the rows of the file.
        skipped: why it is not scored; "": it is.
        row: cells of a table that are carried over to the output.
    """

    where: str
    id: str
    contig: str
    changes: list[tuple[int, str, str]]
    line: int
    skipped: str = ""
    row: dict[str, str] = field(default_factory=dict)


@dataclass
class VariantFile:
    """All variants of a file, and for VCF its own lines, so that they can be written back with scores."""

    variants: list[Variant]
    header: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def is_variants(path: Path) -> bool:
    """Whether a file lists variants: VCF, or a table with a column `mutant`."""
    if kind(path) == ".vcf":
        return True
    if kind(path) not in (".csv", ".tsv", ".parquet", ".jsonl"):
        return False
    first = next(iter(read_rows(path)), None)
    return first is not None and _column(list(first.values)) is not None


def read_variants(path: Path) -> VariantFile:
    """Read a VCF or a table of mutations.

    Raises:
        UserError: a row that is no variant at all; what is a variant but cannot be scored is marked as skipped.
    """
    return _vcf(path) if kind(path) == ".vcf" else _mutations(path)


def _vcf(path: Path) -> VariantFile:
    found = VariantFile([])
    with open_text(path) as file:
        for number, line in enumerate(decoding(path, file), 1):
            line = line.rstrip("\r\n")
            if line.startswith("#"):
                found.header.append(line)
                continue
            if not line:
                continue
            where, cells = f"{path}, line {number}", line.split("\t")
            if len(cells) < 5:
                raise UserError(
                    f"{where}: a VCF row has at least CHROM POS ID REF ALT separated by tabs, got {line[:60]!r}"
                )
            if not cells[1].isdigit():
                raise UserError(f"{where}: POS must be a whole number, got {cells[1]!r}")
            found.variants += _alleles(where, cells, len(found.lines))
            found.lines.append(line)
    if not any(line.startswith("#CHROM") for line in found.header):
        raise UserError(f"{path}: not a VCF file, it has no line that starts with #CHROM")
    return found


def _alleles(where: str, cells: list[str], line: int) -> Iterator[Variant]:
    """One variant per alternative allele; positions in VCF count from 1."""
    contig, position, name, ref, alts = cells[0], int(cells[1]), cells[2], cells[3].upper(), cells[4].upper()
    for alt in alts.split(","):
        said = name if name != "." else f"{contig}:{position}{ref}>{alt}"
        variant = Variant(where, said, contig, [(position - 1, ref, alt)], line)
        if position == 0:
            variant.skipped = "before the first base (a telomere)"
        elif alt == ".":
            variant.skipped = "no alternative allele"
        elif not LETTERS.fullmatch(alt) or not LETTERS.fullmatch(ref):
            variant.skipped = "symbolic allele"
        elif alt == ref:
            variant.skipped = "alternative equals reference"
        yield variant


def _column(names: list[str]) -> str | None:
    return next((name for name in names if name.lower() in COLUMNS), None)


def _mutations(path: Path) -> VariantFile:
    found = VariantFile([])
    for number, row in enumerate(read_rows(path)):
        column = _column(list(row.values))
        assert column is not None
        text = str(row.values[column])
        changes = []
        for part in re.split(r"[:;,+\s]+", text.strip()):
            match = MUTATION.fullmatch(part)
            if match is None or int(match["at"]) < 1:
                raise UserError(f"{row.where}: {part!r} is no mutation; write H24C, several as H24C:A42T")
            changes.append((int(match["at"]) - 1, match["ref"], match["alt"]))
        carried = {name: str(value) for name, value in row.values.items()}
        variant = Variant(row.where, text, str(row.values.get("id") or ""), sorted(changes), number, row=carried)
        if all(ref == alt for _, ref, alt in changes):
            variant.skipped = "synonymous: equals the reference"
        found.variants.append(variant)
    return found


def check_reference(variant: Variant, letters: str, start: int) -> None:
    """Mark a variant as skipped unless the reference has its REF letters there.

    Args:
        letters: the reference from base `start` (counted from 0) on.
    """
    for at, ref, _ in variant.changes:
        there = letters[at - start : at - start + len(ref)].upper()
        if there != ref:
            variant.skipped = f"REF is {ref}, the reference has {there or 'nothing'} at {at + 1}"
            return


def check_letters(variant: Variant, alphabet: Alphabet) -> None:
    """Mark a variant as skipped if one of its letters is ambiguous: no model says how likely that is.

    Raises:
        UserError: a letter that is none, unless the variant is skipped already.
    """
    letters = set("".join(ref + alt for _, ref, alt in variant.changes))
    if variant.skipped or not letters - set(alphabet.atoms):
        return
    for text in (text for change in variant.changes for text in change[1:]):
        alphabet.encode(text, f"{variant.where}, {variant.id}")
    variant.skipped = "ambiguous letter"


def changed(letters: str, start: int, variant: Variant) -> str:
    """The letters with the variant's changes, from the last to the first, so that earlier places stay valid."""
    for at, ref, alt in reversed(variant.changes):
        letters = letters[: at - start] + alt + letters[at - start + len(ref) :]
    return letters
