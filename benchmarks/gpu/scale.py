"""How large a run is: on a GPU, or dry, a rehearsal on a CPU under Triton's interpreter without times of meaning."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scale:
    """Sizes of one run.

    tokens: batch x length of what is timed.   lengths: in the order in which they are timed, the most telling first.
    heads: (number, width).   checked: length that is compared with float64.   repeated: length that is run again.
    contexts, batches: of decoding.   cached: largest batch with a cache of keys.   copied: bytes of the copy that
    measures the bandwidth.   square: side of the matrices that measure the rate.   calls_ms: time per sample.
    """

    device: str
    dtype: torch.dtype
    tokens: int
    lengths: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    checked: int
    repeated: int
    contexts: tuple[int, int]
    batches: tuple[int, ...]
    cached: int
    copied: int
    square: int
    calls_ms: float

    @property
    def dry(self) -> bool:
        """Whether this is the rehearsal."""
        return self.device == "cpu"


FULL = Scale(
    device="cuda",
    dtype=torch.bfloat16,
    tokens=65536,
    lengths=(16384, 4096, 65536, 2048, 8192, 512, 131072),
    heads=((32, 128), (16, 64)),
    checked=384,
    repeated=4096,
    contexts=(1024, 65536),
    batches=(4, 64),
    cached=4,
    copied=1 << 30,
    square=8192,
    calls_ms=50.0,
)
DRY = Scale(
    device="cpu",
    dtype=torch.float32,
    tokens=16,
    lengths=(16,),
    heads=((2, 8),),
    checked=16,
    repeated=16,
    contexts=(4, 8),
    batches=(1, 2),
    cached=1,
    copied=1 << 10,
    square=16,
    calls_ms=0.0,
)
