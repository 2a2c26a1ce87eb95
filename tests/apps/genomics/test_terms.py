"""Features of whole sequences: each term gives what its name says, alone and joined."""

import numpy as np
import pytest
import torch

from apps.genomics.alphabet import DNA, PROTEIN
from apps.genomics.items import padded
from apps.genomics.terms import feature_matrix, term_features
from apps.genomics.words import shortcut_terms


def features(words, texts, alphabet=DNA, **options):
    return feature_matrix(shortcut_terms(words), [alphabet.encode(text, "x") for text in texts], alphabet, **options)


def test_shares_of_kmers_sum_to_one_and_leave_ambiguous_letters_out():
    shares = features("kmer:2", ["AACAN", "NNN", "A"])
    assert shares.sum(1).tolist() == [1.0, 0.0, 0.0]
    assert shares[0, [0b0000, 0b0001, 0b0100]].tolist() == pytest.approx([1 / 3] * 3)


def test_position_has_the_words_of_each_length_at_every_place():
    found = features("position:3", ["ACGT", "ARGT"])
    assert found.shape == (2, 4 * 4 + 3 * 16 + 2 * 64)
    letters, pairs, triples = np.split(found[0], [16, 16 + 48])
    assert np.flatnonzero(letters).tolist() == [0, 4 + 1, 8 + 2, 12 + 3]
    assert np.flatnonzero(pairs).tolist() == [0o1, 16 + 0b0110, 32 + 0b1011]  # AC CG GT
    assert np.flatnonzero(triples).tolist() == [0b000110, 64 + 0b011011]
    # R is A or G, so each word that holds it is two halves.
    assert found[1, 16 : 16 + 16].tolist() == [0.5, 0, 0.5, 0] + [0] * 12
    assert np.array_equal(features("position", ["ACGT"]), found[:1, :16])


def test_ends_are_shares_of_the_letters_there_and_length_is_a_logarithm():
    texts = ["ACGTT", "CA", "RAAA"]
    first, last = features("first:3", texts), features("last:3", texts)
    assert first[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert last[0].tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3])
    assert first[1].tolist() == last[1].tolist() == [0.5, 0.5, 0, 0]
    assert first[2].tolist() == pytest.approx([5 / 6, 0, 1 / 6, 0])
    assert last[2].tolist() == [1, 0, 0, 0]
    assert features("length", texts)[:, 0].tolist() == pytest.approx(np.log([5, 2, 4]))


@pytest.mark.parametrize("words", ["kmer:1", "kmer:2", "first:6", "last:6", "length", "kmer:1+first:4+last:9+length"])
def test_padding_and_neighbours_in_a_batch_change_nothing(words):
    texts = ["MKVLA", "MKVXLAWWYC", "M"]
    together = features(words, texts, PROTEIN)
    assert np.allclose(together, np.concatenate([features(words, [text], PROTEIN) for text in texts]), atol=1e-7)
    # Tokens that stand for nothing are neither letters nor k-mers.
    ids, mask = padded([PROTEIN.encode(text, "x") for text in texts])
    composition = torch.from_numpy(PROTEIN.composition)
    composition = torch.cat([composition, composition.new_ones(2, composition.shape[1])])
    ids = ids.masked_fill(~mask, len(PROTEIN.letters))
    assert np.allclose(together, term_features(shortcut_terms(words), ids, mask, composition).numpy(), atol=1e-7)


def test_both_strands_have_the_same_features():
    text, other = "GGATTACCA", "TGGTAATCC"
    found = features("kmer:3+last:4", [text, other], both_strands=True)
    assert np.allclose(found[0], found[1])
    assert np.allclose(found[0], features("kmer:3+last:4", [text, other]).mean(0))
    assert not np.allclose(*features("kmer:3", [text, other]))
