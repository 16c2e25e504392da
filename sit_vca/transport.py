"""The flow process: training loss, conversions, and the rules for the time interval."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sit_vca.path import PATHS, Path
from sit_vca.prediction import PREDICTIONS, WEIGHTS
from vca import Model, create, lookup


class Uniform:
    """t uniform in (0, 1), as published."""

    def __call__(self, u: Tensor) -> Tensor:
        """Give the quantiles: (B,) -> (B,)."""
        return u


class LogNormal:
    """The ratio of noise to data (1 - t) / t lognormal, exp(mean + std z), so t = sigmoid(-mean - std z): logit-normal.

    It learns faster in short runs.

    Args:
        mean: Of the logarithm; above 0 there is more noise.
        std: Of the logarithm.

    Raises:
        ValueError: `std` is not positive.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1, where time runs the other way.
    """

    def __init__(self, *, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"process.time.std is {std}; choose a positive number.")
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor) -> Tensor:
        """Give the quantiles: (B,) -> (B,)."""
        return torch.sigmoid(self.std * torch.special.ndtri(u) - self.mean)


TIMES = {"uniform": Uniform, "lognormal": LogNormal}


class Transport:
    """A path, what the network predicts on it, and how the loss is weighted.

    Args:
        path: Name in `PATHS`, linear, gvp or vp, or `{"name": ..., option: value}`, or a `Path`.
        prediction: Name in `PREDICTIONS`: velocity, noise or score.
        weight: Name in `WEIGHTS`: none, velocity or likelihood. Not used where the prediction is the velocity.
        time: Distribution of t in training, scaled to the interval: name in `TIMES`, `uniform` or `lognormal`, or
            `{"name": ..., option: value}`.

    Attributes:
        end_time: The largest time, 1.

    Raises:
        ValueError: An unknown name or option.

    Source: Ma et al. 2024, arXiv:2401.08740.
    """

    end_time = 1.0

    def __init__(
        self,
        *,
        path: str | Mapping[str, Any] | Path = "linear",
        prediction: str = "velocity",
        weight: str = "none",
        time: str | Mapping[str, Any] = "uniform",
    ) -> None:
        self.path = create(PATHS, path, "process.path") if isinstance(path, str | Mapping) else path
        self.prediction = lookup(PREDICTIONS, prediction, "process.prediction")()
        self.weight = lookup(WEIGHTS, weight, "process.weight")
        self.time = create(TIMES, time, "process.time")

    def loss(
        self, model: Model, x: Tensor, y: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Compute the weighted squared error of each sample, averaged over its dimensions.

        Args:
            model: `model(x_t, t, y)`.
            x: Clean latents (B, C, H, W).
            y: Labels (B,).
            t: Times (B,); drawn on the training interval if not given.
            noise: (B, C, H, W); drawn if not given.

        Returns:
            (B,), not averaged over the batch.
        """
        if t is None:
            t = self.times(torch.rand(len(x), dtype=torch.float64, device=x.device))  # (B,)
        if noise is None:
            noise = torch.randn_like(x)
        c = self.path.at(t, like=x)
        x_t = c.alpha * x + c.sigma * noise  # (B, C, H, W)
        error = self.prediction.error(model(x_t, t, y), x, noise, c).square()  # (B, C, H, W)
        if self.prediction.weighted:
            error = self.weight(c) * error
        return error.flatten(1).mean(1)  # (B,)

    def times(self, u: Tensor) -> Tensor:
        """Give the times of training (B,), float32, of which u (B,) in (0, 1), float64, are the quantiles."""
        t0, t1 = self.train_interval
        return (t0 + (t1 - t0) * self.time(u)).float()

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Give the velocity (B, C, H, W) that the network's `output` at x_t (B, C, H, W) and t (B,) implies."""
        return self.prediction.velocity(output, x_t, self.path.at(t, like=x_t))

    def noise(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Give the noise (B, C, H, W) that the network's `output` at x_t and t (B,) implies, at data, too."""
        return self.prediction.noise(output, x_t, self.path.at(t, like=x_t))

    def score(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Give the score (B, C, H, W), -noise / sigma, that the network's `output` at x_t and t (B,) implies."""
        return -self.noise(output, x_t, t) / self.path.at(t, like=x_t).sigma

    def clean(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Give the clean latent (B, C, H, W) that the network's `output` at x_t (B, C, H, W) and t (B,) implies.

        Finite at both ends. At t = 0 of the linear and gvp paths, noise and score say nothing about it; there and just
        after it they are divided by 1e-3 for alpha.
        """
        return self.prediction.clean(output, x_t, self.path.at(t, like=x_t))

    def noise_level(self, t: Tensor) -> Tensor:
        """Give the place of t, (B,) or (), between data, 0, and noise, 1: 1 - t."""
        return 1 - t

    @property
    def train_interval(self) -> tuple[float, float]:
        """(t0, t1) of training: vp stops 1e-5 before data; noise and score networks keep 1e-3 from both ends."""
        if self.path.singular_at_data:
            return 0.0, 1 - 1e-5
        return self._margin, 1 - self._margin

    @property
    def ode_interval(self) -> tuple[float, float]:
        """(t0, t1) of the ODE: vp stops 1e-3 before data; noise and score networks keep 1e-3 from both ends."""
        if self.path.singular_at_data:
            return 0.0, 1 - 1e-3
        return self._margin, 1 - self._margin

    def sde_interval(
        self, last_step_size: float, *, diverges_at_noise: bool, diverges_at_data: bool
    ) -> tuple[float, float]:
        """Give (t0, t1) of the SDE, which ends one last step before data.

        Args:
            last_step_size: Length of the last step, 0 if there is none.
            diverges_at_noise: The drift is needed at t = 0 and infinite there, so this starts at 1e-3.
            diverges_at_data: Without a last step the drift is needed at t = 1 and infinite there, so this stops 1e-3
                before.
        """
        if self.path.singular_at_data:
            return 0.0, 1 - (last_step_size or 1e-3)
        t0 = max(self._margin, 1e-3) if diverges_at_noise else self._margin
        return t0, 1 - (last_step_size or (1e-3 if diverges_at_data else self._margin))

    @property
    def _margin(self) -> float:
        return 1e-3 if self.prediction.weighted else 0.0
