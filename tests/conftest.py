"""What every test shares: a calm machine, and the way to the real data."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Triton reads the switch once, while it is imported: here is before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# One thread: the tensors of tests are small, and a reduction sums in the same order on every machine.
torch.set_num_threads(1)

# No deadline: a first call compiles or imports. On CI the examples are the same every time, so red there is red here.
settings.register_profile("longspan", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("longspan")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real files: LONGSPAN_DATA, else `../shared/data` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LONGSPAN_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no real data: set LONGSPAN_DATA to its folder ({folder} is absent)")
    return folder
