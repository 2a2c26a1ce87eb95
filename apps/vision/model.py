"""The plain backbone, and the model that puts it (or a timm model) and a head together.

    image [B, C, H, W] -> stem -> tokens [B, N, D], row by row -> encoder of any attention -> head

Nothing depends on a fixed size: positions are computed from rows and columns, so a model that was trained at one size
runs at any other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.vision.detection import BoxHead
from apps.vision.heads import Features, MapHead, MultiScaleHead
from apps.vision.native import as_patches
from apps.vision.recipe import VisionRecipe, pair
from apps.vision.stems import STEMS, Texture
from core.attention.positions import LearnedPositions, sinusoidal
from core.backbone import Encoder
from core.layout import expand_layout


class PlainBackbone(nn.Module):
    """A stem, 2-D positions and an `Encoder`: images of any size whose sides are multiples of the patch."""

    def __init__(self, recipe: VisionRecipe, size: tuple[int, int]):
        super().__init__()
        model, backbone = recipe.model, recipe.backbone
        self.patch, self.dim, dim = model.patch, backbone.dim, backbone.dim
        channels = 3 if recipe.data.channels == "rgb" else 1
        width = model.stem_width or max(4, dim // 4)
        self.stem = STEMS[model.stem](channels, dim, model.patch, *([] if model.stem == "patch" else [width]))
        kind = backbone.positions or "sinusoidal"
        if kind == "sinusoidal" and dim % 4:
            raise ValueError(f"sinusoidal positions of rows and columns need backbone.dim divisible by 4, got {dim}")
        self.inside = kind if kind in ("rope", "rope2d", "alibi") else None
        self.table = (
            LearnedPositions((size[0] // model.patch, size[1] // model.patch), dim) if kind == "learned" else None
        )
        self.sinusoidal = kind == "sinusoidal"
        self.prefix = nn.Parameter(torch.randn(model.registers + (model.pool == "token"), dim) * 0.02)
        if not len(self.prefix):
            self.prefix = None  # type: ignore[assignment]
        self.encoder = Encoder(
            dim,
            backbone.depth,
            backbone.heads,
            recipe.attention,
            layout=backbone.layout,
            positions=self.inside,
            mlp_dim=backbone.mlp_dim,
            mlp=backbone.mlp,
            dropout=backbone.dropout,
            qk_norm=backbone.qk_norm,
            checkpoint=backbone.checkpoint,
        )

    def forward(self, x: Tensor, real: Tensor | None = None) -> Features:
        """Features of images [B, C, H, W]; real [B, 2]: rows and columns that are no border, None: all."""
        check_size(x, self.patch)
        start, finer = self.stem(x)
        grid = (start.shape[2], start.shape[3])
        rows, columns = (torch.arange(n, device=x.device) for n in grid)
        tokens = start.flatten(2).transpose(1, 2)
        if self.sinusoidal:
            half = self.dim // 2
            at = torch.cat(
                (
                    sinusoidal(rows, half)[:, None].expand(-1, grid[1], -1),
                    sinusoidal(columns, half)[None].expand(grid[0], -1, -1),
                ),
                -1,
            )
            tokens = tokens + at.flatten(0, 1).to(tokens.dtype)
        elif self.table is not None:
            tokens = tokens + self.table(grid)
        mask = None
        if real is not None and bool(
            (real < torch.tensor([grid[0] * self.patch, grid[1] * self.patch], device=real.device)).any()
        ):
            seen = (real + self.patch - 1) // self.patch  # a token with a single real row is real
            mask = ((rows[:, None] < seen[:, 0, None, None]) & (columns < seen[:, 1, None, None])).flatten(1)
        first = 0 if self.prefix is None else len(self.prefix)
        if self.prefix is not None:
            tokens = torch.cat((self.prefix.expand(len(tokens), -1, -1), tokens), 1)
        whole = None if mask is None else F.pad(mask, (first, 0), value=True)
        where: dict[str, Any] = {}
        if self.inside == "rope2d":  # tokens before the grid stand at its corner
            at = (
                torch.cartesian_prod(rows, columns)
                if 1 not in grid
                else torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
            )
            where["coordinates"] = F.pad(at, (0, 0, first, 0))
        tokens = self.encoder(tokens, key_mask=whole, grid=grid, **where)
        return Features(tokens[:, first:], grid, tokens[:, :first], finer, mask, start)


class TimmBackbone(nn.Module):
    """A timm model as a backbone: `forward_features` and its grid."""

    def __init__(self, recipe: VisionRecipe, classes: int):
        from apps.vision.timm_models import attentions, create, embedding, refuse_grids, replace_attention

        super().__init__()
        assert recipe.model.timm is not None
        channels = 3 if recipe.data.channels == "rgb" else 1
        options: dict[str, Any] = {"num_classes": classes, "in_chans": channels, "img_size": pair(recipe.data.size)}
        if recipe.model.task not in ("classes", "labels"):
            options["num_classes"] = 0
        if recipe.backbone.dropout:
            options["drop_path_rate"] = recipe.backbone.dropout
        model = create(recipe.model.timm, dynamic_img_size=True, **options)
        replace_attention(model, expand_layout(recipe.attention, recipe.backbone.layout, len(attentions(model))))
        if recipe.backbone.checkpoint:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        if recipe.data.resize == "native":
            refuse_grids(model)
        self.model = model
        self.dim: int = model.num_features  # type: ignore[assignment]
        patches = embedding(model)
        self.patch: int = patches.patch_size[0]  # type: ignore[index]
        self.channels_last: bool = getattr(patches, "channels_last", True)
        self.stem = nn.Module()
        self.widths: list[int] = []

    def forward(self, x: Tensor, real: Tensor | None = None) -> Features:
        """Features of images [B, C, H, W]."""
        check_size(x, self.patch)
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        tokens = self.model.forward_features(x)  # type: ignore[operator]
        first = tokens.shape[1] - grid[0] * grid[1]
        return Features(tokens[:, first:], grid, tokens[:, :first], [], None)

    def classify(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """timm's own classifier: [B, classes]; real [B, 2]: rows and columns of images in their own shapes."""
        check_size(x, self.patch)
        if real is None:
            return self.model(x)
        return self.model(as_patches(x, real, (self.patch, self.patch), channels_last=self.channels_last))


