"""The Frechet distance between two Gaussians, from means and covariances."""

import numpy as np
from numpy.typing import ArrayLike


def frechet_distance(mean1: ArrayLike, cov1: ArrayLike, mean2: ArrayLike, cov2: ArrayLike) -> float:
    """|mean1 - mean2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2), in float64.

    The eigenvalues of cov1 cov2 = H H^T cov2 are those of M = H^T cov2 H, which is symmetric and has none below 0:

        cov1 = V diag(w) V^T,   H = V diag(w)^(1/2),   tr (cov1 cov2)^(1/2) = sum_i eig_i(M)^(1/2)

    Two symmetric eigensolves in place of a matrix square root: never complex, and nothing needs to be added to the
    diagonal of a singular covariance (fewer images than dimensions).

    Args:
        mean1: (D,).
        cov1: (D, D), symmetric.
        mean2: (D,).
        cov2: (D, D), symmetric.

    Returns:
        The squared 2-Wasserstein distance of the two Gaussians, which is what the literature reports; at least 0.

    Raises:
        ValueError: Shapes that do not fit, or entries that are not finite.

    Source: Dowson and Landau, The Frechet distance between multivariate normal distributions, 1982; as a metric
    between sets of images, Heusel et al., arXiv:1706.08500.
    """
    mean1, cov1 = check_moments(mean1, cov1, "the first Gaussian")
    mean2, cov2 = check_moments(mean2, cov2, "the second Gaussian")
    if mean1.size != mean2.size:
        raise ValueError(f"the first Gaussian is {mean1.size}-d, the second {mean2.size}-d; use the same extractor.")
    w, V = np.linalg.eigh(cov1)
    H = V * np.sqrt(w.clip(min=0))  # rounding leaves eigenvalues of about -1e-16 where there should be 0
    M = H.T @ cov2 @ H
    sqrt_trace = np.sqrt(np.linalg.eigvalsh((M + M.T) / 2).clip(min=0)).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * sqrt_trace
    return max(float(distance), 0.0)


def check_moments(mean: ArrayLike, cov: ArrayLike, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The same two, (D,) and (D, D), in float64; a ValueError that begins with `where` if they cannot be that."""
    mean, cov = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise ValueError(f"{where} has a mean {mean.shape} and a covariance {cov.shape}; expected (D,) and (D, D).")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{where} has NaN or infinite entries in its mean or covariance.")
    if np.abs(cov - cov.T).max(initial=0) > 1e-6 * np.abs(cov).max(initial=0):
        raise ValueError(f"{where} has a covariance that is not symmetric.")
    return mean, cov
