"""Latents on disk: encoded once, in shards that are read through memory maps, with a manifest of what they are.

A cache is a folder of

    shard-00000.npy ...   (n, 1 or 2, K, h, w) float16: n images; the image, and its mirror image if training flips;
                          K = 2C channels of mean and standard deviation, or C of latents
    labels.npy            (N,) int64
    manifest.json         what they were made of, and with what; a checksum of each shard

Shard k holds the images from k S to (k + 1) S - 1 of the data, less those that could not be read, whoever encodes it.
"""

import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vca_engine.files import sha256_of
from vca_engine.images.labels import check_label_range
from vca_engine.records import differences, listed, read_json

MANIFEST, LABELS_FILE = "manifest.json", "labels.npy"
CACHE_FORMAT = 1  # of the format


class DamagedError(ValueError):
    """A cache of which a shard or the labels are missing, or not as they were written."""


class LatentDataset(Dataset):
    """A cache: (index, flip) -> moments (2C, h, w), or latents (C, h, w), in float16, and the label.

    Shards are mapped into memory when a process first reads them, so workers share what is in the file cache. Where the
    disk is no hindrance the training process reads faster than workers can hand over.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is not a cache, or a part of it is missing.
    """

    def __init__(self, path: str) -> None:
        self.path, self.folder = path, Path(path)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"latents {path!r} is not a folder; make it with: python cache_latents.py --config YOUR.yaml "
                f"--latents {path}, or train from images with --latents= (nothing after it)."
            )
        try:
            if not (self.folder / MANIFEST).is_file():
                raise ValueError(f"it has no {MANIFEST}")
            self.manifest = read_json(self.folder / MANIFEST)
            if self.manifest["version"] != CACHE_FORMAT:
                raise ValueError(f"its format is {self.manifest['version']}, this program's {CACHE_FORMAT}")
            settings = self.manifest["settings"]
            self.class_names: list[str] = settings["class_names"]
            self.image_size, self.channels, self.flip = (settings[k] for k in ("image_size", "channels", "flip"))
            shape = self.manifest["shape"]
            self.shards: list[dict[str, Any]] = self.manifest["shards"]
            counts = [shard["num_images"] for shard in self.shards]
            for name, values, least in (("shape", shape, 1), ("num_images", [self.manifest["num_images"], *counts], 0)):
                if not (isinstance(values, list) and all(type(value) is int and value >= least for value in values)):
                    raise ValueError(f"its {name} is {values!r}")  # a shard has 0 if none of its images could be read
            if sum(counts) != self.manifest["num_images"] or len(shape) != 3:
                raise ValueError(f"its {self.manifest['num_images']} latents {shape} are not those of its shards")
            self.row_shape = (1 + self.flip, *shape)
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = str(error).rstrip(".")
            raise ValueError(
                f"latents {path!r} is not a folder made by cache_latents.py: {why}. Name another with --latents FOLDER."
            ) from None
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # of the shards
        self.num_classes = len(self.class_names)
        self.labels = self._read_labels()
        for shard, num in zip(self.shards, counts, strict=True):
            self._check_header(shard["file"], (num, *self.row_shape))
        self._maps: dict[int, np.ndarray] = {}
        self._loaded: tuple[Tensor, Tensor] | None = None  # moments (N, 1 or 2, K, h, w) and labels, on a device

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int]:
        """Read (index, flip): moments (K, h, w) float16, and the label."""
        moments, labels = self.__getitems__([key])
        return moments[0], int(labels[0])

    def __getitems__(self, keys: Sequence[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
        """Read a batch of (index, flip) at once: moments (B, K, h, w) float16, and labels (B,)."""
        if self._loaded:
            moments, labels = self._loaded
            index, flip = torch.tensor([(i, int(f)) for i, f in keys]).to(labels.device, non_blocking=True).unbind(1)
            return moments[index, flip], labels[index]
        indices = np.fromiter((index for index, _ in keys), np.int64, len(keys))
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        rows = indices - self.starts[shards]
        moments = _empty((len(keys), *self.row_shape[1:]))
        out = moments.numpy()
        for k, (shard, row, (_, flip)) in enumerate(zip(shards.tolist(), rows.tolist(), keys, strict=True)):
            out[k] = self._map(shard)[row, int(flip)]
        return moments, torch.from_numpy(self.labels[indices])

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Give a batch back, moments (B, K, h, w) and labels (B,): it is whole as it comes."""
        return batch

    def preload(self, device: torch.device) -> None:
        """Read all of it into the memory of a device, from which batches come from now on, in this process.

        Raises:
            ValueError: There is not enough memory; says how much is needed.
        """
        size = 2 * len(self) * math.prod(self.row_shape)
        try:
            moments = torch.empty((len(self), *self.row_shape), dtype=torch.float16, device=device)
        except RuntimeError:  # OutOfMemoryError of a GPU is one, too
            raise ValueError(
                f"train.preload: the latents of {self.path!r} take {size / 1e9:.1f} GB, more than {device} has free."
            ) from None
        for k, start in enumerate(self.starts[:-1]):
            shard = torch.from_numpy(np.array(self._map(k)))
            moments[start : start + len(shard)] = shard
            del self._maps[k]
        self._loaded = moments, torch.from_numpy(self.labels).to(device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # else another process would get the latents themselves

    def check(self, expected: dict[str, Any]) -> None:
        """Check that these are the latents that a run needs.

        Args:
            expected: Some of the settings, with the values that they have to have.

        Raises:
            ValueError: They are not; says what differs.
        """
        check_made_with(self.path, self.manifest["settings"], expected)

    def verify(self) -> Iterator[int]:
        """Read all of it, and give the number of images of shard after shard.

        Raises:
            ValueError: A shard whose checksum is another, or with numbers that are not finite; says which.
        """
        counts = np.bincount(self.labels, minlength=self.num_classes).tolist()
        if counts != list(self.manifest["class_counts"].values()):
            raise self._damaged(LABELS_FILE, "has other counts than the manifest")
        for k, shard in enumerate(self.shards):
            if sha256_of(self.folder / shard["file"]) != shard["sha256"]:
                raise ValueError(
                    f"latents {self.path!r} are damaged: {shard['file']} has another checksum. Remove it and run "
                    "cache_latents.py again, which makes it anew."
                )
            if not np.isfinite(self._map(k)).all():
                raise ValueError(f"latents {self.path!r} are damaged: {shard['file']} has numbers that are not finite.")
            del self._maps[k]
            yield shard["num_images"]

    def _read_labels(self) -> np.ndarray:
        """Read the labels (N,) int64.

        Raises:
            DamagedError: They are missing, or not as they were written.
        """
        if not (self.folder / LABELS_FILE).is_file():
            raise self._damaged(LABELS_FILE, "is missing")
        try:
            content, expected = (self.folder / LABELS_FILE).read_bytes(), self.manifest.get("labels_sha256")
            if expected not in (None, hashlib.sha256(content).hexdigest()):
                raise ValueError("has another checksum")
            labels = np.load(io.BytesIO(content))
            if labels.shape != (self.starts[-1],) or labels.dtype != np.int64:
                raise ValueError(f"holds {labels.dtype} {labels.shape}, not {self.starts[-1]} labels")
            return check_label_range(labels, self.num_classes)
        except (ValueError, EOFError) as error:
            raise self._damaged(LABELS_FILE, str(error).rstrip(".")) from None

    def _check_header(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise DamagedError unless the file of a shard has the size and the header that it was written with."""
        file, header = self.folder / name, npy_header(shape)
        if not file.is_file():
            raise self._damaged(name, "is missing")
        if file.stat().st_size != file_size(shape):
            raise self._damaged(name, f"has {file.stat().st_size} bytes, not {file_size(shape)}")
        with file.open("rb") as content:
            if content.read(len(header)) != header:
                raise self._damaged(name, "has another header")

    def _damaged(self, name: str, why: str) -> DamagedError:
        return DamagedError(f"latents {self.path!r} are damaged: {name} {why}; cache_latents.py makes it anew.")

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.load(self.folder / self.shards[shard]["file"], mmap_mode="r").view(np.ndarray)
        return self._maps[shard]


def check_made_with(path: str, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError, which says what differs, unless the latents at `path` were made with what is expected."""
    if found := differences({key: settings.get(key) for key in expected}, expected):
        raise ValueError(
            f"latents {path!r} were made with {listed(found, 'needed:')}; choose another folder and run "
            "cache_latents.py again."
        )


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Make an array of float16; in a worker, in shared memory, so that it is handed over without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.float16)
    storage = torch.UntypedStorage._new_shared(2 * math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.float16).set_(storage, 0, shape)


def npy_header(shape: Sequence[int]) -> bytes:
    """Write the beginning of an .npy file of float16 numbers of a shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)})
    return header.getvalue()


def file_size(shape: Sequence[int]) -> int:
    """Count the bytes of an .npy file of float16 numbers of a shape."""
    return len(npy_header(shape)) + 2 * math.prod(shape)
