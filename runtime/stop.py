"""A clean stop on Ctrl-C and SIGTERM."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a stop after the current step, agreed on by all processes; a second kills.

    Args:
        accelerator: The processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        signal.signal(number, signal.SIG_DFL)

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`. Several processes ask each other at every 10th step only: asking takes time."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step % 10:
            return False
        flag = torch.tensor(float(self.received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)


def leave_process_group(worker: int) -> None:
    """For the processes that load data: Ctrl-C and a launcher's SIGTERM go to the group, and would take them too early.

    The trainer needs their batches until its step is done, and ends them itself.
    """
    os.setpgrp()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done, so that what it writes is whole. Of the main thread."""
    received = []
    before = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt
