"""Pictures: labelled grids of images, and files of them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from vca_engine.files import written_aside

MAX_FRAMES = 60  # of the film


def grid(images: np.ndarray, rows: Sequence[str], columns: Sequence[str] = (), title: str = "") -> np.ndarray:
    """Draw a labelled grid, (height, width, 3) uint8.

    Args:
        images: (R, C, H, W, 3) uint8; small ones are enlarged by a whole factor, pixel by pixel.
        rows: A label for each row, at its left.
        columns: A label for each column, above it; none if empty.
        title: Above all, in as many lines as it takes.
    """
    num_rows, num_columns, height, width, _ = images.shape
    rows, columns, title = [printable(name) for name in rows], [printable(name) for name in columns], printable(title)
    zoom = max(1, 64 // height)
    cell_height, cell_width, gap = height * zoom, width * zoom, 4
    text = max(12, min(28, cell_width // 4))
    font = ImageFont.load_default(text)
    longest = max((font.getlength(name) for name in rows), default=0)
    left = gap + (int(min(longest, max(160, 2 * cell_width))) + 2 * gap if longest else 0)
    width = left + num_columns * (cell_width + gap)
    width = max(width, min(int(font.getlength(title)) + 2 * gap + 1, 800))  # a narrow one as its title
    lines = _wrapped(title, font, width - 2 * gap)
    header = gap + (text + 8) * (len(lines) + bool(columns))
    canvas = Image.new("RGB", (width, header + num_rows * (cell_height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((gap, gap + i * (text + 8)), _fit(line, font, width - 2 * gap), "black", font)
    for i in range(num_rows):
        top = header + i * (cell_height + gap)
        if rows:
            name = _fit(rows[i], font, left - 3 * gap)
            draw.text((left - 2 * gap, top + cell_height // 2), name, "black", font, anchor="rm")
        for j in range(num_columns):
            tile = images[i, j].repeat(zoom, axis=0).repeat(zoom, axis=1)
            canvas.paste(Image.fromarray(tile), (left + j * (cell_width + gap), top))
    for j, name in enumerate(columns):
        middle = left + j * (cell_width + gap) + cell_width // 2
        draw.text((middle, header - 8), _fit(name, font, cell_width), "black", font, anchor="ms")
    return np.array(canvas)


def sheet(lines: Sequence[Sequence[tuple[np.ndarray, str]]], title: str, apart: bool = True) -> np.ndarray:
    """Draw lines of images, each with its label below it, (height, width, 3) uint8.

    Args:
        lines: Images (H, W, 3) uint8, and their labels. Small ones are enlarged by a whole factor, pixel by pixel, and
            all are brought to the size of the first.
        title: A line above all.
        apart: Set the first column apart.
    """
    height, width, _ = lines[0][0][0].shape
    zoom = max(1, -(-128 // height))  # room for the labels
    cell, gap, text = (width * zoom, height * zoom), 6, 13
    font = ImageFont.load_default(text)
    columns, line_height = max(map(len, lines)), cell[1] + text + 2 * gap
    size = (columns * (cell[0] + gap) + 3 * gap, 3 * gap + text + len(lines) * line_height)
    canvas = Image.new("RGB", (max(size[0], int(font.getlength(title)) + 2 * gap), size[1]), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, gap // 2), title, fill="black", font=font)
    for i, line in enumerate(lines):
        top = 2 * gap + text + i * line_height
        for j, (image, label) in enumerate(line):
            left = gap + j * (cell[0] + gap) + (2 * gap if j and apart else 0)
            canvas.paste(Image.fromarray(image).resize(cell, Image.Resampling.NEAREST), (left, top))
            draw.text((left, top + cell[1] + 1), _fit(printable(label), font, cell[0]), fill="black", font=font)
    return np.array(canvas)


def save_picture(frames: Sequence[np.ndarray], path: Path, text: str = "", milliseconds: int = 250) -> None:
    """Write a picture as PNG, or several frames as a GIF that stays on the last one for 2 s; by the ending of the path.

    Args:
        frames: Each (H, W, 3) uint8; one if the path ends in .png.
        path: The file.
        text: What a PNG says of itself, under the key "samples".
        milliseconds: Of a frame.
    """
    content = encode_picture(frames, path.suffix.lower() == ".gif", text, milliseconds)
    with written_aside(path) as temporary:
        temporary.write_bytes(content)


def encode_picture(frames: Sequence[np.ndarray], animated: bool, text: str = "", milliseconds: int = 250) -> bytes:
    """Give the bytes of a GIF of frames (H, W, 3) if it is animated, else of a PNG of the first; see `save_picture`."""
    pictures, content = [Image.fromarray(frame) for frame in frames], io.BytesIO()
    if animated:
        times = [milliseconds] * (len(pictures) - 1) + [2000]
        pictures[0].save(content, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    else:
        information = PngInfo()
        if text:
            information.add_text("samples", text)
        pictures[0].save(content, "PNG", pnginfo=information)
    return content.getvalue()


def printable(text: str) -> str:
    """Show what is no letter, number or sign of a text, such as a line's end or half a character, as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Split a text between words into lines that fit the width; a longer word is a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _fit(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten `name` until it fits the width."""
    short = name
    while font.getlength(short) > width and len(short) > 2:
        short = short[:-2] + "…"
    return short


def save_film(folder: Path) -> None:
    """Make progress.gif of the previews step-*.png in a folder, of at most `MAX_FRAMES` evenly chosen ones."""
    files = sorted(folder.glob("step-*.png"))
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(len(files), MAX_FRAMES)).round().astype(int)]
    last = Image.open(files[-1]).convert("RGB")
    scale = min(1.0, 1024 / last.width)
    size = (round(last.width * scale), round(last.height * scale))
    frames = []
    for file in chosen:
        frame = Image.open(file).convert("RGB")
        if frame.size == last.size:  # others were drawn with other settings
            frames.append(frame.resize(size, Image.Resampling.LANCZOS) if scale < 1 else frame)
    save_picture([np.asarray(frame) for frame in frames], folder / "progress.gif")
