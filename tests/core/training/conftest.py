"""The toy app as an installed package: found by its entry point, as an app of another distribution is."""

import os
import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy_site(tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(Path(__file__).parent / "toy", site / "longspan_toy", ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "longspan_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: longspan-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[longspan.apps]\ntoy = longspan_toy:APP\n")
    sys.path.insert(0, str(site))
    yield site
    sys.path.remove(str(site))


@pytest.fixture
def toy(toy_site, tmp_path, monkeypatch) -> Path:
    """An empty working folder in a process that knows the toy app."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def toy_environment(toy_site) -> dict[str, str]:
    """Environment for subprocesses that know the toy app; one thread, as in this process."""
    paths = [str(toy_site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
