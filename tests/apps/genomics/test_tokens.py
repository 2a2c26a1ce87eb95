"""Tokens: nothing is lost, nothing is counted twice, and what is learned comes back from the checkpoint."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.genomics.alphabet import DNA, PROTEIN
from apps.genomics.tokens import Tokens, learn_tokens
from apps.genomics.words import by_position, check_tokens, parse_tokens, shortcut_terms
from core.training.errors import UserError

RANDOM = np.random.default_rng(0)
SEQUENCES = [RANDOM.integers(0, 4, 400).astype(np.uint8) for _ in range(20)]


@pytest.fixture(scope="module")
def bpe() -> Tokens:
    return learn_tokens(DNA, "bpe:100", SEQUENCES)


@given(length=st.integers(1, 40), word=st.sampled_from(["char", "kmer:3:3", "kmer:4:4"]))
def test_tokens_side_by_side_hold_every_base_once(length, word):
    tokens = Tokens(DNA, word)
    ids = tokens.encode(SEQUENCES[0][:length])
    assert tokens.bases[ids].sum() == length
    assert ids.max() < tokens.targets


def test_pieces_hold_every_base_once_and_come_back_from_json(bpe):
    again = Tokens.from_spec(json.loads(json.dumps(bpe.to_spec())))
    for codes in SEQUENCES[:3]:
        ids = bpe.encode(codes)
        assert bpe.bases[ids].sum() == len(codes) > len(ids)
        assert (again.encode(codes) == ids).all()
    assert (again.size, again.mask, again.start) == (102, 100, 101)
    strange = DNA.encode("ACGTRYNNNKM", "x")
    assert bpe.bases[bpe.encode(strange)].sum() == 11


def test_overlapping_kmers_are_numbered_as_base_four():
    tokens = Tokens(DNA, "kmer:3")
    assert tokens.encode(DNA.encode("ACGTN", "x")).tolist() == [
        0b000110,
        0b011011,
        tokens.letters + DNA.letters.index("N"),
    ]
    assert tokens.targets == 64 + 4


def test_the_rest_of_a_sequence_and_a_short_one_go_letter_by_letter():
    tokens = Tokens(DNA, "kmer:3:3")
    assert tokens.encode(DNA.encode("AAACG", "x")).tolist() == [0, 64 + 1, 64 + 2]
    assert tokens.encode(DNA.encode("CG", "x")).tolist() == [64 + 1, 64 + 2]


def test_more_pieces_than_there_are_is_an_error_that_says_how_many():
    with pytest.raises(UserError, match=r"data.tokens=bpe:500: the training part gives \d+ pieces only"):
        learn_tokens(DNA, "bpe:500", [SEQUENCES[0][:50]])


@pytest.mark.parametrize("word", ["chars", "kmer", "kmer:1", "kmer:9", "kmer:3:4", "bpe:10", "bpe:x"])
def test_words_that_mean_nothing_are_refused(word):
    with pytest.raises(ValueError, match=r"char|k-mer|BPE"):
        parse_tokens(word)


def test_kmers_of_proteins_are_refused():
    with pytest.raises(ValueError, match="for DNA"):
        check_tokens("kmer:3", "protein")
    with pytest.raises(ValueError, match="for DNA"):
        Tokens(PROTEIN, "kmer:3")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("kmers:3", "did you mean 'kmer:4'"),
        ("kmer:9", "from 1 to 6"),
        ("window:8", "an odd number"),
        ("markov", "from 1 to 8"),
        ("position:4", "from 1 to 3"),
        ("length:2", "length has no size"),
        ("kmer:4+lenght", "did you mean 'length'"),
        ("kmer:4+", "unknown shortcut ''"),
        ("kmer:4+window:5", "window stands alone"),
        ("position+position:2", "names position twice"),
    ],
)
def test_shortcuts_that_are_none_are_refused(word, says):
    with pytest.raises(ValueError, match=says):
        shortcut_terms(word)


def test_a_shortcut_is_its_terms_in_order():
    assert shortcut_terms("none") == []
    assert shortcut_terms("position+first:30+first:60+length") == [
        ("position", 1),
        ("first", 30),
        ("first", 60),
        ("length", 0),
    ]
    assert by_position("length+position:2")
    assert not by_position("kmer:4")


@pytest.mark.parametrize("word", ["char", "kmer:3:3", "kmer:3", "bpe:100"])
def test_length_and_gc_share_are_those_of_the_letters(word, bpe):
    tokens = bpe if word.startswith("bpe") else Tokens(DNA, word)
    codes = DNA.encode("GGCATNAGCTTAACG", "x")
    ids = tokens.encode(codes)[None]
    letters, share = tokens.traits(np.concatenate([ids, ids], 1), np.arange(2 * ids.shape[1])[None] < ids.shape[1])[0]
    seen = codes
    if word == "kmer:3":  # three k-mers hold N, and of the others the first letter is counted
        seen = codes[[0, 1, 2, 6, 7, 8, 9, 10, 11, 12]]
    elif word == "kmer:3:3":
        seen = np.delete(codes, slice(3, 6))
    plain = seen[seen < 4]
    assert letters == len(plain)
    assert share == pytest.approx(np.isin(plain, [1, 2]).mean())


@pytest.mark.parametrize("word", ["char", "kmer:3:3", "kmer:4:4", "bpe:100"])
def test_widths_hold_every_letter_once_also_ambiguous_ones(word, bpe):
    tokens = bpe if word.startswith("bpe") else Tokens(DNA, word)
    for text in ("ACGTNACGTACGTT", "AC", "NNNNACG"):
        ids = tokens.encode(DNA.encode(text, "x"))
        widths = tokens.widths(ids, len(text))
        assert (len(widths), widths.sum()) == (len(ids), len(text))
