"""Flow against derivatives, scalar loops, hand-written chains, and Gaussian data, whose answers are exact."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchdiffeq
from torchdiffeq._impl.odeint import SOLVERS  # it has no public list

from sit_vca import DIFFUSION_FORMS, LAST_STEPS, ODE, PATHS, PREDICTIONS, SAMPLERS, SDE, WEIGHTS, Transport
from sit_vca.sampler import ADAPTIVE, BATCHED, EVEN, ODE_METHODS, SDE_METHODS, time_points
from vca import create

FLOAT = torch.float64


def sampler_of(process, spec=None):
    """The sampler that `spec` names, a word or options; without a name the published one."""
    spec = spec if isinstance(spec, str) else {"name": "sde", **(spec or {})}
    return create(SAMPLERS, spec, "sample.sampler", process)


def coefficients(path, t):
    """alpha, sigma, their derivatives, and g, from their definitions; t a float64 tensor."""
    if path == "linear":
        alpha, sigma, d_alpha, d_sigma = t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    elif path == "gvp":
        alpha, sigma = torch.sin(math.pi * t / 2), torch.cos(math.pi * t / 2)
        d_alpha, d_sigma = math.pi / 2 * sigma, -math.pi / 2 * alpha
    elif path != "vp":  # one that was added: its own alpha and sigma, and their derivatives by autograd
        leaf = t.detach().reshape(-1).requires_grad_()
        k = PATHS[path]().at(leaf, like=leaf)
        values = [
            k.alpha,
            k.sigma,
            *(torch.autograd.grad(z.sum(), leaf, retain_graph=True)[0] for z in (k.alpha, k.sigma)),
        ]
        alpha, sigma, d_alpha, d_sigma = (value.detach().reshape(t.shape) for value in values)
    else:
        alpha = torch.exp(-((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.1 / 2)
        sigma = (1 - alpha**2).sqrt()
        beta = 0.1 + (1 - t) * 19.9
        return alpha, sigma, alpha * beta / 2, -(alpha**2) * beta / 2 / sigma, beta / 2
    return alpha, sigma, d_alpha, d_sigma, d_alpha / alpha * sigma**2 - sigma * d_sigma


MEAN, STD = 0.7, 0.5


def marginal(path, t, mean=MEAN, std=STD):
    """Mean and variance of x_t for data N(mean, std^2); t a number."""
    alpha, sigma, *_ = coefficients(path, torch.tensor(t, dtype=FLOAT))
    return alpha * mean, alpha**2 * std**2 + sigma**2


def gaussian_network(path, prediction, mean=MEAN, std=STD):
    """What the best network predicts for data N(mean, std^2): the conditional expectation given x_t."""

    def predict(x_t, t):
        t = t.to(FLOAT).clamp(max=1 - 1e-5) if path == "vp" else t.to(FLOAT)  # sigma' is infinite at t = 1
        alpha, sigma, d_alpha, d_sigma, _ = (c.view(-1, *[1] * (x_t.ndim - 1)) for c in coefficients(path, t))
        standard = (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x, noise = mean + alpha * std**2 * standard, sigma * standard
        return {"velocity": d_alpha * x + d_sigma * noise, "noise": noise, "score": -standard}[prediction]

    return predict


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_of_a_path_agree_with_autograd(path):
    t = torch.linspace(0.01, 0.999, 100, dtype=FLOAT, requires_grad=True)
    c = Transport(path=path).path.at(t, like=t)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_coefficients_of_a_path_equal_their_formulas(path):
    t = torch.linspace(0.01, 0.999, 100, dtype=FLOAT)
    c = Transport(path=path).path.at(t, like=t)
    for value, expected in zip((c.alpha, c.sigma, c.d_alpha, c.d_sigma, c.g), coefficients(path, t), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_begins_with_noise_and_ends_with_data(path):
    ends = torch.tensor([0.0, 1.0], dtype=FLOAT)
    c = Transport(path=path).path.at(ends, like=torch.zeros(2, 1, 1, 1, dtype=FLOAT))
    assert c.alpha.shape == c.sigma.shape == (2, 1, 1, 1)
    alpha0 = math.exp(-19.9 / 4 - 0.05) if path == "vp" else 0.0
    at_data = 2e-3 if path == "vp" else 1e-12  # vp keeps 1e-5 from t = 1, where sigma is 1e-3
    assert c.alpha.flatten().tolist() == pytest.approx([alpha0, 1], abs=min(at_data, 1e-5))
    assert c.sigma.flatten().tolist() == pytest.approx([math.sqrt(1 - alpha0**2), 0], abs=at_data)
    if path != "linear":
        torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones(2, 1, 1, 1, dtype=FLOAT))


def test_options_of_vp_set_its_betas():
    t = torch.linspace(0, 0.99, 50, dtype=FLOAT)
    c = Transport(path={"name": "vp", "beta_min": 0.5, "beta_max": 3.0}).path.at(t, like=t)
    torch.testing.assert_close(c.g, (0.5 + (1 - t) * 2.5) / 2, rtol=1e-10, atol=0)
    torch.testing.assert_close(c.alpha.log(), -((1 - t) ** 2) * 2.5 / 4 - (1 - t) * 0.25, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_score_from_velocity_is_the_published_formula(path):
    transport = Transport(path=path)
    t = torch.linspace(0.05, 0.95, 7, dtype=FLOAT)
    u, x_t = torch.randn(2, 7, 2, 3, dtype=FLOAT)
    alpha, sigma, d_alpha, d_sigma, _ = (c[:, None, None] for c in coefficients(path, t))
    ratio = alpha / d_alpha
    expected = (ratio * u - x_t) / (sigma**2 - ratio * d_sigma * sigma)
    torch.testing.assert_close(transport.score(u, x_t, t), expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(transport.velocity(u, x_t, t), u)


@pytest.mark.parametrize("prediction", ["noise", "score"])
@pytest.mark.parametrize("path", PATHS)
def test_velocity_from_noise_and_score_is_the_published_formula(path, prediction):
    transport = Transport(path=path, prediction=prediction)
    t = torch.linspace(0.05, 0.95, 7, dtype=FLOAT)
    output, x_t = torch.randn(2, 7, 2, 3, dtype=FLOAT)
    alpha, sigma, d_alpha, _, g = (c[:, None, None] for c in coefficients(path, t))
    score = -output / sigma if prediction == "noise" else output
    torch.testing.assert_close(transport.score(output, x_t, t), score, rtol=1e-8, atol=1e-8)
    expected = d_alpha / alpha * x_t + g * score
    torch.testing.assert_close(transport.velocity(output, x_t, t), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_best_network_of_every_prediction_gives_the_same_velocity_and_score(path, prediction):
    transport = Transport(path=path, prediction=prediction)
    x_t, t = torch.randn(40, 2, 1, 1, dtype=FLOAT), torch.linspace(0.01, 0.99, 40, dtype=FLOAT)
    output = gaussian_network(path, prediction)(x_t, t)
    velocity, score = (gaussian_network(path, name)(x_t, t) for name in ("velocity", "score"))
    torch.testing.assert_close(transport.velocity(output, x_t, t), velocity, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(transport.score(output, x_t, t), score, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_clean_latent_is_the_end_of_the_path(path, prediction):
    """From what the network would say if it knew data and noise, everywhere but where alpha is below 1e-3."""
    transport = Transport(path=path, prediction=prediction)
    t = torch.linspace(0.0 if path == "vp" or prediction == "velocity" else 1e-3, 1 - 1e-5, 40, dtype=FLOAT)
    x, noise = torch.randn(2, 40, 2, 3, 1, dtype=FLOAT)
    alpha, sigma, d_alpha, d_sigma, _ = (c.view(-1, 1, 1, 1) for c in coefficients(path, t))
    output = {"velocity": d_alpha * x + d_sigma * noise, "noise": noise, "score": -noise / sigma}[prediction]
    torch.testing.assert_close(transport.clean(output, alpha * x + sigma * noise, t), x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_clean_latent_is_finite_at_both_ends_and_exact_at_data(path, prediction, dtype):
    transport, t = Transport(path=path, prediction=prediction), torch.tensor([0.0, 1.0], dtype=dtype)
    x, noise = torch.randn(2, 1, 3, 1, 1, dtype=dtype)
    x_t = torch.cat([noise, x])
    output = {"velocity": x - noise, "noise": noise, "score": -noise}[prediction].expand(2, -1, -1, -1)
    clean = transport.clean(output, x_t, t)
    assert clean.isfinite().all()
    if path != "vp":
        torch.testing.assert_close(clean[1:], x)
        if (path, prediction) != ("gvp", "velocity"):  # whose velocity at noise is another
            torch.testing.assert_close(clean[:1], x if prediction == "velocity" else torch.zeros_like(x))


def test_the_noise_level_falls_from_one_to_zero():
    assert Transport().noise_level(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1.0, 0.75, 0.0]
    assert Transport().noise_level(torch.tensor(0.5)).item() == 0.5


@pytest.mark.parametrize("path", PATHS)
def test_the_score_of_the_exact_network_is_the_gradient_of_the_log_density(path):
    mean, variance = marginal(path, 0.3)
    x_t = torch.randn(40, dtype=FLOAT, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.distributions.Normal(mean, variance.sqrt()).log_prob(x_t).sum(), x_t)
    t = torch.full((40,), 0.3, dtype=FLOAT)
    score = Transport(path=path).score(gaussian_network(path, "velocity")(x_t, t), x_t, t)
    torch.testing.assert_close(score.detach(), gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_the_exact_velocity_moves_the_mean_and_the_variance(path):
    """d mean/dt = E[u], d variance/dt = 2 Cov(u, x): the continuity equation for a Gaussian, by finite differences."""
    for t in (0.1, 0.5, 0.9):
        (m0, v0), (m, v), (m1, v1) = (marginal(path, t + shift) for shift in (-1e-4, 0, 1e-4))
        x_t = torch.stack([m - v.sqrt(), m + v.sqrt()])  # a two-point rule, exact for an affine velocity
        u = gaussian_network(path, "velocity")(x_t, torch.full((2,), t, dtype=FLOAT))
        torch.testing.assert_close(u.mean(), (m1 - m0) / 2e-4, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(2 * (u * (x_t - m)).mean(), (v1 - v0) / 2e-4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_loss_equals_a_scalar_loop(path, prediction, weight):
    x, noise, output = torch.randn(3, 4, 2, 1, 3, dtype=FLOAT)
    times, labels, seen = [0.01, 0.3, 0.7, 0.99], torch.tensor([3, 1, 4, 1]), []

    def model(x_t, t, y):
        seen.append((x_t, t, y))
        return output

    t = torch.tensor(times, dtype=FLOAT)
    loss = Transport(path=path, prediction=prediction, weight=weight).loss(model, x, labels, t=t, noise=noise)
    expected, states = [], []
    for i, time in enumerate(times):
        alpha, sigma, d_alpha, d_sigma, g = (float(c) for c in coefficients(path, torch.tensor(time, dtype=FLOAT)))
        w = {"none": 1.0, "velocity": (g / sigma) ** 2, "likelihood": g / sigma**2}[weight]
        total = 0.0
        for a, b, o in zip(*(part[i].flatten().tolist() for part in (x, noise, output)), strict=True):
            total += {
                "velocity": (o - d_alpha * a - d_sigma * b) ** 2,
                "noise": w * (o - b) ** 2,
                "score": w * (o * sigma + b) ** 2,
            }[prediction]
            states.append(alpha * a + sigma * b)
        expected.append(total / 6)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=FLOAT), rtol=1e-9, atol=1e-10)
    ((x_t, seen_t, seen_y),) = seen
    torch.testing.assert_close(x_t.flatten(), torch.tensor(states, dtype=FLOAT), rtol=1e-10, atol=1e-10)
    assert torch.equal(seen_t, t)
    assert torch.equal(seen_y, labels)


@pytest.mark.parametrize("prediction", ["noise", "score"])
@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_weight_makes_the_loss_that_of_the_velocity(path, prediction):
    x, noise, output = torch.randn(3, 5, 1, 2, 2, dtype=FLOAT)
    t = torch.linspace(0.1, 0.9, 5, dtype=FLOAT)
    weighted = Transport(path=path, prediction=prediction, weight="velocity")
    plain = Transport(path=path, prediction="velocity")
    loss = weighted.loss(lambda *_: output, x, t, t=t, noise=noise)
    implied = plain.loss(lambda x_t, t, y: weighted.velocity(output, x_t, t), x, t, t=t, noise=noise)
    torch.testing.assert_close(loss, implied, rtol=1e-8, atol=1e-8)


E3 = 1e-3


@pytest.mark.parametrize(
    ("path", "prediction", "train", "ode"),
    [
        ("linear", "velocity", (0, 1), (0, 1)),
        ("linear", "noise", (E3, 1 - E3), (E3, 1 - E3)),
        ("linear", "score", (E3, 1 - E3), (E3, 1 - E3)),
        ("gvp", "velocity", (0, 1), (0, 1)),
        ("gvp", "noise", (E3, 1 - E3), (E3, 1 - E3)),
        ("gvp", "score", (E3, 1 - E3), (E3, 1 - E3)),
        ("vp", "velocity", (0, 1 - 1e-5), (0, 1 - E3)),
        ("vp", "noise", (0, 1 - 1e-5), (0, 1 - E3)),
        ("vp", "score", (0, 1 - 1e-5), (0, 1 - E3)),
    ],
)
def test_intervals_of_training_and_of_the_ode(path, prediction, train, ode):
    transport = Transport(path=path, prediction=prediction)
    assert transport.train_interval == pytest.approx(train, abs=1e-12)
    assert transport.ode_interval == pytest.approx(ode, abs=1e-12)


def finite_at_data(path, form, c):
    """Whether the published drift of a velocity network is finite at t = 1: on gvp, where w vanishes there."""
    return path == "gvp" and form != "constant" and (form != "decreasing" or c == 1)


def sde_interval(path, prediction, method, form, last_step, h, c=1.0):
    """The published interval, but 1e-3 inside where the drift is needed and not finite: at noise, and at data."""
    if path == "vp":
        return 0, 1 - (E3 if last_step == "none" else h)
    if prediction == "velocity":
        end = E3 if method == "heun" and not finite_at_data(path, form, c) else 0
        return E3 if form == "sbdm" else 0, 1 - (end if last_step == "none" else h)
    return E3, 1 - (E3 if last_step == "none" else h)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_intervals_of_the_sde(path, prediction):
    transport = Transport(path=path, prediction=prediction)
    for method, form, last, c in itertools.product(SDE_METHODS, DIFFUSION_FORMS, LAST_STEPS, (1.0, 0.8)):
        options = {"method": method, "diffusion": form, "diffusion_norm": c, "last_step": last, "last_step_size": 0.1}
        expected = sde_interval(path, prediction, method, form, last, 0.1, c)
        assert SDE(transport, **options).interval == pytest.approx(expected, abs=1e-12), options


@pytest.mark.parametrize("path", ["linear", "vp"])
@pytest.mark.parametrize("time", ["uniform", "lognormal", {"name": "lognormal", "mean": 0.8, "std": 1.5}])
def test_times_of_training_follow_their_distribution(path, time):
    """Drawn in the loss or given as quantiles; (1 - t) / t of lognormal times is exp(mean + std z)."""
    count, seen = 20000, []

    def model(x_t, t, y):
        seen.append(t)
        return x_t

    transport = Transport(path=path, prediction="noise", time=time)
    transport.loss(model, torch.zeros(count, 1, 1, 1), torch.zeros(count))
    t0, t1 = transport.train_interval
    (share,) = ((t - t0) / (t1 - t0) for t in seen)
    assert share.min() >= 0
    assert share.max() <= 1
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    options = time if isinstance(time, dict) else {}
    log_ratio = options.get("mean", 0) + options.get("std", 1) * torch.special.ndtri(1 - quantiles)
    expected = quantiles if time == "uniform" else 1 / (1 + log_ratio.exp())
    torch.testing.assert_close(transport.times(quantiles), (t0 + (t1 - t0) * expected).float())
    below = (share[:, None] < expected).double()
    assert ((below.mean(0) - quantiles).abs() < 4 * (quantiles * (1 - quantiles) / count).sqrt()).all()


def test_a_width_of_times_has_to_be_positive():
    with pytest.raises(ValueError, match=r"process.time.std is 0; choose a positive number"):
        Transport(time={"name": "lognormal", "std": 0})


def transport_exactly(path, x, t0, t1, mean=MEAN, std=STD):
    """Where the probability-flow ODE for data N(mean, std^2) takes x from t0 to t1: Gaussians keep their quantiles."""
    (m0, v0), (m1, v1) = marginal(path, t0, mean, std), marginal(path, t1, mean, std)
    return m1 + (v1 / v0).sqrt() * (x - m0)


QUANTILES = torch.linspace(-2, 2, 9, dtype=FLOAT).view(9, 1, 1, 1)


ORDERS = {"euler": 1, "heun2": 2, "midpoint": 2, "heun3": 3, "rk4": 4, "explicit_adams": 4}


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
@pytest.mark.parametrize("path", PATHS)
def test_ode_methods_converge_with_their_order(path, method, order):
    """The midpoint rule errs by the third derivative of Var(x_t), which on the linear path is quadratic in t.

    Where an error is as small as there, what an initial error leaves behind shows, and the order can be higher.
    """
    order = 3 if (path, method) == ("linear", "midpoint") else order
    higher = 0.25 if method in ("euler", "heun2", "midpoint", "rk4") else 1.5
    transport = Transport(path=path)
    exact = transport_exactly(path, QUANTILES, *transport.ode_interval)
    errors = []
    for num_points in (65, 129, 257):
        out = ODE(transport, method=method, num_steps=num_points)(gaussian_network(path, "velocity"), QUANTILES)
        errors.append((out - exact).abs().max().item())
    assert errors[-1] < 0.01
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.25 < math.log2(coarse / fine) < order + higher


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_adaptive_methods_are_as_exact_as_asked(path, prediction, method):
    transport = Transport(path=path, prediction=prediction)
    exact = transport_exactly(path, QUANTILES, *transport.ode_interval)
    for rtol, atol in ((1e-3, 1e-6), (1e-7, 1e-9)):
        out = ODE(transport, method=method, rtol=rtol, atol=atol)(gaussian_network(path, prediction), QUANTILES)
        assert out.isfinite().all()
        assert (out - exact).abs().max() < 50 * rtol


def test_every_solver_of_torchdiffeq_is_offered():
    """But scipy's, which goes through NumPy at every step, and a second name of another."""
    assert set(ODE_METHODS.values()) == set(SOLVERS) - {"scipy_solver", "fixed_adams"}
    assert SOLVERS["fixed_adams"] is SOLVERS["implicit_adams"]
    adaptive = {name for name, solver in ODE_METHODS.items() if "Adaptive" in SOLVERS[solver].__mro__[1].__name__}
    assert adaptive == ADAPTIVE


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_every_method_of_the_ode_is_near_the_exact_transport(path, prediction):
    """In float32, and with points shifted where they may be."""
    transport, network = Transport(path=path, prediction=prediction), gaussian_network(path, prediction)
    exact = transport_exactly(path, QUANTILES, *transport.ode_interval).float()

    def predict(x, t):
        return network(x, t).float()

    for method in ODE_METHODS:
        # at the default tolerances fehlberg2 is wrong by up to 0.14
        tolerances = {"rtol": 1e-4, "atol": 1e-5} if method == "fehlberg2" else {}
        for shift in (1.0,) if method in ADAPTIVE | EVEN else (1.0, 2.0):
            ode = ODE(transport, method=method, num_steps=31, time_shift=shift, **tolerances)
            out = ode(predict, QUANTILES.float())
            assert out.dtype == torch.float32
            assert (out - exact).abs().max() < (0.1 if method == "euler" else 0.02), (method, shift)


