"""Kernel Inception Distance: unbiased, so small sets of different sizes compare."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fid.metrics.metric import Metric, Side
from fid.metrics.rows import check_pair
from fid.options import Options


class KID(Metric):
    """The kernel distance over 100 subsets of 1,000 rows, or of as many as there are."""

    numbers = ("kid", "kid_std", "kid_subset_size")
    columns: ClassVar = {"kid": ("KID", 5)}

    def compute(self, samples: Side, reference: Side, options: Options) -> dict[str, Any]:
        """Compute it; where a subset is the whole of both sides, once."""
        real, fake = reference.rows["features"], samples.rows["features"]
        size = min(1000, len(real), len(fake))
        whole = size == len(real) == len(fake)  # then all subsets are the same
        mean, std = kid(real, fake, subsets=1 if whole else 100, size=size, device=options.device)
        return {"kid": mean, "kid_std": None if whole else std, "kid_subset_size": size}


def kid(
    real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020, device: Any = None
) -> tuple[float, float]:
    """Compute the unbiased squared maximum mean discrepancy of a cubic kernel, in float64.

        KID = mean_{i != i'} k(x_i, x_i') + mean_{j != j'} k(y_j, y_j') - 2 mean_ij k(x_i, y_j)
        k(a, b) = (a.b / D + 1)^3

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
    real, fake = check_pair(real, fake, (size, size), f"KID with size={size}", device)
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        y, x = (rows[torch.from_numpy(rng.choice(len(rows), size, replace=False))].double() for rows in (fake, real))
        within = sum(float(kernel.sum() - kernel.trace()) for kernel in (_cubic(x, x), _cubic(y, y)))
        values.append(within / (size * (size - 1)) - 2 * float(_cubic(x, y).mean()))
    return float(np.mean(values)), float(np.std(values))


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
