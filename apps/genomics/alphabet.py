"""Letters of DNA and protein as small integers, with what the ambiguous ones stand for and what each pairs with.

A code is an index into `Alphabet.letters`. The first letters are the atoms: what a sequence can really hold, and what a
language model predicts. An ambiguous letter (R, N, X) is a set of atoms, and is embedded as their mean, so that it
needs no training of its own.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from core.training.errors import UserError

UNKNOWN = 255


@dataclass(frozen=True)
class Alphabet:
    """The letters of one kind of sequence.

    Attributes:
        name: "dna" or "protein".
        atoms: unambiguous letters, codes 0, 1, 2, ...
        ambiguous: letter -> the atoms that it may be.
        spelled: other spellings -> letter (U is read as T in DNA).
        pairs: letter -> its complement; empty for proteins, which have no second strand.
    """

    name: str
    atoms: str
    ambiguous: dict[str, str]
    spelled: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)

    @cached_property
    def letters(self) -> str:
        """All letters by code, atoms first."""
        return self.atoms + "".join(self.ambiguous)

    @cached_property
    def table(self) -> np.ndarray:
        """Byte -> code, `UNKNOWN` for what is no letter; lower case reads as upper."""
        table = np.full(256, UNKNOWN, dtype=np.uint8)
        for code, letter in enumerate(self.letters):
            table[ord(letter)] = table[ord(letter.lower())] = code
        for other, letter in self.spelled.items():
            table[ord(other)] = table[ord(other.lower())] = self.letters.index(letter)
        return table

    @cached_property
    def complement(self) -> np.ndarray | None:
        """Code -> code of the complement, None where there is no second strand."""
        if not self.pairs:
            return None
        return np.array([self.letters.index(self.pairs[letter]) for letter in self.letters], dtype=np.uint8)

    @cached_property
    def composition(self) -> np.ndarray:
        """[letters, atoms] float32, rows sum to 1: what a letter may be, all alike."""
        rows = np.zeros((len(self.letters), len(self.atoms)), dtype=np.float32)
        for code, letter in enumerate(self.letters):
            meant = self.ambiguous.get(letter, letter)
            for atom in meant:
                rows[code, self.atoms.index(atom)] = 1 / len(meant)
        return rows

    def encode(self, text: str, where: str) -> np.ndarray:
        """Codes [L] uint8 of a sequence.

        Raises:
            UserError: a letter that is none, with record and position counted from 1.
        """
        codes = self.table[np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8)]
        wrong = np.flatnonzero(codes == UNKNOWN)
        if len(wrong):
            at = int(wrong[0])
            raise UserError(f"{where}, position {at + 1}: {self._complaint(text[at], text)}")
        return codes

    def decode(self, codes: np.ndarray) -> str:
        """The text of codes."""
        return np.frombuffer(self.letters.encode(), dtype=np.uint8)[codes].tobytes().decode()

    def reverse_complement(self, codes: np.ndarray) -> np.ndarray:
        """Codes of the other strand, read in its own direction."""
        assert self.complement is not None, f"{self.name} has no second strand"
        return np.ascontiguousarray(self.complement[codes[::-1]])

    def _complaint(self, letter: str, text: str) -> str:
        if letter in "-.":
            return f"gap {letter!r} (take the gaps out of the alignment)"
        if letter.isspace():
            return "white space inside the sequence"
        hint = ""
        if self.name == "dna" and not set(text.upper()) - set(PROTEIN.letters):
            hint = "; proteins need data.alphabet=protein in the recipe"
        return f"{letter!r} is not a letter of {self.name} ({self.letters}){hint}"


DNA = Alphabet(
    "dna",
    "ACGT",
    {
        "R": "AG",
        "Y": "CT",
        "S": "CG",
        "W": "AT",
        "K": "GT",
        "M": "AC",
        "B": "CGT",
        "D": "AGT",
        "H": "ACT",
        "V": "ACG",
        "N": "ACGT",
    },
    {"U": "T"},
    dict(zip("ACGTRYSWKMBDHVN", "TGCAYRSWMKVHDBN")),
)
PROTEIN = Alphabet(
    "protein",
    # The twenty, then selenocysteine, pyrrolysine and a stop.
    "ACDEFGHIKLMNPQRSTVWYUO*",
    {"B": "DN", "Z": "EQ", "J": "IL", "X": "ACDEFGHIKLMNPQRSTVWY"},
)
ALPHABETS = {alphabet.name: alphabet for alphabet in (DNA, PROTEIN)}
