"""Scores from rows of features or logits: Inception Score, precision and recall, density and coverage, KID, MIND.

Rows are tensors (N, D) of any floating dtype and on any device; `device` says where the work is done, where the rows are
if not given. Distances between all rows are made block by block, never as a whole matrix.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vca_engine.precision import ieee_float32

BLOCK = 4096  # rows on each side of a block of distances: at D = 2048 about 250 MB of temporaries
ARITHMETICS = {"adm-fp16": torch.float16, "fp32": torch.float32}


def inception_score(
    logits: Tensor, chunk: int | None = 5000, splits: int | None = None, seed: int | None = None
) -> tuple[float, float]:
    """How sure a classifier is of each image, and how evenly the images spread over its classes; 1 to C.

        IS = mean_k exp(mean_i KL(p_i || q_k)) = mean_k exp(H(q_k) - mean_i H(p_i)),   p = softmax, q_k = mean_i p_i

    in float64, over the rows i of part k. Parts of 5,000 rows in the given order are ADM's (where the last one may be
    shorter and counts the same), and 10 parts of shuffled rows, seed 2020, torch-fidelity's. Rows sorted by class need
    to be shuffled: each part has too few classes otherwise.

    Args:
        logits: (N, C).
        chunk: Rows in a part; None takes all rows as one.
        splits: Number of parts, of the same size up to one row; takes the place of `chunk`.
        seed: Shuffles the rows first; None keeps their order.

    Returns:
        Mean and standard deviation over the parts.

    Raises:
        ValueError: No rows, fewer rows than parts, or logits that are not finite.

    Source: Salimans et al., arXiv:1606.03498; the parts, Dhariwal and Nichol, arXiv:2105.05233.
    """
    logits = _check("logits", logits, 1, "the Inception Score")
    N = len(logits)
    if splits is not None and not 1 <= splits <= N:
        raise ValueError(f"splits is {splits}; {N} rows can be split into 1 to {N} parts.")
    chunk = N if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; a part has at least 1 row.")
    edges = [*range(0, N, chunk), N] if splits is None else [k * N // splits for k in range(splits + 1)]
    order = torch.arange(N) if seed is None else torch.from_numpy(np.random.RandomState(seed).permutation(N))
    values = []
    for start, end in pairwise(edges):
        p = logits[order[start:end].to(logits.device)].double().softmax(dim=1)  # (rows, C)
        entropy = torch.special.entr(p).sum(dim=1).mean()  # entr(0) = 0: no logarithm of a class that no row has
        values.append(float((torch.special.entr(p.mean(dim=0)).sum() - entropy).exp()))
    return float(np.mean(values)), float(np.std(values))


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, arithmetic: str = "adm-fp16", device: Any = None, block: int = BLOCK
) -> tuple[float, float]:
    """The share of samples within reach of a real image, and of real images within reach of a sample.

        precision = mean_j [exists i: d(x_i, y_j) <= r(x_i)],   recall = mean_i [exists j: d(x_i, y_j) <= r(y_j)]

    for real x_i and generated y_j, where d is the squared distance and r the one to the k-th neighbour in the same set.
    `adm-fp16` rounds as the script behind the published numbers does, which raises both by some 0.001 to 0.006:

        d = fp16(fp16(|x|^2 - 2 x.y) + |y|^2)   of fp16 rows, norms and products

    A product is summed in float32 and rounded once; a norm is rounded to float16 after each addition. A block with a number
    that float16 cannot hold is done in float32 (the script's blocks are of 10,000 rows).

    The order of those additions is that of TensorFlow on an x86 processor. Beside the script's own operations in TensorFlow
    2.21 there, both numbers were equal for 256 of 257 pairs of simulated sets (D = 2048 and 64, 300 to 12,000 rows) and one
    row of 700 off for the other: one distance in 7,000 differs in its last bit where float32 sums of a product in two orders
    round to two sides. On a GPU TensorFlow adds up a norm in yet another order, also in float16; one like it moved both
    numbers by up to 0.0035 for 2,000 rows. On a processor, TensorFlow 2.15 rounds each addition of a product, too.

    Args:
        real: (M, D).
        fake: (N, D).
        k: Neighbour, not counting the row itself.
        arithmetic: `adm-fp16` or `fp32`.
        device: Where to compute.
        block: Rows on each side of a block of distances; trades memory for speed.

    Raises:
        ValueError: Fewer than k + 1 rows, different widths, rows that are not finite, or are so long
            that float32 cannot hold their squared distances, or another arithmetic.

    Source: Kynkaanniemi et al., arXiv:1904.06991; the arithmetic, Dhariwal and Nichol, arXiv:2105.05233.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}; choose one of {', '.join(ARITHMETICS)}.")
    _check_k(k)
    real, fake = _check_pair(real, fake, (k + 1, k + 1), f"precision with k={k}", device)
    real_radii, fake_radii = (_smallest(rows, rows, k + 1, arithmetic, block)[0][:, k] for rows in (real, fake))
    real_found = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    fake_found = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    for i, j, distances in _blocks(real, fake, arithmetic, block):
        real_found[i] |= (distances <= fake_radii[j]).any(dim=1)
        fake_found[j] |= (distances <= real_radii[i, None]).any(dim=0)
    return int(fake_found.sum()) / len(fake), int(real_found.sum()) / len(real)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, device: Any = None) -> tuple[float, float]:
    """How many real neighbourhoods hold a sample, over k, and the share of real neighbourhoods that hold one.

        density = 1 / (k N) sum_j sum_i [d(x_i, y_j) < r(x_i)],   coverage = mean_i [exists j: d(x_i, y_j) < r(x_i)]

    with x, y, d and r of `precision_recall`, in float32. Perfect samples have density 1 and, for M = N, coverage 1 - 2^-k.

    Args:
        real: (M, D).
        fake: (N, D).
        k: Neighbour, not counting the row itself.
        device: Where to compute.

    Raises:
        ValueError: Fewer than k + 1 real rows, no generated ones, different widths, or rows that are not finite.

    Source: Naeem et al., arXiv:2002.09797.
    """
    _check_k(k)
    real, fake = _check_pair(real, fake, (k + 1, 1), f"coverage with k={k}", device)
    radii = _smallest(real, real, k + 1, "fp32", BLOCK)[0][:, k]
    pairs, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for i, _, distances in _blocks(real, fake, "fp32", BLOCK):
        inside = distances < radii[i, None]
        pairs += int(inside.sum())
        covered[i] |= inside.any(dim=1)
    return pairs / (k * len(fake)), int(covered.sum()) / len(real)


