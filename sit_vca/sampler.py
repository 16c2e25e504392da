"""From noise to data: the probability-flow ODE (torchdiffeq) and the reverse SDE, as functions of `predict(x_t, t)`.

`predict` is the network with labels and guidance applied: (B, C, H, W), (B,) -> (B, C, H, W). A sampler starts at t0 of
its interval, ends at t1, and takes `num_steps` points linspace(t0, t1, num_steps), so num_steps - 1 steps, as
published; `time_shift` moves the points towards noise. torchdiffeq and diffusers are slow to import, and so are
imported where they are used: a mistake in an option is told at once.

Source: Ma et al. 2024, arXiv:2401.08740, sections 2.3 and 3.4; table 9 for the diffusion coefficients.
"""

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sit_vca.path import Coefficients
from vca import Generator, Predict, lookup

if TYPE_CHECKING:
    from sit_vca.transport import Transport


def check_num_steps(num_steps: int) -> int:
    """Give `num_steps` itself.

    Raises:
        ValueError: Fewer than 2: a step goes from one point to the next.
    """
    if num_steps < 2:
        raise ValueError(f"sample.sampler.num_steps is {num_steps}; it counts points of time, so at least 2.")
    return num_steps


def time_points(interval: tuple[float, float], num_steps: int, shift: float, like: Tensor) -> Tensor:
    """Give times from t0 to t1, (num_steps,), on the device of `like` and in its dtype or float32.

    Evenly spaced if `shift` is 1. Otherwise, with n = (t1 - t) / (t1 - t0) the share of noise left at such a time, it
    becomes n' = shift n / (1 + (shift - 1) n), so that for shift > 1 more of the times lie near noise.

    Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2; Yao et al. 2025 (LightningDiT), arXiv:2501.01423.
    """
    t0, t1 = interval
    options = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    if shift == 1:
        return torch.linspace(t0, t1, num_steps, **options)
    data = torch.linspace(0, 1, num_steps, **options)  # 1 - n
    data = data / (data + shift * (1 - data))  # 1 - n', exact at both ends
    return t0 * (1 - data) + t1 * data


def normal_like(x: Tensor, generator: Generator) -> Tensor:
    """Draw standard normal numbers like x (B, C, H, W); of a list of generators, each draws those of one sample."""
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def check_time_shift(time_shift: float) -> float:
    """Give `time_shift` itself.

    Raises:
        ValueError: It is not a positive number.
    """
    if not 0 < time_shift < math.inf:
        raise ValueError(f"sample.sampler.time_shift is {time_shift}; choose a positive number, 1 for even steps.")
    return time_shift


ODE_METHODS = {  # name -> torchdiffeq's name
    "euler": "euler",
    "midpoint": "midpoint",
    "heun": "heun2",
    "heun2": "heun2",
    "heun3": "heun3",
    "rk4": "rk4",
    "explicit_adams": "explicit_adams",
    "implicit_adams": "implicit_adams",
    "adaptive_heun": "adaptive_heun",
    "fehlberg2": "fehlberg2",
    "bosh3": "bosh3",
    "dopri5": "dopri5",
    "dopri8": "dopri8",
}
ADAPTIVE = frozenset({"adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8"})  # they choose their own steps
EVEN = frozenset({"explicit_adams", "implicit_adams"})  # their coefficients are those of even steps
BATCHED = ADAPTIVE | {"implicit_adams"}  # until the whole batch is within rtol and atol: a sample depends on its batch


