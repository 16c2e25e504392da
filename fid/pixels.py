"""Pixels: uint8 (B, 3, H, W) is what every number here is defined on."""

import math

import numpy as np
import torch
from torch import Tensor

from vca_engine import images as engine


def check_uint8(images: Tensor) -> None:
    """Refuses, with a ValueError that says what it is, anything but uint8 (B, 3, H, W)."""
    _check_dtype(images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 images (B, 3, H, W); got {tuple(images.shape)}.")


def as_nchw(images: Tensor | np.ndarray) -> Tensor:
    """(B, 3, H, W), of that or of (B, H, W, 3).

    Raises:
        ValueError: Not uint8; says how to convert what it is.
    """
    _check_dtype(images)
    images = torch.as_tensor(images)
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        return images.permute(0, 3, 1, 2)
    return images


def quantize(x: Tensor | np.ndarray) -> Tensor:
    """Images in [-1, 1] -> uint8 in [0, 255] of the same shape: floor(127.5 x + 128), as the samples of DiT and SiT.

    Args:
        x: Floating-point. Every value has to have its own place in uint8, 0 <= 127.5 x + 128 < 256; what a decoder
            overshoots beyond is for the caller to clamp: `quantize(x.clamp(-1, 1))`.

    Raises:
        ValueError: Another type, NaN or infinite values, or values out of the range; says which it is.
    """
    numpy, x = isinstance(x, np.ndarray), torch.as_tensor(x)
    if not x.is_floating_point():
        raise ValueError(f"fid.quantize takes floating-point images in [-1, 1]; got {_name_of(x)}.")
    low, high = _range_of(x)
    if not _in_domain(low, high):
        raise ValueError(
            f"fid.quantize takes images in [-1, 1]; got {_name_of(x)} in [{low:.4g}, {high:.4g}]. "
            f"{advice(low, high, numpy)}"
        )
    return engine.quantize(x)


def advice(low: float, high: float, numpy: bool = False) -> str:
    """How floating-point images `x` of this range become uint8, a sentence.

    Args:
        low: Their least value.
        high: Their greatest value.
        numpy: Whether they are an array, and no tensor.
    """
    if not math.isfinite(low + high):
        return "They hold NaN or infinite values, which are no pixels: look where these come from."
    if low < 0 and _in_domain(low, high):
        return "Convert with fid.quantize(x), which rounds as DiT does."
    if low >= 0 and high <= 1:
        return "Convert with fid.quantize(2 * x - 1), if they are in [0, 1]."
    if low >= 0 and 2 < high <= 255:  # up to 2 they may be in [0, 1] and overshoot
        form = "x.round().astype(np.uint8)" if numpy else "x.round().to(torch.uint8)"
        return f"Convert with {form}, if they are in [0, 255]."
    if high > 255:
        return "No convention of images with this range is known; divide by 257 first if they are of 16 bits."
    clamp = "clip" if numpy else "clamp"
    return (
        "No convention of images with this range is known. What a decoder overshoots is for you to clamp: "
        f"fid.quantize(x.{clamp}(-1, 1)) if [-1, 1] is meant, fid.quantize(2 * x.{clamp}(0, 1) - 1) if [0, 1] is."
    )


def _check_dtype(images: Tensor | np.ndarray) -> None:
    if images.dtype in (torch.uint8, np.uint8):
        return
    numpy, tensor = isinstance(images, np.ndarray), torch.as_tensor(images)
    if tensor.is_complex():
        raise ValueError(f"expected uint8 images in [0,255]; got {_name_of(tensor)}, which are no pixels.")
    text = f"expected uint8 images in [0,255]; got {_name_of(tensor)}"
    if tensor.numel():
        low, high = _range_of(tensor)
        text += f" in [{low:.2f}, {high:.2f}]"
        if tensor.is_floating_point():
            raise ValueError(f"{text}. {advice(low, high, numpy)}")
        if low >= 0 and high <= 255:
            form = "x.astype(np.uint8)" if numpy else "x.to(torch.uint8)"
            raise ValueError(f"{text}. If they are pixels from 0 to 255, convert with {form}.")
    raise ValueError(f"{text}.")


def _in_domain(low: float, high: float) -> bool:
    """Whether `quantize` clamps nothing; NaN is not in it."""
    return low >= -128 / 127.5 and high < 128 / 127.5


def _range_of(images: Tensor) -> tuple[float, float]:
    """Least and greatest value; of NaN and infinite values one of these."""
    if not images.numel():
        return 0.0, 0.0
    low, high = (images if images.is_floating_point() else images.double()).aminmax()
    return float(low), float(high)


def _name_of(images: Tensor) -> str:
    return str(images.dtype).removeprefix("torch.")
