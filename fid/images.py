"""Images as uint8, read in order from a folder, a zip, an .npz, an .npy or a tensor; never as a whole."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from vca_engine.images import ArrayFile, ArrayInMemory, ImageFiles, check_side, on_white, open_image
from vca_engine.images.labels import classes_of

AHEAD = 4  # batches whose files are decoded before they are asked for
LOSSY = (".jpg", ".jpeg", ".jfif", ".webp")  # a webp may be lossless, which its name does not say
MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # of Pillow, with 8 bits and no alpha
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class Images:
    """The first `num` images of `source`, as often as they are asked for.

    Args:
        source: A folder (searched recursively, sorted by path) or a .zip of image files, an .npz with `arr_0` and
            perhaps labels in `arr_1`, an .npy of uint8 (N, H, W, 1 or 3), or a uint8 tensor or array, (N, 3, H, W) or
            (N, H, W, 3).
        num: How many; all of them if not given.
        mixed_sizes: Take images of different sizes.
        drop_alpha: Take the colours of transparent pixels as they are stored; else they are laid on white, as in
            training.
        crop: Side of ADM's centre crop, which makes all sizes one; files are then read as training reads them: turned
            as their camera says, 16 bits scaled to 8, transparency laid on white. Not given means as they are.

    Attributes:
        kind: `folder`, `zip`, `npz`, `npy` or `tensor`.
        labels: (num,) int64, from `arr_1` or from sub-folders one level deep, numbered in order; None without them.

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
        if crop is not None:
            check_side("crop", crop)
        self.mixed_sizes, self.crop = mixed_sizes and crop is None, crop
        self._reader = _open(source, drop_alpha)
        self.kind = self._reader.kind
        self.source = "a tensor" if self.kind == "tensor" else str(source)
        self.num, self.labels = len(self._reader), self._reader.labels
        chosen = self.first(self.num if num is None else num)
        self.num, self.labels = chosen.num, chosen.labels

    @property
    def lossy(self) -> bool:
        """True if files of a lossy format are among them."""
        return any(name.lower().endswith(LOSSY) for name in self._reader.names[: self.num])

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor | list[Tensor]]]:
        """Give indices (B,) and images uint8 (B, 3, H, W), or a list of (3, H, W) where sizes are mixed.

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
                batch.append(torch.from_numpy(image))
            if self.mixed_sizes:
                yield torch.tensor(chosen), [image.permute(2, 0, 1) for image in batch]
            else:
                yield torch.tensor(chosen), torch.stack(batch).permute(0, 3, 1, 2)

    def first(self, num: int) -> "Images":
        """Take the first `num` of these images."""
        if not 0 < num <= self.num:
            raise ValueError(f"cannot take {num} images of {self.source}, which holds {self.num}.")
        part = copy.copy(self)
        part.num, part.labels = num, None if self.labels is None else self.labels[:num]
        return part

    def with_classes(self) -> "Images":
        """Take these images with the `labels` that training gives them: by a file of labels, such as labels.csv, too.

        Raises:
            ValueError: Files without classes, see `classes_of`.
        """
        part = copy.copy(self)
        if isinstance(self._reader, FilesAsTheyAre):
            try:
                labels, _, self._reader.notes = classes_of(self._reader.files)
            except ValueError as error:  # which names the setting of training
                raise ValueError(str(error).replace("--data.images ", "").replace("data.images ", "")) from None
            part.labels = labels[: self.num]
        return part

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Read the images (3, H, W) uint8 with these indices, in rising order."""
        return [torch.from_numpy(image).permute(2, 0, 1) for image in self._read(list(indices), AHEAD * 16)]

    def warnings(self, changes: bool = True) -> list[str]:
        """List what was seen of the files, a sentence each; complete once all images have been read.

        Args:
            changes: Look, too, whether files have come or gone, for which the folder is listed once more.
        """
        files = isinstance(self._reader, FilesAsTheyAre)
        found = list(dict.fromkeys(self._reader.notes + self._reader.files.warnings())) if files else []
        if self._reader.grey:
            some = "some images" if self._reader.names else "images"
            found.append(f"{some} of '{Path(self.source)}' are grey; they were taken as RGB.")
        if files and self._reader.transparent:
            found.append(
                f"some images of '{Path(self.source)}' are transparent; they were laid on white, as training does."
            )
        if changes and files and (text := self._reader.changes()):
            found.append(text)
        if self.labels is not None and self._reader.labels is not None and self.num < len(self._reader):
            some, all_of = (len(np.unique(labels)) for labels in (self.labels, self._reader.labels))
            if some < all_of:
                found.append(
                    f"the first {self.num} images of '{self.source}' are of {some} of its {all_of} classes only."
                )
        return found

    def _read(self, index: list[int], ahead: int) -> Iterator[np.ndarray]:
        def read(i: int) -> np.ndarray:
            return self._reader.read(i, self.crop)

        if isinstance(self._reader, ArrayInMemory):
            yield from map(read, index)
            return
        with ThreadPoolExecutor(
            1 if isinstance(self._reader, ArrayFile) else None
        ) as pool:  # an array is read in order
            yield from _ahead(pool, read, index, ahead)


