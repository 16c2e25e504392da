"""Monge Inception Distance: of the marginals in random directions."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fid.metrics.metric import Metric, Side
from fid.metrics.rows import check_pair
from fid.options import Options
from vca_engine.precision import ieee_float32


class MIND(Metric):
    """The distance of the marginals in 1,000 random directions."""

    numbers = ("mind",)
    columns: ClassVar = {"mind": ("MIND", 4)}

    def compute(self, samples: Side, reference: Side, options: Options) -> dict[str, Any]:
        """Compute it."""
        return {"mind": mind(reference.rows["features"], samples.rows["features"], device=options.device)}


@ieee_float32()
def mind(real: Tensor, fake: Tensor, num_directions: int = 1000, seed: int = 2020, device: Any = None) -> float:
    """Measure how far the projections on random unit vectors u must move, squared.

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
    real, fake = check_pair(real, fake, (1, 1), "MIND", device)
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
