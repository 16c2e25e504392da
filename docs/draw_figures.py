"""Draw the pictures of concepts.md with the code that trains and samples; some 10 s on one core.

python docs/draw_figures.py            writes docs/paths.png, noised.png, guidance.png, averages.png
"""

from collections.abc import Callable
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from dit_vca import BETAS, Diffusion
from sit_vca import ODE, PATHS, TIMES, Transport
from vca_engine.images.datasets import MNIST
from vca_engine.images.pictures import grid, save_picture
from vca_engine.images.pixels import to_uint8
from vca_engine.sampling.figures import WIDE, new_figure, styled
from vca_engine.sampling.guidance import Guidance, guided
from vca_engine.seeds import normal
from vca_engine.training.ema import constant, name_of, power

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = FilePath(__file__).parent
COLUMNS = np.linspace(0, 1, 9)  # times of noised.png
TIME = "t of a flow; 1 - t / 999 of diffusion"
CENTRES = torch.tensor([[0.0, 0.8], [-0.7, -0.4], [0.7, -0.4]])  # of the three classes of guidance.png
WIDTH = 0.5  # their standard deviation
NUM_STEPS = 400_000  # of averages.png, as of the ImageNet configs


def main() -> None:
    """Draw all of them."""
    draw_paths()
    draw_noised()
    draw_guidance()
    draw_averages()


def save(figure: "Figure", name: str) -> None:
    """Write docs/NAME.png."""
    figure.savefig(FOLDER / f"{name}.png", dpi=200)


@styled
def draw_paths() -> None:
    """Draw alpha and sigma of each path and of diffusion, and where training draws its times."""
    figure, axes = new_figure(WIDE, 2.5, 1, 2)
    share, times = axes[0]
    t, like = torch.linspace(0, 1, 401), torch.zeros(1, 1, 1, 1)
    for name, path in PATHS.items():
        c = path().at(t, like)
        (line,) = share.plot(t, c.alpha.flatten(), label=f"path {name}")
        share.plot(t, c.sigma.flatten(), "--", color=line.get_color())
    for name, mark in zip(BETAS, "ox", strict=True):
        process = Diffusion(betas=name)
        steps = torch.arange(0, process.num_timesteps, 111)  # 0, 111, ..., 999
        c, at = process.at(steps, like), 1 - steps / (process.num_timesteps - 1)
        share.plot(at, c.sqrt_abar.flatten(), f"k{mark}", label=f"betas {name}")
        share.plot(at, c.sqrt_1m_abar.flatten(), f"k{mark}")
    share.set(xlabel=f"noise ←  {TIME}  → data", title="share of the image (solid) and of the noise (dashed)")
    share.legend(loc="upper center", bbox_to_anchor=(0.45, -0.22), ncols=3, columnspacing=1)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for name, time in TIMES.items():
        density, edges = np.histogram(time()(u).numpy(), bins=100, range=(0, 1), density=True)
        times.plot((edges[1:] + edges[:-1]) / 2, density, label=name)
    times.set(xlabel="noise ←  t  → data", title="how often training draws a time", ylim=(0, None))
    times.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    for ax in axes[0]:
        ax.set_xlim(-0.02, 1.02)
    save(figure, "paths")


def draw_noised() -> None:
    """Draw a digit on its way from noise along each path, the same noise in each row."""
    image = MNIST()[3, False][0][None]  # (1, 1, 32, 32)
    noise = normal(0, torch.zeros(1, dtype=torch.long), image.shape[1:])
    rows = []
    for path in PATHS.values():
        at = [path().at(torch.tensor([t]), image) for t in COLUMNS]
        rows.append(to_uint8(torch.cat([c.alpha * image + c.sigma * noise for c in at])))
    save_picture([grid(np.stack(rows), list(PATHS), [f"t = {t:.3g}" for t in COLUMNS])], FOLDER / "noised.png")


