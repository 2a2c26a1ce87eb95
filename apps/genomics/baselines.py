"""Floors: what is reached without a deep model. Every report prints them beside the model.

    majority, mean            says the same of every sequence
    kmer                      logistic or ridge regression on shares of k-mers
    position                  the same on the letters of sequences of one length
    shortcut                  the linear model of the recipe's shortcut at its fit, where training starts
    window                    the same on the letters around a base
    open_reading_frames       DNA with CDS labels: the longest stretch from start to stop codon wins
    markov_0, markov_best     the last letters tell the next one; the order is chosen on the validation part
    markov_both_strands       the same, counted on both strands
    neighbours                masked models: the letters on both sides tell the one between
    optimum                   generated data: what nobody can better

Size and strength are chosen on the validation part (without one: on every tenth row of the training part); then the
floor is fitted on training and validation together.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from apps.genomics import linear
from apps.genomics.alphabet import ALPHABETS, Alphabet
from apps.genomics.fits import drawn_rows
from apps.genomics.generated import best_accuracy
from apps.genomics.items import Items
from apps.genomics.markov import HIGHEST, Markov
from apps.genomics.metrics import base_figures, confusion, language_figures, moments, number_figures, sequence_figures
from apps.genomics.neighbours import Neighbours
from apps.genomics.orfs import frame_labels
from apps.genomics.recipe import LANGUAGE, PER_BASE, GenomicsRecipe
from apps.genomics.terms import feature_matrix
from apps.genomics.words import Term, shortcut_terms
from core.training.data import Data
from core.training.matrices import unpack
from core.training.scores import Scores

WINDOW = 17
"""Letters around a base, as in the published floor of secondary structure."""
SIZES = {"dna": (3, 4, 5), "protein": (1, 2)}
"""k that the k-mer floor chooses from."""
ASIDE = 10
"""Of so many training rows one chooses size and strength where there is no validation part."""
MOST_ROWS = 20_000
"""Sequences that a floor is fitted on, thinned evenly."""


def floors(recipe: GenomicsRecipe, data: Data) -> dict[str, Scores]:
    """Figures of every floor on the test part, by the same sums as the model's."""
    if recipe.task in LANGUAGE:
        return _language(recipe, data)
    return (_bases if recipe.task in PER_BASE else _sequences)(recipe, data)


def _sequences(recipe: GenomicsRecipe, data: Data) -> dict[str, Scores]:
    alphabet = ALPHABETS[recipe.data.alphabet]
    parts: dict[str, Any] = {"train": data.train, "val": data.val, "test": data.test}
    parts = {part: items for part, items in parts.items() if items is not None}
    codes = {part: _letters(items, alphabet, data) for part, items in parts.items()}
    targets = {part: np.stack([np.asarray(one) for one in items.targets or []]) for part, items in parts.items()}
    names = data.spec["names"]

    def score(predicted: np.ndarray, part: str, rows: np.ndarray | None = None) -> Scores:
        flags = np.isin(np.arange(len(predicted)), data.spec["copied"].get(part, []) if rows is None else [])
        truth = targets[part] if rows is None else targets[part][rows]
        return sequence_figures(recipe.task, predicted, truth, names, copied=flags, leaks=recipe.data.leaks)

    found = {_plain_name(recipe): score(_same_for_all(recipe, targets, names), "test")}
    # More k-mers than sequences are not worth a fit.
    sizes = [k for k in SIZES[alphabet.name] if len(alphabet.atoms) ** k <= max(len(codes["train"]), 64)]
    kinds = {"kmer": [Term("kmer", k) for k in sizes]}
    lengths = {len(one) for part in codes.values() for one in part}
    if len(lengths) == 1:
        kinds["position"] = [Term("position", 1)]
    for name, choices in kinds.items():
        found[name] = _best(recipe, alphabet, codes, targets, len(names), choices, score)
    if data.spec.get("shortcut") is not None:
        found["shortcut"] = score(_start(recipe, data.spec, alphabet, codes["test"]), "test")
    if recipe.data.generated is not None:
        found["optimum"] = best_accuracy(recipe.data.generated.noise)
    return found


