"""`longspan bench`: how fast the variants are on this device, and what they remember.

speed   one layer, forward and backward, at several lengths; kept in the cache folder, where the variant `auto`
        reads it (core.attention.measurement)
recall  accuracy of every variant on the recall probe (core.training.recall)
"""

import gc
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from core.attention import Attention, measurement
from core.attention.registry import nearest, variant_class
from core.attention.variants.auto import CANDIDATES
from core.layout import is_preset
from core.training import recall
from core.training.errors import UserError
from core.training.run import commit, write_json
from core.training.sections import canonical_attention
from core.training.yaml_values import parse_yaml

HEADS, WIDTH = 2, 64
LENGTHS = (256, 1024, 4096, 16384)
LIMIT_MS = 4000.0  # a length that would take longer is left out: `auto` draws the line on
ROUNDS = 5
SPEED = (*CANDIDATES, "window", "linear")
RECALL = (
    *("softmax", "window:window=16", "hybrid:window=16", "based"),
    *("linear", "linear:feature_map=taylor", "linear:feature_map=hedgehog"),
    *("retnet", "ssd", "gla", "mlstm", "delta", "gated_delta"),
)
"""What is measured where nothing is asked for; a window as long as the probe's sequences would be softmax."""


def bench(
    suite: str = "speed",
    *,
    variants: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    tasks: Sequence[str] = (),
    device: str | None = None,
    out: str | Path | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, Any]:
    """Measure, print rows as they come and a table at the end.

    Args:
        suite: "speed" or "recall".
        variants: labels such as "hybrid:window=16"; speed measures them beside `SPEED`, recall instead of `RECALL`.
        seeds: of recall's models.
        tasks: of recall, names of `recall.PROBES`; none: all.
        device: "cpu" or "cuda"; None: a CUDA device if there is one.
        out: also write rows and environment here, as JSON.
        lengths: of speed, at least two.

    Returns:
        What `out` holds.

    Raises:
        UserError: a variant that cannot be built, an unknown task, or a device that is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    for task in tasks:
        if task not in recall.PROBES:
            known = f"known: {', '.join(recall.PROBES)}"
            raise UserError(f"--tasks: unknown task {task!r}{nearest(task, recall.PROBES)}; {known}")
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {Path(out).parent}")
    chosen = (*SPEED, *(v for v in variants if v not in SPEED)) if suite == "speed" else variants or RECALL
    attentions = {label: attention_of(label) for label in chosen}
    try:
        if suite == "speed":
            found = speed(attentions, device, lengths)
        else:
            found = remembered(attentions, seeds, tasks or tuple(recall.PROBES), device)
    except ValueError as error:
        raise UserError(f"--variants: {error}") from error
    if suite == "speed":
        print(f"kept for `auto` in {measurement.save(device, {**found, 'date': date.today().isoformat()})}")
    result = {"suite": suite, "environment": environment(device), **found}
    if out is not None:
        write_json(Path(out), result)
    return result


def attention_of(label: str) -> dict[str, Any]:
    """The attention section that a label such as "hybrid:window=16" stands for.

    Raises:
        UserError: no such variant or option.
    """
    name, *options = label.split(":")
    values: dict[str, Any] = {"variant": name}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise UserError(f"variant {label!r} must have the form name or name:option=value:option=value")
        values[key] = parse_yaml(text)
    try:
        return canonical_attention(values)
    except ValueError as error:
        raise UserError(f"--variants: {error}") from error


def speed(attentions: Mapping[str, Mapping[str, Any]], device: str, lengths: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of one layer, forward and backward, by variant, direction and length."""
    ms: dict[str, dict[str, dict[str, float]]] = {label: {} for label in attentions}
    for kind in measurement.DIRECTIONS:
        layers = {}
        for label, attention in attentions.items():
            if is_preset(attention):
                raise UserError(f"speed measures one layer; {label!r} is a layout of several")
            if {"causal": "causal", "two-sided": "bidirectional"}[kind] in variant_class(attention["variant"]).can:
                layers[label] = Attention(HEADS * WIDTH, HEADS, **attention, causal=kind == "causal").to(device)
                ms[label][kind] = {}
        for before, length in zip((None, *lengths), lengths):
            x = torch.randn(1, length, HEADS * WIDTH, device=device, requires_grad=True)
            within = {}
            for label, layer in layers.items():
                growth = length / before if before else 1
                steep = growth if layer.variant.growth == "linear" else growth**2
                last = ms[label][kind].get(str(before), 0.0 if before is None else LIMIT_MS)
                if last * steep <= LIMIT_MS:
                    within[label] = lambda layer=layer, x=x: layer(x).sum().backward()
            for label, best in best_ms(within, device).items():
                ms[label][kind][str(length)] = best
                print(f"{label:24} {kind:9} {length:6} tokens  {best:10.2f} ms", flush=True)
    return {"heads": HEADS, "width": WIDTH, "ms": ms}


def best_ms(functions: Mapping[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Best time of each in milliseconds, taking turns, so that a disturbance has to hit every round to show."""

    def once(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    times = {name: [once(function)] for name, function in functions.items()}  # the first call pays for set-up
    gc.collect()
    for _ in range(ROUNDS):
        for name, function in functions.items():
            if len(times[name]) == 1 or sum(times[name]) < LIMIT_MS / 2:
                times[name].append(once(function))
    return {name: min(several[1:]) for name, several in times.items()}


def remembered(
    attentions: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], tasks: Sequence[str], device: str
) -> dict[str, Any]:
    """Rows of the recall probe; each is printed as it is done, and a table at the end."""
    rows, probes = [], [recall.PROBES[task] for task in tasks]
    for row in recall.measure(attentions, seeds, probes=probes, device=device):
        rows.append(row)
        told = "  ".join(f"{level}: {100 * value:3.0f} %" for level, value in row["accuracy"].items())
        print(f"{row['task']:7} {row['variant']:32} seed {row['seed']}  {told}  {row['seconds']:6.1f} s", flush=True)
    print(recall_table(rows))
    sizes = {probe.name: {key: value for key, value in vars(probe).items() if key != "draw"} for probe in probes}
    return {"probes": sizes, "rows": rows}


def recall_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Mean accuracy per variant and level, and the worst and best seed, as Markdown."""
    lines = []
    grouped: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        grouped.setdefault(row["task"], {}).setdefault(row["variant"], []).append(row)
    for task, variants in grouped.items():
        levels = list(next(iter(variants.values()))[0]["accuracy"])
        word = {"pairs": "pairs", "needle": "depth"}[task]
        lines += ["", f"| {task} | {' | '.join(f'{word} {level}' for level in levels)} | decoding state |"]
        lines += ["|---" * (len(levels) + 2) + "|"]
        for label, several in variants.items():
            cells = []
            for level in levels:
                values = [100 * row["accuracy"][level] for row in several]
                mean, low, high = sum(values) / len(values), min(values), max(values)
                cells.append(f"{mean:.0f} ({low:.0f} to {high:.0f})" if len(values) > 1 else f"{mean:.0f}")
            lines.append(f"| `{label}` | {' | '.join(cells)} | {several[0]['state_bytes'] / 1000:.1f} kB |")
        lines.append(f"| chance | {' | '.join([f'{100 / recall.PROBES[task].values:.0f}'] * len(levels))} | |")
    return "\n".join(lines)


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "date": date.today().isoformat(),
        **measurement.identity(device),
        "python": platform.python_version(),
        "commit": commit(),
    }
