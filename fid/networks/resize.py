"""Three ways to bring uint8 images to the size of a network; no two of them give the same numbers."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """Resize as TensorFlow 1's `resize_bilinear` without half-pixel centres, with which the graph of 2015 was used.

        s = in / out,   p_i = i s,   l = floor(p_i),   h = min(l + 1, in - 1),   f = p_i - l
        y_i = x_l + (x_h - x_l) f           along the width first, then along the height

    Args:
        images: (B, 3, H, W), uint8.
        size: Side of the result.

    Returns:
        (B, 3, size, size) float32 in [0, 255], computed in float32.
    """
    x = images.float()
    for axis in (3, 2):
        length = x.shape[axis]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (
            torch.tensor(length, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
        ).to(x.device)
        low = position.floor()
        fraction = (position - low).view(-1, *[1] * (3 - axis))
        low = low.long().clamp(max=length - 1)
        near, far = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=length - 1))
        x = near + (far - near) * fraction
    return x


def half_pixel_bilinear(images: Tensor, size: int) -> Tensor:
    """Resize x / 255 as pytorch-fid does: PyTorch's bilinear, half-pixel centres, no antialiasing.

    Args:
        images: (B, 3, H, W), uint8.
        size: Side of the result.

    Returns:
        (B, 3, size, size) float32 in [0, 1].
    """
    return F.interpolate(images.float() / 255, size=(size, size), mode="bilinear", align_corners=False)


def clean_bicubic(images: Tensor, size: int) -> Tensor:
    """Resize each channel by Pillow's antialiased bicubic in floating point, clipped and not rounded.

    Args:
        images: (B, 3, H, W), uint8.
        size: Side of the result.

    Returns:
        (B, 3, size, size) float32 in [0, 255].

    Source: Parmar et al., On Aliased Resizing and Surprising Subtleties in GAN Evaluation, arXiv:2104.11222.
    """
    channels = images.float().cpu().flatten(0, 1).numpy()  # (3 B, H, W)

    def resize(channel: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor() as pool:  # Pillow leaves the interpreter to others while it computes
        resized = list(pool.map(resize, channels))
    pixels = torch.from_numpy(np.stack(resized)).clamp(0, 255)
    return pixels.view(*images.shape[:2], size, size).to(images.device)