class FilesAsTheyAre:
    """Image files of a folder and all folders below, or of a .zip, that are taken as they are, or refused.

    Args:
        path: Where they are.
        drop_alpha: Leave out what says how transparent a pixel is; else images are laid on white.

    Attributes:
        grey: Whether any image that was read had no colours.
        transparent: Whether any image that was read was laid on white.
        notes: Sentences on their classes that the user should read.

    Raises:
        ValueError: There are no images.
    """

    def __init__(self, path: Path, drop_alpha: bool) -> None:
        self.files, self.drop_alpha, self.grey, self.transparent = ImageFiles(path), drop_alpha, False, False
        self.notes: list[str] = []
        self.kind, self.names = "zip" if self.files.zipped else "folder", self.files.names

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Labels (N,) int64 of sub-folders one level deep, numbered in order; None without them."""
        folders = [name.split("/")[:-1] for name in self.names]
        if all(len(parts) == 1 for parts in folders) and len({parts[0] for parts in folders}) > 1:
            return np.unique([parts[0] for parts in folders], return_inverse=True)[1].astype(np.int64)
        return None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """Say what a message calls image `i`."""
        return repr(self.files.path(self.names[i]))

    def read(self, i: int, crop: int | None = None) -> np.ndarray:
        """Read image `i`, (H, W, 3) uint8; with a crop, its centre square as training takes it, (crop, crop, 3).

        Raises:
            ValueError: It cannot be read, or is not of 8 bits; names it.
            OSError: The disk does not give it.
        """
        if crop is not None:
            return self.files.pixels(self.names[i], crop)
        mode, pixels, transparent = self.files.decode(self.names[i], partial(_as_it_is, drop_alpha=self.drop_alpha))
        self.transparent |= transparent and not self.drop_alpha
        if mode not in (*MODES, *ALPHA):
            raise ValueError(f"{self.name(i)} has mode {mode}; convert it to 8-bit RGB or grey first.")
        if mode in ("1", "L", "LA"):
            self.grey = True
        return pixels

    def changes(self) -> str | None:
        """Say what has come and gone since the images were counted; None if nothing has."""
        came, went = self.files.changes()
        if not came and not went:
            return None
        return f"'{self.files.root}' changed while it was read: {came} images came and {went} went."


def _open(source: Any, drop_alpha: bool) -> ArrayInMemory | ArrayFile | FilesAsTheyAre:
    if isinstance(source, Tensor | np.ndarray):
        return ArrayInMemory(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        return ArrayFile(path)
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".zip"):
        raise ValueError(f"'{path}' is neither a folder or .zip of images nor an .npz or .npy file.")
    try:
        return FilesAsTheyAre(path, drop_alpha)
    except ValueError as error:
        arrays = path.is_dir() and any(file.suffix in (".npz", ".npy") for file in path.iterdir())
        raise ValueError(f"{error}{' Did you mean an .npz with arr_0?' if arrays else ''}") from None


def _as_it_is(file: IO[bytes], drop_alpha: bool) -> tuple[str, np.ndarray, bool]:
    """Give Pillow's mode, the pixels (H, W, 3) uint8, on white or as stored, and whether any is transparent."""
    with open_image(file) as image:
        mode, alpha = image.mode, image.mode in ALPHA or "transparency" in image.info
        transparent = alpha and image.convert("RGBA").getextrema()[3][0] < 255
        laid = on_white(image) if transparent and not drop_alpha else image.convert("RGB")
        return mode, np.array(laid), transparent


def _ahead(pool: ThreadPoolExecutor, work: Callable[[int], Any], items: Iterable[int], ahead: int) -> Iterator[Any]:
    """Yield `map(work, items)`, with up to `ahead` results made before they are asked for."""
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
