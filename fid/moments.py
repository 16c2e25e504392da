"""Mean and covariance of features, gathered batch by batch and over processes, in groups for error bars."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fid.collective import all_gather, all_reduce, rank_and_size
from fid.frechet import factor
from vca_engine.files import written_aside
from vca_engine.seeds import splitmix64

ROWS = 512  # one product of 512 rows costs less than half of eight products of 64


@dataclass(frozen=True, eq=False)
class Statistics:
    """A Gaussian fitted to features: all that a Frechet distance needs to know of a set of images."""

    mean: np.ndarray  # (D,)
    cov: np.ndarray  # (D, D)
    num: int | None = None  # images; None where a file does not say

    @property
    def dim(self) -> int:
        """The width D of a feature vector."""
        return self.mean.size

    @cached_property
    def factor(self) -> np.ndarray:
        """H (D, D) with H H^T = cov; the costly half of a distance, done once for a reference."""
        return factor(self.cov)


class Moments:
    """Streaming mean and covariance of N feature vectors f_i, in float64 on the CPU.

    Rows are taken about a shift s, the mean of the first rows, so that a large mean costs no digits:

        g_i = f_i - s,   mean = s + sum_i g_i / N,   cov = (sum_i g_i g_i^T - sum_i g_i sum_i g_i^T / N) / (N - 1)

    With K groups the sums are kept K times, for vector i in group splitmix64(i) mod K: as random as a draw, yet the same
    for any order and any number of processes, and independent of a label that is laid out as i mod num_classes.

    Args:
        dim: Width D of a feature vector.
        groups: Number of groups K; each takes 8 D^2 bytes.
    """

    def __init__(self, dim: int, groups: int = 1) -> None:
        self.dim, self.groups = dim, groups
        self.counts = torch.zeros(groups, dtype=torch.int64)
        self._shift: Tensor | None = None
        self._sum = torch.zeros(groups, dim, dtype=torch.float64)
        self._outer = torch.zeros(groups, dim, dim, dtype=torch.float64)
        self._buffers: list[list[Tensor]] = [[] for _ in range(groups)]

    @property
    def num(self) -> int:
        """Vectors so far."""
        return int(self.counts.sum())

    def update(self, features: Tensor, index: Tensor | None = None) -> None:
        """Adds a batch of features.

        Args:
            features: (B, D), of any dtype and on any device.
            index: (B,), number of each vector; counted on from the last batch if not given.

        Raises:
            ValueError: Another shape, or a feature that is not finite; says of which image.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (B, {self.dim}).")
        index = torch.arange(self.num, self.num + len(features)) if index is None else torch.as_tensor(index).cpu()
        rows = features.detach().cpu().double()
        finite = rows.isfinite().all(dim=1)
        if not finite.all():
            raise ValueError(f"non-finite features for sample index {int(index[int(finite.int().argmin())])}.")
        group = torch.from_numpy(splitmix64(index).numpy().view(np.uint64) % np.uint64(self.groups)).long()
        for k in group.unique().tolist():
            self._buffers[k].append(rows[group == k])
            if sum(map(len, self._buffers[k])) >= ROWS:
                self._flush(k)
        self.counts = self.counts + group.bincount(minlength=self.groups)

    def all_reduce(self, process_group: Any = None) -> None:
        """Adds up what all processes hold; afterwards each of them holds it all. Collective."""
        self.__dict__ = self.reduced(process_group).__dict__

    def reduced(self, process_group: Any = None) -> "Moments":
        """What all processes hold together; this one stays as it is. Collective."""
        self._flush()
        shift = torch.full((self.dim,), torch.nan, dtype=torch.float64) if self._shift is None else self._shift
        shifts = [s for s in all_gather(shift, process_group) if not s.isnan().any()]
        if shifts:
            self._move(shifts[0])
        total = Moments.__new__(Moments)
        total.__dict__ = {**self.__dict__, "_buffers": [[] for _ in range(self.groups)]}
        total.counts, total._sum = all_reduce(self.counts, process_group), all_reduce(self._sum, process_group)
        if rank_and_size(process_group)[1] > 1:
            total._outer = torch.empty_like(self._outer)
            for k in range(self.groups):  # one at a time: on a GPU they travel through its memory
                total._outer[k] = all_reduce(self._outer[k], process_group)
        return total

    def statistics(self, without: int | None = None) -> Statistics:
        """Of all vectors, or of those in all groups but one.

        Raises:
            ValueError: Fewer than 2 vectors.
        """
        self._flush()
        kept = torch.arange(self.groups) != (-1 if without is None else without)
        num = int(self.counts[kept].sum())
        if num < 2:
            raise ValueError(f"mean and covariance need at least 2 images; got {num}.")
        total = self._sum[kept].sum(dim=0)
        outer = self._outer.sum(dim=0) if without is None else self._outer.sum(dim=0) - self._outer[without]
        cov = (outer - torch.outer(total, total) / num) / (num - 1)
        return Statistics((self._shift + total / num).numpy(), cov.numpy(), num)

    def leave_one_out(self) -> Iterator[Statistics]:
        """Statistics without group 0, without group 1, ...; nothing where a group is empty, as of few images."""
        if self.groups > 1 and self.counts.min() > 0 and self.num - self.counts.max() >= 2:
            yield from (self.statistics(without=k) for k in range(self.groups))

    @property
    def mean(self) -> np.ndarray:
        """(D,)."""
        return self.statistics().mean

    @property
    def cov(self) -> np.ndarray:
        """(D, D), with N - 1 in the denominator, as `numpy.cov`."""
        return self.statistics().cov

    def save(self, path: str | Path) -> None:
        """Writes `mu`, `sigma` and `num_images` to an .npz, which pytorch-fid and `load_ref` read.

        It says nothing of a protocol; `save_reference` writes that, too.
        """
        statistics = self.statistics()
        with written_aside(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=statistics.mean, sigma=statistics.cov, num_images=statistics.num)

    def state_dict(self) -> dict[str, Tensor | None]:
        """All that was gathered, as tensors."""
        self._flush()
        return {"counts": self.counts, "shift": self._shift, "sum": self._sum.clone(), "outer": self._outer.clone()}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Adds what another `Moments` gathered to what is there.

        Raises:
            ValueError: Another width, or another number of groups.
        """
        if state["outer"].shape != self._outer.shape:
            raise ValueError(
                f"a state of {tuple(state['outer'].shape)} (groups, D, D) does not fit into {tuple(self._outer.shape)}."
            )
        if state["shift"] is None:
            return
        self._flush()
        other = Moments.__new__(Moments)
        other.__dict__ = {**self.__dict__, "_buffers": [[] for _ in range(self.groups)]}
        other.counts, other._shift = state["counts"].clone(), state["shift"]
        other._sum, other._outer = state["sum"].clone(), state["outer"].clone()
        self._shift = other._shift if self._shift is None else self._shift
        other._move(self._shift)
        self.counts = self.counts + other.counts
        self._sum += other._sum
        self._outer += other._outer

    def _flush(self, group: int | None = None) -> None:
        for k in range(self.groups) if group is None else [group]:
            if self._buffers[k]:
                rows = torch.cat(self._buffers[k])  # (R, D)
                self._buffers[k].clear()
                self._shift = rows.mean(dim=0) if self._shift is None else self._shift
                rows -= self._shift
                self._sum[k] += rows.sum(dim=0)
                self._outer[k].addmm_(rows.T, rows)

    def _move(self, shift: Tensor) -> None:
        """To sums about another shift: g + d in place of g, d = old shift - new one."""
        if self._shift is not None and not torch.equal(shift, self._shift):
            d = self._shift - shift
            for k, num in enumerate(self.counts.tolist()):
                cross = torch.outer(d, self._sum[k])
                self._outer[k] += cross + cross.T + num * torch.outer(d, d)
                self._sum[k] += num * d
        self._shift = shift
