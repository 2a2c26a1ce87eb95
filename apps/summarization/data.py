"""From a recipe to training, validation and test items, with everything that was counted on the way."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from apps.summarization.chooser import load_chooser, worth_of
from apps.summarization.documents import Example, shorten
from apps.summarization.features import NAMES, QUERY_NAMES
from apps.summarization.generated import generate
from apps.summarization.items import (
    AbstractiveItems,
    ExtractiveItems,
    collate_abstractive,
    collate_extractive,
    words_of,
)
from apps.summarization.reading import Report, read_part, read_set
from apps.summarization.recipe import DataSection, SummarizationRecipe
from apps.summarization.rouge import Scorer
from apps.summarization.tokens import Tokens, load_tokens, train_tokens
from core.training.data import Data, EpochOrder, padding_share
from core.training.errors import UserError
from core.training.files import find_file

PARTS = ("train", "val", "test")
TOKENIZER_TEXTS = 2000
"""Training documents that a tokenizer sees."""
MOST_COUNTED = 2000
"""Documents of a part that are tokenised beforehand to count what is cut."""


def build_data(recipe: SummarizationRecipe) -> Data:
    """Read or make the documents, check them, and turn them into items.

    Raises:
        UserError: one line for any mistake in the files, or for options that do not fit them.
    """
    reports: dict[str, Report] = defaultdict(Report)
    parts = read_examples(recipe.data, reports)
    check_parts(parts, recipe)
    writes = recipe.model.kind != "extractive"
    sizes = {part: describe(examples) for part, examples in parts.items()}
    spec = {
        "kind": recipe.model.kind,
        "queries": any(example.query for example in parts["train"]),
        "reference_words": int(np.median([len(e.references[0].split()) for e in parts["train"]])),
        "sentences": sizes["train"]["mean sentences"],
        "words": sizes["train"]["mean words"],
        "reading": reading_options(recipe.data),
    }
    spec |= _writer_spec(recipe, parts["train"]) if writes else _extractor_spec(recipe, parts["train"])
    chooser = None
    if recipe.model.extractor is not None:
        chooser, spec["extractor"] = load_chooser(recipe.model.extractor)
    worth = worth_of(recipe.model.kind, chooser)
    items: dict[str, Any] = {}
    cuts = {}
    for part, examples in parts.items():
        if writes:
            items[part] = AbstractiveItems(examples, spec, part, worth)
        else:
            examples, cuts[part] = cut_documents(examples, recipe.data)
            items[part] = ExtractiveItems(examples, spec, recipe.model.labels if part == "train" else None, part)
    if writes:
        cuts = {part: _count_cuts(found) for part, found in items.items()}
        known = [items["train"][i] for i in range(min(len(items["train"]), 50))]
        spec["tokens"] = int(np.mean([len(item["ids"]) for item in known]))
        spec["positions"] = int(np.mean([_positions(item, spec) for item in known]))
        spec["summary_tokens"] = int(np.mean([len(item["summary"]) for item in known]))
    lengths = items["train"].lengths
    order = EpochOrder(len(lengths), recipe.trainer.batch_size, recipe.seed, lengths=lengths)
    summary: dict[str, Any] = {
        part: sizes[part] | reports[part].plain() | cuts[part] for part in PARTS if part in parts
    }
    summary["padding share of training batches"] = round(padding_share(lengths, list(order)), 4)
    summary["scorer"] = Scorer().describe()
    summary["shared documents"] = shared_documents(parts)
    collate = collate_abstractive if writes else collate_extractive
    return Data(
        items["train"], items["val"], items["test"], spec=spec, summary=summary, collate=collate, lengths=lengths
    )


def read_examples(options: DataSection, reports: dict[str, Report]) -> dict[str, list[Example]]:
    """Examples of all parts, as the recipe says where they are.

    Raises:
        UserError: nothing is named, or it cannot be read.
    """
    if options.generated is not None:
        return generate(options.generated)
    if options.format != "rows":
        folder = find_file(options.path, app="summarization", public=options.file, origin=options.origin)
        if not folder.is_dir():
            raise UserError(f"data.path: {folder} is a file; the folder of {options.format} is wanted")
        return read_set(folder, options, reports)
    if options.train is None:
        raise UserError("data.train is missing: name your file of documents and summaries, as in data.train=my.jsonl")
    parts = {"train": read_part(options.train, options, reports["train"])}
    for part in ("val", "test"):
        given = getattr(options, part)
        if given is not None:
            parts[part] = read_part(given, options, reports[part])
    shares = {part: getattr(options, f"{part}_share") for part in ("val", "test") if part not in parts}
    if shares:
        parts |= divide(parts["train"], shares, options.split_seed)
    return {part: parts[part] for part in PARTS}


def divide(examples: Sequence[Example], shares: dict[str, float], seed: int) -> dict[str, list[Example]]:
    """Train and the parts in `shares`, by chance; examples on one document stay together.

    Raises:
        UserError: too few documents.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault("\n".join(example.source.sentences), []).append(example)
    order = np.random.default_rng(seed).permutation(len(groups))
    keys = [list(groups)[i] for i in order]
    if len(keys) < len(shares) + 1:
        raise UserError(
            f"{len(keys)} different documents cannot be divided into train, {' and '.join(shares)}; "
            "give more, or name files as data.val and data.test"
        )
    found: dict[str, list[Example]] = {}
    for part, share in shares.items():
        size = max(1, round(share * len(groups)))
        taken, keys = keys[:size], keys[size:]
        found[part] = [example for key in taken for example in groups[key]]
    return {"train": [example for key in keys for example in groups[key]], **found}


