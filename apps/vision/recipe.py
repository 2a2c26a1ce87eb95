"""What a vision recipe may say; the line under a field is its help text. No torch here."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, WrapValidator, model_validator

from core.training.recipe import OptimSection, Recipe, Section

Share = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1)]


def _a_size(value: Any, check: Any) -> Any:
    try:
        return check(tuple(value) if isinstance(value, list) else value)
    except ValidationError as error:  # of a union, one line for each of its forms
        raise ValueError(f"a size is a number of pixels, or [rows, columns], each at least 1; got {value!r}") from error


Size = Annotated[Side | tuple[Side, Side], WrapValidator(_a_size)]


class GeneratedSection(Section):
    """The generated scenes of the demo: their best possible accuracy is known, see `generated.py`."""

    images: int = Field(default=3000, ge=10)
    """Scenes in all three parts together."""
    size: Size = 128
    """Rows and columns in pixels; the marks keep their size, so a larger scene puts them further apart."""
    flipped: Share = 0.05
    """Share of scenes whose label is wrong on purpose: nobody can score above one minus this."""
    task: Literal["classes", "segments"] = "classes"
    """classes: do the two marks agree; segments: the mask of the marks, by kind."""
    seed: int = Field(default=0, ge=0)
    """Of the scenes; the seed of the run does not change the data."""


class DataSection(Section):
    """Where the images come from, how they are read, and how they are cut into parts."""

    path: str | None = None
    """Class folders, folder of images and masks, .tar or .zip of either, CSV/JSONL/Parquet, or hub:org/name."""
    file: str | None = None
    """Public folder or file, looked for below the folder LONGSPAN_DATA when `path` is not given."""
    origin: str | None = None
    """Where `file` can be had, for the error message when it is not there."""
    generated: GeneratedSection | None = None
    """Make scenes instead of reading images."""
    images: str = ""
    """Folder of the images below `path`; "PART" in it stands for train, val and test."""
    masks: str | None = None
    """Folder of the masks below `path`, same file names as the images; "PART" as in `images`."""
    boxes: str | None = None
    """Of the boxes below `path`: folder of Pascal VOC files, or a table (image, class, left, top, right, bottom)."""
    lists: dict[Literal["train", "val", "test"], str] | None = None
    """Text files below `path`, one image per line (file name, or path; what follows a blank is ignored), by part."""
    image_column: str = "path"
    """Column of a table with the image's path, or with the image itself."""
    label_column: str = "label"
    """Column of a table with the class; with task=labels several classes apart by `separator`."""
    part_column: str | None = None
    """Column of a table that says train, val or test; null: the shares decide."""
    separator: str = ";"
    """Between the classes of one cell (task=labels)."""
    classes: list[str] | None = None
    """Names of the classes in order of their number; null: found (folders and labels sorted; masks: numbers)."""
    ignore: int | None = Field(default=None, ge=0, le=255)
    """Number in the masks that is neither learned nor scored, such as 255 or CamVid's 11."""
    val_share: Share = 0.15
    """Share of the images for validation where there are no parts; drawn by class."""
    test_share: Share = 0.15
    """Share of the images for testing where there are no parts."""
    limit: int | None = Field(default=None, ge=1)
    """Use so many training images at most, drawn by class."""
    on_broken: Literal["error", "skip"] = "error"
    """Images that cannot be read: an error that names the first and their number, or left out, named and counted."""
    channels: Literal["rgb", "grey"] = "rgb"
    """Colours that the model sees; 16-bit images are brought to 8 bits, transparency is dropped."""
    size: Size = 224
    """Rows and columns that the model is trained at; one number: a square."""
    resize: Literal["crop", "stretch", "pad", "native"] = "crop"
    """crop: the middle of the image; stretch: the whole, out of shape; pad: the whole, with a masked border; native
    (NaFlexViT): the whole in its own shape, with at most as many patches as data.size has."""
    crop_ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the shorter side that the middle crop of the evaluation takes."""
    shrink: int | None = Field(default=None, ge=8)
    """Shrink images to this shorter side when they are read, to save memory and time; null: as they are."""
    cache: bool = True
    """Keep the read images in memory; off for what does not fit there."""
    mean: list[float] | None = None
    """Per channel, of values from 0 to 1; null: those of the timm model, else measured on the training part."""
    std: list[float] | None = None
    """As `mean`."""

    @model_validator(mode="after")
    def _sources_agree(self) -> Self:
        if self.generated is not None and self.path is not None:
            raise ValueError("data.generated makes the images, data.path reads them: give one of the two")
        if self.val_share + self.test_share >= 1:
            raise ValueError(
                f"val_share + test_share must leave training images, got {self.val_share} + {self.test_share}"
            )
        twice = [name for name in self.classes or () if (self.classes or []).count(name) > 1]
        if twice:
            raise ValueError(f"classes has {twice[0]!r} twice")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or none")
        if self.ignore is not None and self.masks is None and self.generated is None:
            raise ValueError("ignore is a number in masks, and data.masks names none")
        return self


class AugmentSection(Section):
    """What training does to an image before the model sees it; the parts with names of their own are timm's."""

    crop: tuple[float, float] | None = None
    """Smallest and largest share of the area of a random crop, such as [0.35, 1.0]; null: as in the evaluation."""
    ratio: tuple[float, float] = (0.75, 1.333)
    """Smallest and largest change of the crop's shape."""
    flip: bool = True
    """Mirror half of the images."""
    flip_rows: bool = False
    """Also turn half of them upside down."""
    colour: float = Field(default=0.0, ge=0, le=1)
    """Largest random change of brightness, contrast and saturation, as a share."""
    rand_augment: str | None = None
    """timm's RandAugment in its own words, such as rand-m9-mstd0.5-inc1; only without masks."""
    erasing: Share = 0.0
    """Probability of timm's random erasing."""
    mixup: float = Field(default=0.0, ge=0)
    """Alpha of timm's Mixup; 0: off."""
    cutmix: float = Field(default=0.0, ge=0)
    """Alpha of timm's CutMix; 0: off. Both on: in turn, by chance."""
    smoothing: Share = 0.0
    """Label smoothing."""
    sizes: list[Size] | None = Field(default=None, min_length=1)
    """Progressive resolution: the training size rises through these in equal shares of the steps up to data.size."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name in ("crop", "ratio"):
            pair = getattr(self, name)
            if pair is not None and not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name} must be [smallest, largest], both above 0, got {list(pair)}")
        if self.crop is not None and self.crop[1] > 1:
            raise ValueError(f"crop is a share of the area, at most 1, got {list(self.crop)}")
        return self


class DistilSection(Section):
    """How a converted model learns from its source, see `convert.py`."""

    steps: int = Field(default=200, ge=0)
    """First so many steps: each layer's new attention learns the output of the old one, on the source's own inputs."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the source's answers (KL) beside the labels afterwards."""
    temperature: float = Field(default=2.0, gt=0)
    """Softening of these answers."""


