"""Distances and moments against closed forms and numpy, the evaluator and its record, the command line."""

import argparse
import importlib
import json
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fid
from fid.__main__ import _parser, main
from fid.collector import Collector, digests
from fid.frechet import TOLERANCE, factor, frechet_terms, jackknife, noise_floor
from fid.metrics.inception_score import inception_score
from fid.metrics.metric import Side
from fid.metrics.mind import mind
from fid.metrics.precision_recall import precision_recall
from fid.options import Options
from fid.pictures import lines_of, read_records
from vca_engine.seeds import splitmix64

torch.set_num_threads(1)


def gaussian(dim, num, seed=0):
    """A random (mean, covariance), of `num` samples with correlated dimensions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)
    return x.mean(0), np.cov(x, rowvar=False), x


def with_eigenvalues(w, seed=0):
    """A symmetric matrix with these eigenvalues, in random directions."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(w), len(w))))[0]
    cov = q * np.asarray(w) @ q.T
    return (cov + cov.T) / 2


def reference_of(statistics, num, extractor, preset):
    return fid.Reference("made here", "fid", statistics, num, None, extractor, preset)


def random_images(num, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def write_pngs(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04}.png")
    return folder


class Mean(nn.Module):
    """An extractor whose features are known: the mean colour, and the colour of the first pixel."""

    name, label, preset, metrics, dim = "mean-00000000", "Frechet distance", None, ("fd",), 6

    def __init__(self):
        super().__init__()
        self.dims = {"features": 6, "logits": 3}
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, images):
        self.seen.append((len(images), self.training, torch.is_grad_enabled()))
        x = images.float() / 255
        return {
            "features": torch.cat([x.mean((2, 3)), x[:, :, 0, 0]], dim=1) * self.weight,
            "logits": 9 * x[:, :, 1, 1],
        }


def features_of(images):
    with torch.no_grad():
        return Mean()(torch.from_numpy(images).permute(0, 3, 1, 2))["features"].double().numpy()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A classifier's weights, two folders of 100 and 70 images, and the first one's statistics made by the command line."""
    root = tmp_path_factory.mktemp("fid")
    torch.manual_seed(0)
    classifier = fid.Classifier(num_classes=10, image_size=16)
    with torch.no_grad():
        classifier(torch.from_numpy(random_images(64)).permute(0, 3, 1, 2))  # batch statistics that are not 0 and 1
    classifier.eval().save(root / "judge.safetensors")
    write_pngs(root / "a", random_images(100, seed=1))
    write_pngs(root / "b", random_images(70, seed=2) // 2)
    main(["stats", str(root / "a"), "--out", str(root / "a.npz"), *judge(root)])
    return root


def judge(root):
    return ["--extractor", "classifier", "--weights", str(root / "judge.safetensors"), "--device", "cpu"]


# Frechet distance


def test_one_dimension():
    assert fid.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(5.0, abs=1e-12)


def test_two_dimensions():
    a, b = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.3], [-0.3, 3]])
    assert fid.frechet_distance([0, 0], a, [0, 0], b) == pytest.approx(0.9293118549677732, abs=1e-12)


def test_commuting_covariances_with_zero_eigenvalues():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    w1, w2 = rng.uniform(1, 2, (2, 20))
    w1[:5], w2[3:8] = 0, 0
    expected = np.square(np.sqrt(w1) - np.sqrt(w2)).sum()
    found = fid.frechet_distance(np.zeros(20), q * w1 @ q.T, np.zeros(20), q * w2 @ q.T)
    assert found == pytest.approx(expected, abs=1e-6)


def test_is_a_symmetric_distance_that_no_rotation_changes():
    (m1, c1, _), (m2, c2, _) = gaussian(12, 100), gaussian(12, 100, seed=1)
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]
    distance = fid.frechet_distance(m1, c1, m2, c2)
    assert 0 <= fid.frechet_distance(m1, c1, m1, c1) < 1e-8
    assert fid.frechet_distance(m1, c1, m1 + 1, c1) == pytest.approx(12, abs=1e-8)  # nothing is hidden by the clip at 0
    assert fid.frechet_distance(m2, c2, m1, c1) == pytest.approx(distance, rel=1e-10)
    rotated = fid.frechet_distance(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T)
    assert rotated == pytest.approx(distance, rel=1e-10)


def test_fewer_images_than_dimensions_against_the_nuclear_norm():
    (m1, c1, x), (m2, c2, y) = gaussian(64, 20), gaussian(64, 30, seed=1)
    nuclear = np.linalg.norm((x - m1) @ (y - m2).T, "nuc") / np.sqrt((20 - 1) * (30 - 1))
    expected = np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * nuclear
    assert fid.frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-7)


def test_more_images_than_dimensions_against_both_other_tools(monkeypatch):
    from pytorch_fid.fid_score import calculate_frechet_distance
    from scipy import linalg
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    sqrtm = linalg.sqrtm
    monkeypatch.setattr(linalg, "sqrtm", lambda product, disp=True: (sqrtm(product), 0.0))  # scipy 1.18 has no `disp`
    (m1, c1, _), (m2, c2, _) = gaussian(64, 400), gaussian(64, 300, seed=1)
    found = fid.frechet_distance(m1, c1, m2, c2)
    assert found == pytest.approx(calculate_frechet_distance(m1, c1, m2, c2), rel=1e-8)
    sides = {"mu": m1, "sigma": c1}, {"mu": m2, "sigma": c2}
    assert found == pytest.approx(fid_statistics_to_metric(*sides, False)["frechet_inception_distance"], rel=1e-8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0], [[1]], [0, 0], np.eye(2)), "first Gaussian is 1-d, the second 2-d"),
        (([0, 0], [[1]], [0], [[1]]), r"first Gaussian has a mean \(2,\) and a covariance \(1, 1\)"),
        (([0], [[1]], [np.nan], [[1]]), "second Gaussian has NaN"),
        (([0, 0], [[1, 2], [0, 1]], [0, 0], np.eye(2)), "not symmetric"),
        (([0, 0], [[1, 0], [0, -1]], [0, 0], np.eye(2)), "eigenvalue -1 below 0"),
    ],
)
def test_frechet_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        fid.frechet_distance(*arguments)


# What is no mean or no covariance, on either side

ONES = np.ones(8)
DAMAGED = {  # mean, covariance, the sentence after the name
    "one eigenvalue far below 0": (ONES, with_eigenvalues([1] * 7 + [-0.01]), "eigenvalue -0.01 below 0"),
    "all of them": (ONES, -np.eye(8), "eigenvalue -1 below 0"),
    "a variance below 0": (ONES, np.diag([1.0] * 7 + [-3.0]), "eigenvalue -3 below 0"),
    "tiny numbers": (ONES, 1e-200 * with_eigenvalues([1] * 7 + [-1]), "eigenvalue -1e-200 below 0"),
    "a complex covariance": (ONES, np.eye(8) + 1e-3j, "a covariance of complex128; expected real numbers"),
    "complex without an imaginary part": (ONES, np.eye(8).astype(complex), "a covariance of complex128"),
    "a complex mean": (ONES * 1j, np.eye(8), "a mean of complex128; expected real numbers"),
    "booleans": (ONES, np.eye(8, dtype=bool), "a covariance of bool; expected real numbers"),
    "text": (ONES.astype(str), np.eye(8), "a mean of <U"),
    "NaN": (ONES, np.full((8, 8), np.nan), "NaN or infinite entries"),
    "an infinity": (np.array([1.0] * 7 + [-np.inf]), np.eye(8), "NaN or infinite entries"),
    "numbers whose squares are infinite": (ONES, 1e200 * np.eye(8), "entries, or some beyond 1e100"),
    "more than float64 holds": (ONES.astype(np.longdouble) * np.longdouble("1e4000"), np.eye(8), "infinite entries"),
    "not symmetric": (ONES, np.eye(8) + np.triu(ONES, 1), "not symmetric"),
    "other shapes": (ONES, np.eye(7), r"a mean \(8,\) and a covariance \(7, 7\)"),
    "a stack": (ONES[None], np.eye(8), r"a mean \(1, 8\)"),
    "nothing": (ONES[:0], np.eye(0), r"a mean \(0,\) and a covariance \(0, 0\); expected \(D,\)"),
    "a number": (np.float64(1), np.float64(1), r"a mean \(\) and a covariance \(\)"),
}


@pytest.mark.parametrize(("mean", "cov", "sentence"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_statistics_are_refused_on_both_sides(mean, cov, sentence, tmp_path):
    """Each named: by its file, whichever tool's, by the one who made it, or as the first or the second Gaussian."""
    bad, good = {"mu": mean, "sigma": cov}, {"mu": np.zeros(8), "sigma": np.eye(8)}
    np.savez(tmp_path / "good.npz", **good)
    np.savez(tmp_path / "bad.npz", **bad)
    np.savez(tmp_path / "ref.npz", ref_mu=mean, ref_sigma=cov)
    np.savez(tmp_path / "spatial.npz", **good, mu_s=mean, sigma_s=cov)
    for name, where in (("bad.npz", ""), ("ref.npz", ""), ("spatial.npz", r" \(spatial\)")):
        for sides in ((name, "good.npz"), ("good.npz", name)):
            with pytest.raises(ValueError, match=rf"{name}'{where} has .*{sentence}"):
                fid.compare(*(tmp_path / side for side in sides))
        with pytest.raises(ValueError, match=rf"{name}'{where} has .*{sentence}"):
            fid.evaluate(tmp_path / name, tmp_path / "good.npz")
    with pytest.raises(ValueError, match=f"'made here' has .*{sentence}"):
        reference_of({"features": fid.Statistics(mean, cov)}, None, None, None)
    for given, which in (((mean, cov, ONES, np.eye(8)), "first"), ((ONES, np.eye(8), mean, cov), "second")):
        with pytest.raises(ValueError, match=f"the {which} Gaussian has .*{sentence}"):
            fid.frechet_distance(*given)


