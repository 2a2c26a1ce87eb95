"""Text to numbers and back: byte-level BPE or unigram trained on the user's documents, whole words, or plain bytes.

The first numbers are the same in all: padding, begin, end, unknown, separator. A trained tokenizer is one string of
JSON, which the checkpoint carries; on disk it is the usual tokenizer.json.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from core.training.errors import UserError

PAD, BEGIN, END, UNKNOWN, SEPARATOR = range(5)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<sep>")


class Tokens:
    """A tokenizer.

    Args:
        kind: "bpe", "unigram", "words", "bytes", or "file".
        trained: the tokenizer's JSON; None for bytes.
    """

    def __init__(self, kind: str, trained: str | None = None):
        self.kind, self.trained = kind, trained
        self.inner = None if trained is None else Tokenizer.from_str(trained)
        if self.inner is not None:
            self.inner.no_padding()
            self.inner.no_truncation()
        # A tokenizer.json of somebody else has its own specials, or none: ours stand in front, its numbers move up.
        own = (
            kind != "checkpoint"
            and self.inner is not None
            and [self.inner.token_to_id(token) for token in SPECIAL] == list(range(5))
        )
        self.offset = 0 if own else len(SPECIAL)
        self.size = 256 + self.offset if self.inner is None else self.inner.get_vocab_size() + self.offset

    def encode(self, text: str) -> list[int]:
        """Numbers of the tokens, no specials added."""
        if self.inner is None:
            return [byte + self.offset for byte in text.encode()]
        return [i + self.offset for i in self.inner.encode(text, add_special_tokens=False).ids]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts at once."""
        if self.inner is None:
            return [self.encode(text) for text in texts]
        found = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [[i + self.offset for i in one.ids] if self.offset else one.ids for one in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; specials give nothing, bytes that are no UTF-8 give the replacement character."""
        kept = [i for i in ids if i >= len(SPECIAL)]
        if self.inner is None:
            return bytes(i - self.offset for i in kept).decode("utf-8", errors="replace")
        return self.inner.decode([i - self.offset for i in kept], skip_special_tokens=True).strip()

    def plain(self) -> dict[str, Any]:
        """For the spec; `Tokens(**plain)` is the same tokenizer."""
        return {"kind": self.kind, "trained": self.trained}

    def save(self, path: Path) -> Path | None:
        """tokenizer.json; None for bytes, which need none."""
        if self.trained is None:
            return None
        path.write_text(json.dumps(json.loads(self.trained), ensure_ascii=False, indent=1))
        return path


def train_tokens(kind: str, texts: Iterable[str], vocabulary: int) -> Tokens:
    """Train on texts; the same texts give the same tokenizer.

    Args:
        kind: "bpe" (byte-level), "unigram", "words" (by white space and punctuation), "bytes" (nothing to train).
        texts: training documents and summaries.
        vocabulary: tokens at most, specials included.
    """
    if kind == "bytes":
        return Tokens(kind)
    if kind == "words":
        inner = Tokenizer(models.WordLevel(unk_token=SPECIAL[UNKNOWN]))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.WordLevelTrainer(
            vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False
        )
    elif kind == "bpe":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        inner = Tokenizer(models.Unigram())
        inner.normalizer = normalizers.NFKC()
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocabulary, special_tokens=list(SPECIAL), unk_token=SPECIAL[UNKNOWN], show_progress=False
        )
    inner.train_from_iterator(texts, trainer)
    return Tokens(kind, inner.to_str())


def load_tokens(path: str | Path) -> Tokens:
    """A tokenizer.json from disk.

    Raises:
        UserError: no such file, or not a tokenizer.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"model.tokenizer_file: there is no file {file}")
    try:
        return Tokens("file", Tokenizer.from_file(str(file)).to_str())
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"model.tokenizer_file: {file} is not a tokenizer.json: {error}") from error
