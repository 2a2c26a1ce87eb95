"""Which implementation runs, and why: one table, one rule, one log line.

Every implementation of a mechanism is entered with `@implementation(mechanism, backend, serves=...)` and says which
features it honours. `resolve` takes the first backend in `ORDER` for the device that honours everything asked for. An
explicit choice that cannot serve is an error that names the feature and who serves it, never a quiet fallback. A
Triton kernel, flex-attention or another library joins by one decorated function; nothing else changes.
"""

import logging
import os
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from core.attention.autocast import lowered

ORDER = {
    "cuda": ("fla", "sdpa", "torch", "flex", "triton"),
    "cpu": ("sdpa", "torch"),
}
"""Preference per device type; other devices follow the CPU's. `reference` is never chosen by itself. `flex` and
`triton` stand last because no GPU has run them (2026-11-25): until one has confirmed and timed them, they run where
they are asked for, as by `backend="triton"` or `set_backend("flex", "window")`."""

CONFIRMED: dict[str, str] = {}
"""Mechanism to the backend that leads for it on CUDA, once a GPU has confirmed and timed it there; a line here is how
`auto` is turned on for a kernel that wins (benchmarks/gpu/README.md)."""

FLEX = {"devices": ("cuda",), "dtypes": (torch.float32, torch.float16, torch.bfloat16), "widths": (16, 256)}
"""What `core.attention.flex` takes, as arguments of `implementation`. Below a width of 16 torch's kernel has no product
of matrices (torch 2.15); that file is imported when it is first called, for it takes more than a second."""

BACKENDS = ("reference", "torch", "sdpa", "flex", "triton", "fla")

log = logging.getLogger("longspan.attention")


def preference(mechanism: str, device: str) -> tuple[str, ...]:
    """The order in which `auto` tries the backends of a mechanism."""
    order = ORDER.get(device, ORDER["cpu"])
    first = CONFIRMED.get(mechanism) if device == "cuda" else None
    return order if first is None else (first, *(name for name in order if name != first))


class Implementation(NamedTuple):
    """One way to compute a mechanism: the function, the features it honours, where it runs, and on what inputs."""

    run: Callable
    serves: frozenset[str]
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    widths: tuple[int, int] | None


class Choice(NamedTuple):
    """What `resolve` decided: the backend's name, the function to call, and the reason in words."""

    name: str
    run: Callable
    reason: str


_table: dict[str, dict[str, Implementation]] = {}
_forced: dict[str | None, str] = {None: os.environ["LONGSPAN_BACKEND"]} if os.environ.get("LONGSPAN_BACKEND") else {}
_said: set[str] = set()


def implementation(
    mechanism: str,
    backend: str,
    *,
    serves: tuple[str, ...] = (),
    devices: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    widths: tuple[int, int] | None = None,
) -> Callable[[Callable], Callable]:
    """Decorator: enter a function as the `backend` implementation of `mechanism`.

    Args:
        mechanism: "softmax", "window", "linear", "hybrid", ...
        backend: one of `BACKENDS`.
        serves: optional features that it honours, in the mechanism's own words ("mass", "key_mask", ...).
        devices: device types it runs on; None: all.
        dtypes: input dtypes it takes; None: all.
        widths: narrowest and widest head that it takes; None: all.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")

    def keep(run: Callable) -> Callable:
        if backend in ("torch", "triton"):
            run = _backward_only(run, mechanism, backend)
        _table.setdefault(mechanism, {})[backend] = Implementation(run, frozenset(serves), devices, dtypes, widths)
        return run

    return keep


def resolve(
    mechanism: str,
    backend: str,
    device: str,
    dtype: torch.dtype,
    needs: tuple[str, ...],
    widths: tuple[int, ...] = (),
) -> Choice:
    """Choose the implementation of `mechanism` for inputs of this device type and dtype with these needs.

    widths: of the heads of q and v, where implementations differ in what they take.

    Raises:
        ValueError: the backend is unknown, or it cannot serve; the text names what is missing and who has it.
    """
    if backend == "auto":
        backend = _forced.get(mechanism) or _forced.get(None) or "auto"
    known = _table[mechanism]
    if backend != "auto":
        if backend not in known:
            raise ValueError(f"{mechanism} attention has no backend {backend!r}; it has {', '.join(known)}")
        lacks = _lacks(known[backend], device, dtype, needs, widths)
        if lacks:
            able = [name for name, one in known.items() if not _lacks(one, device, dtype, needs, widths)]
            raise ValueError(
                f"backend {backend!r} of {mechanism} attention does not serve {lacks}; "
                f"{', '.join(able) or 'no backend'} does"
            )
        return _say(mechanism, Choice(backend, known[backend].run, "asked for"), device, dtype)
    passed = []
    for name in preference(mechanism, device):
        if name in known:
            lacks = _lacks(known[name], device, dtype, needs, widths)
            if not lacks:
                reason = "first in order" if not passed else "; ".join(passed)
                return _say(mechanism, Choice(name, known[name].run, reason), device, dtype)
            passed.append(f"{name} does not serve {lacks}")
    raise ValueError(f"no backend of {mechanism} attention serves this request on {device}: {'; '.join(passed)}")


def honours(mechanism: str, feature: str, backend: str, q: Tensor, v: Tensor, needs: tuple[str, ...] = ()) -> bool:
    """Whether what runs where `feature` is not asked for honours it all the same."""
    dtype, widths = lowered(q, q, v)[0].dtype, (q.shape[3], v.shape[3])
    return feature in _table[mechanism][resolve(mechanism, backend, q.device.type, dtype, needs, widths).name].serves


def mechanisms() -> tuple[str, ...]:
    """Names that implementations have been entered for so far; importing a variant's file enters its own."""
    return tuple(sorted(_table))


