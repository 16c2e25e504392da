"""Pixels: between [-1, 1] and uint8, from a file to RGB, and ADM's centre crop."""

from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # of Pillow's those that run no other program
NO_FORMAT = f"it is in none of the formats {', '.join(FORMATS)}"
MAX_PIXELS = 2**30 // 6  # of which Pillow refuses to open more


class NonFiniteError(ValueError, FloatingPointError):
    """Images that are not there, because what makes them gives NaN or infinite values, or cannot go on."""


def from_uint8(pixels: np.ndarray | Tensor) -> Tensor:
    """(..., H, W, C) uint8 -> (..., C, H, W) float32 in [-1, 1]: x = pixel / 127.5 - 1."""
    return torch.as_tensor(pixels).movedim(-1, -3).float() / 127.5 - 1


def quantize(x: Tensor) -> Tensor:
    """Floating-point pixels in [-1, 1] -> uint8 of the same shape: floor(127.5 x + 128), clamped to [0, 255].

    NaN has no value in uint8, so the caller makes sure that there is none.

    Source: Peebles & Xie 2023 and Ma et al. 2024, the released programs that draw the samples of their FIDs.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)  # none is below 0, so that to cut off is to floor


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in about [-1, 1], C 1 or 3 -> (B, H, W, 3) uint8 by `quantize`; grey is repeated.

    Raises:
        NonFiniteError: NaN or infinite values; says in how many of the images.
    """
    finite = images.isfinite().flatten(1).all(dim=1)  # (B,)
    if not finite.all():
        raise NonFiniteError(f"{int((~finite).sum())} of {len(images)} images hold NaN or infinite values")
    return quantize(images).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()


def check_beginning(head: bytes) -> None:
    """Raise ValueError if a file that begins so, with 16 bytes, is in none of `FORMATS`."""
    Image.init()
    if not any(Image.OPEN[name][1](head) for name in FORMATS if name in Image.OPEN):
        raise ValueError(NO_FORMAT)


def open_image(file: IO[bytes]) -> Image.Image:
    """An image file, opened and not yet decoded.

    Raises:
        ValueError: It is in none of `FORMATS`, or animated, or has several pages.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(NO_FORMAT) from None
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO is a photograph with a preview of itself
        raise ValueError(f"it is animated, or has several pages ({frames})")
    return image


def read_image(file: IO[bytes]) -> Image.Image:
    """An image file as RGB with 8 bits, turned as its camera says.

    Grey, palette and CMYK are converted; 16 bits are scaled to 8; what is transparent is laid on white.

    Raises:
        OSError or SyntaxError: It is damaged.
        ValueError: See `open_image`; or it has numbers without a known range.
    """
    with open_image(file) as opened:
        try:
            image = ImageOps.exif_transpose(opened)
        except Exception:  # a damaged EXIF makes Pillow raise almost anything, and says nothing of the pixels
            image = opened
        image.load()
    if image.mode == "I" and opened.format != "PNG":
        raise ValueError("it has numbers of 32 bits, whose range is not known")
    if image.mode.startswith("I"):  # I;16 and its kin; PNGs of 16 bits in older versions of Pillow
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


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre square as uint8 (size, size, 3): halved by box filter while it can be, then bicubic, then cropped.

    This is how ADM, DiT and SiT prepare ImageNet, so its filters are part of every published FID.

    Raises:
        ValueError: The image is far too small, its shorter side below 2 pixels or a sixteenth of `size`; or so long that
            it would have to grow beyond `MAX_PIXELS`.

    Source: Dhariwal & Nichol 2021, arXiv:2105.05233, the released data loader.
    """
    if min(image.size) < max(2, size // 16):
        raise ValueError(f"{image.width}x{image.height} pixels are too few for {size}")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too long a strip for {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image)[top : top + size, left : left + size]
