"""Encoding images into a cache of latents: by any number of processes, shard by shard, to be gone on with at any time.

Until it is complete the cache is FOLDER.partial: settings.json, and for each finished shard its .npy and a .json beside
it that is written last. A shard has its name only when it is whole; one that does not have its checksum is made anew.
"""

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vca_engine.config.schema import CacheConfig
from vca_engine.distributed import on_main_process
from vca_engine.files import remove_temporary, require_free, sha256_of, written_aside
from vca_engine.images import UnreadableImageError, from_uint8
from vca_engine.images.codecs import sample_posterior
from vca_engine.images.datasets import ImageDataset
from vca_engine.images.latents import CACHE_FORMAT, LABELS_FILE, MANIFEST, check_made_with, file_size
from vca_engine.images.loader import load
from vca_engine.records import differences, listed, read_json, write_json

SETTINGS = "settings.json"
INFORMATIVE = ("source", "codec_path", "on_error")  # where things were, which may move; and what changes no latent
ROUNDING = ("batch_size", "device")  # what one cache has to have been made with, and a run need not care about
PATIENCE = 15.0  # seconds to wait for the lock: the data workers of a killed program hold it for 5


class UnfinishedCache:
    """A cache that is being made: its lock, its settings, the shards that are there, and in the end the manifest.

    All processes of one command make one, and share the lock until they end; no other command gets it.

    Args:
        path: Folder to make.
        images: The data.
        settings: What the latents are made of, JSON values; an unfinished cache is gone on with if they are the same.
        shard_size: Images in a shard, but for the last.
        row_shape: Shape of the latents of one image, (1 or 2, K, h, w).
        state: The processes.

    Attributes:
        folder: The folder, once it is complete.
        missing: Numbers of the shards that are not there yet.

    Raises:
        ValueError: Another command is at work there, or has left an unfinished cache of something else.
        OSError: The folder cannot be made, or the disk is too small.
    """

    def __init__(
        self,
        path: str,
        images: ImageDataset,
        settings: dict[str, Any],
        shard_size: int,
        row_shape: tuple[int, ...],
        state: PartialState,
    ) -> None:
        self.folder, self.images, self.settings = Path(path), images, settings
        self.shard_size, self.row_shape, self.state = shard_size, row_shape, state
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.num_shards = -(-len(images) // shard_size)
        self._lock = self._open_lock()
        try:
            on_main_process(state, self._take_lock)
            on_main_process(state, self._begin)
            _flock(self._lock, fcntl.LOCK_SH)
            self.missing = [k for k in range(self.num_shards) if not self._record(k).is_file()]
            on_main_process(state, self._check_disk)
        except BaseException:
            self.unlock()
            raise

    def indices(self, shard: int) -> range:
        """Give the numbers of the images of a shard."""
        return range(len(self.images))[shard * self.shard_size : (shard + 1) * self.shard_size]

    def write(self, shard: int, rows: np.ndarray, skipped: list[tuple[int, str]], sums: list[list[float]]) -> None:
        """Write a shard, and then its record.

        Args:
            shard: Its number.
            rows: Latents (n, 1 or 2, K, h, w), float16.
            skipped: Index of each image that could not be read, and why.
            sums: Of the latents and of their squares, (2, C).
        """
        file = self._file(shard)
        with written_aside(file) as temporary:
            with temporary.open("wb") as content:
                np.save(content, rows)
                content.flush()
                os.fsync(content.fileno())  # before its record
            record = {"num_images": len(rows), "sha256": sha256_of(temporary), "skipped": skipped, "sums": sums}
        write_json(self._record(shard), record)

    def finish(self) -> None:
        """Write the labels and the manifest; then the folder gets its name.

        Raises:
            ValueError: No image could be read.
        """
        records = [read_json(self._record(k)) for k in range(self.num_shards)]
        skipped = dict(pair for record in records for pair in record["skipped"])
        kept = np.delete(self.images.labels, sorted(skipped))
        if len(kept) == 0:
            raise ValueError(
                f"none of the {len(self.images)} images could be read; the first: {next(iter(skipped.values()))}"
            )
        numbers = len(kept) * self.row_shape[0] * self.row_shape[2] * self.row_shape[3]
        mean, square = (np.sum([record["sums"][i] for record in records], axis=0) / numbers for i in (0, 1))
        names = self.images.class_names
        manifest = {
            "version": CACHE_FORMAT,
            "settings": self.settings,
            "num_images": len(kept),
            "shape": self.row_shape[1:],  # K, h, w
            "dtype": "float16",
            "class_counts": dict(zip(names, np.bincount(kept, minlength=len(names)).tolist(), strict=True)),
            "mean": mean.tolist(),
            "std": np.sqrt(square - mean**2).tolist(),
            "skipped": [{"index": i, "why": skipped[i]} for i in sorted(skipped)],
            "shards": [{"file": self._file(k).name, **record} for k, record in enumerate(records)],
        }
        with written_aside(self.partial / LABELS_FILE) as temporary, temporary.open("wb") as content:
            np.save(content, kept)
        manifest["labels_sha256"] = sha256_of(self.partial / LABELS_FILE)
        write_json(self.partial / MANIFEST, manifest)
        self.partial.rename(self.folder)
        tidy(self.folder)

    def unlock(self) -> None:
        """Let other commands have the folder."""
        _flock(self._lock, fcntl.LOCK_UN)  # for its data workers, too
        self._lock.close()

    def _open_lock(self) -> IO[str]:
        if self.folder.is_symlink() and not self.folder.exists():
            raise ValueError(f"'{self.folder}' is a link that leads nowhere; is its disk there? Mend or remove it.")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            return _lock_of(self.folder).open("w")
        except OSError as error:
            raise OSError(f"cannot make the folder '{self.partial}': {error}") from error

    def _take_lock(self) -> None:
        """Lock the cache for this command, even if a killed launcher has left processes behind.

        Raises:
            ValueError: Another command keeps it, or has finished the cache.
        """
        start, waits = time.monotonic(), False
        while True:
            try:
                _flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - start >= PATIENCE:
                    raise ValueError(
                        f"another cache_latents.py is writing '{self.folder}'; wait for it, or stop it."
                    ) from None
            if not waits:
                text = f"another process holds '{self.folder}', perhaps one of a program that was killed"
                print(f"note: {text}; waiting for it, {PATIENCE:g} s at most.", file=sys.stderr)
            waits = True
            time.sleep(0.1)
        if self.folder.exists():
            raise ValueError(f"another cache_latents.py has just finished '{self.folder}'; nothing is left to do.")

    def _begin(self) -> None:
        """Make the folder, or check that the unfinished one is of the same latents."""
        file = self.partial / SETTINGS
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder '{self.partial}': {error}") from error
        there = [found.name for found in self.partial.iterdir() if not found.name.startswith(".")]
        if there and SETTINGS not in there:
            raise ValueError(f"'{self.partial}' is there already and was not made by cache_latents.py; remove it.")
        if len(there) > 1:
            try:
                old = read_json(file)
            except ValueError as error:
                raise ValueError(f"{error} So what is beside it is unknown; remove '{self.partial}'.") from None
            compared = ({k: v for k, v in s.items() if k not in INFORMATIVE} for s in (old, self.settings))
            if found := differences(*compared):
                raise ValueError(
                    f"'{self.partial}' holds unfinished latents made with {listed(found)}; remove it, or choose "
                    "another folder."
                )
        remove_temporary(self.partial)
        write_json(file, self.settings)
        self._drop_damaged()

    def _drop_damaged(self) -> None:
        """Remove the records of shards that are not as they were written, so that these are made anew."""
        there = [k for k in range(self.num_shards) if self._record(k).is_file()]
        for k in tqdm(there, desc="check what is there", unit="shard", disable=not there):
            try:
                record = read_json(self._record(k))
                num = record["num_images"] + len(record["skipped"])
                right = num == len(self.indices(k)) and sha256_of(self._file(k)) == record["sha256"]
            except (ValueError, KeyError, TypeError, FileNotFoundError):
                right = False
            if not right:
                print(f"note: '{self._file(k)}' is damaged; it is made anew.", file=sys.stderr)
                self._record(k).unlink()

    def _check_disk(self) -> None:
        needed = sum(file_size((len(self.indices(k)), *self.row_shape)) for k in self.missing)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise OSError(
                f"the latents need {needed / 1e9:.1f} GB in '{self.partial}', where {free / 1e9:.1f} GB are free."
            )

    def _file(self, shard: int) -> Path:
        return self.partial / f"shard-{shard:05d}.npy"

    def _record(self, shard: int) -> Path:
        return self._file(shard).with_suffix(".json")


class CacheWriter:
    """Encodes images into a cache of latents; see `vca_engine.images.latents` for what is in it.

    Every process makes one, and calls `run`. Shards are shared out; each is encoded by one process in batches of one
    size, so that its bytes do not depend on the number of processes.

    Args:
        path: Folder to make.
        images: The data.
        codec: On its device.
        settings: What the latents are made of, JSON values; an unfinished cache is gone on with if they are the same.
        options: How.
        seed: Of the latents that are drawn if moments are not kept.
        num_workers: Processes that read images, for each encoding process.
        state: The processes.

    Raises:
        ValueError: Images that the codec cannot encode, or see `UnfinishedCache`.
        OSError: The folder cannot be made, or the disk is too small.
    """

    def __init__(
        self,
        path: str,
        images: ImageDataset,
        codec: Any,
        settings: dict[str, Any],
        options: CacheConfig,
        *,
        seed: int,
        num_workers: int,
        state: PartialState,
    ) -> None:
        if images.image_size % codec.downsample:
            raise ValueError(
                f"data.image_size is {images.image_size}; the codec divides it by {codec.downsample}, so choose a "
                "multiple."
            )
        batch = 5 * options.batch_size * images.channels * images.image_size**2  # bytes, as uint8 and float32
        _require_memory(batch, f"a batch of {options.batch_size:,} images", "--cache.batch_size")
        self.images, self.codec, self.options = images, codec, options
        self.seed, self.num_workers, self.state = seed, num_workers, state
        blank = torch.zeros(1, images.channels, images.image_size, images.image_size, device=state.device)
        _, K, h, w = codec.moments(blank).shape
        row_shape = (1 + images.flip, K if options.moments else codec.channels, h, w)
        size = min(options.shard_size, len(images))
        _require_memory(file_size((size, *row_shape)), f"a shard of {size:,} images", "--cache.shard_size")
        self.cache = UnfinishedCache(path, images, settings, options.shard_size, row_shape, state)

    @property
    def num_missing(self) -> int:
        """Number of images that are not encoded yet."""
        return sum(len(self.cache.indices(shard)) for shard in self.cache.missing)

    def run(self) -> dict[str, Any]:
        """Encode what is missing, make the cache complete, and give its manifest. All processes call this."""
        try:
            if self.state.device.type == "cpu":
                torch.set_num_threads(1)  # more round otherwise; take more processes
            self._encode_shards(self.cache.missing[self.state.process_index :: self.state.num_processes])
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                self.cache.finish()
            self.state.wait_for_everyone()
            return read_json(self.cache.folder / MANIFEST)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{self.options.batch_size} images at once take more memory than {self.state.device} has; choose a "
                "smaller --cache.batch_size."
            ) from None
        finally:
            self.cache.unlock()

    def _encode_shards(self, shards: list[int]) -> None:
        num, main = len(self.images), self.state.is_main_process
        bar = tqdm(desc="encode", unit="image", total=num, initial=num - self.num_missing, disable=not main)
        read = self._read(shards)
        for shard in shards:
            rows, skipped = np.empty((len(self.cache.indices(shard)), *self.cache.row_shape), np.float16), []
            end = 0  # of the rows that are encoded
            for batch in self._batches(shard):
                pixels, why = next(read)
                skipped += [(i, text) for i, text in zip(batch, why, strict=True) if text]
                if len(pixels):
                    encoded = self._encode(pixels, [i for i, text in zip(batch, why, strict=True) if not text])
                    rows[end : end + len(encoded)] = encoded
                    end += len(encoded)
                bar.update(min(len(batch) * self.state.num_processes, num - bar.n))
            self.cache.write(shard, rows[:end], skipped, self._sums(rows[:end]))
        bar.close()

    def _batches(self, shard: int) -> Iterator[range]:
        indices = self.cache.indices(shard)
        yield from (indices[k : k + self.options.batch_size] for k in range(0, len(indices), self.options.batch_size))

    def _read(self, shards: list[int]) -> Iterator[tuple[Tensor, list[str | None]]]:
        """Yield the batches of all shards: what could be read, (b, H, W, C) uint8, and why not, or None, for each."""
        order = [list(batch) for shard in shards for batch in self._batches(shard)]
        dataset = Pixels(self.images, skip=self.options.on_error == "skip")
        return load(dataset, order, num_workers=self.num_workers, minutes=60, pin=False)

    @torch.no_grad()
    def _encode(self, pixels: Tensor, index: list[int]) -> np.ndarray:
        """Encode (B, H, W, C) uint8 as (B, 1 or 2, K, h, w) float16, in batches that all have one size."""
        device, num, size = self.state.device, len(pixels), self.options.batch_size
        padded = torch.cat([pixels, pixels[-1:].expand(size - num, *pixels.shape[1:])])
        x = from_uint8(padded.to(device))  # (B, C, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            rows = [self.codec.moments(side)[:num] for side in ([x, x.flip(-1)] if self.images.flip else [x])]
        if not self.options.moments:
            positions = torch.tensor(index) * 2
            rows = [
                sample_posterior(row, self.codec.channels, self.seed, positions + flip) for flip, row in enumerate(rows)
            ]
        rows = torch.stack(rows, dim=1).half()
        if not (good := rows.isfinite().flatten(1).all(dim=1)).all():
            bad = self.images.name(index[int(good.int().argmin())])
            raise ValueError(
                f"{bad} becomes latents that float16 cannot hold, or that are not finite; is the codec right?"
            )
        return rows.cpu().numpy()

    def _sums(self, rows: np.ndarray) -> list[list[float]]:
        """Sum the latents and their squares, (2, C), over all axes but the channels."""
        C, total = self.codec.channels, np.zeros((2, self.codec.channels))
        for k in range(0, len(rows), 64):
            part = rows[k : k + 64].astype(np.float64)
            squares = part[:, :, :C] ** 2 + (part[:, :, C:] ** 2 if part.shape[2] > C else 0)
            total += np.stack([z.sum(axis=(0, 1, 3, 4)) for z in (part[:, :, :C], squares)])
        return total.tolist()


