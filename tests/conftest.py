"""One thread, and the same random numbers in every test."""

import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def as_in_a_new_process():
    """For tests that call a script's main: what accelerate remembers and the signal handlers are as at the start."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)