class ExactVelocity(nn.Module):
    """The velocity that a perfect network would learn of three Gaussian classes in the plane, and of all of them.

    Args:
        process: The flow.
    """

    null_class = len(CENTRES)

    def __init__(self, process: Transport) -> None:
        super().__init__()
        self.path = process.path

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Compute E[d x_t / dt | x_t, class]: (B, 2, 1, 1), (B,), (B,) -> (B, 2, 1, 1)."""
        c = self.path.at(t, x_t)
        variance = c.alpha**2 * WIDTH**2 + c.sigma**2  # (B, 1, 1, 1), of x_t given the class
        centres = CENTRES.reshape(1, -1, 2, 1, 1)  # (1, K, 2, 1, 1)
        off = x_t[:, None] - c.alpha[:, None] * centres  # (B, K, 2, 1, 1)
        likely = (-off.square().sum(2, keepdim=True) / (2 * variance[:, None])).softmax(dim=1)  # (B, K, 1, 1, 1)
        chosen = torch.eye(len(CENTRES) + 1)[y][:, : len(CENTRES), None, None, None]  # (B, K, 1, 1, 1), 0 for the null
        weight = torch.where((y == self.null_class)[:, None, None, None, None], likely, chosen)
        clean = (weight * (centres + (c.alpha * WIDTH**2 / variance)[:, None] * off)).sum(1)  # E[x | x_t, class]
        noise = (x_t - c.alpha * clean) / c.sigma
        return c.d_alpha * clean + c.d_sigma * noise


@styled
def draw_guidance() -> None:
    """Draw samples of three classes in the plane at three scales of guidance, and in an interval of noise levels."""
    process = Transport()
    model, num = ExactVelocity(process), 300
    sampler = ODE(process, method="euler", num_steps=101)
    y = torch.arange(3).repeat_interleave(num)
    noise = normal(0, torch.arange(3 * num), (2, 1, 1)).float()
    kinds = [Guidance(1.0), Guidance(2.0), Guidance(4.0), Guidance(4.0, interval=(0.0, 0.7))]
    titles = ["cfg_scale 1", "cfg_scale 2", "cfg_scale 4", "4, noise levels 0 to 0.7"]
    figure, axes = new_figure(WIDE, 1.6, 1, len(kinds))
    for ax, guidance, title in zip(axes[0], kinds, titles, strict=True):
        options = {"null_class": model.null_class, "channels": 2, "noise_level": process.noise_level}
        points = sampler(guided(model, y, guidance, **options), noise).flatten(1)
        for k, centre in enumerate(CENTRES.tolist()):
            (dots,) = ax.plot(*points[y == k].T.numpy(), ".", markersize=1, alpha=0.6)
            add_circles(ax, centre, dots.get_color())
        ax.set(title=title, xlim=(-2.6, 2.6), ylim=(-2.4, 2.8), aspect="equal", xticks=[], yticks=[])
    save(figure, "guidance")


def add_circles(ax: "Axes", centre: list[float], colour: str) -> None:
    """Add circles at one and two standard deviations of a class."""
    from matplotlib.patches import Circle

    for deviations in (1, 2):
        ax.add_patch(Circle(centre, deviations * WIDTH, fill=False, color=colour, linewidth=0.5))


@styled
def draw_averages() -> None:
    """Draw with which weight each step of training counts in the averages that a run keeps."""
    figure, axes = new_figure(WIDE, 1.9, 1, 1)
    kinds = {"ema (decay 0.9999)": constant(0.9999, True), **{name_of(std): power(std) for std in (0.05, 0.1)}}
    for name, beta in kinds.items():
        axes[0, 0].plot(np.arange(1, NUM_STEPS + 1)[::200], weight_of_steps(beta)[::200], label=name)
    axes[0, 0].set(
        xlabel=f"step of {NUM_STEPS:,}", ylabel="weight", yticks=[], ylim=(0, None), xlim=(NUM_STEPS // 2, NUM_STEPS)
    )
    axes[0, 0].xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes[0, 0].legend(loc="upper left")
    save(figure, "averages")


def weight_of_steps(beta: Callable[[int], float]) -> np.ndarray:
    """Compute the weight of the weights after each step in the average at the end, (NUM_STEPS,)."""
    betas = np.array([beta(step) for step in range(1, NUM_STEPS + 1)])
    later = np.append(np.cumprod(betas[:0:-1])[::-1], 1.0)  # what the later steps leave of it
    return (1 - betas) * later


if __name__ == "__main__":
    main()
