"""The Frechet distance between two Gaussians, from means and covariances, and how large it is for perfect samples."""

import numpy as np
from numpy.typing import ArrayLike


def frechet_distance(mean1: ArrayLike, cov1: ArrayLike, mean2: ArrayLike, cov2: ArrayLike) -> float:
    """|mean1 - mean2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2), in float64.

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
    return max(sum(frechet_terms(mean1, factor(cov1), mean2, cov2)), 0.0)


def factor(cov: np.ndarray) -> np.ndarray:
    """H (D, D) with H H^T = cov and orthogonal columns, by an eigensolve: H = V diag(w)^(1/2).

    Raises:
        ValueError: An eigenvalue below 0 by more than rounding: no covariance.
    """
    w, V = np.linalg.eigh(cov)
    if w[0] < -1e-6 * max(w[-1], 0):
        raise ValueError(
            f"a covariance has the eigenvalue {w[0]:.3g} below 0 (the largest is {w[-1]:.3g}); it is damaged."
        )
    return V * np.sqrt(w.clip(min=0))  # rounding leaves eigenvalues of about -1e-16 where there should be 0


def frechet_terms(mean1: np.ndarray, H: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> tuple[float, float]:
    """The distance between (mean1, H H^T) and (mean2, cov2) as a term of the means and a term of the covariances.

    The eigenvalues of cov1 cov2 = H H^T cov2 are those of M = H^T cov2 H, which is symmetric and has none below 0:

        tr (cov1 cov2)^(1/2) = sum_i eig_i(M)^(1/2)

    Two symmetric eigensolves in place of a matrix square root, one of which `factor` does once for a reference: never
    complex, and nothing needs to be added to the diagonal of a singular covariance (fewer images than dimensions).

    Args:
        mean1: (D,), of the reference.
        H: (D, D), `factor` of its covariance.
        mean2: (D,).
        cov2: (D, D), symmetric.
    """
    M = H.T @ cov2 @ H
    sqrt_trace = np.sqrt(np.linalg.eigvalsh((M + M.T) / 2).clip(min=0)).sum()
    return float(np.square(mean1 - mean2).sum()), float(np.square(H).sum() + np.trace(cov2) - 2 * sqrt_trace)


def noise_floor(H: np.ndarray, num: int) -> float:
    """The expected distance to a Gaussian of `num` perfect samples of it: what no generator can go below on average.

        E = (5/4 sum_i l_i + 1/2 sum_ij l_i l_j / (l_i + l_j)) / num,   l the eigenvalues of the covariance

    to first order in 1/num; it holds for num well above the number of dimensions that carry variance.

    Args:
        H: (D, D), `factor` of the covariance.
        num: Number of samples.
    """
    eigenvalues = np.square(H).sum(axis=0)  # the columns of H are orthogonal
    eigenvalues = eigenvalues[eigenvalues > 0]
    harmonic = np.outer(eigenvalues, eigenvalues) / np.add.outer(eigenvalues, eigenvalues)
    return float(1.25 * eigenvalues.sum() + 0.5 * harmonic.sum()) / num


def jackknife(value: float, left_out: ArrayLike) -> tuple[float, float]:
    """Error and bias of a value of all N samples, from K values F_(-k), each without one of K groups of them.

        F_inf = K F - (K - 1) mean_k F_(-k),   SE = ((K - 1) / K sum_k (F_(-k) - mean)^2)^(1/2)

    Returns:
        The standard error of `value` (of drawing the samples only), and the value without its bias of order 1 / N, as
        of infinitely many samples.

    Source: the bias, Chong and Forsyth, arXiv:1911.07023; the jackknife, Efron and Stein, 1981.
    """
    left_out = np.asarray(left_out, dtype=np.float64)  # (K,)
    K = len(left_out)
    error = np.sqrt((K - 1) / K * np.square(left_out - left_out.mean()).sum())
    return float(error), float(K * value - (K - 1) * left_out.mean())


def check_moments(mean: ArrayLike, cov: ArrayLike, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The same two, (D,) and (D, D), in float64; a ValueError that begins with `where` if they cannot be that."""
    try:
        mean, cov = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} has a mean or a covariance that are not numbers: {error}.") from None
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise ValueError(f"{where} has a mean {mean.shape} and a covariance {cov.shape}; expected (D,) and (D, D).")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{where} has NaN or infinite entries in its mean or covariance.")
    if np.abs(cov - cov.T).max(initial=0) > 1e-6 * np.abs(cov).max(initial=0):
        raise ValueError(f"{where} has a covariance that is not symmetric.")
    return mean, cov
