from pydantic import Field

from core.training.recipe import Recipe, Section


class ToyData(Section):
    items: int = Field(96, ge=0)
    """Items of the train part."""
    width: int = Field(8, ge=1)
    """Numbers per item."""
    with_val: bool = True
    """Whether there is a validation part."""


class ToyModel(Section):
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of inputs dropped in training."""
    trap: str | None = None
    """What goes wrong, and at which batch of the run: nan@7, grad@7, oom@7, slow@0, kill@7; null: nothing."""


class ToyRecipe(Recipe):
    app: str = "toy"
    data: ToyData = Field(default_factory=ToyData)
    model: ToyModel = Field(default_factory=ToyModel)
