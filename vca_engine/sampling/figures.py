"""Figures for papers: rows of small pictures with one colour bar each, as PNG and PDF.

matplotlib is imported where it is used: see docs/architecture.md, start-up.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vca_engine.files import remove_temporary, written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

NARROW, WIDE = 3.25, 5.5  # inches: a column of two on a page, and one
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 6.5,
    "axes.linewidth": 0.5,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "lines.linewidth": 1,
    "lines.markersize": 3,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay letters
}


def styled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that makes or writes a figure, so that this has `STYLE`."""

    @functools.wraps(function)
    def in_style(*args: Any, **options: Any) -> Any:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return function(*args, **options)

    return in_style


class Panel(NamedTuple):
    """One small picture.

    Attributes:
        values: Weights of the cells of a grid, (rows, columns); or an image, (H, W, 3) uint8.
        title: Above it.
        mark: What is outlined: first row, first column, number of rows, of columns.
    """

    values: np.ndarray
    title: str = ""
    mark: tuple[int, int, int, int] | None = None


class Row(NamedTuple):
    """Panels of one scale of colours.

    Attributes:
        panels: Left to right, as many in each row of a figure.
        label: What the weights are, beside the colour bar of the last panel; of images alone there is none.
        limit: The colours go from 0 to this, or from -limit to limit.
        grid: Rows and columns of cells, also those that an image is made of.
        unit: What a cell is, a word for the axes.
        signed: Whether weights may be negative; then white is zero, red positive, blue negative.
    """

    panels: Sequence[Panel]
    label: str
    limit: float
    grid: tuple[int, int]
    unit: str
    signed: bool = False


def new_figure(width: float, height: float, rows: int, columns: int) -> tuple["Figure", np.ndarray]:
    """Make a figure of so many inches, and its axes, (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="compressed")  # constrained, and panels of a fixed shape stay together
    return figure, figure.subplots(rows, columns, squeeze=False)


@styled
def plot_rows(rows: Sequence[Row], width: float, title: str) -> "Figure":
    """Make a figure of rows, `width` inches wide."""
    from matplotlib.ticker import MaxNLocator

    columns = len(rows[0].panels)
    side = min(1.0, (width - 0.8) / columns)  # of a panel; the colour bars and labels take the rest
    height = 0.4 + sum(side * row.grid[0] / row.grid[1] + 0.15 for row in rows)
    figure, axes = new_figure(width, height, len(rows), columns)
    figure.suptitle(title, fontsize=8, parse_math=False)  # a class may be called $x$
    for i, (row, line) in enumerate(zip(rows, axes, strict=True)):
        last = i + 1 == len(rows) or rows[i + 1].unit != row.unit
        for ax, panel in zip(line, row.panels, strict=True):
            drawn = _plot_panel(ax, panel, row)
            ax.tick_params(labelbottom=last, labelleft=ax is line[0])
        line[0].set_ylabel(f"{row.unit} row")
        line[columns // 2].set_xlabel(f"{row.unit} column" * last)
        if row.label:
            bar = figure.colorbar(drawn, cax=ax.inset_axes([1.06, 0, 0.07, 1]), label=row.label)
            bar.locator = MaxNLocator(4)
    return figure


@styled
def save_figure(figure: "Figure", path: Path) -> None:
    """Write path.png, at 300 dots an inch, and path.pdf; for who alone is at work there, see `remove_temporary`.

    Raises:
        OSError: They cannot be written.
    """
    for ending in ("png", "pdf"):
        file = path.with_name(f"{path.name}.{ending}")
        remove_temporary(file.parent, file)
        with written_aside(file) as temporary:
            figure.savefig(temporary, format=ending, dpi=300)
        figure.set_layout_engine("none")  # the places are found, and finding them takes most of the time


def _plot_panel(ax: "Axes", panel: Panel, row: Row) -> "AxesImage":
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    height, width = row.grid
    is_image = panel.values.ndim == 3
    low, colours = (-row.limit, "RdBu_r") if row.signed else (0, "viridis")
    where = {"extent": (-0.5, width - 0.5, height - 0.5, -0.5), "interpolation": "nearest"}
    drawn = ax.imshow(panel.values, vmin=low, vmax=row.limit, cmap=colours, **where)
    ax.set_title(panel.title, pad=3)
    if panel.mark:
        top, left, rows, columns = panel.mark
        colour = "black" if row.signed and not is_image else "red"
        box = {"fill": False, "linewidth": 0.8, "edgecolor": colour, "clip_on": False}
        ax.add_patch(Rectangle((left - 0.5, top - 0.5), columns, rows, **box))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(3, integer=True))
    return drawn
