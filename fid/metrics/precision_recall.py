"""Precision and recall: the share of samples near real images, and of real images near samples."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fid.metrics.metric import Metric, Side
from fid.metrics.rows import ARITHMETICS, BLOCK, check_k, check_pair, distance_blocks, smallest
from fid.options import Options


class PrecisionRecall(Metric):
    """Precision and recall by the three nearest neighbours."""

    title, numbers = "precision, recall", ("precision", "recall", "pr")
    columns: ClassVar = {"precision": ("P", 2), "recall": ("R", 2)}

    def compute(self, samples: Side, reference: Side, options: Options) -> dict[str, Any]:
        """Compute both, and say of how many rows."""
        real, fake = reference.rows["features"], samples.rows["features"]
        precision, recall = precision_recall(real, fake, k=3, arithmetic=options.pr_compat, device=options.device)
        sizes = {"k": 3, "num_real": len(real), "num_fake": len(fake), "arithmetic": options.pr_compat}
        return {"precision": precision, "recall": recall, "pr": sizes}


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, arithmetic: str = "adm-fp16", device: Any = None, block: int = BLOCK
) -> tuple[float, float]:
    """Compute the share of samples within reach of a real image, and of real images within reach of a sample.

        precision = mean_j [exists i: d(x_i, y_j) <= r(x_i)],   recall = mean_i [exists j: d(x_i, y_j) <= r(y_j)]

    for real x_i and generated y_j, where d is the squared distance and r the one to the k-th neighbour in the same set.
    `adm-fp16` rounds as the script behind the published numbers does, which raises both by some 0.001 to 0.006:

        d = fp16(fp16(|x|^2 - 2 x.y) + |y|^2)   of fp16 rows, norms and products

    A product is summed in float32 and rounded once; a norm is rounded to float16 after each addition. A block with a
    number that float16 cannot hold is done in float32 (the script's blocks are of 10,000 rows).

    The order of those additions is that of TensorFlow on an x86 processor. Beside the script's own operations in
    TensorFlow 2.21 there, both numbers were equal for 256 of 257 pairs of simulated sets (D = 2048 and 64, 300 to
    12,000 rows) and one row of 700 off for the other: one distance in 7,000 differs in its last bit where float32 sums
    of a product in two orders round to two sides. On a GPU TensorFlow adds up a norm in yet another order, also in
    float16; one like it moved both numbers by up to 0.0035 for 2,000 rows. On a processor, TensorFlow 2.15 rounds each
    addition of a product, too.

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
    check_k(k)
    real, fake = check_pair(real, fake, (k + 1, k + 1), f"precision with k={k}", device)
    real_radii, fake_radii = (smallest(rows, rows, k + 1, arithmetic, block)[0][:, k] for rows in (real, fake))
    real_found = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    fake_found = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    for i, j, distances in distance_blocks(real, fake, arithmetic, block):
        real_found[i] |= (distances <= fake_radii[j]).any(dim=1)
        fake_found[j] |= (distances <= real_radii[i, None]).any(dim=0)
    return int(fake_found.sum()) / len(fake), int(real_found.sum()) / len(real)
