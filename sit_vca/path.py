"""Paths from noise (t = 0) to data (t = 1): x_t = alpha x + sigma noise.

Source: Ma et al. 2024, arXiv:2401.08740, section 2 and table 1 (which write time the other way round).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """alpha, sigma and their derivatives in t, each of a shape that broadcasts to x_t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def wronskian(self) -> Tensor:
        """alpha' sigma - alpha sigma', (B, 1, 1, 1), which joins the velocity to data and noise and is never zero."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma

    @property
    def g(self) -> Tensor:
        """g = (alpha'/alpha) sigma^2 - sigma sigma', (B, 1, 1, 1), so that velocity = (alpha'/alpha) x_t + g score."""
        return self.sigma * self.wronskian / self.alpha


def broadcast(t: Tensor, like: Tensor) -> Tensor:
    """Reshape t (B,) to (B, 1, 1, 1), with as many ones as `like` needs, in its dtype."""
    return t.to(like).reshape(-1, *[1] * (like.ndim - 1))


class Path:
    """A schedule of alpha and sigma, from noise at t = 0 to data at t = 1.

    Attributes:
        pure_noise_at_start: alpha is 0 at t = 0, so what is divided by alpha is infinite there.
        singular_at_data: The derivative of sigma is infinite at t = 1, so training and sampling stop before it.
            sigma_rounds_to_zero: sigma is exactly 0 at t = 1 in floating point, too, so noise / sigma is not a number
            there.
    """

    pure_noise_at_start = True
    singular_at_data = False
    sigma_rounds_to_zero = True

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """Give the coefficients at t (B,) in [0, 1], each (B, 1, 1, 1), broadcastable to `like` (B, C, H, W)."""
        raise NotImplementedError


class LinearPath(Path):
    """alpha = t, sigma = 1 - t."""

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """Give the coefficients at t (B,), each (B, 1, 1, 1)."""
        t = broadcast(t, like)
        return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))


class GVPPath(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2), the generalised variance-preserving path."""

    sigma_rounds_to_zero = False  # cos(pi / 2) in floating point

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """Give the coefficients at t (B,), each (B, 1, 1, 1)."""
        angle = broadcast(t, like) * (math.pi / 2)
        alpha, sigma = angle.sin(), angle.cos()
        return Coefficients(alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha)


class VPPath(Path):
    """The variance-preserving path of score-based SDEs: alpha^2 + sigma^2 = 1.

    log alpha = -(1 - t)^2 (beta_max - beta_min) / 4 - (1 - t) beta_min / 2.

    Args:
        beta_min: Rate of the noise at data, above 0.
        beta_max: Rate of the noise at pure noise, above `beta_min`.

    Raises:
        ValueError: Not 0 < beta_min < beta_max.

    Source: Song et al. 2021, arXiv:2011.13456, equation 33.
    """

    pure_noise_at_start = False
    singular_at_data = True

    def __init__(self, *, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max:
            raise ValueError(f"the vp path needs 0 < beta_min < beta_max; got {beta_min} and {beta_max}.")
        self.beta_min, self.beta_max = beta_min, beta_max

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """Give the coefficients at t (B,), each (B, 1, 1, 1)."""
        s = (1 - broadcast(t, like)).clamp(min=1e-5)  # sigma' is infinite at t = 1, and adaptive solvers look beyond it
        span = self.beta_max - self.beta_min
        log_alpha = -(s**2) * span / 4 - s * self.beta_min / 2
        beta = self.beta_min + s * span  # so that (log alpha)' = beta / 2
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        d_alpha = alpha * beta / 2
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


PATHS = {"linear": LinearPath, "gvp": GVPPath, "vp": VPPath}
