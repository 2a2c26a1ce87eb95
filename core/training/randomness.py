"""The states of all random generators: seeding them, and putting them back to where they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from core.training.data import mix


def seed_all(*parts: int) -> None:
    """Seed python, numpy and torch (CPU and every GPU) from the same numbers."""
    seed = mix(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Where all generators are, in types that `weights_only` loading accepts."""
    name, words, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(words, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators where `random_state` saw them; GPUs that are not here any more are left out."""
    random.setstate(state["python"])
    name, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def own_randomness(*parts: int) -> Iterator[None]:
    """Inside, all generators start from these numbers; outside nothing was drawn."""
    state = random_state()
    seed_all(*parts)
    try:
        yield
    finally:
        set_random_state(state)
