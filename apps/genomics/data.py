"""From a recipe to training, validation and test items, with everything that was found on the way."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.genomics.alphabet import ALPHABETS, Alphabet
from apps.genomics.features import class_names, mirrored
from apps.genomics.fits import fit_shortcut
from apps.genomics.generated import generate
from apps.genomics.items import Items, Stretch, cut
from apps.genomics.labels import UNSCORED, encode_label, find_names
from apps.genomics.leaks import find_leaks
from apps.genomics.packing import attention_padding
from apps.genomics.recipe import LANGUAGE, PER_BASE, DataSection, Files, GenomicsRecipe
from apps.genomics.sequences import Record
from apps.genomics.sources import find_sources, read_source
from apps.genomics.splits import PARTS, Span, set_aside, split_records
from apps.genomics.tokens import Tokens, learn_tokens
from core.training.data import Data, EpochOrder, padding_share
from core.training.errors import UserError
from core.training.run import run_checkpoint

READING = ("format", "alphabet", "columns", "sequence", "id", "header", "reference", "width", "sites", "duplicate_ids")
"""Options of `data` that say how a file is read; `predict` reads the next file in the same way."""
Part = tuple[list[Record], list[np.ndarray]]


def build_data(recipe: GenomicsRecipe) -> Data:
    """Read or make the sequences, check them, cut them into parts and into what the model sees at once.

    Raises:
        UserError: one line for any mistake in the files, or between the files and the recipe.
    """
    options, alphabet = recipe.data, ALPHABETS[recipe.data.alphabet]
    notes: dict[str, Any] = {}
    parts, source = _parts(recipe, alphabet, notes)
    if options.validate_on == "nothing" and "val" in parts:
        aside = parts.pop("val")
        parts["train"] = (parts["train"][0] + aside[0], parts["train"][1] + aside[1])
    names = _names(recipe, parts["train"][0])
    summary: dict[str, Any] = {"source": source, "task": recipe.task, **notes, "split": _rule(options)}
    if recipe.task in ("classification", "multilabel", "tokens"):
        summary["classes"] = names
    tokens = _tokens(recipe, alphabet, parts["train"][1])
    copied = _check_leaks(recipe, parts, alphabet, summary)

    items = {}
    for part, (records, codes) in parts.items():
        targets = None
        if recipe.task not in LANGUAGE:
            targets = [encode_label(recipe.task, record, names) for record in records]
        items[part] = make_items(recipe, tokens, records, codes, part, targets=targets, copied=copied.get(part))
    train = items["train"]
    sizes = {part: sorted(found.lengths) for part, found in items.items()}
    lengths = {length for found in items.values() for length in found.lengths}
    spec: dict[str, Any] = {
        "names": names,
        "tokens": tokens.to_spec(),
        "fixed": lengths.pop() if len(lengths) == 1 and recipe.task not in (*PER_BASE, *LANGUAGE) else None,
        "longest": max(max(size) for size in sizes.values() if size),
        "typical": sizes["train"][len(sizes["train"]) // 2],
        "mirror": mirrored(names) if recipe.task == "tokens" and alphabet.complement is not None else None,
        "reading": {name: getattr(options, name) for name in READING},
        "copied": {part: np.flatnonzero(flags).tolist() for part, flags in copied.items() if flags.any()},
        "test_ids": [place[0] for place in items["test"].places] if "test" in items else [],
        **_statistics(recipe, train, names),
    }
    shortcut = fit_shortcut(recipe, alphabet, train, names, spec)
    if shortcut is not None:
        spec["shortcut"] = shortcut
    summary |= _counts(parts, items, recipe, names)
    lengthwise = train.lengths if len(set(train.lengths)) > 1 and not options.packing else None
    test = items.get("test")
    return Data(train, items.get("val"), test, spec=spec, summary=summary, lengths=lengthwise)


def make_items(
    recipe: GenomicsRecipe,
    tokens: Tokens,
    records: Sequence[Record],
    codes: Sequence[np.ndarray],
    part: str,
    *,
    targets: Sequence[Any] | None = None,
    copied: np.ndarray | None = None,
) -> Items:
    """Tokens of these records, cut into the stretches that the model sees at once.

    Raises:
        UserError: a sequence is longer than `data.length` and the recipe does not say what to do, or has no token.
    """
    options, size = recipe.data, recipe.data.length
    whole = recipe.task not in (*PER_BASE, *LANGUAGE)
    sequences, others, scored, stretches, letters = [], [], [], [], []
    both = recipe.model.strand != "none" and not tokens.is_char
    for number, (record, one) in enumerate(zip(records, codes)):
        if whole and size is not None:
            one = cropped(one, tokens, size, options.crop, record.where)
        found = tokens.encode(one)
        sequences.append(found)
        letters.append(one)
        if both:
            others.append(tokens.encode(tokens.alphabet.reverse_complement(one)))
        if recipe.task in LANGUAGE:
            scored.append(_asked(record, found, tokens, options))
        if whole:
            stretches.append(Stretch(number, 0, len(found), 0, len(found)))
            continue
        stride = (options.stride or size) if part == "train" else None
        places = cut(len(found), size, stride, options.overlap, recipe.task == "causal")
        stretches += [Stretch(number, *place) for place in places]
    return Items(
        part,
        sequences,
        stretches,
        targets=targets,
        others=others or None,
        scored=scored or None,
        copied=copied,
        places=[(record.id, record.contig, record.start) for record in records],
        per_token=recipe.task in PER_BASE,
        letters=None if tokens.is_char else letters,
    )


def cropped(codes: np.ndarray, tokens: Tokens, size: int, how: str, where: str) -> np.ndarray:
    """The part of a sequence that has at most `size` tokens.

    Raises:
        UserError: it has more, and how="error".
    """
    count = len(tokens.encode(codes))
    if count <= size:
        return codes
    if how == "error":
        raise UserError(
            f"{where}: {count} tokens, data.length={size}; give a larger length or say data.crop=start, centre or end"
        )
    while count > size:
        # Pieces of BPE differ in length, so the cut is found in a few steps; letters and k-mers take one.
        keep = (
            max(1, min(len(codes) - 1, len(codes) * size // count))
            if tokens.kind == "bpe"
            else ((size - 1) * tokens.stride + tokens.k if tokens.kind == "kmer" else size)
        )
        start = {"start": 0, "centre": (len(codes) - keep) // 2, "end": len(codes) - keep}[how]
        codes = codes[start : start + keep]
        count = len(tokens.encode(codes))
        if tokens.kind != "bpe":
            break
    return codes


def encode(records: Sequence[Record], alphabet: Alphabet) -> list[np.ndarray]:
    """Codes of each record's letters."""
    return [alphabet.encode(record.sequence, record.where) for record in records]


