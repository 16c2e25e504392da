"""Images in arrays, in memory or in an .npy or .npz file: uint8 with three channels, or refused with advice."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vca_engine.images.pixels import advice, centre_crop, dtype_name, range_of

SEEN = 10**7  # numbers of an array of floats whose range is looked at; 50 images of 256 x 256


def check_uint8(images: Tensor) -> None:
    """Raise ValueError, which says what they are, unless images are uint8 (B, 3, H, W)."""
    _check_dtype(images)
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"expected uint8 images (B, 3, H, W); got {tuple(images.shape)}.")


def uint8_batches(images: Tensor | list[Tensor]) -> list[Tensor]:
    """Give images (B, 3, H, W) as one batch, and each of a list of (3, H, W) as one of its own; see `check_uint8`."""
    batches = [image[None] for image in images] if isinstance(images, list) else [images]
    for batch in batches:
        check_uint8(batch)
    return batches


def as_nchw(images: Tensor | np.ndarray) -> Tensor:
    """Turn images uint8 (B, H, W, 3) into (B, 3, H, W), and leave those as they are.

    Raises:
        ValueError: Not uint8; says how to convert what it is.
    """
    _check_dtype(images)
    images = torch.as_tensor(images)
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        return images.permute(0, 3, 1, 2)
    return images


class ArrayInMemory:
    """Images in memory, N of them.

    Args:
        images: uint8 (N, 3, H, W) or (N, H, W, 3).

    Raises:
        ValueError: It is something else; says how to convert it.
    """

    kind, names, labels, grey = "tensor", (), None, False

    def __init__(self, images: Tensor | np.ndarray) -> None:
        self.images = as_nchw(images)
        check_uint8(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Say what a message calls image `i`."""
        return f"image {i}"

    def read(self, i: int, crop: int | None = None) -> np.ndarray:
        """Read image `i`, (H, W, 3) uint8; with a crop, its centre square, (crop, crop, 3)."""
        return _cropped(self.images[i].permute(1, 2, 0).cpu().numpy(), crop, self.name(i))


