"""From noise to data: the probability-flow ODE (torchdiffeq) and the reverse SDE, as functions of `predict(x_t, t)`.

`predict` is the network with labels and guidance applied: (B, C, H, W), (B,) -> (B, C, H, W). A sampler starts at t0 of
its interval, ends at t1, and takes `num_steps` points linspace(t0, t1, num_steps), so num_steps - 1 steps, as published.

Source: Ma et al. 2024, arXiv:2401.08740, sections 2.3 and 3.4; table 9 for the diffusion coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torchdiffeq
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sit_vca.path import Coefficients, VPPath
from vca import lookup

if TYPE_CHECKING:
    from sit_vca.transport import Transport

Predict = Callable[[Tensor, Tensor], Tensor]
Generator = torch.Generator | Sequence[torch.Generator] | None


class Sampler(Protocol):
    """Noise (B, C, H, W) -> samples (B, C, H, W); a list of generators draws each sample's randomness separately."""

    def __call__(self, predict: Predict, noise: Tensor, generator: Generator = None) -> Tensor:
        """See the class."""


def check_num_steps(num_steps: int) -> int:
    """`num_steps` itself.

    Raises:
        ValueError: Fewer than 2: a step goes from one point to the next.
    """
    if num_steps < 2:
        raise ValueError(f"sample.sampler.num_steps is {num_steps}; it counts points of time, so at least 2.")
    return num_steps


ODE_METHODS = {  # name -> torchdiffeq's name
    "euler": "euler",
    "heun": "heun2",
    "midpoint": "midpoint",
    "rk4": "rk4",
    "dopri5": "dopri5",
    "dopri8": "dopri8",
}


