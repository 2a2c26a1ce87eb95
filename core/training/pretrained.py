"""Weights of another run, or of a file on disk, into a new model: what fine-tuning and conversion start from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from core.attention.registry import nearest
from core.training.errors import UserError
from core.training.run import load_run


@dataclass(frozen=True)
class Report:
    """What became of the names on both sides.

    loaded: weights that were taken over.   missing: weights of the module that the source has not.
    unused: weights of the source that the module has not.   skipped: left out by request.
    """

    loaded: list[str]
    missing: list[str]
    unused: list[str]
    skipped: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} weights taken over"]
        for word in ("missing", "unused", "skipped"):
            names = getattr(self, word)
            if names:
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                parts.append(f"{len(names)} {word} ({shown})")
        return "; ".join(parts)


def load_pretrained(
    module: nn.Module, source: str | Path, *, prefix: str = "", skip: Sequence[str] = (), key: str = "model.pretrained"
) -> Report:
    """Take over all weights whose names and shapes agree.

    Args:
        module: the new model or a part of it.
        source: run folder or .ckpt file of this project (its evaluation weights), or weights of any origin as
            .safetensors, .pt, .pth or .bin (tensors only; nothing is unpickled that could run code).
        prefix: of the names in the source that belong to this module; it is taken off.
        skip: beginnings of names in the module that are to keep their start, such as a head for other classes.
        key: the recipe key that named the source, for messages.

    Returns:
        What was loaded and what was not; tell it to the user.

    Raises:
        UserError: the source cannot be read, nothing in it fits, or a weight has another shape and is not in `skip`.
    """
    weights = {name.removeprefix(prefix): w for name, w in read_weights(source).items() if name.startswith(prefix)}
    own = module.state_dict()
    skipped = [name for name in own if name in weights and name.startswith(tuple(skip))] if skip else []
    loaded = [name for name in own if name in weights and name not in skipped]
    for name in loaded:
        if weights[name].shape != own[name].shape:
            raise UserError(
                f"{key}: {source}: {prefix}{name} has the shape {list(weights[name].shape)}, "
                f"the model here needs {list(own[name].shape)}; use the same backbone as the run"
            )
    if not loaded:
        first = next(iter(weights or read_weights(source)), "none")
        raise UserError(f"{key}: {source}: no weight fits the model here; it has for example {first}")
    module.load_state_dict({**own, **{name: weights[name] for name in loaded}})
    return Report(
        loaded,
        missing=[name for name in own if name not in weights],
        unused=[name for name in weights if name not in own],
        skipped=skipped,
    )


def read_weights(source: str | Path) -> Mapping[str, Tensor]:
    """Name -> tensor of a run (its `model`) or a weights file.

    Raises:
        UserError: there is none, or it is not one.
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".ckpt" or "://" in str(source):
        return load_run(source).task.model.state_dict()
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"there is no run or weights file {str(source)!r}{nearest(path.name, beside)}")
    if suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(str(path))
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error})") from error
    if suffix not in (".pt", ".pth", ".bin"):
        raise UserError(f"{path}: weights are read from run folders, .ckpt, .safetensors, .pt, .pth or .bin files")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise a dozen kinds here
        first = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{path} cannot be read as plain tensors ({first})") from error
    for wrapped in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapped), dict):
            found = found[wrapped]
    tensors = (
        {name: value for name, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    )
    if not tensors:
        raise UserError(f"{path} holds no weights by name")
    return tensors
