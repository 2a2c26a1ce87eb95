"""Generated documents whose best summary is known: facts from marked places among filler and false reports.

    ... lorem ipsum sworn port amber dolor ...      a marked fact: it belongs into the summary
    ... dolor rumour port cedar lorem sit ...       a report without the mark: it does not
    summary: port amber captain birch cargo cedar ...

The facts stand anywhere. A document holds every fact once with the mark and once, with another value, without; so a
model that does not look at the mark is right half of the time, and what is known without reading (the kinds of facts in
their order) is half of the words. The optimum is 100 in every metric of ROUGE.
"""

import numpy as np

from apps.summarization.documents import Example, source_from_sentences
from apps.summarization.recipe import GeneratedSection

KINDS = ("port", "captain", "cargo", "day", "ship", "crew", "wind", "course", "price", "buyer", "storm", "harbour")
MARK, RUMOUR = "sworn", "rumour"
FILLER_WORDS = np.array([f"w{i}" for i in range(300)])
SENTENCE = (8, 16)
"""Words of a sentence, least and most."""


def generate(options: GeneratedSection) -> dict[str, list[Example]]:
    """Train, val and test; the same options give the same documents."""
    rng = np.random.default_rng(options.seed)
    found: dict[str, list[Example]] = {}
    for part, size in (("train", options.documents), ("val", options.held_out), ("test", options.held_out)):
        if part == "train":
            low, high = np.log(options.train_shortest), np.log(options.train_words)
            lengths = np.exp(rng.uniform(low, high, size))
        else:
            lengths = rng.uniform(options.shortest, options.words, size)
        found[part] = [_example(rng, options, int(words), f"{part}-{i}") for i, words in enumerate(lengths)]
    return found


def _example(rng: np.random.Generator, options: GeneratedSection, words: int, name: str) -> Example:
    # As many sentences as surely hold the words, cut where they are reached.
    most = max(2 * options.facts, words // SENTENCE[0] + 1)
    sizes = rng.integers(SENTENCE[0], SENTENCE[1] + 1, most)
    sizes = sizes[: max(2 * options.facts, int(np.searchsorted(np.cumsum(sizes), words)) + 1)].tolist()
    filler = FILLER_WORDS[rng.integers(0, len(FILLER_WORDS), sum(sizes))].tolist()
    ends = np.cumsum(sizes).tolist()
    sentences = [filler[end - size : end] for size, end in zip(sizes, ends)]
    kinds = KINDS[: options.facts]
    places = rng.choice(len(sentences), size=2 * len(kinds), replace=False)
    summary = []
    for k, kind in enumerate(kinds):
        true, false = rng.choice(options.names, size=2, replace=False)
        for place, mark, value in ((places[2 * k], MARK, true), (places[2 * k + 1], RUMOUR, false)):
            at = int(rng.integers(0, SENTENCE[0] - 3))
            sentences[place][at : at + 3] = [mark, kind, f"n{value}"]
        summary += [kind, f"n{true}"]
    text = [" ".join(sentence) + " ." for sentence in sentences]
    gold = tuple(sorted({int(places[2 * k]) for k in range(len(kinds))}))
    return Example(name, source_from_sentences(name, text), None, (" ".join(summary),), gold)
