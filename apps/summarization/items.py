"""Training items: examples as numbers for the extractor and for the writer, and how a batch is put together.

Features, labels and tokens are made when an item is first asked for and kept, as long as the data is small; they are
pure functions of the example and the spec, so that `predict` makes the same from a user's file.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from apps.summarization.abstractive import Document
from apps.summarization.documents import Example, Source
from apps.summarization.features import query_features, sentence_features
from apps.summarization.oracle import oracle_labels, prepare_all, soft_labels
from apps.summarization.rouge import Scorer
from apps.summarization.selection import Budget, lengths_of, select
from apps.summarization.sentence_encoder import Words
from apps.summarization.tokens import BEGIN, END, SEPARATOR, Tokens

KEPT = 5000
"""Documents of which the numbers are kept in memory."""
_WORD = re.compile(r"\w+|[^\w\s]")


class Carried:
    """Examples on their way through a batch; a plain object, so that moving a batch to a device leaves it alone."""

    def __init__(self, examples: list[Example]):
        self.examples = examples


def words_of(text: str) -> list[str]:
    """Words and marks in lower case, as the extractor's vocabulary has them."""
    return _WORD.findall(text.lower())


class ExtractiveItems(Dataset):
    """Examples for the extractor.

    Args:
        examples: of one part.   spec: of the data: vocabulary, features, queries.
        labels: "soft", "oracle", "gold", or None where nothing is to be learned.
        part: its name.
    """

    def __init__(self, examples: Sequence[Example], spec: dict[str, Any], labels: str | None, part: str):
        self.examples, self.spec, self.labels, self.part = list(examples), spec, labels, part
        self.numbers = {word: i + 2 for i, word in enumerate(spec["vocabulary"])}  # 0 padding, 1 unknown
        self.lengths = [len(example.source.sentences) for example in self.examples]
        self._sources: dict[int, tuple] = {}
        self._items: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._items:
            item = self._make(self.examples[index])
            if len(self._items) >= KEPT:
                return item
            self._items[index] = item
        return self._items[index]

    def _make(self, example: Example) -> dict[str, Any]:
        source = example.source
        features, ids, rows, prepared = self._source(source)
        if self.spec["features"]:
            features = np.concatenate([features, query_features(source.sentences, example.query)], axis=1)
        asked = [self.numbers.get(word, 1) for word in words_of(example.query or "")] if self.spec["queries"] else []
        labels = np.zeros(len(source.sentences), np.float32)
        if self.labels == "gold":
            labels[list(example.gold or ())] = 1.0
        elif self.labels is not None:
            make = oracle_labels if self.labels == "oracle" else soft_labels
            labels = make(prepared, [Scorer().prepare(reference) for reference in example.references])
        return {
            "example": example,
            "part": self.part,
            "features": torch.from_numpy(features),
            "ids": ids,
            "rows": rows,
            "query": torch.tensor(asked or [1]),
            "labels": torch.from_numpy(labels),
        }

    def _source(self, source: Source) -> tuple:
        """What does not depend on the question."""
        if id(source) in self._sources:
            return self._sources[id(source)]
        words = [[self.numbers.get(word, 1) for word in words_of(s)] or [1] for s in source.sentences]
        ids = torch.tensor([word for sentence in words for word in sentence])
        rows = torch.from_numpy(np.repeat(np.arange(len(words)), [len(sentence) for sentence in words]))
        wide = self.spec["features"]
        features = sentence_features(source) if wide else np.zeros((len(words), 0), np.float32)
        prepared = prepare_all(source.sentences) if self.labels in ("oracle", "soft") else []
        found = features, ids, rows, prepared
        if len(self._sources) < KEPT:
            self._sources[id(source)] = found
        return found


