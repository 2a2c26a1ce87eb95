"""Open reading frames: the floor of gene finding, a rule that knows start and stop codons and nothing else."""

from collections.abc import Sequence

import numpy as np

from apps.genomics.alphabet import DNA

STARTS, STOPS = ("ATG", "GTG", "TTG"), ("TAA", "TAG", "TGA")
LEAST = 300
"""Bases of the shortest frame that counts: by chance one of this length is rare."""


def frame_labels(codes: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Class per base [L]: open frames of both strands painted from the longest down, where nothing stands yet.

    Class names are those of `features.class_names` with the key CDS: "CDS", or "CDS+" and "CDS-", or with the codon
    position after the strand.
    """
    length = len(codes)
    frames = [(start, stop, "+") for start, stop in open_frames(codes)]
    turned = DNA.reverse_complement(codes)
    frames += [(length - stop, length - start, "-") for start, stop in open_frames(turned)]
    labels = np.zeros(length, dtype=np.int64)
    for start, stop, strand in sorted(frames, key=lambda frame: frame[0] - frame[1]):
        if labels[start:stop].any():
            continue
        if "CDS" in names:
            labels[start:stop] = names.index("CDS")
        elif f"CDS{strand}" in names:
            labels[start:stop] = names.index(f"CDS{strand}")
        else:
            position = np.arange(stop - start) % 3
            labels[start:stop] = names.index(f"CDS{strand}1") + (position if strand == "+" else position[::-1])
    return labels


def open_frames(codes: np.ndarray, least: int = LEAST) -> list[tuple[int, int]]:
    """(start, stop) of every frame of one strand, from the first start codon after a stop to and with the next stop."""
    number = {letter: code for code, letter in enumerate(DNA.letters)}
    words = np.full(max(0, len(codes) - 2), -1)
    clean = (codes[:-2] < 4) & (codes[1:-1] < 4) & (codes[2:] < 4)
    words[clean] = (codes[:-2] * 16 + codes[1:-1] * 4 + codes[2:])[clean]
    code = {codon: sum(number[letter] * 4 ** (2 - at) for at, letter in enumerate(codon)) for codon in STARTS + STOPS}
    found = []
    for frame in range(3):
        codons = words[frame::3]
        stops = np.flatnonzero(np.isin(codons, [code[codon] for codon in STOPS]))
        starts = np.flatnonzero(np.isin(codons, [code[codon] for codon in STARTS]))
        before = -1
        for stop in stops.tolist():
            at = np.searchsorted(starts, before + 1)
            if at < len(starts) and starts[at] < stop and 3 * (stop + 1 - starts[at]) >= least:
                found.append((frame + 3 * int(starts[at]), frame + 3 * (stop + 1)))
            before = stop
    return found