def _lock_of(folder: Path) -> Path:
    """Name the file that is locked while a cache is made."""
    return folder.with_name(f".{folder.name}.lock")


def _flock(file: IO[str], kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        pass


def _require_memory(size: int, what: str, option: str) -> None:
    """Raise ValueError, which names the option, if this machine has less memory than `size` bytes."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > there:
        raise ValueError(
            f"{what} takes {size / 1e9:,.1f} GB, and this machine has {there / 1e9:,.1f}; choose a smaller {option}."
        )


class Pixels(Dataset):
    """Images by index: pixels (H, W, C) uint8, or the sentence why they cannot be read."""

    def __init__(self, images: ImageDataset, skip: bool) -> None:
        self.images, self.skip = images, skip

    def __getitem__(self, index: int) -> Tensor | str:
        """Read the pixels (H, W, C) uint8 of an image, or say why they cannot be read.

        Raises:
            UnreadableImageError: It cannot be read, and is not to be skipped.
        """
        try:
            return torch.from_numpy(np.ascontiguousarray(self.images.pixels(index)))
        except UnreadableImageError as error:
            if not self.skip:
                raise UnreadableImageError(
                    f"{error} Mend it and run the same command again; or give --cache.on_error skip, which leaves it "
                    "out."
                ) from None
            return str(error)

    @staticmethod
    def collate(items: list[Tensor | str]) -> tuple[Tensor, list[str | None]]:
        """Stack the tensors (H, W, C) among the items to (b, H, W, C), and list for each item its text, or None."""
        pixels = [item for item in items if not isinstance(item, str)]
        why = [item if isinstance(item, str) else None for item in items]
        return torch.stack(pixels) if pixels else torch.empty(0), why


def reopen(path: str, expected: dict[str, Any]) -> None:
    """Make a finished cache unfinished; what is missing or damaged is made anew when it is gone on with.

    Raises:
        ValueError: It was made with other settings than expected, or its unfinished folder is there already; it stays
            as it is.
    """
    folder = Path(path)
    partial = folder.with_name(folder.name + ".partial")
    require_free(partial)
    manifest = read_json(folder / MANIFEST)
    check_made_with(path, manifest["settings"], expected)
    for shard in manifest["shards"]:
        file = folder / shard.pop("file")
        shape = (shard["num_images"], 1 + manifest["settings"]["flip"], *manifest["shape"])
        if file.is_file() and file.stat().st_size == file_size(shape):
            write_json(file.with_suffix(".json"), shard)
    write_json(folder / SETTINGS, manifest["settings"])
    folder.rename(partial)
    (partial / MANIFEST).unlink()


def tidy(folder: Path) -> None:
    """Remove what a finished cache needed while it was made, and what a program that was killed has left."""
    with suppress(OSError):  # one that may only be read
        for file in (folder / SETTINGS, *folder.glob("shard-?????.json")):
            file.unlink(missing_ok=True)
        remove_temporary(folder)
        _lock_of(folder).unlink(missing_ok=True)
