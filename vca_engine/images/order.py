"""The order in which training reads the images: a function of (seed, epoch)."""

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from vca_engine.seeds import mix


class EndlessBatches(Sampler):
    """Batches of (index, flip), a function of (seed, position): what step 1000 reads does not depend on what was read.

    All processes share one order, a fresh permutation an epoch; batch number k of the whole run takes the positions
    k B ... (k+1) B - 1 of it, and each process a contiguous part of these.

    Args:
        num_images: Images in the data.
        batch_size: B, over all processes.
        seed: Seed of the order.
        flip: Whether to mirror at random.
        start: First batch.
        rank: This process.
        num_processes: All processes; divides B.
    """

    def __init__(
        self, num_images: int, batch_size: int, *, seed: int, flip: bool, start: int, rank: int, num_processes: int
    ) -> None:
        if batch_size % num_processes:
            raise ValueError(
                f"train.batch_size / train.accumulate is {batch_size}, which {num_processes} processes cannot share "
                f"evenly; choose a multiple of {num_processes}."
            )
        self.num_images, self.batch_size, self.seed, self.flip = num_images, batch_size, seed, flip
        self.start, self.rank, self.num_processes = start, rank, num_processes

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        """Give batch after batch, without end."""
        epoch = -1
        for number in itertools.count(self.start):
            batch = []
            for p in self.positions(number):
                if p // self.num_images != epoch:
                    epoch = p // self.num_images
                    order, flips = self._epoch(epoch)
                batch.append((order[p % self.num_images], flips[p % self.num_images]))
            yield batch

    def positions(self, number: int) -> range:
        """Give the positions of the images of batch `number` of this process in the order of the whole run."""
        share = self.batch_size // self.num_processes
        first = number * self.batch_size + self.rank * share
        return range(first, first + share)

    def _epoch(self, epoch: int) -> tuple[list[int], list[bool]]:
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(self.num_images, generator=generator)
        flips = torch.randint(2, (self.num_images,), generator=generator).bool() & self.flip
        return order.tolist(), flips.tolist()


class NumberedBatches(EndlessBatches):
    """The same batches of (index, flip, position), for data whose views are a function of where they stand."""

    def __iter__(self) -> Iterator[list[tuple[int, bool, int]]]:
        """Give batch after batch, without end."""
        for number, batch in enumerate(super().__iter__(), self.start):
            yield [(*key, position) for key, position in zip(batch, self.positions(number), strict=True)]
