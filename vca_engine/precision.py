"""The device, and the precision of its arithmetic."""

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
    """Let GPUs round the inputs of float32 products and convolutions to TF32, or not."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    if hasattr(cudnn, "conv"):  # torch >= 2.9; mixing the two ways to say it is an error there
        for owner in (cudnn.conv, cuda.matmul):
            owner.fp32_precision = "tf32" if allowed else "ieee"
    else:
        cudnn.allow_tf32 = cuda.matmul.allow_tf32 = allowed


def mixed_precision(name: str) -> str:
    """Turn `auto`, `bf16` or `no` into what accelerate takes: `auto` is bf16 on a GPU that has it.

    A CPU emulates bf16, many times slower.
    """
    if name != "auto":
        return name
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
