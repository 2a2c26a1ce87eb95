"""timm's vision transformers with the core's attention inside: stock weights, stock code, another mechanism.

Whatever timm does around attention stays timm's: projections, norms, rotary positions, gates, masks. Its attention
modules end in one call, `scaled_dot_product_attention(q, k, v)`, and that call alone is answered by a variant of
`core.attention` (`OwnAttention`). So one rule serves every family whose blocks hold such a module: ViT, DeiT, DeiT-3,
FlexiViT, DINOv2, NaFlexViT; EVA, DINOv3 and the other rotary ones. Weights load under their stock names, because only
`attn.variant` is added.

Two things follow. Rotary positions turn q and k before any feature map, so the weights of a linear map are those of
turned vectors (the own layer turns features for some maps, see `core.attention.positions`). And the mask that NaFlexViT
hands over for images in their own shapes (`native.py`) is read as a key mask; asked for its [B, 1, 1, N] form, it never
makes an N x N one.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.attention import Attention as TimmAttention
from timm.layers.attention import AttentionRope
from timm.models import load_state_dict
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.attention.contract import Heads, Inputs
from core.attention.registry import build, nearest, variant_class
from core.training.errors import UserError

SWAPPED = (TimmAttention, AttentionRope, EvaAttention)
"""timm's attention modules that end in one call of scaled_dot_product_attention."""


