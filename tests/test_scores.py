"""The scores against closed forms, slow plain versions, and torch-fidelity."""

import math
import re

import numpy as np
import pytest
import torch

from fid.metrics import rows as fid_rows
from fid.metrics.density_coverage import density_coverage
from fid.metrics.inception_score import inception_score
from fid.metrics.kid import kid
from fid.metrics.mind import mind
from fid.metrics.precision_recall import precision_recall
from fid.metrics.rows import nearest_rows, squared_distances, sum_as_tensorflow

EXACT = {"rel": 1e-12, "abs": 1e-12}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relu_features(num, seed, dim=256, mean=0.5, shift=0.0):
    """Not negative, correlated, norm of about 10 or 25: what average-pooled ReLUs look like."""
    mix = normal(32, dim, seed=99) / 32**0.5
    return (mean + shift + 0.5 * normal(num, 32, seed=seed) @ mix + 0.1 * normal(num, dim, seed=seed + 1)).relu()


def coarse(num, seed, dim=12):
    """Multiples of 1/8 below 16: any float32 sum of their products is exact in any order, and float16 must round."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 128, (num, dim)) / 8).float()


def pooled(num, seed):
    """As Inception's pooled features: 2048 numbers, not negative, mean 0.42, |x|^2 about 450; the first two terms correlate.

    Multiples of 1/128 below 1, so that products are exact in float32 in any order, and TensorFlow's numbers hold anywhere.
    """
    rng, which = np.random.default_rng(seed), np.random.default_rng(99).integers(0, 24, (2, 2048))
    factors = rng.integers(0, 40, (num, 24))
    rows = factors[:, which[0]] + factors[:, which[1]] + rng.integers(0, 32, (num, 2048))
    return torch.from_numpy(rows / 128).float()


# Slow and plain: one pair at a time


def short_sum(numbers):
    """TensorFlow's sum of fewer than 32 float16 numbers: packets of 8, then these 8 in float32; what is left, one by one."""
    whole = len(numbers) // 8 * 8
    lanes, rest = np.zeros(8, np.float16), np.float16(0)
    for start in range(0, whole, 8):
        lanes = lanes + numbers[start : start + 8]
    for number in numbers[whole:]:
        rest = rest + number
    return rest + np.float16(lanes.astype(np.float32).sum())


def distance(u, v, arithmetic):
    u, v = u.numpy(), v.numpy()
    if arithmetic == "exact":
        return float(((u.astype(np.float64) - v) ** 2).sum())
    u, v = u.astype(np.float16), v.astype(np.float16)
    norm_u, norm_v = (short_sum(x * x) for x in (u, v))
    product = np.float16((u.astype(np.float32) * v.astype(np.float32)).sum())
    return float(max(np.float16(np.float16(norm_u - np.float16(2) * product) + norm_v), np.float16(0)))


def distances(us, vs, arithmetic="exact"):
    return np.array([[distance(u, v, arithmetic) for v in vs] for u in us])


def radii(rows, k, arithmetic="exact"):
    return [sorted(row)[k] for row in distances(rows, rows, arithmetic)]


def plain_precision_recall(real, fake, k, arithmetic="exact"):
    d, r_real, r_fake = distances(real, fake, arithmetic), radii(real, k, arithmetic), radii(fake, k, arithmetic)
    precision = np.mean([any(d[i, j] <= r_real[i] for i in range(len(real))) for j in range(len(fake))])
    recall = np.mean([any(d[i, j] <= r_fake[j] for j in range(len(fake))) for i in range(len(real))])
    return precision, recall


def plain_density_coverage(real, fake, k):
    d, r = distances(real, fake), radii(real, k)
    inside = [[d[i, j] < r[i] for j in range(len(fake))] for i in range(len(real))]
    return np.sum(inside) / (k * len(fake)), np.mean([any(row) for row in inside])


