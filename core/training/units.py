"""Numbers as people read them: as many digits as the seed noise allows, and a unit beside each."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "–"


def decimals_for(values: Sequence[float], sds: Sequence[float]) -> int:
    """Decimals for a column of metrics, so that its digits say no more than the spread allows.

    The typical spread (geometric mean) gets two digits where it starts with 1 to 3, else one (the rule of the Particle
    Data Group); the values get three to five significant digits whatever the spread.

    Args:
        values: the column's means; zeros say nothing about the size and are passed over.
        sds: their standard deviations, where known.
    """
    size = _exponent(min((abs(value) for value in values if value), default=1.0))
    known = [math.log10(sd) for sd in sds if sd > 0]
    if not known:
        return max(0, 3 - size)
    typical = 10 ** (sum(known) / len(known))
    wanted = -_exponent(typical) + (1 if typical / 10 ** _exponent(typical) < 3.55 else 0)
    return max(0, min(max(wanted, 2 - size), 4 - size))


def fixed(value: float | None, decimals: int, *, sign: bool = False) -> str:
    """The number with that many decimals, a real minus sign, and a plus where asked; a dash for None."""
    if value is None:
        return MISSING
    rounded = round(value, decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:{'+' if sign else ''}.{decimals}f}".replace("-", "−")


def count(value: float | None, unit: str = "") -> str:
    """A count with a decimal prefix: 1234567 becomes "1.23 M"."""
    if value is None:
        return MISSING
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{three_digits(value / factor)} {prefix}{unit}"
    return f"{three_digits(value)} {unit}".strip()


def byte_size(value: float | None) -> str:
    """A number of bytes with a binary prefix: 1536 becomes "1.50 KiB"."""
    if value is None:
        return MISSING
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power * 0.9995:
            return f"{three_digits(value / 1024**power)} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """A time that a person waits: "8.3 s", "4 min 05 s", "2 h 10 min"."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def p_value(p: float | None) -> str:
    """A p value to three decimals, "<0.001" below that."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def ratio(value: float | None, reference: float | None) -> str:
    """`value` as a multiple of `reference`: "0.61×"; a dash where one of them is missing."""
    if value is None or not reference:
        return MISSING
    return f"{three_digits(value / reference, most=2)}×"


def three_digits(value: float, *, most: int = 3) -> str:
    """Three significant digits without an exponent, at most `most` decimals."""
    if value == 0:
        return "0"
    rounded = abs(float(f"{value:.3g}"))  # 0.9999 has the decimals of 1.00
    decimals = max(0, min(most, 2 - _exponent(rounded)))
    return f"{value:.{decimals}f}".replace("-", "−")


def _exponent(value: float) -> int:
    return math.floor(math.log10(value))
