"""From labels to images: the guidance formula, and images that do not depend on what is drawn beside them."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dit_vca
import sit_vca
from dit_vca import Diffusion, DiT
from sit_vca import SiT, Transport
from vca import create
from vca_engine.images import NonFiniteError
from vca_engine.sampling.classes import check_labels, evenly_spaced_classes, find_class, find_classes, random_label
from vca_engine.sampling.guidance import Guidance, guided
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.sampling.tables import interpolations, slerp, trajectories

SIZES = {"input_size": 8, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


class Spy:
    """A model whose output is a known function of its inputs, (B, 2C, H, W), and that counts its calls."""

    def __init__(self, sign=1):
        self.calls, self.sign = [], sign

    def __call__(self, x_t, t, y):
        self.calls.append((x_t, t, y))
        both = torch.cat([x_t.sin(), x_t.cos()], dim=1)
        return self.sign * both * (1 + y)[:, None, None, None] + t[:, None, None, None]


@pytest.fixture
def batch():
    return torch.randn(3, 4, 2, 2), torch.rand(3), torch.tensor([0, 2, 4])


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5, 1.5, 4.0])
@pytest.mark.parametrize("channels", [None, 3, 1])
def test_guidance_is_its_formula_and_leaves_the_other_channels_conditional(batch, cfg_scale, channels):
    x, t, y = batch
    model, n = Spy(), channels or 4
    out = guided(model, y, Guidance(cfg_scale, channels), null_class=5, channels=4)(x, t)
    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 5))
    expected = cond.clone()
    expected[:, :n] = uncond[:, :n] + cfg_scale * (cond - uncond)[:, :n]
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[:, n:], cond[:, n:])  # among them the learned variance, channels 4 to 7
    assert not torch.allclose(out[:, :n], cond[:, :n])
    assert len(model.calls) == 3  # guided asks once, for both


def test_without_guidance_the_model_is_called_once_with_the_batch_as_it_is(batch):
    x, t, y = batch
    model = Spy()
    out = guided(model, y, Guidance(), null_class=None, channels=4)(x, t)
    (call,) = model.calls
    assert all(a is b for a, b in zip(call, batch, strict=True))
    assert torch.equal(out, Spy()(x, t, y))


def test_guidance_away_from_another_class_and_from_another_model(batch):
    x, t, y = batch
    cond = Spy()(x, t, y)
    others = {"negative": torch.full_like(y, 1), "guide": y, "both": torch.full_like(y, 1)}
    for case, labels in others.items():
        worse = Spy(sign=-1)
        guide = None if case == "negative" else worse
        guidance = Guidance(3.0, negative=None if case == "guide" else 1)
        out = guided(Spy(), y, guidance, null_class=5, channels=8, guide=guide)(x, t)
        other = (guide or Spy())(x, t, labels)
        torch.testing.assert_close(out, other + 3 * (cond - other))
        assert len(worse.calls) == (0 if case == "negative" else 2)


def test_guidance_only_between_two_noise_levels_and_elsewhere_one_pass(batch):
    x, _, y = batch
    guidance = Guidance(2.0, interval=(0.25, 0.5))
    model = Spy()
    predict = guided(model, y, guidance, null_class=5, channels=4, noise_level=lambda t: 1 - t)
    everywhere = guided(Spy(), y, Guidance(2.0), null_class=5, channels=4)
    for level in (0.0, 0.2, 0.25, 0.4, 0.5, 0.6, 1.0):
        t, before = torch.full((3,), 1 - level), len(model.calls)
        out = predict(x, t)
        inside = 0.25 <= level <= 0.5
        assert torch.equal(out, everywhere(x, t) if inside else Spy()(x, t, y))
        (call,) = model.calls[before:]
        assert len(call[0]) == (6 if inside else 3)


def test_what_cannot_be_guided_is_said():
    model = SimpleNamespace(null_class=None, in_channels=4, num_classes=5, input_size=(8, 8))
    with pytest.raises(ValueError, match=r"cfg_scale is 2\.0, but this model has no null class .*use cfg_scale 1"):
        Guidance(2.0).check(model)
    Guidance(1.0).check(model)
    Guidance(2.0, negative=3).check(model)
    Guidance(2.0, guide=model).check(model)
    with pytest.raises(ValueError, match="class 5 does not exist"):
        Guidance(2.0, negative=5).check(model)
    other = SimpleNamespace(**{**vars(model), "num_classes": 6})
    with pytest.raises(ValueError, match="the guide has num_classes 6, the model 5; a guide is for the same images"):
        Guidance(2.0, guide=other).check(model)
    with pytest.raises(ValueError, match="guided_channels is 5; the latents have 4 channels"):
        Guidance(1.0, channels=5).check(model)


def perturbed(model):
    """The output of a fresh network is zero; this one's is not."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def sampler_of(package, published, process, options):
    return create(package.SAMPLERS, {"name": published, **options}, "sampler", process)


