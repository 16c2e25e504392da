"""Diffusion against brute-force Bayes, scalar loops, hand-written chains, and Gaussian data with known answers."""

import itertools
import math

import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep

from dit_vca import BETAS, DDIM, DDPM, SAMPLERS, Diffusion, DPMSolver, UniPC, respace
from dit_vca.diffusion import discretised_log_likelihood, gaussian_kl
from dit_vca.sampler import SPACINGS, with_signal
from vca import create

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

T = 1000


def sampler_of(process, spec=None):
    """The sampler that `spec` names, a word or options; without a name the published one."""
    spec = spec if isinstance(spec, str) else {"name": "ddpm", **(spec or {})}
    return create(SAMPLERS, spec, "sample.sampler", process)


def slow_betas(name):
    """The betas as a list, from their definition."""
    if name == "linear":
        return [1e-4 + (0.02 - 1e-4) * t / (T - 1) for t in range(T)]
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    return [min(1 - f[t + 1] / f[t], 0.999) for t in range(T)]


def slow_abar(betas):
    abar, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        abar.append(product)
    return abar


@pytest.fixture(params=sorted(BETAS))
def process(request):
    return Diffusion(betas=request.param)


def abar_of(process):
    return torch.cumprod(1 - process.betas, dim=0)


@pytest.mark.parametrize("name", BETAS)
def test_betas_and_alphas_equal_their_definition(name):
    process = Diffusion(betas=name)
    betas = slow_betas(name)
    assert process.betas.dtype == torch.float64
    torch.testing.assert_close(process.betas, torch.tensor(betas, dtype=torch.float64), rtol=1e-12, atol=0)
    c = process.at(torch.arange(T), like=torch.zeros(T, 1, dtype=torch.float64))
    abar = torch.tensor(slow_abar(betas), dtype=torch.float64)[:, None]
    torch.testing.assert_close(c.sqrt_abar, abar.sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(c.sqrt_1m_abar, (1 - abar).sqrt(), rtol=1e-10, atol=0)


def test_linear_betas_of_other_lengths_add_the_same_noise():
    ends = [math.log(abar_of(Diffusion(num_timesteps=n))[-1]) for n in (500, 1000, 4000)]
    assert max(ends) - min(ends) < 0.15  # log abar_T is about -10
    betas = Diffusion(num_timesteps=4000).betas
    assert (betas[0].item(), betas[-1].item()) == pytest.approx((1e-4 / 4, 0.02 / 4))


def test_cosine_betas_give_the_squared_cosine():
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T)]
    abar = torch.tensor([f[t + 1] / f[0] for t in range(T - 1)], dtype=torch.float64)
    torch.testing.assert_close(abar_of(Diffusion(betas="cosine"))[:-1], abar, rtol=1e-9, atol=0)


