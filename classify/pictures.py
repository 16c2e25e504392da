"""The picture of which classes a recogniser takes for which others."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vca_engine.files import written_aside
from vca_engine.sampling.figures import WIDE, new_figure, styled

MOST_NAMED = 40  # classes, above which names and numbers could not be read
LONGEST_NAME = 24  # letters, beyond which names are cut, for they would take the room of the squares


@styled
def draw_confusion(counts: np.ndarray, class_names: Sequence[str], file: Path, title: str) -> None:
    """Draw the share of images of each class (rows) that are taken for each class (columns), as a PNG.

    Args:
        counts: (K, K) images; up to `MOST_NAMED` classes have their names and shares in percent, more are a map.
        class_names: K names.
        file: The file.
        title: A line above.

    Raises:
        OSError: It cannot be written.
    """
    from matplotlib.colors import PowerNorm

    num = len(class_names)
    named = num <= MOST_NAMED
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (K, K)
    side = max(WIDE, 0.28 * num) if named else WIDE
    figure, ((axes,),) = new_figure(side, 0.85 * side, 1, 1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    if named:
        names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in class_names]
        upright = max(map(len, names)) <= 3
        axes.set_xticks(range(num), names, rotation=0 if upright else 90, parse_math=False)
        axes.set_yticks(range(num), names, parse_math=False)
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[i, j] > 40 else "black"
            axes.text(j, i, f"{shares[i, j]:.0f}" if shares[i, j] >= 1 else "<1", ha="center", va="center", c=colour)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1, 5, 10, 25, 50, 100])
    bar.set_label("percent of the images of a class")
    with written_aside(file) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
