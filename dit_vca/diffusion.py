"""The diffusion process: betas, and the hybrid loss that trains noise and variance together.

    q(x_t | x) = N(sqrt(abar_t) x, (1 - abar_t) I),   abar_t = prod_{s <= t} (1 - beta_s)

Source: Ho et al. 2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vca import Model, lookup


def linear_betas(num_timesteps: int) -> Tensor:
    """Give T betas (T,), float64: 1e-4 ... 0.02 for 1000 steps, else both times 1000 / T. Source: arXiv:2006.11239."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Give T betas (T,), float64: beta_t = min(1 - f(t+1) / f(t), 0.999), f(t) = cos^2((t/T + 0.008) / 1.008 pi/2).

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17.
    """
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


@dataclass(frozen=True)
class StepCoefficients:
    """The coefficients of the formulas at each step: (T,) float64, or (B, 1, 1, 1) after `Diffusion.at`."""

    sqrt_abar: Tensor  # sqrt(abar_t)
    sqrt_1m_abar: Tensor  # sqrt(1 - abar_t)
    from_x: Tensor  # posterior mean = from_x x + from_x_t x_t
    from_x_t: Tensor
    log_beta: Tensor  # the largest log variance of the reverse step
    log_posterior: Tensor  # the smallest, log beta~_t, with its value at t = 1 in place of -infinity at t = 0

    def clean(self, predicted: Tensor, x_t: Tensor) -> Tensor:
        """Solve x_t = sqrt_abar x + sqrt_1m_abar noise for x with the predicted noise, all (B, C, H, W)."""
        return (x_t - self.sqrt_1m_abar * predicted) / self.sqrt_abar


class Diffusion:
    """Gaussian diffusion in `num_timesteps` steps with a learned variance.

    Args:
        betas: Name in `BETAS`: linear or cosine.
        num_timesteps: Steps T of training.

    Attributes:
        end_time: Above the largest step, T.

    Raises:
        ValueError: Unknown betas, or so few steps that a beta reaches 1.
    """

    def __init__(self, *, betas: str = "linear", num_timesteps: int = 1000) -> None:
        if num_timesteps < 2:
            raise ValueError(f"process.num_timesteps is {num_timesteps}; choose at least 2.")
        self.num_timesteps = self.end_time = num_timesteps
        self.betas = lookup(BETAS, betas, "process.betas")(num_timesteps)  # (T,) float64
        if self.betas.max() >= 1:
            raise ValueError(
                f"process.num_timesteps is {num_timesteps}; so few {betas} betas reach {float(self.betas.max()):.3g}, "
                f"and they must stay below 1. Choose more, as a rule 1000."
            )
        abar = torch.cumprod(1 - self.betas, dim=0)
        previous = torch.cat([abar.new_ones(1), abar[:-1]])
        posterior = self.betas * (1 - previous) / (1 - abar)  # beta~_t, 0 at t = 0
        table = StepCoefficients(
            sqrt_abar=abar.sqrt(),
            sqrt_1m_abar=(1 - abar).sqrt(),
            from_x=self.betas * previous.sqrt() / (1 - abar),
            from_x_t=(1 - previous) * (1 - self.betas).sqrt() / (1 - abar),
            log_beta=self.betas.log(),
            log_posterior=torch.cat([posterior[1:2], posterior[1:]]).log(),
        )
        self._table = torch.stack([getattr(table, f.name) for f in fields(table)])  # (6, T)

    def at(self, t: Tensor, like: Tensor) -> StepCoefficients:
        """Give the coefficients at steps t (B,), each (B, 1, 1, 1) in the dtype of `like` (B, C, H, W)."""
        self._table = self._table.to(t.device)
        rows = self._table[:, t].to(like.dtype)
        return StepCoefficients(*rows.reshape(*rows.shape, *[1] * (like.ndim - 1)))

    def loss(
        self, model: Model, x: Tensor, y: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Compute the hybrid loss mse + vb of each sample, (B,), not averaged over the batch; see `losses`."""
        return self.losses(model, x, y, t=t, noise=noise)["loss"]

    def losses(
        self, model: Model, x: Tensor, y: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the hybrid loss and its two parts, each (B,).

        Args:
            model: `model(x_t, t, y)` -> (B, 2C, H, W): the noise, and v.
            x: Clean latents (B, C, H, W).
            y: Labels (B,).
            t: Steps (B,), integers 0 ... T - 1; drawn uniformly if not given.
            noise: (B, C, H, W); drawn if not given.

        Returns:
            `mse`: mean (noise - predicted)^2; `vb`: the term of the variational bound at t in bits per dimension, with
            the predicted noise detached, so that it trains the variance only; `loss`: their sum, unscaled.

        Raises:
            ValueError: The model does not give 2C channels.
        """
        if t is None:
            t = self.times(torch.rand(len(x), dtype=torch.float64, device=x.device))  # (B,)
        if noise is None:
            noise = torch.randn_like(x)
        c = self.at(t, like=x)
        x_t = c.sqrt_abar * x + c.sqrt_1m_abar * noise  # (B, C, H, W)
        output = model(x_t, t, y)  # (B, 2C, H, W)
        if output.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"the diffusion loss needs noise and variance, {2 * x.shape[1]} channels; the model gives "
                f"{output.shape[1]}."
            )
        predicted, v = output.chunk(2, dim=1)  # 2 x (B, C, H, W)
        mse = (noise - predicted).square().flatten(1).mean(1)  # (B,)
        vb = self._bound(x, x_t, predicted.detach(), v, t, c)  # (B,)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def times(self, u: Tensor) -> Tensor:
        """Give the steps of training (B,), int64 and uniform, of which u (B,) in (0, 1), float64, are the quantiles."""
        return (u * self.num_timesteps).long()

    def clean(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Give the clean latent (B, C, H, W) that the `output` (B, 2C, H, W) at x_t and the steps t (B,) implies."""
        return self.at(t, like=x_t).clean(output[:, : x_t.shape[1]], x_t)

    def noise_level(self, t: Tensor) -> Tensor:
        """Give the place of t, (B,) or (), between the cleanest step, 0, and the last, 1: t / (T - 1)."""
        return t / (self.num_timesteps - 1)

    def _bound(self, x: Tensor, x_t: Tensor, predicted: Tensor, v: Tensor, t: Tensor, c: StepCoefficients) -> Tensor:
        """Compute KL(q(x_{t-1}|x_t,x) || p(x_{t-1}|x_t)), or -log p(x|x_1) at t = 0, in bits per dimension, (B,)."""
        true_mean = c.from_x * x + c.from_x_t * x_t
        mean = c.from_x * c.clean(predicted, x_t) + c.from_x_t * x_t
        fraction = (v + 1) / 2
        log_variance = fraction * c.log_beta + (1 - fraction) * c.log_posterior
        kl = gaussian_kl(true_mean, c.log_posterior, mean, log_variance).flatten(1).mean(1)  # (B,)
        nll = -discretised_log_likelihood(x, mean, 0.5 * log_variance).flatten(1).mean(1)  # (B,)
        return torch.where(t == 0, nll, kl) / math.log(2)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Compute KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise: all (B, C, H, W)."""
    gap = log_variance1 - log_variance2
    return 0.5 * (gap.exp() - 1 - gap + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Compute the log probability, in nats, of the bin of width 2/255 around x under N(mean, std^2): all (B, C, H, W).

    The bins at |x| > 0.999 are open. The normal CDF is the tanh approximation, its probabilities floored at 1e-12, as
    in the published code. Source: arXiv:2006.11239, equation 13.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, inverse_std = x - mean, torch.exp(-log_std)
    upper = cdf(inverse_std * (centred + 1 / 255))
    lower = cdf(inverse_std * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