def test_damaged_statistics_of_other_tools_are_refused(tmp_path):
    bad = {"mu": ONES, "sigma": with_eigenvalues([1] * 7 + [-0.01])}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": bad, "num_images": 9}))
    torch.save(bad, tmp_path / "torch_fidelity.pt")
    np.savez(tmp_path / "good.npz", mu=ONES, sigma=np.eye(8))
    for name in ("edm2.pkl", "torch_fidelity.pt"):
        for sides in ((name, "good.npz"), ("good.npz", name)):
            with pytest.raises(ValueError, match=f"{name}' has a covariance with the eigenvalue -0.01 below 0"):
                fid.compare(*(tmp_path / side for side in sides))


def test_a_covariance_that_would_make_the_distance_0(tmp_path, capsys):
    """All of its eigenvalues are below 0 by about 1, so that tr (cov1 cov2)^(1/2) has no real term at all."""
    mean, cov, _ = gaussian(64, 500)
    cov /= np.linalg.eigvalsh(cov)[-1]
    np.savez(tmp_path / "a.npz", mu=mean, sigma=cov - 2 * np.eye(64))
    np.savez(tmp_path / "b.npz", mu=mean, sigma=cov)
    for command in ("compare a.npz b.npz", "compare b.npz a.npz", "eval a.npz --ref b.npz", "eval b.npz --ref a.npz"):
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / word) if word.endswith("npz") else word for word in command.split()])
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert "a.npz' has a covariance with the eigenvalue -2 below 0 (the largest is -1)" in printed.err
        assert printed.out == ""


def test_an_eigenvalue_below_0_is_rounding_up_to_a_bound():
    w = np.linspace(0.1, 1, 30)
    for times, refused in ((0.9, False), (1.1, True)):  # the Cholesky factorisation tells them apart by far finer steps
        cov = with_eigenvalues([-times * TOLERANCE * np.linalg.norm(w), *w])
        for given in ((cov, np.eye(31)), (np.eye(31), cov)):
            if refused:
                with pytest.raises(ValueError, match="below 0"):
                    fid.frechet_distance(np.zeros(31), given[0], np.zeros(31), given[1])
            else:
                found = fid.frechet_distance(np.zeros(31), given[0], np.zeros(31), given[1])
                assert found == pytest.approx(np.square(1 - np.sqrt([0, *w])).sum(), abs=1e-3)  # it is taken as about 0


def test_float32_covariances_of_few_images_are_taken_on_both_sides():
    """Rounding leaves eigenvalues of up to 6e-8 |cov|_F (Weyl's bound) in the 45 directions that have no variance.

    The roots of those of M, e = 6e-8 |cov1|_F |cov2|_F, are added up: 2 * 45 e^(1/2).
    """
    (m1, c1, x), (m2, c2, y) = gaussian(64, 20), gaussian(64, 30, seed=1)
    nuclear = np.linalg.norm((x - m1) @ (y - m2).T, "nuc") / np.sqrt((20 - 1) * (30 - 1))
    expected = np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * nuclear
    short = [array.astype(np.float32) for array in (m1, c1, m2, c2)]
    assert np.linalg.eigvalsh(short[1].astype(np.float64))[0] < 0
    most = 2 * 45 * np.sqrt(6e-8 * np.linalg.norm(c1) * np.linalg.norm(c2))
    assert most < 0.01 * expected
    assert fid.frechet_distance(*short) == pytest.approx(expected, abs=most)
    assert fid.frechet_distance(*short[2:], *short[:2]) == pytest.approx(expected, abs=most)
    assert 0 <= fid.frechet_distance(*short[:2], *short[:2]) < most


def test_a_covariance_of_0_is_one():
    """Of equal images; the distance is the variance of the other side."""
    mean, cov, _ = gaussian(8, 100)
    for given in ((mean, 0 * cov, mean, cov), (mean, cov, mean, 0 * cov)):
        assert fid.frechet_distance(*given) == pytest.approx(np.trace(cov), rel=1e-12)
    assert fid.frechet_distance(mean, 0 * cov, mean, 0 * cov) == 0


def test_a_term_far_below_0_is_never_0():
    with pytest.raises(ValueError, match="have the distance -3, below 0; one of them is damaged"):
        frechet_terms(np.zeros(3), np.eye(3), np.zeros(3), -2 * np.eye(3))


@pytest.mark.parametrize("value", [-5, 0, 1, 2.7, np.nan, np.inf, True, 1j, "50", [3, 4], []])
def test_a_number_of_images_that_is_none(value, tmp_path):
    good = {"mu": ONES, "sigma": np.eye(8)}
    np.savez(tmp_path / "good.npz", **good, num_images=50_000.0)
    np.savez(tmp_path / "bad.npz", **good, num_images=value)
    assert fid.load_ref(tmp_path / "good.npz").num_images == 50_000
    for sides in (("bad.npz", "good.npz"), ("good.npz", "bad.npz")):
        with pytest.raises(ValueError, match=r"bad.npz' has the num_images .* must be a whole number from 2"):
            fid.compare(*(tmp_path / side for side in sides))
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fid": good, "num_images": value}))
    sentence = "nothing in it was run" if isinstance(value, complex) else "has the num_images .* must be a whole"
    with pytest.raises(ValueError, match=f"bad.pkl' .*{sentence}"):
        fid.load_ref(tmp_path / "bad.pkl")
    if not isinstance(value, list):
        np.savez(tmp_path / "bad.npz", **good, crop=value if value != 1 else -256)
        with pytest.raises(ValueError, match=r"bad.npz' has the crop .* must be a whole number from 1"):
            fid.load_ref(tmp_path / "bad.npz")


def test_widths_that_differ_in_one_output(tmp_path):
    good = {"mu": ONES, "sigma": np.eye(8)}
    np.savez(tmp_path / "a.npz", **good, mu_s=ONES, sigma_s=np.eye(8))
    np.savez(tmp_path / "b.npz", **good, mu_s=ONES[:5], sigma_s=np.eye(5))
    with pytest.raises(ValueError, match=r"reference is 5-d in spatial, '.*a.npz' is 8-d"):
        fid.compare(tmp_path / "a.npz", tmp_path / "b.npz")


# Moments and statistics


@pytest.mark.parametrize("batch_size", [1, 7, 64, 600, 1300])
@pytest.mark.parametrize("offset", [0, 1000])
def test_moments_equal_numpy_under_any_split(batch_size, offset):
    x = gaussian(8, 1300)[2] + offset
    moments = fid.Moments(8)
    for batch in torch.from_numpy(x).split(batch_size):
        moments.update(batch)
    cov = np.cov(x, rowvar=False)
    assert moments.num == 1300
    assert np.abs(moments.mean - x.mean(0)).max() <= 1e-12 * np.abs(x).max()
    assert np.abs(moments.cov - cov).max() <= 1e-12 * np.abs(cov).max()