def check_size(x: Tensor, patch: int) -> None:
    """Raise ValueError unless the sides of images [B, C, H, W] are multiples of the patch."""
    high, wide = x.shape[2:]
    if high % patch or wide % patch or not high or not wide:
        near = [max(patch, round(side / patch) * patch) for side in (high, wide)]
        raise ValueError(
            f"images of {high} x {wide} do not divide into patches of {patch}; the nearest is {near[0]} x {near[1]}"
        )


class VisionModel(nn.Module):
    """Backbone and head: [B, C, H, W] -> logits [B, K], maps [B, K, H, W] of the image's size, or boxes [B, N, K + 4].

    Args:
        recipe: the resolved recipe.   spec: of the data: classes, size.
    """

    def __init__(self, recipe: VisionRecipe, spec: dict[str, Any]):
        super().__init__()
        self.task, self.pool = recipe.model.task, recipe.model.pool
        outputs = max(1, len(spec["classes"]))
        timm = recipe.model.timm is not None
        self.backbone = (
            TimmBackbone(recipe, outputs) if timm else PlainBackbone(recipe, (spec["size"][0], spec["size"][1]))
        )
        size, patch = spec["size"], self.backbone.patch
        if size[0] % patch or size[1] % patch:
            near = [max(patch, round(side / patch) * patch) for side in size]
            raise ValueError(f"data.size={size} does not divide into patches of {patch}; the nearest size is {near}")
        self.head: nn.Module | None = None
        if self.task in ("segments", "values"):
            finer = [] if timm else self.backbone.stem.widths
            if recipe.model.head == "multiscale":
                self.head = MultiScaleHead(self.backbone.dim, outputs, recipe.model.head_width, patch, finer)  # type: ignore[arg-type]
            else:
                self.head = MapHead(self.backbone.dim, outputs)
        elif self.task == "boxes":
            self.head = BoxHead(self.backbone.dim, outputs)
        elif not timm:
            self.head = nn.Linear(self.backbone.dim, outputs)
            nn.init.zeros_(self.head.bias)
        self.texture: Texture | None = None
        if recipe.model.texture:
            self.texture = Texture([*self.backbone.stem.widths, self.backbone.dim], outputs)  # type: ignore[list-item]

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Normalised images [B, C, H, W]; real [B, 2]: rows and columns that are no border."""
        if self.task in ("classes", "labels"):
            if isinstance(self.backbone, TimmBackbone):
                return self.backbone.classify(x, real)
            found = self.backbone(x, real)
            assert self.head is not None
            answer = self.head(self._pooled(found))
            if self.texture is not None and found.start is not None:
                answer = answer + self.texture([*found.finer, found.start])
            return answer
        assert self.head is not None
        if self.task == "boxes":
            return self.head(self.backbone(x, real))
        maps = self.head(self.backbone(x, real))
        return F.interpolate(maps, size=x.shape[2:], mode="bilinear", align_corners=False)

    def _pooled(self, found: Features) -> Tensor:
        """[B, D]: the class token, or the mean of the real tokens."""
        if self.pool == "token":
            return found.prefix[:, -1]
        if found.mask is None:
            return found.tokens.mean(1)
        weights = found.mask.to(found.tokens.dtype)[..., None]
        return (found.tokens * weights).sum(1) / weights.sum(1)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameter belongs to which layer, as timm's layer decay asks for it."""
        if isinstance(self.backbone, TimmBackbone):
            inner = self.backbone.model.group_matcher(coarse=coarse)  # type: ignore[operator]
            return {
                key: [(_below(one), order) for one, order in rule] if isinstance(rule, list | tuple) else _below(rule)
                for key, rule in inner.items()
            }
        return {
            "stem": r"^backbone\.(?:stem|table|prefix)",
            "blocks": [(r"^backbone\.encoder\.blocks\.(\d+)", None), (r"^backbone\.encoder\.norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Names that timm's grouping leaves without decay."""
        return {"backbone.prefix"}


def _below(rule: str) -> str:
    return r"^backbone\.model\." + rule.removeprefix("^")
