"""Figures of the attention maps and streams of Visual-Contrast Attention, from `vca.maps_of` and `vca.streams_of`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from vca import Maps, Streams, lambda_init
from vca_engine.sampling.figures import WIDE, Panel, Row, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = {  # axis -> field of `Streams` -> how it is called
    "root mean square": {"positive": "$e^+$", "negative": "$e^-$"},
    "cosine of $e^+$ and $e^-$": {"cosine": ""},
    r"$\lambda$": {"lambda1": r"$\lambda_1$", "lambda2": r"$\lambda_2$"},
}


class Moment(NamedTuple):
    """One evaluation of the network.

    Attributes:
        level: Noise level, 1 (noise) ... 0 (data).
        noisy: What it was given, decoded, (K, H, W, 3) uint8.
        predicted: The clean images that it predicts.
        maps: Of each block that was asked for.
    """

    level: float
    noisy: np.ndarray
    predicted: np.ndarray
    maps: dict[int, Maps]


def contrast_rows(maps: Maps, i: int, head: int, pictures: Mapping[str, np.ndarray]) -> list[Row]:
    """Show where up to six contrast tokens look: the positive and negative maps of Stage I, and their difference.

    The outline is the part of the image that a token stands for, from which its query is pooled (unless t is `embed`).

    Args:
        maps: Of the block.
        i: Which image of the batch.
        head: Which head.
        pictures: What is shown at the left, (H, W, 3) uint8 each: in each row one; all of them if Stage I is plain.
    """
    (a, b), grid = maps.contrast_grid, maps.grid_size
    chosen = list(itertools.product(middles(a, 2), middles(b, 3)))
    tokens = [row * b + column for row, column in chosen]
    marks = [cell(row, column, maps.contrast_grid, grid) for row, column in chosen]
    titles = [f"token ({row}, {column})" for row, column in chosen]
    images = [Panel(image, name) for name, image in pictures.items()]

    def of(weights: Tensor) -> np.ndarray:
        return on_grid(weights[i, head, tokens], grid)  # (K, H, W)

    def row(left: list[Panel], values: np.ndarray, names: list[str], label: str, limit: float, **kind: bool) -> Row:
        return Row([*left, *map(Panel, values, names, marks)], label, limit, grid, "token", **kind)

    positive, untitled = of(maps.stage1_positive), [""] * len(tokens)
    if maps.stage1_negative is None:
        return [row(images, positive, titles, "positive", positive.max())]
    negative, both = of(maps.stage1_negative), of(maps.stage1)
    limit, difference = max(positive.max(), negative.max()), f"positive\n{minus(maps.lambda1)} negative"
    return [
        row(images[:1], positive, titles, "positive", limit),
        row(images[1:2], negative, untitled, "negative", limit),
        row(images[2:], both, untitled, difference, np.abs(both).max(), signed=True),
    ]


def query_rows(moments: Sequence[Moment], block: int, i: int, head: int, query: tuple[int, int]) -> list[Row]:
    """Show which contrast tokens one query uses, A+, A- and A+ - lambda2 A-, and which tokens it reaches through them.

    Args:
        moments: A column each.
        block: Which block.
        i: Which image of the batch.
        head: Which head.
        query: Row and column of the token, which is outlined.
    """
    maps = [moment.maps[block] for moment in moments]
    grid, contrast_grid = maps[0].grid_size, maps[0].contrast_grid
    token = maps[0].stage2.shape[2] - grid[0] * grid[1] + query[0] * grid[1] + query[1]
    mark = (*query, 1, 1)

    def row(weights: list[Tensor], label: str, among: list[Tensor], **kind: bool) -> Row:
        """Make a row on the contrast grid; the colours reach as far as the largest of `among`."""
        weights = [each[i, head, token] for each in weights]  # (n,) each
        panels = [Panel(on_grid(each, contrast_grid), f"sum {float(each.sum()):.2f}") for each in weights]
        limit = max(float(each[i, head, token].abs().max()) for each in among)
        return Row(panels, label, limit, contrast_grid, "contrast", **kind)

    images = [Panel(m.predicted[i], f"noise {m.level:.2f}", mark) for m in moments]
    positive, both = [m.stage2_positive for m in maps], [m.stage2 for m in maps]
    if maps[0].stage2_negative is None:
        rows = [row(positive, "$A^+$", positive)]
    else:
        negative = [m.stage2_negative for m in maps]
        rows = [
            row(positive, "$A^+$", positive + negative),
            row(negative, "$A^-$", positive + negative),
            row(both, f"$A^+$ {minus(maps[0].lambda2)} $A^-$", both, signed=True),
        ]
    reached = [on_grid(m.reach(token)[i, head], grid) for m in maps]
    limit, panels = max(np.abs(each).max() for each in reached), [Panel(each, "", mark) for each in reached]
    return [
        Row(images, "", 0.0, grid, "token"),
        *rows,
        Row(panels, "through Stage I,\nweight of a value", limit, grid, "token", signed=True),
    ]


@styled
def plot_streams(over_depth: Sequence[Streams], training: Sequence[tuple[int, Sequence[Streams]]]) -> "Figure":
    """Plot the sizes of e+ and e-, their cosine and both lambdas over the blocks, and below over training, if known."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(WIDE, 3.4 if training else 1.9, 1 + bool(training), 3)
    blocks = np.arange(len(over_depth))
    colours = ScalarMappable(BoundaryNorm(np.arange(len(blocks) + 1) - 0.5, 256), "viridis")
    for column, (label, lines) in enumerate(LINES.items()):
        top, *below = axes[:, column]
        for (number, name), style, marker in zip(lines.items(), ("-", "--"), "os", strict=False):
            if getattr(over_depth[0], number) is None:
                continue
            values = [getattr(streams, number) for streams in over_depth]
            top.plot(blocks, values, style, color="black", marker=marker, label=name)
            for ax, block in itertools.product(below, blocks):
                course = [(step, getattr(streams[block], number)) for step, streams in training]
                ax.plot(*np.transpose(course), style, color=colours.to_rgba(block))
        if "lambda1" in lines and top.lines:
            start = [lambda_init(block) for block in blocks]
            top.plot(blocks, start, ":", color="grey", label=r"$\lambda_\mathrm{init}$")
        if top.get_legend_handles_labels()[0]:
            top.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1, handlelength=2.5)
        top.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for ax, place in zip(axes[:, column], ("block", "training step"), strict=False):
            ax.set(xlabel=place, ylabel=label)
            ax.axhline(0, color="grey", linewidth=0.5, zorder=0)
    if training:
        bar = figure.colorbar(colours, cax=axes[1, 2].inset_axes([1.06, 0, 0.05, 1]), label="block")
        bar.set_ticks(MaxNLocator(6, integer=True))
        bar.minorticks_off()
    return figure


def minus(scale: Tensor) -> str:
    """Write -scale, (), with its sign; a learned lambda may be negative, and then the streams are added."""
    return f"$-$ {float(scale):.2f}" if scale >= 0 else f"$+$ {-float(scale):.2f}"


def middles(side: int, most: int) -> list[int]:
    """Choose at most so many of `side` cells, in the middle of as many equal parts."""
    parts = min(side, most)
    return [(2 * i + 1) * side // (2 * parts) for i in range(parts)]


def cell(row: int, column: int, contrast_grid: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """Give what average pooling takes for a contrast token: first row, first column, rows and columns of tokens."""
    sides = list(zip((row, column), contrast_grid, grid, strict=True))
    starts = [i * side // cells for i, cells, side in sides]
    ends = [-(-(i + 1) * side // cells) for i, cells, side in sides]  # rounded up
    return *starts, *(end - start for start, end in zip(starts, ends, strict=True))


def on_grid(weights: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Put weights on the grid, without prefix tokens: (..., P + rows * columns) -> (..., rows, columns)."""
    return weights[..., -grid[0] * grid[1] :].unflatten(-1, grid).cpu().numpy()