def test_moments_may_be_read_on_the_way():
    x = torch.from_numpy(gaussian(4, 50)[2])
    moments = fid.Moments(4)
    for batch in x.split(10):
        moments.update(batch)
        if moments.num >= 20:
            np.testing.assert_allclose(moments.cov, np.cov(x[: moments.num].numpy(), rowvar=False), rtol=1e-11)


def test_moments_refuse():
    moments = fid.Moments(3)
    moments.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        _ = moments.cov
    with pytest.raises(ValueError, match=r"shape \(2, 4\); expected \(B, 3\)"):
        moments.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="sample index 2"):
        moments.update(torch.tensor([[0, 0, 0], [0, torch.inf, 0]]))


@pytest.mark.parametrize("groups", [1, 10])
@pytest.mark.parametrize("offset", [0, 1000])
def test_groups_states_and_order_change_nothing(groups, offset):
    x = gaussian(8, 1500)[2] + offset
    order = np.random.default_rng(3).permutation(1500)
    parts = [fid.Moments(8, groups), fid.Moments(8, groups)]
    for k, chosen in enumerate(np.array_split(order, 13)):
        parts[k % 2].update(torch.from_numpy(x[chosen]), torch.from_numpy(chosen))
    whole = fid.Moments(8, groups)
    for part in parts:
        whole.load_state_dict(part.state_dict())
    cov = np.cov(x, rowvar=False)
    assert np.abs(whole.mean - x.mean(0)).max() <= 1e-12 * np.abs(x).max()
    assert np.abs(whole.cov - cov).max() <= 1e-12 * np.abs(cov).max()
    group = hashes(1500) % np.uint64(groups)
    for k, left in enumerate(whole.leave_one_out()):
        rest = x[group != k]
        assert left.num == len(rest)
        np.testing.assert_allclose(left.cov, np.cov(rest, rowvar=False), rtol=1e-9, atol=1e-11)
    assert groups == 1 or k == 9


def hashes(num):
    """Of 0 ... num - 1, as unsigned numbers of 64 bits."""
    return splitmix64(torch.arange(num)).numpy().view(np.uint64)


def test_splitmix64_is_the_published_generator():
    assert int(hashes(1)[0]) == 0xE220A8397B1DCDAF  # its first output from seed 0
    counts = np.bincount((hashes(50_000) % np.uint64(10)).astype(int))
    assert np.abs(counts - 5000).max() < 4 * np.sqrt(4500)
    classes = [len(set((np.arange(50_000) % 1000)[hashes(50_000) % np.uint64(10) == k])) for k in range(10)]
    assert min(classes) > 950  # a group holds almost all of 1000 classes in turn


TWO_PROCESSES = """
import sys, numpy as np, torch, torch.distributed as dist, fid
from fid.distributed import all_gather
dist.init_process_group("gloo")
rank = dist.get_rank()
x = np.load(sys.argv[1])
moments = fid.Moments(x.shape[1], groups=10)
for k in range(rank * 7, len(x), 14):  # batches of 7 in turn; the last one is short
    moments.update(torch.from_numpy(x[k : k + 7]), torch.arange(k, min(k + 7, len(x))))
empty = fid.Moments(x.shape[1])
if rank == 1:
    empty.update(torch.from_numpy(x))
moments.all_reduce()
empty.all_reduce()
first = next(moments.leave_one_out()).cov
found = {"mean": moments.mean, "cov": moments.cov, "num": moments.num, "first": first, "alone": empty.cov}
np.savez(f"{sys.argv[2]}/{rank}.npz", **found)
dist.destroy_process_group()
"""


def test_two_processes_have_the_moments_of_one(tmp_path):
    x = gaussian(16, 1201)[2] + 100
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "x.npy"), str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    cov = np.cov(x, rowvar=False)
    one = fid.Moments(16, groups=10)
    one.update(torch.from_numpy(x))
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        assert found["num"] == 1201
        assert np.abs(found["mean"] - x.mean(0)).max() <= 1e-12 * np.abs(x).max()
        for name in ("cov", "alone"):
            assert np.abs(found[name] - cov).max() <= 1e-12 * np.abs(cov).max()
        np.testing.assert_allclose(found["first"], next(one.leave_one_out()).cov, rtol=1e-10)


def test_moments_states_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(1, 3, 3\) \(groups, D, D\) does not fit into \(1, 4, 4\)"):
        fid.Moments(4).load_state_dict(fid.Moments(3).state_dict())


# Error bars


def test_noise_floor_and_jackknife_against_simulation():
    """Perfect samples of a Gaussian: the floor is their mean distance, the jackknife their spread and their bias."""
    rng = np.random.default_rng(0)
    dim, num, shift = 24, 2000, 0.4
    scales = np.arange(1, dim + 1) ** -0.4
    H, mean = np.diag(scales), np.zeros(dim)
    values, errors, limits, floors = [], [], [], []
    for _ in range(40):
        x = rng.normal(size=(num, dim)) * scales
        moments = fid.Moments(dim, groups=10)
        moments.update(torch.from_numpy(x))
        floors.append(sum(frechet_terms(mean, H, moments.mean, moments.cov)))
        moments = fid.Moments(dim, groups=10)
        moments.update(torch.from_numpy(1.3 * x + shift))
        value = sum(frechet_terms(mean, H, moments.mean, moments.cov))
        error, limit = jackknife(value, [sum(frechet_terms(mean, H, s.mean, s.cov)) for s in moments.leave_one_out()])
        values.append(value), errors.append(error), limits.append(limit)
    assert np.mean(floors) == pytest.approx(noise_floor(H, num), rel=0.06)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.25)
    true = dim * shift**2 + 0.3**2 * np.square(scales).sum()
    assert abs(np.mean(limits) - true) < 3 * np.std(limits) / np.sqrt(40)  # no bias is left ...
    assert np.mean(values) - true > 3 * np.std(values) / np.sqrt(40)  # ... where there was one


def test_noise_floor_of_a_singular_covariance():
    assert noise_floor(np.diag([2.0, 0.0]), 10) == pytest.approx((1.25 * 4 + 0.5 * 2) / 10)
    w = np.array([1.0, 3.0])
    pairs = sum(a * b / (a + b) for a in w for b in w)
    assert noise_floor(factor(np.diag(w)), 100) == pytest.approx((1.25 * 4 + 0.5 * pairs) / 100)


# The evaluator


def test_evaluator_against_numpy(tmp_path):
    mine, real = random_images(300, seed=1), random_images(200, seed=2) // 2
    x, y = features_of(mine), features_of(real)
    moments = (y.mean(0), np.cov(y, rowvar=False), x.mean(0), np.cov(x, rowvar=False))
    ev = fid.Evaluator(torch.from_numpy(real), extractor=Mean(), metrics=("fd", "pr", "kid", "dc", "mind", "is"))
    for chosen in np.array_split(np.random.default_rng(0).permutation(300), 7):  # in any order
        ev.update(torch.from_numpy(mine[chosen]), chosen)
    result = ev.compute(300, step=12)
    assert result.fd == pytest.approx(fid.frechet_distance(*moments), rel=1e-8)
    assert result.fd_mean_term == pytest.approx(np.square(x.mean(0) - y.mean(0)).sum(), rel=1e-6)
    assert result.fd_mean_term + result.fd_cov_term == pytest.approx(result.fd)
    rows_x, rows_y = torch.from_numpy(x), torch.from_numpy(y)
    assert (result.precision, result.recall) == precision_recall(rows_y, rows_x, arithmetic="adm-fp16")
    assert result.mind == pytest.approx(mind(rows_y, rows_x), rel=1e-5)
    with torch.no_grad():
        logits = Mean()(torch.from_numpy(mine).permute(0, 3, 1, 2))["logits"]
    assert result.inception_score == pytest.approx(inception_score(logits)[0], rel=1e-6)
    assert (result.record["step"], result.record["num_samples"]) == (12, 300)
    result.to_json(tmp_path / "x.json")
    again = fid.Result.from_json(tmp_path / "x.json")
    written = json.loads((tmp_path / "x.json").read_text())
    assert written.pop("checksum").startswith("xxh3:")
    assert again.to_dict() == written == result.to_dict()
    with pytest.raises(AttributeError, match="no 'sfid'; it has fd"):
        _ = result.sfid