@pytest.mark.parametrize("t", [1, 2, 50, 500, 998, 999])
def test_posterior_equals_bayes_by_brute_force(process, t):
    """q(x_{t-1} | x_t, x) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x): multiplied on a fine grid of x_{t-1}."""
    beta, (before, abar) = process.betas[t].item(), abar_of(process)[t - 1 : t + 1].tolist()
    x = 0.6
    x_t = math.sqrt(abar) * x - 1.3 * math.sqrt(1 - abar)
    centre, width = x_t / math.sqrt(1 - beta), math.sqrt(beta / (1 - beta))
    grid = torch.linspace(centre - 12 * width, centre + 12 * width, 40001, dtype=torch.float64)
    log_density = -((x_t - math.sqrt(1 - beta) * grid) ** 2) / (2 * beta)
    log_density = log_density - (grid - math.sqrt(before) * x) ** 2 / (2 * (1 - before))
    density = (log_density - log_density.max()).exp()
    mean = (density * grid).sum() / density.sum()
    variance = (density * (grid - mean) ** 2).sum() / density.sum()

    c = process.at(torch.tensor([t]), like=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close((c.from_x * x + c.from_x_t * x_t)[0], mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(c.log_posterior.exp()[0], variance, rtol=1e-7, atol=0)
    assert c.log_beta[0].item() == pytest.approx(math.log(beta), abs=1e-12)


def test_posterior_at_the_first_step_is_the_clean_latent_with_the_variance_of_the_second(process):
    c = process.at(torch.tensor([0, 1]), like=torch.zeros(2, dtype=torch.float64))
    assert (c.from_x[0].item(), c.from_x_t[0].item()) == pytest.approx((1, 0), abs=1e-12)
    assert c.log_posterior[0] == c.log_posterior[1]


def slow_losses(betas, x, noise, predicted, v, t):
    """Mean squared error and bound of one sample, element by element; all lists of floats."""
    abar = slow_abar(betas)
    before = abar[t - 1] if t > 0 else 1.0
    beta = betas[t]
    clipped = max(t, 1)
    posterior_variance = betas[clipped] * (1 - abar[clipped - 1]) / (1 - abar[clipped])
    mse = vb = 0.0
    for x_i, noise_i, predicted_i, v_i in zip(x, noise, predicted, v, strict=True):
        x_t = math.sqrt(abar[t]) * x_i + math.sqrt(1 - abar[t]) * noise_i
        mse += (noise_i - predicted_i) ** 2
        clean = (x_t - math.sqrt(1 - abar[t]) * predicted_i) / math.sqrt(abar[t])

        def posterior_mean(clean, x_t=x_t):
            weighted = math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * x_t
            return weighted / (1 - abar[t])

        f = (v_i + 1) / 2
        log_variance = f * math.log(beta) + (1 - f) * math.log(posterior_variance)
        mean = posterior_mean(clean)
        if t > 0:
            vb += 0.5 * (
                log_variance
                - math.log(posterior_variance)
                - 1
                + posterior_variance / math.exp(log_variance)
                + (posterior_mean(x_i) - mean) ** 2 / math.exp(log_variance)
            )
        else:

            def cdf(edge, mean=mean, log_variance=log_variance):
                z = (edge - mean) / math.exp(log_variance / 2)
                return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

            low = 0.0 if x_i < -0.999 else cdf(x_i - 1 / 255)
            high = 1.0 if x_i > 0.999 else cdf(x_i + 1 / 255)
            vb -= math.log(max(high - low, 1e-12))
    return mse / len(x), vb / len(x) / math.log(2)


@pytest.mark.parametrize("t", [0, 1, 2, 37, 500, 998, 999])
def test_hybrid_loss_equals_a_scalar_loop(process, t):
    name = next(name for name in BETAS if torch.equal(BETAS[name](T), process.betas))
    x = torch.randn(3, 2, 3, 2, dtype=torch.float64)
    x[0, 0, 0, 0], x[0, 0, 0, 1], x[1, 1, 1, 1], x[1, 0, 0, 0] = -1.0, 1.0, 0.9985, -0.9985
    noise = torch.randn_like(x)
    predicted = noise + torch.tensor([0.0, 0.3, 20.0], dtype=torch.float64).view(3, 1, 1, 1) * torch.randn_like(x)
    v = 1.5 * torch.randn_like(x)
    steps = torch.full((3,), t)
    output = torch.cat([predicted, v], dim=1)
    losses = process.losses(lambda x_t, t, y: output, x, torch.zeros(3), t=steps, noise=noise)
    expected = [
        slow_losses(slow_betas(name), *(part[i].flatten().tolist() for part in (x, noise, predicted, v)), t)
        for i in range(3)
    ]
    mse, vb = torch.tensor(expected, dtype=torch.float64).T
    torch.testing.assert_close(losses["mse"], mse, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses["vb"], vb, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses["loss"], mse + vb, rtol=1e-10, atol=1e-10)
    loss = process.loss(lambda x_t, t, y: output, x, torch.zeros(3), t=steps, noise=noise)
    torch.testing.assert_close(loss, losses["loss"], rtol=0, atol=0)


def test_the_network_is_given_the_noised_latent_the_step_and_the_label(process):
    x, noise = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64)
    t, y, abar, seen = torch.tensor([0, 3, 700, 999]), torch.tensor([1, 2, 3, 4]), abar_of(process), []

    def model(x_t, t, y):
        seen.append((x_t, t, y))
        return torch.zeros(4, 2, 2, 2, dtype=torch.float64)

    process.loss(model, x, y, t=t, noise=noise)
    (x_t, seen_t, seen_y) = seen[0]
    a = abar[t].view(4, 1, 1, 1)
    torch.testing.assert_close(x_t, a.sqrt() * x + (1 - a).sqrt() * noise, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen_t, t)
    assert torch.equal(seen_y, y)


def test_a_perfect_prediction_with_the_posterior_variance_costs_nothing(process):
    x, noise = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64)
    perfect = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    losses = process.losses(lambda *_: perfect, x, torch.zeros(4), t=torch.tensor([1, 10, 500, 999]), noise=noise)
    torch.testing.assert_close(losses["loss"], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_bound_trains_only_the_variance_and_the_mse_only_the_noise(process):
    x, noise = torch.randn(2, 5, 2, 3, 3, dtype=torch.float64)
    output = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0, 1, 20, 500, 999])
    gradients = {}
    for name, loss in process.losses(lambda *_: output, x, torch.zeros(5), t=t, noise=noise).items():
        (gradient,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
        gradients[name] = gradient.chunk(2, dim=1)
    assert not gradients["vb"][0].any()
    assert (gradients["vb"][1].abs().amax((1, 2, 3)) > 0).all()
    assert not gradients["mse"][1].any()
    torch.testing.assert_close(gradients["loss"][0], 2 * (output.chunk(2, dim=1)[0] - noise) / 18)
    torch.testing.assert_close(gradients["loss"][1], gradients["vb"][1])


def test_steps_are_drawn_uniformly_over_all_of_training():
    process, count, seen = Diffusion(betas="cosine", num_timesteps=5), 20000, []

    def model(x_t, t, y):
        seen.append(t)
        return torch.zeros(count, 2, 1, 1)

    process.loss(model, torch.zeros(count, 1, 1, 1), torch.zeros(count))
    share = torch.bincount(seen[0], minlength=5) / count
    assert share.shape == (5,)
    assert (share - 0.2).abs().max() < 4 * math.sqrt(0.2 * 0.8 / count)


@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.3), (0.98, 0.01), (-3.0, 0.05)])
def test_the_bins_of_the_likelihood_cover_the_line_once(mean, std):
    pixels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    args = torch.full_like(pixels, mean), torch.full_like(pixels, math.log(std))
    log_probability = discretised_log_likelihood(pixels, *args)
    assert log_probability.exp().sum().item() == pytest.approx(1, abs=1e-9)
    exact = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), std).cdf
    high = torch.where(pixels > 0.999, 1.0, exact(pixels + 1 / 255))
    low = torch.where(pixels < -0.999, 0.0, exact(pixels - 1 / 255))
    torch.testing.assert_close(log_probability.exp(), high - low, rtol=0, atol=1e-3)  # tanh for the normal CDF