class ModelSection(Section):
    """What stands around the attention."""

    task: Literal["classes", "labels", "segments", "values", "boxes"] = "classes"
    """An image has: classes, one; labels, any number; segments, one per pixel; values, a number per pixel; boxes."""
    timm: str | None = None
    """Name of a timm model, such as deit_tiny_patch16_224, whose attention is replaced; null: the plain backbone."""
    weights: str | None = None
    """Weights of the timm model: a file on this machine (.safetensors, .pth); loaded strictly."""
    pretrained: str | None = None
    """Weights of another run of this app (folder, .ckpt, .safetensors) to start from; another head is new."""
    convert_from: str | None = None
    """Run of this app, or file of the timm model's own weights, whose attention is replaced: taken over, then distilled
    (section `distil`)."""
    distil: DistilSection = Field(default_factory=DistilSection)
    """How the converted model learns from `convert_from`."""
    patch: int = Field(default=16, ge=1)
    """Pixels per side of a token (plain backbone; timm: 16 stands for the model's own)."""
    stem: Literal["patch", "conv", "residual"] = "patch"
    """How pixels become tokens: one linear map per patch; 3 x 3 convolutions of stride 2 (patch is a power of 2); more
    of these, with batch norm."""
    stem_width: int | None = Field(default=None, ge=4)
    """Channels of the stem's first convolution, doubled at each step up to backbone.dim (residual: twice that); null:
    dim / 4."""
    texture: bool = False
    """Classes and labels: mean and deviation of the stem's maps also answer, by a linear map beside the tokens."""
    registers: int = Field(default=0, ge=0)
    """Learned tokens before the image's (plain backbone)."""
    pool: Literal["mean", "token"] = "mean"
    """What classifies: the mean of the image's tokens, or a class token (plain backbone)."""
    head: Literal["plain", "multiscale"] = "plain"
    """Of segments and values: one linear map per token, or tokens and finer maps brought together."""
    head_width: int = Field(default=64, ge=8)
    """Channels of the multiscale head."""
    class_balance: float = Field(default=0.0, ge=0, le=1)
    """Weigh classes by their share of the training part to the power of minus this; 0: alike."""
    eval_sizes: list[Size] = Field(default_factory=list)
    """Sizes other than data.size at which the test part is scored, too: the resolution-transfer table."""

    @model_validator(mode="after")
    def _options_meet_their_use(self) -> Self:
        if self.weights is not None and self.timm is None:
            raise ValueError(
                "weights are those of a timm model: name it in model.timm (for a run say model.pretrained)"
            )
        if self.convert_from is not None and (self.weights is not None or self.pretrained is not None):
            raise ValueError("convert_from brings its own weights; leave weights and pretrained out")
        if self.task == "boxes" and self.class_balance:
            raise ValueError("class_balance is for classes and pixels; boxes are learned with the focal loss")
        if self.head == "multiscale" and self.task not in ("segments", "values"):
            raise ValueError(f"head=multiscale is for segments and values, the task is {self.task}")
        if self.stem != "patch" and self.patch & (self.patch - 1):
            raise ValueError(f"stem={self.stem} halves the image, so patch must be a power of 2, got {self.patch}")
        if self.stem_width is not None and self.stem == "patch":
            raise ValueError("stem_width belongs to stem=conv and stem=residual")
        if self.texture and self.stem == "patch":
            raise ValueError("texture reads the maps of the stem, so it wants stem=residual or stem=conv")
        if self.texture and self.task not in ("classes", "labels"):
            raise ValueError(f"texture is for task=classes and labels, the task is {self.task}")
        plain = {"stem": "patch", "stem_width": None, "registers": 0, "pool": "mean"}
        own = [name for name, off in plain.items() if getattr(self, name) != off]
        if self.timm is not None and own:
            off = " ".join(f"model.{name}={'null' if plain[name] is None else plain[name]}" for name in own)
            verb = "belong" if len(own) > 1 else "belongs"
            raise ValueError(f"{' and '.join(own)} {verb} to the plain backbone, {self.timm} has its own; say {off}")
        return self


