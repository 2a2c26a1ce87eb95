"""The plain backbone, the heads, and the model that puts them (or a timm model) together.

    image [B, C, H, W] -> stem -> tokens [B, N, D], row by row -> encoder of any attention -> head

Nothing depends on a fixed size: positions are computed from rows and columns, so a model that was trained at one size
runs at any other.
"""

from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.vision.recipe import VisionRecipe, pair
from apps.vision.stems import STEMS, Texture
from core.attention.contract import Variant
from core.attention.positions import LearnedPositions, sinusoidal
from core.backbone import Encoder
from core.layout import expand_layout


class Features(NamedTuple):
    """What a backbone makes of images.

    tokens: [B, N, D], row by row.   grid: their rows and columns.   prefix: [B, P, D] tokens before them.
    finer: feature maps [B, D', h, w] from before the tokens, finest first.   mask: [B, N] real tokens, or None.
    start: the map [B, D, rows, columns] that became the tokens; None where the stem is timm's.
    """

    tokens: Tensor
    grid: tuple[int, int]
    prefix: Tensor
    finer: list[Tensor]
    mask: Tensor | None
    start: Tensor | None = None

    def map(self) -> Tensor:
        """The tokens as a feature map [B, D, rows, columns]."""
        return self.tokens.transpose(1, 2).unflatten(2, self.grid)


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
        from apps.vision.timm_models import attentions, create

        super().__init__()
        assert recipe.model.timm is not None
        channels = 3 if recipe.data.channels == "rgb" else 1
        options: dict[str, Any] = {"num_classes": classes, "in_chans": channels, "img_size": pair(recipe.data.size)}
        if recipe.model.task not in ("classes", "labels"):
            options["num_classes"] = 0
        if recipe.backbone.dropout:
            options["drop_path_rate"] = recipe.backbone.dropout
        model = create(recipe.model.timm, dynamic_img_size=True, **options)
        from apps.vision.timm_models import replace_attention

        replace_attention(model, expand_layout(recipe.attention, recipe.backbone.layout, len(attentions(model))))
        if recipe.backbone.checkpoint:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.model = model
        self.dim: int = model.num_features  # type: ignore[assignment]
        self.patch: int = model.patch_embed.patch_size[0]  # type: ignore[index,union-attr]
        self.stem = nn.Module()
        self.widths: list[int] = []

    def forward(self, x: Tensor, real: Tensor | None = None) -> Features:
        """Features of images [B, C, H, W]."""
        check_size(x, self.patch)
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        tokens = self.model.forward_features(x)  # type: ignore[operator]
        first = tokens.shape[1] - grid[0] * grid[1]
        return Features(tokens[:, first:], grid, tokens[:, :first], [], None)

    def classify(self, x: Tensor) -> Tensor:
        """timm's own classifier: [B, classes]."""
        check_size(x, self.patch)
        return self.model(x)


def check_size(x: Tensor, patch: int) -> None:
    """Raise ValueError unless the sides of images [B, C, H, W] are multiples of the patch."""
    high, wide = x.shape[2:]
    if high % patch or wide % patch or not high or not wide:
        near = [max(patch, round(side / patch) * patch) for side in (high, wide)]
        raise ValueError(
            f"images of {high} x {wide} do not divide into patches of {patch}; the nearest is {near[0]} x {near[1]}"
        )


class MapHead(nn.Module):
    """One linear map per token: [B, D, rows, columns] -> [B, K, rows, columns]."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.project = nn.Conv2d(dim, outputs, 1)

    def forward(self, features: Features) -> Tensor:
        """-> [B, K, rows, columns]."""
        return self.project(features.map())


class MultiScaleHead(nn.Module):
    """Tokens, brought up step by step, meet the finer maps of the stem (or, without any, their own upsampled selves).

    At each step: upsample by 2, add the projected finer map, convolve. The result has stride 4 or that of the finest
    map from stride 4 on.

    Source:
        The pattern of U-Nets and feature pyramids: Lin et al. 2017, arXiv:1612.03144; from a plain backbone: Li et al.
        2022 (ViTDet), arXiv:2203.16527
    """

    def __init__(self, dim: int, outputs: int, width: int, patch: int, finer: list[int]):
        super().__init__()
        steps = max(1, patch.bit_length() - 3)  # from stride `patch` up to stride 4
        self.enter = nn.Conv2d(dim, width, 1)
        kept = finer[::-1][:steps] + [0] * max(0, steps - len(finer))
        self.beside = nn.ModuleList(nn.Conv2d(one, width, 1) if one else nn.Identity() for one in kept)
        self.used = [bool(one) for one in kept]
        self.blend = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(1, width), nn.GELU()) for _ in range(steps)
        )
        self.project = nn.Conv2d(width, outputs, 1)

    def forward(self, features: Features) -> Tensor:
        """-> [B, K, h, w] at stride 4 or the patch's if that is smaller."""
        x = self.enter(features.map())
        finer = features.finer[::-1]
        for step, blend in enumerate(self.blend):
            if self.used[step]:
                side = self.beside[step](finer[step])
                x = F.interpolate(x, size=side.shape[2:], mode="bilinear", align_corners=False) + side
            else:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = blend(x)
        return self.project(x)


class VisionModel(nn.Module):
    """Backbone and head: [B, C, H, W] -> logits [B, K], or maps [B, K, H, W] of the image's size.

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
                return self.backbone.classify(x)
            found = self.backbone(x, real)
            assert self.head is not None
            answer = self.head(self._pooled(found))
            if self.texture is not None and found.start is not None:
                answer = answer + self.texture([*found.finer, found.start])
            return answer
        assert self.head is not None
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


def count_cost(model: VisionModel, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters, FLOPs of a forward pass over one image (a multiply-add counts as two), and its tokens.

    Linear layers and convolutions are counted as they run; attention as its variant's `cost` says.
    """
    counted = {"flops": 0, "tokens": 0}

    patch = model.backbone.patch
    grid = (size[0] // patch, size[1] // patch)

    def weighed(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Variant):
            q = inputs[0]
            on_grid: dict[str, Any] = {"grid": grid} if "grid" in signature(module.cost).parameters else {}
            counted["flops"] += module.cost(1, q.shape[2], **on_grid).flops
            counted["tokens"] = max(counted["tokens"], q.shape[2])
        elif isinstance(module, nn.Linear):
            counted["flops"] += 2 * module.weight.numel() * (inputs[0].numel() // inputs[0].shape[-1])
        else:
            counted["flops"] += 2 * module.weight.numel() * output.shape[2] * output.shape[3]

    kinds = (nn.Linear, nn.Conv2d, Variant)
    hooks = [module.register_forward_hook(weighed) for module in model.modules() if isinstance(module, kinds)]
    training = model.training
    try:
        weight = next(model.parameters())
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, *size, device=weight.device, dtype=weight.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_item": counted["flops"],
        "state_bytes": 0,
        "tokens_per_item": max(1, counted["tokens"]),
    }
