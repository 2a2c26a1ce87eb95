"""The public door of the attention core: these names, nothing else.

The door is lazy: `import core.attention` costs nothing, and torch is loaded when a name is first used, so that
`core.attention.registry` can answer "which variants are there?" for a command line that must start at once.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.attention.backends import explain_backend as explain_backend
    from core.attention.backends import set_backend as set_backend
    from core.attention.contract import Attended as Attended
    from core.attention.contract import merge as merge
    from core.attention.layer import Attention as Attention
    from core.attention.registry import available as available
    from core.attention.registry import build as build
    from core.attention.registry import register as register
    from core.attention.variants.hybrid import hybrid_attention as hybrid_attention
    from core.attention.variants.linear import linear_attention as linear_attention
    from core.attention.variants.softmax import softmax_attention as softmax_attention
    from core.attention.variants.window import sliding_window_attention as sliding_window_attention

_HOME = {
    "Attention": "layer",
    "softmax_attention": "variants.softmax",
    "sliding_window_attention": "variants.window",
    "linear_attention": "variants.linear",
    "hybrid_attention": "variants.hybrid",
    "Attended": "contract",
    "merge": "contract",
    "available": "registry",
    "build": "registry",
    "register": "registry",
    "set_backend": "backends",
    "explain_backend": "backends",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'core.attention' has no attribute {name!r}; it offers {', '.join(sorted(_HOME))}")
    from importlib import import_module

    value = getattr(import_module(f"core.attention.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOME)