class ODE:
    """dx = velocity dt, integrated by torchdiffeq.

    Args:
        transport: The process.
        method: Name in `ODE_METHODS`. euler, heun, midpoint and rk4 step from point to point; dopri5 and dopri8 choose
            their own steps, one for the whole batch, so a sample depends on its batch to within the tolerances.
        num_steps: Points of time.
        rtol: Relative tolerance of dopri5 and dopri8.
        atol: Absolute tolerance of dopri5 and dopri8.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        method: str = "dopri5",
        num_steps: int = 50,
        rtol: float = 1e-3,
        atol: float = 1e-6,
    ) -> None:
        self.transport = transport
        self.num_steps = check_num_steps(num_steps)
        self.solver = {"method": lookup(ODE_METHODS, method, "sample.sampler.method"), "rtol": rtol, "atol": atol}

    def __call__(self, predict: Predict, noise: Tensor, generator: Generator = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W). The ODE draws nothing, so `generator` is not used."""

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            times = t.expand(len(x))
            return self.transport.velocity(predict(x, times), x, times)

        return torchdiffeq.odeint(velocity, noise, self._points(noise), **self.solver)[-1]

    def bits_per_dim(self, predict: Predict, x: Tensor, generator: Generator = None) -> Tensor:
        """Negative log2-likelihood of data x (B, C, H, W), divided by C H W: (B,).

        Integrates from data to noise together with the divergence of the velocity, estimated by Hutchinson's trace with
        one Rademacher vector e a sample: div u = E[e . (du/dx) e]. The ends of the interval count as data and noise.

        Source: arXiv:2401.08740, appendix; Grathwohl et al. 2019, arXiv:1810.01367.
        """
        probe = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype).sign()

        def reverse(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x_t = state[0].detach().requires_grad_()
                times = t.expand(len(x_t))
                u = self.transport.velocity(predict(x_t, times), x_t, times)
                (gradient,) = torch.autograd.grad((u * probe).sum(), x_t)
            return u.detach(), (gradient * probe).flatten(1).sum(1)

        state = (x, x.new_zeros(len(x)))
        noise, log_volume = (s[-1] for s in torchdiffeq.odeint(reverse, state, self._points(x).flip(0), **self.solver))
        dims = x[0].numel()
        log_prior = -0.5 * noise.square().flatten(1).sum(1) - 0.5 * dims * math.log(2 * math.pi)  # (B,)
        return -(log_prior + log_volume) / (dims * math.log(2))  # log_volume = -(divergence from noise to data)

    def _points(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.linspace(*self.transport.ode_interval, self.num_steps, dtype=dtype, device=like.device)


# The diffusion coefficient w(t) before its factor `diffusion_norm` c, which acts inside for the last two.
DIFFUSION_FORMS = {
    "constant": lambda t, k, c: c * torch.ones_like(t),
    "sbdm": lambda t, k, c: c * k.g,
    "sigma": lambda t, k, c: c * k.sigma,
    "linear": lambda t, k, c: c * (1 - t),
    "decreasing": lambda t, k, c: (c * torch.cos(math.pi * t) + 1).square() / 4,
    "increasing-decreasing": lambda t, k, c: c * torch.sin(math.pi * t).square(),
}

LAST_STEPS = ("none", "mean", "tweedie", "euler")
SDE_METHODS = ("euler", "heun")


class SDE:
    """dx = (velocity + w score) dt + sqrt(2 w) dW, then one last step without noise.

    Args:
        transport: The process.
        method: `euler` (Euler-Maruyama) or `heun`.
        num_steps: Points of time; num_steps - 1 steps, and the last one.
        diffusion: Form of w(t), a name in `DIFFUSION_FORMS`.
        diffusion_norm: Its factor c.
        last_step: `none`; `mean`, x + drift h; `tweedie`, x / alpha + sigma^2 / alpha score; `euler`, x + velocity h.
        last_step_size: Its length h; the SDE stops at 1 - h.

    Raises:
        ValueError: An unknown name, or a size out of range.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        method: str = "euler",
        num_steps: int = 250,
        diffusion: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str = "mean",
        last_step_size: float = 0.04,
    ) -> None:
        lookup(dict.fromkeys(SDE_METHODS), method, "sample.sampler.method")
        lookup(dict.fromkeys(LAST_STEPS), last_step, "sample.sampler.last_step")
        if not 0 < last_step_size < 1:
            raise ValueError(f"sample.sampler.last_step_size is {last_step_size}; choose a number between 0 and 1.")
        if diffusion_norm < 0:
            raise ValueError(f"sample.sampler.diffusion_norm is {diffusion_norm}; choose at least 0.")
        self.transport = transport
        self.num_steps = check_num_steps(num_steps)
        self.form = lookup(DIFFUSION_FORMS, diffusion, "sample.sampler.diffusion")
        self.norm = diffusion_norm
        self.heun = method == "heun"
        self.last_step = last_step
        self.last_step_size = 0.0 if last_step == "none" else last_step_size
        self.interval = transport.sde_interval(
            self.last_step_size,
            diverges_at_noise=diffusion == "sbdm" and not isinstance(transport.path, VPPath),
            needs_end=self.heun,
        )
        if self.interval[0] >= self.interval[1]:
            raise ValueError(
                f"sample.sampler.last_step_size is {last_step_size}, which leaves nothing before it: the other steps start "
                f"at t = {self.interval[0]:g}."
            )

    def __call__(self, predict: Predict, noise: Tensor, generator: Generator = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        dtype = torch.promote_types(noise.dtype, torch.float32)
        points = torch.linspace(*self.interval, self.num_steps, dtype=dtype, device=noise.device)
        dt = points[1] - points[0]
        x = noise
        for t in points[:-1]:
            z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            jump = (2 * self.w(x, t) * dt).sqrt() * z
            if self.heun:
                x = x + jump
                k1 = self.drift(predict, x, t)
                k2 = self.drift(predict, x + k1 * dt, t + dt)
                x = x + (k1 + k2) / 2 * dt
            else:
                x = x + self.drift(predict, x, t) * dt + jump
        return self._finish(predict, x, points[-1])

    def w(self, x: Tensor, t: Tensor) -> Tensor:
        """The diffusion coefficient at t (), broadcastable to x."""
        return self.form(t, self._at(x, t), self.norm)

    def drift(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        """Velocity + w score at x (B, C, H, W) and t ()."""
        velocity, score = self._velocity_and_score(predict, x, t)
        return velocity + self.w(x, t) * score

    def _finish(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        if self.last_step == "mean":
            return x + self.drift(predict, x, t) * self.last_step_size
        if self.last_step == "none":
            return x
        velocity, score = self._velocity_and_score(predict, x, t)
        if self.last_step == "euler":
            return x + velocity * self.last_step_size
        c = self._at(x, t)
        return x / c.alpha + c.sigma.square() / c.alpha * score

    def _velocity_and_score(self, predict: Predict, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        times = t.expand(len(x))
        output = predict(x, times)
        return self.transport.velocity(output, x, times), self.transport.score(output, x, times)

    def _at(self, x: Tensor, t: Tensor) -> Coefficients:
        return self.transport.path.at(t.reshape(1), like=x)


SAMPLERS = {"ode": ODE, "sde": SDE}
