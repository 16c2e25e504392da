"""Tables of images and what they show: classes, the way from noise to data, the way from one image to another."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vca_engine.images.pictures import grid
from vca_engine.sampling.image_sampler import ImageSampler


class Table(NamedTuple):
    """Images with labels.

    Attributes:
        images: (R, C, H, W, 3) uint8.
        rows: A label for each row.
        columns: A label for each column, or none.
        film: Whether a film of it shows one row after the other, or one column after the other.
    """

    images: np.ndarray
    rows: list[str]
    columns: Sequence[str] = ()
    film: str = "columns"

    def frames(self, title: str, *, animated: bool) -> list[np.ndarray]:
        """Make one picture, (height, width, 3) uint8; or one for each column or row."""
        if not animated:
            return [grid(self.images, self.rows, self.columns, title)]
        if self.film == "rows":
            return [grid(self.images[i : i + 1], [row], self.columns, title) for i, row in enumerate(self.rows)]
        return [
            grid(self.images[:, j : j + 1], self.rows, self.columns[j : j + 1], title)
            for j in range(self.images.shape[1])
        ]


def class_grid(
    image_sampler: ImageSampler, labels: Sequence[int], names: Sequence[str], per_class: int, batch_size: int
) -> Table:
    """Draw a row of `per_class` images for each label; they are numbered along the rows."""
    images = image_sampler.all([k for k in labels for _ in range(per_class)], batch_size)
    return Table(images.reshape(len(labels), per_class, *images.shape[1:]), [names[k] for k in labels])


def on_the_way(
    noise_level: Callable[[Tensor], Tensor], keep: Callable[[float, Tensor, Tensor, Tensor], None]
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Make a `watch` of `ImageSampler.latents` that passes on what lies nearer to data than all before.

    So it passes on no second stage of a step, and nothing beyond the end.

    Args:
        noise_level: t -> 1 (noise) ... 0 (data); of the process.
        keep: Is called with the noise level, x_t, t and the output.
    """
    nearest = 1 + 1e-6

    def watch(x_t: Tensor, t: Tensor, output: Tensor) -> None:
        nonlocal nearest
        level = float(noise_level(t[0]))
        if -1e-6 <= level < nearest:
            nearest = level
            keep(level, x_t, t, output)

    return watch


def trajectories(
    image_sampler: ImageSampler,
    clean: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Sequence[int],
    names: Sequence[str],
    num: int,
) -> Table:
    """Draw the way of an image of each label from noise to data, in `num` columns or, with so few steps, fewer.

    Two rows each: x_t decoded, and the predicted clean latent decoded; the last column is the image itself. The columns
    are evenly chosen evaluations of the network, each nearer to data, called by their noise level, 1 (noise) ... 0
    (data).

    Args:
        image_sampler: Draws them; image i is of label i.
        clean: (output, x_t, t) -> the clean latent that the output implies; of the process.
        labels: Their classes.
        names: Of all classes.
        num: Columns.
    """
    seen: list[tuple[float, Tensor, Tensor]] = []

    def keep(level: float, x_t: Tensor, t: Tensor, output: Tensor) -> None:
        seen.append((level, x_t, clean(output, x_t, t)))

    watch = on_the_way(image_sampler.noise_level, keep)
    final = image_sampler.latents(labels, range(len(labels)), watch=watch)  # (rows, C, h, w)
    picked = np.linspace(0, len(seen) - 1, min(num - 1, len(seen))).round().astype(int)
    chosen = [seen[i] for i in picked]
    columns = [image_sampler.images(torch.cat([x_t, predicted])) for _, x_t, predicted in chosen]
    columns.append(image_sampler.images(torch.cat([final, final])))
    both = np.stack(columns, axis=1).reshape(2, len(labels), len(columns), *columns[0].shape[1:])
    rows = [text for label in labels for text in (names[label], "predicted")]
    levels = [f"{abs(level):.2f}" for level, _, _ in chosen] + ["image"]
    return Table(both.swapaxes(0, 1).reshape(len(rows), len(columns), *columns[0].shape[1:]), rows, levels)


def interpolations(
    image_sampler: ImageSampler, labels: Sequence[int], names: Sequence[str], seeds: tuple[int, int], num: int
) -> Table:
    """Draw a row of `num` images for each label, whose first noise goes from that of one seed to that of the other.

    It goes spherically; what a sampler draws later is the same along a row. The ends are image i of the two seeds, i
    the row, if the sampler draws nothing.
    """
    rows = []
    for index, label in enumerate(labels):
        a, b = (image_sampler.begin([index], seed)[0] for seed in seeds)  # 2 x (1, C, h, w)
        noise = torch.cat([slerp(a, b, share) for share in np.linspace(0, 1, num)])
        rows.append(image_sampler.images(image_sampler.latents([label] * num, [index] * num, noise=noise)))
    return Table(np.stack(rows), [names[k] for k in labels])


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Interpolate spherically between noise a and b, each (..., C, h, w) as one vector: a at share 0, b at 1.

    Source: Shoemake 1985, Animating rotation with quaternion curves; the norm stays that of noise on the way.
    """
    u, v = a.flatten(-3), b.flatten(-3)
    angle = torch.acos((F.normalize(u, dim=-1) * F.normalize(v, dim=-1)).sum(-1))
    angle = angle[..., None, None, None]
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
