"""`longspan bench RECIPE`: what the recipe's model costs at several sizes of its input, with several attentions.

Forward passes over random input, eager, without gradients, at the recipe's precision; nothing is trained. Time is the
best of several rounds in which all attentions take turns; peak memory is the most that torch's allocator held during a
pass beyond weights and input; FLOPs are counted, not measured (a multiply-add is two).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter, LogLocator

from core.training.app import get_app
from core.training.bench import best_ms, environment
from core.training.errors import UserError
from core.training.evaluation import autocast
from core.training.figures import canvas
from core.training.plan import attention_overrides
from core.training.plots import COLOURS, LINES, MARKERS
from core.training.recipe import load_recipe
from core.training.run import write_json

LIMIT_MS = 20_000.0  # a size at which one pass would take longer is left out, and said so


class Sized(NamedTuple):
    """A model at one size of its input, as an app hands it over (`App.sized`).

    tokens: of one item.   batch: items per pass.   make: makes the input and gives a function that runs one pass.
    cost: runs one pass that counts the FLOPs of one item.
    """

    tokens: int
    batch: int
    make: Callable[[], Callable[[], Any]]
    cost: Callable[[], int]


def costs(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    variants: Sequence[str] = (),
    sizes: Sequence[str] = (),
    batch: int = 1,
    device: str | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measure, print a row for each attention and size as it comes, then growth and crossovers.

    Args:
        recipe: reference or path (of a trained run: RUN/recipe.yaml).   overrides: "key=value".
        variants: labels such as "hybrid:window=16"; "recipe" is the recipe's own attention. The others are compared
            with the first. None: softmax, and the recipe's own.
        sizes: in the app's words ("512", "480x640"); none: those that the app chooses.
        batch: items per pass.
        device: "cpu" or "cuda"; None: a CUDA device if there is one.
        out: also write everything here as JSON, and a plot beside it with the suffix .png.

    Returns:
        What `out` holds: {"recipe", "batch", "rows", "growth", "faster_from", "left_out", "environment"}.

    Raises:
        UserError: the app has no such part, a size does not fit the model, or the device is not there.
    """
    labels = list(dict.fromkeys(variants)) or ["softmax", "recipe"]
    recipes = {label: load_recipe(recipe, [*overrides, *attention_overrides(label)]) for label in labels}
    first = recipes[labels[0]]
    if not variants and recipes["recipe"].attention == first.attention:
        labels, recipes = ["softmax"], {"softmax": first}
    app = get_app(first.app)
    if app.sized is None:
        raise UserError(f"the app {app.name!r} does not say how its model grows; longspan bench measures layers alone")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    if batch < 1:
        raise UserError(f"--batch must be at least 1, got {batch}")
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {Path(out).parent}")
    if first.trainer.threads is not None:
        torch.set_num_threads(first.trainer.threads)
    with torch.no_grad(), autocast(first, torch.device(device)):
        models = {label: app.part("sized")(one, sizes, batch, device) for label, one in recipes.items()}
        rows, left_out = _measured(models, device)
    result = {
        "recipe": str(recipe),
        "overrides": list(overrides),
        "batch": batch,
        "precision": first.trainer.precision,
        "rows": rows,
        "growth": growth(rows),
        "faster_from": faster_from(rows),
        "left_out": left_out,
        "environment": environment(device),
    }
    print(told(result, labels[0]))
    if out is not None:
        write_json(Path(out), result)
        print(draw_costs(Path(out).with_suffix(".png"), result))
    return result


def _measured(models: Mapping[str, Mapping[str, Sized]], device: str) -> tuple[list[dict[str, Any]], list[str]]:
    rows: list[dict[str, Any]] = []
    left_out = []
    width = max(map(len, models))
    print(f"{'attention':{width}}  {'size':>10}  {'tokens':>7}  {'GFLOPs':>8}  {'items/s':>9}  {'peak MB':>9}")
    for size in next(iter(models.values())):
        here = {label: sized[size] for label, sized in models.items()}
        for label in [label for label, one in here.items() if _foreseen(rows, label, one.tokens) > LIMIT_MS]:
            del here[label]
            left_out.append(f"{label} at {size}: a pass would take longer than {LIMIT_MS / 1e3:.0f} s")
        found = {label: measure(one, device) for label, one in here.items()}
        for label, ms in best_ms({label: one.make() for label, one in here.items()}, device).items():
            one = here[label]
            row = {"attention": label, "size": size, "tokens": one.tokens, **found[label]}
            rows.append(row | {"ms": ms, "items_per_s": 1e3 * one.batch / ms})
            print(_line(rows[-1], width), flush=True)
    return rows, left_out