def test_gaussian_kl_equals_the_integral():
    mean1, log_variance1, mean2, log_variance2 = torch.tensor([0.3, -1.0, 0.9, 0.4], dtype=torch.float64)
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    p = torch.distributions.Normal(mean1, (log_variance1 / 2).exp()).log_prob(grid)
    q = torch.distributions.Normal(mean2, (log_variance2 / 2).exp()).log_prob(grid)
    integral = torch.trapezoid(p.exp() * (p - q), grid)
    torch.testing.assert_close(gaussian_kl(mean1, log_variance1, mean2, log_variance2), integral, rtol=0, atol=1e-9)


def test_respacing_to_all_steps_changes_nothing(process):
    steps, betas = respace(process.betas, T)
    assert torch.equal(steps, torch.arange(T))
    torch.testing.assert_close(betas, process.betas, rtol=1e-9, atol=0)


def published_steps(num_timesteps, num_steps):
    """The published respacing: a place moves on by the stride, and is rounded to a step."""
    place, steps = 0.0, []
    for _ in range(num_steps):
        steps.append(round(place))
        place += (num_timesteps - 1) / (num_steps - 1)
    return steps


@pytest.mark.parametrize("num_timesteps", [100, 256, 1000])
def test_even_steps_are_the_published_ones_for_every_count(num_timesteps):
    betas = Diffusion(num_timesteps=num_timesteps).betas
    found = {count: respace(betas, count)[0] for count in range(2, num_timesteps + 1)}
    for count, steps in found.items():
        assert steps.tolist() == published_steps(num_timesteps, count)
        assert (steps[0], steps[-1]) == (0, num_timesteps - 1)
        assert (steps.diff() > 0).all()


def test_even_steps_are_not_the_rounded_products():
    """21 steps of 1000: the eleventh falls on 499.5. The sum of floats is just below it, the product is not."""
    steps, _ = respace(Diffusion().betas, 21)
    assert steps.tolist() == [
        *(0, 50, 100, 150, 200, 250, 300, 350, 400, 450),
        *(499, 549, 599, 649, 699, 749, 799, 849, 899, 949, 999),
    ]
    products = {count: [round(i * (999 / (count - 1))) for i in range(count)] for count in range(2, T + 1)}
    different = [count for count in products if respace(Diffusion().betas, count)[0].tolist() != products[count]]
    assert len(different) == 278
    assert not set(different) & {10, 25, 50, 100, 250, 500, 1000}


@pytest.mark.parametrize("num_timesteps", [2, 7, 100, 256, 1000])
def test_a_stride_is_the_smallest_that_gives_the_count(num_timesteps):
    betas = Diffusion(betas="cosine", num_timesteps=num_timesteps).betas
    strides = {}
    for stride in range(num_timesteps, 0, -1):
        strides[len(range(0, num_timesteps, stride))] = stride  # the smallest last
    for count in range(2, num_timesteps + 1):
        if count in strides:
            assert respace(betas, count, "stride")[0].tolist() == list(range(0, num_timesteps, strides[count]))
            continue
        below, above = (pick(c for c in strides if (c > count) == (pick is min)) for pick in (max, min))
        with pytest.raises(ValueError, match=f"num_steps is {count}, but no .* choose {below} or {above}, or"):
            respace(betas, count, "stride")


