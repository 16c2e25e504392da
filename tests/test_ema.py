"""Averages of the weights against their closed forms, and averages rebuilt from snapshots against those that were kept."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vca_engine.records import read_json
from vca_engine.training import reconstruct as ema
from vca_engine.training.ema import Ema, constant, gamma_of, power
from vca_engine.training.reconstruct import LARGE_ERROR, reconstruct, solve
from vca_engine.weights import checkpoint


def wander(num_steps, *betas):
    """Weights (num_steps + 1, 2, 3) of a random walk, from step 0, and each average of them after each step."""
    model = nn.Linear(3, 2, bias=False).double()
    averages = [Ema(model, beta) for beta in betas]
    weights, followed = [model.weight.detach().clone()], [[] for _ in betas]
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            model.weight += torch.randn(2, 3, dtype=torch.float64)
        weights.append(model.weight.detach().clone())
        for average, values in zip(averages, followed, strict=True):
            average.update(model, step)
            values.append(average.weights["weight"].clone())
    return torch.stack(weights), [torch.stack(values) for values in followed]


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_has_its_closed_form(warmup):
    """w_ema after k updates is the start times all decays, plus each w_j times (1 - d_j) and the decays after it."""
    weights, (found,) = wander(199, constant(0.9, warmup))
    decays = [min(0.9, (1 + k) / (10 + k)) if warmup else 0.9 for k in range(1, 200)]
    for step in (1, 2, 100, 199):
        used = decays[:step]
        later = np.cumprod([1.0, *used[:0:-1]])[::-1]  # product of the decays after each step
        expected = weights[0] * math.prod(used)
        for w, d, rest in zip(weights[1 : step + 1], used, later, strict=True):
            expected = expected + (1 - d) * rest * w
        torch.testing.assert_close(found[step - 1], expected, rtol=1e-12, atol=1e-14)


def test_an_average_is_float32_and_shares_no_memory_with_the_model():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    average = Ema(model, constant(0.999, False))
    before = average.weights["weight"].clone()
    with torch.no_grad():
        model.weight += 1
    average.update(model, 1)
    assert average.weights["weight"].dtype == torch.float32
    torch.testing.assert_close(average.weights["weight"], before + 0.001, rtol=0, atol=1e-5)
    assert torch.equal(average.weights["weight"], torch.lerp(before, model.weight.detach().float(), 1 - 0.999))


def test_widths_and_exponents_are_those_of_the_paper():
    """EDM2 names gamma 16.97 and 6.94 for the widths 0.05 and 0.10."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(12**-0.5) == pytest.approx(0, abs=1e-6)
    for std in (0.01, 0.05, 0.1, 0.2, 0.28):
        g = gamma_of(std)
        assert (g + 1) / ((g + 2) ** 2 * (g + 3)) == pytest.approx(std**2, rel=1e-9)
    for std in (0, -1, 0.3):
        with pytest.raises(ValueError, match="relative width of an average"):
            gamma_of(std)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_the_recursion_gives_the_power_function(std):
    weights, (found,) = wander(60, power(std))
    g = gamma_of(std)
    for step in (1, 2, 60):
        edges = (torch.arange(step + 1, dtype=torch.float64) / step) ** (g + 1)
        expected = (edges.diff()[:, None, None] * weights[1 : step + 1]).sum(0)
        torch.testing.assert_close(found[step - 1], expected, rtol=1e-10, atol=1e-10)
        profile = ema.profile(step, g, np.arange(61.0))
        np.testing.assert_allclose(profile[:step], edges.diff().numpy(), atol=1e-14)
        assert profile[step:].sum() == 0
    shares = np.diff((np.arange(20001) / 20000) ** (g + 1))  # of a long training
    middle = (np.arange(20000) + 0.5) / 20000
    mean = (shares * middle).sum()
    assert math.sqrt((shares * (middle - mean) ** 2).sum()) == pytest.approx(std, rel=1e-3)