def _parts(recipe: GenomicsRecipe, alphabet: Alphabet, notes: dict[str, Any]) -> tuple[dict[str, Part], str]:
    """Records and codes of each part."""
    options = recipe.data
    if options.generated is not None:
        records = generate(options.generated)
        given = options.model_copy(update={"split": "given"})
        return _spans(records, encode(records, alphabet), given, alphabet), "generated"
    labels = recipe.task not in LANGUAGE
    train, val, test = find_sources(options)
    reading = read_source(train, options, notes, labels=labels)
    if test is None and val is None and options.train is None:
        codes = encode(reading.records, alphabet)
        return _spans(reading.records, codes, options, alphabet), _said(train)
    parts = {"train": reading, "val": None, "test": None}
    for part, source in (("val", val), ("test", test)):
        if source is not None:
            parts[part] = read_source(source, options, notes, labels=labels)
    found = {part: (one.records, encode(one.records, alphabet)) for part, one in parts.items() if one is not None}
    if "val" not in found:
        records, codes = found["train"]
        stay, aside = set_aside(records, codes, options, alphabet)
        found["train"] = ([records[n] for n in stay], [codes[n] for n in stay])
        found["val"] = ([records[n] for n in aside], [codes[n] for n in aside])
    return {part: found[part] for part in PARTS if part in found}, _said(train)


