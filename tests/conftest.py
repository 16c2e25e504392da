"""One thread, and the same random numbers in every test."""

import contextlib
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from vca_engine import files
from vca_engine.signals import SIGNALS
from vca_engine.training import log, outputs

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@contextlib.contextmanager
def new_process():
    """Let what accelerate remembers be as at the start of a program within the block, and the signal handlers after it."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def as_in_a_new_process(request, monkeypatch):
    """For tests that call a script's main: what accelerate remembers and the signal handlers are as at the start.

    The loss is drawn only for tests marked `drawn`: it takes as long as the rest of a small run.
    """
    if "drawn" not in request.keywords:
        for module in (log, outputs):
            monkeypatch.setattr(module, "plot_losses", lambda *given: None)
    with new_process():
        yield


@pytest.fixture
def full_disk(monkeypatch, tmp_path):
    """Let the system refuse to write files of some names, as a full disk does: they are written into its full device."""
    if not Path("/dev/full").exists():
        pytest.skip("needs the full device of Linux")
    refused, temporary = [], files._temporary

    def of(path):
        found = temporary(path)
        if path.name in refused:
            found.symlink_to("/dev/full")
        return found

    monkeypatch.setattr(files, "_temporary", of)
    return refused.extend


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights of the FID's Inception, whose features are as large and as varied as the real one's."""
    from fid.networks.inception import inception_network

    torch.manual_seed(0)
    network = inception_network()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # keeps the signal alive through 90 layers
            torch.nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain average
    with torch.no_grad():
        network.train()(torch.rand(16, 3, 75, 75) * 2 - 1)  # statistics of batch normalisation that fit the weights
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path
