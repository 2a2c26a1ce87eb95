"""From letters to tokens: one letter each, k-mers (overlapping or not), or pieces learned from the data (BPE).

The recipe says it in one word, `data.tokens`:

    char            a token is a letter
    kmer:6          overlapping 6-mers, one per position
    kmer:6:6        6-mers side by side; what is left at the end, and short sequences, go letter by letter
    bpe:1024        byte-pair encoding with 1024 pieces, learned from the training part and kept in the checkpoint

Ids below `Tokens.targets` are what a language model predicts; each stands for `Tokens.bases[id]` letters, so that a
perplexity is per base whatever the tokens are. Then come ambiguous letters, and two that stand in no file: MASK, START.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from apps.genomics.alphabet import ALPHABETS, Alphabet
from apps.genomics.kmers import kmer_ids
from apps.genomics.words import parse_tokens
from core.training.errors import UserError

CHUNK = 256
"""BPE learns from stretches of this many letters: merges are counted inside of them."""


class Tokens:
    """A way to cut codes into tokens.

    Args:
        alphabet: of the sequences.
        word: the recipe's `data.tokens`.
        learned: the JSON of a trained `tokenizers.Tokenizer`, for BPE.
    """

    def __init__(self, alphabet: Alphabet, word: str, learned: str | None = None):
        self.alphabet, self.word, self.learned = alphabet, word, learned
        self.kind, self.k, self.stride = parse_tokens(word)
        letters, atoms = len(alphabet.letters), len(alphabet.atoms)
        self.bpe: Any = None
        if self.kind == "char":
            self.targets, self.letters, size = atoms, 0, letters
            bases = np.ones(size)
        elif self.kind == "kmer":
            if alphabet.name != "dna":
                raise ValueError("k-mer tokens are for DNA; use char or bpe for proteins")
            count = atoms**self.k
            self.targets, self.letters, size = count + atoms, count, count + letters
            bases = np.concatenate([np.full(count, self.k), np.ones(letters)])
        else:
            if learned is None:
                raise ValueError("BPE tokens need what was learned from the training part")
            from tokenizers import Tokenizer

            self.bpe = Tokenizer.from_str(learned)
            size = self.bpe.get_vocab_size()
            bases = np.array([len(self.bpe.id_to_token(i)) for i in range(size)])
            self.targets, self.letters = size, 0
        self.mask, self.start, self.size = size, size + 1, size + 2
        self.bases = np.concatenate([bases, [0, 0]]).astype(np.int64)

    @property
    def is_char(self) -> bool:
        """Whether a token is a letter, so that positions of tokens are positions of the sequence."""
        return self.kind == "char"

    def encode(self, codes: np.ndarray) -> np.ndarray:
        """Ids [N] of codes [L]."""
        if self.kind == "char":
            return codes
        if self.kind == "bpe":
            return np.array(self.bpe.encode(self.alphabet.decode(codes)).ids, dtype=np.int32)
        whole = (len(codes) - self.k) // self.stride + 1 if len(codes) >= self.k else 0
        if not whole:
            return codes.astype(np.int32) + self.letters
        ids, clean = kmer_ids(codes, self.k, len(self.alphabet.atoms))
        ids, clean = ids[:: self.stride][:whole], clean[:: self.stride][:whole]
        # A k-mer with an ambiguous letter is unknown, which is what the letter for "anything" means.
        anything = self.letters + self.alphabet.letters.index("N")
        rest = codes[(whole - 1) * self.stride + self.k :] if self.stride > 1 else codes[:0]
        return np.concatenate([np.where(clean, ids, anything), rest.astype(np.int64) + self.letters]).astype(np.int32)

    def widths(self, ids: np.ndarray, letters: int) -> np.ndarray:
        """Letters [N] that each token of a sequence of so many letters stands for; not for overlapping k-mers."""
        if self.kind == "kmer":
            # By place, because a k-mer with an ambiguous letter has the id of one letter.
            whole = letters // self.k
            return np.concatenate([np.full(whole, self.k), np.ones(len(ids) - whole, dtype=np.int64)])
        return self.bases[ids]

    @cached_property
    def _counts(self) -> np.ndarray:
        """[size, 2]: plain letters of each token, and how many of them are G or C; of overlapping k-mers the first."""
        strong = np.array([letter in "GC" for letter in self.alphabet.atoms])
        counts = np.zeros((self.size, 2))
        if self.kind == "bpe":
            pieces = [self.bpe.id_to_token(i) for i in range(self.mask)]
            counts[: self.mask, 0] = [sum(letter in self.alphabet.atoms for letter in piece) for piece in pieces]
            counts[: self.mask, 1] = [sum(letter in "GC" for letter in piece) for piece in pieces]
            return counts
        atoms = len(self.alphabet.atoms)
        counts[self.letters : self.letters + atoms] = np.stack([np.ones(atoms), strong], 1)
        if self.kind == "kmer":
            digits = np.arange(self.letters)[:, None] // atoms ** np.arange(self.k - 1, -1, -1) % atoms
            digits = digits if self.stride > 1 else digits[:, :1]
            counts[: self.letters] = np.stack([np.full(self.letters, digits.shape[1]), strong[digits].sum(1)], 1)
        return counts

    def traits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """[B, 2] of a batch [B, N]: plain letters, and the share of G and C among them (NaN for proteins)."""
        counts = (self._counts[ids] * mask[..., None]).sum(1)
        share = counts[:, 1] / np.maximum(counts[:, 0], 1)
        if self.alphabet.complement is None:
            share = np.full(len(ids), np.nan)
        return np.stack([counts[:, 0], share], 1)

    def to_spec(self) -> dict[str, Any]:
        """Plain JSON types for the checkpoint."""
        return {"alphabet": self.alphabet.name, "word": self.word, "learned": self.learned}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "Tokens":
        """What `to_spec` wrote."""
        return cls(ALPHABETS[spec["alphabet"]], spec["word"], spec["learned"])


def learn_tokens(alphabet: Alphabet, word: str, sequences: Iterable[np.ndarray]) -> Tokens:
    """Tokens of a recipe; for BPE, learned from these sequences of codes.

    Raises:
        UserError: too few letters to learn so many pieces from.
    """
    kind, size, _ = parse_tokens(word)
    if kind != "bpe":
        return Tokens(alphabet, word)
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    def chunks() -> Iterable[str]:
        for codes in sequences:
            text = alphabet.decode(codes)
            yield from (text[at : at + CHUNK] for at in range(0, len(text), CHUNK))

    tokenizer = Tokenizer(BPE())
    # All letters are pieces from the start, so that nothing is ever unknown.
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet.letters), show_progress=False)  # type: ignore[call-arg]
    tokenizer.train_from_iterator(chunks(), trainer)
    learned = json.dumps(json.loads(tokenizer.to_str()), separators=(",", ":"))
    found = Tokens(alphabet, word, learned)
    if found.size - 2 < size:
        raise UserError(
            f"data.tokens={word}: the training part gives {found.size - 2} pieces only; ask for at most that many"
        )
    return found
