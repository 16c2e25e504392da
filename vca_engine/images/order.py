"""The order in which training reads the images: a function of (seed, epoch)."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from vca_engine.seeds import mix

CLASSES, WITHIN = 5, 6  # series of random numbers, beside those of `vca_engine.training.step.draws`


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
        labels: (N,) integers from 0, where each class is to be drawn equally often; see `Balanced`.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        flip: bool,
        start: int,
        rank: int,
        num_processes: int,
        labels: np.ndarray | None = None,
    ) -> None:
        if batch_size % num_processes:
            raise ValueError(
                f"train.batch_size / train.accumulate is {batch_size}, which {num_processes} processes cannot share "
                f"evenly; choose a multiple of {num_processes}."
            )
        self.num_images, self.batch_size, self.seed, self.flip = num_images, batch_size, seed, flip
        self.start, self.rank, self.num_processes, self.labels = start, rank, num_processes, labels

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        """Give batch after batch, without end."""
        order = Shuffled(self.num_images, self.seed) if self.labels is None else Balanced(self.labels, self.seed)
        for number in itertools.count(self.start):
            keys = map(order.key, self.positions(number))
            yield [(index, mirrored and self.flip) for index, mirrored in keys]

    def positions(self, number: int) -> range:
        """Give the positions of the images of batch `number` of this process in the order of the whole run."""
        share = self.batch_size // self.num_processes
        first = number * self.batch_size + self.rank * share
        return range(first, first + share)


class Shuffled:
    """The images in a fresh order an epoch: position of the run -> (index, mirrored).

    Args:
        num_images: N; an epoch is N positions.
        seed: Of the orders; a tuple for one of several series.
    """

    def __init__(self, num_images: int, *seed: int) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, -1

    def key(self, position: int) -> tuple[int, bool]:
        """Give the index of the image at a position, and whether it is mirrored where training mirrors."""
        epoch, place = divmod(position, self.num_images)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mix(*self.seed, epoch))
            self.order = torch.randperm(self.num_images, generator=generator).tolist()
            self.flips = torch.randint(2, (self.num_images,), generator=generator).bool().tolist()
            self.epoch = epoch
        return self.order[place], self.flips[place]


class Balanced:
    """The images so that each class is drawn equally often: position of the run -> (index, mirrored).

    Of K classes that have images, the positions r K ... (r + 1) K - 1 hold one image of each, in a fresh order; they
    are the r-th images of their classes, each of which is shuffled by itself.

    Args:
        labels: (N,) integers from 0.
        seed: Of the orders.
    """

    def __init__(self, labels: np.ndarray, seed: int) -> None:
        self.images = [np.flatnonzero(labels == k).tolist() for k in np.unique(labels)]
        self.classes = Shuffled(len(self.images), seed, CLASSES)
        self.within = [Shuffled(len(own), seed, WITHIN, k) for k, own in enumerate(self.images)]

    def key(self, position: int) -> tuple[int, bool]:
        """Give the index of the image at a position, and whether it is mirrored where training mirrors."""
        k, _ = self.classes.key(position)
        index, mirrored = self.within[k].key(position // len(self.images))
        return self.images[k][index], mirrored


class NumberedBatches(EndlessBatches):
    """The same batches of (index, flip, position), for data whose views are a function of where they stand."""

    def __iter__(self) -> Iterator[list[tuple[int, bool, int]]]:
        """Give batch after batch, without end."""
        for number, batch in enumerate(super().__iter__(), self.start):
            yield [(*key, position) for key, position in zip(batch, self.positions(number), strict=True)]
