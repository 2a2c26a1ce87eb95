"""Files written after the test: predictions with ids, figures by length, and plots."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apps.genomics.tables import write_table
from core.training.figures import canvas, draw_calibration, draw_confusion, draw_curves, draw_scatter


def write_sequences(
    run_dir: Path,
    task: str,
    names: Sequence[str],
    ids: Sequence[str],
    predicted: np.ndarray,
    target: np.ndarray,
    index: np.ndarray,
) -> list[Path]:
    """predictions.csv, and by the task confusion, curves and calibration, or a scatter plot."""
    rows = []
    for guess, truth, at in zip(predicted, target, index):
        told = {"id": ids[at]}
        if task == "classification":
            told |= {"label": names[int(truth)], "predicted": names[int(guess.argmax())]}
            told |= {f"p_{name}": f"{p:.6g}" for name, p in zip(names, guess)}
        else:
            told |= {f"label_{name}": f"{value:.6g}" for name, value in zip(names, truth)}
            told |= {f"predicted_{name}": f"{value:.6g}" for name, value in zip(names, guess)}
        rows.append(told)
    files = [write_table(run_dir / "predictions.csv", rows)]
    if task == "classification":
        labels = target.astype(int)
        files.append(draw_confusion(run_dir / "confusion.png", labels, predicted.argmax(1), names))
        if len(np.unique(labels)) > 1:
            files.append(draw_curves(run_dir / "curves.png", predicted, labels, names))
        files.append(draw_calibration(run_dir / "calibration.png", predicted, labels))
    elif task == "regression":
        files.append(draw_scatter(run_dir / "scatter.png", predicted, target, names))
    return files


def write_bases(
    run_dir: Path,
    task: str,
    names: Sequence[str],
    sums: np.ndarray,
    kept: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[Path]:
    """Counts of true against predicted class, curves and calibration over bases, or a scatter plot."""
    if not kept:
        return []
    predicted, target = (np.concatenate(part) for part in zip(*kept))
    thin = slice(None, None, max(1, len(target) // 200_000))
    predicted, target = predicted[thin], target[thin]
    if task != "tokens":
        return [draw_scatter(run_dir / "scatter.png", predicted[:, None], target[:, None], names)]
    counts = sums.sum(0)
    rows = [{"true": name, **{other: int(n) for other, n in zip(names, row)}} for name, row in zip(names, counts)]
    files = [write_table(run_dir / "confusion.csv", rows)]
    files.append(draw_confusion(run_dir / "confusion.png", target, predicted.argmax(1), names))
    if len(np.unique(target)) > 1:
        files.append(draw_curves(run_dir / "curves.png", predicted, target, names))
    files.append(draw_calibration(run_dir / "calibration.png", predicted, target))
    return files


def write_language(run_dir: Path, nats: np.ndarray, bases: np.ndarray) -> list[Path]:
    """bits.csv and a histogram of bits per base over the stretches of the test part."""
    asked = bases > 0
    bits = nats[asked] / bases[asked] / np.log(2)
    rows = [
        {"stretch": int(n), "bases": int(b), "bits_per_base": f"{bit:.5f}"}
        for n, b, bit in zip(np.flatnonzero(asked), bases[asked], bits)
    ]
    files = [write_table(run_dir / "bits.csv", rows)]
    with canvas(run_dir / "bits.png", 5, 3) as figure:
        axes = figure.add_subplot()
        axes.hist(bits, bins=min(40, max(5, len(bits) // 5)), weights=bases[asked])
        axes.set(xlabel="bits per base", ylabel="bases", title=f"{len(bits)} stretches of the test part")
    return [*files, run_dir / "bits.png"]
