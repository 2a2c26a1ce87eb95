"""A sequence as a file holds it: a record that knows where it stands, for messages and for coordinates."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Record:
    """One sequence.

    Attributes:
        id: unique within a file.   where: "genes.fa, record 3 'abc'", for messages.
        sequence: letters as they stand in the file.
        label: what the file says: text, a list of texts (several columns), or classes per base [L]; None: nothing.
        group, split: as columns or header say.
        contig, start, strand: where it comes from; start counts from 0, strand is + or -.
        scored: bool [L], the bases that count; None: all.
        origin: records made from one sequence share it, and are never split apart; None: it was not made.
        sites: positions of its letters in the parent, if the recipe reads a few alone.
    """

    id: str
    where: str
    sequence: str
    label: Any = None
    group: str | None = None
    split: str | None = None
    contig: str | None = None
    start: int = 0
    strand: str = "+"
    scored: np.ndarray | None = None
    origin: str | None = None
    sites: list[int] | None = None

    @property
    def end(self) -> int:
        """Where it ends on its contig, excluded."""
        return self.start + len(self.sequence)

    def position(self, at: int) -> int:
        """Position of letter `at` on the contig, or in the sequence if there is none, counted from 1."""
        if self.sites is not None:
            return self.sites[at]
        return self.end - at if self.strand == "-" else self.start + at + 1


@dataclass
class Reading:
    """Records of one source, with what is worth telling about the reading."""

    records: list[Record]
    notes: dict[str, Any] = field(default_factory=dict)
