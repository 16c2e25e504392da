"""Pixels: the one conversion between [-1, 1] and uint8, and the labelled grid."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from runtime.files import written_aside


def from_uint8(pixels: np.ndarray) -> Tensor:
    """(H, W, C) uint8 -> (C, H, W) float32 in [-1, 1]: x = pixel / 127.5 - 1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1], C 1 or 3 -> (B, H, W, 3) uint8: round(127.5 x + 127.5), clamped; grey is repeated."""
    pixels = (127.5 * images.float() + 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()


def save_grid(images: np.ndarray, names: Sequence[str], path: Path, title: str = "") -> np.ndarray:
    """Write a PNG with one labelled column a class, and return it, (height, width, 3) uint8.

    Args:
        images: (rows, columns, H, W, 3) uint8; small ones are enlarged by a whole factor, pixel by pixel.
        names: A label for each column.
        path: File to write.
        title: A line above.
    """
    rows, columns, height, width, _ = images.shape
    zoom = max(1, 64 // height)
    cell, gap = np.array([height, width]) * zoom, 4
    text = max(12, min(28, int(cell[1]) // 4))
    font = ImageFont.load_default(text)
    header = (text + 12) + (text + 12 if title else 0)
    size = (gap + columns * (cell[1] + gap), header + rows * (cell[0] + gap))
    canvas = Image.new("RGB", (int(size[0]), int(size[1])), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, 6), _fit(title, font, canvas.width - 2 * gap), fill="black", font=font)
    for j, name in enumerate(names):
        left = int(gap + j * (cell[1] + gap))
        draw.text((left + int(cell[1]) // 2, header - 6), _fit(name, font, int(cell[1])), "black", font, anchor="ms")
        for i in range(rows):
            tile = images[i, j].repeat(zoom, axis=0).repeat(zoom, axis=1)
            canvas.paste(Image.fromarray(tile), (left, int(header + i * (cell[0] + gap))))
    with written_aside(path) as temporary:
        canvas.save(temporary, format="PNG")
    return np.array(canvas)


def _fit(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`name`, shortened until it fits the column."""
    short = name
    while font.getlength(short) > width and len(short) > 2:
        short = short[:-2] + "…"
    return short
