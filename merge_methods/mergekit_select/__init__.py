"""Parameter selection and resampling as merge methods for mergekit.

The names below are resolved when first used: a startup file imports this package at the start of every interpreter,
where even `typing` or `importlib` would take several milliseconds.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mergekit_select.errors import MergekitSelectError
    from mergekit_select.selection import Drawn, draw, drawn, resample, select

__all__ = ["Drawn", "MergekitSelectError", "__version__", "draw", "drawn", "resample", "select"]

_HOMES = {
    "Drawn": "selection",
    "MergekitSelectError": "errors",
    "draw": "selection",
    "drawn": "selection",
    "resample": "selection",
    "select": "selection",
}


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
