"""Mean and covariance of features, gathered batch by batch and over processes, in groups for error bars."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fid.distributed import all_gather, all_reduce, rank_and_size
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


@dataclass
class Sums:
    """Sums of vectors f_i about a shift s, kept apart in K groups; those of two sets add up.

    g_i = f_i - s,   mean = s + sum_i g_i / N,   cov = (sum_i g_i g_i^T - sum_i g_i sum_i g_i^T / N) / (N - 1)
    """

    counts: Tensor  # (K,) vectors in each group
    sum: Tensor  # (K, D) of g_i, float64
    outer: Tensor  # (K, D, D) of g_i g_i^T, float64
    shift: Tensor | None = None  # (D,); None where there is no vector yet

    @property
    def num(self) -> int:
        """Vectors N, of all groups."""
        return int(self.counts.sum())

    def about(self, shift: Tensor | None) -> "Sums":
        """Move to another shift (D,): g + d in place of g, d = old shift - new one; these sums stay as they are."""
        if shift is None or (self.shift is not None and torch.equal(shift, self.shift)):
            return self
        moved = Sums(self.counts, self.sum, self.outer, shift)
        if self.shift is not None:
            d = self.shift - shift
            moved.sum, moved.outer = self.sum.clone(), self.outer.clone()
            for k, num in enumerate(self.counts.tolist()):
                cross = torch.outer(d, moved.sum[k])
                moved.outer[k] += cross + cross.T + num * torch.outer(d, d)
                moved.sum[k] += num * d
        return moved

    def __add__(self, other: "Sums") -> "Sums":
        shift = other.shift if self.shift is None else self.shift
        other = other.about(shift)
        return Sums(self.counts + other.counts, self.sum + other.sum, self.outer + other.outer, shift)

    def over_processes(self, process_group: Any = None) -> "Sums":
        """Add up what all processes have, about one shift. Collective."""
        if rank_and_size(process_group)[1] == 1:
            return self
        total = Sums(
            all_reduce(self.counts, process_group), all_reduce(self.sum, process_group), self.outer, self.shift
        )
        total.outer = torch.empty_like(self.outer)
        for k in range(len(self.outer)):  # one at a time: on a GPU they travel through its memory
            total.outer[k] = all_reduce(self.outer[k], process_group)
        return total

    def statistics(self, without: int | None = None) -> Statistics:
        """Compute mean and covariance of all vectors, or of those in all groups but one.

        Raises:
            ValueError: Fewer than 2 vectors.
        """
        kept = torch.arange(len(self.counts)) != (-1 if without is None else without)
        num = int(self.counts[kept].sum())
        if num < 2:
            raise ValueError(f"mean and covariance need at least 2 images; got {num}.")
        total = self.sum[kept].sum(dim=0)
        outer = self.outer.sum(dim=0) if without is None else self.outer.sum(dim=0) - self.outer[without]
        cov = (outer - torch.outer(total, total) / num) / (num - 1)
        return Statistics((self.shift + total / num).numpy(), cov.numpy(), num)

    def leave_one_out(self) -> Iterator[Statistics]:
        """Yield statistics without group 0, without group 1, ...; none where a group is empty, as of few images."""
        if len(self.counts) > 1 and self.counts.min() > 0 and self.num - self.counts.max() >= 2:
            yield from (self.statistics(without=k) for k in range(len(self.counts)))


class Moments:
    """Streaming mean and covariance of feature vectors, in float64 on the CPU.

    Rows are taken about the mean of the first ones, so that a large mean costs no digits. With K groups the sums are
    kept K times, for vector i in group splitmix64(i) mod K: as random as a draw, yet the same for any order and any
    number of processes, and independent of a label that is laid out as i mod num_classes.

    Args:
        dim: Width D of a feature vector.
        groups: Number of groups K; each takes 8 D^2 bytes.
    """

    def __init__(self, dim: int, groups: int = 1) -> None:
        self.dim, self.groups = dim, groups
        zeros = torch.zeros(groups, dim, dtype=torch.float64), torch.zeros(groups, dim, dim, dtype=torch.float64)
        self._sums = Sums(torch.zeros(groups, dtype=torch.int64), *zeros)  # its counts are ahead by what is in buffers
        self._buffers: list[list[Tensor]] = [[] for _ in range(groups)]

    @property
    def num(self) -> int:
        """Vectors so far."""
        return self._sums.num

    def update(self, features: Tensor, index: Tensor | None = None) -> None:
        """Add a batch of features.

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
        self._sums.counts = self._sums.counts + group.bincount(minlength=self.groups)

    def all_reduce(self, process_group: Any = None) -> None:
        """Add up what all processes hold; afterwards each of them holds it all. Collective."""
        self._sums = self.reduced(process_group)

    def reduced(self, process_group: Any = None) -> Sums:
        """Return what all processes hold together; this one stays as it is. Collective."""
        sums = self.sums
        shift = torch.full((self.dim,), torch.nan, dtype=torch.float64) if sums.shift is None else sums.shift
        shifts = [s for s in all_gather(shift, process_group) if not s.isnan().any()]
        self._sums = sums.about(shifts[0] if shifts else None)
        return dataclasses.replace(self._sums.over_processes(process_group))

    @property
    def sums(self) -> Sums:
        """The sums of all vectors so far."""
        for k in range(self.groups):
            self._flush(k)
        return self._sums

    def statistics(self) -> Statistics:
        """Compute mean and covariance; a ValueError says that there are fewer than 2 vectors."""
        return self.sums.statistics()

    def leave_one_out(self) -> Iterator[Statistics]:
        """Yield statistics without group 0, without group 1, ...; none where a group is empty, as of few images."""
        return self.sums.leave_one_out()

    @property
    def mean(self) -> np.ndarray:
        """Mean (D,)."""
        return self.statistics().mean

    @property
    def cov(self) -> np.ndarray:
        """Covariance (D, D), with N - 1 in the denominator, as `numpy.cov`."""
        return self.statistics().cov

    def save(self, path: str | Path) -> None:
        """Write `mu`, `sigma` and `num_images` to an .npz, which pytorch-fid and `load_ref` read.

        It says nothing of a protocol; `save_reference` writes that, too.
        """
        statistics = self.statistics()
        with written_aside(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=statistics.mean, sigma=statistics.cov, num_images=statistics.num)

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return all that was gathered, as tensors."""
        sums = self.sums
        return {"counts": sums.counts, "shift": sums.shift, "sum": sums.sum.clone(), "outer": sums.outer.clone()}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Add what another `Moments` gathered to what is there.

        Raises:
            ValueError: Another width, or another number of groups.
        """
        if state["outer"].shape != self._sums.outer.shape:
            raise ValueError(
                f"a state of {tuple(state['outer'].shape)} (groups, D, D) does not fit into "
                f"{tuple(self._sums.outer.shape)}."
            )
        self._sums = self.sums + Sums(**state)

    def _flush(self, group: int) -> None:
        """Move the vectors that wait in a buffer into the sums."""
        if self._buffers[group]:
            rows, sums = torch.cat(self._buffers[group]), self._sums  # (R, D)
            self._buffers[group].clear()
            sums.shift = rows.mean(dim=0) if sums.shift is None else sums.shift
            rows -= sums.shift
            sums.sum[group] += rows.sum(dim=0)
            sums.outer[group].addmm_(rows.T, rows)
