"""Letters: what pairs with what, what an ambiguous one may be, and what is no letter."""

import numpy as np
import pytest

from apps.genomics.alphabet import DNA, PROTEIN
from core.training.errors import UserError


def reverse_complement(text: str) -> str:
    return DNA.decode(DNA.reverse_complement(DNA.encode(text, "x")))


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("ACGT", "ACGT"),
        ("AACCG", "CGGTT"),
        ("RYSWKM", "KMWSRY"),
        ("BVDHN", "NDHBV"),
        ("acgu", "ACGT"),
        ("GATUACA", "TGTAATC"),
    ],
)
def test_reverse_complement_knows_ambiguous_letters_and_rna(text, other):
    assert reverse_complement(text) == other
    assert reverse_complement(other) == text.upper().replace("U", "T")


@pytest.mark.parametrize("alphabet", [DNA, PROTEIN], ids=["dna", "protein"])
def test_what_a_letter_may_be_sums_to_one(alphabet):
    assert np.allclose(alphabet.composition.sum(1), 1)
    assert (alphabet.composition[: len(alphabet.atoms)] == np.eye(len(alphabet.atoms))).all()


def test_the_complement_of_what_a_letter_may_be_is_what_its_complement_may_be():
    turned = DNA.composition[:, DNA.complement[:4]]  # columns A C G T become T G C A
    assert np.allclose(DNA.composition[DNA.complement], turned)


def test_ambiguous_amino_acids():
    meant = {
        letter: "".join(a for a, p in zip(PROTEIN.atoms, row) if p)
        for letter, row in zip(PROTEIN.letters, PROTEIN.composition)
    }
    assert (meant["B"], meant["Z"], meant["J"], len(meant["X"])) == ("DN", "EQ", "IL", 20)
    assert meant["U"] == "U"
    assert PROTEIN.complement is None


@pytest.mark.parametrize(
    ("alphabet", "text", "says"),
    [
        (
            DNA,
            "ACGTEACG",
            r"gene 3, position 5: 'E' is not a letter of dna \(ACGT.*\); proteins need data.alphabet=protein",
        ),
        (DNA, "AC-GT", r"position 3: gap '-' \(take the gaps out of the alignment\)"),
        (DNA, "AC GT", "position 3: white space inside the sequence"),
        (PROTEIN, "MKV1", "position 4: '1' is not a letter of protein "),
        (DNA, "ACé", "position 3"),
    ],
)
def test_what_is_no_letter_is_named_with_its_position(alphabet, text, says):
    with pytest.raises(UserError, match=says):
        alphabet.encode(text, "gene 3")