class _Answer(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is answered by a layer's variant."""

    def __init__(self, layer: "OwnAttention", x: Tensor):
        super().__init__()
        self.layer, self.x, self.asked = layer, x, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.asked += 1
        return self.layer.attend(self.x, *args, **kwargs)


class OwnAttention(nn.Module):
    """Mixed into a timm attention module: the same module, with a variant in place of its softmax."""

    variant: nn.Module
    grid: tuple[int, int] | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """timm's own forward, [B, N, C] -> [B, N, C]."""
        answer = _Answer(self, x)
        with answer:
            y = super().forward(x, *args, **kwargs)
        if answer.asked != 1:
            raise RuntimeError(f"{type(self).__name__} called attention {answer.asked} times, expected once")
        return y

    def attend(
        self, x, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> Tensor:
        """The variant on timm's q, k, v [B, H, N, D], normalised and rotated."""
        if is_causal or scale is not None:
            raise ValueError("timm asked for causal attention or a scale of its own, which no vision model here has")
        grid = self.grid if self.grid is not None and self.grid[0] * self.grid[1] <= q.shape[2] else None
        mask = key_mask_of(attn_mask, q)
        if mask is not None and "grid" in self.variant.can:  # type: ignore[operator]
            raise ValueError(
                f"attention {self.variant.name!r} needs a common grid, and images of several sizes (a mask) have none"
            )
        options = {"key_mask": mask, "dropout": dropout_p, "inputs": Inputs(x, grid)}
        return self.variant(q, k, v, **options).out.to(v.dtype)


def key_mask_of(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """timm's mask as bool [B, N], True where a key is real.

    timm writes True or 0 where a key is seen, False or -inf where not, as [B, 1, 1, N] or [B, 1, N, N].

    Raises:
        ValueError: the rows of real queries differ, so that it is no key mask.
    """
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > -1
    seen = seen.reshape(-1, *seen.shape[-2:]) if seen.dim() >= 2 else seen[None, None]
    real = seen.any(-2)
    rows = seen[seen.any(-1)] if seen.shape[-2] > 1 else None
    if rows is not None:  # in timm's symmetric masks, rows of padding are empty
        keys = real[:, None, :].expand_as(seen)[seen.any(-1)]
        if not torch.equal(rows, keys):
            raise ValueError("this mask hides other keys from other queries; the core takes masks of keys")
    return real.expand(q.shape[0], -1)


def create(
    name: str, layers: list[dict[str, Any]] | None = None, *, weights: str | Path | None = None, **options
) -> nn.Module:
    """A timm model, its weights from a local file, its attention replaced.

    Args:
        name: what `timm.create_model` takes.
        layers: `{"variant": name, **options}` per block, or one for all; None: timm's own softmax.
        weights: .safetensors or .pth of the stock model.
        **options: further ones of `timm.create_model` (num_classes, img_size, dynamic_img_size, ...).

    Raises:
        UserError: no such model, one whose attention cannot be replaced, or weights that do not fit.
    """
    if not timm.is_model(name):
        raise UserError(f"model.timm: timm has no model {name!r}{nearest(name, timm.list_models())}")
    if "naflex" in name:
        options.setdefault("use_key_only_attn_mask", True)
        options.pop("dynamic_img_size", None)  # it has no other kind
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except TypeError as error:
        raise UserError(f"model.timm: {name} does not take these options ({error}); use a ViT of timm") from error
    if weights is not None:
        load_weights(model, weights)
    if layers is not None:
        replace_attention(model, layers)
    return model


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention module of every block, in order.

    Raises:
        UserError: the model is of a family whose blocks hold none that can be replaced.
    """
    blocks = getattr(model, "blocks", None)
    found = (
        [getattr(block, "attn", None) for block in blocks] if isinstance(blocks, nn.ModuleList | nn.Sequential) else []
    )
    if not found or not all(isinstance(one, SWAPPED) for one in found):
        kinds = {type(one).__name__ for one in found} or {type(model).__name__}
        raise UserError(
            f"the attention of {type(model).__name__} ({', '.join(sorted(kinds))}) cannot be replaced; ViT, DeiT, "
            "DeiT-3, FlexiViT, DINOv2, NaFlexViT, EVA-02 and DINOv3 models can"
        )
    return found  # type: ignore[return-value]


def replace_attention(model: nn.Module, layers: list[dict[str, Any]]) -> nn.Module:
    """Put a variant into every block of a timm model, in place; give the model.

    Args:
        model: of timm.
        layers: one per block, or a single one for all.

    Raises:
        UserError: the model's attention cannot be replaced, or a variant cannot do what images need.
    """
    modules = attentions(model)
    chosen = layers * len(modules) if len(layers) == 1 else layers
    if len(chosen) != len(modules):
        raise UserError(f"the model has {len(modules)} blocks, the attention is given for {len(chosen)}")
    for module, one in zip(modules, chosen):
        _replace(module, one)
    _watch_grid(model, modules)
    return model


def _replace(module: Any, chosen: dict[str, Any]) -> None:
    name, options = chosen["variant"], {key: value for key, value in chosen.items() if key != "variant"}
    if "bidirectional" not in variant_class(name).can:
        raise UserError(f"attention {name!r} cannot do 'bidirectional', which images need")
    if options.pop("short_conv", 0):
        raise UserError("short_conv belongs to the own layer; timm's attention has its own projections")
    weight = module.proj.weight
    heads = Heads(
        module.num_heads,
        getattr(module, "num_kv_heads", module.num_heads),
        module.head_dim,
        module.head_dim,
        weight.shape[1],
    )
    if module.attn_drop.p and "dropout" not in variant_class(name).can:
        raise UserError(f"attention {name!r} has no weights to drop; build the timm model with attn_drop_rate=0")
    stock = type(module)
    if isinstance(module, OwnAttention):
        stock = stock.__mro__[2]
    variant = build(name, heads, **options).to(device=weight.device, dtype=weight.dtype).train(module.training)
    # As torch's parametrizations do it: the instance gets a class of its own, and keeps all that it holds.
    module.__class__ = type(f"Own{stock.__name__}", (OwnAttention, stock), {"__module__": __name__})
    module.fused_attn, module.variant, module.grid = True, variant, None  # type: ignore[assignment]


def _watch_grid(model: nn.Module, modules: list[nn.Module]) -> None:
    """Tell the attention of every block how many rows and columns of patches the image has."""
    patches = embedding(model)

    def tell(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]  # images, or NaFlexViT's sequences of patches from any grid
        grid = tuple(patches.dynamic_feat_size(x.shape[-2:])) if x.dim() == 4 else None  # type: ignore[operator]
        for module in modules:
            module.grid = grid  # type: ignore[assignment]

    for hook in getattr(model, "_own_hooks", []):
        hook.remove()
    model._own_hooks = [patches.register_forward_pre_hook(tell)]  # type: ignore[assignment]


def embedding(model: nn.Module) -> nn.Module:
    """The part of a timm model that cuts images into patches."""
    return model.embeds if hasattr(model, "embeds") else model.patch_embed  # type: ignore[return-value]


def patch_of(name: str) -> int:
    """Side of the patches of a timm model in pixels, without its weights being made."""
    with torch.device("meta"):
        return embedding(create(name)).patch_size[0]  # type: ignore[index]


def refuse_grids(model: nn.Module) -> None:
    """Raise UserError where an attention looks at a grid: images in their own shapes have none in common."""
    for module in attentions(model):
        if "grid" in module.variant.can:  # type: ignore[operator,union-attr]
            name = module.variant.name  # type: ignore[union-attr]
            raise UserError(
                f"attention {name!r} reads neighbours on a grid, and images in their own shapes (data.resize=native) "
                "have none in common; take softmax, linear, hybrid or another without convolution and 2-D window, or "
                "data.resize=crop"
            )


def load_weights(model: nn.Module, path: str | Path, *, key: str = "model.weights") -> dict[str, list[str]]:
    """Stock weights from a file of this machine, every name accounted for.

    timm's own conversion runs first (checkpoints of other sizes, old names). What may stay as it is: the classifier,
    when it has another number of classes, and what `replace_attention` added. `key` names the option in messages.

    Returns:
        {"missing", "unused"}: names that stayed as they were, and names of the file that found no place.

    Raises:
        UserError: the file is not there, or does not fit the model.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{key}: there is no file {str(path)!r}")
    try:
        state = load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:
        said = "" if "weights_only" in str(error) else f" ({str(error).splitlines()[0]})"
        raise UserError(f"{key}: {path} holds no weights{said}; .safetensors and .pth are read") from error
    import sys

    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state = convert(state, model) if convert is not None else state
    own = model.state_dict()
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    heads = {name for name, module in model.named_modules() if module is head and name}
    of_head = {
        name for name in {*state, *own} if any(name.startswith(f"{one}.") for one in (*heads, "head", "head_dist"))
    }
    fits = {name: x for name, x in state.items() if name in own and own[name].shape == x.shape}
    wrong = [name for name in state if name in own and name not in fits and name not in of_head]
    missing = [name for name in own if name not in fits and name not in of_head and ".attn.variant." not in name]
    unused = [name for name in state if name not in own and name not in of_head]
    if wrong or missing or unused:
        text = [f"{len(missing)} names are missing, such as {missing[0]}"] if missing else []
        text += [f"{len(unused)} are not the model's, such as {unused[0]}"] if unused else []
        if wrong:
            text.append(
                f"{wrong[0]} has the shape {list(state[wrong[0]].shape)}, the model {list(own[wrong[0]].shape)}"
            )
        raise UserError(f"{key}: {path} does not fit {type(model).__name__}: {'; '.join(text)}")
    model.load_state_dict(fits, strict=False)
    return {"missing": [n for n in own if n not in fits], "unused": [n for n in state if n not in fits]}


def statistics(name: str) -> tuple[list[float], list[float]]:
    """Mean and deviation per colour that a timm model was trained with."""
    found = timm.get_pretrained_cfg(name)
    if found is None:
        raise UserError(f"model.timm: timm has no model {name!r}{nearest(name, timm.list_models())}")
    return list(found.mean), list(found.std)
