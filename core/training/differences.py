"""In which keys two recipes differ, and which of them change nothing that is learned. No torch here."""

from typing import Any


def harmless(key: str) -> bool:
    """Whether a dotted key says only how fast, where it is seen, or what `predict` does later, not what is learned."""
    unlearned = {f"trainer.{name}" for name in ("threads", "workers", "log_every", "checkpoint_every")}
    return key in unlearned or key == "predict" or key.startswith("predict.")


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Dotted keys in which two sections differ."""
    left, right = flat(a), flat(b)
    return [key for key in left | right if left.get(key) != right.get(key)]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested section by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
