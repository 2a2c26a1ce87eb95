"""A reference genome that is read by interval: an indexed FASTA by pyfaidx, or a GenBank or EMBL file in memory."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from apps.genomics.alphabet import DNA
from core.attention.registry import nearest
from core.training.errors import UserError
from core.training.rows import kind

PAIRS = {**DNA.pairs, "U": "A"}
OTHER = str.maketrans(
    "".join(PAIRS) + "".join(PAIRS).lower(), "".join(PAIRS.values()) + "".join(PAIRS.values()).lower()
)


class Reference:
    """Contigs by name; a stretch of one costs memory for that stretch only.

    The index of a FASTA file (.fai) is used if it is there, else made beside the file, or in a temporary folder if
    that is not allowed.
    """

    def __init__(self, path: Path, contigs: Any, lengths: dict[str, int]):
        self.path, self.contigs, self.lengths = path, contigs, lengths

    @classmethod
    def open(cls, path: str | Path) -> "Reference":
        """Raises UserError unless the file is there and can be read by interval."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"there is no reference file {path}")
        if kind(path) in (".gb", ".gbk", ".gbff", ".embl"):
            from apps.genomics.annotated import parse_annotated

            form = "embl" if kind(path) == ".embl" else "genbank"
            contigs = {record.id: str(record.seq) for record in parse_annotated(path, form, {})}
            return cls(path, contigs, {name: len(text) for name, text in contigs.items()})
        return cls._indexed(path)

    @classmethod
    def _indexed(cls, path: Path) -> "Reference":
        try:
            return cls._through(path, Path(f"{path}.fai"))
        except PermissionError:
            folder = tempfile.mkdtemp(prefix="longspan-")
            found = cls._through(path, Path(folder) / f"{path.name}.fai")
            weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
            return found

    @classmethod
    def _through(cls, path: Path, index: Path) -> "Reference":
        import pyfaidx

        try:
            fasta = pyfaidx.Fasta(str(path), indexname=str(index), as_raw=True, rebuild=True)
        except PermissionError:
            raise
        except (pyfaidx.UnsupportedCompressionFormat, ImportError) as error:
            raise UserError(
                f"{path}: a gzipped file cannot be read by interval; unpack it, or pack it by bgzip"
            ) from error
        except (pyfaidx.FastaIndexingError, pyfaidx.FetchError, ValueError, OSError) as error:
            raise UserError(f"{path}: cannot be indexed as FASTA: {(str(error).splitlines() or [''])[0]}") from error
        names = list(fasta.keys())  # iterating the object itself gives records
        found = cls(path, fasta, {name: len(fasta[name]) for name in names})
        if not found.lengths:
            raise UserError(f"{path}: there is no sequence in this reference")
        return found

    def length(self, contig: str, where: str) -> int:
        """Bases of a contig.

        Raises:
            UserError: it is not there, with the nearest name.
        """
        if contig not in self.lengths:
            other = contig.removeprefix("chr") if contig.startswith("chr") else f"chr{contig}"
            hint = f" (did you mean {other!r}?)" if other in self.lengths else nearest(contig, self.lengths)
            some = ", ".join(list(self.lengths)[:5])
            raise UserError(f"{where}: the reference {self.path.name} has no contig {contig!r}{hint}; it has {some}")
        return self.lengths[contig]

    def fetch(self, contig: str, start: int, end: int, strand: str, where: str, *, pad: bool = False) -> str:
        """Letters of [start, end), 0-based; on strand "-" the reverse complement.

        Args:
            pad: fill what lies beyond the ends with N; else that is an error.
        """
        length = self.length(contig, where)
        if not pad and (start < 0 or end > length):
            raise UserError(f"{where}: {contig}:{start}-{end} leaves the contig, which has {length} bases")
        inside = str(self.contigs[contig][max(0, start) : max(0, min(end, length))])
        text = "N" * max(0, -start) + inside + "N" * max(0, end - max(length, start))
        if strand == "-":
            text = text.translate(OTHER)[::-1]  # in the case that it has: lower case may be masked
        return text
