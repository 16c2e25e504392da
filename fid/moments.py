"""Mean and covariance of features: gathered batch by batch, written to and read from .npz files."""

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fid.frechet import check_moments

ROWS = 512  # one product of 512 rows costs less than half of eight products of 64


class Moments:
    """Streaming mean and covariance of N feature vectors f_i, in float64 on the CPU.

    Rows are taken about a shift s, the mean of the first rows, so that a large mean costs no digits:

        g_i = f_i - s,   mean = s + sum_i g_i / N,   cov = (sum_i g_i g_i^T - sum_i g_i sum_i g_i^T / N) / (N - 1)

    Args:
        dim: Width D of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.num = dim, 0
        self._buffer: list[Tensor] = []
        self._shift: Tensor | None = None
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Adds a batch of features (B, D), of any dtype and on any device.

        Raises:
            ValueError: Another shape, or a feature that is not finite; says of which image.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (B, {self.dim}).")
        rows = features.detach().cpu().double()
        finite = rows.isfinite().all(dim=1)
        if not finite.all():
            raise ValueError(f"the features of image {self.num + int(finite.int().argmin())} are not finite.")
        self.num += len(rows)
        self._buffer.append(rows)
        if sum(map(len, self._buffer)) >= ROWS:
            self._flush()

    @property
    def mean(self) -> np.ndarray:
        """(D,)."""
        self._flush()
        return (self._shift + self._sum / self.num).numpy()

    @property
    def cov(self) -> np.ndarray:
        """(D, D), with N - 1 in the denominator, as `numpy.cov`."""
        self._flush()
        return ((self._outer - torch.outer(self._sum, self._sum) / self.num) / (self.num - 1)).numpy()

    def _flush(self) -> None:
        if self.num < 2:
            raise ValueError(f"mean and covariance need at least 2 images; got {self.num}.")
        if self._buffer:
            rows = torch.cat(self._buffer)  # (R, D)
            self._buffer.clear()
            self._shift = rows.mean(dim=0) if self._shift is None else self._shift
            rows -= self._shift
            self._sum += rows.sum(dim=0)
            self._outer += rows.T @ rows


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a set of images leaves behind: all that a Frechet distance needs to know of it."""

    mean: np.ndarray  # (D,)
    cov: np.ndarray  # (D, D)
    num: int | None = None  # images; None where a file does not say
    extractor: str | None = None  # its name, with the fingerprint of its weights; None likewise
    source: str = "statistics"  # file or folder, for messages

    @property
    def dim(self) -> int:
        """The width D of a feature vector."""
        return self.mean.size

    def save(self, path: str | Path) -> None:
        """Writes `mu`, `sigma` (the names that other tools read), `num_images` and `extractor`; whole or not at all."""
        record = {"mu": self.mean, "sigma": self.cov, "num_images": self.num, "extractor": self.extractor}
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **{key: value for key, value in record.items() if value is not None})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def holds_statistics(path: str | Path) -> bool:
    """Whether `path` is an .npz with `mu` or `sigma`; if not, it can only be images."""
    if Path(path).suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return False
    with np.load(path) as archive:
        return not {"mu", "sigma"}.isdisjoint(archive.files)


def load_statistics(path: str | Path) -> Statistics:
    """Reads any .npz with `mu` (D,) and `sigma` (D, D): ours, pytorch-fid's, or the reference files of ADM.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else, or statistics that cannot be right; says what.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"the statistics '{path}' do not exist.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"'{path}' is not an .npz file.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = sorted(archive.files)
            arrays = {key: archive[key] for key in ("mu", "sigma", "num_images", "extractor") if key in found}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"'{path}' cannot be read: {error}.") from error
    if not {"mu", "sigma"} <= arrays.keys():
        hint = " It holds images: run `python -m fid stats` on it first." if "arr_0" in found else ""
        raise ValueError(f"'{path}' has no mu and sigma, but {found}.{hint}")
    mean, cov = check_moments(arrays["mu"], arrays["sigma"], f"'{path}'")
    num = int(arrays["num_images"]) if "num_images" in arrays else None
    extractor = str(arrays["extractor"]) if "extractor" in arrays else None
    return Statistics(mean, cov, num, extractor, source=str(path))
