"""The device, and the precision of its arithmetic."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def chosen_device(word: str) -> str:
    """Turn `auto`, `cuda` or `cpu`, as --device takes them, into `cuda` or `cpu`.

    Raises:
        ValueError: It is cuda, and there is no GPU.
    """
    if word == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but PyTorch finds no GPU here; use cpu.")
    return "cuda" if word != "cpu" and torch.cuda.is_available() else "cpu"


def set_tf32(allowed: bool) -> None:
    """Let GPUs round the inputs of float32 products and convolutions to TF32, or forbid it."""
    for owner, key, value in _switches(allowed):
        setattr(owner, key, value)


@contextmanager
def ieee_float32(tf32: bool = False) -> Iterator[None]:
    """Make float32 what IEEE defines, without TF32, autocast or timing of kernels; put back what was set before.

    TF32 alone moves Inception's features by some 0.1 % (docs/fid.md); `tf32` lets GPUs use it still. A decorator, too.
    """
    cudnn, cpu = torch.backends.cudnn, torch.backends.mkldnn
    switches = _switches(tf32)
    if hasattr(cudnn, "conv"):
        switches += [(owner, "fp32_precision", "ieee") for owner in (cpu.conv, cpu.matmul)]
    switches.append((cudnn, "benchmark", False))
    before = [getattr(owner, key) for owner, key, _ in switches]
    try:
        for owner, key, value in switches:
            setattr(owner, key, value)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for (owner, key, _), value in zip(switches, before, strict=True):
            if key == "fp32_precision":
                setattr(owner, key, "none")  # as it is until someone sets it: that of the switch above it
            if getattr(owner, key) != value:
                setattr(owner, key, value)


def mixed_precision(name: str) -> str:
    """Turn `auto`, `bf16` or `no` into what accelerate takes: `auto` is bf16 on a GPU that has it.

    A CPU emulates bf16, many times slower.
    """
    if name != "auto":
        return name
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def _switches(tf32: bool) -> list[tuple[Any, str, Any]]:
    """List the settings of torch, (owner, name, value), that let GPUs use TF32 or forbid it."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    if hasattr(cudnn, "conv"):  # torch >= 2.9; mixing the two ways to say it is an error there
        return [(owner, "fp32_precision", "tf32" if tf32 else "ieee") for owner in (cudnn.conv, cuda.matmul)]
    return [(owner, "allow_tf32", tf32) for owner in (cudnn, cuda.matmul)]