def check_parts(parts: dict[str, list[Example]], recipe: SummarizationRecipe) -> None:
    """Refuse parts that are empty or lack what the model learns from."""
    for part, examples in parts.items():
        if not examples:
            raise UserError(f"no document is left for {part}")
        lacking = [example.id for example in examples if not example.references]
        if lacking:
            raise UserError(f"{part}: {lacking[0]} has no summary to learn from or to compare with")
    if recipe.model.kind == "extractive" and recipe.model.labels == "gold":
        lacking = [example.id for example in parts["train"] if example.gold is None]
        if lacking:
            column = recipe.data.columns.gold
            raise UserError(f"model.labels=gold needs the column {column!r} in every row; {lacking[0]} has none")


def cut_documents(examples: Sequence[Example], options: DataSection) -> tuple[list[Example], dict[str, Any]]:
    """Examples with documents of at most `max_tokens` words, and what was cut off."""
    if options.max_tokens is None:
        return list(examples), {"cut documents": 0}
    short: dict[int, tuple[Any, int]] = {}
    found = []
    for example in examples:
        key = id(example.source)
        if key not in short:
            short[key] = shorten(example.source, options.max_tokens, options.overflow)
        source = short[key][0]
        gold = example.gold
        if gold is not None and source is not example.source:
            at = {number: i for i, number in enumerate(source.numbers)}
            gold = tuple(at[number] for number in gold if number in at)
        found.append(Example(example.id, source, example.query, example.references, gold))
    lost = [words for _, words in short.values()]
    total = sum(source.words for source, _ in short.values()) + sum(lost)
    share = round(sum(lost) / max(1, total), 4)
    return found, {"cut documents": sum(words > 0 for words in lost), "share of words cut": share}


def describe(examples: Sequence[Example]) -> dict[str, Any]:
    """Counts of a part, for the summary."""
    sources = list({id(example.source): example.source for example in examples}.values())
    words = [source.words for source in sources]
    return {
        "examples": len(examples),
        "documents": len(sources),
        "mean words": int(np.mean(words)) if words else 0,
        "most words": int(max(words, default=0)),
        "mean sentences": int(np.mean([len(source.sentences) for source in sources])) if sources else 0,
    }


def shared_documents(parts: dict[str, list[Example]]) -> dict[str, int]:
    """Documents of val and test that are, word by word, also in train: a leak where it is not 0."""
    texts = {part: {" ".join(e.source.sentences) for e in examples} for part, examples in parts.items()}
    return {part: len(texts[part] & texts["train"]) for part in texts if part != "train"}


def reading_options(options: DataSection) -> dict[str, Any]:
    """What `predict` needs to read the next file in the same way."""
    return options.model_dump(mode="json", include={"columns", "on_bad", "max_tokens", "overflow"})


def _extractor_spec(recipe: SummarizationRecipe, examples: Sequence[Example]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    if recipe.model.words:
        for source in {id(example.source): example.source for example in examples}.values():
            counts.update(word for sentence in source.sentences for word in set(words_of(sentence)))
        counts.update(word for example in examples for word in words_of(example.query or ""))
    # Ties in the alphabet's order: the same documents give the same vocabulary.
    common = sorted(counts, key=lambda word: (-counts[word], word))[: recipe.model.words]
    features = len(NAMES) + len(QUERY_NAMES) if recipe.model.features else 0
    return {"vocabulary": common, "features": features}


def _writer_spec(recipe: SummarizationRecipe, examples: Sequence[Example]) -> dict[str, Any]:
    model = recipe.model
    known: dict[str, Any] = {}
    if model.checkpoint is not None:
        from apps.summarization.stock import checkpoint_spec  # needs the extra hf

        known = checkpoint_spec(recipe)
        tokens = Tokens(**known["tokenizer"])
    elif model.tokenizer_file is not None:
        tokens = load_tokens(model.tokenizer_file)
    else:
        texts = (
            text
            for example in examples[:TOKENIZER_TEXTS]
            for text in (*example.source.sentences, *example.references, example.query or "")
        )
        tokens = train_tokens(model.tokenizer, texts, model.vocabulary)
    return {
        "tokenizer": tokens.plain(),
        "reader": model.reader,
        "sentence_tokens": model.sentence_tokens,
        "patch": model.patch,
        "global_tokens": model.global_tokens,
        "separators": model.global_tokens == "separators",
        "max_summary": model.max_summary,
        "source_words": model.source_words if model.kind == "extract_abstract" else None,
        "max_tokens": recipe.data.max_tokens,
        "overflow": recipe.data.overflow,
        **known,
    }


def _positions(item: dict[str, Any], spec: dict[str, Any]) -> int:
    if spec["reader"] == "sentences":
        return item["positions"]
    return len(item["ids"]) if spec["reader"] == "tokens" else -(-len(item["ids"]) // spec["patch"])


def _count_cuts(items: AbstractiveItems) -> dict[str, Any]:
    """Tokenise a part once (of a large one an even sample), for nothing may be cut unsaid."""
    step = -(-len(items) // MOST_COUNTED)
    for i in range(0, len(items), step):
        items.make(items.examples[i]) if step > 1 else items[i]
    cut = items.cut
    return {
        "cut documents": cut["sources"],
        "share of tokens cut": round(cut["tokens"] / max(1, cut["of tokens"]), 4),
        "cut summaries": cut["summaries"],
        "counted on": -(-len(items) // step),
    }
