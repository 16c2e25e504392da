"""Pixels: between [-1, 1] and uint8, from a file to RGB, and ADM's centre crop."""

import math
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

PARTS = {"AVIF": "avif", "JPEG2000": "jpg_2000"}  # formats that not every Pillow reads, and what it needs for them
OPTIONAL = tuple(
    name for name, part in PARTS.items() if part in {*features.modules, *features.codecs} and features.check(part)
)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF", *OPTIONAL)  # those that run no other program
NO_FORMAT = f"it is in none of the formats {', '.join(FORMATS)}"
MAX_PIXELS = 2**30 // 6  # of which Pillow refuses to open more
MAX_SIDE = math.isqrt(MAX_PIXELS)  # of a square image


class NonFiniteError(ValueError, FloatingPointError):
    """Images that are not there, because what makes them gives NaN or infinite values, or cannot go on."""


def from_uint8(pixels: np.ndarray | Tensor) -> Tensor:
    """Turn (..., H, W, C) uint8 into (..., C, H, W) float32 in [-1, 1]: x = pixel / 127.5 - 1."""
    return torch.as_tensor(pixels).movedim(-1, -3).float() / 127.5 - 1


def quantize(x: Tensor | np.ndarray) -> Tensor:
    """Round images in [-1, 1] to uint8 of the same shape: floor(127.5 x + 128).

    Args:
        x: Floating-point, of any shape. Every value has to have its own place in uint8, 0 <= 127.5 x + 128 < 256; what
            a decoder overshoots beyond is for the caller to clamp: `quantize(x.clamp(-1, 1))`.

    Raises:
        ValueError: Another type, NaN or infinite values, or values out of the range; says which it is.

    Source: Peebles & Xie 2023 and Ma et al. 2024, the released programs that draw the samples of their FIDs.
    """
    numpy, x = isinstance(x, np.ndarray), torch.as_tensor(x)
    if not x.is_floating_point():
        raise ValueError(f"fid.quantize takes floating-point images in [-1, 1]; got {dtype_name(x)}.")
    low, high = range_of(x)
    if not _in_domain(low, high):
        raise ValueError(
            f"fid.quantize takes images in [-1, 1]; got {dtype_name(x)} in [{low:.4g}, {high:.4g}]. "
            f"{advice(low, high, numpy)}"
        )
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (127.5 * x + 128).to(torch.uint8)  # none is below 0, so that to cut off is to floor


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn (B, C, H, W) in about [-1, 1], C 1 or 3, into (B, H, W, 3) uint8: clamped and quantised, grey repeated.

    Raises:
        NonFiniteError: NaN or infinite values; says in how many of the images.
    """
    finite = images.isfinite().flatten(1).all(dim=1)  # (B,)
    if not finite.all():
        raise NonFiniteError(f"{int((~finite).sum())} of {len(images)} images hold NaN or infinite values")
    return quantize(images.clamp(-1, 1)).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()


def advice(low: float, high: float, numpy: bool = False) -> str:
    """Say in a sentence how floating-point images `x` of this range become uint8.

    Args:
        low: Their least value.
        high: Their greatest value.
        numpy: They are an array, and no tensor.
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


def range_of(images: Tensor) -> tuple[float, float]:
    """Find the least and the greatest value of images of any shape; of NaN and infinite values one of these."""
    if not images.numel():
        return 0.0, 0.0
    low, high = (images if images.is_floating_point() else images.double()).aminmax()
    return float(low), float(high)


def dtype_name(images: Tensor) -> str:
    """Name the type of the numbers of images (...), e.g. float32."""
    return str(images.dtype).removeprefix("torch.")


def _in_domain(low: float, high: float) -> bool:
    """Say whether each value has its own place in uint8; NaN has none."""
    return low >= -128 / 127.5 and high < 128 / 127.5


def check_side(name: str, side: Any) -> None:
    """Raise ValueError, which names the setting, unless an image can be cropped to a square of this side."""
    if type(side) is not int or not 1 <= side <= MAX_SIDE:
        raise ValueError(f"{name} is {side!r}; choose a whole number, at least 1 and at most {MAX_SIDE:,}.")


def check_beginning(head: bytes) -> None:
    """Raise ValueError if a file that begins so, with 16 bytes, is in none of `FORMATS`."""
    Image.init()
    if not any(Image.OPEN[name][1](head) for name in FORMATS if name in Image.OPEN):
        raise ValueError(NO_FORMAT)


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image file, without decoding it yet.

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
    """Read an image file as RGB with 8 bits, turned as its camera says.

    Raises:
        OSError or SyntaxError: It is damaged.
        ValueError: See `open_image` and `to_rgb`.
    """
    with open_image(file) as opened:
        return to_rgb(opened)


def to_rgb(opened: Image.Image) -> Image.Image:
    """Convert an image to RGB with 8 bits, turned as its camera says.

    Grey, palette and CMYK are converted; 16 bits are scaled to 8; what is transparent is laid on white.

    Raises:
        OSError or SyntaxError: Its file, which is read only now, is damaged.
        ValueError: It has numbers without a known range.
    """
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
        return on_white(image)
    return image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """Lay an image with transparent parts on white: RGB."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Cut out the centre square, (size, size, 3) uint8: halve by box filter while it can be, then bicubic, then crop.

    This is how ADM, DiT and SiT prepare ImageNet, so its filters are part of every published FID.

    Raises:
        ValueError: The image is far too small, its shorter side below 2 pixels or a sixteenth of `size`; or so long
            that it would have to grow beyond `MAX_PIXELS`.

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
