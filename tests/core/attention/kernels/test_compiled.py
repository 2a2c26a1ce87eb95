"""Every kernel is compiled for Hopper and Ampere, bfloat16 included, on machines without a GPU too (pytest -m slow).

The interpreter knows neither layouts nor shared memory: a kernel that it runs may still not compile. Here Triton and
its ptxas do all that they do on a GPU, except for running. In a process of its own, because the interpreter is
switched on while Triton is imported.
"""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from core.attention.kernels import decay, delta, features, gated, gated_sweeps, hybrid, hybrid_blocks, hybrid_gradients
from core.attention.kernels import hybrid_launch, linear_gradients, linear_launch, linear_sweeps, packs, ring_step, step
from core.attention.kernels import window, window2d

ELEMENTS = {"q", "k", "v", "d_out", "out", "dq", "dk", "dv", "x", "a", "c", "da", "dc"}
ELEMENTS |= {"tail_q", "tail_k", "keys", "values", "new_keys", "new_values"}
NUMBERS = {"scale", "least"}
SCALES = {"scale"}  # a number in the window's kernels, a pointer in the linear ones
DOT = {"bf16": tl.bfloat16, "fp16": tl.float32, "fp32": tl.float32}


def build(kernel, element, arch, blocks, constants):
    given = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in given:
            signature[name] = "constexpr"
            continue
        number = name == "least" or (name == "scale" and kernel in WINDOW + WINDOW2D + HYBRID + RING)
        pointer = kernel.params[at].name in POINTERS and not number
        kind = element if name in ELEMENTS else INTEGERS.get(name, "fp32")
        signature[name] = "*" + kind if pointer else "fp32" if number else "i32"
        if pointer:
            attributes[(at,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(name),): value for name, value in given.items()}
    source = ASTSource(kernel, signature, indices, attributes)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).metadata.shared