def measure(sized: Sized, device: str) -> dict[str, float]:
    """{"gflops" of one item, "peak_mb" of a pass over the batch}."""
    flops = sized.cost()
    return {"gflops": flops / 1e9, "peak_mb": peak_bytes(sized.make(), device) / 1e6}


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most that torch's allocator holds during a call beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says on stderr that there is no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, now)
    return most


def _foreseen(rows: Sequence[Mapping[str, Any]], label: str, tokens: int) -> float:
    """Milliseconds that a pass may take by what smaller ones took: the square of the tokens at worst."""
    own = [row for row in rows if row["attention"] == label]
    if not own:
        return 0.0
    power = 2.0
    if len(own) > 1:
        (a, b), (x, y) = ((row["ms"] for row in own[-2:]), (row["tokens"] for row in own[-2:]))
        power = min(2.0, max(1.0, float(np.log(b / a) / np.log(y / x)) + 0.2)) if y > x else 2.0
    return own[-1]["ms"] * (tokens / own[-1]["tokens"]) ** power


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Exponent of the time by tokens for each attention, through its three largest sizes, where set-up counts least."""
    found = {}
    for label in dict.fromkeys(row["attention"] for row in rows):
        tokens, ms = np.array([(row["tokens"], row["ms"]) for row in rows if row["attention"] == label][-3:]).T
        if len(set(tokens)) == 3:
            found[label] = round(float(np.polyfit(np.log(tokens), np.log(ms), 1)[0]), 2)
    return found


def faster_from(rows: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Size from which on each attention is faster than the first, at all that both were measured at; None: none."""
    labels = list(dict.fromkeys(row["attention"] for row in rows))
    ms = {(row["attention"], row["size"]): row["ms"] for row in rows}
    found: dict[str, str | None] = {}
    for label in labels[1:]:
        shared = [row["size"] for row in rows if row["attention"] == label and (labels[0], row["size"]) in ms]
        lost = [n for n, size in enumerate(shared) if ms[label, size] >= ms[labels[0], size]]
        after = shared[lost[-1] + 1 :] if lost else shared
        found[label] = after[0] if after else None
    return found


def told(result: Mapping[str, Any], first: str) -> str:
    """What the rows say, in a few lines."""
    lines = [f"{label}: time grows with the tokens to the power {power}" for label, power in result["growth"].items()]
    for label, size in result["faster_from"].items():
        lines.append(
            f"{label}: " + (f"faster than {first} from {size} on" if size else f"not faster than {first} here")
        )
    lines += [f"left out: {text}" for text in result["left_out"]]
    threads = result["environment"]["threads"]
    said = f"{result['environment']['device']}, " + (f"{threads} threads, " if threads else "")
    lines.append(f"forward passes of {result['batch']} on {said}{result['precision']}, eager; best of several rounds")
    return "\n".join(["", *lines])


def _line(row: Mapping[str, Any], width: int) -> str:
    return (
        f"{row['attention']:{width}}  {row['size']:>10}  {row['tokens']:>7}  {row['gflops']:>8.3f}"
        f"  {row['items_per_s']:>9.3g}  {row['peak_mb']:>9.1f}"
    )


def draw_costs(path: Path, result: Mapping[str, Any]) -> Path:
    """Time and peak memory by tokens, a line per attention; a ring where one starts to be faster than the first.

    The legend below says from which size on that is, and how the time grows through the three largest sizes.
    """
    rows = result["rows"]
    labels = list(dict.fromkeys(row["attention"] for row in rows))
    columns = 2 if max(map(len, labels)) < 40 else 1
    with canvas(path, 9.4, 3.9 + 0.2 * -(-len(labels) // columns)) as figure:
        panels = figure.subplots(1, 2)
        for axes, key, title in zip(panels, ("ms", "peak_mb"), ("milliseconds per pass", "peak MB of a pass")):
            for n, label in enumerate(labels):
                own = [row for row in rows if row["attention"] == label]
                power, start = result["growth"].get(label), result["faster_from"].get(label)
                look = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)], "ms": 4}
                name = label if power is None else f"{label}: tokens$^{{{power:g}}}$"
                name += f", faster from {start} on" if start else ""
                tokens = [row["tokens"] for row in own]
                axes.plot(tokens, [row[key] for row in own], ls=LINES[n % len(LINES)], label=name, **look)
                cross = [row for row in own if row["size"] == start]
                if key == "ms" and cross:
                    axes.plot(cross[0]["tokens"], cross[0]["ms"], "o", ms=11, mfc="none", color=look["color"])
            axes.set(xscale="log", yscale="log", xlabel="tokens of one item (and its size)", title=title)
            ticks = {row["tokens"]: f"{row['tokens']}\n{row['size']}" for row in rows}
            axes.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.minorticks_off()
        title = f"ring: from here on faster than {labels[0]}" if len(labels) > 1 else None
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower left", fontsize=8, title=title, title_fontsize=8, ncols=columns
        )
    return path
