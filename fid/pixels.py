"""Pixels: uint8 (B, 3, H, W) is what every number here is defined on."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def check_uint8(images: Tensor) -> None:
    """Refuses, with a ValueError that says what it is, anything but uint8 (B, 3, H, W)."""
    if images.dtype != torch.uint8:
        span = f" in [{images.double().min():.2f}, {images.double().max():.2f}]" if images.numel() else ""
        got = str(images.dtype).removeprefix("torch.")
        raise ValueError(
            f"expected uint8 images in [0,255]; got {got}{span}. Convert with fid.quantize(x) (DiT rounding)."
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 images (B, 3, H, W); got {tuple(images.shape)}.")


def quantize(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 in [0, 255]: 127.5 x + 128, clamped, truncated, as the samples of DiT and SiT.

    Raises:
        ValueError: Not a floating type, or an entry that is not finite.
    """
    if not x.is_floating_point() or not x.isfinite().all():
        raise ValueError(
            f"expected finite floating-point images in [-1, 1]; got {x.dtype}, or NaN or infinite entries."
        )
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def as_trained(image: Image.Image) -> Image.Image:
    """An opened file as RGB with 8 bits, as training reads it: turned as its camera says, 16 bits scaled to 8, what is
    transparent laid on white.

    Raises:
        ValueError: It has numbers without a known range.
    """  # noqa: D205
    file_format = image.format
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF makes Pillow raise almost anything, and says nothing of the pixels
        image.load()
    if image.mode == "I" and file_format != "PNG":
        raise ValueError("it has numbers of 32 bits, whose range is not known")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its numbers reach from {values.min()} to {values.max()}, beyond 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it has floating-point numbers, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's centre crop: (H, W, 3) uint8 -> (size, size, 3).

    The image is halved by box filters while its shorter side is at least twice `size`, then brought to `size` by a
    bicubic filter, then cropped.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size].copy()


def as_nchw(images: Tensor | np.ndarray) -> Tensor:
    """(B, 3, H, W), of that or of (B, H, W, 3)."""
    images = torch.as_tensor(images)
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        return images.permute(0, 3, 1, 2)
    return images
