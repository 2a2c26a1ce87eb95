"""`longspan doctor`: is everything here, and does every attention variant run on this machine?"""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from core.attention.registry import available
from core.training.app import apps
from core.training.errors import UserError


def doctor() -> int:
    """Print one line per check; returns 0 when all is well, else 1."""
    checks = [_python, _packages, _machine, _apps, _recipes, _data_folder, _torch, _variants]
    broken = 0
    for check in checks:
        name = check.__name__.strip("_").replace("_", " ")
        try:
            print(f"ok      {name:<12} {check()}")
        except Exception as error:  # a doctor looks at everything, also after the first finding
            broken += 1
            print(f"BROKEN  {name:<12} {' '.join(str(error).split()) or type(error).__name__}")
    print("all is well" if not broken else f"{broken} of {len(checks)} checks failed")
    return 1 if broken else 0


def _python() -> str:
    return f"{platform.python_version()} on {platform.platform()}"


def _packages() -> str:
    names = [line for line in requires("longspan") or [] if "extra ==" not in line]
    names = [line.split(";")[0].split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip() for line in names]
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}")
    return ", ".join(found)


def _machine() -> str:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if not os.access(Path.cwd(), os.W_OK):
        raise UserError(f"the working folder {Path.cwd()} cannot be written to")
    return f"{os.cpu_count()} cores, {free:.0f} GiB free in the working folder"


def _apps() -> str:
    return ", ".join(apps()) or "none installed"


def _recipes() -> str:
    from core.training.recipe import load_recipe, recipes

    found = [reference for reference, _, _ in recipes()]
    for reference in found:
        load_recipe(reference)
    return f"{len(found)} recipes parse"


def _data_folder() -> str:
    folder = os.environ.get("LONGSPAN_DATA")
    if folder and not Path(folder).is_dir():
        raise UserError(f"LONGSPAN_DATA names a folder that is not there: {folder}")
    return folder or "LONGSPAN_DATA is not set; recipes on public data need it, or data.path"


def _torch() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {torch.get_num_threads()} threads, GPUs: {', '.join(gpus) or 'none'}"


def _variants() -> str:
    import torch

    from core.attention import Attention, explain_backend
    from core.attention.backends import mechanisms
    from core.attention.registry import variant_class

    device = "cuda" if torch.cuda.is_available() else "cpu"
    said = []
    for name in available():
        can = variant_class(name).can
        layer = Attention(32, 4, name, causal="causal" in can and "bidirectional" not in can).to(device)
        x = torch.randn(2, 33, 32, device=device)
        layer(x, None if can & {"causal", "bidirectional"} else x.flip(1)).square().mean().backward()
        broken = [
            p for p, value in layer.named_parameters() if value.grad is not None and not value.grad.isfinite().all()
        ]
        if broken:
            raise UserError(f"{name} on {device}: gradient of {broken[0]} is not finite")
        mechanism = getattr(layer.variant, "chosen", name)
        lines = explain_backend(mechanism, device=device).splitlines() if mechanism in mechanisms() else []
        runs = [line.split(":")[0].strip() for line in lines if "<- runs" in line]
        said.append(f"{name} ({', '.join(runs)})" if runs else name)
    return f"forward and backward on {device}: {', '.join(said)}"