def collate_extractive(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of `ExtractiveItems` -> a batch, padded to its longest document."""
    counts = [len(item["labels"]) for item in items]
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    before = np.cumsum([0, *counts[:-1]]).tolist()
    rows = torch.cat([item["rows"] + start for item, start in zip(items, before)])
    return {
        "words": Words(torch.cat([item["ids"] for item in items]), rows, mask),
        "features": pad([item["features"] for item in items]),
        "query": pad([item["query"] for item in items]),
        "labels": pad([item["labels"] for item in items]),
        "carried": Carried([item["example"] for item in items]),
        "part": items[0]["part"],
    }


def pad(rows: Sequence[Tensor]) -> Tensor:
    """[B, longest, ...] with zeros behind; PAD is 0."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


class AbstractiveItems(Dataset):
    """Examples for the writer: source and summary as tokens.

    Args:
        examples: of one part.   spec: of the data: tokenizer, reader and what is cut.   part: its name.
        worth: scores of an example's sentences, [N], of which the best are handed on (extract_abstract); None: all are.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        spec: dict[str, Any],
        part: str,
        worth: Callable[[Example], np.ndarray] | None = None,
    ):
        self.examples, self.spec, self.part, self.worth = list(examples), spec, part, worth
        self.tokens = Tokens(**spec["tokenizer"])
        self.cut = {"sources": 0, "tokens": 0, "summaries": 0, "of tokens": 0}
        self._items: dict[int, dict[str, Any]] = {}
        # Words are an estimate of tokens, good enough to put like lengths together.
        self.lengths = [example.source.words for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._items:
            item = self.make(self.examples[index])
            if len(self._items) >= KEPT:
                return item
            self._items[index] = item
        return self._items[index]

    def make(self, example: Example) -> dict[str, Any]:
        """The numbers of an example; what is cut is counted in `cut`."""
        before = self.cut["tokens"]
        query = self.tokens.encode(example.query) if example.query else []
        chosen = self.chosen(example)
        numbers = range(len(example.source.sentences)) if chosen is None else chosen
        # Byte-level tokens know a word's beginning by the space before it; between sentences it would be lost.
        space = " " if self.tokens.kind in ("bpe", "bytes", "file", "checkpoint") else ""
        texts = [(space if i else "") + example.source.sentences[i] for i in numbers]
        sentences = self.tokens.encode_all(texts)
        item: dict[str, Any] = {"example": example, "part": self.part, "chosen": chosen}
        if self.spec["reader"] == "sentences":
            most = self.spec["sentence_tokens"]
            pieces = [
                (owner, tokens[i : i + most])
                for owner, tokens in [(-1, query), *zip(numbers, sentences)]
                for i in range(0, len(tokens), most)
            ]
            kept = self._keep(np.array([len(piece) for _, piece in pieces]))
            pieces = [pieces[i] for i in kept]
            sizes = [len(piece) for _, piece in pieces]
            item["ids"] = torch.tensor([token for _, piece in pieces for token in piece])
            item["rows"] = torch.from_numpy(np.repeat(np.arange(len(pieces)), sizes))
            item["owners"] = np.repeat([owner for owner, _ in pieces], sizes)
            item["positions"] = len(pieces)
        else:
            separator = [SEPARATOR] if self.spec["separators"] else []
            sentences = [[*tokens, *separator] for tokens in sentences]
            body = np.array([token for tokens in sentences for token in tokens], dtype=np.int64)
            owners = np.repeat(np.array(numbers, dtype=np.int64), [len(tokens) for tokens in sentences])
            front = np.array([*query, SEPARATOR] if query else [], dtype=np.int64)
            kept = self._keep(np.ones(len(body), dtype=np.int64), less=len(front))
            item["ids"] = torch.from_numpy(np.concatenate([front, body[kept]]))
            item["owners"] = np.concatenate([np.full(len(front), -1), owners[kept]])
            item["marked"] = self._marked(item["ids"], len(front))
        item["cut"] = self.cut["tokens"] - before
        most = self.spec["max_summary"]
        summary = self.tokens.encode(example.references[0]) if example.references else []
        self.cut["summaries"] += len(summary) > most
        item["summary"] = torch.tensor([BEGIN, *summary[:most], END])
        return item

    def chosen(self, example: Example) -> list[int] | None:
        """Numbers of the sentences that are handed on (extract_abstract); None: all are read."""
        source, words = example.source, self.spec["source_words"]
        if self.worth is None or source.words <= words:
            return None
        return select(self.worth(example), lengths_of(source.sentences), Budget(words=words))

    def _keep(self, sizes: np.ndarray, less: int = 0) -> np.ndarray:
        """Numbers of the pieces (tokens, or runs of `sizes` tokens) that stay: `max_tokens` from head or both ends."""
        most, total = self.spec["max_tokens"], int(sizes.sum())
        self.cut["of tokens"] += total
        every = np.arange(len(sizes))
        if most is None or total + less <= most:
            return every
        most = max(1, most - less)
        tail_share = most // 2 if self.spec["overflow"] == "head_tail" else 0
        head = max(1, int(np.searchsorted(np.cumsum(sizes), most - tail_share, side="right")))
        tail = int(np.searchsorted(np.cumsum(sizes[::-1]), tail_share, side="right")) if tail_share else 0
        kept = np.concatenate([every[:head], every[max(head, len(every) - tail) :]])
        self.cut["sources"] += 1
        self.cut["tokens"] += total - int(sizes[kept].sum())
        return kept

    def _marked(self, ids: Tensor, front: int) -> Tensor:
        """Which tokens are to be global."""
        marked = torch.zeros(len(ids), dtype=torch.bool)
        if self.spec["global_tokens"] == "first":
            marked[:1] = True
        elif self.spec["global_tokens"] == "query":
            marked[: max(front, 1)] = True
        elif self.spec["global_tokens"] == "separators":
            marked |= ids == SEPARATOR
        return marked


def collate_abstractive(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of `AbstractiveItems` -> a batch, padded to its longest document and summary."""
    ids, words, marked = pad([item["ids"] for item in items]), None, None
    if "rows" in items[0]:
        counts = [item["positions"] for item in items]
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        before = np.cumsum([0, *counts[:-1]]).tolist()
        rows = torch.cat([item["rows"] + start for item, start in zip(items, before)])
        words = Words(torch.cat([item["ids"] for item in items]), rows, mask)
    else:
        marked = pad([item["marked"] for item in items])
    return {
        "document": Document(ids, words, marked),
        "summary": pad([item["summary"] for item in items]),
        "chosen": [item["chosen"] for item in items],
        "cut": [item["cut"] for item in items],
        "carried": Carried([item["example"] for item in items]),
        "part": items[0]["part"],
    }