def test_the_digest_of_an_image_is_a_sum_modulo_2_to_the_64():
    image = torch.from_numpy(random_images(1)[0]).permute(2, 0, 1)
    weights = [int(w) for w in hashes(image.numel())]
    slow = sum(p * w for p, w in zip(image.flatten().tolist(), weights, strict=True)) % 2**64
    others = [image, image.flip(0), image.flip(1), image.flip(2), image // 2]
    assert int(digests(image[None])[0]) % 2**64 == slow
    assert len(set(digests(torch.stack(others * 3)).tolist())) == 5
    assert digests(image[None, :, :8]).tolist() == digests(image[None, :, :8].clone()).tolist()  # after a larger one


def test_a_buffer_may_be_written_into_again():
    images, buffer = torch.from_numpy(random_images(30)), torch.empty(7, 16, 16, 3, dtype=torch.uint8)
    ev = fid.Evaluator(images[:20], extractor=Mean(), batch_size=10)
    for k in range(0, 28, 7):
        buffer.copy_(images[k : k + 7])
        ev.update(buffer)
    assert ev.compute().fd == pytest.approx(fid.evaluate(images[:28], images[:20], Mean()).fd, rel=1e-12)


def test_the_same_images_have_distance_zero():
    images = torch.from_numpy(random_images(400))
    result = fid.evaluate(images, images, Mean())
    assert result.fd < 1e-12
    assert "far below the noise floor: are these the reference's own images?" in " ".join(result.warnings)
    other = torch.from_numpy(random_images(400, seed=1))
    assert "noise floor" not in " ".join(fid.evaluate(other, images, Mean()).warnings)


def test_resumed_it_gives_what_one_go_gives():
    mine, real = torch.from_numpy(random_images(90, seed=1)), torch.from_numpy(random_images(80, seed=2))
    options = {"extractor": Mean(), "metrics": ("fd", "pr", "is"), "batch_size": 8}
    one = fid.Evaluator(real, **options).update(mine).compute()
    states = [fid.Evaluator(real, **options).update(mine[:50], range(50)).state_dict()]
    states.append(fid.Evaluator(real, **options).update(mine[50:85], range(50, 85)).state_dict())
    ev = fid.Evaluator(real, **options)
    for state in reversed(states):
        ev.load_state_dict(state)
    assert ev.seen == set(range(85))
    found = ev.update(mine[85:], range(85, 90)).compute()
    assert found.values.pop("pr") == one.values.pop("pr")
    assert found.values == pytest.approx(one.values, rel=1e-11)
    with pytest.raises(ValueError, match="images that are here already"):
        ev.load_state_dict(states[0])
    with pytest.raises(ValueError, match="other metrics"):
        fid.Evaluator(real, extractor=Mean()).load_state_dict(states[0])


def test_a_state_is_of_the_moment_when_it_was_taken():
    mine, real = torch.from_numpy(random_images(90, seed=1)), torch.from_numpy(random_images(80, seed=2))
    ev = fid.Evaluator(real, extractor=Mean()).update(mine[:30])
    expected, state = ev.compute().fd, ev.state_dict()
    ev.update(mine[30:])
    again = fid.Evaluator(real, extractor=Mean())
    again.load_state_dict(state)
    assert again.compute(30).fd == pytest.approx(expected, rel=1e-12)


def test_the_first_of_many_images():
    mine, real = torch.from_numpy(random_images(90, seed=1)), torch.from_numpy(random_images(80, seed=2))
    expected = fid.evaluate(mine[:50], real, Mean()).fd
    for source in (mine, fid.Images(mine), mine.split(9), mine.numpy(), zip(mine.split(9), [None] * 10, strict=True)):
        assert fid.evaluate(source, real, Mean(), num=50).fd == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="only 90 of 1000 samples in a tensor. FID-90 is not comparable with FID-1K"):
        fid.evaluate(fid.Images(mine), real, Mean(), num=1000)
    assert fid.evaluate(fid.Images(mine), real, Mean(), num=1000, allow_fewer=True).record["num_samples"] == 90


def test_all_statistics_can_be_kept_whatever_the_metrics():
    images = torch.from_numpy(random_images(40))
    ev = fid.Evaluator(images, extractor=Mean(), metrics=("kid",), keep_statistics=True).update(images)
    x = features_of(images.numpy())
    np.testing.assert_allclose(ev.statistics().statistics["features"].cov, np.cov(x, rowvar=False), atol=1e-7)


def test_every_batch_is_full_and_in_evaluation_mode():
    spy = Mean()
    images = torch.from_numpy(random_images(10))
    found = fid.statistics(images, spy, batch_size=4)
    assert spy.seen == [(4, False, False)] * 3
    np.testing.assert_allclose(found.statistics["features"].mean[:3], images.double().mean((0, 1, 2)) / 255, rtol=1e-6)
    assert (found.num_images, found.extractor) == (10, "mean-00000000")
    with pytest.raises(ValueError, match="batch_size is 0"):
        fid.statistics(images, spy, batch_size=0)


def test_an_iterator_of_batches():
    images = torch.from_numpy(random_images(40))
    whole = fid.evaluate(images, images[:30], Mean())
    found = fid.evaluate((images[k : k + 7].permute(0, 3, 1, 2) for k in range(0, 40, 7)), images[:30], Mean())
    assert found.fd == pytest.approx(whole.fd, rel=1e-12)
    assert fid.evaluate(images.split(16), images[:30], Mean(), num=20).record["num_samples"] == 20
    with pytest.raises(ValueError, match="only 40 of 50 samples in the iterator"):
        fid.evaluate(images.split(16), images[:30], Mean(), num=50)


