"""Inception Score: from the classes that Inception sees in the samples alone."""

from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fid.metrics.metric import Metric, Side
from fid.metrics.rows import check_rows
from fid.options import Options


class InceptionScore(Metric):
    """The Inception Score in file order by 5,000, as ADM does, and shuffled into 10 parts, as torch-fidelity does."""

    output, reference, title = "logits", None, "Inception Score"
    numbers = ("inception_score", "inception_score_std", "inception_score_shuffled")
    columns: ClassVar = {"inception_score": ("IS", 1)}

    def compute(self, samples: Side, reference: Side, options: Options) -> dict[str, Any]:
        """Compute both orders; the standard deviation is that over the parts of the first."""
        logits = samples.rows["logits"]
        mean, std = inception_score(logits, chunk=5000)
        shuffled, _ = inception_score(logits, chunk=None, splits=min(10, len(logits)), seed=2020)
        return {"inception_score": mean, "inception_score_std": std, "inception_score_shuffled": shuffled}


def inception_score(
    logits: Tensor, chunk: int | None = 5000, splits: int | None = None, seed: int | None = None
) -> tuple[float, float]:
    """Measure how sure a classifier is of each image, and how evenly the images spread over its classes: 1 to C.

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
    logits = check_rows("logits", logits, 1, "the Inception Score")
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
