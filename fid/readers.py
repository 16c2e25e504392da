"""Where images come from: files in a folder or in a zip, an array in an .npz or an .npy, memory."""

import io
import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from fid.pixels import as_nchw, as_trained, check_uint8

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "tif", "tiff")
LOSSY = (".jpg", ".jpeg", ".webp")  # a webp may be lossless, which its name does not say
MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # of Pillow, with 8 bits and no alpha
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class Reader(Protocol):
    """N images in a fixed order."""

    kind: str  # folder, zip, npz, npy or tensor
    names: Sequence[str]  # of the files, where each image has one; inside a folder or .zip, with /
    labels: np.ndarray | None  # (N,) int64

    def __len__(self) -> int:
        """N."""

    def name(self, i: int) -> str:
        """What a message calls image `i`."""

    def read(self, i: int) -> np.ndarray:
        """Image `i`, (H, W, 3) uint8; a ValueError that names it if it cannot be read."""

    def warnings(self) -> list[str]:
        """What this process saw in the images that it has read, a sentence each."""

    def changes(self) -> list[str]:
        """What has come and gone since the images were counted, a sentence."""


def open_reader(source: Any, drop_alpha: bool = False, trained: bool = False) -> Reader:
    """The reader for what `source` is, by its content; see `fid.Images`.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: It holds no images, or none of uint8.
    """
    if isinstance(source, Tensor | np.ndarray):
        return Memory(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    if path.is_dir():
        return Folder(path, drop_alpha, trained)
    if path.suffix.lower() == ".zip":
        return Zip(path, drop_alpha, trained)
    if path.suffix.lower() in (".npz", ".npy"):
        return Array(path)
    raise ValueError(f"'{path}' is neither a folder or .zip of images nor an .npz or .npy file.")


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

    def read(self, i: int) -> np.ndarray:
        """See `Reader`."""
        return self.images[i].permute(1, 2, 0).cpu().numpy()

    def warnings(self) -> list[str]:
        """See `Reader`."""
        return []

    def changes(self) -> list[str]:
        """See `Reader`."""
        return []


class Files:
    """Image files: their names in order, from `listing`, each opened by `open`.

    Args:
        path: Where they are.
        drop_alpha: Leave out what says how transparent a pixel is; else it is refused.
        trained: Read whatever training reads, as it does.
    """

    kind: str

    def __init__(self, path: Path, drop_alpha: bool, trained: bool) -> None:
        self.path, self.drop_alpha, self.trained = path, drop_alpha, trained
        everything = self.listing()
        self.names = [name for name in everything if _suffix(name) in SUFFIXES]
        self.grey = False
        if not self.names:
            suffixes = Counter(map(_suffix, everything)).most_common(5)
            found = ", ".join(f"{n} *.{suffix}" for suffix, n in suffixes)
            hint = " Did you mean an .npz with arr_0?" if {"npy", "npz"} & {suffix for suffix, _ in suffixes} else ""
            raise ValueError(
                f"no images in '{path}' (looked for {', '.join(SUFFIXES)} in any letter case, recursively); "
                f"found {found or 'no files'}.{hint}"
            )

    @cached_property
    def labels(self) -> np.ndarray | None:
        """See `Reader`."""
        folders = [name.split("/")[:-1] for name in self.names]
        if all(len(parts) == 1 for parts in folders) and len({parts[0] for parts in folders}) > 1:
            return np.unique([parts[0] for parts in folders], return_inverse=True)[1].astype(np.int64)
        return None

    def listing(self) -> list[str]:
        """All files, as paths inside `path`, in order; without hidden ones."""
        raise NotImplementedError

    def open(self, name: str) -> IO[bytes]:
        """A file."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """See `Reader`."""
        return f"'{self.path / self.names[i]}'"

    def read(self, i: int) -> np.ndarray:
        """See `Reader`."""
        try:
            with self.open(self.names[i]) as file, Image.open(file) as image:
                if self.trained:
                    return np.array(as_trained(image))
                mode, pixels = image.mode, np.array(image.convert("RGB"))
                alpha = mode in ALPHA or "transparency" in image.info
                opaque = alpha and image.convert("RGBA").getextrema()[3][0] == 255
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.name(i)} disappeared while '{self.path}' was read; nothing may change it."
            ) from error
        except Exception as error:  # damaged files make Pillow and zipfile raise almost anything
            raise ValueError(f"{self.name(i)} is not a readable image: {error}.") from error
        if alpha and not self.drop_alpha and not opaque:
            raise ValueError(f"{self.name(i)} has mode {mode}; convert to RGB first or pass --drop-alpha.")
        if mode not in (*MODES, *ALPHA):
            raise ValueError(f"{self.name(i)} has mode {mode}; convert it to 8-bit RGB or grey first.")
        if mode in ("1", "L", "LA"):
            self.grey = True
        return pixels

    def warnings(self) -> list[str]:
        """See `Reader`."""
        return [f"some images of '{self.path}' are grey; they were taken as RGB."] if self.grey else []

    def changes(self) -> list[str]:
        """See `Reader`."""
        now, before = {name for name in self.listing() if _suffix(name) in SUFFIXES}, set(self.names)
        if now == before:
            return []
        came, went = len(now - before), len(before - now)
        return [f"'{self.path}' changed while it was read: {came} images came and {went} went."]


class Folder(Files):
    """Image files in a folder and all folders below."""

    kind = "folder"

    def listing(self) -> list[str]:
        """See `Files`; links to folders are followed, unless they lead back to where they are."""
        names: list[str] = []
        above = {str(self.path): {_identity(self.path)}}
        for folder, inside, files in os.walk(self.path, followlinks=True):
            here, chain = Path(folder).relative_to(self.path).as_posix(), above.pop(folder)
            names += files if here == "." else [f"{here}/{file}" for file in files]
            paths = {name: os.path.join(folder, name) for name in inside}
            inside[:] = [name for name, path in paths.items() if _identity(path) not in chain]
            above |= {paths[name]: chain | {_identity(paths[name])} for name in inside}
        return sorted(name for name in names if not _hidden(name))

    def open(self, name: str) -> IO[bytes]:
        """See `Files`."""
        return (self.path / name).open("rb")


class Zip(Files):
    """Image files in a .zip."""

    kind = "zip"

    def __init__(self, path: Path, drop_alpha: bool, trained: bool) -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"'{path}' is not a .zip file, or is cut short.") from error
        members = [member for member in self.archive.infolist() if not member.is_dir()]
        self.members = {PurePosixPath(member.filename.replace("\\", "/")).as_posix(): member for member in members}
        super().__init__(path, drop_alpha, trained)

    def listing(self) -> list[str]:
        """See `Files`."""
        return sorted(name for name in self.members if not _hidden(name))

    def open(self, name: str) -> IO[bytes]:
        """See `Files`."""
        return io.BytesIO(self.archive.read(self.members[name]))  # one lock inside; the decoding runs in threads


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _hidden(name: str) -> bool:
    """Of a hidden file or folder, or of what macOS puts into archives."""
    return "/." in f"/{name}" or "/__MACOSX/" in f"/{name}"


def _identity(folder: str | Path) -> tuple[int, int]:
    """The same for each name of a folder."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


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
                first = np.frombuffer(file.read(math.prod(self.shape[1:]) * dtype.itemsize), dtype)
                got += f", the first in [{first.min():.2f}, {first.max():.2f}]"
                hint = " Convert with fid.quantize(x) (DiT rounding)."
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

    def read(self, i: int) -> np.ndarray:
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
        return np.repeat(image, 3, axis=2) if channels == 1 else image.copy()

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
