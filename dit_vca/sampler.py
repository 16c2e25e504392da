"""From noise to data on diffusers' schedulers, as functions of `predict(x_t, t)`.

`predict` is the network with labels and guidance applied: (B, C, H, W), (B,) integer steps -> (B, 2C, H, W).

The schedulers' own respacing is not the published one (their defaults start below the last step, and DDIM steps back by
a rounded stride), so DDPM and DDIM get the betas of the kept steps, for which theirs is exact, and the network gets the
original numbers of these steps. Latents are never clipped.

The solvers step in the logarithm of alpha / sigma, need no betas in between, and take the schedulers' own points.

diffusers is slow to import, and so is imported where a scheduler is made: a mistake in an option is told at once.
"""

import itertools
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vca import Generator, Predict, lookup

if TYPE_CHECKING:
    from dit_vca.diffusion import Diffusion


LEAST_LOG_RATIO = -5.1


def even_steps(num_timesteps: int, num_steps: int) -> list[int]:
    """Choose `num_steps` K of T steps, from 0 to T - 1: the running sum of the stride (T-1) / (K-1), rounded.

    It has to be summed up in floats, as published: where a place falls on one half, the product i (T-1) / (K-1) may
    round to the other side, which of 1000 steps it does for 278 of the 999 counts K.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 4, and its code.
    """
    stride = (num_timesteps - 1) / (num_steps - 1)
    return [round(place) for place in itertools.accumulate([stride] * (num_steps - 1), initial=0.0)]


def strided_steps(num_timesteps: int, num_steps: int) -> list[int]:
    """Choose the steps 0, s, 2 s, ... below T, for the smallest integer stride s that gives `num_steps` K of them.

    The published code calls it "ddimK". It ends below T - 1.

    Raises:
        ValueError: No stride gives K steps.
    """
    stride = math.ceil(num_timesteps / num_steps)  # the smallest that gives no more than K
    steps = range(0, num_timesteps, stride)
    if len(steps) != num_steps:
        more = len(range(0, num_timesteps, stride - 1))
        raise ValueError(
            f"sample.sampler.num_steps is {num_steps}, but no whole stride through {num_timesteps} steps gives so "
            f"many; choose {len(steps)} or {more}, or sample.sampler.spacing even."
        )
    return list(steps)


Spacing = Literal["even", "stride"]
SPACINGS = {"even": even_steps, "stride": strided_steps}


def respace(betas: Tensor, num_steps: int, spacing: Spacing = "even") -> tuple[Tensor, Tensor]:
    """Keep `num_steps` of T steps, and the betas between them.

    Args:
        betas: (T,) float64.
        num_steps: K, 2 ... T. (One step would be step 0, at which the network expects hardly any noise.)
        spacing: Name in `SPACINGS`: even, from 0 to T - 1; or stride, the published "ddimK".

    Returns:
        The kept steps (K,) int64, ascending, and their betas (K,) = 1 - abar_kept / abar_kept_before.

    Raises:
        ValueError: K is out of range or not to be had with this spacing, or an unknown spacing.
    """
    if not 2 <= num_steps <= len(betas):
        raise ValueError(f"sample.sampler.num_steps is {num_steps}; choose 2 ... {len(betas)}.")
    steps = torch.tensor(lookup(SPACINGS, spacing, "sample.sampler.spacing")(len(betas), num_steps))
    abar = torch.cumprod(1 - betas, dim=0)[steps]
    return steps, 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])


def with_signal(betas: Tensor) -> Tensor:
    """Cut the betas (T,) after the last step with log(alpha / sigma) > -5.1: (M,).

    All linear ones stay, and 996 of 1000 cosine ones. Beyond it there is only noise, and the clean latent, which
    divides by alpha, would multiply an error of the network by up to 20,000. What steps by the clean latent in few
    steps starts below, with the noise that it is given.

    Source: Lu et al. 2022, arXiv:2206.00927, whose code clips at the same number.
    """
    abar = torch.cumprod(1 - betas, dim=0)
    return betas[(abar / (1 - abar)).log() > 2 * LEAST_LOG_RATIO]


