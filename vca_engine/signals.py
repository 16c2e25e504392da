"""A clean stop on Ctrl-C, SIGTERM and SIGUSR1."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

STOPPED = (
    75  # exit code of a program that was stopped by a signal and goes on if started again; EX_TEMPFAIL of sysexits.h
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME = 5.0  # seconds within which a second Ctrl-C is the first one, passed on by a launcher


class StopSignal:
    """Turns Ctrl-C, SIGTERM or SIGUSR1 into a stop after the current step, agreed on by all processes.

    Before `begin` there is nothing to save, and the program ends at once. Ctrl-C once more, after some seconds, kills.
    """

    def __init__(self) -> None:
        self.received: float | None = None
        self.group: Any = None
        self.num_processes = 0
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def begin(self, accelerator: Accelerator, minutes: int) -> None:
        """From now on a step is finished first; processes wait for each other so many minutes. All of them call this."""
        self.num_processes = accelerator.num_processes
        if self.num_processes > 1:  # on the CPU, where asking does not wait for a GPU
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(minutes=minutes))

    def requested(self, step: int | None = None) -> bool:
        """Whether to stop. All processes call this; of numbered steps only every 10th asks, for asking takes time."""
        if self.num_processes == 1:
            return self.received is not None
        if step is not None and step % 10:
            return False
        flag = torch.tensor(self.received is not None, dtype=torch.uint8)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.num_processes:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(STOPPED)
        if self.received is None:
            self.received = now
        elif number == signal.SIGINT and now - self.received > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def leave_process_group(worker: int) -> None:
    """For the processes that load data: signals go to the group, or to all processes, and would take them too early.

    The trainer needs their batches until its step is done, and ends them itself; they end when it is gone, too.
    """
    os.setpgrp()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done, so that what it writes is whole. Of the main thread."""
    received = []
    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in received[:1]:
        signal.raise_signal(number)


def end_on_sigterm() -> None:
    """SIGTERM ends the program as an exception does, so that what it has is saved on the way out."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