def flow(**sampler):
    return perturbed(SiT(in_channels=3, **SIZES)), create(
        sit_vca.SAMPLERS, {"name": "sde", **sampler}, "sampler", Transport()
    )


def diffusion(**sampler):
    return perturbed(DiT(in_channels=3, **SIZES)), create(
        dit_vca.SAMPLERS, {"name": "ddpm", **sampler}, "sampler", Diffusion()
    )


CASES = {
    "ode euler": (flow, {"name": "ode", "method": "euler", "num_steps": 4}),
    "ode heun": (flow, {"name": "ode", "method": "heun", "num_steps": 4}),
    "ode dopri5": (flow, {"name": "ode", "method": "dopri5", "num_steps": 4}),
    "sde": (flow, {"name": "sde", "num_steps": 4}),
    "sde, shifted": (flow, {"name": "sde", "method": "heun", "num_steps": 4, "time_shift": 3.0}),
    "ddpm": (diffusion, {"name": "ddpm", "num_steps": 4}),
    "ddim, eta 1": (diffusion, {"name": "ddim", "num_steps": 4, "eta": 1.0}),
    "dpm-solver": (diffusion, {"name": "dpm-solver", "num_steps": 4}),
    "dpm-solver sde": (diffusion, {"name": "dpm-solver", "num_steps": 4, "sde": True}),
    "unipc": (diffusion, {"name": "unipc", "num_steps": 4}),
}


def gentle(latents):
    """A decoder that keeps values well inside the range, so that clamping hides nothing."""
    return (latents / 10).tanh()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_an_image_is_a_function_of_seed_and_number_whatever_its_batch(case, cfg_scale):
    make, options = CASES[case]
    model, sampler = make(**options)
    labels = [4, 0, 3, 3, 1]
    indices = [0, 1, 7, 30_000, 2]
    most = 3 if "dopri5" in case else 1  # one step size for the whole batch

    def draw(where, seed=0):
        image_sampler = ImageSampler(model, sampler, gentle, seed=seed, guidance=Guidance(cfg_scale))
        return image_sampler([labels[i] for i in where], [indices[i] for i in where]).astype(int)

    together = draw(range(5))
    assert together.shape == (5, 8, 8, 3)
    for i in range(5):
        assert np.abs(draw([i])[0] - together[i]).max() <= most
    assert np.abs(draw([3, 1, 0])[1] - together[1]).max() <= most
    assert np.abs(draw([0], seed=1)[0] - together[0]).max() > 10
    assert np.abs(together[2] - together[3]).max() > 10  # the same label, another number


@pytest.mark.parametrize("case", CASES)
def test_evaluations_are_counted_and_two_an_image_where_there_is_guidance(case):
    make, options = CASES[case]
    model, sampler = make(**options)
    rows = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for cfg_scale in (1.0, 2.0):
        rows.clear()
        image_sampler = ImageSampler(model, sampler, gentle, seed=0, guidance=Guidance(cfg_scale))
        assert image_sampler.nfe is None
        image_sampler([1, 2, 3], [0, 1, 2])
        image_sampler([1], [3])
        assert image_sampler.nfe == sum(rows) / 4
        assert set(rows) == ({3, 1} if cfg_scale == 1 else {6, 2})
        steps = {
            "ode euler": 3,
            "ode heun": 6,
            "sde": 4,
            "sde, shifted": 7,
            "ode dopri5": image_sampler.nfe / cfg_scale,
        }
        assert image_sampler.nfe == steps.get(case, 4) * cfg_scale