def make_scheduler(name: str, **options: Any) -> Any:
    """Make the scheduler of diffusers that is called `name`."""
    import diffusers

    return getattr(diffusers, name)(**options)


class _Respaced:
    """A scheduler of diffusers on the kept steps, and the loop."""

    scheduler_name: str
    config: dict[str, Any]

    def __init__(self, diffusion: "Diffusion", num_steps: int, spacing: Spacing) -> None:
        self.steps, betas = respace(diffusion.betas, num_steps, spacing)
        points = {"num_train_timesteps": num_steps, "trained_betas": betas.tolist(), "timestep_spacing": "linspace"}
        self.scheduler = make_scheduler(self.scheduler_name, **points, **self.config)
        self.scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # float64; the scheduler rounds the betas
        self.scheduler.set_timesteps(num_steps)

    def __call__(self, predict: Predict, noise: Tensor, generator: Generator = None) -> Tensor:
        """Turn noise (B, C, H, W) into samples (B, C, H, W)."""
        x = noise
        for index in self.scheduler.timesteps.tolist():
            t = torch.full((len(x),), int(self.steps[index]), device=x.device)  # (B,) original steps
            x = self.step(predict(x, t), index, x, generator)
        return x

    def step(self, output: Tensor, index: int, x: Tensor, generator: Generator) -> Tensor:
        """Give x (B, C, H, W) of the kept step before `index`, from the network's output (B, 2C, H, W) at `index`."""
        raise NotImplementedError


class DDPM(_Respaced):
    """Ancestral sampling with the learned variance; noise at every step but the last.

    Args:
        diffusion: The process.
        num_steps: Steps, respaced from those of training.
        spacing: `even`, from the first step of training to the last; or `stride`, every s-th step from the first on,
            which the published code calls "ddimN".

    Source: Ho et al. 2020, arXiv:2006.11239, algorithm 2; Nichol & Dhariwal 2021, arXiv:2102.09672.
    """

    scheduler_name = "DDPMScheduler"
    config = {"variance_type": "learned_range", "clip_sample": False}  # noqa: RUF012

    def __init__(self, diffusion: "Diffusion", *, num_steps: int = 250, spacing: Spacing = "even") -> None:
        super().__init__(diffusion, num_steps, spacing)

    def step(self, output: Tensor, index: int, x: Tensor, generator: Generator) -> Tensor:
        """Do one ancestral step of x (B, C, H, W), with the output (B, 2C, H, W)."""
        return self.scheduler.step(output, index, x, generator=generator).prev_sample


class DDIM(_Respaced):
    """The implicit sampler: deterministic at eta 0, ancestral with the posterior variance at eta 1.

    Args:
        diffusion: The process.
        num_steps: Steps, respaced from those of training.
        spacing: `even`, from the first step of training to the last; or `stride`, every s-th step from the first on,
            which the published code calls "ddimN".
        eta: Share of the noise, 0 ... 1.

    Source: Song et al. 2021, arXiv:2010.02502, equations 12 and 16.
    """

    scheduler_name = "DDIMScheduler"
    config = {"clip_sample": False}  # noqa: RUF012

    def __init__(
        self, diffusion: "Diffusion", *, num_steps: int = 250, spacing: Spacing = "even", eta: float = 0.0
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"sample.sampler.eta is {eta}; choose 0 ... 1.")
        super().__init__(diffusion, num_steps, spacing)
        self.eta = eta

    def step(self, output: Tensor, index: int, x: Tensor, generator: Generator) -> Tensor:
        """Do one implicit step of x (B, C, H, W), with the output (B, 2C, H, W), whose learned variance is not used."""
        predicted = output[:, : x.shape[1]]
        return self.scheduler.step(predicted, index, x, eta=self.eta, generator=generator).prev_sample