def test_fifty_steps_with_a_stride_are_every_twentieth():
    assert respace(Diffusion().betas, 50, "stride")[0].tolist() == list(range(0, 981, 20))
    with pytest.raises(
        ValueError, match="num_steps is 180, but no whole stride .* choose 167 or 200, or .*spacing even"
    ):
        DDIM(Diffusion(), num_steps=180, spacing="stride")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [2, 3, 7, 21, 25, 50, 250, 1000])
def test_respacing_keeps_the_cumulative_products(process, num_steps, spacing):
    steps, betas = respace(process.betas, num_steps, spacing)
    torch.testing.assert_close(torch.cumprod(1 - betas, dim=0), abar_of(process)[steps], rtol=1e-6, atol=0)


def first_step(process):
    """Where the solvers start: the last step at which alpha / sigma is above exp(-5.1)."""
    last = max(t for t, a in enumerate(slow_abar(process.betas.tolist())) if a / (1 - a) > math.exp(-10.2))
    assert last == {"linear": 999, "cosine": 995}["linear" if process.betas[0] > 9e-5 else "cosine"]
    return last


def test_only_cosine_betas_have_steps_without_signal(process):
    assert torch.equal(with_signal(process.betas), process.betas[: first_step(process) + 1])


def smooth_network(x, t):
    """An arbitrary smooth function in the place of a network, elementwise: (B, C, H, W), (B,) -> (B, 2C, H, W)."""
    s = (t / T).to(x).view(-1, 1, 1, 1)
    return torch.cat([0.9 * torch.sin(x + s) + 0.2 * x, torch.cos(2 * x - 3 * s)], dim=1)


def recorded(predict):
    calls = []

    def recording(x, t):
        calls.append((x, t))
        return predict(x, t)

    return recording, calls


def assert_same_chain(sampler, slow_steps, noise):
    """Every state of the chain, and every step that the network sees."""
    predict, calls = recorded(smooth_network)
    out = sampler(predict, noise, torch.Generator().manual_seed(1))
    expected = list(slow_steps)
    assert [t.tolist() for _, t in calls] == [[step] * len(noise) for step, _ in expected[:-1]]
    for (x, _), (_, slow) in zip([*calls, (out, None)], expected, strict=True):
        torch.testing.assert_close(x, slow, rtol=1e-6, atol=1e-6)


def slow_chain(process, kept, noise, generator, step):
    """(original step, x) from noise to sample, K + 1 pairs; `step(...)` is one transition of the kept steps."""
    abar = [slow_abar(process.betas.tolist())[t] for t in kept]
    x = noise
    for i in reversed(range(len(kept))):
        yield kept[i], x
        predicted, v = smooth_network(x, torch.full((len(x),), kept[i])).chunk(2, dim=1)
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype) if i > 0 else torch.zeros_like(x)
        x = step(x, predicted, v, z, abar, i)
    yield None, x


def slow_ddpm(x, predicted, v, z, abar, i):
    before = abar[i - 1] if i > 0 else 1.0
    beta = 1 - abar[i] / before
    clean = (x - math.sqrt(1 - abar[i]) * predicted) / math.sqrt(abar[i])
    mean = (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * x) / (1 - abar[i])
    if i == 0:
        return mean
    fraction = (v + 1) / 2
    log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(beta * (1 - before) / (1 - abar[i]))
    return mean + torch.exp(log_variance / 2) * z


