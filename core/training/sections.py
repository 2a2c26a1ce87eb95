"""The sections that every recipe has: what may be written in them, and within which bounds.

The line under a field is its help text, also in the JSON Schema that editors read. No torch here.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator

from core.attention.registry import available, check
from core.layout import PRESETS, check_name, is_preset, spell_out


class Section(BaseModel):
    """A group of keys of a recipe; unknown keys are errors."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def canonical_attention(value: Any) -> dict[str, Any]:
    """The long form of an `attention` value: {"variant": name, **options}, such a mapping per letter, or a preset.

    Raises:
        ValueError: unknown variant or option, or an option of another type than its default.
    """
    if isinstance(value, str):
        value = {"variant": value}
    if not isinstance(value, dict):
        raise ValueError(f"must be a variant's name or a mapping with the key 'variant', got {value!r}")
    if str(value.get("variant")) in PRESETS:
        value = {"layout": value["variant"], **{key: given for key, given in value.items() if key != "variant"}}
    if is_preset(value):
        spell_out(value, None, 1)  # only checked here: the word depends on the depth, which `Recipe` knows
        return dict(value)
    if "variant" in value:
        check_variant(value)
        return dict(value)
    if not value or any(len(str(letter)) != 1 for letter in value):
        raise ValueError(f"must name a 'variant', or map letters of backbone.layout to variants, got {value!r}")
    return {str(letter): canonical_attention(chosen) for letter, chosen in value.items()}


def check_variant(value: dict[str, Any]) -> None:
    """Raise ValueError unless `value` names a variant and gives it options that it has, with fitting values."""
    name, options = value["variant"], {key: v for key, v in value.items() if key != "variant"}
    if not isinstance(name, str):
        raise ValueError(f"variant must be a name, got {name!r}; known: {', '.join(available())}")
    check_name(name)
    check(name, options)
    if options.get("window", 1) < 1:
        raise ValueError(f"{name}: window must be at least 1 (a position sees itself), got {options['window']}")


class _AttentionSchema:
    """The JSON Schema of `attention`: the registry decides, so editors offer every variant that is there."""

    def __get_pydantic_json_schema__(self, _core: Any, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        names = {"type": "string", "enum": list(available())}
        presets = {"type": "string", "enum": list(PRESETS)}
        one = {"type": "object", "required": ["variant"], "properties": {"variant": names}}
        preset = {
            "type": "object",
            "required": ["layout"],
            "properties": {"layout": presets},
            "additionalProperties": False,
        }
        letters = {
            "type": "object",
            "propertyNames": {"pattern": "^.$"},
            "additionalProperties": {"anyOf": [names, one]},
        }
        return {"anyOf": [names, presets, one, preset, letters]}


AttentionSection = Annotated[dict[str, Any], BeforeValidator(canonical_attention), _AttentionSchema()]
"""{"variant": name, **options}, a mapping from layout letters to such, or {"layout": preset}; a bare name is the short
form."""


class BackboneSection(Section):
    """The stack of blocks around the attention."""

    depth: int = Field(default=2, ge=1)
    """Number of blocks."""
    dim: int = Field(default=64, ge=1)
    """Width of the model (channels)."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; must divide dim."""
    layout: str | None = None
    """Word over the letters of `attention`, repeated over the depth, such as lls; null: every layer is alike."""
    mlp_dim: int | None = Field(default=None, ge=1)
    """Width of the MLP inside a block; null: 4 * dim."""
    mlp: Literal["gelu", "mix"] = "gelu"
    """What follows attention: a plain MLP, or one whose gate also looks at the neighbours (a convolution)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of activations dropped in training."""
    positions: Literal["sinusoidal", "learned", "rope", "rope2d", "alibi"] | None = None
    """How positions are told apart (rope2d: those of images, by row and column); null: not at all, or by the app."""
    qk_norm: bool = False
    """Normalise queries and keys per head."""
    checkpoint: bool = False
    """Gradient checkpointing: less memory, about a third more time."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.heads:
            fitting = [h for h in range(1, self.dim + 1) if self.dim % h == 0]
            near = sorted(sorted(fitting, key=lambda h: abs(h - self.heads))[:3])
            raise ValueError(f"heads must divide dim: {self.heads} does not divide {self.dim}; try {_words(near)}")
        return self


class OptimSection(Section):
    """AdamW, its schedule, clipping and averaging."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decay of matrices; norms, biases and vectors are never decayed."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of AdamW's two running means."""
    warmup: float = Field(default=0.05, ge=0)
    """Linear warm-up: below 1 a share of all steps, from 1 on a number of steps."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the cosine ends, as a share of lr."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest norm of all gradients together; 0: no clipping."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the running mean of the weights that evaluation uses, such as 0.999; 0: off."""

    @model_validator(mode="after")
    def _warmup_is_share_or_count(self) -> Self:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup must be a share below 1 or a whole number of steps, got {self.warmup}")
        return self


class TrainerSection(Section):
    """The loop: how long, how large, where."""

    epochs: int = Field(default=10, ge=1)
    """Passes over the training part, at most."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps, at most; null: epochs decide."""
    batch_size: int = Field(default=32, ge=1)
    """Items per forward pass and device."""
    accumulate: int = Field(default=1, ge=1)
    """Batches per optimiser step."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of forward and backward; weights stay in 32 bits."""
    early_stopping: int = Field(default=0, ge=0)
    """Epochs without a better validation metric after which the run ends; 0: never."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to run; auto takes a GPU when there is one."""
    devices: int = Field(default=1, ge=1)
    """Number of processes or GPUs."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several devices share the work."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; null: leave them."""
    workers: int = Field(default=0, ge=0)
    """Processes that load data; 0 is fastest for data in memory."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation."""
    log_every: int = Field(default=50, ge=1)
    """Batches between two lines of the log when there is no progress bar."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Optimiser steps between two checkpoints inside an epoch; 0: at the end of each epoch."""


def _words(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])
