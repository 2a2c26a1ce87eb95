from pydantic import Field

from core.training.recipe import Recipe, Section


class ToyData(Section):
    items: int = Field(default=96, ge=0)
    """Items of the train part."""
    width: int = Field(default=8, ge=1)
    """Numbers per item."""
    with_val: bool = True
    """Whether there is a validation part."""


class ToyModel(Section):
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of inputs dropped in training."""
    quiet: bool = False
    """Nothing random in the loss."""
    best_epoch: int | None = None
    """The epoch that looks best in validation, whatever the weights; null: the one that is."""
    trap: str | None = None
    """What goes wrong, and at which batch of the process: nan, grad, oom, kill, term, int, slow, or, counted in
    batches of evaluation, termval, nanval; such as nan@7. termend@0: after the test. null: nothing."""
    judge: str | None = None
    """The metric that counts: fit (higher is better); null: the app's."""


class ToyPredict(Section):
    scale: float = 1.0
    """Factor of what is predicted."""


class ToyRecipe(Recipe):
    app: str = "toy"
    predict: ToyPredict = Field(default_factory=ToyPredict)
    data: ToyData = Field(default_factory=ToyData)
    model: ToyModel = Field(default_factory=ToyModel)

    def judged_by(self):
        return None if self.model.judge is None else (self.model.judge, "higher")