KEPT = {  # options of the respaced samplers -> the steps that they keep
    **{(count, "even"): published_steps(T, count) for count in (2, 7, 21, 50, 250)},
    **{(count, "stride"): list(range(0, T, T // count)) for count in (2, 50, 250)},
}


@pytest.mark.parametrize("num_steps, spacing", KEPT)
def test_ddpm_equals_the_formulas_at_every_step(process, num_steps, spacing):
    noise = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    slow = slow_chain(process, KEPT[num_steps, spacing], noise, torch.Generator().manual_seed(1), slow_ddpm)
    assert_same_chain(DDPM(process, num_steps=num_steps, spacing=spacing), slow, noise)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps, spacing", KEPT)
def test_ddim_equals_the_formulas_at_every_step(process, num_steps, spacing, eta):
    def step(x, predicted, v, z, abar, i):
        before = abar[i - 1] if i > 0 else 1.0
        std = eta * math.sqrt((1 - before) / (1 - abar[i]) * (1 - abar[i] / before))
        clean = (x - math.sqrt(1 - abar[i]) * predicted) / math.sqrt(abar[i])
        return math.sqrt(before) * clean + math.sqrt(1 - before - std**2) * predicted + std * z

    noise = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    slow = slow_chain(process, KEPT[num_steps, spacing], noise, torch.Generator().manual_seed(1), step)
    assert_same_chain(DDIM(process, num_steps=num_steps, spacing=spacing, eta=eta), slow, noise)


@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_steps", [2, 5, 20, 61])
def test_dpm_solver_equals_the_formulas_at_every_step(process, num_steps, order, sde):
    """DPM-Solver++(2M): extrapolate the predicted clean latent linearly in l = log(alpha / sigma).

    With h the step of l, the ODE forgets sigma'/sigma = exp(-h) alpha'/alpha of x; the SDE its square over alpha'/alpha,
    and adds noise for the rest.
    """
    noise, abar = torch.randn(2, 3, 2, 2, dtype=torch.float64), slow_abar(process.betas.tolist())
    steps = [round(i * first_step(process) / num_steps) for i in range(num_steps, 0, -1)]
    generator = torch.Generator().manual_seed(1)

    def slow():
        x, previous, previous_h = noise, None, None
        for i, t in enumerate(steps):
            yield t, x
            alpha, sigma = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
            clean = (x - sigma * smooth_network(x, torch.full((2,), t))[:, :3]) / alpha
            if i == num_steps - 1:  # to zero noise, where the first-order step is the clean latent itself
                yield None, clean
                return
            next_alpha, next_sigma = math.sqrt(abar[steps[i + 1]]), math.sqrt(1 - abar[steps[i + 1]])
            h = math.log(next_alpha / next_sigma) - math.log(alpha / sigma)
            slope = 0 if previous is None or order == 1 else (clean - previous) / (2 * previous_h / h)
            rate = 2 * h if sde else h
            x = next_sigma / sigma * math.exp(h - rate) * x - next_alpha * math.expm1(-rate) * (clean + slope)
            if sde:
                x = x + next_sigma * math.sqrt(-math.expm1(-2 * h)) * torch.randn(x.shape, generator=generator)
            previous, previous_h = clean, h

    predict, calls = recorded(smooth_network)
    sampler = DPMSolver(process, num_steps=num_steps, order=order, sde=sde)
    out = sampler(predict, noise, torch.Generator().manual_seed(1))
    expected = list(slow())
    assert [t[0].item() for _, t in calls] == steps
    for (x, _), (_, slow_x) in zip([*calls, (out, None)], expected, strict=True):
        torch.testing.assert_close(x, slow_x, rtol=1e-4, atol=1e-4)  # the scheduler rounds to float32


MEAN, STD = 0.7, 0.5


def gaussian_network(process, mean=MEAN, std=STD, v=None):
    """The exact noise prediction for data N(mean, std^2): E[noise | x_t], with v (B,)-indexed by step or 0."""
    abar = abar_of(process)

    def predict(x, t):
        a = abar[t].to(x).view(-1, 1, 1, 1)
        predicted = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
        fraction = torch.zeros_like(x) if v is None else v[t].to(x).view(-1, 1, 1, 1).expand_as(x)
        return torch.cat([predicted, fraction], dim=1)

    return predict


def quantiles_at(process, t, mean=MEAN, std=STD):
    """Nine states at step t, which the probability-flow ODE takes to each other; at no step, without noise."""
    a = 1.0 if t is None else abar_of(process)[t].item()
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    return math.sqrt(a) * mean + math.sqrt(a * std**2 + 1 - a) * z


def start_and_end(process, mean=MEAN, std=STD):
    """Nine states at the first step of sampling, and where the probability-flow ODE takes them at zero noise."""
    return quantiles_at(process, first_step(process), mean, std), quantiles_at(process, None, mean, std)


def test_ddim_converges_to_the_exact_transport_with_order_one(process):
    start, end = start_and_end(process)
    errors = [
        (DDIM(process, num_steps=n)(gaussian_network(process), start) - end).abs().max().item() for n in (20, 40, 80)
    ]
    assert errors[-1] < 0.05
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


@pytest.mark.parametrize(
    ("solver", "order", "rates"), [(DPMSolver, 1, (1.8, 2.2)), (DPMSolver, 2, (3, 5)), (UniPC, 2, (3, 5))]
)
def test_solvers_converge_to_the_exact_transport_with_their_order(process, solver, order, rates):
    """Where the network is last asked; the step from there to the clean latent is of first order."""
    start, end = start_and_end(process, 0.0, 2.0)
    errors = []
    for num_steps in (64, 128, 256):
        predict, calls = recorded(gaussian_network(process, 0.0, 2.0))
        out = solver(process, num_steps=num_steps, order=order)(predict, start)
        assert (out - end).abs().max() < (0.1 if order == 1 else 0.015)
        x, t = calls[-1]
        errors.append((x - quantiles_at(process, t[0].item(), 0.0, 2.0)).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert rates[0] < coarse / fine < rates[1]


@pytest.mark.parametrize(
    "spec", [{"name": "dpm-solver"}, {"name": "dpm-solver", "order": 3}, {"name": "unipc"}], ids=str
)
def test_solvers_are_near_the_exact_transport_in_twenty_steps(process, spec):
    start, end = start_and_end(process)
    network = gaussian_network(process)
    error = (sampler_of(process, spec)(network, start) - end).abs().max()
    assert error < 0.06
    assert error < 0.45 * (DDIM(process, num_steps=20)(network, start) - end).abs().max()


FEW_STEPS = [
    *({"name": "dpm-solver", "order": order} for order in (1, 2, 3)),
    *({"name": "dpm-solver", "order": order, "sde": True} for order in (1, 2)),
    *({"name": "unipc", "order": order} for order in (1, 2, 3)),
]


@pytest.mark.parametrize("spec", FEW_STEPS, ids=str)
def test_few_step_samplers_are_finite_and_clip_nothing(process, spec):
    """In float32, with any number of steps, fewer than the order too; and for data far from [-1, 1]."""
    mean, std = 30.0, 3.0
    network = gaussian_network(process, mean, std)
    start = quantiles_at(process, first_step(process), mean, std).float()
    for num_steps in (1, 2, 3, 4, 14, 15, 30):
        out = sampler_of(process, {**spec, "num_steps": num_steps})(network, start, torch.Generator().manual_seed(0))
        assert out.isfinite().all(), num_steps
        if num_steps >= 14:
            assert abs(out.mean() - mean) < (4 * std / 3 if spec.get("sde") else 0.1), num_steps


@pytest.mark.parametrize("spec", FEW_STEPS, ids=str)
def test_an_error_of_the_network_is_not_blown_up_where_there_is_only_noise(process, spec):
    """Cosine betas reach alpha = 5e-5, by which the predicted noise would be divided."""
    network, noise = gaussian_network(process), torch.randn(50, 1, 1, 1, dtype=torch.float64)
    out = [
        sampler_of(process, {**spec, "num_steps": 10})(
            lambda x, t, shift=shift: network(x, t) + shift, noise, torch.Generator().manual_seed(0)
        )
        for shift in (0.0, 0.01)
    ]
    assert 0.01 < (out[1] - out[0]).abs().mean() < 0.2


@pytest.mark.parametrize(("order", "rates", "least"), [(1, (1.6, 2.1), 0.07), (2, (2.5, 4), 0.015)])
def test_samples_of_the_solver_of_the_sde_have_the_mean_and_variance_of_the_data(
    process, monkeypatch, order, rates, least
):
    """A sample is affine in the numbers drawn: a batch in which each is 1 once and 0 otherwise shows its moments.

    Exact is E[x | x_t], of x_t at the step where the network is last asked.
    """
    errors, a = [], abar_of(process)[first_step(process)].item()
    for num_steps in (100, 200):
        numbers = iter(torch.eye(num_steps + 2, num_steps + 1).T.reshape(num_steps + 1, -1, 1, 1, 1))
        monkeypatch.setattr(scheduling_dpmsolver_multistep, "randn_tensor", lambda *_, n=numbers, **__: next(n))
        start = math.sqrt(a) * MEAN + math.sqrt(a * STD**2 + 1 - a) * next(numbers).double()
        predict, calls = recorded(gaussian_network(process))
        out = DPMSolver(process, num_steps=num_steps, order=order, sde=True)(predict, start).flatten()
        assert next(numbers, None) is None
        last = abar_of(process)[calls[-1][1][0]].item()
        exact = STD**2 * last * STD**2 / (last * STD**2 + 1 - last)
        assert out[-1].item() == pytest.approx(MEAN, abs=1e-4)
        errors.append(abs((out[:-1] - out[-1]).square().sum().item() / exact - 1))
    assert errors[-1] < least
    assert rates[0] < errors[0] / errors[1] < rates[1]


def test_solvers_visit_no_step_twice(process):
    for num_steps in (1, 2, 500, first_step(process)):
        predict, calls = recorded(smooth_network)
        DPMSolver(process, num_steps=num_steps)(predict, torch.zeros(1, 1, 1, 1))
        steps = [t.item() for _, t in calls]
        assert steps == sorted(set(steps), reverse=True)
        assert (len(steps), steps[0]) == (num_steps, first_step(process))


def exact_v(process, num_steps, std):
    """v at every kept step for which the learned variance is that of p(x_{t-1} | x_t) for data of variance std^2.

    x_{t-1} and x_t are jointly Gaussian with variances a' s^2 + 1 - a' and a s^2 + 1 - a and covariance
    sqrt(a / a') Var(x_{t-1}).
    """
    kept = published_steps(T, num_steps)
    abar = abar_of(process)
    v = torch.zeros(T, dtype=torch.float64)
    for t_before, t in itertools.pairwise(kept):
        before, a = abar[t_before].item(), abar[t].item()
        variance_before, variance = before * std**2 + 1 - before, a * std**2 + 1 - a
        conditional = variance_before - a / before * variance_before**2 / variance
        log_beta = math.log(1 - a / before)
        log_posterior = log_beta + math.log((1 - before) / (1 - a))
        v[t] = 2 * (math.log(conditional) - log_posterior) / (log_beta - log_posterior) - 1
    return v, kept[1:]


def test_the_ends_of_the_learned_range_are_exact_for_unit_variance_and_for_a_point(process):
    for std, end in ((1.0, 1.0), (1e-6, -1.0)):
        v, kept = exact_v(process, 25, std)
        torch.testing.assert_close(v[kept], torch.full((24,), end, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("std", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("num_steps", [6, 60])
def test_ddpm_samples_have_the_mean_and_variance_of_the_data(process, num_steps, std):
    """With the exact noise and variance every reverse step is exact; the last returns E[x | x_t] without noise."""
    count, a, first = 20000, abar_of(process)[-1].item(), abar_of(process)[0].item()
    z = torch.randn(count, 1, 1, 1, dtype=torch.float64)
    start = math.sqrt(a) * MEAN + math.sqrt(a * std**2 + 1 - a) * z
    v, _ = exact_v(process, num_steps, std)
    network = gaussian_network(process, MEAN, std, v)
    x = DDPM(process, num_steps=num_steps)(network, start, torch.Generator().manual_seed(0))
    variance = std**2 * first * std**2 / (first * std**2 + 1 - first)
    assert abs(x.mean().item() - MEAN) < 4 * math.sqrt(variance / count)
    assert abs(x.var().item() / variance - 1) < 4 * math.sqrt(2 / count)


DRAWING = [{"name": "ddpm"}, {"name": "ddim", "eta": 1.0}, {"name": "dpm-solver", "sde": True}]
NOT_DRAWING = [{"name": "ddim"}, {"name": "dpm-solver"}, {"name": "dpm-solver", "order": 3}, {"name": "unipc"}]


@pytest.mark.parametrize("spec", DRAWING + NOT_DRAWING, ids=str)
def test_a_sample_does_not_depend_on_its_batch(process, spec):
    sampler = sampler_of(process, {**spec, "num_steps": 12})
    noise = torch.randn(3, 2, 2, 2)

    def generators(indices):
        return [torch.Generator().manual_seed(100 + i) for i in indices]

    together = sampler(smooth_network, noise, generators([0, 1, 2]))
    for i in range(3):
        alone = sampler(smooth_network, noise[i : i + 1], generators([i]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)
    beside = sampler(smooth_network, torch.cat([9 * noise[1:], noise[:1]]), generators([8, 9, 0]))
    assert torch.equal(beside[2], together[0])  # in a batch of the same shape, bit for bit
    again = sampler(smooth_network, noise, generators([0, 1, 2]))  # a sampler remembers nothing
    assert torch.equal(again, together)
    other = sampler(smooth_network, noise, generators([3, 4, 5]))
    assert torch.equal(other, together) == (spec in NOT_DRAWING)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_keep_the_dtype_and_shape_of_the_noise(name, process):
    noise = torch.randn(2, 3, 2, 4)
    out = sampler_of(process, {"name": name, "num_steps": 5})(smooth_network, noise)
    assert out.dtype == torch.float32
    assert out.shape == noise.shape


def test_the_clean_latent_is_what_the_predicted_noise_implies(process):
    x, noise, v = torch.randn(3, 5, 2, 3, 2, dtype=torch.float64)
    t = torch.tensor([0, 1, 500, 998, 999])
    a = abar_of(process)[t].view(5, 1, 1, 1)
    clean = process.clean(torch.cat([noise, v], dim=1), a.sqrt() * x + (1 - a).sqrt() * noise, t)
    torch.testing.assert_close(clean, x, rtol=1e-8, atol=1e-8)


def test_the_noise_level_rises_from_zero_to_one():
    assert Diffusion().noise_level(torch.tensor([0, 333, 999])).tolist() == pytest.approx([0, 1 / 3, 1])
    assert Diffusion(num_timesteps=101).noise_level(torch.tensor(25)).item() == 0.25


def test_sampling_without_a_sampler_takes_the_published_one():
    process, noise = Diffusion(), torch.randn(2, 1, 2, 2)
    for spec in (None, {}):
        assert isinstance(sampler_of(process, spec), DDPM)
        assert len(sampler_of(process, spec).steps) == 250
    for spec in ("unipc", {"num_steps": 5}, {"name": "dpm-solver", "sde": True, "num_steps": 4}):
        out = sampler_of(process, spec)(smooth_network, noise, torch.Generator().manual_seed(0))
        assert torch.equal(out, sampler_of(process, spec)(smooth_network, noise, torch.Generator().manual_seed(0)))
    calls = []
    sampler_of(process)(lambda x, t: calls.append(t) or smooth_network(x, t), noise)
    assert len(calls) == 250


def test_default_sampler_settings_are_the_published_ones():
    process = Diffusion()
    assert process.num_timesteps == 1000
    predict, calls = recorded(smooth_network)
    sampler_of(process, "ddpm")(predict, torch.zeros(1, 1, 1, 1))
    assert len(calls) == 250


def test_wrong_values_end_in_a_sentence():
    process = Diffusion()

    def sampler(**spec):
        return lambda: sampler_of(process, spec)

    def loss(channels):
        return lambda: process.loss(lambda *_: torch.zeros(1, channels, 1, 1), torch.zeros(1, 2, 1, 1), torch.zeros(1))

    expected = [
        (
            lambda: Diffusion(betas="liner"),
            r"process.betas is 'liner'; did you mean 'linear'\? .*\['cosine', 'linear'\]",
        ),
        (lambda: Diffusion(num_timesteps=1), r"num_timesteps is 1; choose at least 2"),
        (lambda: respace(process.betas, 1), r"num_steps is 1; choose 2 ... 1000"),
        (sampler(name="ddpm", num_steps=1), r"num_steps is 1; choose 2 ... 1000"),
        (sampler(name="ddpm", num_steps=1001), r"num_steps is 1001; choose 2 ... 1000"),
        (sampler(name="ddim", num_steps=0), r"num_steps is 0; choose 2 ... 1000"),
        (sampler(name="ddim", spacing="strid"), r"sampler.spacing is 'strid'; did you mean 'stride'\?"),
        (sampler(name="ddim", eta=-0.1), r"eta is -0.1; choose 0 ... 1"),
        (sampler(name="ddim", eta=1.5), r"eta is 1.5; choose 0 ... 1"),
        (sampler(name="dpm-solver", num_steps=0), r"num_steps is 0; choose 1 ... 999"),
        (sampler(name="dpm-solver", num_steps=1000), r"num_steps is 1000; choose 1 ... 999"),
        (sampler(name="ddmp"), r"sample.sampler.name is 'ddmp'; did you mean 'ddpm'\?"),
        (sampler(name="ddpm", eta=1.0), r"sample.sampler 'ddpm' takes no 'eta'; it takes \['num_steps', 'spacing'\]"),
        (sampler(num_stps=5), r"sample.sampler 'ddpm' takes no 'num_stps'; did you mean 'num_steps'\?"),
        (sampler(name="dpm-solver", order=5), r"sample.sampler.order is 5; choose 1 ... 3"),
        (sampler(name="dpm-solver", order=3, sde=True), r"sample.sampler.order is 3; choose 1 ... 2"),
        (sampler(name="dpm-solver", sde=1), r"sample.sampler 'dpm-solver': sde is 1; it must be true or false"),
        (sampler(name="unipc", order=0), r"sample.sampler.order is 0; choose 1 ... 3"),
        (sampler(name="unipc", num_steps=1000), r"num_steps is 1000; choose 1 ... 999"),
        (
            lambda: sampler_of(Diffusion(betas="cosine"), {"name": "unipc", "num_steps": 996}),
            r"is 996; choose 1 ... 995",
        ),
        (loss(2), r"needs noise and variance, 4 channels; the model gives 2"),
    ]
    for call, sentence in expected:
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize("num_timesteps", [2, 10, 20])
def test_so_few_steps_that_a_beta_reaches_one_get_a_sentence(num_timesteps):
    with pytest.raises(ValueError, match=f"num_timesteps is {num_timesteps}; so few linear betas reach"):
        Diffusion(betas="linear", num_timesteps=num_timesteps)
    assert torch.isfinite(Diffusion(betas="linear", num_timesteps=21)._table).all()


@pytest.mark.parametrize("num_timesteps", [1000, 7])
def test_steps_of_training_are_the_quantiles_of_a_uniform_distribution(num_timesteps):
    process = Diffusion(num_timesteps=num_timesteps, betas="cosine")
    edges = torch.arange(num_timesteps, dtype=torch.float64)
    assert process.times((edges + 0.5) / num_timesteps).tolist() == edges.tolist()
    last = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert process.times(last).tolist() == [0, num_timesteps - 1]
    assert process.times(last).dtype == torch.int64
    drawn = []
    process.loss(lambda x_t, t, y: drawn.append(t) or torch.zeros(4000, 2, 1, 1), torch.zeros(4000, 1, 1, 1), None)
    assert drawn[0].min() >= 0
    assert drawn[0].max() < num_timesteps
    assert drawn[0].double().mean() / (num_timesteps - 1) == pytest.approx(0.5, abs=4 * 0.29 / 4000**0.5)
