"""Registers, spills and shared memory of every kernel as it is launched by default, without a GPU.

    python -m benchmarks.gpu.registers                         # bfloat16 on sm_90, a Markdown table
    python -m benchmarks.gpu.registers --only hybrid --arch 80 --dtype float32 --widths 64 256 --json

The operators run on tensors of the device "meta", whose launches are caught instead of made: Triton and its ptxas
compile each of them for the architecture, with the alignments of contiguous tensors of 4,096 positions. Minutes of one
core; the kernels themselves do not run.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from core.attention.kernels import decay, delta, gated, hybrid, launch, linear, ring_step, step, window, window2d

ARCHES = {80: "ampere", 90: "hopper"}
TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "uint8": "u8",
    "bool": "u8",
    "int32": "i32",
    "int64": "i64",
}
LENGTH, HEADS, KEY_HEADS, SEQUENCES = 4096, 8, 4, 16
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def operators(width: int, dtype: torch.dtype) -> dict[str, Callable]:
    """Calls that launch the kernels of each operator, forward and backward, at a head width."""

    def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, keys = (1, HEADS, LENGTH), (1, KEY_HEADS, LENGTH)
    q, k, v, out = made(*rows, width), made(*keys, width), made(*keys, width), made(*rows, width)
    wide, mass = made(*rows, width, dtype=torch.float32), made(*rows, dtype=torch.float32)
    mask, end = made(1, LENGTH, dtype=torch.bool), made(1, KEY_HEADS, width, width, dtype=torch.float32)
    sums, one = made(1, KEY_HEADS, width, width + 1, dtype=torch.float32), [x[:, :, :1] for x in (q, k, v)]
    rates = made(*keys, dtype=torch.float32)
    packed = made(SEQUENCES + 1, dtype=torch.int64), None, LENGTH
    gates = made(*keys, width, dtype=torch.float32)

    def raw(operator: Any, *args) -> None:
        operator._init_fn(*args)

    def by_linear(direction: str, phi: str = "elu", narrow: int = width):
        factor = made(KEY_HEADS, width, dtype=torch.float32) if phi == "focused" else None
        a, c = made(*rows, narrow), made(*keys, narrow)
        state = made(
            1, KEY_HEADS, linear.phi_named(linear.seen_by_sums(phi)).width(narrow), width + 1, dtype=torch.float32
        )
        raw(linear.linear_forward, a, c, v, mask, None, None, None, phi, direction, 0, True, factor)
        given = a, c, v, out, mass, state, mask, None, None, None, factor, None, None
        raw(linear.linear_backward, out, mass, None, *given, phi, direction, 0, True, 0)

    def by_linear_packs(direction: str):
        raw(linear.linear_forward, q, k, v, *[None] * 4, "elu", direction, 0, True, None, *packed)
        end = sums.expand(SEQUENCES, -1, -1, -1)
        given = q, k, v, out, mass, end, *[None] * 5, *packed[:2]
        raw(linear.linear_backward, out, mass, None, *given, "elu", direction, 0, True, packed[2])

    def by_window_packs():
        raw(window.window_forward, q, k, v, None, None, 128, True, 0.1, *packed[::2])
        raw(window.window_backward, out, mass, q, k, v, out, mass, None, None, 128, True, 0.1, *packed[::2])

    def by_hybrid_packs():
        given = q, k, v, *[None] * 5, mass, None
        raw(hybrid.hybrid_forward, *given, "elu", 128, True, 0.1, False, *packed[::2])
        raw(hybrid.hybrid_backward, out, mass, None, *given, out, mass, "elu", 128, True, 0.1, *packed[::2])

    def by_hybrid(causal: bool, phi: str = "elu", narrow: int | None = None, turned: bool = False):
        tails = (None, None) if narrow is None else (made(*rows, narrow), made(*keys, narrow))
        turns = (made(*rows, width), made(*keys, width)) if turned else (None, None)
        given = q, k, v, *tails, *turns, mask, mass, None
        raw(hybrid.hybrid_forward, *given, phi, 128, causal, 0.1, False)
        raw(hybrid.hybrid_backward, out, mass, None, *given, out, mass, phi, 128, causal, 0.1)

    def by_window():
        raw(window.window_forward, q, k, v, mask, None, 128, True, 0.1)
        raw(window.window_backward, out, mass, q, k, v, out, mass, mask, None, 128, True, 0.1)

    def by_window2d():
        raw(window2d.window2d_forward, q, k, v, mask, 64, LENGTH // 64, 8, 0.1)
        raw(window2d.window2d_backward, out, mass, q, k, v, out, mass, mask, 64, LENGTH // 64, 8, 0.1)

    def by_decay():
        raw(decay.decay_forward, q, k, v, rates, None)
        raw(decay.decay_backward, wide, end, q, k, v, rates, None, end)

    def by_gated():
        raw(gated.gated_forward, q, k, v, gates, None)
        raw(gated.gated_backward, wide, end, q, k, v, gates, None, end)

    def by_delta(g: torch.Tensor):
        chunks = delta._Chunks(q, k, v, g, rates)
        chunks.solve(None)
        chunks.gradient(q, wide, end)

    def by_step(turned: bool = False):
        at = (made(1, 1, dtype=torch.int64),) * 2 if turned else ()
        raw(step.linear_step, *one, mask[:, :1], None, sums, None, "elu", True, *at)
        if turned:
            return
        raw(step.delta_step, *one, rates[:, :, :1], rates[:, :, :1], end)

    def by_ring(hybrid: bool, turned: bool = False, phi: str = "elu", narrow: int = width):
        ring = made(1, KEY_HEADS, 128, width), made(1, KEY_HEADS, 128, width), made(1, 128, dtype=torch.bool)
        if not hybrid:
            raw(ring_step.window_step, *one, mask[:, :1], None, *ring, 0.1)
            return
        tails = made(1, HEADS, 1, narrow), made(1, KEY_HEADS, 1, narrow)
        features = linear.phi_named(phi).width(narrow)
        states = made(1, KEY_HEADS, features, width + 1, dtype=torch.float32), made(1, dtype=torch.float32)
        at = (made(1, 1, dtype=torch.int64),) * 2 if turned else (None, None)
        given = *tails, mask[:, :1], made(HEADS, dtype=torch.float32), None, None, *ring, *states, *at
        raw(ring_step.hybrid_step, *one, *given, phi, 0.1, 1e4, False, turned)

    return {
        "linear past": lambda: by_linear("past"),
        "linear both": lambda: by_linear("both"),
        "linear past, taylor 16": lambda: by_linear("past", "taylor", 16),
        "linear past, focused": lambda: by_linear("past", "focused"),
        "linear past, packs": lambda: by_linear_packs("past"),
        "linear both, packs": lambda: by_linear_packs("both"),
        "decay": by_decay,
        "vector decay": by_gated,
        "delta": lambda: by_delta(rates),
        "vector delta": lambda: by_delta(gates),
        "window causal": by_window,
        "window causal, packs": by_window_packs,
        "window 2-D": by_window2d,
        "hybrid causal": lambda: by_hybrid(True),
        "hybrid two-sided": lambda: by_hybrid(False),
        "hybrid causal, rotary": lambda: by_hybrid(True, turned=True),
        "hybrid causal, taylor 16": lambda: by_hybrid(True, "taylor", 16),
        "hybrid causal, packs": by_hybrid_packs,
        "step": by_step,
        "step, rotary": lambda: by_step(turned=True),
        "window step": lambda: by_ring(False),
        "hybrid step": lambda: by_ring(True),
        "hybrid step, rotary": lambda: by_ring(True, turned=True),
        "hybrid step, taylor 16": lambda: by_ring(True, phi="taylor", narrow=16),
    }


def caught(call: Callable) -> list[tuple[JITFunction, tuple, dict]]:
    """The launches that a call makes on the device "meta"."""
    seen, run = [], JITFunction.run

    def keep(self, *args, grid, warmup, **options):
        seen.append((self, args, options))

    JITFunction.run = keep  # pyright: ignore[reportAttributeAccessIssue]
    try:
        call()
    finally:
        JITFunction.run = run
    return seen


def compiled(kernel: JITFunction, args: tuple, options: dict, arch: int) -> Any:
    """The kernel of one launch as Triton makes it for sm_`arch`."""
    meta = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    values = dict(zip(kernel.arg_names, args)) | {n: x for n, x in options.items() if n in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        value = values.get(name, kernel.params[at].default)
        if kernel.params[at].is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[at,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
            attributes[at,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i64" if abs(value) >= 1 << 31 else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[at,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=meta)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes per thread that do not fit into them) as the compiled file states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.findall(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    registers, stack = max(found, key=lambda pair: int(pair[0]))
    return int(registers), int(stack)


def report(width: int, dtype: torch.dtype, arch: int, only: str) -> Iterator[dict]:
    """One line per kernel and configuration, as they come."""
    launch.arch = lambda device: ARCHES[arch]
    launch.processors = lambda device: 132
    done = set()
    for name, call in operators(width, dtype).items():
        if only not in name:
            continue
        for kernel, args, options in caught(call):
            made = compiled(kernel, args, options, arch)
            if (made.hash, name) in done:
                continue
            done.add((made.hash, name))
            registers, spilled = resources(made.asm["cubin"])
            shape = {n: x for n, x in options.items() if n in ("C", "BM", "BN", "BE", "BT")}
            warps = options.get("num_warps", 4), options.get("num_stages", 3)
            yield {
                "operator": name, "kernel": kernel.__name__.removeprefix("_"), "width": width, "blocks": shape,
                "warps": warps[0], "stages": warps[1], "registers": registers, "spilled": spilled,
                "shared": made.metadata.shared,
            }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, choices=sorted(ARCHES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128], help="of heads, keys and values alike")
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    asked = parser.parse_args()
    if not asked.json:
        print("| operator | kernel | width | blocks | warps, stages | registers | spilled, bytes | shared, KiB |")
        print("|---|---|---|---|---|---|---|---|")
    for width in asked.widths:
        for one in report(width, getattr(torch, asked.dtype), asked.arch, asked.only):
            if asked.json:
                print(json.dumps(one), flush=True)
                continue
            blocks = " ".join(f"{n} {x}" for n, x in one["blocks"].items())
            print(
                f"| {one['operator']} | {one['kernel']} | {width} | {blocks} | {one['warps']}, {one['stages']} "
                f"| {one['registers']} | {one['spilled']} | {one['shared'] / 1024:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