def check_backend(name: str) -> None:
    """Raise ValueError unless there is a backend of this name, or it is "auto"."""
    if name not in ("auto", *BACKENDS):
        from core.attention.registry import nearest

        raise ValueError(f"unknown backend {name!r}{nearest(name, BACKENDS)}; known: auto, {', '.join(BACKENDS)}")


def set_backend(backend: str | None, mechanism: str | None = None) -> None:
    """Force a backend wherever "auto" is asked for, for one mechanism or for all; None gives the choice back.

    The environment variable LONGSPAN_BACKEND does the same for a whole process.

    Raises:
        ValueError: unknown backend or mechanism.
    """
    if backend in (None, "auto"):
        _forced.pop(mechanism, None)
        return
    check_backend(backend)
    if mechanism is not None:
        _entered(mechanism)
    _forced[mechanism] = backend


def explain_backend(
    mechanism: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, needs: tuple[str, ...] = ()
) -> str:
    """Say which backend would run and why, one line per candidate.

    Example:
        >>> print(explain_backend("softmax", needs=("mass",)))
        softmax on cpu, float32, needs mass
          reference: serves, but is only used when asked for
          sdpa: does not serve mass
          torch: serves  <- runs
    """
    _entered(mechanism)
    chosen = resolve(mechanism, "auto", device, dtype, tuple(needs))
    title = f"{mechanism} on {device}, {str(dtype).removeprefix('torch.')}"
    lines = [title + (f", needs {', '.join(needs)}" if needs else "")]
    order = ("reference", *preference(mechanism, device))
    for name in sorted(_table[mechanism], key=lambda n: order.index(n) if n in order else len(order)):
        lacks = _lacks(_table[mechanism][name], device, dtype, tuple(needs))
        text = f"does not serve {lacks}" if lacks else "serves"
        if name == chosen.name:
            text += "  <- runs" + (" (asked for)" if chosen.reason == "asked for" else "")
        elif name == "reference" and not lacks:
            text += ", but is only used when asked for"
        lines.append(f"  {name}: {text}")
    return "\n".join(lines)


def _entered(mechanism: str) -> None:
    """Raise ValueError unless implementations of the mechanism are known; variants are imported to find out."""
    from core.attention.registry import available, nearest, variant_class

    if mechanism not in _table:
        for name in (mechanism,) if mechanism in available() else available():
            variant_class(name)
    if mechanism not in _table:
        raise ValueError(
            f"unknown mechanism {mechanism!r}{nearest(mechanism, _table)}; known: {', '.join(sorted(_table))}"
        )


def _backward_only(run: Callable, mechanism: str, backend: str) -> Callable:
    """`run`, which refuses inputs with a forward-mode tangent: its operators would leave the tangent out in silence."""

    @wraps(run)
    def checked(*arguments, **options):
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            for given in (*arguments, *options.values()):
                if isinstance(given, Tensor) and forward_ad.unpack_dual(given).tangent is not None:
                    raise NotImplementedError(
                        f"backend {backend!r} of {mechanism} attention has no forward-mode derivative: "
                        f"backend='reference' has one, at quadratic cost"
                    )
        return run(*arguments, **options)

    return checked


def _lacks(
    one: Implementation, device: str, dtype: torch.dtype, needs: tuple[str, ...], widths: tuple[int, ...] = ()
) -> str:
    if one.devices is not None and device not in one.devices:
        return f"device {device}"
    if one.dtypes is not None and dtype not in one.dtypes:
        return str(dtype).removeprefix("torch.")
    for width in widths:
        if one.widths is not None and not one.widths[0] <= width <= one.widths[1]:
            return f"heads {width} wide (it takes {one.widths[0]} to {one.widths[1]})"
    return ", ".join(need for need in needs if need not in one.serves)


def _say(mechanism: str, choice: Choice, device: str, dtype: torch.dtype) -> Choice:
    # A traced program must not log: the choice has been made once for all its calls.
    if not torch.compiler.is_compiling():
        line = f"{mechanism} attention: {choice.name} ({device}, {str(dtype).removeprefix('torch.')}; {choice.reason})"
        if line not in _said:
            _said.add(line)
            log.info(line)
    return choice
