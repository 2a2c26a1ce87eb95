"""Generated sequences whose best possible accuracy is known: two planted motifs whose order decides the class.

Every sequence holds both motifs once, far apart, in random letters. The class says which stands before the other.
All k-mers are equally frequent in both classes, so what counts k-mers is right half the time; a share `noise` of the
labels is flipped, so nothing is right more often than 1 - noise.
"""

import numpy as np

from apps.genomics.data_section import GeneratedSection
from apps.genomics.records import Record

FIRST, SECOND = "GATTACAG", "TGCCATGC"  # A and B
CLASSES = ("B before A", "A before B")
LEAST_GAP = 16
"""Letters between the motifs, at least: more than a stem of convolutions sees."""


def generate(options: GeneratedSection) -> list[Record]:
    """Records in random order; the last fifth is the test part, the tenth before it validation."""
    random = np.random.default_rng(options.seed)
    records = []
    test, val = round(options.sequences * 0.8), round(options.sequences * 0.7)
    for number in range(options.sequences):
        letters = random.choice(list("ACGT"), options.length)
        room = options.length - len(FIRST) - len(SECOND) - LEAST_GAP
        left, extra = sorted(random.integers(0, room + 1, 2))
        right = left + len(FIRST) + LEAST_GAP + (extra - left)
        label = int(random.integers(2))
        motifs = (FIRST, SECOND) if label else (SECOND, FIRST)
        for at, motif in zip((left, right), motifs):
            letters[at : at + len(motif)] = list(motif)
        if random.random() < options.noise:
            label = 1 - label
        part = "train" if number < val else "val" if number < test else "test"
        records.append(
            Record(
                f"made{number}",
                f"generated sequence {number}",
                "".join(letters),
                CLASSES[label],
                split=part,
            )
        )
    return records


def best_accuracy(noise: float) -> dict[str, float]:
    """What the best possible classifier reaches; with two classes alike in number, MCC is 2 accuracy - 1."""
    return {"accuracy": 1 - noise, "mcc": 1 - 2 * noise}
