"""Losses of many steps, kept where they are computed until a line is printed, so that no step waits for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

NUM_BINS = 10  # of t, from 0 to its end
BAD, NORM = 2 * NUM_BINS, 2 * NUM_BINS + 1  # columns of a row; before them the sums and the counts of the bins
WIDTH = 2 * NUM_BINS + 2


class Meter:
    """Loss in each bin of t, norm of the gradient, and whether it was skipped, of the steps since the last line.

    Args:
        accelerator: The processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.device = accelerator, accelerator.device
        self.done = torch.zeros(0, WIDTH, dtype=torch.float64)  # over all processes
        self.fresh: list[Tensor] = []  # of this process
        self.row = self._zeros()
        self.skipped, self.in_a_row = 0, 0  # steps before these, in all and just before them

    def load(self, rows: Tensor, skipped: Sequence[int]) -> None:
        """Go on from the `rows` (S, WIDTH) and from (`skipped`, `in_a_row`) of a checkpoint."""
        self.done, (self.skipped, self.in_a_row) = rows, skipped

    def add(self, losses: Tensor, share: Tensor) -> None:
        """Count losses (B,) at times of which `share` (B,) is the part of the way, in [0, 1]."""
        bins = (share * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        one_hot = (bins[:, None] == torch.arange(NUM_BINS, device=self.device)).double()  # (B, bins)
        self.row[:NUM_BINS] += losses.double() @ one_hot
        self.row[NUM_BINS:BAD] += one_hot.sum(0)

    def end_step(self, norm: Tensor, skipped: Tensor) -> None:
        """Close the row of a step with the gradient's norm () and whether it was skipped (), both of all processes."""
        self.row[BAD], self.row[NORM] = skipped.double(), norm.double()
        self.fresh.append(self.row)
        self.row = self._zeros()

    def rows(self) -> Tensor:
        """Sum the rows of the steps since the last line over all processes: (S, WIDTH) on the CPU. All call this."""
        if self.fresh:
            own = torch.stack(self.fresh)  # (S, WIDTH)
            summed = self.accelerator.reduce(own.clone(), reduction="sum")
            summed[:, BAD:] = own[:, BAD:]  # the same everywhere
            self.done = torch.cat([self.done, summed.cpu()])
            self.fresh = []
        return self.done

    def line(self, partial: bool = False) -> dict[str, Any]:
        """Average since the last line, without skipped steps. All processes call this.

        Args:
            partial: The line goes on after this; else a new one begins.

        Returns:
            `loss` and `grad_norm`, None if there was no good step; `loss_by_t`, with None where a bin is empty;
            `skipped`, steps in all, and `skipped_before`, until the line before; `most_in_a_row`, the longest series of
            skipped steps that reached into these.
        """
        rows = self.rows()
        before, skipped, in_a_row, most = self.skipped, self.skipped, self.in_a_row, self.in_a_row
        for bad in (rows[:, BAD] > 0).tolist():
            in_a_row = in_a_row + 1 if bad else 0
            skipped += bad
            most = max(most, in_a_row)
        good = rows[rows[:, BAD] == 0]
        sums, counts = good[:, :NUM_BINS].sum(0), good[:, NUM_BINS:BAD].sum(0)
        means = [s / c if c else None for s, c in zip(sums.tolist(), counts.tolist(), strict=True)]
        loss = float(sums.sum() / counts.sum()) if len(good) else None
        norm = float(good[:, NORM].mean()) if len(good) else None
        if not partial:
            self.done, self.skipped, self.in_a_row = rows[:0], skipped, in_a_row
        counts = {"skipped": skipped, "skipped_before": before, "most_in_a_row": most}
        return {"loss": loss, "grad_norm": norm, "loss_by_t": means, **counts}

    def _zeros(self) -> Tensor:
        return torch.zeros(WIDTH, dtype=torch.float64, device=self.device)
