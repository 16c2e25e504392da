"""A clean stop on Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP, also of a program that another one runs."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

STOPPED = 75  # exit code after a signal, where the same command goes on; EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # the last of a terminal that is closed
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # those that end a program which does not ask for them
SAME = 5.0  # seconds within which a second Ctrl-C is the first one, passed on by a launcher


class GivenUpError(BaseException):
    """A signal has ended a block that may be given up, see `StopSignal.giving_up`.

    Like KeyboardInterrupt no Exception, so that what reads an image does not take it for damage of the image.
    """


class StopSignal:
    """A stop on one of `SIGNALS`: of one process at once, of several after the current step, agreed on by all.

    Before `begin` there is nothing to save, and the program ends at once. Ctrl-C once more, after some seconds, kills.

    Attributes:
        requested: True if all processes are to stop; of several ones, as `share` has found.
    """

    def __init__(self) -> None:
        self.requested = False
        self.received: float | None = None  # when this process has got a signal
        self.group: Any = None
        self.num_processes = 0
        self.gives_up = False  # whether a signal ends what runs now
        for number in SIGNALS:
            if not _is_nohup(number):
                signal.signal(number, self._receive)

    def begin(self, accelerator: Accelerator, minutes: int) -> None:
        """Let a signal end the run by `requested`; processes wait for each other so many minutes. All call this."""
        self.num_processes = accelerator.num_processes
        if self.num_processes > 1:  # on the CPU, where asking does not wait for a GPU
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(minutes=minutes))

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Let a signal end the block at once, by GivenUpError, in a run of one process.

        Python sees a signal between two operations of the network, but not within its backward pass.
        """
        self.gives_up = self.num_processes == 1
        try:
            yield
        finally:
            self.gives_up = False

    def share(self) -> bool:
        """Let each process know whether any has got a signal, and return it. All of them call this; it takes time."""
        if self.num_processes > 1:
            flag = torch.tensor(self.received is not None, dtype=torch.uint8)  # ()
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self.group)
            self.requested = bool(flag)
        return self.requested

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.num_processes:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(STOPPED)
        if self.received is None:
            self.received, self.requested = now, self.num_processes == 1
            if self.gives_up:
                raise GivenUpError
        elif number == signal.SIGINT and now - self.received > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def leave_process_group(worker: int) -> None:
    """Keep the processes that load data from signals, which go to the whole group and would end them too early.

    The trainer may need their batches until its step is done, and ends them itself; they end when it is gone, too.
    """
    os.setpgrp()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals wait for the end of the block, so that what it writes is whole. For the main thread."""
    received = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in received[:1]:
        signal.raise_signal(number)


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run a program whose output goes to the end of a file.

    Signals are left to it, so that it can save what it has: those to this process are passed on, but for Ctrl-C, which
    the terminal sends to both. For the main thread.

    Returns:
        Its exit code; `STOPPED` if this process got one of `SIGNALS`, or if the program ended by one.

    Raises:
        OSError: There is no such program, or the file cannot be written.
    """
    received = []

    def leave(number: int, frame: Any) -> None:
        received.append(number)
        if number != signal.SIGINT:
            process.send_signal(number)

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        before = {number: signal.signal(number, leave) for number in SIGNALS if not _is_nohup(number)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    by_signal = {sign for number in SIGNALS for sign in (-number, 128 + number)}
    return STOPPED if received or code in by_signal else code


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the program as an exception does, so that what it has is saved on the way out."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    for number in ENDING[1:]:
        if not _is_nohup(number):
            signal.signal(number, end)


def _is_nohup(number: int) -> bool:
    """Say whether a signal is that of a closed terminal, which nohup has the program ignore."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
