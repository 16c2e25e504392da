"""Precision: of a run's arithmetic, and of matrix products in float32."""

import torch


def set_tf32(allowed: bool) -> None:
    """Whether GPUs round the inputs of float32 products and convolutions to TF32."""
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