class _Solver:
    """A multistep solver of diffusers, and the loop: from the last of M steps, evenly, to the clean latent itself."""

    scheduler_name: str

    def __init__(self, diffusion: "Diffusion", num_steps: int, order: int, orders: int, **config: Any) -> None:
        betas = with_signal(diffusion.betas)
        if not 1 <= num_steps < len(betas):
            raise ValueError(f"sample.sampler.num_steps is {num_steps}; choose 1 ... {len(betas) - 1}.")
        if not 1 <= order <= orders:
            raise ValueError(f"sample.sampler.order is {order}; choose 1 ... {orders}.")
        self.num_steps = num_steps
        self.abar = torch.cumprod(1 - betas, dim=0)  # float64; the scheduler rounds the betas
        self.config = {
            "num_train_timesteps": len(betas),
            "trained_betas": betas.tolist(),
            "solver_order": order,
            "timestep_spacing": "linspace",
            "final_sigmas_type": "zero",
            "lower_order_final": True,
            **config,
        }

    def __call__(self, predict: Predict, noise: Tensor, generator: Generator = None) -> Tensor:
        """Turn noise (B, C, H, W) into samples (B, C, H, W)."""
        # a new one each time: it remembers the last outputs
        scheduler = make_scheduler(self.scheduler_name, **self.config)
        scheduler.alphas_cumprod = self.abar
        scheduler.set_timesteps(self.num_steps)
        x = noise
        for t in scheduler.timesteps:
            output = predict(x, torch.full((len(x),), int(t), device=x.device))
            x = self.step(scheduler, output[:, : x.shape[1]], t, x, generator)
        return x

    def step(self, scheduler: Any, predicted: Tensor, t: Tensor, x: Tensor, generator: Generator) -> Tensor:
        """Give x (B, C, H, W) of the step after t, from the predicted noise; who draws nothing needs no generator."""
        return scheduler.step(predicted, t, x).prev_sample


class DPMSolver(_Solver):
    """DPM-Solver++, multistep: few steps; the learned variance is not used.

    Args:
        diffusion: The process.
        num_steps: Steps, evenly spaced in those of training.
        order: 1 (DDIM), 2 or 3; 3 is for sampling without guidance.
        sde: Solve the SDE, with noise at every step but the last, in the place of the ODE; orders 1 and 2.

    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2 and section 5.
    """

    scheduler_name = "DPMSolverMultistepScheduler"

    def __init__(self, diffusion: "Diffusion", *, num_steps: int = 20, order: int = 2, sde: bool = False) -> None:
        # diffusers' third order of the SDE diverges: its last coefficient has -1/2 for +1/2
        algorithm, orders = ("sde-dpmsolver++", 2) if sde else ("dpmsolver++", 3)
        super().__init__(diffusion, num_steps, order, orders, algorithm_type=algorithm)

    def step(self, scheduler: Any, predicted: Tensor, t: Tensor, x: Tensor, generator: Generator) -> Tensor:
        """Do one step of x (B, C, H, W), which draws from `generator` if it is one of the SDE."""
        return scheduler.step(predicted, t, x, generator=generator).prev_sample


class UniPC(_Solver):
    """UniPC (B2): a multistep predictor whose result the next output of the network corrects, so at no further cost.

    Args:
        diffusion: The process.
        num_steps: Steps, evenly spaced in those of training.
        order: Order of the predictor, 1 ... 3; the corrector adds one.

    Source: Zhao et al. 2023, arXiv:2302.04867.
    """

    scheduler_name = "UniPCMultistepScheduler"

    def __init__(self, diffusion: "Diffusion", *, num_steps: int = 20, order: int = 2) -> None:
        super().__init__(diffusion, num_steps, order, 3, solver_type="bh2")


SAMPLERS = {"ddpm": DDPM, "ddim": DDIM, "dpm-solver": DPMSolver, "unipc": UniPC}
