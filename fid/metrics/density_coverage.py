"""Density and coverage: precision and recall with less weight on outliers."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fid.metrics.metric import Metric, Side
from fid.metrics.rows import check_k, check_pair, distance_blocks, smallest
from fid.options import Options


class DensityCoverage(Metric):
    """Density and coverage by the five nearest neighbours."""

    title, numbers = "density, coverage", ("density", "coverage")
    columns: ClassVar = {"density": ("D", 2), "coverage": ("C", 2)}

    def compute(self, samples: Side, reference: Side, options: Options) -> dict[str, Any]:
        """Compute both."""
        real, fake = reference.rows["features"], samples.rows["features"]
        density, coverage = density_coverage(real, fake, k=5, device=options.device)
        return {"density": density, "coverage": coverage}


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, device: Any = None) -> tuple[float, float]:
    """Count how many real neighbourhoods hold a sample, over k, and the share of real neighbourhoods that hold one.

        density = 1 / (k N) sum_j sum_i [d(x_i, y_j) < r(x_i)],   coverage = mean_i [exists j: d(x_i, y_j) < r(x_i)]

    with x, y, d and r of `precision_recall`, in float32. Perfect samples have density 1 and,
    for M = N, coverage 1 - 2^-k.

    Args:
        real: (M, D).
        fake: (N, D).
        k: Neighbour, not counting the row itself.
        device: Where to compute.

    Raises:
        ValueError: Fewer than k + 1 real rows, no generated ones, different widths, or rows that are not finite.

    Source: Naeem et al., arXiv:2002.09797.
    """
    check_k(k)
    real, fake = check_pair(real, fake, (k + 1, 1), f"coverage with k={k}", device)
    radii = smallest(real, real, k + 1, "fp32")[0][:, k]
    pairs, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for i, _, distances in distance_blocks(real, fake, "fp32"):
        inside = distances < radii[i, None]
        pairs += int(inside.sum())
        covered[i] |= inside.any(dim=1)
    return pairs / (k * len(fake)), int(covered.sum()) / len(real)
