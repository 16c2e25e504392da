"""The output of the network: velocity, noise or score; how to turn it into the others and data; the loss weights.

    velocity u = dx_t/dt = alpha' x + sigma' noise,   score = -noise / sigma,
    u = (alpha'/alpha) x_t + g score,   g = (alpha'/alpha) sigma^2 - sigma sigma'

Source: Ma et al. 2024, arXiv:2401.08740, equations 4 to 10.
"""

from typing import Protocol

import torch
from torch import Tensor

from sit_vca.path import Coefficients

LEAST_ALPHA = 1e-3  # that noise and score are divided by: at alpha = 0 they say nothing about the data


class Prediction(Protocol):
    """One meaning of the network's output; all tensors (B, C, H, W), coefficients broadcastable to them."""

    weighted: bool

    def error(self, output: Tensor, x: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Give what the loss squares, (B, C, H, W)."""

    def velocity(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Give the velocity (B, C, H, W) at x_t that `output` implies."""

    def noise(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Give the noise (B, C, H, W) that `output` implies, finite on the whole path; the score is -noise / sigma."""

    def clean(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Give the data (B, C, H, W) that `output` implies at the end of the path, finite on the whole path."""


class VelocityPrediction:
    """output = u. The loss weight is not used."""

    weighted = False

    def error(self, output: Tensor, x: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Compute output - u, (B, C, H, W)."""
        return output - (c.d_alpha * x + c.d_sigma * noise)

    def velocity(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Give the output, u (B, C, H, W), itself."""
        return output

    def noise(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Compute (alpha' x_t - alpha u) / (alpha' sigma - alpha sigma'), (B, C, H, W)."""
        return (c.d_alpha * x_t - c.alpha * output) / c.wronskian

    def clean(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Compute (sigma u - sigma' x_t) / (alpha' sigma - alpha sigma'), (B, C, H, W)."""
        return (c.sigma * output - c.d_sigma * x_t) / c.wronskian


class ScorePrediction:
    """output = score; the loss is that of the noise which it implies."""

    weighted = True

    def error(self, output: Tensor, x: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Compute sigma score + noise, (B, C, H, W)."""
        return c.sigma * output + noise

    def velocity(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Compute (alpha'/alpha) x_t + g score, (B, C, H, W), as (alpha' x_t - wronskian noise) / alpha."""
        return (c.d_alpha * x_t - c.wronskian * self.noise(output, x_t, c)) / c.alpha

    def noise(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Compute -sigma score, (B, C, H, W)."""
        return -c.sigma * output

    def clean(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Compute (x_t + sigma^2 score) / alpha, (B, C, H, W)."""
        return (x_t + c.sigma.square() * output) / c.alpha.clamp(min=LEAST_ALPHA)


class NoisePrediction(ScorePrediction):
    """output = noise = -sigma score."""

    def error(self, output: Tensor, x: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Compute output - noise, (B, C, H, W)."""
        return output - noise

    def noise(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Give the output (B, C, H, W) itself."""
        return output

    def clean(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """Compute (x_t - sigma noise) / alpha, (B, C, H, W)."""
        return (x_t - c.sigma * output) / c.alpha.clamp(min=LEAST_ALPHA)


PREDICTIONS = {"velocity": VelocityPrediction, "noise": NoisePrediction, "score": ScorePrediction}


def no_weight(c: Coefficients) -> Tensor:
    """Give 1, (B, 1, 1, 1)."""
    return torch.ones_like(c.sigma)


def velocity_weight(c: Coefficients) -> Tensor:
    """Compute (g / sigma)^2, (B, 1, 1, 1): the loss becomes that of the velocity."""
    return (c.g / c.sigma).square()


def likelihood_weight(c: Coefficients) -> Tensor:
    """Compute g / sigma^2, (B, 1, 1, 1): the loss becomes a bound on the likelihood."""
    return c.g / c.sigma.square()


WEIGHTS = {"none": no_weight, "velocity": velocity_weight, "likelihood": likelihood_weight}