class ArrayFile:
    """Images in an .npy or in the array `arr_0` of an .npz, read one by one: all of them may not fit into the memory.

    Args:
        path: The file. Its images are uint8 (N, H, W, 3), or (N, H, W, 1), which are repeated.

    Raises:
        ValueError: It holds something else, or is damaged; says which, and how to convert it.
    """

    names = ()

    def __init__(self, path: Path) -> None:
        self.path, self.kind = path, path.suffix.lower()[1:]
        self.file: IO[bytes] | None = None
        with self._open("arr_0") as (file, size):
            self.shape, fortran_order, dtype = self._header(file)
            self.start = file.tell()
            if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] not in (1, 3) or fortran_order:
                got = f"{dtype} {self.shape}{' in Fortran order' if fortran_order else ''}{self._advice(file, dtype)}"
                raise ValueError(f"expected uint8 images (N, H, W, 3) in [0,255] in '{self.path}'; got {got}")
            self._check_size(size)
        self.grey = self.shape[3] == 1

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Labels (N,) int64, from `arr_1` of an .npz; None where it has none.

        Raises:
            ValueError: They are damaged.
        """
        if self.kind != "npz" or "arr_1.npy" not in self._members():
            return None
        with self._open("arr_1") as (file, size):
            shape, _, dtype = self._header(file)
            if shape != self.shape[:1] or dtype.kind not in "iu":
                return None
            needed = file.tell() + shape[0] * dtype.itemsize
            if size != needed:  # before they are read: it may be any number of bytes
                raise ValueError(f"the labels arr_1 of '{self.path}' take {needed:,} bytes, and there are {size:,}.")
            try:
                return np.frombuffer(file.read(), dtype).reshape(shape).astype(np.int64)
            except Exception as error:  # of a .zip
                raise ValueError(f"the labels arr_1 of '{self.path}' are damaged: {error}.") from None

    def __len__(self) -> int:
        return self.shape[0]

    def name(self, i: int) -> str:
        """Say what a message calls image `i`."""
        return f"image {i} of '{self.path}'"

    def read(self, i: int, crop: int | None = None) -> np.ndarray:
        """Read image `i`, (H, W, 3) uint8; with a crop, its centre square, (crop, crop, 3).

        Raises:
            ValueError: The file is damaged.
        """
        if self.file is None:
            self.file, _ = self._open_array("arr_0")
        height, width, channels = self.shape[1:]
        size = height * width * channels
        try:
            self.file.seek(self.start + i * size)  # a compressed file is read forward to there
            image = np.frombuffer(self.file.read(size), np.uint8).reshape(height, width, channels)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"'{self.path}' is damaged at image {i} of {len(self)}.") from error
        return _cropped(np.repeat(image, 3, axis=2) if channels == 1 else image.copy(), crop, self.name(i))

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """Open an array for a while; see `_open_array`."""
        file, size = self._open_array(name)
        with file:
            yield file, size

    def _open_array(self, name: str) -> tuple[IO[bytes], int]:
        """Open the array of an .npy, or the one in an .npz with this name; give its bytes' number, too."""
        if self.kind == "npy":
            return self.path.open("rb"), self.path.stat().st_size
        members = self._members()
        if f"{name}.npy" not in members:
            found = sorted(member.removesuffix(".npy") for member in members)
            raise ValueError(f"'{self.path}' has no {name}, where images are looked for, but {found}.")
        try:
            with zipfile.ZipFile(self.path) as archive:  # the file below stays open until the member is closed
                return archive.open(f"{name}.npy"), members[f"{name}.npy"].file_size
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:  # encrypted, say
            raise ValueError(f"'{self.path}' cannot be unpacked: {error}.") from None

    def _members(self) -> dict[str, zipfile.ZipInfo]:
        """List what is in an .npz."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {member.filename: member for member in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError):
            raise ValueError(f"'{self.path}' is not an .npz file, or is cut short.") from None

    def _check_size(self, size: int) -> None:
        """Raise ValueError unless the images that the header claims are there, in an array of `size` bytes."""
        needed = self.start + math.prod(self.shape)
        if min(self.shape[1:]) < 1 or self.shape[0] < 0:
            raise ValueError(f"expected uint8 images (N, H, W, 3) in [0,255] in '{self.path}'; got {self.shape}.")
        if size < needed:
            num = f"its {self.shape[0]:,} images take {needed:,} bytes, and there are {size:,}"
            raise ValueError(f"'{self.path}' is cut short: {num}.")

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(file)
        except Exception as error:  # of a .zip, or of a header that is no Python expression
            raise ValueError(f"'{self.path}' is not in numpy's format: {error}.") from None

    def _advice(self, file: IO[bytes], dtype: np.dtype) -> str:
        """Write the end of the sentence that refuses the array; `file` stands at its first number."""
        if dtype.kind == "f" and math.prod(self.shape):
            first = np.frombuffer(file.read(min(math.prod(self.shape), SEEN) * dtype.itemsize), dtype)
            low, high = float(first.min()), float(first.max())
            return f", the first in [{low:.2f}, {high:.2f}]. {advice(low, high, numpy=True)}"
        if dtype.kind in "iu" and dtype != np.uint8:
            return ". If they are pixels from 0 to 255, convert with array.astype(np.uint8)."
        if len(self.shape) == 3:
            return ". Grey images need a channel: array[..., None]."
        if len(self.shape) == 4 and self.shape[3] == 4:
            return ". The fourth channel is transparency; leave it out with array[..., :3]."
        if len(self.shape) == 4 and self.shape[1] in (1, 3):
            return ". The channels come last: transpose it with array.transpose(0, 2, 3, 1)."
        return "."


def _check_dtype(images: Tensor | np.ndarray) -> None:
    if images.dtype in (torch.uint8, np.uint8):
        return
    numpy, tensor = isinstance(images, np.ndarray), torch.as_tensor(images)
    text = f"expected uint8 images in [0,255]; got {dtype_name(tensor)}"
    if tensor.is_complex():
        raise ValueError(f"{text}, which are no pixels.")
    if tensor.numel():
        low, high = range_of(tensor)
        text += f" in [{low:.2f}, {high:.2f}]"
        if tensor.is_floating_point():
            raise ValueError(f"{text}. {advice(low, high, numpy)}")
        if low >= 0 and high <= 255:
            form = "x.astype(np.uint8)" if numpy else "x.to(torch.uint8)"
            raise ValueError(f"{text}. If they are pixels from 0 to 255, convert with {form}.")
    raise ValueError(f"{text}.")


def _cropped(image: np.ndarray, crop: int | None, name: str) -> np.ndarray:
    """Cut the centre square out of (H, W, 3) uint8; without a crop, keep all of it."""
    try:
        return image if crop is None else centre_crop(Image.fromarray(image), crop)
    except ValueError as error:
        raise ValueError(f"{name} cannot be cropped: {error}.") from None
