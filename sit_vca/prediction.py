"""What the network predicts: velocity, noise or score; how to turn it into the others and data; and the loss weights.

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
    """One meaning of the network's output; all tensors (B, ...), coefficients broadcastable to them."""

    weighted: bool

    def error(self, output: Tensor, x: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """What the loss squares."""

    def velocity(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The velocity at x_t that `output` implies."""

    def noise(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The noise in x_t that `output` implies, finite on the whole path; the score is -noise / sigma."""

    def clean(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The data at the end of the path through x_t that `output` implies, finite on the whole path."""


class VelocityPrediction:
    """output = u. The loss weight is not used."""

    weighted = False

    def error(self, output: Tensor, x: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Output - u."""
        return output - (c.d_alpha * x + c.d_sigma * noise)

    def velocity(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """U itself."""
        return output

    def noise(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """(alpha' x_t - alpha u) / (alpha' sigma - alpha sigma')."""
        return (c.d_alpha * x_t - c.alpha * output) / c.wronskian

    def clean(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """(sigma u - sigma' x_t) / (alpha' sigma - alpha sigma')."""
        return (c.sigma * output - c.d_sigma * x_t) / c.wronskian


class ScorePrediction:
    """output = score; the loss is that of the noise which it implies."""

    weighted = True

    def error(self, output: Tensor, x: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Sigma output + noise."""
        return c.sigma * output + noise

    def velocity(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """(alpha'/alpha) x_t + g score = (alpha' x_t - (alpha' sigma - alpha sigma') noise) / alpha."""
        return (c.d_alpha * x_t - c.wronskian * self.noise(output, x_t, c)) / c.alpha

    def noise(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """-sigma score."""
        return -c.sigma * output

    def clean(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """(x_t + sigma^2 score) / alpha."""
        return (x_t + c.sigma.square() * output) / c.alpha.clamp(min=LEAST_ALPHA)


class NoisePrediction(ScorePrediction):
    """output = noise = -sigma score."""

    def error(self, output: Tensor, x: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """Output - noise."""
        return output - noise

    def noise(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The output itself."""
        return output

    def clean(self, output: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """(x_t - sigma noise) / alpha."""
        return (x_t - c.sigma * output) / c.alpha.clamp(min=LEAST_ALPHA)


PREDICTIONS = {"velocity": VelocityPrediction, "noise": NoisePrediction, "score": ScorePrediction}


def no_weight(c: Coefficients) -> Tensor:
    """1."""
    return torch.ones_like(c.sigma)


def velocity_weight(c: Coefficients) -> Tensor:
    """(g / sigma)^2: the loss becomes that of the velocity."""
    return (c.g / c.sigma).square()


def likelihood_weight(c: Coefficients) -> Tensor:
    """g / sigma^2: the loss becomes a bound on the likelihood."""
    return c.g / c.sigma.square()


WEIGHTS = {"none": no_weight, "velocity": velocity_weight, "likelihood": likelihood_weight}