class VisionOptimSection(OptimSection):
    """AdamW as in every app, and layer decay."""

    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a layer as a share of the one above it (timm's rule): below 1 for pretrained weights."""


class PredictSection(Section):
    """Settings of prediction, which may be changed after training."""

    flips: bool = False
    """Mean of the answers for the image and its mirror image; not for boxes."""
    threshold: float = Field(default=0.3, gt=0, lt=1)
    """Smallest score of a box that is answered."""
    size: Size | None = None
    """Rows and columns at which images are read; null: data.size, masks: the image's own size within `window`."""
    window: Size | None = None
    """Masks: side of the square, or rows and columns, that is segmented at a time; null: data.size."""
    overlap: float = Field(default=0.5, ge=0, lt=1)
    """Share by which neighbouring windows overlap; their answers are blended."""
    batch_size: int = Field(default=8, ge=1)
    """Images or windows at a time."""
    places: list[tuple[Place, Place]] | None = Field(default=None, min_length=1)
    """Where `inspect` asks what is read: [[0.5, 0.5], ...], shares of rows and columns; null: middle and corners."""


class VisionRecipe(Recipe):
    """Images in; classes, labels, masks, maps of values or boxes out."""

    data: DataSection = Field(default_factory=DataSection)  # type: ignore[assignment]
    """Where the images come from, how they are read, and how they are cut into parts."""
    augment: AugmentSection = Field(default_factory=AugmentSection)
    """What training does to an image before the model sees it."""
    model: ModelSection = Field(default_factory=ModelSection)  # type: ignore[assignment]
    """What stands around the attention."""
    optim: VisionOptimSection = Field(default_factory=VisionOptimSection)  # type: ignore[assignment]
    """The optimiser."""
    predict: PredictSection = Field(default_factory=PredictSection)
    """Settings of prediction."""

    def judged_by(self) -> tuple[str, Literal["lower", "higher"]] | None:
        """accuracy, or what fits the task better."""
        judges = {"labels": ("f1_macro", "higher"), "segments": ("miou", "higher"), "values": ("mse", "lower")}
        judges["boxes"] = ("map50", "higher")
        return judges.get(self.model.task)  # type: ignore[return-value]

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        dense = self.model.task in ("segments", "values")
        made = self.data.generated
        if made is not None and (made.task != self.model.task):
            raise ValueError(f"data.generated.task={made.task} does not go with model.task={self.model.task}")
        if made is None and dense and self.data.masks is None:
            raise ValueError(f"model.task={self.model.task} needs data.masks, the folder of the masks")
        if (self.model.task == "boxes") != (self.data.boxes is not None):
            raise ValueError(f"model.task=boxes and data.boxes go together; the task is {self.model.task}")
        if self.model.task == "boxes" and self.predict.flips:
            raise ValueError("predict.flips averages answers, which boxes are not")
        if not dense and self.data.masks is not None:
            raise ValueError(f"data.masks belong to model.task=segments or values, the task is {self.model.task}")
        few = self.data.classes is not None and len(self.data.classes) < (1 if self.model.task == "boxes" else 2)
        if few:
            raise ValueError(f"data.classes names {len(self.data.classes or ())}, which leaves nothing to tell apart")
        if not dense and self.predict.window is not None:
            raise ValueError(
                f"predict.window is for masks, the task is {self.model.task}; predict.size reads larger images"
            )
        mixing = [f"augment.{name}" for name in ("mixup", "cutmix", "smoothing") if getattr(self.augment, name)]
        if self.model.task != "classes" and mixing:
            said, off = " and ".join(mixing), " ".join(f"{name}=0" for name in mixing)
            verb = "are" if len(mixing) > 1 else "is"
            raise ValueError(f"{said} {verb} for task=classes, the task is {self.model.task}; say {off}")
        if (dense or self.data.boxes) and (self.augment.rand_augment or self.augment.erasing):
            raise ValueError(
                "augment.rand_augment and erasing move or hide pixels without their mask or box; leave them out"
            )
        if self.data.resize == "pad" and self.model.texture:
            raise ValueError("model.texture would read the border of data.resize=pad, too; use crop or stretch")
        flexible = self.model.timm is not None and self.model.timm.startswith("naflexvit")
        if self.data.resize == "pad" and self.model.timm is not None:
            better = "crop, stretch or native" if flexible else "crop or stretch"
            raise ValueError(f"data.resize=pad masks the border, which timm's models do not; use {better}")
        if self.data.resize == "native" and not flexible:
            raise ValueError("data.resize=native is for NaFlexViT, model.timm=naflexvit_...; others keep shapes by pad")
        if self.data.resize == "native" and self.model.task not in ("classes", "labels"):
            raise ValueError(
                f"data.resize=native is for classes and labels; {self.model.task} need a common grid: crop or stretch"
            )
        if self.data.resize == "native" and self.data.crop_ratio != 1:
            raise ValueError("data.crop_ratio is for data.resize=crop; native shows the whole image")
        return self


def pair(size: Size) -> tuple[int, int]:
    """(rows, columns)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
