"""What the length of a document costs a summariser on a CPU (Linux): encoder from 4k to 64k, a long document.

    python -m benchmarks.summarization_length                     # all, about 10 minutes on one core
    python -m benchmarks.summarization_length --only encoder      # or document
    python -m benchmarks.summarization_length --out benchmarks/results/summarization-length.json

encoder: an extractor's document encoder (2 blocks, width 64, 4 heads) over 4,096 to 65,536 sentences, forward, one
document: the exponent of time and of peak memory in the length. softmax is measured to 16,384, where it can be told.
document: a generated story of 100,000 words in, the summary out: reading, splitting, features, scores, choice, by
untrained weights, which cost what trained ones do; nothing is cut.

A figure is the best of three rounds, lengths taking turns; memory is the peak above what was there before, each length
in a process of its own. The bars are the project's own; `ok` says whether this run reaches them.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch

from apps.summarization.documents import Example, source_from_text
from apps.summarization.extractive import Extractor
from apps.summarization.items import ExtractiveItems, collate_extractive
from apps.summarization.selection import Budget, lengths_of, select
from benchmarks.attention_cpu import exponent, finish, peak_bytes, rounds
from core.backbone import Encoder

DIM, DEPTH, HEADS, WINDOW = 64, 2, 4, 64
LENGTHS = (4096, 8192, 16384, 32768, 65536)
SHORT = (2048, 4096, 8192, 16384)
VARIANTS = {"linear": {}, "window": {"window": WINDOW}, "hybrid": {"window": WINDOW}, "softmax": {}}
SLOPE_BAR, SECONDS_BAR, BYTES_BAR = 1.15, 120, 6e9
WORDS = 100_000


def encoder(name: str) -> Encoder:
    torch.manual_seed(0)
    return Encoder(DIM, DEPTH, HEADS, {"variant": name, **VARIANTS[name]}, mlp_dim=2 * DIM).eval()


def work(length: int, name: str):
    """One forward pass, its input made; for `peak_bytes`."""
    model, x = encoder(name), torch.randn(1, length, DIM)

    def run():
        with torch.no_grad():
            model(x)

    return run


def row(what: str, variant: str, value: float, bar: str, ok: bool | None, **extra) -> dict:
    verdict = "" if ok is None else ("ok" if ok else "BELOW THE BAR")
    print(f"{what:34} {variant:9} {value:10.3f}   {bar:10} {verdict}", flush=True)
    return {"what": what, "variant": variant, "value": round(value, 3), "bar": bar, "ok": ok, **extra}


def encoder_rows() -> list[dict]:
    found = []
    for name in VARIANTS:
        lengths = SHORT if name == "softmax" else LENGTHS
        bar = None if name == "softmax" else SLOPE_BAR
        times = rounds({str(n): work(n, name) for n in lengths}, 3)
        slope = exponent(lengths, [times[str(n)] for n in lengths])
        shown = {n: round(ms, 2) for n, ms in times.items()}
        found.append(judged(f"encoder time, {lengths[0]}..{lengths[-1]}", name, slope, bar, ms=shown))
        peaks = {n: peak_bytes("benchmarks.summarization_length", n, name) for n in lengths}
        slope = exponent(lengths, list(peaks.values()))
        shown = {str(n): peak for n, peak in peaks.items()}
        found.append(judged(f"encoder memory, {lengths[0]}..{lengths[-1]}", name, slope, bar, peak_bytes=shown))
    return found


def judged(what: str, name: str, slope: float, bar: float | None, **extra) -> dict:
    return row(what, name, slope, "" if bar is None else f"<= {bar}", None if bar is None else slope <= bar, **extra)


def story(words: int) -> str:
    """Prose-like text: sentences of 6 to 30 words from a Zipf vocabulary, names and numbers among them."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(20_000)])
    ranks = np.minimum(rng.zipf(1.3, words + 40), len(vocabulary)) - 1
    found, at = [], 0
    while at < words:
        size = int(rng.integers(6, 31))
        found.append(" ".join(vocabulary[ranks[at : at + size]]).capitalize() + ".")
        at += size
    return " ".join(found)


def document_rows() -> list[dict]:
    found = []
    text = story(WORDS)
    spec = {"vocabulary": [f"word{i}" for i in range(4000)], "features": 32, "queries": False}
    for name in ("linear", "hybrid"):
        given = {
            "dim": DIM,
            "depth": DEPTH,
            "heads": HEADS,
            "dropout": 0.0,
            "attention": {"variant": name, **VARIANTS[name]},
        }
        torch.manual_seed(0)
        model = Extractor(given, features=32, vocabulary=4002, word_dim=32).eval()
        started = time.perf_counter()
        source = source_from_text("story", text)
        batch = collate_extractive([ExtractiveItems([Example("story", source, None, ())], spec, None, "predict")[0]])
        with torch.no_grad():
            scores = model(batch["words"], batch["features"])[0].numpy()
        chosen = select(scores, lengths_of(source.sentences), Budget(words=500))
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sizes = {"sentences": len(source.sentences), "words": source.words, "chosen": len(chosen)}
        assert source.words >= WORDS
        assert len(scores) == len(source.sentences)
        bar = f"<= {SECONDS_BAR}"
        found.append(row("100,000 words, seconds", name, seconds, bar, seconds <= SECONDS_BAR, **sizes))
        bar = f"<= {BYTES_BAR / 1e9:.0f}"
        found.append(row("100,000 words, GB of process", name, peak / 1e9, bar, peak <= BYTES_BAR))
    return found


PARTS = {"document": document_rows, "encoder": encoder_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--out", type=Path, help="write the rows and the environment here, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = [one for part in given.only for one in PARTS[part]()]
    finish(found, given.out, dim=DIM, depth=DEPTH, heads=HEADS, window=WINDOW)


if __name__ == "__main__":
    main()
