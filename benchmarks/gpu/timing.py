"""Times, memory and the hardware's own limits."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.contenders import RECURRENCES, RINGS, SPARSE, Contender, pairs, recurrence, ringed
from benchmarks.gpu.scale import Scale
from core.attention import linear_attention

CHUNK = 64


def inputs(scale: Scale, heads: int, length: int, width: int, *, tokens: int = 0, grad: bool = False):
    """q, k and v, the same numbers for every contender."""
    generator = torch.Generator(scale.device).manual_seed(0)
    shape = max(1, (tokens or scale.tokens) // length), heads, length, width
    made = [torch.randn(shape, generator=generator, device=scale.device, dtype=scale.dtype) for _ in range(3)]
    made[1] *= width**-0.5  # keeps un-normalised sums in a sane range; peers get the same numbers
    return [x.requires_grad_(grad) for x in made]


def timed(run: Callable, scale: Scale) -> float:
    """Median milliseconds of one call; dry, of a single one."""
    if scale.dry:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(3):
        run()
    torch.cuda.synchronize()

    def span(calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / calls

    calls = max(1, int(scale.calls_ms / max(1e-3, span(1))))
    return statistics.median(span(calls) for _ in range(5))


def limits(scale: Scale) -> dict[str, float]:
    """Measured copy bandwidth in bytes per second and matrix rate in FLOPs per second."""
    source = torch.empty(scale.copied, dtype=torch.uint8, device=scale.device)
    target, side = torch.empty_like(source), scale.square
    a = torch.randn(side, side, device=scale.device, dtype=scale.dtype)
    copy, product = timed(lambda: target.copy_(source), scale), timed(lambda: a @ a, scale)
    return {"bytes_per_s": 2e3 * source.numel() / copy, "flops_per_s": 2e3 * side**3 / product}


def roofline_ms(
    scale: Scale, group: str, heads: int, length: int, width: int, both: bool, limit: dict[str, float]
) -> float:
    """Least time of the group's mechanism: inputs and outputs moved once, FLOPs of the chunked or banded form."""
    rows = max(1, scale.tokens // length) * length * heads
    flops = 4 * pairs(group, length) * width
    if group not in ("softmax", "window", "window packs", "window2d", *SPARSE):
        chunked = 4 * width * width + (0 if group.startswith("linear both") else 4 * CHUNK * width)
        flops += chunked * (2 if group.endswith("delta") else 1)  # finding what is written costs as much as reading
    moved = 2 * 4 * width
    if both:
        flops, moved = 3.5 * flops, moved + 2 * 8 * width
    return 1e3 * rows * max(flops / limit["flops_per_s"], moved / limit["bytes_per_s"])


def measure(scale: Scale, one: Contender, heads: int, width: int, length: int, limit: dict[str, float]) -> dict:
    """Times, shares of the roofline and peak memory of one contender at one length."""
    q, k, v = inputs(scale, heads, length, width, grad=True)
    upstream = torch.randn_like(q)
    before = _memory(scale, reset=True)

    def forward():
        with torch.no_grad():
            return one(q, k, v)

    dtype = forward().dtype

    def both():
        return torch.autograd.grad(one(q, k, v), (q, k, v), upstream.to(dtype))

    row = {"forward_ms": timed(forward, scale), "both_ms": timed(both, scale)}
    row["peak_mb"] = (_memory(scale) - before) / 2**20
    for name, whole in (("forward", False), ("both", True)):
        least = roofline_ms(scale, one.group, heads, length, width, whole, limit)
        row[f"{name}_of_roofline"] = least / row[f"{name}_ms"]
    return row


def _memory(scale: Scale, reset: bool = False) -> int:
    if scale.dry:
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def steps(scale: Scale, heads: int, width: int, after: int, batch: int, only: str = "") -> dict[str, Callable]:
    """One decoding step of each mechanism after a context; softmax over a cache where it fits into memory.

    only: as in the command, what has to stand in the name.
    """
    q, k, v = inputs(scale, heads, after, width, tokens=after)
    token = [x[:, :, -1:].expand(batch, -1, -1, -1).contiguous() for x in (q, k, v)]
    found: dict[str, Callable] = {}
    if only in "linear":
        options = {"causal": True, "return_state": True, "backend": "triton"}
        sums = linear_attention(q, k, v, **options)[1]
        state = {name: x.expand(batch, *x.shape[1:]).contiguous() for name, x in sums.items()}
        found["linear"] = lambda: linear_attention(*token, state=state, **options)
    for group in (group for group in RECURRENCES if only in group):
        run = partial(recurrence, group=group, backend="triton")
        memory = run(q, k, v)[1].expand(batch, -1, -1, -1).contiguous()
        found[group] = partial(run, *token, state=memory)
    for group in (group for group in RINGS if only in group):
        found[group] = _ring_step(group, q, k, v, token)
    if batch <= scale.cached and only in "softmax sdpa":
        cache = [x.expand(batch, -1, -1, -1).contiguous() for x in (k, v)]
        found["softmax sdpa"] = lambda: F.scaled_dot_product_attention(token[0], *cache)
    return found


def _ring_step(group: str, q, k, v, token: list[torch.Tensor]) -> Callable:
    """A call that decodes `token` after q, k and v, and gives (output, new state)."""
    after, batch = q.shape[2], token[0].shape[0]
    variant, rotary = ringed(group, q, torch.arange(after, device=q.device))
    with torch.no_grad():
        state = variant.init_state(1, device=q.device, dtype=q.dtype)
        state = variant.resume(q, k, v, state, rotary=rotary, backend="triton")[1]
    state = {name: x.expand(batch, *x.shape[1:]).contiguous() for name, x in state.items()}
    _, rotary = ringed(group, q, torch.full((batch, 1), after, device=q.device))

    def step():
        attended, new = variant.resume(*token, state, rotary=rotary, backend="triton")
        return attended.out, new

    return step


def decoding(scale: Scale, heads: int, width: int, after: int, batch: int, only: str) -> list[dict]:
    """Milliseconds per step, and tokens per second."""
    shape = {"after": after, "batch": batch, "heads": heads, "width": width}
    with torch.no_grad():
        times = {group: timed(run, scale) for group, run in steps(scale, heads, width, after, batch, only).items()}
    return [{"group": group, **shape, "step_ms": ms, "tokens_per_s": 1e3 * batch / ms} for group, ms in times.items()]
