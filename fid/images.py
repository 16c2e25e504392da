"""Images as uint8, read in order from a folder, a zip, an .npz, an .npy or a tensor; never as a whole."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fid.readers import LOSSY, Array, Memory, open_reader

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
        crop: Side of ADM's centre crop, which makes all sizes one; files are then read as training reads them: turned as
            their camera says, 16 bits scaled to 8, transparency laid on white. Not given means as they are.

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
        if crop is not None and crop < 1:
            raise ValueError(f"crop is {crop}; it must be at least 1 pixel.")
        self.mixed_sizes, self.crop = mixed_sizes and crop is None, crop
        self._reader = open_reader(source, drop_alpha)
        self.kind = self._reader.kind
        self.source = "a tensor" if self.kind == "tensor" else str(source)
        self.num, self.labels = len(self._reader), self._reader.labels
        chosen = self.first(self.num if num is None else num)
        self.num, self.labels = chosen.num, chosen.labels

    @property
    def lossy(self) -> bool:
        """Whether files of a lossy format are among them."""
        return any(name.lower().endswith(LOSSY) for name in self._reader.names[: self.num])

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
                batch.append(torch.from_numpy(image))
            if self.mixed_sizes:
                yield torch.tensor(chosen), [image.permute(2, 0, 1) for image in batch]
            else:
                yield torch.tensor(chosen), torch.stack(batch).permute(0, 3, 1, 2)

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

    def warnings(self, changes: bool = True) -> list[str]:
        """What was seen of the files, a sentence each; complete once all images have been read.

        Args:
            changes: Look, too, whether files have come or gone, for which the folder is listed once more.
        """
        found = self._reader.warnings() + (self._reader.changes() if changes else [])
        if self.labels is not None and self.num < len(self._reader):
            some, all_of = (len(np.unique(labels)) for labels in (self.labels, self._reader.labels))
            if some < all_of:
                found.append(
                    f"the first {self.num} images of '{self.source}' are of {some} of its {all_of} classes only."
                )
        return found

    def _read(self, index: list[int], ahead: int) -> Iterator[np.ndarray]:
        def read(i: int) -> np.ndarray:
            return self._reader.read(i, self.crop)

        if isinstance(self._reader, Memory):
            yield from map(read, index)
            return
        with ThreadPoolExecutor(1 if isinstance(self._reader, Array) else None) as pool:  # an array is read in order
            yield from _ahead(pool, read, index, ahead)


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
