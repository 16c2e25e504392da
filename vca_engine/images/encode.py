"""Encoding images into a cache of latents: by any number of processes, shard by shard, to be gone on with at any time.

Until it is complete the cache is FOLDER.partial: settings.json, and for each finished shard its .npy and a .json beside it
that is written last. A shard has its name only when it is whole.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vca_engine.config.schema import CacheConfig, differences
from vca_engine.files import write_text, written_aside
from vca_engine.images import UnreadableImageError, from_uint8
from vca_engine.images.codecs import sample_posterior
from vca_engine.images.datasets import Images
from vca_engine.images.latents import LABELS, MANIFEST, VERSION, check_settings, file_size, sha256_of
from vca_engine.images.loader import load

SETTINGS = "settings.json"
INFORMATIVE = ("source", "codec_path", "on_error")  # where things were, which may move; and what changes no latent
ROUNDING = ("batch_size", "device")  # what one cache has to have been made with, and a run need not care about


class CacheWriter:
    """Makes a cache of latents; see `vca_engine.images.latents` for what is in it.

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
        ValueError: Images that the codec cannot encode, or an unfinished cache of something else.
        OSError: The folder cannot be made, or the disk is too small.
    """

    def __init__(
        self,
        path: str,
        images: Images,
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
                f"data.image_size is {images.image_size}; the codec divides it by {codec.downsample}, so choose a multiple."
            )
        self.folder, self.images, self.codec, self.settings = Path(path), images, codec, settings
        self.options, self.seed, self.num_workers, self.state = options, seed, num_workers, state
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.starts = range(0, len(images), options.shard_size)
        blank = torch.zeros(1, images.channels, images.image_size, images.image_size, device=state.device)
        _, K, h, w = codec.moments(blank).shape
        self.shape = (1 + images.flip, K if options.moments else codec.channels, h, w)
        self._lock = self._open_lock()
        try:
            if state.is_main_process:
                self._begin()
            state.wait_for_everyone()
            _flock(self._lock, fcntl.LOCK_SH)
            self.missing = [k for k in range(len(self.starts)) if not self._record(k).is_file()]
            if state.is_main_process:
                self._check_disk()
            state.wait_for_everyone()
        except BaseException:
            self._unlock()
            raise

    def run(self) -> dict[str, Any]:
        """Encodes what is missing, and makes the cache complete; gives its manifest. Collective."""
        try:
            return self._run()
        finally:
            self._unlock()

    def _run(self) -> dict[str, Any]:
        if self.state.device.type == "cpu":
            torch.set_num_threads(1)  # more round otherwise; take more processes
        mine = self.missing[self.state.process_index :: self.state.num_processes]
        done = len(self.images) - sum(len(self.indices(k)) for k in self.missing)
        bar = tqdm(
            desc="encode", unit="image", total=len(self.images), initial=done, disable=not self.state.is_main_process
        )
        read = self._read(mine)
        for shard in mine:
            rows, num, skipped = np.empty((len(self.indices(shard)), *self.shape), np.float16), 0, []
            for batch in self._batches(shard):
                pixels, why = next(read)
                skipped += [(i, text) for i, text in zip(batch, why, strict=True) if text]
                if len(pixels):
                    encoded = self._encode(pixels, [i for i, text in zip(batch, why, strict=True) if not text])
                    rows[num : num + len(encoded)], num = encoded, num + len(encoded)
                bar.update(min(len(batch) * self.state.num_processes, len(self.images) - bar.n))
            self._write(shard, rows[:num], skipped)
        bar.close()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self._finish()
        self.state.wait_for_everyone()
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))

    def _open_lock(self) -> IO[str]:
        """The cache's lock, which all processes of one command share until they end, and no other command gets.

        Not even one that a killed launcher left behind is joined by another.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = self.folder.with_name(f".{self.folder.name}.lock").open("w")
        except OSError as error:
            raise OSError(f"cannot make the folder '{self.partial}': {error}") from error
        if self.state.is_main_process:
            try:
                _flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise ValueError(
                    f"another cache_latents.py is writing '{self.folder}'; wait for it, or stop it."
                ) from None
        return lock

    def _unlock(self) -> None:
        _flock(self._lock, fcntl.LOCK_UN)  # for its data workers, too
        self._lock.close()

    def _begin(self) -> None:
        """Makes the folder, or checks that the unfinished one is of the same latents."""
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
                old = dict(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                raise ValueError(
                    f"'{file}' is damaged, so what is beside it is unknown; remove '{self.partial}'."
                ) from None
            if found := differences(
                *({k: v for k, v in s.items() if k not in INFORMATIVE} for s in (old, self.settings))
            ):
                text = ", ".join(f"{key} {a!r} (now {b!r})" for key, (a, b) in found.items())
                raise ValueError(
                    f"'{self.partial}' holds unfinished latents made with {text}; remove it, or choose another folder."
                )
        write_text(file, json.dumps(self.settings))

    def _check_disk(self) -> None:
        needed = sum(file_size((len(self.indices(k)), *self.shape)) for k in self.missing)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise OSError(
                f"the latents need {needed / 1e9:.1f} GB in '{self.partial}', where {free / 1e9:.1f} GB are free."
            )

    def indices(self, shard: int) -> range:
        """Images of a shard."""
        return range(len(self.images))[self.starts[shard] : self.starts[shard] + self.options.shard_size]

    def _batches(self, shard: int) -> Iterator[range]:
        indices = self.indices(shard)
        yield from (indices[k : k + self.options.batch_size] for k in range(0, len(indices), self.options.batch_size))

    def _read(self, shards: list[int]) -> Iterator[tuple[Tensor, list[str | None]]]:
        """Batch after batch of all shards: the readable ones, (b, H, W, C) uint8, and for each why it is not, or None."""
        order = [list(batch) for shard in shards for batch in self._batches(shard)]
        dataset = Pixels(self.images, skip=self.options.on_error == "skip")
        return load(dataset, order, num_workers=self.num_workers, minutes=60, pin=False)

    @torch.no_grad()
    def _encode(self, pixels: Tensor, index: list[int]) -> np.ndarray:
        """(B, H, W, C) uint8 -> (B, 1 or 2, K, h, w) float16, in a batch of the one size."""
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

    def _write(self, shard: int, rows: np.ndarray, skipped: list[tuple[int, str]]) -> None:
        file, header = self._file(shard), io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
        parts = [header.getbuffer(), memoryview(rows).cast("B")] if len(rows) else [header.getbuffer()]
        digest = hashlib.sha256()
        with written_aside(file) as temporary, temporary.open("wb") as content:
            for part in parts:
                digest.update(part)
                content.write(part)
            content.flush()
            os.fsync(content.fileno())  # before its record
        record = {"num_images": len(rows), "sha256": digest.hexdigest(), "skipped": skipped, "sums": self._sums(rows)}
        write_text(self._record(shard), json.dumps(record))

    def _sums(self, rows: np.ndarray) -> list[list[float]]:
        """Of the latents and of their squares, (2, C), over all else."""
        C, total = self.codec.channels, np.zeros((2, self.codec.channels))
        for k in range(0, len(rows), 64):
            part = rows[k : k + 64].astype(np.float64)
            squares = part[:, :, :C] ** 2 + (part[:, :, C:] ** 2 if part.shape[2] > C else 0)
            total += np.stack([z.sum(axis=(0, 1, 3, 4)) for z in (part[:, :, :C], squares)])
        return total.tolist()

    def _finish(self) -> None:
        """The manifest and the labels; then the folder gets its name."""
        records = [json.loads(self._record(k).read_text(encoding="utf-8")) for k in range(len(self.starts))]
        skipped = dict(pair for record in records for pair in record["skipped"])
        kept = np.delete(self.images.labels, sorted(skipped))
        if len(kept) == 0:
            raise ValueError(
                f"none of the {len(self.images)} images could be read; the first: {next(iter(skipped.values()))}"
            )
        numbers = len(kept) * self.shape[0] * self.shape[2] * self.shape[3]
        mean, square = (np.sum([record["sums"][i] for record in records], axis=0) / numbers for i in (0, 1))
        names = self.images.class_names
        manifest = {
            "version": VERSION,
            "settings": self.settings,
            "num_images": len(kept),
            "shape": self.shape[1:],  # K, h, w
            "dtype": "float16",
            "class_counts": dict(zip(names, np.bincount(kept, minlength=len(names)).tolist(), strict=True)),
            "mean": mean.tolist(),
            "std": np.sqrt(square - mean**2).tolist(),
            "skipped": [{"index": i, "why": skipped[i]} for i in sorted(skipped)],
            "shards": [{"file": self._file(k).name, **record} for k, record in enumerate(records)],
        }
        with written_aside(self.partial / LABELS) as temporary, temporary.open("wb") as content:
            np.save(content, kept)
        manifest["labels_sha256"] = sha256_of(self.partial / LABELS)
        write_text(self.partial / MANIFEST, json.dumps(manifest, indent=1))
        self.partial.rename(self.folder)
        for file in [SETTINGS, *(self._record(k).name for k in range(len(records)))]:
            (self.folder / file).unlink()
        Path(self._lock.name).unlink()

    def _file(self, shard: int) -> Path:
        return self.partial / f"shard-{shard:05d}.npy"

    def _record(self, shard: int) -> Path:
        return self._file(shard).with_suffix(".json")


def _flock(file: IO[str], kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        pass


class Pixels(Dataset):
    """index -> pixels (H, W, C) uint8, or the sentence why they cannot be read."""

    def __init__(self, images: Images, skip: bool) -> None:
        self.images, self.skip = images, skip

    def __getitem__(self, index: int) -> Tensor | str:
        """See the class.

        Raises:
            UnreadableImageError: It cannot be read, and is not to be skipped.
        """
        try:
            return torch.from_numpy(np.ascontiguousarray(self.images.pixels(index)))
        except UnreadableImageError as error:
            if not self.skip:
                raise UnreadableImageError(
                    f"{error} Mend it and run the same command again; or give --cache.on_error skip, which leaves it out."
                ) from None
            return str(error)

    @staticmethod
    def collate(items: list[Tensor | str]) -> tuple[Tensor, list[str | None]]:
        """The tensors among them, stacked, and for each item its text, or None."""
        pixels = [item for item in items if not isinstance(item, str)]
        why = [item if isinstance(item, str) else None for item in items]
        return torch.stack(pixels) if pixels else torch.empty(0), why


def reopen(path: str, expected: dict[str, Any]) -> None:
    """Makes a finished cache unfinished, without the shards that are missing or have another size: they are made anew.

    Raises:
        ValueError: It was made with other settings than expected; it stays as it is.
    """
    folder = Path(path)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    check_settings(path, manifest["settings"], expected)
    for shard in manifest["shards"]:
        file = folder / shard.pop("file")
        shape = (shard["num_images"], 1 + manifest["settings"]["flip"], *manifest["shape"])
        if file.is_file() and file.stat().st_size == file_size(shape):
            write_text(file.with_suffix(".json"), json.dumps(shard))
    write_text(folder / SETTINGS, json.dumps(manifest["settings"]))
    (folder / MANIFEST).unlink()
    folder.rename(folder.with_name(folder.name + ".partial"))
