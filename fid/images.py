"""Images as uint8, read in order from a folder, a zip, an .npz, an .npy or a tensor; never as a whole."""

import copy
import io
import math
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "tif", "tiff")
LOSSY = ("jpg", "jpeg", "webp")  # a webp may be lossless, which its name does not say
MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # of Pillow, with 8 bits and no alpha
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
AHEAD = 4  # batches whose files are decoded before they are asked for


class Images:
    """The first `num` images of `source`, as often as they are asked for.

    Args:
        source: A folder (searched recursively, sorted by path) or a .zip of image files, an .npz with `arr_0` and
            perhaps labels in `arr_1`, an .npy of uint8 (N, H, W, 1 or 3), or a uint8 tensor or array, (N, 3, H, W) or
            (N, H, W, 3).
        num: How many; all of them if not given.
        mixed_sizes: Take images of different sizes.
        drop_alpha: Take images with transparency, and leave it out.
        crop: Side of ADM's centre crop, which makes all sizes one; none if not given.

    Attributes:
        kind: `folder`, `zip`, `npz`, `npy` or `tensor`.
        labels: (num,) int64, from `arr_1` or from sub-folders one level deep, numbered in order; None without them.
        lossy: Whether files of a lossy format are among them.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: No images, not uint8, or fewer than `num`; while reading, a broken file or one of another size.
    """

    def __init__(
        self,
        source: str | Path | Tensor | np.ndarray,
        num: int | None = None,
        *,
        mixed_sizes: bool = False,
        drop_alpha: bool = False,
        crop: int | None = None,
    ) -> None:
        if crop is not None and crop < 1:
            raise ValueError(f"crop is {crop}; it must be at least 1 pixel.")
        self.mixed_sizes, self.crop = mixed_sizes and crop is None, crop
        self._reader = _reader(source, drop_alpha)
        self.kind = self._reader.kind
        self.source = "a tensor" if self.kind == "tensor" else str(source)
        self.num, self.labels = len(self._reader), self._reader.labels
        chosen = self.first(self.num if num is None else num)
        self.num, self.labels = chosen.num, chosen.labels
        self.lossy = any(name.suffix[1:].lower() in LOSSY for name in self._reader.names[: self.num])

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor | list[Tensor]]]:
        """Indices (B,) and images uint8 (B, 3, H, W), or a list of (3, H, W) where sizes are mixed.

        Args:
            batch_size: B, but for the last batch, which may be smaller.
            rank: Of `world_size` processes this one gets every batch whose number is `rank` modulo `world_size`.
            world_size: Number of processes.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        starts = range(0, self.num, batch_size)[rank::world_size]
        index = [i for start in starts for i in range(start, min(start + batch_size, self.num))]
        size, first = None, self._reader.name(0)
        if not self.mixed_sizes:
            size = next(self._read([0], 1)).shape
        images = self._read(index, batch_size * AHEAD)
        for start in starts:
            chosen = range(start, min(start + batch_size, self.num))
            batch = []
            for i in chosen:
                image = next(images)  # (H, W, 3)
                if size is not None and image.shape != size:
                    raise ValueError(
                        f"images differ in size: {first} is {size[1]}x{size[0]}, {self._reader.name(i)} is "
                        f"{image.shape[1]}x{image.shape[0]}. Pass --mixed-sizes to resize each one on its own."
                    )
                batch.append(torch.from_numpy(image).permute(2, 0, 1))
            yield torch.tensor(chosen), batch if self.mixed_sizes else torch.stack(batch).contiguous()

    def first(self, num: int) -> "Images":
        """The first `num` of these images."""
        if not 0 < num <= self.num:
            raise ValueError(f"cannot take {num} images of {self.source}, which holds {self.num}.")
        part = copy.copy(self)
        part.num, part.labels = num, None if self.labels is None else self.labels[:num]
        return part

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """The images (3, H, W) with these indices, in rising order."""
        return [torch.from_numpy(image).permute(2, 0, 1) for image in self._read(list(indices), AHEAD * 16)]

    def warnings(self) -> list[str]:
        """What was seen of the files, a sentence each; complete once all images have been read."""
        found = self._reader.warnings()
        if self.lossy:
            found.insert(0, f"images of '{self.source}' are in a lossy format, which moves every distance.")
        return found

    def _read(self, index: list[int], ahead: int) -> Iterator[np.ndarray]:
        def read(i: int) -> np.ndarray:
            image = self._reader.read(i)
            return image if self.crop is None else centre_crop(image, self.crop)

        if isinstance(self._reader, _Array | _Memory):  # nothing to decode
            yield from map(read, index)
            return
        with ThreadPoolExecutor() as pool:
            yield from _ahead(pool, read, index, ahead)


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


def _ahead(pool: ThreadPoolExecutor, work: Callable[[int], Any], items: Iterable[int], ahead: int) -> Iterator[Any]:
    """`map(work, items)`, with up to `ahead` results made before they are asked for."""
    pending: deque[Future] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _reader(source: Any, drop_alpha: bool) -> "_Files | _Array | _Memory":
    if isinstance(source, Tensor | np.ndarray):
        return _Memory(torch.as_tensor(source))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    if path.is_dir():
        return _Folder(path, drop_alpha)
    if path.suffix.lower() == ".zip":
        return _Zip(path, drop_alpha)
    if path.suffix.lower() in (".npz", ".npy"):
        return _Array(path)
    raise ValueError(f"'{path}' is neither a folder or .zip of images nor an .npz or .npy file.")


class _Memory:
    """Images in memory."""

    kind, names, labels = "tensor", (), None

    def __init__(self, images: Tensor) -> None:
        if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2)
        check_uint8(images)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return f"image {i}"

    def read(self, i: int) -> np.ndarray:
        return self.images[i].permute(1, 2, 0).cpu().numpy()

    def warnings(self) -> list[str]:
        return []


class _Files:
    """Image files: their names in order, each opened by `open`."""

    kind: str

    def __init__(self, path: Path, drop_alpha: bool) -> None:
        self.path, self.drop_alpha = path, drop_alpha
        everything = self.listing()
        self.names = [name for name in everything if name.suffix[1:].lower() in SUFFIXES]
        self.grey = False
        if not self.names:
            suffixes = Counter(name.suffix for name in everything).most_common(5)
            found = ", ".join(f"{n} *{suffix}" for suffix, n in suffixes)
            hint = (
                " Did you mean an .npz with arr_0?" if any(suffix in (".npy", ".npz") for suffix, _ in suffixes) else ""
            )
            raise ValueError(
                f"no images in '{path}' (looked for {', '.join(SUFFIXES)} in any letter case, recursively); "
                f"found {found or 'no files'}.{hint}"
            )

    @property
    def labels(self) -> np.ndarray | None:
        parents = [name.parent for name in self.names]
        if all(len(parent.parts) == 1 for parent in parents) and len(set(parents)) > 1:
            return np.unique([parent.name for parent in parents], return_inverse=True)[1].astype(np.int64)
        return None

    def listing(self) -> list[PurePosixPath]:
        """All files, as paths inside `path`, in order; without hidden ones."""
        raise NotImplementedError

    def open(self, name: PurePosixPath) -> IO[bytes]:
        """A file."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return f"'{self.path / self.names[i]}'"

    def read(self, i: int) -> np.ndarray:
        try:
            with self.open(self.names[i]) as file, Image.open(file) as image:
                mode, pixels = image.mode, np.array(image.convert("RGB"))
                alpha = mode in ALPHA or "transparency" in image.info
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.name(i)} disappeared while '{self.path}' was read; nothing may change it."
            ) from error
        except (OSError, SyntaxError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # Pillow's, zip's
            raise ValueError(f"{self.name(i)} is not a readable image: {error}.") from error
        if alpha and not self.drop_alpha:
            raise ValueError(f"{self.name(i)} has mode {mode}; convert to RGB first or pass --drop-alpha.")
        if mode not in (*MODES, *ALPHA):
            raise ValueError(f"{self.name(i)} has mode {mode}; convert it to 8-bit RGB or grey first.")
        if mode in ("1", "L", "LA"):
            self.grey = True
        return pixels

    def warnings(self) -> list[str]:
        """What changed while it was read, and what is grey."""
        found = [f"images of '{self.path}' are grey; they were taken as RGB."] if self.grey else []
        now = {name for name in self.listing() if name.suffix[1:].lower() in SUFFIXES}
        added, removed = len(now - set(self.names)), len(set(self.names) - now)
        if added or removed:
            found.append(f"'{self.path}' changed while it was read: {added} images came and {removed} went.")
        return found


class _Folder(_Files):
    kind = "folder"

    def listing(self) -> list[PurePosixPath]:
        files = (file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())
        return sorted(name for name in map(PurePosixPath, files) if not _hidden(name))

    def open(self, name: PurePosixPath) -> IO[bytes]:
        return (self.path / name).open("rb")


class _Zip(_Files):
    kind = "zip"

    def __init__(self, path: Path, drop_alpha: bool) -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"'{path}' is not a .zip file, or is cut short.") from error
        super().__init__(path, drop_alpha)

    def listing(self) -> list[PurePosixPath]:
        names = (PurePosixPath(name) for name in self.archive.namelist() if not name.endswith("/"))
        return sorted(name for name in names if not _hidden(name))

    def open(self, name: PurePosixPath) -> IO[bytes]:
        return io.BytesIO(self.archive.read(str(name)))  # one lock inside; the decoding runs in threads


def _hidden(name: PurePosixPath) -> bool:
    """Of a hidden file or folder, or of what macOS puts into archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


class _Array:
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
            elif len(self.shape) == 4 and self.shape[1] in (1, 3):
                hint = " The channels come last: transpose it with array.transpose(0, 2, 3, 1)."
        raise ValueError(f"expected uint8 images (N, H, W, 3) in [0,255] in '{path}'; got {got}.{hint}")

    @property
    def labels(self) -> np.ndarray | None:
        if self.kind == "npz":
            with np.load(self.path, allow_pickle=False) as archive:
                if "arr_1" in archive.files:
                    labels = archive["arr_1"]
                    if labels.shape == self.shape[:1] and labels.dtype.kind in "iu":
                        return labels.astype(np.int64)
        return None

    def __len__(self) -> int:
        return self.shape[0]

    def name(self, i: int) -> str:
        return f"image {i} of '{self.path}'"

    def read(self, i: int) -> np.ndarray:
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
        return [f"images of '{self.path}' are grey; they were taken as RGB."] if self.shape[3] == 1 else []

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
