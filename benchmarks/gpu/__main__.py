"""Attention on a GPU: checked, then timed against peers and against the hardware's own limits.

    python -m benchmarks.gpu                        # everything, under 10 minutes
    python -m benchmarks.gpu --only linear          # groups whose name contains the word
    python -m benchmarks.gpu --check                # correctness alone, with compute-sanitizer where it is found
    python -m benchmarks.gpu --dry                  # a rehearsal on a CPU, tiny sizes, no times of meaning

At batch x length = 65,536 tokens in bfloat16, H x D = 32 x 128 and 16 x 64, lengths 512 to 131,072 (then more tokens):
time forward and forward + backward, peak memory, and the ratio to the roofline, which is the larger of bytes over the
measured copy bandwidth and FLOPs over the measured rate of products. A contender is timed only if output and gradients
equal the float64 reference on a short sequence within twice the error of the plain formula in bfloat16, or 2e-2 of the
largest number, and ours only if a second run has the same bits. Median of 5 times about 50 ms, all contenders of a
length in one run, the most telling lengths first; what is not reached in time is left out, and the file says so.
"""

import argparse
import os
import sys
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(words: list[str] | None = None) -> int:
    """Parse, then load torch: under --dry Triton has to be told first that it will be interpreted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.gpu")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU under Triton's interpreter")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop timing after so many minutes in all")
    parser.add_argument("--out", type=Path, help="JSON file; the plot lies beside it")
    asked = parser.parse_args(words)
    if asked.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
        if asked.out is None and not asked.check:
            parser.error("--dry needs --out FILE: a rehearsal does not belong among the results")
    import torch

    if not asked.dry and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device; torch sees none, so nothing was run (--dry rehearses on a CPU)")
        return 0
    from benchmarks.gpu.course import run

    out = asked.out or RESULTS / f"attention-gpu-{date.today()}.json"
    return run(dry=asked.dry, check=asked.check, once=asked.once, only=asked.only, minutes=asked.minutes, out=out)


if __name__ == "__main__":
    sys.exit(main())