def test_a_kept_width_is_its_own_snapshot_and_more_snapshots_come_nearer():
    snapshots = [(step, std) for step in (250_000, 400_000) for std in (0.05, 0.1)]
    coefficients, error, std = solve(snapshots, 400_000, 0.1)
    np.testing.assert_allclose(coefficients, [0, 0, 0, 1], atol=1e-9)
    assert error < 1e-9
    assert std == pytest.approx(0.1, rel=1e-4)
    errors = []
    for num in (4, 8, 16, 32):
        snapshots = [(400_000 * (k + 1) // num, std) for k in range(num) for std in (0.05, 0.1)]
        coefficients, error, _ = solve(snapshots, 400_000, 0.07)
        errors.append(error)
        assert np.abs(coefficients).max() < 3  # so noise of rounding is not blown up
    assert all(a > 2 * b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.002


RUNS = [(240, 240), (240, 60), (240, 20), (100_000, 20_000)]  # steps, and steps between two snapshots
WIDTHS = (0.01, 0.03, 0.05, 0.06, 0.07, 0.1, 0.12, 0.15, 0.2, 0.25, 0.288)


def exact_average(weights, step, std):
    """The power-function average (P,) of the weights (T, P) after steps 1 ... T."""
    return np.diff((np.arange(step + 1) / step) ** (gamma_of(std) + 1)) @ weights[:step]


def rebuilt(weights, every, std):
    """`solve` for the last step, the average that it gives, and the exact one."""
    snapshots = [(at, kept) for at in range(every, len(weights) + 1, every) for kept in (0.05, 0.1)]
    combination = solve(snapshots, len(weights), std)
    kept = np.stack([exact_average(weights, *snapshot) for snapshot in snapshots])
    return combination, combination.coefficients @ kept, exact_average(weights, len(weights), std)


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.mark.parametrize("num_steps, every", RUNS)
def test_a_rebuilt_average_is_that_of_the_recorded_weights(num_steps, every):
    """Weights on random walks far from 0, so that coefficients whose sum is not 1 would show.

    Where the profile is as near as is asked, the average is off by less than a tenth of its distance from the last
    weights; and whatever the width, it is an average.
    """
    weights = 1000 + np.random.default_rng(0).standard_normal((num_steps, 40)).cumsum(0)
    for std in WIDTHS:
        combination, found, exact = rebuilt(weights, every, std)
        assert combination.coefficients.sum() == pytest.approx(1, abs=1e-12)
        off, moved = rms(found - exact), rms(weights[-1] - exact)
        assert combination.error > LARGE_ERROR or off < 0.1 * moved, std
        if std in (0.05, 0.1):
            assert combination.error < 1e-9
            assert off < 1e-9 * moved


@pytest.mark.parametrize(
    "num_steps, every, std, expressed",
    [
        (240, 240, 0.07, False),  # one snapshot of two widths expresses these alone
        (240, 60, 0.07, False),
        (240, 20, 0.07, True),
        (240, 20, 0.15, True),
        (240, 20, 0.25, False),
        (100_000, 20_000, 0.07, True),
        (100_000, 20_000, 0.03, False),
        (100_000, 20_000, 0.25, False),
    ],
)
def test_the_error_of_a_profile_is_the_share_of_independent_noise_that_is_wrong(num_steps, every, std, expressed):
    """Over steps that are drawn independently, so by Var = sum of squares of the shares; 6 deviations of the estimate."""
    count = 40 if num_steps > 1000 else 2000
    combination, found, exact = rebuilt(np.random.default_rng(0).standard_normal((num_steps, count)), every, std)
    assert rms(found - exact) / rms(exact) == pytest.approx(combination.error, rel=6 / count**0.5)
    assert (combination.error <= LARGE_ERROR) == expressed


def test_the_width_of_a_combination_is_that_of_its_profile():
    """One snapshot of two widths has hardly any other than theirs, however much another one is asked for."""
    found = {std: solve([(240, 0.05), (240, 0.1)], 240, std).std for std in (0.01, 0.05, 0.1, 0.25)}
    assert found[0.01] is None  # the narrower less the wider: its variance is negative
    assert (found[0.05], found[0.1]) == pytest.approx((0.05, 0.1), rel=2e-3)
    coefficients = solve([(240, 0.05), (240, 0.1)], 240, 0.25).coefficients
    shares = coefficients @ [np.diff((np.arange(241) / 240) ** (gamma_of(std) + 1)) for std in (0.05, 0.1)]
    place = (np.arange(240) + 0.5) / 240
    assert found[0.25] == pytest.approx(math.sqrt(shares @ (place - shares @ place) ** 2))
    assert found[0.25] < 0.11


STDS, EVERY, STEPS = [0.05, 0.1], 20, 400


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A run of a small model with snapshots, and the averages of other widths that were kept beside them."""
    run, torch_state = tmp_path_factory.mktemp("runs") / "run", torch.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    model[1].num_batches_tracked += 3
    kept = {std: Ema(model, power(std)) for std in STDS}
    wanted = {std: Ema(model, power(std)) for std in (0.03, 0.07, 0.15, 0.2)}
    halfway = {}
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn_like(p) + 0.02
        for average in (*kept.values(), *wanted.values()):
            average.update(model, step)
        if step == STEPS // 2:
            halfway = {std: {k: v.clone() for k, v in average.weights.items()} for std, average in wanted.items()}
        if step % EVERY == 0:
            parts = {ema.name_of(std): {**model.state_dict(), **average.weights} for std, average in kept.items()}
            record = {"config": {"seed": 1, "process": {"name": "flow"}}, "shape": {}, "ema_stds": STDS}
            checkpoint.save(checkpoint.folder_of(run, step, checkpoint.SNAPSHOTS), step, parts, record)
    torch.set_rng_state(torch_state)
    ends = {STEPS // 2: halfway, STEPS: {std: average.weights for std, average in wanted.items()}}
    return run, model, ends


@pytest.mark.parametrize("step", [None, STEPS // 2])
@pytest.mark.parametrize("std, tolerance", [(0.03, 0.006), (0.07, 4e-4), (0.15, 1e-3), (0.2, 4e-3)])
def test_any_width_is_rebuilt_as_if_it_had_been_kept(followed, tmp_path, step, std, tolerance):
    """But for what ten or twenty snapshots cannot express, which is the tolerance, and the rounding of float32."""
    run, model, ends = followed
    made = reconstruct(run, std, step, tmp_path / "out")
    exact = ends[step or STEPS][std]
    found = load_file(tmp_path / "out" / "ema.safetensors")
    assert found.keys() == model.state_dict().keys()
    for name, value in exact.items():
        spread = 0.02 * (step or STEPS) * std  # how far the weights went in one width
        assert (found[name] - value).abs().max() < tolerance * spread / 0.1, name
    assert found["1.num_batches_tracked"] == 3
    assert found["1.num_batches_tracked"].dtype == torch.int64
    record = read_json(tmp_path / "out" / "checkpoint.json")
    assert (record["step"], record["ema"]["std"]) == (step or STEPS, std)
    assert record["ema"]["snapshots"] == 2 * (step or STEPS) // EVERY == made.num_snapshots


def test_the_command_writes_a_folder_that_can_be_sampled_from(followed, capsys):
    run, *_ = followed
    ema.main([str(run), "--std", "0.07"])
    folder = run / "reconstructed" / "step-00000400-std-0.07"
    said = capsys.readouterr()
    assert f"python sample.py {folder}" in said.out
    assert said.err == ""
    assert checkpoint.find(folder) == folder
    assert set(checkpoint.read(folder, "ema")) == {f"{i}.{n}" for i in (0, 1) for n in ("weight", "bias")} | {
        f"1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_a_width_that_the_snapshots_cannot_express_is_warned_of_and_recorded(followed, tmp_path, capsys):
    ema.main([str(followed[0]), "--std", "0.288", "--out", str(tmp_path / "wide")])
    _, error, std = solve([(at, s) for at in range(EVERY, STEPS + 1, EVERY) for s in STDS], STEPS, 0.288)
    said = capsys.readouterr().err
    assert f"cannot express width 0.288: what comes nearest has width {std:.3g}, and its shares" in said
    assert f"off by {error:.0%}. Choose a width nearer to the stored ones (0.05, 0.1), or train with a smaller" in said
    record = read_json(tmp_path / "wide" / "checkpoint.json")["ema"]
    assert record == {"std": 0.288, "snapshots": 40, "profile_error": error, "profile_std": std}


MISTAKES = [
    (["--std", "0.4"], "the relative width of an average is 0.4; choose one above 0 and at most 0.288"),
    (["--std", "0.1", "--step", "7"], "there is no snapshot of step 7; there are those of [20, 40,"),
]


@pytest.mark.parametrize("arguments, said", MISTAKES)
def test_mistakes_are_sentences(followed, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        ema.main([str(followed[0]), *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_run_without_snapshots_or_with_a_damaged_one(tmp_path, followed):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        reconstruct(tmp_path / "nowhere", 0.1)
    with pytest.raises(ValueError, match="has no snapshots of power-function averages"):
        reconstruct(tmp_path, 0.1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is there already and is no checkpoint"):
        reconstruct(followed[0], 0.1, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "x"
    parts = {"ema-0.1": {"w": torch.zeros(3)}}
    folder = checkpoint.folder_of(tmp_path, 5, checkpoint.SNAPSHOTS)
    checkpoint.save(folder, 5, parts, {"config": {}, "shape": {}, "ema_stds": [0.1]})
    (folder / "ema-0.1.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="snapshot is missing or damaged"):
        reconstruct(tmp_path, 0.1)
