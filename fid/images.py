"""Images as uint8, read in order from a folder, an .npz, an .npy or a tensor."""

import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "tif", "tiff")
MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # of Pillow; in the others alpha, or more than 8 bits, would be lost
CHUNK = 64  # image files decoded at once


class Images:
    """The first `num` images of `source`, as often as they are asked for.

    Args:
        source: A folder (searched recursively, sorted by path), an .npz with `arr_0` or an .npy of uint8
            (N, H, W, 1 or 3), or a uint8 tensor (N, 3, H, W). Files are read as they are needed, never as a whole.
        num: How many; all of them if not given.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: No images, not uint8, or fewer than `num`; while reading, a broken file or one of another size.
    """

    def __init__(self, source: str | Path | Tensor, num: int | None = None) -> None:
        self.source = "a tensor" if isinstance(source, Tensor) else str(source)
        self._reader = _reader(source)
        self.num = len(self._reader) if num is None else num
        if not 0 < self.num <= len(self._reader):
            raise ValueError(f"cannot take {self.num} images of {self.source}, which holds {len(self._reader)}.")

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Tensors (B, 3, H, W), B = `batch_size` except for the last one, which may be smaller."""
        images = islice(self._reader, self.num)
        while batch := list(islice(images, batch_size)):
            yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


def check_uint8(images: Tensor) -> None:
    """Refuses, with a ValueError that says what it is, anything but uint8 (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        span = f" in [{images.min():.4g}, {images.max():.4g}]" if images.numel() else ""
        got = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}{span}"
        raise ValueError(f"expected uint8 images (B, 3, H, W) in [0, 255]; got {got}.")


def _reader(source: str | Path | Tensor) -> "np.ndarray | _Folder | _Array":
    """Something with a length that yields (H, W, 3) uint8 arrays of one size."""
    if isinstance(source, Tensor):
        check_uint8(source)
        return source.permute(0, 2, 3, 1).cpu().numpy()
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    if path.is_dir():
        return _Folder(path)
    if path.suffix.lower() in (".npz", ".npy"):
        return _Array(path)
    raise ValueError(f"'{path}' is neither a folder of images nor an .npz or .npy file.")


class _Folder:
    def __init__(self, path: Path) -> None:
        files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
        self.files = sorted(file for file in files if file.suffix[1:].lower() in SUFFIXES)
        if not self.files:
            found = ", ".join(f"{n} *{suffix}" for suffix, n in Counter(file.suffix for file in files).most_common(5))
            raise ValueError(
                f"no images in '{path}' (looked for {', '.join(SUFFIXES)} in any letter case, recursively); "
                f"found {found or 'no files'}."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[np.ndarray]:
        first, size = self.files[0], _decode(self.files[0]).shape
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self.files), CHUNK):
                files = self.files[start : start + CHUNK]
                for file, image in zip(files, pool.map(_decode, files), strict=True):
                    if image.shape != size:
                        raise ValueError(
                            f"images differ in size: '{first}' is {size[1]}x{size[0]}, '{file}' is "
                            f"{image.shape[1]}x{image.shape[0]}; bring all to one size first."
                        )
                    yield image


def _decode(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            mode, pixels = image.mode, np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise ValueError(f"'{file}' is not a readable image: {error}.") from error
    if mode not in MODES:
        raise ValueError(f"'{file}' has Pillow's mode {mode}; save it as 8-bit RGB or grey, without alpha.")
    return pixels


class _Array:
    """Reads the .npy format row after row: inside an .npz it cannot be memory-mapped, and may not fit into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.shape, fortran_order, dtype = self._header(file)
            if dtype == np.uint8 and len(self.shape) == 4 and self.shape[3] in (1, 3) and not fortran_order:
                return
            got = f"{dtype} {self.shape}{' in Fortran order' if fortran_order else ''}"
            if dtype.kind == "f" and math.prod(self.shape):
                first = np.frombuffer(file.read(math.prod(self.shape[1:]) * dtype.itemsize), dtype)
                got += f", the first in [{first.min():.4g}, {first.max():.4g}]"
        raise ValueError(f"expected uint8 images (N, H, W, 3) in [0, 255] in '{path}'; got {got}.")

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        height, width, channels = self.shape[1:]
        with self._open() as file:
            self._header(file)
            for index in range(len(self)):
                try:
                    image = np.frombuffer(file.read(height * width * channels), np.uint8)
                    image = image.reshape(height, width, channels)
                except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise ValueError(f"'{self.path}' is damaged at image {index} of {len(self)}.") from error
                yield np.broadcast_to(image, (height, width, 3))

    def _open(self) -> IO[bytes]:
        if self.path.suffix.lower() == ".npy":
            return self.path.open("rb")
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"'{self.path}' is not an .npz file.")
        with zipfile.ZipFile(self.path) as archive:  # the file below stays open until the member is closed
            if "arr_0.npy" not in archive.namelist():
                found = sorted(name.removesuffix(".npy") for name in archive.namelist())
                raise ValueError(f"'{self.path}' has no arr_0, where images are looked for, but {found}.")
            return archive.open("arr_0.npy")

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(file)
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"'{self.path}' is not in numpy's format: {error}.") from error