def test_what_is_doubtful_is_said():
    mine = random_images(40, seed=1)
    mine[7], mine[9] = mine[3], (128, 0, 255)
    text = " ".join(fid.evaluate(torch.from_numpy(mine), torch.from_numpy(random_images(40)), Mean()).warnings)
    assert "1 of 40 samples are exact duplicates" in text
    assert "1 of 40 samples have one colour" in text
    assert "mean colour" not in text
    red = random_images(40, seed=2) // np.array([1, 2, 4], dtype=np.uint8)
    for image, sentence in ((red[..., ::-1], "red and blue swapped"), (red // 4, "a wrong range")):
        ev = fid.Evaluator(torch.from_numpy(red), extractor=Mean())
        assert sentence in " ".join(ev.update(torch.from_numpy(image.copy())).compute().warnings)
    warm = (random_images(40) // 8 + np.array([120, 110, 100])).astype(np.uint8)  # ImageNet's colours lie this close
    ev = fid.Evaluator(torch.from_numpy(warm), extractor=Mean())
    assert "red and blue swapped" in " ".join(ev.update(torch.from_numpy(warm[..., ::-1].copy())).compute().warnings)
    large = torch.from_numpy(random_images(40, size=20, seed=2))
    assert "samples are 16x16, the reference's images 20x20" in " ".join(
        fid.evaluate(torch.from_numpy(mine), large, Mean()).warnings
    )
    ev = fid.Evaluator(torch.from_numpy(red), extractor=Mean()).update(torch.from_numpy(red), labels=[0] * 39 + [1])
    result = ev.compute(labels_mode="random", quantize="dit")
    assert result.record["quantize"] == "dit"
    assert result.record["labels"] == {"mode": "random", "min": 1, "max": 39, "classes": 2}
    ev = fid.Evaluator(torch.from_numpy(red), extractor=Mean()).update(torch.from_numpy(red), labels=[0, 1] * 20)
    assert ev.compute().record["labels"] == {"mode": "balanced", "min": 20, "max": 20, "classes": 2}
    assert result.record["input"]["class_sorted"] is True
    many = torch.from_numpy(random_images(5100, size=4))
    ev = fid.Evaluator(None, extractor=Mean(), metrics=("is",), device="cpu")
    for labels, said in ((sorted(range(5100)), True), ([1, 0] * 2550, False)):
        ev.reset()
        warnings = ev.update(many, labels=[label % 5100 // 51 for label in labels]).compute().warnings
        assert ("in the order of their classes" in " ".join(warnings)) is said
    assert "unbalanced: 1 to 39" in " ".join(result.warnings)


@pytest.mark.parametrize(("factor", "kind"), [(0.0, "only zeros"), (1e-9, "the same numbers")])
def test_features_that_tell_nothing_apart_are_refused(factor, kind, tmp_path):
    class Weak(Mean):
        def forward(self, images):
            found = super().forward(images)["features"]
            return {"features": found * factor + (factor > 0), "logits": found}  # 1 + 1e-9 x is 1 in float32

    mine, real = (torch.from_numpy(random_images(20, seed=seed)) for seed in (1, 2))
    statistics = reference_of({"features": fid.Statistics(np.zeros(6), np.eye(6), 20)}, 20, None, None)
    for reference, what in ((real, "20 images of the reference"), (statistics, "20 samples")):
        with pytest.raises(ValueError, match=rf"^mean-00000000 gives {kind} \(features\) for all {what}, so"):
            fid.evaluate(mine, reference, Weak())
    with pytest.raises(ValueError, match="for all 20 images, so"):
        fid.statistics(mine, Weak())
    one = mine[:1].expand(20, -1, -1, -1)  # this says something of the samples, and not of the network
    assert "19 of 20 samples are exact duplicates" in " ".join(fid.evaluate(one, real, Mean()).warnings)


def test_an_extractor_of_ones_own():
    class Colours(fid.FeatureExtractor):
        dims = {"features": 3}

        def forward(self, images):
            return {"features": images.float().mean(dim=(2, 3))}

    class Misnamed(nn.Module):
        def forward(self, images):
            return {"feature": images.float().mean(dim=(2, 3))}

    class Plain(nn.Module):
        def forward(self, images):
            return {"features": images.float().mean(dim=(2, 3))}

    mine, real = random_images(50, seed=1), random_images(60, seed=2) // 2
    x, y = (images.mean(axis=(1, 2)) for images in (mine, real))
    expected = fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    result = fid.evaluate(mine, real, Colours())
    assert result.fd == pytest.approx(expected, rel=1e-6)
    assert result.record["extractor"] == "colours-e3b0c442"  # it has no weights: of nothing
    plain = fid.evaluate(mine, real, Plain())
    assert (plain.fd, plain.record["extractor"]) == (result.fd, "plain-e3b0c442")
    for extractor, sentence in (
        (nn.Linear(2, 2), "the extractor Linear failed on an image of 64x64 pixels"),
        ("classifier", "the extractor is a name; make it first: fid.build_extractor"),
        (Misnamed(), r"the extractor Misnamed gives \['feature'\]; it has to give features"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fid.Evaluator(None, extractor=extractor)


def test_what_is_set_around_does_not_reach_an_extractor():
    class Product(fid.FeatureExtractor):
        dims = {"features": 4}

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(768, 4))

        def forward(self, images):
            return {"features": images.float().flatten(1) @ self.weight}

    torch.manual_seed(0)
    images, product = random_images(50), Product()
    plain = fid.evaluate(images[:30], images[20:], product).fd
    with torch.autocast("cpu", torch.bfloat16):
        assert fid.evaluate(images[:30], images[20:], product).fd == plain


def test_evaluator_refuses(files):
    images = torch.from_numpy(random_images(20))
    ev = fid.Evaluator(images, extractor=Mean())
    with pytest.raises(ValueError, match="no metric is called 'fix'; choose from fid, fd"):
        fid.Evaluator(images, extractor=Mean(), metrics=("fix",))
    with pytest.raises(ValueError, match="fid: it is defined by Inception; with mean-00000000 choose fd"):
        fid.Evaluator(images, extractor=Mean(), metrics=("fid",))
    with pytest.raises(ValueError, match="sfid: mean-00000000 has no output 'spatial'"):
        fid.Evaluator(images, extractor=Mean(), metrics=("sfid",))
    with pytest.raises(ValueError, match="fd: there is no reference"):
        fid.Evaluator(None, extractor=Mean())
    with pytest.raises(ValueError, match="image 3 was given twice"):
        ev.update(images[:5]).update(images[:5], range(3, 8))
    with pytest.raises(
        ValueError, match=r"expected uint8 images .* got float32 in \[0\.00, 255\.00\]\. .* x\.round\(\)"
    ):
        ev.update(images.float(), range(10, 30))
    with pytest.raises(ValueError, match="5 samples were added, not 6"):
        ev.compute(6)
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        fid.Evaluator(images, extractor=Mean()).update(images[:1]).compute()
    with pytest.raises(ValueError, match="pr_compat is 'fp8'"):
        fid.Evaluator(images, extractor=Mean(), pr_compat="fp8")
    with pytest.raises(ValueError, match="reference is 64-d, the extractor gives 6-d"):
        fid.Evaluator(files / "a.npz", extractor=Mean())
    bad = Mean()
    bad.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match=r"non-finite features for sample index 40 \(rank 0\)"):
        fid.Evaluator(images, extractor=bad).update(images, range(40, 60)).compute()


def test_a_reference_of_another_protocol_is_refused(tmp_path):
    mean, cov, _ = gaussian(6, 20)
    path = tmp_path / "x.npz"
    one = {"features": fid.Statistics(mean, cov, 20)}
    other = Mean()
    other.preset, other.name = "adm", "inception-adm-0"
    fid.save_reference(path, reference_of(one, 20, "inception-pytorch-fid-0", "pytorch-fid"))
    with pytest.raises(ValueError, match="preset 'pytorch-fid', samples with 'adm'; FID would mix two resizes"):
        fid.Evaluator(path, extractor=other)
    assert "mix two resizes" in fid.Evaluator(path, extractor=other, force=True).warnings[0]
    fid.save_reference(path, reference_of(one, 20, "inception-adm-1", "adm"))
    with pytest.raises(ValueError, match="made with inception-adm-1, samples with inception-adm-0"):
        fid.Evaluator(path, extractor=other)
    fid.save_reference(tmp_path / "y.npz", reference_of(one, 20, "inception-pytorch-fid-0", "pytorch-fid"))
    with pytest.raises(ValueError, match="preset 'pytorch-fid', samples with 'adm'; FID would mix two resizes"):
        fid.compare(path, tmp_path / "y.npz")
    assert fid.compare(path, tmp_path / "y.npz", force=True).fd < 1e-8
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=cov, mu_s=mean, sigma_s=cov)
    with pytest.raises(ValueError, match="preset 'adm', samples with 'pytorch-fid'; FID would mix two resizes"):
        fid.compare(tmp_path / "y.npz", tmp_path / "adm.npz")
    np.savez(path, mu=mean, sigma=cov)
    assert "does not say by which protocol" in fid.Evaluator(path, extractor=other).warnings[0]
    moments = fid.Moments(6)
    moments.update(torch.from_numpy(gaussian(6, 20)[2]))
    moments.save(tmp_path / "z.npz")
    assert fid.load_ref(tmp_path / "z.npz").num_images == 20
    assert fid.compare(tmp_path / "z.npz", path).fd < 1e-8


def test_what_the_reference_lacks(tmp_path):
    mean, cov, _ = gaussian(6, 20)
    np.savez(tmp_path / "x.npz", mu=mean, sigma=cov)
    judge = Mean()
    judge.metrics = ("fd", "pr")
    ev = fid.Evaluator(tmp_path / "x.npz", extractor=judge)
    assert ev.metrics == ("fd",)
    assert "left out pr: " in ev.warnings[-1]
    assert "has no images (arr_0)" in ev.warnings[-1]
    with pytest.raises(ValueError, match=r"cannot compute pr: .* has no images"):
        fid.Evaluator(tmp_path / "x.npz", extractor=Mean(), metrics=("pr",))


def test_table_line():
    values = {"fid": 2.2701, "fid_se": 0.021, "fid_noise_floor": 0.31, "sfid": 4.61, "inception_score": 278.2}
    values |= {"precision": 0.83, "recall": 0.57}
    record = {"label": "FID", "num_samples": 50_000, "reference": {"kind": "adm", "path": "x"}, "protocol": "adm"}
    record["labels"] = {"mode": "random"}
    line = str(fid.Result(values, record))
    assert line == (
        "FID 2.27 ± 0.02 (noise floor 0.31)  sFID 4.61  IS 278.2  P 0.83  R 0.57  (ADM ref, adm, 50000 random-label samples)"
    )
    assert str(fid.Result(values, {**record, "num_samples": 10_000})).startswith("FID-10K 2.27")


# The command line


def test_command_line(files, capsys):
    out = files / "result.json"
    classifier = fid.Classifier.load(files / "judge.safetensors")
    main(["eval", str(files / "b"), "--ref", str(files / "a.npz"), *judge(files), "--json", str(out)])
    expected = fid.evaluate(files / "b", files / "a", classifier)
    record = json.loads(out.read_text())
    assert record["fd"] == pytest.approx(expected.fd, rel=1e-6)
    assert (record["schema"], record["num_samples"], record["extractor"]) == (1, 70, classifier.name)
    assert record["reference"]["kind"] == "fid"
    assert len(record["reference"]["sha256"]) == 64
    printed = capsys.readouterr()
    assert printed.out.startswith(f"Frechet distance {expected.fd:.3g} ± ")
    assert printed.err == (
        "warning: the reference is of 100 images only: it is noisy itself, which the error bar does not show.\n"
    )
    assert printed.out.endswith(f"70 samples; compares only with numbers by {classifier.name})\n")

    main(
        [
            "eval",
            str(files / "b"),
            "--ref",
            str(files / "a"),
            *judge(files),
            "--num",
            "50",
            "--batch",
            "16",
            "--json",
            "-",
        ]
    )
    printed = capsys.readouterr()
    assert json.loads(printed.out)["num_samples"] == 50
    assert "warning: 50 samples in 64 dimensions" in printed.err


def test_compare_needs_no_network(tmp_path, capsys):
    mean, cov, _ = gaussian(4, 20)
    one = {"features": fid.Statistics(mean, cov, 1000), "spatial": fid.Statistics(mean, cov, 1000)}
    fid.save_reference(tmp_path / "x.npz", reference_of(one, 1000, "inception-adm-0", "adm"))
    np.savez(tmp_path / "y.npz", mu=mean + 1, sigma=cov)
    for command in (["compare", "x.npz", "y.npz"], ["eval", "x.npz", "--ref", "y.npz"]):
        main([command[0], *[str(tmp_path / c) if c.endswith("npz") else c for c in command[1:]]])
        assert capsys.readouterr().out.startswith("Frechet distance 4.00 (noise floor ")
    main(["compare", str(tmp_path / "x.npz"), str(tmp_path / "x.npz"), "--json", str(tmp_path / "z.json")])
    assert json.loads((tmp_path / "z.json").read_text())["sfid"] < 1e-8


def test_saved_statistics_and_features(files, tmp_path):
    stats, features = tmp_path / "s.npz", tmp_path / "f.npy"
    more = ["--save-stats", str(stats), "--save-features", str(features)]
    main(["eval", str(files / "b"), "--ref", str(files / "a.npz"), *judge(files), *more])
    rows = np.load(features)
    assert rows.shape == (70, 64)
    found = fid.load_ref(stats).statistics["features"]
    np.testing.assert_allclose(found.cov, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_two_processes_give_the_number_of_one(files, tmp_path):
    options = [*judge(files), "--metrics", "fd,pr,kid", "--batch", "8", "--quiet"]
    command = ["eval", str(files / "b"), "--ref", str(files / "a"), *options]
    main([*command, "--json", str(tmp_path / "1.json")])
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "fid",
        "--",
    ]
    done = subprocess.run(
        [*run, *command, "--json", str(tmp_path / "2.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert two["world_size"] == 2
    for name in ("fd", "fd_se", "fd_inf"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)  # roots of eigenvalues of about 0 magnify rounding
    for name in ("precision", "recall", "kid"):
        assert two[name] == one[name]


def test_neighbours_are_found_and_drawn(files, tmp_path, monkeypatch):
    images = random_images(60, seed=1)
    real = np.concatenate([random_images(40, seed=5), images[10:13]])  # three are memorised
    np.savez(tmp_path / "mine.npz", images)
    np.savez(tmp_path / "real.npz", real)
    samples = fid.Images(tmp_path / "mine.npz")
    ev = fid.Evaluator(tmp_path / "real.npz", extractor=Mean(), keep_features=True)
    fid.evaluate(samples, evaluator=ev)
    distances, index = fid.neighbours(ev, samples, tmp_path / "n.png", k=2, num=3)
    assert sorted(index[:, 0].tolist()) == [40, 41, 42]
    assert distances[:, 0].max() < 1e-3 < distances[:, 1].min()
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.size[0] > 3 * 96
    monkeypatch.setattr(fid.evaluator, "MAX_REFERENCE_ROWS", 10)  # what the metrics take; copies are found all the same
    ev = fid.Evaluator(tmp_path / "real.npz", extractor=Mean(), keep_features=True, batch_size=7)
    fid.evaluate(samples, evaluator=ev)
    assert len(ev.reference_side.rows["features"]) == 10
    again, same = fid.neighbours(ev, samples, tmp_path / "n.png", k=2, num=3)
    assert same.tolist() == index.tolist()
    np.testing.assert_allclose(again, distances, atol=1e-6)
    out = tmp_path / "command.png"
    main(
        ["eval", str(files / "b"), "--ref", str(files / "a"), *judge(files), "--neighbours", "3", "--picture", str(out)]
    )
    assert out.exists()
    with pytest.raises(ValueError, match="neighbours need the reference's images"):
        fid.neighbours(
            fid.Evaluator(files / "a.npz", extractor=fid.Classifier.load(files / "judge.safetensors")), samples, out
        )


def test_a_collector_keeps_few_tensors_and_their_order():
    """Thousands of little ones scatter in memory: 50,000 images took a third more than 1,000."""
    images = torch.from_numpy(random_images(300, 4)).permute(0, 3, 1, 2)
    order = torch.randperm(300, generator=torch.manual_seed(0))
    collector = Collector(Mean(), {}, ["features"], batch_size=2)
    for k in order.tolist():
        collector.update(images[k : k + 1], [k])
    parts = [collector.row_index, *collector.rows.values(), *collector.checks.values()]
    assert max(map(len, parts)) < 35
    assert torch.equal(torch.cat(collector.row_index), order)
    state = collector.state_dict()
    assert torch.equal(state["checks"]["index"], order)
    torch.testing.assert_close(state["rows"]["features"], Mean()(images[order])["features"].detach())


def test_curve(tmp_path, capsys):
    common = {"label": "FID", "protocol": "adm", "extractor": "inception-adm-0", "num_samples": 1000, "reference": None}
    records = [{**common, "step": k, "fid": 100 / k, "fid_se": 1.0 / k, "fid_noise_floor": 0.5} for k in (4, 1, 2)]
    (tmp_path / "fid.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:2]))
    (tmp_path / "x.json").write_text(json.dumps(records[2]))
    main(["curve", str(tmp_path / "fid.jsonl"), str(tmp_path / "x.json"), "--out", str(tmp_path / "c.png")])
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 800
    for broken, sentence in (
        ({"step": None}, "has no training step"),
        ({"num_samples": 2000}, "differ in num_samples"),
        ({"reference": {"path": "other"}}, "2 different references"),
        ({"fid": None}, "neither fid nor fd"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fid.curve([*records, {**records[0], **broken}], tmp_path / "c.png")
    with pytest.raises(ValueError, match="cannot draw"):
        fid.curve(records, tmp_path / "c.xyz")
    with pytest.raises(ValueError, match="no records"):
        fid.curve([], tmp_path / "c.png")
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
    (tmp_path / "a" / "fid.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for r in records[:2]:
        (tmp_path / "b" / f"fid-step-{r['step']}.json").write_text(json.dumps(r))
    found = read_records([tmp_path / "a", tmp_path / "b"])
    assert {name: len(run) for name, run in found.items()} == {str(tmp_path / "a"): 3, str(tmp_path / "b"): 2}
    main(["curve", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "two.png")])
    assert (tmp_path / "two.png").exists()
    (tmp_path / "b" / "fid-step-4.json").write_text(json.dumps({**records[0], "step": None}))
    with pytest.raises(ValueError, match=r"b/fid-step-4.json' has no training step"):
        fid.curve(read_records([tmp_path / "b"]), tmp_path / "c.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty' has no fid.jsonl"):
        read_records([tmp_path / "empty"])


def measured(step, cfg, value, **sample):
    sampler = {"name": "ode", "method": "euler", "num_steps": 26}
    how = {"sampler": sampler, "cfg_scale": float(cfg), "weights": {"part": "ema"}, "seed": 0, **sample}
    return {"label": "FID", "protocol": "adm", "num_samples": 1000, "step": step, "fid": value, "sample": how}


SDE = {"sampler": {"name": "sde", "method": "euler", "num_steps": 250, "last_step": "mean"}}
NARROW = {"weights": {"part": "ema-0.05"}}
GUIDED = {"guidance_interval": [0.0, 0.7]}


@pytest.mark.parametrize(
    ("x", "records", "lines"),
    [
        ("step", [measured(1, 1, 9), measured(2, 1, 8)], {"": [9, 8]}),  # one line needs no name
        ("step", [measured(1, 1, 9), measured(1, 2, 7), measured(2, 1, 8)], {"cfg 1": [9, 8], "cfg 2": [7]}),
        ("step", [measured(1, 1, 9), measured(1, 1, 5, **SDE)], {"ode": [9], "sde": [5]}),
        ("cfg_scale", [measured(1, 1, 9), measured(1, 2, 7), measured(2, 1, 8)], {"step 1": [9, 7], "step 2": [8]}),
        ("cfg_scale", [measured(1, 2, 9), measured(1, 2, 6, **NARROW)], {"ema": [9], "ema-0.05": [6]}),
        (  # without guidance there is no interval: the point at 1 begins both lines
            "cfg_scale",
            [measured(1, 1, 9), measured(1, 2, 7), measured(1, 2, 6, **GUIDED), measured(1, 4, 5, **GUIDED)],
            {"without interval": [9, 7], "interval [0, 0.7]": [9, 6, 5]},
        ),
        ("sampler.name", [measured(1, 1, 9), measured(1, 1, 5, **SDE)], {"": [9, 5]}),
    ],
)
def test_a_curve_has_a_line_for_each_way_of_drawing(x, records, lines):
    found = lines_of({"run": records}, x)
    assert {line: [record["fid"] for record in of] for line, of in found.items()} == lines


def test_two_runs_have_lines_of_their_own():
    records = [measured(1, 1, 9), measured(1, 10, 7), measured(1, 9, 8)]
    names = ["a, cfg 1", "a, cfg 9", "a, cfg 10", "b, cfg 1", "b, cfg 9", "b, cfg 10"]
    assert [*lines_of({"b": records, "a": records}, "step")] == names


def test_a_curve_over_guidance(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for scale, value in ((1, 9), (1.5, 4), (4, 6)):
        Path(f"fid-step-00000001-cfg-{scale}.json").write_text(json.dumps(measured(1, scale, value)))
    main(["curve", ".", "--x", "cfg", "--out", "c.png"])
    assert capsys.readouterr().out == "wrote c.png\n"
    assert Image.open("c.png").size == (1050, 600)
    del (record := measured(1, 1, 9))["sample"]
    Path("x.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        main(["curve", "x.json", "--x", "cfg", "--out", "c.png"])
    assert "'x.json' has no cfg_scale in its sample, so it has no place on a curve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["stats", "a", "--out", "x.txt"], "cannot write 'x.txt': it must end in .npz", 2),
        (["stats", "a", "--out", "nowhere/x.npz"], "in a folder that exists", 2),
        (["stats", "a.npz", "--out", "x.npz"], "arr_0", 2),
        (["stats", "a", "--out", "x.npz", "--num", "1"], "at least 2 images; got 1", 2),
        (["stats", "a", "--out", "x.npz", "--batch", "0"], "batch_size is 0", 2),
        (["eval", "nowhere", "--ref", "a.npz"], "'nowhere' does not exist", 2),
        (["eval", "a", "--ref", "nowhere.npz"], "the reference 'nowhere.npz' does not exist", 3),
        (["eval", "a", "--ref", "a.npz", "--weights", "nowhere"], "'nowhere' do not exist", 3),
        (["eval", "a", "--ref", "a.npz", "--json", "nowhere/x.json"], "cannot write", 2),
        (
            ["eval", "a", "--ref", "a.npz", "--num", "120"],
            "only 100 of 120 samples in a. FID-100 is not comparable with FID-120 (expected bias about +",
            2,
        ),
        (["eval", "a.npz", "--ref", "a.npz", "--num", "5"], "'a.npz' holds statistics, not images", 2),
        (["eval", "a.npz", "--ref", "a.npz", "--metrics", "kid"], "'a.npz' holds statistics, not images", 2),
        (["eval", "a", "--ref", "a.npz", "--metrics", "fid,pr"], "cannot compute fid: it is defined by Inception", 2),
        (["eval", "a", "--ref", "a.npz", "--neighbours", "3"], "'a.npz' has none (arr_0)", 2),
        (["eval", "a"], "there is no reference", 2),
        (["eval", "a.npz"], "there is no reference; name it with --ref", 2),
        (["eval", "a.npz", "--ref", "a"], "'a.npz' holds statistics, 'a' images: run `python -m fid stats`", 2),
        (["eval", "a", "--ref", "a", "--extractor", "pixels"], "pixels has no file of weights; leave --weights out", 2),
        (["eval", "a", "--ref", "a.npz", "--neighbours", "-2"], "'-2' is not a whole number from 0", 2),
        (
            ["eval", "a", "--ref", "a.npz", "--picture", "x.png"],
            "--picture is where --neighbours K draws; give both",
            2,
        ),
        (["eval", "a", "--ref", "a.npz", "--neighbours", "99"], "--neighbours is 99; a picture has room for 50", 2),
        (["eval", "a", "--ref", "a.npz", "--preset", "clean"], "the preset 'clean' is Inception's", 2),
        (["eval", "a", "--ref", "a.npz", "--groups", "-1"], "'-1' is not a whole number from 0", 2),
        (["eval", "a", "--ref", "a.npz", "--metrics", "fd, fix"], "no metric is called 'fix'", 2),
        (["eval", "a", "--ref", "a.npz", "--metrics", ""], "no metric is called ''", 2),
        (["eval", "a.npz", "--ref", "a.npz", "--num", "0"], "'a.npz' holds statistics, not images", 2),
        (["eval", "a", "--ref", "a.npz", "--num", "0"], "--num is 0; choose a number of images from 1 to", 2),
        (["eval", "a", "--ref", "a.npz", "--num", "9" * 20], f"--num is {'9' * 20}; choose a number", 2),
        (["stats", "a", "--out", "x.npz", "--num", "-3"], "--num is -3; choose a number of images from 1", 2),
        (["eval", "a", "--ref", "a.npz", "--groups", "1000000"], "groups is 1000000; choose a number of groups", 2),
        (["eval", "a", "--ref", "a.npz", "--batch", "1000000000"], "it must be at least 1, and at most 65536", 2),
        (["eval", "a", "--ref", "a.npz", "--batch", "-1"], "batch_size is -1; it must be at least 1", 2),
        (["stats", "a", "--out", "x.npz", "--keep-images", "-3"], "'-3' is not a whole number from 0", 2),
        (["eval", "a", "--ref", ""], "'' is no path; leave the option out, or name a file or folder", 2),
        (["eval", "a", "--ref", "a.npz", "--save-stats", "folder.npz"], "cannot write 'folder.npz': it is a folder", 2),
        (["eval", "a", "--ref", "n" * 300], "File name too long", 2),
        (["eval", "a", "--ref", "fifo.npz"], "'fifo.npz' is neither a folder", 2),
    ],
)
def test_a_wrong_command_ends_in_a_sentence(arguments, sentence, code, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    Path("folder.npz").mkdir(exist_ok=True)
    if not Path("fifo.npz").exists():
        os.mkfifo("fifo.npz")
    with pytest.raises(SystemExit) as ended:
        main([arguments[0], *arguments[1:2], *judge(files), *arguments[2:]])
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.startswith(("python -m fid: ", "usage: python -m fid "))
    assert ended.value.code == code
    assert not (files / "x.npz").exists()


PREFIXES = {"train": "fid.", "cache_latents": "fid.", "demo.__main__": "fid.", "sample": "fid_"}  # of settings


@pytest.mark.parametrize("program", PREFIXES)
@pytest.mark.parametrize("more", [[], ["--print_config"]])
@pytest.mark.parametrize(
    ("key", "given", "word", "meant"),
    [
        ("extractor", "clasifier", "clasifier", "classifier"),
        ("preset", "cleann", "cleann", "clean"),
        ("metrics", "[fid,midn]", "midn", "mind"),
    ],
)
def test_the_programs_know_networks_protocols_and_metrics_by_the_same_lists(
    program, more, key, given, word, meant, tmp_path, capsys
):
    setting = PREFIXES[program] + key
    config = Path(__file__).resolve().parents[1] / "configs" / "digits_sit.yaml"
    run = [tmp_path, "--fid", "x", "--num", 2]
    needed = run if program == "sample" else ["--config", config, "--run_dir", tmp_path]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main([*map(str, needed), f"--{setting}", given, *more])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert f": {setting} is {word!r}; did you mean {meant!r}? choose one of" in printed.err


@pytest.mark.parametrize("program", PREFIXES)
def test_help_lists_networks_protocols_and_metrics(program, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(fid.METRICS, "mine", None)
    with pytest.raises(SystemExit):
        importlib.import_module(program).main(["--help", "all"])
    printed = capsys.readouterr().out
    for name, form in {"extractor": "{%s}", "preset": "{%s}", "metrics": "[{%s},...]"}.items():
        assert f"--{PREFIXES[program]}{name} {form % ','.join(fid.CHOICES[name])}" in printed
    assert "kid,mind,mine}" in printed


@pytest.mark.parametrize("name", fid.METRICS)
def test_a_metric_says_which_numbers_it_gives(name):
    """By their names, `Result.from_json` tells numbers from the rest of a record."""
    metric, rng = fid.METRICS[name], np.random.default_rng(0)
    sides = []
    for _ in range(2):
        rows = torch.from_numpy(rng.normal(size=(60, 5)))
        moments = fid.Moments(5, 10)
        moments.update(rows)
        side = Side({metric.output: moments.statistics()}, {metric.output: moments.sums}, {metric.output: rows})
        sides.append(side)
    values = metric.compute(*sides, Options())
    assert tuple(values) == metric.numbers
    assert set(metric.columns) <= set(values)
    cells = metric.cells(values, {"label": "FID", "num_samples": 60})
    assert len(cells) == len(metric.columns)
    assert all(cells)


def test_fewer_samples_when_that_is_asked_for(files, capsys):
    command = ["eval", str(files / "a"), "--ref", str(files / "a.npz"), *judge(files), "--num", "120", "--allow-fewer"]
    main(command)
    assert "100 samples; compares only with" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["eval", "stats", "compare", "curve", "train-extractor", "selfcheck"])
def test_help_documents_every_option(command):
    commands = next(action for action in _parser()._actions if action.dest == argparse.SUPPRESS or action.choices)
    undocumented = [a.dest for a in commands.choices[command]._actions if not a.help and not a.metavar]
    assert undocumented == []


@pytest.mark.parametrize("fails", ["x.json", "s.npz", "f.npy", "n.png"])
def test_of_several_files_one_cannot_be_written(fails, files, tmp_path, monkeypatch, capsys, full_disk):
    """The others and the number are there all the same, and the exit code says so."""
    monkeypatch.chdir(tmp_path)
    full_disk([fails])
    names = {"--json": "x.json", "--save-stats": "s.npz", "--save-features": "f.npy", "--picture": "n.png"}
    more = [word for pair in names.items() for word in pair]
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(files / "b"), "--ref", str(files / "a"), *judge(files), "--neighbours", "2", *more])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("Frechet distance")
    assert f"cannot write '{fails}'" in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {*names.values()} - {fails}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full device of Linux")
@pytest.mark.parametrize("out", ["ascii", "full", "closed"])
def test_a_result_that_cannot_be_printed_is_written(out, tmp_path, monkeypatch):
    mean, cov, _ = gaussian(4, 20)
    np.savez(tmp_path / "x.npz", mu=mean, sigma=cov)
    file = "/dev/full" if out == "full" else tmp_path / "printed"
    with monkeypatch.context() as patch, suppress(OSError), open(file, "w", encoding="ascii") as stream:
        patch.setattr(sys, "stdout", stream)
        if out == "closed":
            stream.close()
        main(["compare", str(tmp_path / "x.npz"), str(tmp_path / "x.npz"), "--json", str(tmp_path / "x.json")])
    assert fid.Result.from_json(tmp_path / "x.json").fd < 1e-8


@pytest.mark.parametrize("where", ["image", "row", "sum"])
def test_a_damaged_state_is_refused(where):
    """A flipped bit in a sum once gave a distance of 0.0; states of earlier versions have no checksum."""
    images = torch.from_numpy(random_images(40))
    made = {"extractor": Mean(), "metrics": ("fd", "pr"), "device": "cpu"}
    state = fid.Evaluator(images, **made).update(images).state_dict()
    fid.Evaluator(images, **made).load_state_dict({k: v for k, v in state.items() if k != "checksum"})
    fid.Evaluator(images, **made).load_state_dict(state)
    tensors = {"image": state["checks"]["index"], "row": state["rows"]["features"]}
    tensor = tensors.get(where, state["moments"]["features"]["outer"])
    tensor.view(torch.uint8).view(-1)[5] ^= 1
    for take in (fid.Evaluator(images, **made).images_in, fid.Evaluator(images, **made).load_state_dict):
        with pytest.raises(ValueError, match="the state is damaged"):
            take(state)
    with pytest.raises(ValueError, match="no state of an evaluator"):
        fid.Evaluator(images, **made).load_state_dict({"extractor": 1})


def test_damaged_weights_of_the_classifier_are_refused(files, tmp_path):
    """In each part of the file: a weight, or what it says of the architecture."""
    whole, file = (files / "judge.safetensors").read_bytes(), tmp_path / "x.safetensors"
    weight = bytearray(whole)
    weight[-3] ^= 1
    for content in (bytes(weight), whole.replace(b'"image_size":"16"', b'"image_size":"12"')):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors' are damaged: they do not have their checksum"):
            fid.Classifier.load(file)


def test_an_input_is_never_written_over(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    np.savez("images.npz", random_images(4))
    Path("images.npz.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
    for command in (
        ["stats", "images.npz", "--out", "images.npz", *judge(files)],
        ["eval", "b", "--ref", "a.npz", "--save-stats", "./a.npz", *judge(files)],
        ["eval", "images.npz", "--ref", "a.npz", "--json", "images.npz.json", *judge(files)],
        ["curve", "images.npz.json", "--out", "images.npz.json"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert "this command reads it; choose another name" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}


def test_a_curve_of_a_damaged_log(tmp_path, capsys):
    common = {"label": "FID", "protocol": "$\\x$", "extractor": "e", "num_samples": 1000, "reference": None}
    lines = [json.dumps({**common, "step": k, "fid": 9.0 / k}) for k in (1, 2, 3)]
    log, out = tmp_path / "fid.jsonl", tmp_path / "c.png"
    log.write_text("\n".join([lines[0], lines[1][:30], "null", "[1]", lines[2]]))
    main(["curve", str(log), "--out", str(out)])
    assert f"left out of '{log}', since they cannot be read: 3 lines." in capsys.readouterr().err
    assert [record["step"] for record in read_records([log], list)[str(tmp_path)]] == [1, 3]
    for line, sentence in (
        (
            {"bits_per_dim": 3.1, "num": 1000},
            "not a record of an evaluation, as `fid eval` writes. It is of a likelihood",
        ),
        ({**common, "step": "4", "fid": 1}, "fid.jsonl' has the step '4'; it must be a number"),
        ({**common, "step": 4, "fid": [1]}, r"has the fid '\[1\]'; it must be a number"),
        ({**common, "step": 4, "fid": 1, "reference": 3}, "not a record of an evaluation"),
    ):
        log.write_text("\n".join([lines[0], json.dumps(line)]))
        with pytest.raises(ValueError, match=sentence):
            fid.curve(read_records([log]), out)
    log.write_text("nonsense")
    with pytest.raises(ValueError, match="damaged: none of its lines can be read"), pytest.warns(match="1 line"):
        read_records([log])


def test_a_damaged_record_beside_the_samples_is_said(files, tmp_path):
    np.savez(tmp_path / "x.npz", random_images(40))
    (tmp_path / "x.npz.json").write_text('{"sampler": ')
    judge = fid.Classifier.load(files / "judge.safetensors")
    warnings = fid.evaluate(tmp_path / "x.npz", files / "a.npz", judge).warnings
    assert any(
        "how the samples were made is left out: " in text and "x.npz.json' is damaged" in text for text in warnings
    )
