"""Small documents and models that the tests of this app share."""

import json
from pathlib import Path

import pytest

from core.training.recipe import load_recipe

STORY = (
    "Anna found the map in the attic. It showed an island nobody knew. Her brother Tom laughed at the map. "
    "They sailed on Monday with 12 men. The storm broke the mast. Tom fell into the sea and Anna saved him. "
    "On the island they found only birds. The gold was a story. They came home poor and happy."
)


def make_rows(count: int = 12) -> list[dict]:
    """Documents that differ, with a summary made of two of their sentences."""
    found = []
    for i in range(count):
        document = STORY.replace("Anna", f"Anna{i}").replace("12", str(12 + i))
        found.append({"id": f"d{i}", "document": document, "summary": f"Anna{i} found the map. They sailed on Monday."})
    return found


def write_lines(path: Path, given: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in given))
    return path


@pytest.fixture
def rows():
    return make_rows


@pytest.fixture
def write_rows():
    return write_lines


@pytest.fixture
def own_file(tmp_path):
    return write_lines(tmp_path / "own.jsonl", make_rows())


@pytest.fixture
def small_recipe(own_file):
    """Overrides -> a recipe on the user's own file that trains in a moment."""

    def make(name: str = "extractive", *overrides: str):
        tiny = ["backbone.dim=16", "backbone.depth=1", "backbone.heads=2", "trainer.batch_size=4", "trainer.epochs=1"]
        if name == "jsonl":
            tiny += ["model.vocabulary=300", "model.max_summary=24", "backbone.heads=4", "model.decoder_depth=1"]
        return load_recipe(
            f"summarization/{name}", [f"data.train={own_file}", "trainer.accelerator=cpu", *tiny, *overrides]
        )

    return make