class ODE:
    """dx = velocity dt, integrated by torchdiffeq.

    Args:
        transport: The process.
        method: Name in `ODE_METHODS`. euler, midpoint, heun2 (or heun), heun3, rk4 and the multistep explicit_adams and
            implicit_adams step from point to point. adaptive_heun, fehlberg2, bosh3, dopri5 and dopri8 choose their own
            steps, one for the whole batch, and implicit_adams iterates over the whole batch, so with these six a sample
            depends on its batch to within the tolerances.
        num_steps: Points of time; not used by the methods that choose their own.
        time_shift: Above 1, more of the points lie near noise; for euler, midpoint, heun2, heun3 and rk4.
        rtol: Relative tolerance of the six methods above; fehlberg2 needs a tenth of the default.
        atol: Absolute tolerance of the six methods above.

    Raises:
        ValueError: An unknown method, a number out of range, or points shifted for a method that cannot have them.
    """

    def __init__(
        self,
        transport: "Transport",
        *,
        method: str = "dopri5",
        num_steps: int = 50,
        time_shift: float = 1.0,
        rtol: float = 1e-3,
        atol: float = 1e-6,
    ) -> None:
        self.solver = {"method": lookup(ODE_METHODS, method, "sample.sampler.method"), "rtol": rtol, "atol": atol}
        for name, tolerance in (("rtol", rtol), ("atol", atol)):
            if not tolerance > 0:
                raise ValueError(f"sample.sampler.{name} is {tolerance}; choose a positive number.")
        if check_time_shift(time_shift) != 1 and method in ADAPTIVE | EVEN:
            steps = "chooses its own steps" if method in ADAPTIVE else "needs even steps"
            raise ValueError(
                f"sample.sampler.time_shift is {time_shift}, but {method} {steps}; set sample.sampler.method to one of "
                f"{sorted(set(ODE_METHODS) - ADAPTIVE - EVEN)}, or leave time_shift at 1."
            )
        self.transport = transport
        self.num_steps = check_num_steps(num_steps)
        self.time_shift = time_shift

    @property
    def steps_taken(self) -> int | None:
        """Steps from one point to the next; None of a method that chooses its own."""
        return None if self.solver["method"] in ADAPTIVE else self.num_steps - 1

    def __call__(self, predict: Predict, noise: Tensor, generator: Generator = None) -> Tensor:
        """Turn noise (B, C, H, W) into samples (B, C, H, W). The ODE draws nothing, so `generator` is not used.

        Raises:
            FloatingPointError: A method that chooses its own steps meets NaN or infinite values, or finds no step small
                enough.
        """

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            times = t.expand(len(x))
            return self.transport.velocity(predict(x, times), x, times)

        return self._integrate(velocity, noise, self._points(noise))

    def bits_per_dim(self, predict: Predict, x: Tensor, generator: Generator = None) -> Tensor:
        """Compute the negative log2-likelihood of data x (B, C, H, W), divided by C H W: (B,).

        Integrates from data to noise together with the divergence of the velocity, estimated by Hutchinson's trace with
        one Rademacher vector e a sample: div u = E[e . (du/dx) e]. The ends of the interval count as data and noise.

        Args:
            predict: Differentiable in x_t, and each sample's output a function of that sample alone.
            x: (B, C, H, W).
            generator: Of the vectors e; a list has one for each sample.

        Raises:
            FloatingPointError: As of drawing.

        Source: arXiv:2401.08740, appendix; Grathwohl et al. 2019, arXiv:1810.01367.
        """
        probe = torch.where(normal_like(x, generator) < 0, -1.0, 1.0).to(x.dtype)  # not sign(), which is 0 at 0

        def reverse(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x_t = state[0].detach().requires_grad_()
                times = t.expand(len(x_t))
                u = self.transport.velocity(predict(x_t, times), x_t, times)
                (gradient,) = torch.autograd.grad((u * probe).sum(), x_t)
            return u.detach(), (gradient * probe).flatten(1).sum(1)

        noise, log_volume = self._integrate(reverse, (x, x.new_zeros(len(x))), self._points(x).flip(0))
        dims = x[0].numel()
        log_prior = -0.5 * noise.square().flatten(1).sum(1) - 0.5 * dims * math.log(2 * math.pi)  # (B,)
        return -(log_prior + log_volume) / (dims * math.log(2))  # log_volume = -(divergence from noise to data)

    def _points(self, like: Tensor) -> Tensor:
        return time_points(self.transport.ode_interval, self.num_steps, self.time_shift, like)

    def _integrate(self, derivative: Callable[[Tensor, Any], Any], state: Any, points: Tensor) -> Any:
        """Integrate to the last point, and give the state there, a tensor or a tuple of them."""
        from torchdiffeq import odeint

        # order 4; the default, 11, is stable only in very small steps
        options = {"max_order": 5} if self.solver["method"] in EVEN else None
        if self.solver["method"] in ADAPTIVE:
            derivative = _Checked(derivative, self.solver["method"])
        path = odeint(derivative, state, points, **self.solver, options=options)
        return path[-1] if isinstance(state, Tensor) else tuple(part[-1] for part in path)


class _Checked:
    """A derivative (t, state) -> a tensor or a tuple of them, for solvers that choose their steps.

    Where such a solver is stuck, torchdiffeq asserts that it is not, and with `python -O` tries for ever; here it is an
    error, which says whether NaN is the reason. That stays on the device until the solver waits for the device anyway.
    """

    def __init__(self, derivative: Callable[[Tensor, Any], Any], method: str) -> None:
        self.derivative, self.method = derivative, method
        self.finite: Tensor | bool = True  # all that was found since the last step began

    def __call__(self, t: Tensor, state: Any) -> Any:
        found = self.derivative(t, state)
        for part in _parts(found):
            self.finite = part.isfinite().all() & self.finite
        return found

    def callback_step(self, t: Tensor, state: Any, dt: Tensor) -> None:
        """Check the state and the step; torchdiffeq calls this before each step.

        Raises:
            FloatingPointError: The state is NaN or infinite, or the step, after NaN or otherwise, too small to change
                t.
        """
        whole = all(part.isfinite().all() for part in _parts(state))
        if t + dt != t and whole:
            self.finite = True
        elif self.finite and whole:
            raise FloatingPointError(
                f"{self.method} finds no step small enough at t = {float(t):.3g} (underflow in dt): the network's "
                "output changes too fast there, or sample.sampler.rtol and atol are too small"
            )
        else:
            raise FloatingPointError(
                f"{self.method} cannot go on: the network gives NaN or infinite values near t = {float(t):.3g}"
            )


def _parts(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def over_sigma(w: Tensor, k: Coefficients) -> Tensor:
    """Compute w / sigma, (B, 1, 1, 1); and 0 where w is 0, as the published code does at data, where sigma vanishes."""
    return torch.where(w == 0, 0.0, w / k.sigma)


# The diffusion coefficient w(t) over sigma, with `diffusion_norm` c: w score is -(w / sigma) noise, finite at data,
# too, for all but constant and, unless c is 1, decreasing.
DIFFUSION_FORMS = {
    "constant": lambda t, k, c: over_sigma(c * torch.ones_like(t), k),
    "sbdm": lambda t, k, c: c * k.wronskian / k.alpha,  # w = c g
    "sigma": lambda t, k, c: c * torch.ones_like(t),
    "linear": lambda t, k, c: over_sigma(c * (1 - t), k),
    "decreasing": lambda t, k, c: over_sigma((c * torch.cos(math.pi * t) + 1).square() / 4, k),
    "increasing-decreasing": lambda t, k, c: over_sigma(c * torch.sin(math.pi * (1 - t)).square(), k),
}

LAST_STEPS = ("none", "mean", "tweedie", "euler")
SDE_METHODS = ("euler", "heun")


class SDE:
    """dx = (velocity + w score) dt + sqrt(2 w) dW, then one last step without noise.

    Args:
        transport: The process.
        method: `euler` (Euler-Maruyama) or `heun`.
        num_steps: Points of time; num_steps - 1 steps, and the last one.
        time_shift: Above 1, more of the points lie near noise.
        diffusion: Form of w(t), name in `DIFFUSION_FORMS`: constant, sbdm, sigma, linear, decreasing or
            increasing-decreasing.
        diffusion_norm: Its factor c.
        last_step: `none`; `mean`, x + drift h; `tweedie`, x / alpha + sigma^2 / alpha score; `euler`, x + velocity h.
        last_step_size: Its length h; the SDE stops at 1 - h.

    Attributes:
        interval: (t0, t1). Without a last step t1 is 1, or .999 where the network or the drift is not defined at data.

    Raises:
        ValueError: An unknown name, or a size out of range.
    """

    def __init__(
        self,
        transport: "Transport",
        *,
        method: str = "euler",
        num_steps: int = 250,
        time_shift: float = 1.0,
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
        self.time_shift = check_time_shift(time_shift)
        self.form = lookup(DIFFUSION_FORMS, diffusion, "sample.sampler.diffusion")
        self.norm = diffusion_norm
        self.heun = method == "heun"
        self.last_step = last_step
        self.last_step_size = 0.0 if last_step == "none" else last_step_size
        # The last step of Heun's method ends in a drift at data, which is infinite if w does not vanish there. On the
        # linear path the published code divides 0 by 0 even then; on gvp the rounding of cos(pi/2) saves it from that.
        w_at_data = {"constant": diffusion_norm, "decreasing": (1 - diffusion_norm) ** 2 / 4}.get(diffusion, 0.0)
        self.interval = transport.sde_interval(
            self.last_step_size,
            diverges_at_noise=diffusion == "sbdm" and transport.path.pure_noise_at_start,
            diverges_at_data=self.heun and (w_at_data > 0 or transport.path.sigma_rounds_to_zero),
        )
        if self.interval[0] >= self.interval[1]:
            raise ValueError(
                f"sample.sampler.last_step_size is {last_step_size}, which leaves nothing before it: the other steps "
                f"start at t = {self.interval[0]:g}."
            )

    @property
    def steps_taken(self) -> int:
        """Steps from one point to the next, and the last one."""
        return self.num_steps - (self.last_step == "none")

    def __call__(self, predict: Predict, noise: Tensor, generator: Generator = None) -> Tensor:
        """Turn noise (B, C, H, W) into samples (B, C, H, W)."""
        points = time_points(self.interval, self.num_steps, self.time_shift, noise)
        x = noise
        for t, after in itertools.pairwise(points):
            dt = after - t
            jump = (2 * self.w(x, t) * dt).sqrt() * normal_like(x, generator)
            if self.heun:
                x = x + jump
                k1 = self.drift(predict, x, t)
                k2 = self.drift(predict, x + k1 * dt, after)
                x = x + (k1 + k2) / 2 * dt
            else:
                x = x + self.drift(predict, x, t) * dt + jump
        return self._finish(predict, x, points[-1])

    def w(self, x: Tensor, t: Tensor) -> Tensor:
        """Give the diffusion coefficient at t (), (1, 1, 1, 1)."""
        k = self._at(x, t)
        return self.form(t, k, self.norm) * k.sigma

    def drift(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        """Compute velocity + w score at x (B, C, H, W) and t (): (B, C, H, W)."""
        velocity, noise = self._velocity_and_noise(predict, x, t)
        return velocity - self.form(t, self._at(x, t), self.norm) * noise

    def _finish(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        if self.last_step == "mean":
            return x + self.drift(predict, x, t) * self.last_step_size
        if self.last_step == "none":
            return x
        velocity, noise = self._velocity_and_noise(predict, x, t)
        if self.last_step == "euler":
            return x + velocity * self.last_step_size
        k = self._at(x, t)
        return (x - k.sigma * noise) / k.alpha  # tweedie

    def _velocity_and_noise(self, predict: Predict, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        times = t.expand(len(x))
        output = predict(x, times)
        return self.transport.velocity(output, x, times), self.transport.noise(output, x, times)

    def _at(self, x: Tensor, t: Tensor) -> Coefficients:
        return self.transport.path.at(t.reshape(1), like=x)


SAMPLERS = {"ode": ODE, "sde": SDE}
