"""The run itself: check, then time within the minutes that there are, and write what was found."""

import json
import platform
import subprocess
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu import aims
from benchmarks.gpu.checks import fault, results, sanitize, scatter, step_faults
from benchmarks.gpu.contenders import Contender, ours, peers
from benchmarks.gpu.scale import DRY, FULL, Scale
from benchmarks.gpu.timing import decoding, inputs, limits, measure


def run(*, dry: bool, check: bool, once: bool, only: str, minutes: float, out: Path) -> int:
    """0: all ours right; 1: one of our kernels is wrong; see `__main__` for the options."""
    scale, start = DRY if dry else FULL, time.monotonic()
    field = [one for one in (*ours(), *peers(scale.device)) if only in one.group]
    if once:
        return _once(scale, field)
    right, failed = checked(scale, field)
    if check and not dry:
        said = sanitize(only)
        print("\n".join(said))
        failed += sum(line.endswith("wrong") for line in said)
    if check or failed:
        print(f"{failed} of our checks failed: nothing is timed" if failed else "all of our kernels are right")
        return 1 if failed else 0
    found = Found(scale, out)
    stopped = found.time_all(right, start + 60 * minutes)
    if stopped:
        print(f"stopped after {minutes:g} minutes: {stopped}; what was timed is written")
    found.write(stopped)
    return 0


def _once(scale: Scale, field: list[Contender]) -> int:
    """Every kernel once, for compute-sanitizer."""
    for one in field:
        if one.name == aims.OURS:
            results(one, inputs(scale, 2, 192, 64, tokens=192, grad=True))
    step_faults(scale, 2, 64)
    return 0


def checked(scale: Scale, field: list[Contender]) -> tuple[list[Contender], int]:
    """(who is right, how many of our kernels are wrong)."""
    right, failed = [], 0
    for one in field:
        mine, why = one.name.startswith("longspan triton"), []
        for _, width in scale.heads:
            text = fault(scale, one, width)
            if not text and mine:
                text = scatter(scale, one, width)
            why += [f"width {width}: {text}"] if text else []
        print(f"{'left out' if why else 'right':8}  {one.group:14} {one.name:28} {'; '.join(why)}", flush=True)
        failed += bool(why) and (mine or (one.name == "longspan flex" and not scale.dry))
        right += [] if why else [one]
    for heads, width in scale.heads:
        for group, text in step_faults(scale, heads, width).items():
            print(f"{'wrong' if text else 'right':8}  {group:14} {'step':28} {text}", flush=True)
            failed += bool(text)
    return right, failed


class Found:
    """What was timed, and where it is written."""

    def __init__(self, scale: Scale, out: Path):
        self.scale, self.out, self.limit = scale, out, limits(scale)
        self.rows: list[dict] = []
        self.steps: list[dict] = []
        print(
            f"copy {self.limit['bytes_per_s'] / 1e12:.2f} TB/s, products {self.limit['flops_per_s'] / 1e12:.0f} TFLOP/s"
        )

    def time_all(self, right: list[Contender], deadline: float) -> str:
        """Why it stopped early; "" if it came to the end. Decoding comes first: it takes seconds."""
        scale = self.scale
        for heads, width in scale.heads:
            for after in scale.contexts:
                for batch in scale.batches:
                    if time.monotonic() > deadline:
                        return "in decoding"
                    self.steps += self._say_steps(decoding(scale, heads, width, after, batch))
        for length in scale.lengths:
            for heads, width in scale.heads:
                for one in right:
                    if length > one.longest:
                        continue
                    if time.monotonic() > deadline:
                        return f"at length {length}, {heads} x {width}, before {one.group} {one.name}"
                    self._time(one, heads, width, length)
                self.write("", final=False)  # a run that is killed leaves what it had
        return ""

    def _say_steps(self, rows: list[dict]) -> list[dict]:
        for row in rows:
            where = f"{row['group']:14} step after {row['after']:6}  batch {row['batch']:3}"
            print(
                f"{where}  {row['heads']}x{row['width']}  {row['step_ms']:.3f} ms, {row['tokens_per_s']:.0f} tokens/s"
            )
        return rows

    def _time(self, one: Contender, heads: int, width: int, length: int) -> None:
        at = f"{one.group:14} {one.name:28} {heads}x{width} {length:7}"
        try:
            row = measure(self.scale, one, heads, width, length, self.limit)
        except Exception as error:  # out of memory, or a peer that fails at this length: said, and left out
            print(f"{at}  {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}", flush=True)
            return
        finally:
            if not self.scale.dry:
                torch.cuda.empty_cache()
        self.rows.append(
            {"group": one.group, "name": one.name, "heads": heads, "width": width, "length": length, **row}
        )
        print(
            f"{at}  forward {row['forward_ms']:8.3f} ms ({row['forward_of_roofline']:4.0%} of roofline)  "
            f"both {row['both_ms']:8.3f} ms ({row['both_of_roofline']:4.0%})  {row['peak_mb']:8.0f} MB",
            flush=True,
        )

    def write(self, stopped: str, *, final: bool = True) -> None:
        """JSON, and at the end the plot and what became of the aims."""
        verdicts = aims.verdicts(self.rows, self.steps)
        everything = {
            "environment": {**environment(self.scale), **self.limit},
            "stopped": stopped or None,
            "aims": verdicts,
            "rows": sorted(self.rows, key=lambda r: (r["group"], r["heads"], r["length"], r["name"])),
            "steps": self.steps,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(everything, indent=1) + "\n")
        if not final:
            return
        for one in verdicts:
            said = "not measured" if one["met"] is None else f"{'met' if one['met'] else 'MISSED'}: {one['ratio']:.2f}"
            print(f"aim  {one['aim']}: {said}")
        if self.rows:
            plot(self.rows, self.out.with_suffix(".png"))
        print(f"written: {self.out}" + (f" and {self.out.with_suffix('.png').name}" if self.rows else ""))


def environment(scale: Scale) -> dict:
    """What the figures belong to."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": "dry, under the interpreter" if scale.dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "python": platform.python_version(),
        "date": str(date.today()),
        "commit": commit,
    }


def plot(rows: list[dict], path: Path) -> None:
    """Milliseconds over the length, forward and forward + backward, a line per contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = sorted({(row["group"], row["heads"], row["width"]) for row in rows})
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(11, 3 * len(groups)), squeeze=False)
    for line, key in zip(axes, groups):
        mine = [row for row in rows if (row["group"], row["heads"], row["width"]) == key]
        for axis, kind in zip(line, ("forward_ms", "both_ms")):
            for name in sorted({row["name"] for row in mine}):
                points = sorted((row["length"], row[kind]) for row in mine if row["name"] == name)
                axis.plot(*zip(*points), marker="o", label=name)
            title = f"{key[0]}, {key[1]} x {key[2]}"
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=kind.replace("_ms", ", ms"), title=title)
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