def test_the_default_is_the_published_call_of_torchdiffeq():
    """50 points, of which dopri5 steps over most and interpolates: beyond t = 1, too."""
    network, transport = gaussian_network("linear", "velocity"), Transport()
    expected = torchdiffeq.odeint(
        lambda t, x: network(x, t.expand(len(x))),
        QUANTILES,
        torch.linspace(0, 1, 50, dtype=torch.float64),
        **{"method": "dopri5", "rtol": 1e-3, "atol": 1e-6},
    )[-1]
    assert torch.equal(sampler_of(transport, "ode")(network, QUANTILES), expected)


def spoilt(x, t):
    """NaN from t = 0.4 on."""
    return torch.where(t[:, None, None, None] > 0.4, torch.nan, x)


def blow_up(x, t):
    """x' = 1 + (5 x)^2, so x = tan(5 t + c) / 5: from x = 0 it ends at t = pi / 10."""
    return 1 + (5 * x).square()


@pytest.mark.parametrize("method", sorted(ADAPTIVE))
def test_nan_ends_a_solver_that_chooses_its_steps_and_is_named(method):
    calls = []
    with pytest.raises(
        FloatingPointError, match=rf"^{method} cannot go on: the network gives NaN or infinite values near"
    ):
        ODE(Transport(), method=method)(lambda x, t: (calls.append(t), spoilt(x, t))[1], torch.randn(3, 1, 2, 2))
    assert len(calls) < 100  # and soon
    with pytest.raises(FloatingPointError, match=f"^{method} cannot go on: the network gives NaN"):
        ODE(Transport(), method=method).bits_per_dim(lambda x, t: x * spoilt(x, 1 - t), torch.randn(3, 1, 2, 2))


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
def test_a_solver_that_finds_no_step_says_where(method):
    zero = torch.zeros(2, 1, 2, 2, dtype=FLOAT)
    with pytest.raises(
        FloatingPointError, match=f"^{method} finds no step small enough at .*rtol and atol are too small"
    ) as said:
        ODE(Transport(), method=method)(blow_up, zero)
    found = float(str(said.value).partition("t = ")[2].partition(" ")[0])
    assert abs(found - math.pi / 10) < 1e-3  # as many digits as it says