def _spans(
    records: Sequence[Record], codes: Sequence[np.ndarray], options: DataSection, alphabet: Alphabet
) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for part, spans in split_records(records, codes, options, alphabet).items():
        if spans:
            pairs = [_stretch(records[span.record], codes[span.record], span) for span in spans]
            found[part] = ([record for record, _ in pairs], [one for _, one in pairs])
    return found


def _stretch(record: Record, codes: np.ndarray, span: Span) -> tuple[Record, np.ndarray]:
    if span.stop - span.start == len(codes):
        return record, codes
    piece = slice(span.start, span.stop)
    record = dataclasses.replace(
        record,
        sequence=record.sequence[piece],
        label=record.label[piece] if isinstance(record.label, (str, np.ndarray)) else record.label,
        contig=record.contig or record.id,
        start=record.start + span.start,
        scored=None if record.scored is None else record.scored[piece],
    )
    return record, codes[piece]


def _names(recipe: GenomicsRecipe, train: Sequence[Record]) -> list[str]:
    options = recipe.data
    if recipe.task in LANGUAGE:
        return []
    if options.features is not None:
        return class_names(options.features, options.feature_labels)
    columns = options.label if isinstance(options.label, list) else None
    if recipe.task == "regression" and isinstance(options.label, str):
        columns = [options.label]
    return find_names(recipe.task, train, columns)


def _tokens(recipe: GenomicsRecipe, alphabet: Alphabet, train: Sequence[np.ndarray]) -> Tokens:
    """Tokens of the recipe; a model that goes on from another run reads as that run did."""
    if recipe.model.pretrained is None or not Path(recipe.model.pretrained).expanduser().exists():
        return learn_tokens(alphabet, recipe.data.tokens, train)
    before = run_checkpoint(recipe.model.pretrained)[2]["longspan"]
    if before["app"] != "genomics":
        raise UserError(f"model.pretrained={recipe.model.pretrained} is a run of {before['app']}, not of genomics")
    theirs = before["spec"]["tokens"]
    if (theirs["alphabet"], theirs["word"]) != (alphabet.name, recipe.data.tokens):
        raise UserError(
            f"model.pretrained={recipe.model.pretrained} reads {theirs['alphabet']} as {theirs['word']}; "
            f"say data.alphabet={theirs['alphabet']} data.tokens={theirs['word']}"
        )
    return Tokens.from_spec(theirs)


def _asked(record: Record, found: np.ndarray, tokens: Tokens, options: DataSection) -> np.ndarray | None:
    """Which tokens a language model is asked: no ambiguous letters; no soft-masked ones if the recipe says so."""
    asked = found < tokens.targets
    if options.lower == "mask" and tokens.is_char:
        asked &= np.frombuffer(record.sequence.encode("latin-1"), dtype=np.uint8) < ord("a")
    return None if asked.all() else asked


