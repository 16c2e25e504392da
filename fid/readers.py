"""Where images come from: files in a folder or in a zip, an array in an .npz or an .npy, memory."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from fid.pixels import advice, as_nchw, check_uint8
from vca_engine.images import ImageFiles, centre_crop, is_image, open_image

LOSSY = (".jpg", ".jpeg", ".jfif", ".webp")  # a webp may be lossless, which its name does not say
MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # of Pillow, with 8 bits and no alpha
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
SEEN = 10**7  # numbers of an array of floats whose range is looked at; 50 images of 256 x 256


class Reader(Protocol):
    """N images in a fixed order."""

    kind: str  # folder, zip, npz, npy or tensor
    names: Sequence[str]  # of the files, where each image has one; inside a folder or .zip, with /
    labels: np.ndarray | None  # (N,) int64

    def __len__(self) -> int:
        """N."""

    def name(self, i: int) -> str:
        """What a message calls image `i`."""

    def read(self, i: int, crop: int | None = None) -> np.ndarray:
        """Image `i`, (H, W, 3) uint8; with a crop, its centre square as training takes it, (crop, crop, 3).

        Raises:
            ValueError: It cannot be read; names it.
            OSError: The disk does not give it.
        """

    def warnings(self) -> list[str]:
        """What this process saw in the images that it has read, a sentence each."""

    def changes(self) -> list[str]:
        """What has come and gone since the images were counted, a sentence."""


def open_reader(source: Any, drop_alpha: bool = False) -> Reader:
    """The reader for what `source` is; see `fid.Images`.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: It holds no images, or none of uint8.
    """
    if isinstance(source, Tensor | np.ndarray):
        return Memory(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        return Array(path)
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".zip"):
        raise ValueError(f"'{path}' is neither a folder or .zip of images nor an .npz or .npy file.")
    try:
        return Files(path, drop_alpha)
    except ValueError as error:
        arrays = path.is_dir() and any(file.suffix in (".npz", ".npy") for file in path.iterdir())
        raise ValueError(f"{error}{' Did you mean an .npz with arr_0?' if arrays else ''}") from None


class Memory:
    """Images in memory."""

    kind, names, labels = "tensor", (), None

    def __init__(self, images: Tensor | np.ndarray) -> None:
        self.images = as_nchw(images)
        check_uint8(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """See `Reader`."""
        return f"image {i}"

    def read(self, i: int, crop: int | None = None) -> np.ndarray:
        """See `Reader`."""
        return _cropped(self.images[i].permute(1, 2, 0).cpu().numpy(), crop, self.name(i))

    def warnings(self) -> list[str]:
        """See `Reader`."""
        return []

    def changes(self) -> list[str]:
        """See `Reader`."""
        return []


class Files:
    """Image files of a folder and all folders below, or of a .zip.

    Args:
        path: Where they are.
        drop_alpha: Leave out what says how transparent a pixel is; else it is refused. With a crop it is laid on white.
    """

    def __init__(self, path: Path, drop_alpha: bool) -> None:
        self.files, self.drop_alpha, self.grey = ImageFiles(path), drop_alpha, False
        self.kind, self.names = "zip" if self.files.zipped else "folder", self.files.names

    @cached_property
    def labels(self) -> np.ndarray | None:
        """See `Reader`."""
        folders = [name.split("/")[:-1] for name in self.names]
        if all(len(parts) == 1 for parts in folders) and len({parts[0] for parts in folders}) > 1:
            return np.unique([parts[0] for parts in folders], return_inverse=True)[1].astype(np.int64)
        return None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """See `Reader`."""
        return repr(self.files.path(self.names[i]))

    def read(self, i: int, crop: int | None = None) -> np.ndarray:
        """See `Reader`; without a crop, a file is taken as it is, or refused."""
        if crop is not None:
            return self.files.pixels(self.names[i], crop)
        mode, pixels, transparent = self.files.decode(self.names[i], _as_it_is)
        if transparent and not self.drop_alpha:
            raise ValueError(f"{self.name(i)} has mode {mode}; convert to RGB first or pass --drop-alpha.")
        if mode not in (*MODES, *ALPHA):
            raise ValueError(f"{self.name(i)} has mode {mode}; convert it to 8-bit RGB or grey first.")
        if mode in ("1", "L", "LA"):
            self.grey = True
        return pixels

    def warnings(self) -> list[str]:
        """See `Reader`."""
        return [f"some images of '{self.files.root}' are grey; they were taken as RGB."] if self.grey else []

    def changes(self) -> list[str]:
        """See `Reader`."""
        before = {self.files.prefix + name for name in self.names}
        now = set(filter(is_image, self.files.listing()))
        came, went = len(now - before), len(before - now)
        if not came and not went:
            return []
        return [f"'{self.files.root}' changed while it was read: {came} images came and {went} went."]


def _as_it_is(file: IO[bytes]) -> tuple[str, np.ndarray, bool]:
    """Mode of Pillow, pixels (H, W, 3) uint8, and whether any of them is transparent."""
    with open_image(file) as image:
        mode, pixels = image.mode, np.array(image.convert("RGB"))
        alpha = mode in ALPHA or "transparency" in image.info
        return mode, pixels, alpha and image.convert("RGBA").getextrema()[3][0] < 255


class Array:
    """Reads the .npy format row by row: inside an .npz it cannot be memory-mapped, and may not fit into memory."""

    names = ()

    def __init__(self, path: Path) -> None:
        self.path, self.kind = path, path.suffix.lower()[1:]
        self.file: IO[bytes] | None = None
        with self._open() as file:
            self.shape, fortran_order, dtype = self._header(file)
            self.start = file.tell()
            if dtype == np.uint8 and len(self.shape) == 4 and self.shape[3] in (1, 3) and not fortran_order:
                return
            got = f"{dtype} {self.shape}{' in Fortran order' if fortran_order else ''}"
            hint = ""
            if dtype.kind == "f" and math.prod(self.shape):
                first = np.frombuffer(file.read(min(math.prod(self.shape), SEEN) * dtype.itemsize), dtype)
                low, high = float(first.min()), float(first.max())
                got += f", the first in [{low:.2f}, {high:.2f}]"
                hint = f" {advice(low, high, numpy=True)}"
            elif dtype.kind in "iu" and dtype != np.uint8:
                hint = " If they are pixels from 0 to 255, convert with array.astype(np.uint8)."
            elif len(self.shape) == 3:
                hint = " Grey images need a channel: array[..., None]."
            elif len(self.shape) == 4 and self.shape[3] == 4:
                hint = " The fourth channel is transparency; leave it out with array[..., :3]."
            elif len(self.shape) == 4 and self.shape[1] in (1, 3):
                hint = " The channels come last: transpose it with array.transpose(0, 2, 3, 1)."
        raise ValueError(f"expected uint8 images (N, H, W, 3) in [0,255] in '{path}'; got {got}.{hint}")

    @cached_property
    def labels(self) -> np.ndarray | None:
        """See `Reader`."""
        if self.kind == "npz":
            try:
                with np.load(self.path, allow_pickle=False) as archive:
                    labels = archive["arr_1"]
            except (KeyError, ValueError):  # there is none, or it holds objects
                return None
            if labels.shape == self.shape[:1] and labels.dtype.kind in "iu":
                return labels.astype(np.int64)
        return None

    def __len__(self) -> int:
        return self.shape[0]

    def name(self, i: int) -> str:
        """See `Reader`."""
        return f"image {i} of '{self.path}'"

    def read(self, i: int, crop: int | None = None) -> np.ndarray:
        """See `Reader`."""
        if self.file is None:
            self.file = self._open()
        height, width, channels = self.shape[1:]
        size = height * width * channels
        try:
            self.file.seek(self.start + i * size)  # a compressed file is read forward to there
            image = np.frombuffer(self.file.read(size), np.uint8).reshape(height, width, channels)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"'{self.path}' is damaged at image {i} of {len(self)}.") from error
        return _cropped(np.repeat(image, 3, axis=2) if channels == 1 else image.copy(), crop, self.name(i))

    def warnings(self) -> list[str]:
        """See `Reader`."""
        return [f"images of '{self.path}' are grey; they were taken as RGB."] if self.shape[3] == 1 else []

    def changes(self) -> list[str]:
        """See `Reader`."""
        return []

    def _open(self) -> IO[bytes]:
        if self.kind == "npy":
            return self.path.open("rb")
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"'{self.path}' is not an .npz file, or is cut short.")
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


def _cropped(image: np.ndarray, crop: int | None, name: str) -> np.ndarray:
    """The centre square of (H, W, 3) uint8, or all of it without a crop."""
    try:
        return image if crop is None else centre_crop(Image.fromarray(image), crop)
    except ValueError as error:
        raise ValueError(f"{name} cannot be cropped: {error}.") from None