def test_without_assertions_they_end_too():
    """torchdiffeq's own check is an assertion, which `python -O` leaves out."""
    program = """if True:
        import sys, torch
        sys.path[:0] = [".", "tests"]
        from test_flow import ODE, Transport, blow_up, spoilt
        for predict in (spoilt, blow_up):
            try:
                ODE(Transport())(predict, torch.zeros(2, 1, 2, 2))
            except FloatingPointError as error:
                print(error)
    """
    command = [sys.executable, "-O", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert [line[:17] for line in done.stdout.splitlines()] == ["dopri5 cannot go ", "dopri5 finds no s"], done.stderr


@pytest.mark.parametrize("method", sorted({*ODE_METHODS} - ADAPTIVE))
def test_nan_goes_through_the_other_methods_to_those_samples_that_have_it(method):
    x = torch.randn(3, 1, 2, 2)
    x[1] = torch.nan
    out = ODE(Transport(), method=method, num_steps=6)(lambda x, t: -x, x)
    finite = out.isfinite().flatten(1).all(1).tolist()
    assert finite == [True, False, True]


@pytest.mark.parametrize("method", ODE_METHODS)
def test_only_the_methods_that_look_at_the_whole_batch_depend_on_it(method):
    """Bit for bit: the first sample beside others of another size, in a batch of the same shape."""
    ode = ODE(Transport(), method=method, num_steps=12)
    first, small, large = torch.randn(3, 1, 2, 2)
    out = [
        ode(lambda x, t: torch.sin(4 * x), torch.stack([first, other]))[0] for other in (0.01 * small, 1 + large.abs())
    ]
    assert torch.equal(*out) == (method not in BATCHED)


@pytest.mark.parametrize(("method", "calls_per_step"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_fixed_step_methods_take_one_step_less_than_points(method, calls_per_step):
    times = []

    def predict(x, t):
        times.append(t)
        return -x

    ODE(Transport(), method=method, num_steps=11)(predict, torch.ones(2, 1, 1, 1))
    assert len(times) == 10 * calls_per_step
    if method == "euler":
        torch.testing.assert_close(torch.stack(times), torch.linspace(0, 1, 11)[:-1, None].expand(10, 2))


def slow_points(t0, t1, num_points, shift):
    """Even points of which the share of noise left, n, becomes shift n / (1 + (shift - 1) n)."""
    shares = [1 - i / (num_points - 1) for i in range(num_points)]
    return [t1 - (t1 - t0) * shift * n / (1 + (shift - 1) * n) for n in shares]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (1e-3, 1 - 1e-3), (0.0, 0.96)])
@pytest.mark.parametrize("shift", [1.0, 0.1, 0.7, 1.5, 3.0, 50.0])
def test_shifted_times_keep_the_ends_and_lie_nearer_to_noise(interval, shift):
    for dtype in (torch.float32, FLOAT):
        even = torch.linspace(*interval, 50, dtype=dtype)
        points = time_points(interval, 50, shift, like=torch.zeros(1, dtype=dtype))
        expected = torch.tensor(slow_points(*interval, 50, shift), dtype=dtype)
        torch.testing.assert_close(points, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(points[[0, -1]], even[[0, -1]])
        assert (points.diff() > 0).all()
        assert (torch.sign(even - points)[1:-1] == math.copysign(shift != 1, shift - 1)).all()
    assert shift != 1 or torch.equal(points, even)


def test_shifts_undo_each_other():
    like = torch.zeros(1, dtype=FLOAT)
    points = time_points((0.0, 1.0), 33, 4.0, like)
    left = 1 - points
    torch.testing.assert_close(1 - left / 4 / (1 + (1 / 4 - 1) * left), time_points((0.0, 1.0), 33, 1.0, like))


def form_of(name, t, c, g, sigma):
    """The diffusion coefficient w at t (a float), from the specification."""
    return {
        "constant": c,
        "sbdm": c * g,
        "sigma": c * sigma,
        "linear": c * (1 - t),
        "decreasing": (c * math.cos(math.pi * t) + 1) ** 2 / 4,
        "increasing-decreasing": c * math.sin(math.pi * t) ** 2,
    }[name]


def slow_last_step(path, predict, x, t, form, c, last_step, h):
    """The last step from t (a float), with `predict` giving velocity and score."""
    alpha, sigma, _, _, g = (float(k) for k in coefficients(path, torch.tensor(t, dtype=FLOAT)))
    u, score = predict(x, t)
    return {
        "none": x,
        "mean": x + (u + form_of(form, t, c, g, sigma) * score) * h,
        "tweedie": x / alpha + sigma**2 / alpha * score,
        "euler": x + u * h,
    }[last_step]


def published_drift(path, prediction, output, x, t, form, c):
    """(u, score, w, u + w score) by the published formulas, for the network's output at x and t (a float64 tensor)."""
    alpha, sigma, d_alpha, d_sigma, g = coefficients(path, t)
    ratio = alpha / d_alpha
    u, score = {
        "velocity": lambda: (output, (ratio * output - x) / (sigma**2 - ratio * d_sigma * sigma)),
        "noise": lambda: (d_alpha / alpha * x - g * output / sigma, -output / sigma),
        "score": lambda: (d_alpha / alpha * x + g * output, output),
    }[prediction]()
    w = form_of(form, t.item(), c, g, sigma)
    return u, score, w, u + w * score


@pytest.mark.parametrize("c", [1.0, 0.8])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_sde_equals_the_formulas_at_every_step(path, prediction, c):
    """Every method, form and last step with the same noise; the network is an arbitrary smooth function."""
    h, num_points, shift = 0.1, 6, {"linear": 1.0, "gvp": 3.0, "vp": 0.5}[path]
    transport, noise = Transport(path=path, prediction=prediction), torch.randn(3, 1, 2, 1, dtype=FLOAT)

    def network(x, t):
        return torch.sin(2 * x + t.view(-1, 1, 1, 1))

    def drift(x, t, form):
        t = torch.tensor(t, dtype=FLOAT)
        return published_drift(path, prediction, torch.sin(2 * x + t), x, t, form, c)

    for method, form, last_step in itertools.product(SDE_METHODS, DIFFUSION_FORMS, LAST_STEPS):
        t0, t1 = sde_interval(path, prediction, method, form, last_step, h, c)
        x, generator = noise, torch.Generator().manual_seed(5)
        for t, after in itertools.pairwise(slow_points(t0, t1, num_points, shift)):
            z, (*_, w, k1) = torch.randn(x.shape, generator=generator, dtype=FLOAT), drift(x, t, form)
            jump = math.sqrt(2 * w * (after - t)) * z
            if method == "euler":
                x = x + k1 * (after - t) + jump
            else:
                *_, k1 = drift(x + jump, t, form)
                *_, k2 = drift(x + jump + (after - t) * k1, after, form)
                x = x + jump + (after - t) * (k1 + k2) / 2
        if last_step != "none":
            x = slow_last_step(path, lambda x, t: drift(x, t, "sigma")[:2], x, t1, form, c, last_step, h)

        options = {
            "method": method,
            "num_steps": num_points,
            "time_shift": shift,
            "diffusion": form,
            "diffusion_norm": c,
        }
        sde = SDE(transport, **options, last_step=last_step, last_step_size=h)
        out = sde(network, noise, torch.Generator().manual_seed(5))
        torch.testing.assert_close(
            out, x, rtol=1e-7, atol=1e-7, msg=lambda text, o=(options, last_step): f"{o}: {text}"
        )


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_heun_goes_on_to_data_where_the_published_drift_is_finite(path, form):
    """Of a velocity network without a last step. On gvp alpha' = 0 and sigma' = -pi/2 at data, so its noise is 2/pi u."""
    x, u, t = *torch.randn(2, 50, 1, 1, 1, dtype=FLOAT), torch.ones((), dtype=FLOAT)
    for c in (1.0, 0.8):
        *_, published = published_drift(path, "velocity", u, x, t, form, c)
        finite = published.isfinite().all() and published.abs().max() < 100  # not sigma = 6e-17 in a denominator
        sde = SDE(Transport(path=path), method="heun", diffusion=form, diffusion_norm=c, last_step="none")
        assert finite == (sde.interval[1] == 1) == finite_at_data(path, form, c)
        if finite:
            expected = u * (1 + {"sigma": 2 / math.pi, "sbdm": 1}.get(form, 0) * c)
            torch.testing.assert_close(published, expected, rtol=1e-12, atol=1e-12)
            for dtype in (torch.float32, FLOAT):
                found = sde.drift(lambda x, t: u.to(x), x.to(dtype), t.to(dtype))
                torch.testing.assert_close(found, expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def moments_error(monkeypatch, path, prediction, num_points, **options):
    """How far mean and deviation of the samples are from those of the data, in deviations. Nothing is drawn.

    For Gaussian data a sample is affine in the numbers drawn, so a batch in which each number is 1 once and 0 otherwise
    shows its mean and its variance. Exact is the marginal at the end of the interval, put through the exact last step.
    """
    sde = SDE(Transport(path=path, prediction=prediction), num_steps=num_points, **options)
    numbers = iter(torch.eye(num_points + 1, num_points, dtype=FLOAT).T.reshape(num_points, -1, 1, 1, 1))
    monkeypatch.setattr("sit_vca.sampler.normal_like", lambda *_: next(numbers))
    out = sde(gaussian_network(path, prediction), next(numbers)).flatten()
    assert next(numbers, None) is None

    def exact(x, t):
        times = torch.full((len(x),), t, dtype=FLOAT)
        return (gaussian_network(path, name)(x, times) for name in ("velocity", "score"))

    form, last_step = options.get("diffusion", "sigma"), options.get("last_step", "mean")
    mean, variance = marginal(path, sde.interval[1])
    points = torch.stack([mean, mean + variance.sqrt()])
    if last_step != "none":
        points = slow_last_step(path, exact, points, sde.interval[1], form, 1.0, last_step, 0.04)
    mean, std = points[0], points[1] - points[0]
    return max(abs(out[-1] - mean) / std, abs((out[:-1] - out[-1]).square().sum().sqrt() / std - 1)).item()


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_sde_samples_have_the_mean_and_variance_of_the_data(monkeypatch, path, prediction, form):
    """To first order in the step: of all combinations, the worst is 2.7 / num_points, at any number of points."""
    for method in SDE_METHODS:
        assert moments_error(monkeypatch, path, prediction, 24, method=method, diffusion=form) < 3 / 24, method


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_every_last_step_keeps_the_mean_and_variance(monkeypatch, form, last_step):
    for method in SDE_METHODS:
        options = {"method": method, "diffusion": form, "last_step": last_step}
        assert moments_error(monkeypatch, "linear", "velocity", 24, **options) < 3 / 24, method


@pytest.mark.parametrize("time_shift", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("method", SDE_METHODS)
def test_sde_methods_converge_with_order_one(monkeypatch, method, time_shift):
    options = {"method": method, "diffusion": "constant", "time_shift": time_shift}
    errors = [moments_error(monkeypatch, "gvp", "velocity", n, **options) for n in (21, 41, 81)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < coarse / fine < 2.4


@pytest.mark.parametrize("path", PATHS)
def test_sde_with_the_default_options_has_the_mean_and_variance_of_the_data(monkeypatch, path):
    assert moments_error(monkeypatch, path, "velocity", 250) < 3 / 250


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_every_sde_is_finite_from_end_to_end(path, prediction):
    network, noise = gaussian_network(path, prediction), torch.randn(2, 1, 1, 1)
    for method, form, last in itertools.product(SDE_METHODS, DIFFUSION_FORMS, LAST_STEPS):
        for shift in (1.0, 4.0):
            options = {"method": method, "diffusion": form, "last_step": last, "time_shift": shift}
            sde = SDE(Transport(path=path, prediction=prediction), num_steps=3, **options)
            out = sde(lambda x, t: network(x, t).float(), noise, torch.Generator().manual_seed(0))
            assert out.dtype == torch.float32
            assert out.isfinite().all(), options


@pytest.mark.parametrize("path", PATHS)
def test_without_noise_the_sde_is_the_ode(path):
    transport, noise = Transport(path=path), torch.randn(4, 1, 2, 2, dtype=FLOAT)
    network = gaussian_network(path, "velocity")
    sde = SDE(transport, num_steps=20, diffusion_norm=0.0, last_step="none")
    torch.testing.assert_close(sde(network, noise), ODE(transport, method="euler", num_steps=20)(network, noise))


@pytest.mark.parametrize("path", PATHS)
def test_tweedie_returns_the_expected_data(path):
    network, calls = gaussian_network(path, "velocity"), []

    def predict(x, t):
        calls.append((x, t))
        return network(x, t)

    sde = SDE(Transport(path=path), num_steps=5, last_step="tweedie", last_step_size=0.3)
    out = sde(predict, QUANTILES)
    x_t, t = calls[-1]
    assert t.tolist() == pytest.approx([0.7] * 9)
    alpha = coefficients(path, torch.tensor(0.7, dtype=FLOAT))[0]
    mean, variance = marginal(path, 0.7)
    torch.testing.assert_close(out, MEAN + alpha * STD**2 / variance * (x_t - mean), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", SDE_METHODS)
def test_a_sample_of_the_sde_does_not_depend_on_its_batch(method):
    sde, network = SDE(Transport(), method=method, num_steps=8), gaussian_network("linear", "velocity")
    noise = torch.randn(3, 2, 2, 2)

    def generators(indices):
        return [torch.Generator().manual_seed(100 + i) for i in indices]

    together = sde(network, noise, generators([0, 1, 2]))
    for i in range(3):
        torch.testing.assert_close(sde(network, noise[i : i + 1], generators([i]))[0], together[i])
    beside = sde(network, torch.cat([9 * noise[1:], noise[:1]]), generators([8, 9, 0]))
    assert torch.equal(beside[2], together[0])  # in a batch of the same shape, bit for bit
    assert not torch.allclose(sde(network, noise, generators([3, 4, 5])), together)


MEANS = torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=FLOAT).view(1, 2, 2)
STDS = torch.tensor([0.2, 0.7, 1.0, 1.8], dtype=FLOAT).view(1, 2, 2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_bits_per_dim_are_exact_for_a_diagonal_gaussian(path, prediction):
    """The Jacobian is diagonal, so Hutchinson's estimate has no variance; the flow between the ends is known."""
    transport = Transport(path=path, prediction=prediction)
    x = MEANS + STDS * torch.randn(5, 1, 2, 2, dtype=FLOAT)
    network = gaussian_network(path, prediction, MEANS, STDS)
    bits = ODE(transport, rtol=1e-9, atol=1e-10).bits_per_dim(network, x)

    t0, t1 = transport.ode_interval
    noise = transport_exactly(path, x, t1, t0, MEANS, STDS)
    scale = (marginal(path, t0, MEANS, STDS)[1] / marginal(path, t1, MEANS, STDS)[1]).sqrt()
    log_density = torch.distributions.Normal(0.0, 1.0).log_prob(noise) + scale.log()
    expected = -log_density.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(bits, expected, rtol=0, atol=1e-5)

    log_data = torch.distributions.Normal(MEANS, STDS).log_prob(x)  # and so the density of the data itself
    ends = 1e-5 if (t0, t1) == (0, 1) else 0.05  # what cutting the interval costs
    torch.testing.assert_close(bits, -log_data.flatten(1).mean(1) / math.log(2), rtol=0, atol=ends)


def test_bits_per_dim_estimate_a_full_jacobian_without_bias():
    """A linear flow with a full matrix A: its divergence is the trace of A, the mean of e . A e."""
    matrix = torch.tensor([[0.4, 1.0, -0.5], [0.3, -0.2, 0.8], [0.9, 0.1, 0.5]], dtype=FLOAT)

    def predict(x, t):
        return (x.flatten(1) @ matrix.T).view_as(x)

    x = torch.zeros(4000, 3, 1, 1, dtype=FLOAT)  # the origin stays where it is
    bits = ODE(Transport(), rtol=1e-6, atol=1e-8).bits_per_dim(predict, x, torch.Generator().manual_seed(0))
    expected = (1.5 * math.log(2 * math.pi) + matrix.trace().item()) / (3 * math.log(2))
    assert bits.std() > 0.1
    assert abs(bits.mean().item() - expected) < 4 * bits.std().item() / math.sqrt(4000)


@pytest.mark.parametrize("method", ["rk4", "explicit_adams", "dopri5"])
def test_bits_per_dim_take_a_generator_for_each_sample(method):
    """A full matrix, so that the vectors that are drawn matter."""
    matrix = torch.tensor([[0.4, 1.0, -0.5], [0.3, -0.2, 0.8], [0.9, 0.1, 0.5]], dtype=FLOAT)

    def predict(x, t):
        return (x.flatten(1)[:, None] * matrix).sum(2).view_as(x)

    def bits(x, seeds):
        ode = ODE(Transport(), method=method, num_steps=10)
        return ode.bits_per_dim(predict, x, [torch.Generator().manual_seed(seed) for seed in seeds])

    x = torch.randn(3, 3, 1, 1, dtype=FLOAT)
    together = bits(x, [1, 2, 3])
    for i in range(3):
        torch.testing.assert_close(bits(x[i : i + 1], [i + 1])[0], together[i], rtol=1e-3, atol=1e-4)
    assert torch.equal(bits(x, [1, 5, 6])[0], together[0]) == (method not in BATCHED)
    assert (bits(x, [4, 5, 6]) - together).abs().min() > 0.01


def test_a_zero_that_is_drawn_leaves_no_dimension_out_of_the_divergence(monkeypatch):
    x, network = torch.randn(4, 1, 2, 2, dtype=FLOAT), gaussian_network("linear", "velocity")
    expected = ODE(Transport()).bits_per_dim(network, x)
    monkeypatch.setattr("sit_vca.sampler.normal_like", lambda x, _: torch.zeros(x.shape, dtype=FLOAT))
    torch.testing.assert_close(ODE(Transport()).bits_per_dim(network, x), expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_keep_the_dtype_and_shape_of_the_noise(name):
    noise = torch.randn(2, 3, 2, 4)
    out = sampler_of(Transport(), {"name": name, "num_steps": 5})(lambda x, t: -x, noise)
    assert out.dtype == torch.float32
    assert out.shape == noise.shape


def test_sampling_without_a_sampler_takes_the_published_one():
    transport, noise, network = Transport(), torch.randn(2, 1, 2, 2), gaussian_network("linear", "velocity")
    for spec in (None, {}):
        assert isinstance(sampler_of(transport, spec), SDE)
        assert sampler_of(transport, spec).num_steps == 250
    assert (sampler_of(transport, {"num_steps": 7}).num_steps, type(sampler_of(transport, {"num_steps": 7}))) == (
        7,
        SDE,
    )
    for spec in ("ode", {"num_steps": 5}, {"name": "ode", "method": "rk4", "num_steps": 4}):
        out = sampler_of(transport, spec)(network, noise, torch.Generator().manual_seed(0))
        assert torch.equal(out, sampler_of(transport, spec)(network, noise, torch.Generator().manual_seed(0)))
    calls = []
    sampler_of(transport)(lambda x, t: calls.append(t) or -x, noise)
    assert len(calls) == 250  # 249 steps and the last one


def test_default_sampler_settings_are_the_published_ones():
    ode, sde = sampler_of(Transport(), "ode"), sampler_of(Transport(), "sde")
    assert ode.time_shift == sde.time_shift == 1
    assert (ode.num_steps, ode.solver) == (50, {"method": "dopri5", "rtol": 1e-3, "atol": 1e-6})
    assert (sde.num_steps, sde.heun, sde.norm, sde.last_step, sde.last_step_size) == (250, False, 1.0, "mean", 0.04)
    assert sde.form is DIFFUSION_FORMS["sigma"]


def test_wrong_values_end_in_a_sentence():
    transport = Transport()

    def process(**options):
        return lambda: Transport(**options)

    def ode(**options):
        return lambda: sampler_of(transport, {"name": "ode", **options})

    def sde(**options):
        return lambda: sampler_of(transport, {"name": "sde", **options})

    expected = [
        (process(path="liner"), r"process.path.name is 'liner'; did you mean 'linear'\? choose one of \['gvp'"),
        (
            process(path={"name": "vp", "beta_mx": 1}),
            r"process.path 'vp' takes no 'beta_mx'; did you mean 'beta_max'\?",
        ),
        (process(path={"name": "linear", "beta_min": 1}), r"process.path 'linear' takes no 'beta_min'"),
        (process(path={"name": "vp", "beta_min": 3.0, "beta_max": 2.0}), r"0 < beta_min < beta_max; got 3.0 and 2.0"),
        (process(prediction="velocty"), r"process.prediction is 'velocty'; did you mean 'velocity'\?"),
        (process(weight="liklihood"), r"process.weight is 'liklihood'; did you mean 'likelihood'\?"),
        (process(time="unifrom"), r"process.time.name is 'unifrom'; did you mean 'uniform'\?"),
        (
            ode(method="eulr"),
            r"sample.sampler.method is 'eulr'; did you mean 'euler'\? choose one of \['adaptive_heun'",
        ),
        (ode(num_steps=1), r"num_steps is 1; it counts points of time, so at least 2"),
        (ode(last_step="mean"), r"sample.sampler 'ode' takes no 'last_step'; it takes \['atol', 'method'"),
        (ode(rtol=0.0), r"sample.sampler.rtol is 0.0; choose a positive number"),
        (ode(atol=-1.0), r"sample.sampler.atol is -1.0; choose a positive number"),
        (ode(time_shift=0.0), r"sample.sampler.time_shift is 0.0; choose a positive number, 1 for even steps"),
        (
            ode(time_shift=3.0),
            r"time_shift is 3.0, but dopri5 chooses its own steps; set sample.sampler.method to one of",
        ),
        (ode(method="explicit_adams", time_shift=3.0), r"time_shift is 3.0, but explicit_adams needs even steps"),
        (sde(time_shift=-2.0), r"sample.sampler.time_shift is -2.0; choose a positive number"),
        (sde(time_shift=math.inf), r"time_shift is inf; it must be a finite number"),
        (sde(num_steps=1), r"num_steps is 1; it counts points of time, so at least 2"),
        (sde(method="dopri5"), r"sample.sampler.method is 'dopri5'; choose one of \['euler', 'heun'\]"),
        (sde(diffusion="sigm"), r"sample.sampler.diffusion is 'sigm'; did you mean 'sigma'\?"),
        (sde(last_step="twedie"), r"sample.sampler.last_step is 'twedie'; did you mean 'tweedie'\?"),
        (sde(last_step_size=0.0), r"last_step_size is 0.0; choose a number between 0 and 1"),
        (sde(last_step_size=1.0), r"last_step_size is 1.0; choose a number between 0 and 1"),
        (sde(diffusion_norm=-1.0), r"diffusion_norm is -1.0; choose at least 0"),
        (lambda: sampler_of(transport, "oed"), r"sample.sampler.name is 'oed'; .*choose one of \['ode', 'sde'\]"),
    ]
    for call, sentence in expected:
        with pytest.raises(ValueError, match=sentence):
            call()


def test_a_last_step_longer_than_the_interval_gets_a_sentence():
    with pytest.raises(ValueError, match=r"last_step_size is 0\.9995, which leaves nothing before it"):
        sampler_of(Transport(prediction="noise"), {"name": "sde", "last_step_size": 0.9995})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ode", "num_steps": "50"}, "num_steps is '50'; it must be a whole number"),
        ({"name": "ode", "num_steps": 50.5}, "num_steps is 50.5; it must be a whole number"),
        ({"name": "sde", "num_steps": True}, "num_steps is True; it must be a whole number"),
        ({"name": "sde", "last_step_size": "x"}, "last_step_size is 'x'; it must be a number"),
        ({"name": ["ode"]}, "choose one of"),
    ],
)
def test_an_option_of_a_wrong_type_gets_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(Transport(), options)
