"""From labels to images: the guidance formula, and images that do not depend on what is drawn beside them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_vca import Diffusion, DiT
from runtime.generation import check_guidance, check_labels, generate, guided, random_label, spread
from sit_vca import SiT, Transport

SIZES = {"input_size": 8, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


class Spy:
    """A model whose output is a known function of its inputs, (B, 2C, H, W), and that counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, y):
        self.calls.append((x_t, t, y))
        both = torch.cat([x_t.sin(), x_t.cos()], dim=1)
        return both * (1 + y)[:, None, None, None] + t[:, None, None, None]


@pytest.fixture
def batch():
    return torch.randn(3, 4, 2, 2), torch.rand(3), torch.tensor([0, 2, 4])


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5, 1.5, 4.0])
@pytest.mark.parametrize("channels", [4, 3, 1])
def test_guidance_is_its_formula_and_leaves_the_other_channels_conditional(batch, cfg_scale, channels):
    x, t, y = batch
    model = Spy()
    out = guided(model, y, null_class=5, cfg_scale=cfg_scale, channels=channels)(x, t)
    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 5))
    expected = cond.clone()
    expected[:, :channels] = uncond[:, :channels] + cfg_scale * (cond - uncond)[:, :channels]
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[:, channels:], cond[:, channels:])  # among them the learned variance, channels 4 to 7
    assert not torch.allclose(out[:, :channels], cond[:, :channels])
    assert len(model.calls) == 3  # guided asks once, for both


def test_without_guidance_the_model_is_called_once_with_the_batch_as_it_is(batch):
    x, t, y = batch
    model = Spy()
    out = guided(model, y, null_class=None, cfg_scale=1.0, channels=4)(x, t)
    (call,) = model.calls
    assert all(a is b for a, b in zip(call, batch, strict=True))
    assert torch.equal(out, Spy()(x, t, y))


def test_guidance_needs_a_null_class():
    with pytest.raises(ValueError, match=r"cfg_scale is 2\.0, but this model has no null class .*use cfg_scale 1"):
        check_guidance(SimpleNamespace(null_class=None, in_channels=4), 2.0, None)


def perturbed(model):
    """The output of a fresh network is zero; this one's is not."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def flow(**sampler):
    return perturbed(SiT(in_channels=3, **SIZES)), Transport().sampler(sampler)


def diffusion(**sampler):
    return perturbed(DiT(in_channels=3, **SIZES)), Diffusion().sampler(sampler)


CASES = {
    "ode euler": (flow, {"name": "ode", "method": "euler", "num_steps": 4}),
    "ode heun": (flow, {"name": "ode", "method": "heun", "num_steps": 4}),
    "sde": (flow, {"name": "sde", "num_steps": 4}),
    "ddpm": (diffusion, {"name": "ddpm", "num_steps": 4}),
    "ddim, eta 1": (diffusion, {"name": "ddim", "num_steps": 4, "eta": 1.0}),
    "dpm-solver": (diffusion, {"name": "dpm-solver", "num_steps": 4}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_an_image_is_a_function_of_seed_and_number_whatever_its_batch(case, cfg_scale):
    make, options = CASES[case]
    model, sampler = make(**options)
    labels = [4, 0, 3, 3, 1]
    indices = [0, 1, 7, 30_000, 2]

    def draw(where, seed=0):
        chosen = [labels[i] for i in where], [indices[i] for i in where]
        # a decoder that keeps values well inside the range, so that clamping hides nothing
        return generate(model, sampler, lambda z: (z / 10).tanh(), *chosen, seed=seed, cfg_scale=cfg_scale).astype(int)

    together = draw(range(5))
    assert together.shape == (5, 8, 8, 3)
    for i in range(5):
        assert np.abs(draw([i])[0] - together[i]).max() <= 1
    assert np.abs(draw([3, 1, 0])[1] - together[1]).max() <= 1
    assert np.abs(draw([0], seed=1)[0] - together[0]).max() > 10
    assert np.abs(together[2] - together[3]).max() > 10  # the same label, another number


def test_generation_leaves_the_global_random_numbers_alone():
    model, sampler = flow(name="sde", num_steps=3)
    state = torch.get_rng_state()
    generate(model, sampler, torch.tanh, [1], [0], seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_guided_channels_limit_the_guidance():
    model, sampler = flow(name="ode", method="euler", num_steps=2)  # a single step: channels do not mix
    images = {
        channels: generate(
            model, sampler, lambda z: z / 10, [1, 2], [0, 1], seed=0, cfg_scale=scale, guided_channels=channels
        )
        for channels, scale in ((3, 4.0), (1, 4.0), (2, 1.0))
    }
    assert (images[1][..., 0] == images[3][..., 0]).all()
    assert (images[1][..., 1:] == images[2][..., 1:]).all()
    assert (images[1][..., 0] != images[2][..., 0]).any()


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_is_named(label):
    model, sampler = flow(name="ode", method="euler", num_steps=2)
    with pytest.raises(ValueError, match=rf"class {label} does not exist; this model has classes 0 \.\.\. 4"):
        generate(model, sampler, torch.tanh, [0, label], [0, 1], seed=0)
    with pytest.raises(ValueError, match=f"class {label}"):
        check_labels([label], 5)
    check_labels(range(5), 5)


def test_more_guided_channels_than_there_are():
    model, sampler = flow(name="ode", method="euler", num_steps=2)
    with pytest.raises(ValueError, match="guided_channels is 4; the latents have 3 channels"):
        generate(model, sampler, torch.tanh, [0], [0], seed=0, cfg_scale=2.0, guided_channels=4)


def test_spread_is_all_or_ten_even_ones():
    assert spread(range(4)) == [0, 1, 2, 3]
    assert spread([7, 3, 5]) == [7, 3, 5]
    assert spread(range(1000)) == list(range(0, 1000, 100))
    assert spread(range(25), most=4) == [0, 6, 12, 18]
    assert len(set(spread(range(11)))) == 10


def test_random_labels_are_uniform_and_a_function_of_seed_and_number():
    """Chi-square with 9 degrees of freedom: 27.9 is exceeded once in a thousand seeds, and these are fixed."""
    n = 4000
    labels = [random_label(3, i, 10) for i in range(n)]
    counts = np.bincount(labels, minlength=10)
    assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 27.9
    pairs = np.bincount([10 * a + b for a, b in itertools.pairwise(labels)], minlength=100)
    assert ((pairs - n / 100) ** 2 / (n / 100)).sum() < 148.2  # 99 degrees: neighbours are independent
    assert labels[100:110] == [random_label(3, i, 10) for i in range(100, 110)]
    assert labels != [random_label(4, i, 10) for i in range(n)]
