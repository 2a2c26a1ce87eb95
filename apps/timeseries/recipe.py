"""What a time-series recipe may say; the line under a field is its help text. No torch here."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.training.recipe import Recipe, Section

Share = Annotated[float, Field(gt=0, lt=1)]


class GeneratedSection(Section):
    """The generated series of the demo: its best possible error is known, see `generated.py`."""

    rows: int = Field(6000, ge=100)
    """Time steps, one hour each."""
    channels: int = Field(3, ge=1)
    """Series side by side."""
    noise: float = Field(0.5, gt=0)
    """Standard deviation of the Gaussian noise on every value, in the units of the series."""
    lag: int = Field(150, ge=1)
    """Steps after which an event comes back; at least the horizon, so that its source has always been seen."""
    seed: int = Field(0, ge=0)
    """Of the series; the seed of the run does not change the data."""


class DataSection(Section):
    """Where the series come from, how they are checked, and how they are cut."""

    path: str | None = None
    """CSV or Parquet file, one column per series: date,a,b,OT."""
    file: str | None = None
    """Public file, looked for in the folder LONGSPAN_DATA when `path` is not given."""
    origin: str | None = None
    """Where `file` can be had, for the error message when it is not there."""
    generated: GeneratedSection | None = None
    """Make the series instead of reading a file."""
    time: str | None = None
    """Column with the dates; null: found by its name and content. Files without any are numbered by row."""
    targets: list[str] | None = Field(None, min_length=1)
    """Columns to forecast; null: every column of numbers."""
    frequency: str | None = None
    """Step between rows as pandas spells it (h, 15min, D, MS); null: found from the dates."""
    timestamps: Literal["strict", "repair", "as_is"] = "strict"
    """strict: disorder and duplicates are errors; repair: sort, keep the last of equal dates; as_is: rows as given."""
    missing: Literal["error", "fill", "mask"] = "error"
    """Empty cells and absent rows. fill: the last value seen; mask: the same, but never trained on or scored."""
    sentinels: list[float] = Field(default_factory=list)
    """Numbers that stand for "missing" in the file, such as -9999."""
    season: int | None = Field(None, ge=1)
    """Steps after which the series repeats, for the seasonal floor; null: a day, week or year by the frequency."""
    split: Literal["ratio", "dates", "ett_hour", "ett_minute"] = "ratio"
    """Rule that cuts rows into train, val and test, in this order."""
    train_share: Share = 0.7
    """Share of the rows for training (split=ratio)."""
    test_share: Share = 0.2
    """Share of the rows for testing (split=ratio); validation takes the rest."""
    val_from: str | None = None
    """First date (or row number) of the validation part (split=dates)."""
    test_from: str | None = None
    """First date (or row number) of the test part (split=dates)."""
    lookback: int | None = Field(None, ge=1)
    """Past steps that a forecast sees; null: about seven seasons, as far as the length allows."""
    horizon: int | None = Field(None, ge=1)
    """Steps to forecast; null: one season, as far as the length allows."""
    train_stride: int = Field(1, ge=1)
    """Train on every n-th window only: an epoch is n times shorter. Validation and test always take all."""

    @model_validator(mode="after")
    def _sources_and_split_agree(self) -> Self:
        if self.generated is not None and self.path is not None:
            raise ValueError("data.generated makes the series, data.path reads them: give one of the two")
        given = self.model_fields_set
        if self.split == "dates":
            if self.val_from is None or self.test_from is None:
                raise ValueError("split=dates needs data.val_from and data.test_from, such as 2017-10-24")
        elif self.val_from is not None or self.test_from is not None:
            raise ValueError(f"val_from and test_from belong to split=dates, the split is {self.split}")
        if self.split != "ratio" and {"train_share", "test_share"} & given and self._shares_changed():
            raise ValueError(f"train_share and test_share belong to split=ratio, the split is {self.split}")
        if self.train_share + self.test_share >= 1:
            raise ValueError(
                f"train_share + test_share must leave a validation part, got {self.train_share} + {self.test_share}"
            )
        return self

    def _shares_changed(self) -> bool:
        # A dumped recipe names every field, so being given is not the same as being meant.
        fields = type(self).model_fields
        return any(getattr(self, name) != fields[name].default for name in ("train_share", "test_share"))


class ModelSection(Section):
    """What stands around the backbone."""

    revin: bool = True
    """Every window is scaled by its own mean and deviation, and the forecast scaled back."""
    channels: Literal["independent", "mixed", "tokens"] = "independent"
    """independent: series never meet; mixed: a token is a patch of all series; tokens: a token is a whole series."""
    patch: int | None = Field(None, ge=1)
    """Steps per token; null: 16, less for a short look-back. Not for channels=tokens."""
    stride: int | None = Field(None, ge=1)
    """Steps from one patch to the next; null: half a patch. Not for channels=tokens."""
    shortcut: Literal["none", "linear", "ridge"] = "none"
    """Add a linear map of the look-back to the forecast; ridge: start it at the closed-form solution."""
    output: Literal["point", "quantiles"] = "point"
    """One value per step, or one per quantile."""
    loss: Literal["mse", "mae"] | None = None
    """Of point forecasts, null: mse. Quantiles are always trained on the pinball loss."""
    quantiles: list[Share] = Field(default_factory=lambda: [0.1, 0.5, 0.9])
    """Levels of the quantile output; for point forecasts, of the intervals that `predict` takes from validation."""

    @model_validator(mode="after")
    def _options_meet_their_use(self) -> Self:
        if self.channels == "tokens" and not (self.patch is None and self.stride is None):
            raise ValueError("patch and stride have no meaning with channels=tokens, where a token is a whole series")
        if self.patch is not None and self.stride is not None and self.stride > self.patch:
            raise ValueError(f"stride must not exceed patch (steps would be skipped), got {self.stride} > {self.patch}")
        if self.output == "quantiles" and self.loss is not None:
            raise ValueError("loss belongs to output=point; quantiles are trained on the pinball loss")
        if self.quantiles != sorted(set(self.quantiles)) or 0.5 not in self.quantiles:
            raise ValueError(f"quantiles must rise and contain 0.5, got {self.quantiles}")
        return self


class TimeSeriesRecipe(Recipe):
    """Forecasting: a table of numbers over time, a window that is seen, a horizon that is forecast."""

    data: DataSection = Field(default_factory=DataSection)  # type: ignore[assignment]
    """Where the series come from, how they are checked, and how they are cut."""
    model: ModelSection = Field(default_factory=ModelSection)  # type: ignore[assignment]
    """What stands around the backbone."""