def test_guided_in_an_interval_costs_between_one_and_two_passes_a_step():
    model, sampler = flow(name="ode", method="euler", num_steps=11)  # at t = 0, 0.1, ..., 0.9
    guidance = Guidance(3.0, interval=(0.25, 0.65))
    image_sampler = ImageSampler(model, sampler, gentle, seed=0, guidance=guidance, noise_level=Transport().noise_level)
    image_sampler([1, 2], [0, 1])
    assert image_sampler.nfe == 10 + 4  # noise levels 0.3, 0.4, 0.5 and 0.6


def test_an_autoguided_image_needs_both_models_and_is_plain_with_a_guide_that_is_the_model():
    model, sampler = flow(name="ode", method="euler", num_steps=3)
    guide = perturbed(SiT(in_channels=3, **SIZES))
    plain = ImageSampler(model, sampler, gentle, seed=0)
    same = ImageSampler(model, sampler, gentle, seed=0, guidance=Guidance(2.0, guide=model))
    led = ImageSampler(model, sampler, gentle, seed=0, guidance=Guidance(2.0, guide=guide))
    images = [image_sampler([1, 2], [0, 1]).astype(int) for image_sampler in (plain, same, led)]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[0] - images[2]).max() > 5
    assert led.nfe == 2 * plain.nfe == 4


def test_groups_make_images_the_same_bit_for_bit():
    """Even where one step size is chosen for the whole batch, and whichever groups are drawn before."""
    for case in ("ode dopri5", "sde", "ddpm"):
        make, options = CASES[case]
        model, sampler = make(**options)
        label = functools.partial(random_label, 3, num_classes=5)
        one = ImageSampler(model, sampler, gentle, seed=3, guidance=Guidance(2.0))
        two = ImageSampler(model, sampler, gentle, seed=3, guidance=Guidance(2.0))
        first = [one.group(k, 4, label) for k in range(3)]
        again = {k: two.group(k, 4, label) for k in (2, 0)}
        assert (first[0] == again[0]).all()
        assert (first[2] == again[2]).all()
        assert (first[1] != first[0]).any()
        single = two([label(5)], [5])[0].astype(int)
        assert np.abs(first[1][1] - single).max() <= 3


def test_autocast_computes_in_bf16_and_gives_float32():
    model, sampler = flow(name="ode", method="euler", num_steps=2)
    dtypes = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    latents = ImageSampler(model, sampler, gentle, seed=0, dtype=torch.bfloat16).latents([1], [0])
    assert dtypes == [torch.bfloat16]
    assert latents.dtype == torch.float32
    exact = ImageSampler(model, sampler, gentle, seed=0).latents([1], [0])
    assert 0 < (latents - exact).abs().max() < 0.1 * exact.abs().max()


def test_images_that_are_not_finite_are_counted_and_the_way_out_is_said():
    """Whether the decoder, the network or the solver gives them."""
    model, euler = flow(name="ode", method="euler", num_steps=3)

    def spoil(latents):
        latents[1] = torch.nan
        return latents

    with pytest.raises(NonFiniteError) as said:
        ImageSampler(model, euler, spoil, seed=0)([1, 2, 3], [0, 1, 2])
    ways = "try an earlier checkpoint, other --weights, more steps or another sampler."
    assert str(said.value) == f"1 of 3 images hold NaN or infinite values, drawn with these weights; {ways}"
    guided = {"guidance": Guidance(1e38), "dtype": torch.bfloat16, "weights": "ema of step 7"}
    with pytest.raises(NonFiniteError, match=r"^2 of 2 images .* with ema of step 7 and cfg_scale 1e\+38; try") as said:
        ImageSampler(model, euler, gentle, seed=0, **guided)([1, 2], [0, 1])
    assert str(said.value).endswith("another sampler, a lower cfg_scale or --precision no.")
    dopri5 = sit_vca.ODE(Transport(), method="dopri5")
    model.final_layer.linear.bias.data[0] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"^dopri5 cannot go on: the network gives NaN .* ema of step 7 and cfg_scale"
    ):
        ImageSampler(model, dopri5, gentle, seed=0, **guided)([1, 2], [0, 1])


