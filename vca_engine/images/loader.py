"""Batches from worker processes that end with their program."""

import signal
import time
from collections.abc import Iterator
from multiprocessing import active_children
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vca_engine.images.order import EndlessBatches
from vca_engine.signals import leave_process_group


class DeadWorkerError(OSError):
    """A process that loads data died, or hangs."""


def load(dataset: Dataset, order: Sampler, *, num_workers: int, minutes: float, pin: bool) -> Iterator[Any]:
    """Give the batches of `order`, read by `num_workers` processes, or by this one.

    Raises:
        DeadWorkerError: One of them died, or gave nothing for so many minutes.
    """
    options = {"batch_sampler": order, "collate_fn": dataset.collate, "pin_memory": pin}
    if not num_workers:
        yield from DataLoader(dataset, **options)
        return
    period = min(5, 60 * minutes)  # s, after which torch looks whether all live
    options |= {"num_workers": num_workers, "worker_init_fn": leave_process_group, "timeout": period}
    before = set(active_children())
    batches, since = iter(DataLoader(dataset, **options)), time.monotonic()
    workers = set(active_children()) - before
    # Torch's handler would raise that a worker is dead in the middle of whatever this process does then.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:  # the last two if it dies while it hands over
                said = " ".join(str(error).split())
                if said.startswith("Caught") or (isinstance(error, RuntimeError) and not said.startswith("DataLoader")):
                    raise  # of the data itself
                if "timed out" not in said:
                    raise DeadWorkerError(f"a process that loads data died: {said}. Is there memory enough?") from error
                if time.monotonic() - since > 60 * minutes:
                    raise DeadWorkerError(
                        f"the processes that load data have given nothing for {minutes:g} minutes; is the disk there?"
                    ) from error
                continue
            yield batch
            since = time.monotonic()
    finally:
        for worker in workers:  # they take no other signal, and one that hangs would not listen
            worker.kill()


def to_device(
    batches: Iterator[Any], order: EndlessBatches, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Bring the batches of `order` to a device, each on its way while the one before is used.

    Yields:
        Images (B, C, H, W) or moments, labels (B,), and the positions (B,) of the images in the run.
    """
    ahead = None
    for number, batch in enumerate(batches, order.start):
        x, y = (z.to(device, non_blocking=True) for z in batch)
        positions = order.positions(number)
        if ahead:
            yield ahead
        ahead = x, y, torch.arange(positions.start, positions.stop, device=device)