def plain_kid(x, y):
    def kernel(a, b):
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    m = len(x)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j)
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    return (xx + yy) / (m * (m - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / m**2


def plain_inception_score(logits, parts):
    values = []
    for part in parts:
        p = np.exp(logits[part].double().numpy())
        p /= p.sum(axis=1, keepdims=True)
        q = p.mean(axis=0)
        values.append(
            math.exp(np.mean([sum(pi * math.log(pi / qi) for pi, qi in zip(row, q, strict=True)) for row in p]))
        )
    return np.mean(values), np.std(values)


# Inception Score


def test_inception_score_of_logits_that_say_nothing_is_1():
    assert inception_score(torch.full((50, 7), 3.0)) == pytest.approx((1, 0), **EXACT)
    assert inception_score(normal(1, 7).expand(50, 7)) == pytest.approx((1, 0), **EXACT)  # the same for every image


@pytest.mark.parametrize("margin", [100.0, 1e6])  # the second leaves probabilities of exactly 0
def test_inception_score_of_sure_and_balanced_logits_is_the_number_of_classes(margin):
    logits = margin * torch.eye(10).repeat(7, 1)
    assert inception_score(logits) == pytest.approx((10, 0), **EXACT)
    assert inception_score(logits[:, :4][:4]) == pytest.approx((4, 0), **EXACT)


def test_inception_score_of_two_answers_in_closed_form():
    p = 0.8
    logits = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).log()
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert inception_score(logits)[0] == pytest.approx(2 * math.exp(-entropy), **EXACT)


def test_inception_score_against_a_plain_version():
    logits = 3 * normal(53, 6)
    parts = [slice(0, 20), slice(20, 40), slice(40, 53)]  # the last and shorter one counts the same
    assert inception_score(logits, chunk=20) == pytest.approx(plain_inception_score(logits, parts), **EXACT)
    order = np.random.RandomState(5).permutation(53)
    parts = [order[:13], order[13:26], order[26:39], order[39:]]
    assert inception_score(logits, splits=4, seed=5) == pytest.approx(plain_inception_score(logits, parts), **EXACT)


def test_inception_score_equals_torch_fidelity():
    metric = pytest.importorskip("torch_fidelity.metric_isc")
    for num in (200, 203):
        logits = 4 * normal(num, 30)
        want = metric.isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
        want = want["inception_score_mean"], want["inception_score_std"]
        assert inception_score(logits, splits=10, seed=2020) == pytest.approx(want, **EXACT)


def test_inception_score_of_sorted_rows_is_that_of_a_few_classes():
    logits = 50 * torch.eye(10).repeat_interleave(20, dim=0)
    assert inception_score(logits, chunk=40)[0] == pytest.approx(2)
    assert inception_score(logits, chunk=40, seed=0)[0] > 8
    assert inception_score(logits, splits=10)[0] == pytest.approx(1)
    assert inception_score(logits, splits=10, seed=0)[0] > 6


def test_inception_score_takes_5000_rows_at_a_time_in_the_given_order():
    logits = 50 * torch.eye(2).repeat_interleave(5000, dim=0)
    assert inception_score(logits)[0] == pytest.approx(1)
    assert inception_score(logits, chunk=None)[0] == pytest.approx(2)
    assert inception_score(logits, seed=0)[0] == pytest.approx(2, abs=1e-3)


def test_one_part_does_not_depend_on_the_order():
    logits = 3 * normal(60, 5)
    whole = inception_score(logits, chunk=None)
    for other in (inception_score(logits), inception_score(logits.flip(0)), inception_score(logits, None, 1, seed=3)):
        assert other == pytest.approx(whole, **EXACT)


# Precision and recall


def clusters(num, centre, seed):
    return centre + 0.1 * normal(num, 8, seed=seed)


@pytest.mark.parametrize("arithmetic", ["fp32", "adm-fp16"])
def test_precision_recall_of_the_same_and_of_separate_clusters(arithmetic):
    a, b = clusters(40, 0.0, 1), clusters(40, 3.0, 2)
    assert precision_recall(a, a, arithmetic=arithmetic) == (1, 1)
    assert precision_recall(a, b, arithmetic=arithmetic) == (0, 0)
    both = torch.cat([a, b])
    assert precision_recall(both, a, arithmetic=arithmetic) == (1, 0.5)  # good images, half of the modes
    assert precision_recall(a, both, arithmetic=arithmetic) == (0.5, 1)


def test_precision_recall_on_a_line_by_hand():
    real, fake = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([[3.0], [3.5], [5.0], [30.0]])
    # k = 1: reach of the real ones 1, 1, 1, 8; of the generated ones 0.5, 0.5, 1.5, 25
    assert precision_recall(real, fake, k=1, arithmetic="fp32") == (0.75, 0.25)  # 3 is on the edge; 10 to 30 is 20
    assert precision_recall(real, fake, k=2, arithmetic="fp32") == (0.75, 0.75)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_against_a_plain_version(k):
    real, fake = normal(50, 6, seed=1), 0.4 + 0.9 * normal(70, 6, seed=2)
    want = plain_precision_recall(real, fake, k)
    assert precision_recall(real, fake, k, "fp32") == pytest.approx(want, **EXACT)
    assert min(want) > 0.1
    assert max(want) < 1


def test_float16_distances_are_bit_equal_to_a_plain_version():
    real, fake = coarse(25, 1), coarse(30, 2)
    want = distances(real, fake, "adm-fp16")
    assert (squared_distances(real, fake, "adm-fp16").numpy() == want).all()
    assert (want != distances(real, fake)).mean() > 0.1  # it does round
    again = squared_distances(real, real, "adm-fp16").numpy()
    assert (again == distances(real, real, "adm-fp16")).all()  # with 0 where rounding would leave less
    assert (want != distances(fake, real, "adm-fp16").T).any()  # the real rows come first: |x|^2 - 2 x.y, then + |y|^2


def test_no_distance_is_below_0():
    rows = 3 + normal(50, 64)
    assert squared_distances(rows, rows.clone(), "fp32").min() == 0


@pytest.mark.parametrize("k", [1, 3])
def test_float16_precision_recall_against_a_plain_version(k):
    real, fake = coarse(40, 3, dim=5), coarse(50, 4, dim=5)
    want = plain_precision_recall(real, fake, k, "adm-fp16")
    assert precision_recall(real, fake, k) == pytest.approx(want, **EXACT)


@pytest.mark.parametrize(
    ("dim", "norms"),
    [
        (5, [1.23828125, 1.005859375, 1.6767578125, 0.978515625, 2.01953125]),
        (12, [2.87109375, 3.134765625, 4.296875, 3.41796875, 4.06640625]),
        (43, [13.0703125, 11.75, 13.078125, 12.0234375, 13.109375]),  # 32, a packet of 8, and 3
        (64, [18.21875, 18.4375, 19.484375, 18.375, 18.8125]),
        (1600, [472.25, 472.25, 473.0, 471.75, 472.5]),
        (2048, [605.0, 604.0, 606.0, 605.0, 605.0]),  # in two halves; the exact values are 604.76, 604.45, 605.87, ...
    ],
)
def test_norms_in_float16_are_those_of_tensorflow(dim, norms):
    """Taken from `tf.reduce_sum(tf.square(rows), 1)` in float16, of TensorFlow 2.21 on an x86 processor."""
    i, j = np.ogrid[:5, :dim]
    rows = torch.from_numpy((7 * i * i + 13 * j + i * j) % 61 / 64).half()
    assert sum_as_tensorflow(rows * rows).tolist() == norms


@pytest.mark.parametrize(("seed", "precise", "recalled"), [(0, 339, 254), (1, 350, 273), (2, 342, 260), (3, 346, 259)])
def test_float16_precision_recall_are_those_of_tensorflow(seed, precise, recalled):
    """Taken from the operations of ADM's script, in TensorFlow 2.21 on an x86 processor.

    With norms summed in float32 and rounded once all four pairs differ, by up to 3 of these rows.
    """
    real, fake = pooled(300, 2 * seed), pooled(400, 2 * seed + 1)
    assert precision_recall(real, fake) == (precise / 400, recalled / 300)
    assert precision_recall(real, fake, block=128) == (precise / 400, recalled / 300)


def test_float16_raises_precision_and_recall():
    real, fake = relu_features(600, 1, mean=1.5), relu_features(800, 11, mean=1.5, shift=0.03)
    plain, rounded = (precision_recall(real, fake, arithmetic=a) for a in ("fp32", "adm-fp16"))
    for low, high in zip(plain, rounded, strict=True):
        assert 0.5 < low < high < low + 0.03 < 1


@pytest.mark.parametrize("scale", [100.0, 1e5])  # norms, or the numbers themselves, beyond 65504
def test_what_float16_cannot_hold_is_done_in_float32(scale):
    real, fake = normal(40, 64, seed=1), 0.9 * normal(50, 64, seed=2)
    plain, rounded = (precision_recall(scale * real, scale * fake, arithmetic=a) for a in ("fp32", "adm-fp16"))
    assert plain == rounded
    assert 0 < plain[0] < 1


def test_a_product_beyond_float16_alone_is_done_in_float32():
    rows = torch.full((2, 4), 100.0)  # norms 40000 fit, twice the product does not
    assert squared_distances(rows, rows + 1, "adm-fp16").tolist() == [[4, 4], [4, 4]]


def test_what_float32_cannot_hold_is_refused():
    rows = torch.full((8, 4), 1e19)  # finite, but NaN distances would be below no radius: precision 0
    for call in (
        precision_recall,
        lambda a, b: precision_recall(a, b, arithmetic="fp32"),
        density_coverage,
        nearest_rows,
    ):
        with pytest.raises(ValueError, match="squared distances of these rows are beyond float32; scale"):
            call(rows, rows.double())


@pytest.mark.parametrize("save_memory", [False, True])
def test_precision_recall_equals_torch_fidelity(save_memory):
    metric = pytest.importorskip("torch_fidelity.metric_prc")
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": save_memory, "verbose": False}
    for seed in range(5):
        # powers of 2, since torch-fidelity takes the mean in float32
        real, fake = relu_features(256, seed=10 * seed), relu_features(512, seed=10 * seed + 5, shift=0.05)
        want = metric.prc_features_to_metric(fake, real, **options)
        assert precision_recall(real, fake, arithmetic="fp32") == pytest.approx(
            (want["precision"], want["recall"]), **EXACT
        )
        assert 0.1 < want["precision"] < 1


@pytest.mark.parametrize("arithmetic", ["fp32", "adm-fp16"])
def test_the_size_of_a_block_has_no_effect(arithmetic):
    real, fake = coarse(60, 1), coarse(90, 2)  # products are exact, so ties stay ties
    want = precision_recall(real, fake, arithmetic=arithmetic)
    for block in (3, 17, 64, 89):  # smaller than k + 1, an uneven last one, one block of one set
        assert precision_recall(real, fake, arithmetic=arithmetic, block=block) == want


def test_the_other_scores_work_in_blocks_too(monkeypatch):
    real, fake = coarse(60, 1), coarse(90, 2)
    want, (far, which) = density_coverage(real, fake), nearest_rows(fake, real, k=4)
    for block in (3, 50):
        monkeypatch.setattr(fid_rows, "BLOCK", block)
        assert density_coverage(real, fake) == want
        again, found = nearest_rows(fake, real, k=4)
        assert torch.equal(again, far)
        assert torch.equal((real[found] - fake[:, None]).double().norm(dim=2), far)
        assert (found == which).float().mean() > 0.9  # the same but for ties


# Density and coverage


def test_density_coverage_of_the_same_and_of_separate_clusters():
    a, b = clusters(200, 0.0, 1), clusters(200, 3.0, 2)
    assert density_coverage(a, b) == (0, 0)
    assert density_coverage(torch.cat([a, b]), a)[1] == 0.5
    density, coverage = density_coverage(a, a)
    assert (density, coverage) == (1, 1)  # itself and the k - 1 neighbours nearer than the k-th
    density, coverage = density_coverage(clusters(1000, 0.0, 4), clusters(1000, 0.0, 5))
    assert density == pytest.approx(1, abs=0.1)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_density_coverage_is_strict_on_a_line():
    real, fake = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([[3.0], [1.5]])
    # k = 1: reach 1, 1, 1, 8; 3 is on the edge of 2's and inside 10's, 1.5 inside those of 1 and 2
    assert density_coverage(real, fake, k=1) == (1.5, 0.75)


@pytest.mark.parametrize("k", [1, 5])
def test_density_coverage_against_a_plain_version(k):
    real, fake = normal(50, 6, seed=1), 0.3 + 0.9 * normal(70, 6, seed=2)
    want = plain_density_coverage(real, fake, k)
    assert density_coverage(real, fake, k) == pytest.approx(want, **EXACT)
    assert min(want) > 0.1


# KID


def test_kid_of_constant_rows_in_closed_form():
    a, b = normal(6, seed=1, dtype=torch.float64), normal(6, seed=2, dtype=torch.float64)
    aa, bb, ab = (float(u @ v / 6 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
    mean, std = kid(a.expand(20, 6), b.expand(30, 6), subsets=4, size=10)
    assert (mean, std) == pytest.approx((aa + bb - 2 * ab, 0), **EXACT)


def test_kid_of_one_dimension_by_the_kernels_own_features():
    """(x y + 1)^3 = phi(x) . phi(y) with phi = (1, 3^(1/2) x, 3^(1/2) x^2, x^3), so that sums over pairs are squares."""
    x, y = normal(40, 1, seed=1, dtype=torch.float64), 0.5 + normal(40, 1, seed=2, dtype=torch.float64)
    phi_x, phi_y = (torch.cat([torch.ones_like(z), 3**0.5 * z, 3**0.5 * z**2, z**3], dim=1) for z in (x, y))
    within = sum(float(phi.sum(dim=0).square().sum() - phi.square().sum()) for phi in (phi_x, phi_y))
    want = within / (40 * 39) - 2 * float(phi_x.mean(dim=0) @ phi_y.mean(dim=0))
    assert kid(x, y, subsets=3, size=40)[0] == pytest.approx(want, rel=1e-11)  # every subset is the whole set


def test_kid_is_unbiased_and_symmetric():
    real, fake, other = normal(2000, 16, seed=1), normal(2000, 16, seed=2), 0.3 + normal(2000, 16, seed=3)
    mean, std = kid(real, fake, subsets=100, size=100)
    assert abs(mean) < 4 * std / 10
    assert mean < 0.1 * kid(real, other, subsets=20, size=100)[0]
    assert kid(real[:300], other[:300], 1, 300)[0] == pytest.approx(kid(other[:300], real[:300], 1, 300)[0], rel=1e-9)


def test_kid_against_a_plain_version():
    real, fake = normal(15, 4, seed=1), 0.5 + normal(15, 4, seed=2)
    assert kid(real, fake, subsets=1, size=15)[0] == pytest.approx(plain_kid(real, fake), rel=1e-11)


def test_kid_equals_torch_fidelity():
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    real, fake = normal(300, 20, seed=1, dtype=torch.float64), 0.2 + normal(250, 20, seed=2, dtype=torch.float64)
    want = metric.kid_features_to_metric(
        fake, real, kid_subsets=10, kid_subset_size=100, rng_seed=2020, verbose=False, kid_kernel="poly",
        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
    )  # fmt: skip
    want = want["kernel_inception_distance_mean"], want["kernel_inception_distance_std"]
    assert kid(real, fake, subsets=10, size=100) == pytest.approx(want, **EXACT)


# MIND


def test_mind_of_a_shift_and_of_a_scale():
    x, v = normal(300, 12, seed=1, dtype=torch.float64), normal(12, seed=2, dtype=torch.float64)
    u = torch.nn.functional.normalize(torch.randn(500, 12, generator=torch.Generator().manual_seed(7)), dim=1).double()
    shifted = mind(x, (x + v)[torch.randperm(300)], num_directions=500, seed=7)
    assert shifted == pytest.approx(3 * 12 * float((u @ v).square().mean()), rel=1e-10)
    assert shifted == pytest.approx(3 * float(v @ v), rel=0.2)
    assert mind(x, 3 * x, 500, 7) == pytest.approx(3 * 12 * 4 * float((x @ u.T).square().mean()), rel=1e-10)
    assert mind(x[:, :1], x[:, :1] + 2) == pytest.approx(12, rel=1e-6)  # 1-d: u = 1 or -1


def test_mind_of_equal_sets_is_0():
    x = normal(100, 12, seed=1)
    assert mind(x, x[torch.randperm(100)]) == pytest.approx(0, abs=1e-10)
    assert 0 < mind(x, normal(100, 12, seed=2)) < 0.2 * mind(x, 1 + normal(100, 12, seed=2))


def test_mind_against_a_plain_version():
    x, y = normal(30, 5, seed=1), 2 * normal(30, 5, seed=2)
    u = torch.randn(200, 5, generator=torch.Generator().manual_seed(3)).double().numpy()
    total = 0.0
    for direction in u:
        direction = direction / np.sqrt((direction**2).sum())
        a, b = (sorted(float(row @ direction) for row in rows.double().numpy()) for rows in (x, y))
        total += np.mean([(p - q) ** 2 for p, q in zip(a, b, strict=True)])
    assert mind(x, y, num_directions=200, seed=3) == pytest.approx(3 * 5 * total / 200, rel=1e-5)
    assert mind(x.double(), y.double(), num_directions=200, seed=3) == pytest.approx(3 * 5 * total / 200, rel=1e-6)


def test_mind_cuts_the_larger_set_and_repeats():
    x, y = normal(400, 6, seed=1), 0.5 + normal(150, 6, seed=2)
    assert mind(x, y, 50, seed=1) == mind(x, y, 50, seed=1) != mind(x, y, 50, seed=2)
    assert mind(x, y, 50, seed=1) == pytest.approx(mind(y, x, 50, seed=1), rel=1e-6)
    sorted_rows = x[x[:, 0].argsort()]
    assert mind(sorted_rows, x[:150], 200) < 0.5  # a random subset, not the first rows


# Nearest rows


def test_nearest_against_a_plain_version():
    queries, rows = normal(9, 5, seed=1), normal(40, 5, seed=2)
    want = np.sqrt(distances(queries, rows))
    far, which = nearest_rows(queries, rows, k=3)
    assert which.tolist() == [[int(j) for j in np.argsort(row)[:3]] for row in want]
    np.testing.assert_allclose(far.numpy(), np.sort(want, axis=1)[:, :3], rtol=1e-7)
    assert nearest_rows(queries, rows)[1].shape == (9, 1)


def test_nearest_finds_a_copy_at_distance_0_far_from_the_origin():
    rows = 100 + normal(50, 64, seed=1)
    far, which = nearest_rows(rows.flip(0), rows, k=2)
    assert which[:, 0].tolist() == list(range(49, -1, -1))
    assert (far[:, 0] == 0).all()
    assert (far[:, 1] > 5).all()


# What all of them share


def test_rows_of_other_dtypes_and_with_gradients_are_taken():
    real, fake = coarse(60, 1), coarse(60, 2)
    want = precision_recall(real, fake), kid(real, fake, 3, 20), mind(real, fake)
    for other in (real.double(), real.half(), real.clone().requires_grad_()):
        found = precision_recall(other, fake), kid(other, fake, 3, 20), mind(other, fake)
        for a, b in zip(found, want, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda x: precision_recall(x[:3], x), "real has 3 rows, too few for precision with k=3: give 4 or more."),
        (lambda x: precision_recall(x, x[:5], k=5), "fake has 5 rows, too few for precision with k=5: give 6 or more."),
        (lambda x: precision_recall(x, x, k=0), "k is 0; it counts neighbours and must be at least 1."),
        (lambda x: precision_recall(x, x, arithmetic="fp8"), "arithmetic is 'fp8'; choose one of adm-fp16, fp32."),
        (lambda x: precision_recall(x, x[:, :2]), "real is 4-d and fake 2-d; use the same extractor."),
        (lambda x: precision_recall(x[0], x), "real has shape (4,); expected (N, D)."),
        (lambda x: density_coverage(x[:5], x), "real has 5 rows, too few for coverage with k=5: give 6 or more."),
        (lambda x: density_coverage(x, x[:0]), "fake has 0 rows, too few for coverage with k=5: give 1 or more."),
        (lambda x: kid(x, x), "real has 20 rows, too few for KID with size=1000: give 1000 or more."),
        (lambda x: kid(x, x, size=1), "KID needs a size of at least 2 and at least 1 subset; got 1 and 100."),
        (lambda x: mind(x, x[:0]), "fake has 0 rows, too few for MIND: give 1 or more."),
        (lambda x: mind(x, x, 0), "num_directions is 0; MIND needs at least 1."),
        (lambda x: nearest_rows(x, x[:2], k=3), "rows has 2 rows, too few for a search with k=3: give 3 or more."),
        (lambda x: inception_score(x[:0]), "logits has 0 rows, too few for the Inception Score: give 1 or more."),
        (lambda x: inception_score(x, splits=21), "splits is 21; 20 rows can be split into 1 to 20 parts."),
        (lambda x: inception_score(x, chunk=0), "chunk is 0; a part has at least 1 row."),
    ],
)
def test_sentences(call, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call(normal(20, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_named(value):
    good, bad = normal(20, 4), normal(20, 4)
    bad[7, 2] = value
    for call in (precision_recall, density_coverage, lambda a, b: kid(a, b, size=10), mind, nearest_rows):
        with pytest.raises(ValueError, match="non-finite values in row 7 of"):
            call(good, bad)
    with pytest.raises(ValueError, match="non-finite values in row 7 of logits."):
        inception_score(bad)