def _check_leaks(
    recipe: GenomicsRecipe, parts: dict[str, Part], alphabet: Alphabet, summary: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Look for copies of training sequences in the other parts; say so, and act as `data.leaks` says."""
    options = recipe.data
    if options.leaks == "off" or options.split == "positions":
        summary["leaks"] = "not looked for" if options.leaks == "off" else "parts are stretches of the same records"
        return {}
    copied, told = {}, {}
    for part in ("val", "test"):
        if part in parts:
            # The validation part chooses the epoch, and floors are fitted with it: for the test both are seen.
            seen = parts["train"][1] + (parts["val"][1] if part == "test" and "val" in parts else [])
            leaks = find_leaks(seen, parts[part][1], alphabet, options.identity)
            copied[part], told[part] = leaks.copied, leaks.told()
            if options.leaks == "refuse" and leaks.copied.any():
                first = parts[part][0][int(leaks.copied.argmax())]
                raise UserError(
                    f"{int(leaks.copied.sum())} sequences of the {part} part have a copy in the training part, "
                    f"the first is {first.where}; say data.leaks=drop to leave them out, or warn to go on"
                )
    summary["leaks"] = told
    return copied


def _statistics(recipe: GenomicsRecipe, train: Items, names: list[str]) -> dict[str, Any]:
    """What the loss needs to know of the training targets: mean and deviation, or the share of each class."""
    if recipe.task in LANGUAGE:
        return {}
    assert train.targets is not None
    if recipe.task in ("regression", "token_regression"):
        values = np.concatenate([np.asarray(one, dtype=np.float64).reshape(-1, len(names)) for one in train.targets])
        known = ~np.isnan(values)
        if not known.any(axis=0).all():
            raise UserError("a target has no value in the training part")
        mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        return {"mean": mean.tolist(), "deviation": np.where(deviation > 0, deviation, 1.0).tolist()}
    if recipe.task == "multilabel":
        return {"shares": np.mean(train.targets, axis=0).tolist()}
    flat = np.concatenate([np.atleast_1d(one) for one in train.targets])
    counts = np.bincount(flat[flat != UNSCORED], minlength=len(names))
    return {"shares": (counts / counts.sum()).tolist()}


def _counts(
    parts: dict[str, Part], items: dict[str, Items], recipe: GenomicsRecipe, names: list[str]
) -> dict[str, Any]:
    """Numbers of sequences, bases and stretches, how long they are, and how much of a batch is padding."""
    found: dict[str, Any] = {
        "sequences": {part: len(records) for part, (records, _) in parts.items()},
        "bases": {part: sum(map(len, codes)) for part, (_, codes) in parts.items()},
    }
    train = items["train"]
    if len(train) != len(train.sequences):
        found["stretches"] = {part: len(one) for part, one in items.items()}
    lengths = sorted(train.lengths)
    found["tokens per item"] = f"{lengths[0]} to {lengths[-1]}, half of them up to {lengths[len(lengths) // 2]}"
    whole = sum(len(one) for _, codes in parts.values() for one in codes)
    if recipe.data.crop != "error" and recipe.data.length is not None:
        cut_off = (
            [
                len(one) - len(kept)
                for part, (_, codes) in parts.items()
                for one, kept in zip(codes, items[part].sequences)
            ]
            if recipe.data.tokens == "char"
            else []
        )
        found["cropped"] = f"{sum(1 for one in cut_off if one > 0)} sequences, {sum(cut_off) / whole:.1%} of the bases"
    if recipe.task == "classification":
        for part in items:
            labels = np.bincount(np.array(items[part].targets), minlength=len(names))
            found.setdefault("items per class", {})[part] = dict(zip(names, labels.tolist()))
    if lengths[0] != lengths[-1]:
        found["padding"] = _padding(recipe, train)
    return found


def _padding(recipe: GenomicsRecipe, train: Items) -> str:
    """How much of the first epoch's batches is padding, as they are and as they might be."""
    size, seed = recipe.trainer.batch_size, recipe.seed

    def batches(lengths: Sequence[int] | None) -> list[list[int]]:
        return [chosen.tolist() for chosen in EpochOrder(len(train), size, seed, lengths=lengths).batches()]

    drawn, alike = batches(None), batches(train.lengths)
    regardless, sorted_ = padding_share(train.lengths, drawn), padding_share(train.lengths, alike)
    if recipe.data.packing:
        inside = attention_padding(train.lengths, drawn)
        return (
            f"packed: none outside attention, {inside:.1%} inside (in rows {regardless:.1%}, "
            f"in batches of similar lengths {sorted_:.1%})"
        )
    return f"{sorted_:.1%} of a batch of similar lengths ({regardless:.1%} if drawn regardless)"


def _rule(options: DataSection) -> str:
    if options.generated is not None or options.split == "given":
        return "given"
    if options.train is not None or (options.path is None and options.test_file is not None):
        rest = "" if options.val is not None else f", {options.val_share:.0%} of the training file for validation"
        return f"files{rest}"
    if options.split == "folds":
        return f"fold {options.fold} of {options.folds} is the test part"
    return f"{options.split}, {options.val_share:.0%} validation, {options.test_share:.0%} test"


def _said(source: Files) -> str:
    return ", ".join(f"{label}: {path}" for label, path in source.items()) if isinstance(source, dict) else str(source)
