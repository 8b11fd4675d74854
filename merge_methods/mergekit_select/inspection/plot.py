"""Draws an inspection: layers against kinds of module, how much moved and where resampling acts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_select.errors import UnreadableError
from mergekit_select.inspection.inspect import Inspection
from mergekit_select.inspection.tally import Tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SUFFIXES = (".png", ".svg", ".pdf")

_MOST_LAYERS_OF_FLAT_PANELS = 14  # up to as many layers, panels stand one above the other
_MOST_NUMBERS = 400  # up to as many cells, each shows its number

_Panel = tuple[str, str, Callable[[Tally], "float | None"]]


def require(path: Path) -> None:
    """Find out before the long part whether a picture can be drawn to this file.

    Raises:
        UnreadableError: matplotlib is missing, or the file cannot be written or is of another kind.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnreadableError("--plot needs matplotlib; install it with: pip install matplotlib") from error
    if path.suffix.lower() not in _SUFFIXES:
        raise UnreadableError(f"--plot must name a file that ends in .png, .svg or .pdf, got {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise UnreadableError(f"--plot must name a file in a folder that is there, got {str(path)!r}")


def draw(inspection: Inspection, path: Path) -> None:
    """Write the picture to a file, as its suffix says.

    Raises:
        UnreadableError: The file cannot be written.
    """
    # Not pyplot: it looks for a display and keeps every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = [*reversed(inspection.layers)]  # layer 0 at the bottom, as data flows
    modules = [*inspection.modules]
    panels = _panels(inspection)
    width, height = 1.6 + 0.5 * len(modules), 0.6 + 0.26 * len(layers)
    # A few layers make flat panels, which fit a page one above the other.
    below = len(layers) <= _MOST_LAYERS_OF_FLAT_PANELS
    rows, columns = (len(panels), 1) if below else (1, len(panels))
    figure = Figure(
        figsize=(max(5.0, width * columns + 1.0), max(2.0, height) * rows + 2.2), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    count = len(inspection.models)
    bases = _end(", ".join(inspection.bases) or "none")
    figure.suptitle(f"{inspection.method}\n{count} sub-model{'s' * (count != 1)}, base {bases}", fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, inspection, panel, layers, modules)
        axis.label_outer()
    try:
        figure.savefig(path, format=path.suffix[1:].lower())
    except OSError as error:
        raise UnreadableError(f"cannot write the picture {path}: {error.strerror or error}") from error


def _panels(inspection: Inspection) -> list[_Panel]:
    """Return title, colours and value of each panel."""
    result: list[_Panel] = []
    if inspection.bases:
        result.append(("changed from the base, mean of the sub-models", "viridis", _moved))
    if inspection.resamples:
        result.append(
            ("drawn again, as the first draw equals the base", "magma", lambda t: t.drawn_share(sum(t.redrawn)))
        )
        result.append(("left at the base in the end", "magma", lambda t: t.drawn_share(t.left)))
    elif len(inspection.models) > 1:
        result.append(("differs between two sub-models, mean of the pairs", "viridis", _disagreement))
    return result or [("changed from the base", "viridis", _moved)]


def _moved(tally: Tally) -> float | None:
    share = tally.unchanged_share
    return None if share is None else 1 - share


def _disagreement(tally: Tally) -> float | None:
    known = [share for share in tally.agreement if share is not None]
    return 1 - sum(known) / len(known) if known else None


def _draw_panel(
    axis: Axes,
    inspection: Inspection,
    panel: _Panel,
    layers: list[str | None],
    modules: list[str],
) -> None:
    title, colours, value = panel
    cells = inspection.cells
    grid = [[_cell(cells.get((layer, module)), value) for module in modules] for layer in layers]
    axis.set_facecolor("0.88")  # stays where there is no such tensor
    # From 0 to the greatest share: a fixed end at 100 % would make shares of a few percent look alike.
    greatest = max((number for row in grid for number in row if not math.isnan(number)), default=0.0)
    image: Any = axis.imshow(grid, cmap=colours, vmin=0.0, vmax=greatest or 1.0, aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(len(modules)), modules, rotation=90, fontsize=8)
    every = 1 + len(layers) // 40
    axis.set_yticks(range(len(layers))[::every], [_label(layer) for layer in layers[::every]], fontsize=8)
    axis.set_ylabel("layer")
    axis.set_xlabel(
        "kind of module (numbers in %)" if len(layers) * len(modules) <= _MOST_NUMBERS else "kind of module"
    )
    axis.tick_params(length=2)
    if len(layers) * len(modules) <= _MOST_NUMBERS:
        _write_numbers(axis, grid, greatest or 1.0)
    bar = axis.figure.colorbar(image, ax=axis, format=lambda share, _: f"{100 * share:.3g} %")
    bar.ax.tick_params(labelsize=8)


def _cell(tally: Tally | None, value: Callable[[Tally], float | None]) -> float:
    number = None if tally is None else value(tally)
    return math.nan if number is None else number


def _write_numbers(axis: Axes, grid: list[list[float]], greatest: float) -> None:
    for y, row in enumerate(grid):
        for x, share in enumerate(row):
            if not math.isnan(share):
                colour = "black" if share > 0.6 * greatest else "white"
                axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)


def _label(layer: str | None) -> str:
    return "outside" if layer is None else layer.rpartition(".")[2]


def _end(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"