INTEGERS = {"mask": "u8", "table": "i32", "slots": "i32", "offsets": "i64", "key_offsets": "i64"}
INTEGERS |= {"held": "u8", "new_held": "u8", "at_q": "i64", "at_k": "i64"}
POINTERS = ELEMENTS | set(INTEGERS) | {"factors", "d_factors", "d", "dg"}
POINTERS |= {"mask", "gate", "rate", "floor", "states", "mass", "den", "end", "scale", "d_den", "sums"}
POINTERS |= {"totals", "first", "along", "d_first", "slopes", "delta", "d_mass", "state", "count", "beta", "g", "b"}
POINTERS |= {"t", "y", "z", "dq_parts", "dk_parts", "d_end", "d_gate", "past", "future", "after", "before", "dx", "dy"}
POINTERS |= {"written", "level", "new_count"}
LINEAR = [linear_sweeps.write, linear_sweeps.forward, linear_gradients.query_gradient]
LINEAR += [linear_gradients.key_gradient]
LINEAR += [features.row_gradients, step._step]
WINDOW = [window._forward, window._delta, window._query_gradient, window._key_gradient]
WINDOW2D = [window2d._forward, window2d._query_gradient, window2d._key_gradient]
GATED = [gated_sweeps.cumulate, gated_sweeps.inner, gated_sweeps.inner_gradient, gated_sweeps.write]
GATED += [gated_sweeps.forward, gated_sweeps.query_gradient, gated_sweeps.key_gradient]
DELTA = [delta._couple, delta._solve, delta._solve_gradient]
HYBRID = [hybrid_blocks.write, hybrid_blocks.forward]
HYBRID += [hybrid_gradients.query_gradient, hybrid_gradients.key_gradient]
RING = [ring_step._ring_step]
names = {80: "ampere", 90: "hopper"}
step_blocks = linear_launch.BLOCKS[None]
found = []
arch, element, size = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
precision = "ieee" if element == "fp32" else "tf32"
MAPS = (64, 64, 64, "elu"), (128, 128, 128, "relu"), (16, 153, 256, "taylor"), (64, 64, 64, "focused")
for D, F, FP, name in MAPS:
    table, pack = linear_launch.BLOCKS, name == "focused"
    blocks = table.get((names[arch], FP, size)) or table[None]
    tile = min(blocks.values, 128)
    flags = {"ONES": True, "MASK": True, "NORMALIZE": True, "CAUSAL": True, "STATE": True, "KEEP": True}
    flags |= {"FLOOR": True, "MASS": True, "COUNT": True, "REVERSE": False, "DECAY": "constant", "DELTA": False}
    flags |= {"TURN": name != "taylor", "INTERLEAVED": False, "LOG_BASE": 13.25}
    shape = {"D": D, "F": F, "E": 128, "FP": FP, "DP": max(16, D), "BE": tile, "EP": 128, "MAP": name}
    flags |= {"PACK": True, "MASK": False, "KEEP": False} if pack else {"PACK": False}
    for kernel in LINEAR[: 5 if pack else 6]:
        chunk = max(16, blocks.chunk // 2) if kernel is linear_gradients.key_gradient else blocks.chunk
        constants = {**flags, **shape, "C": chunk, "DOT": DOT[element], "PRECISION": precision}
        found.append((kernel.__name__, FP, build(kernel, element, arch, blocks, constants)))
for width in (64, 128, 256):
    blocks = window.BLOCKS.get((names[arch], width, size)) or window.BLOCKS[None]
    shape = {"D": width, "E": width, "DP": width, "EP": width, "BM": blocks.chunk, "BN": blocks.values}
    flags = {"CAUSAL": True, "MASK": True, "ALIBI": True, "MASS": True, "PRECISION": precision, "PACK": False}
    dot = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[element]
    shape |= {"QW": 8, "KW": 8}
    for kernel in WINDOW + WINDOW2D:
        constants = {**shape, **flags, "DOT": dot}
        found.append((kernel.__name__, width, build(kernel, element, arch, blocks, constants)))
        if width == 64 and "table" in kernel.arg_names:
            constants |= {"MASK": False, "PACK": True}
            found.append((kernel.__name__ + " of packs", width, build(kernel, element, arch, blocks, constants)))
for module, kernels in ((gated, GATED), (delta, DELTA)):
    for width, vector in ((64, True), (128, False), (256, True)):
        blocks = module.BLOCKS.get((names[arch], width, size)) or module.BLOCKS[None]
        constants = {"F": width, "FP": width, "E": 128, "EP": 64, "BE": blocks.values, "C": blocks.chunk}
        constants |= {"STATE": True, "KEEP": True, "REVERSE": True, "VECTOR": vector}
        constants |= {"DOT": DOT[element], "PRECISION": precision}
        for kernel in kernels:
            found.append((kernel.__name__, width, build(kernel, element, arch, blocks, constants)))
constants = {"D": 64, "F": 64, "E": 64, "FP": 64, "BE": 32, "MAP": "identity", "DECAY": "vector", "ONES": False}
constants |= {"MASK": False, "COUNT": False, "NORMALIZE": False, "DELTA": True}
constants |= {"TURN": False, "INTERLEAVED": False, "LOG_BASE": 0.0}
found.append(("delta step", 64, build(step._step, element, arch, step_blocks, constants)))
for width, pack in ((64, False), (hybrid.WIDEST, False), (64, True)):
    key = names[arch], width, size
    constants = dict.fromkeys(("D", "G", "F", "E", "DP", "XP", "FP", "EP"), width)
    constants |= {"BT": 64, "MAP": "elu", "MASK": not pack, "STATE": True, "SAME": pack, "CAUSAL": False}
    constants |= {"TURN": not pack, "PACK": pack, "ROWS": True, "PRECISION": precision}
    constants |= {"DOT": DOT[element], "NEAR": DOT[element]}
    for kernel in HYBRID:
        table = {"query_gradient": hybrid_launch.ROWS, "key_gradient": hybrid_launch.KEYS}
        table = table.get(kernel.__name__, hybrid_launch.BLOCKS)
        blocks = table.get(key) or table[None]
        own, met = (blocks.values, blocks.chunk) if kernel is hybrid_gradients.key_gradient else blocks[:2]
        used = build(kernel, element, arch, blocks, {**constants, "BM": own, "BN": met})
        found.append((kernel.__name__, width, used))
for width, name in ((64, "elu"), (256, "elu"), (16, "taylor")):
    count = 153 if name == "taylor" else width
    constants = {"D": width, "G": width, "F": count, "E": 128, "DH": max(16, width // 2), "BE": 32, "BN": 16}
    constants |= {"FH": 128 if name == "taylor" else width // 2, "MAP": name, "INTERLEAVED": False, "LOG_BASE": 13.25}
    constants |= {"GP": 4} | dict.fromkeys(("TAIL", "MASK", "LEVEL", "ALIBI", "ROTARY"), True) | {"TURN": name == "elu"}
    found.append(("ring step", width, build(ring_step._ring_step, element, arch, step_blocks, constants)))
for kernel in (packs.lay_out, decay.sums_to_end):
    constants = {"OVER": "future", "BLOCK": 128}
    found.append((kernel.__name__, 0, build(kernel, element, arch, step_blocks, constants)))
print(json.dumps(found))
"""
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have, by architecture."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "element", "size"), [(90, "bf16", 2), (90, "fp16", 2), (90, "fp32", 4), (80, "bf16", 2)]
)
def test_every_kernel_compiles_and_fits_into_shared_memory(arch, element, size):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(arch), element, str(size)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    assert len(found) == 3 * 6 + 5 + 3 * 7 + 3 + 3 * 10 + 1 + 3 * 4 + 3 + 2
    for name, width, shared in found:
        assert shared <= SHARED[arch], f"{name} width {width}: {shared} bytes"


SPILLED = {
    ("linear past", "key_gradient"): 40,
    ("linear past, taylor 16", "forward"): 128,
    ("linear past, packs", "key_gradient"): 40,
    ("linear past, focused", "key_gradient"): 96,
    ("linear past, taylor 16", "query_gradient"): 384,
    ("linear past, taylor 16", "key_gradient"): 1632,
    ("decay", "query_gradient"): 16,
    ("decay", "key_gradient"): 32,
    ("hybrid two-sided", "key_gradient"): 16,
}
"""Bytes per thread that are known not to fit into registers at width 64; docs/kernels.md names them as open."""


@pytest.mark.slow
def test_nothing_else_spills_where_it_runs_by_default():
    """As launched by the operators in bfloat16 on Hopper: what does not fit into registers goes through memory."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.registers", "--widths", "64", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len({one["operator"] for one in found}) == 24
    places = [(one["operator"], one["kernel"], one["spilled"]) for one in found]
    assert not [(name, kernel, more) for name, kernel, more in places if more > SPILLED.get((name, kernel), 0)]