def _letters(items: Items, alphabet: Alphabet, data: Data) -> list[np.ndarray]:
    """Letters of the sequences, also where the model reads k-mers or pieces."""
    if data.spec["tokens"]["word"] == "char":
        return list(items.sequences)
    assert items.letters is not None
    return list(items.letters)


def _plain_name(recipe: GenomicsRecipe) -> str:
    return "mean" if recipe.task == "regression" else "majority"


def _same_for_all(recipe: GenomicsRecipe, targets: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    count, train = len(targets["test"]), targets["train"]
    if recipe.task == "classification":
        shares = np.bincount(train, minlength=len(names)) / len(train)
        return np.tile(shares, (count, 1))
    return np.tile(train.mean(0), (count, 1))


def _best(
    recipe: GenomicsRecipe,
    alphabet: Alphabet,
    codes: dict[str, list[np.ndarray]],
    targets: dict[str, np.ndarray],
    answers: int,
    choices: list[Term],
    score: Callable[..., Scores],
) -> Scores:
    """The features and strength that are best on the validation part, fitted anew with it."""
    metric, better = recipe.judged_by()
    sign = 1 if better == "higher" else -1
    strengths = linear.RIDGE if recipe.task == "regression" else linear.LOGISTIC
    step = max(1, -(-len(codes["train"]) // MOST_ROWS))
    trials = []
    aside = np.arange(len(codes["train"])) % ASIDE == 0 if "val" not in codes else np.zeros(len(codes["train"]), bool)
    asked = "train" if aside.any() else "val"
    for term in choices:
        x = {part: feature_matrix([term], codes[part], alphabet) for part in {"train", asked}}
        seen, held = x["train"][~aside][::step], x["train"][aside] if asked == "train" else x["val"]
        for tried in strengths:
            fitted = _fit(recipe.task, seen, targets["train"][~aside][::step], answers, tried)
            figures = score(_say(recipe.task, held, fitted), asked, aside if asked == "train" else None)
            trials.append((sign * figures.get(metric, 0.0), -len(trials), term, tried))
    _, _, term, strength = max(trials)
    known = [part for part in ("train", "val") if part in codes]
    both = np.concatenate([feature_matrix([term], codes[part], alphabet) for part in known])
    y = np.concatenate([targets[part] for part in known])
    fitted = _fit(recipe.task, both[::step], y[::step], answers, strength)
    return score(_say(recipe.task, feature_matrix([term], codes["test"], alphabet), fitted), "test")


def _start(recipe: GenomicsRecipe, spec: dict[str, Any], alphabet: Alphabet, codes: list[np.ndarray]) -> np.ndarray:
    """What the shortcut says before training, in the units of the file."""
    fitted = spec["shortcut"]
    x = feature_matrix(shortcut_terms(fitted["terms"]), codes, alphabet, recipe.model.strand != "none")
    answer = _say(recipe.task, x, (unpack(fitted["weights"]).numpy(), unpack(fitted["bias"]).numpy()))
    if recipe.task == "regression" and recipe.model.scaled:
        return answer * np.array(spec["deviation"]) + np.array(spec["mean"])
    return answer


def _fit(task: str, x: np.ndarray, y: np.ndarray, answers: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    if task == "classification":
        return linear.fit_classes(x, y, answers, strength)
    if task == "multilabel":
        return linear.fit_labels(x, y, strength)
    return linear.fit_numbers(x, y.astype(np.float64), strength)


def _say(task: str, x: np.ndarray, fitted: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    answer = x @ fitted[0] + fitted[1]
    return {"classification": linear.softmax, "multilabel": linear.sigmoid}.get(task, lambda y: y)(answer)


def _bases(recipe: GenomicsRecipe, data: Data) -> dict[str, Scores]:
    alphabet, names = ALPHABETS[recipe.data.alphabet], data.spec["names"]
    train: Any = data.train
    test: Any = data.test
    classes = recipe.task == "tokens"
    flat = np.concatenate(train.targets)
    rows = drawn_rows(flat, classes)
    x = linear.windows(train.sequences, WINDOW, alphabet, rows)
    if classes:
        fitted = linear.fit_classes(x, flat[rows], len(names), 1.0)
        often = int(np.bincount(flat[flat >= 0], minlength=len(names)).argmax())
        said: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "majority": lambda codes: np.full(len(codes), often),
            "window": lambda codes: _window(codes, fitted, alphabet).argmax(-1),
        }
        if alphabet.name == "dna" and any(name.startswith("CDS") for name in names):
            said["open_reading_frames"] = lambda codes: frame_labels(codes, names)
    else:
        fitted = linear.fit_numbers(x, flat[rows, None].astype(np.float64), 1.0)
        mean = float(np.nanmean(flat))
        said = {
            "mean": lambda codes: np.full(len(codes), mean),
            "window": lambda codes: _window(codes, fitted, alphabet)[:, 0],
        }
    found = {}
    for name, say in said.items():
        guesses = [say(codes) for codes in test.sequences]
        if classes:
            counts = [confusion(g, t.astype(np.int64), len(names)) for g, t in zip(guesses, test.targets)]
            found[name] = base_figures(np.stack(counts))
        else:
            found[name] = number_figures(np.stack([moments(g, t) for g, t in zip(guesses, test.targets)]))
    return found


def _window(codes: np.ndarray, fitted: tuple[np.ndarray, np.ndarray], alphabet: Alphabet) -> np.ndarray:
    """Answers [L, K] of the window model, in pieces so that a genome fits into memory."""
    found = []
    for at in range(0, len(codes), 100_000):
        rows = np.arange(at, min(at + 100_000, len(codes)))
        found.append(linear.windows([codes], WINDOW, alphabet, rows) @ fitted[0] + fitted[1])
    return np.concatenate(found)


def _language(recipe: GenomicsRecipe, data: Data) -> dict[str, Scores]:
    alphabet = ALPHABETS[recipe.data.alphabet]
    parts: dict[str, Any] = {"train": data.train, "val": data.val or data.train, "test": data.test}
    codes = {part: _letters(items, alphabet, data) for part, items in parts.items()}

    def figures(score: Callable[[np.ndarray], np.ndarray], part: str = "test") -> Scores:
        nats = np.array([-score(one).sum() for one in codes[part]])
        bases = np.array([float((one < len(alphabet.atoms)).sum()) for one in codes[part]])
        return language_figures(nats, bases, prefix="masked_" if recipe.task == "masked" else "")

    if recipe.task == "masked":
        sides = range(6 if alphabet.name == "dna" else 2)
        models = {side: Neighbours(codes["train"], side, alphabet) for side in sides}
        best = min(models, key=lambda side: figures(models[side].score, "val")["masked_nats_per_base"])
        return {"neighbours_0": figures(models[0].score), f"neighbours_{best}": figures(models[best].score)}
    found = {}
    for name, both in {"markov": False, "markov_both_strands": True}.items():
        if both and alphabet.complement is None:
            continue
        model = Markov(codes["train"], HIGHEST[alphabet.name], alphabet, both_strands=both)

        def scored(order: int, part: str, model: Markov = model) -> Scores:
            return figures(lambda one: model.score(one, order), part)

        orders = [scored(order, "val")["nats_per_base"] for order in range(model.order + 1)]
        best = int(np.argmin(orders))
        if not both:
            found["markov_0"] = scored(0, "test")
        found[f"{name}_{best}"] = scored(best, "test")
    return found