def kid(
    real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020, device: Any = None
) -> tuple[float, float]:
    """Kernel Inception Distance: the unbiased squared maximum mean discrepancy of a cubic kernel, in float64.

        KID = mean_{i != i'} k(x_i, x_i') + mean_{j != j'} k(y_j, y_j') - 2 mean_ij k(x_i, y_j),   k(a, b) = (a.b / D + 1)^3

    over random subsets of m = `size` rows of each. About 0 for equal distributions, and it may be below.

    Args:
        real: (M, D).
        fake: (N, D).
        subsets: Number of subsets.
        size: Rows m in each, without repetition; at least 2.
        seed: Of the draw, which is torch-fidelity's with the samples as its first input.
        device: Where to compute.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: Fewer than `size` rows, different widths, or rows that are not finite.

    Source: Binkowski et al., arXiv:1801.01401.
    """
    if size < 2 or subsets < 1:
        raise ValueError(f"KID needs a size of at least 2 and at least 1 subset; got {size} and {subsets}.")
    real, fake = _check_pair(real, fake, (size, size), f"KID with size={size}", device)
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        y, x = (rows[torch.from_numpy(rng.choice(len(rows), size, replace=False))].double() for rows in (fake, real))
        within = sum(float(kernel.sum() - kernel.trace()) for kernel in (_cubic(x, x), _cubic(y, y)))
        values.append(within / (size * (size - 1)) - 2 * float(_cubic(x, y).mean()))
    return float(np.mean(values)), float(np.std(values))


@ieee_float32()
def mind(real: Tensor, fake: Tensor, num_directions: int = 1000, seed: int = 2020, device: Any = None) -> float:
    """Monge Inception Distance: how far the projections on random unit vectors u must move, squared.

        MIND = 3 D mean_u mean_j (sort(X u)_j - sort(Y u)_j)^2

    which is 3 |v|^2 on average for Y = X + v. Of sets of different sizes, the larger is cut to a random subset.

    Args:
        real: (M, D).
        fake: (N, D).
        num_directions: Number of vectors u.
        seed: Of the vectors and of the subset.
        device: Where to compute; in float32, or in float64 for float64 rows.

    Raises:
        ValueError: No rows, no directions, different widths, or rows that are not finite.

    Source: Berthet et al., arXiv:2605.06797.
    """
    if num_directions < 1:
        raise ValueError(f"num_directions is {num_directions}; MIND needs at least 1.")
    real, fake = _check_pair(real, fake, (1, 1), "MIND", device)
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same numbers for any device
    num, D = min(len(real), len(fake)), real.shape[1]
    x, y = (
        rows if len(rows) == num else rows[torch.randperm(len(rows), generator=generator)[:num].to(rows.device)]
        for rows in (real, fake)
    )
    directions = torch.nn.functional.normalize(torch.randn(num_directions, D, generator=generator), dim=1).to(x)
    total = 0.0
    for u in directions.split(128):
        moved = (u @ x.T).sort(dim=1).values - (u @ y.T).sort(dim=1).values  # (128, num)
        total += float(moved.double().square().sum())
    return 3 * D * total / (num_directions * num)