def test_what_is_shown_of_the_way_to_an_image_is_finite_or_said():
    """Trajectories decode x_t and the predicted clean latent; interpolations draw from other noise."""
    model, sampler = flow(name="ode", method="euler", num_steps=4)
    image_sampler = ImageSampler(
        model, sampler, gentle, seed=0, noise_level=Transport().noise_level, guidance=Guidance(1e38)
    )
    names = [str(k) for k in range(5)]
    with pytest.raises(NonFiniteError, match=r"^\d of 4 images hold NaN"):
        trajectories(image_sampler, Transport().clean, [1, 2], names, 3)
    with pytest.raises(NonFiniteError, match="^3 of 3 images hold NaN"):
        interpolations(image_sampler, [1], names, (0, 1), 3)
    plain = ImageSampler(model, sampler, lambda z: z, seed=0, noise_level=Transport().noise_level)
    with pytest.raises(NonFiniteError, match="^2 of 4 images hold NaN"):
        trajectories(plain, lambda output, x_t, t: x_t * torch.inf, [1, 2], names, 3)


def test_generation_leaves_the_global_random_numbers_alone():
    model, sampler = flow(name="sde", num_steps=3)
    state = torch.get_rng_state()
    ImageSampler(model, sampler, torch.tanh, seed=0)([1], [0])
    assert torch.equal(state, torch.get_rng_state())


def test_guided_channels_limit_the_guidance():
    model, sampler = flow(name="ode", method="euler", num_steps=2)  # a single step: channels do not mix
    images = {
        channels: ImageSampler(model, sampler, lambda z: z / 10, seed=0, guidance=Guidance(scale, channels))(
            [1, 2], [0, 1]
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
        ImageSampler(model, sampler, torch.tanh, seed=0)([0, label], [0, 1])
    with pytest.raises(ValueError, match=f"class {label}"):
        check_labels([label], 5)
    check_labels(range(5), 5)


IMAGENET = ["tench, Tinca tinca", "crane", "goldfish, Carassius auratus", "Crane", "7", "great white shark"]


@pytest.mark.parametrize(
    ("word", "number"),
    [
        (0, 0),
        ("tench", 0),
        ("TENCH", 0),
        ("tinca tinca", 0),
        ("tench, Tinca tinca", 0),
        (" goldfish", 2),
        ("7", 4),
        ("5", 5),
    ],
)
def test_classes_go_by_number_or_name(word, number):
    assert find_class(word, IMAGENET) == number


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (6, r"class 6 does not exist; this model has classes 0 \.\.\. 5"),
        ("6", "class 6 does not exist"),
        ("crane", r"the name of several: 1 \(crane\), 3 \(Crane\); choose one by its number"),
        ("goldfsh", "class 'goldfsh' is no class of this model; did you mean 'goldfish'"),
        ("xyz", r"it has 6 classes, tench, Tinca tinca, crane, .*, \.\.\., great white shark"),
    ],
)
def test_a_class_that_is_not_there_is_named(word, said):
    with pytest.raises(ValueError, match=said):
        find_class(word, IMAGENET)


def test_one_word_may_be_several_classes_unless_it_is_a_name():
    assert find_classes(["goldfish,7, 0"], IMAGENET) == [2, 4, 0]
    assert find_classes(["Tench, tinca tinca"], IMAGENET) == [0]
    assert find_classes(["goldfish", 1], IMAGENET) == [2, 1]
    with pytest.raises(ValueError, match="'x' is no class of this model"):
        find_classes(["goldfish,x"], IMAGENET)


def test_slerp_keeps_the_norm_and_goes_along_the_great_circle():
    a, b = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64).unbind()
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]

    def angle(u, v):
        return torch.acos(F.cosine_similarity(u.flatten(1), v.flatten(1)))

    for share in (0.0, 0.3, 0.5, 1.0):
        z = slerp(a, b, share)
        torch.testing.assert_close(z.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
        if 0 < share < 1:
            torch.testing.assert_close(angle(a, z), share * angle(a, b))
    torch.testing.assert_close(slerp(a, b, 0), a)
    torch.testing.assert_close(slerp(a, b, 1), b)


def test_evenly_spaced_classes_are_all_or_ten_even_ones():
    assert evenly_spaced_classes(range(4)) == [0, 1, 2, 3]
    assert evenly_spaced_classes([7, 3, 5]) == [7, 3, 5]
    assert evenly_spaced_classes(range(1000)) == list(range(0, 1000, 100))
    assert evenly_spaced_classes(range(25), most=4) == [0, 6, 12, 18]
    assert len(set(evenly_spaced_classes(range(11)))) == 10


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