def nearest(queries: Tensor, rows: Tensor, k: int = 1, device: Any = None) -> tuple[Tensor, Tensor]:
    """The k rows nearest to each query, from near to far.

    Args:
        queries: (Q, D).
        rows: (N, D).
        k: Number of neighbours, up to N; a row equal to the query is one.
        device: Where to compute.

    Returns:
        Distances |query - row|, not squared, (Q, k) float64, and the numbers of the rows (Q, k); on the CPU.

    Raises:
        ValueError: Fewer than k rows, different widths, or rows that are not finite.
    """
    _check_k(k)
    queries, rows = _check_pair(queries, rows, (1, k), f"a search with k={k}", device, ("queries", "rows"))
    found = _smallest(queries, rows, k, "fp32", BLOCK)[1]
    # Once more from differences: d as above is off by about 1e-7 |row|^2, which would part a row from its copy.
    parts = zip(queries.split(64), found.split(64), strict=True)
    distances, order = torch.cat([(rows[f] - q[:, None].double()).norm(dim=2) for q, f in parts]).sort(dim=1)
    return distances.cpu(), found.gather(1, order).cpu()


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


@ieee_float32()
def _squared_distances(u: Tensor, v: Tensor, arithmetic: str) -> Tensor:
    """(A, D) and (B, D) -> max(|u|^2 - 2 u.v + |v|^2, 0), (A, B) float32; every result rounded to the arithmetic."""
    dtype = ARITHMETICS[arithmetic]
    a, b = u.to(dtype), v.to(dtype)
    norm_u, norm_v = (_sum_as_tensorflow(x * x) if dtype is torch.float16 else (x * x).sum(dim=1) for x in (a, b))
    if dtype is torch.float32 and not norm_u.max() + norm_v.max() < torch.finfo(dtype).max / 4:
        raise ValueError("squared distances of these rows are beyond float32; scale the features down.")
    distances = (a.float() @ b.float().T).to(dtype).mul_(-2).add_(norm_u[:, None]).add_(norm_v)
    if dtype is torch.float16 and not distances.isfinite().all():
        return _squared_distances(u, v, "fp32")
    return distances.float().clamp_(min=0)


def _sum_as_tensorflow(rows: Tensor) -> Tensor:
    """Sums of float16 rows, (N, D) -> (N,), in the order of TensorFlow's `reduce_sum` on an x86 processor.

    Each addition is rounded to float16: rows longer than 200 packets of 8 numbers are halved; of a part, four packets are
    added to at a time; the four are added up, then the packets that are left, and the 8 lanes of the sum, these in float32.
    """
    N, D = rows.shape
    if D > 1600:  # for a D that is no multiple of 8 TensorFlow's cut moves with the row; this is that of the first
        left = -(-D // 16) * 8
        return _sum_as_tensorflow(rows[:, :left]) + _sum_as_tensorflow(rows[:, left:])
    fours, packets = D // 32, D // 8
    lanes = rows.new_zeros(N, 4, 8)
    for four in rows[:, : 32 * fours].unflatten(1, (fours, 4, 8)).unbind(1):
        lanes += four
    lanes = lanes[:, 0] + lanes[:, 1] + lanes[:, 2] + lanes[:, 3]  # (N, 8)
    for packet in rows[:, 32 * fours : 8 * packets].unflatten(1, (packets - 4 * fours, 8)).unbind(1):
        lanes += packet
    rest = rows.new_zeros(N)
    for column in rows[:, 8 * packets :].unbind(1):
        rest += column
    return rest + lanes.float().sum(dim=1).half()


def _blocks(u: Tensor, v: Tensor, arithmetic: str, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """All squared distances between (A, D) and (B, D), with the rows and columns they are for."""
    for i in range(0, len(u), block):
        for j in range(0, len(v), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            yield rows, columns, _squared_distances(u[rows].float(), v[columns].float(), arithmetic)


def _smallest(u: Tensor, v: Tensor, k: int, arithmetic: str, block: int) -> tuple[Tensor, Tensor]:
    """The k smallest squared distances of each row of `u` to rows of `v`, in rising order, and which those are."""
    found = []
    for part in u.split(block):
        values, indices = [], []
        for _, columns, distances in _blocks(part, v, arithmetic, block):
            least = distances.topk(min(k, distances.shape[1]), largest=False)
            values.append(least.values)
            indices.append(least.indices + columns.start)
        values, order = torch.cat(values, dim=1).topk(k, largest=False)
        found.append((values, torch.cat(indices, dim=1).gather(1, order)))
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; it counts neighbours and must be at least 1.")


def _check(name: str, rows: Tensor, least: int, what: str, device: Any = None) -> Tensor:
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; expected (N, D).")
    if len(rows) < least:
        raise ValueError(f"{name} has {len(rows)} rows, too few for {what}: give {least} or more.")
    low, high = rows.detach().aminmax(dim=1)  # both NaN where one entry is; isfinite would copy the rows
    finite = low.isfinite() & high.isfinite()
    if not finite.all():
        raise ValueError(f"non-finite values in row {int(finite.int().argmin())} of {name}.")
    rows = rows.detach().to(device)
    return rows if rows.dtype == torch.float64 else rows.float()


def _check_pair(
    a: Tensor, b: Tensor, least: tuple[int, int], what: str, device: Any, names: tuple[str, str] = ("real", "fake")
) -> tuple[Tensor, Tensor]:
    a, b = (_check(*each, what, device) for each in zip(names, (a, b), least, strict=True))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{names[0]} is {a.shape[1]}-d and {names[1]} {b.shape[1]}-d; use the same extractor.")
    return a, b.to(a)  # of the same device and dtype, too
