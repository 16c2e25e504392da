"""N images go into a folder of PNG files, one npy or npz, or an evaluator; in any order, and on after an interruption.

A file is made at its full size first, so that a disk that is too small is found before anything is drawn; then every
process writes its images in their places.
"""

import errno
import io
import json
import os
import shutil
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from PIL import Image

from vca_engine.files import checksum_of, remove_temporary, write_text, written_aside
from vca_engine.records import read_json, write_json
from vca_engine.sampling.sample_record import (
    SAMPLES_RECORD,
    add_to_record,
    partial_of,
    read_sample_record,
    require_same_settings,
    sample_record_path,
)

CHUNK = 2**24  # bytes read at once
CHECKSUM = 8  # bytes of an image's checksum


class ImageEvaluator(Protocol):
    """An object that takes images and can go on later; `fid.Evaluator` is one."""

    def update(self, images: Any, index: Any, labels: Any) -> Any:
        """Add a batch."""

    def state_dict(self) -> dict[str, Any]:
        """Give all that this process has gathered, as tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what `state_dict` gave."""

    def images_in(self, state: dict[str, Any]) -> set[int]:
        """Give the numbers of the images that a state holds."""


def writer_of(
    out: Path, num: int, state: PartialState, image_size: int, evaluator: ImageEvaluator | None = None
) -> "Writer":
    """Make what writes to `out`: a file if it ends in .npy or .npz, an evaluation if in .json, else a folder of PNGs.

    Args:
        out: File or folder.
        num: Number of images.
        state: The processes.
        image_size: Height and width.
        evaluator: Where images go if `out` ends in .json.

    Raises:
        ValueError: `out` is a folder where a file is meant, or the reverse.
    """
    kind = out.suffix.lower()
    if kind == ".json":
        if evaluator is None:
            raise ValueError(f"{str(out)!r} is the record of an evaluation; name the reference with --fid, too.")
        writer = EvaluatorWriter(out, num, evaluator, state)
    elif kind in (".npy", ".npz"):
        writer = ArrayWriter(out, num, image_size)
    else:
        writer = FolderWriter(out, num)
    if writer.is_folder and (out.is_file() or kind in (".png", ".jpg", ".jpeg", ".gif")):
        raise ValueError(
            f"{str(out)!r} is no folder; with --num, --out is a folder for PNG files, or ends in .npz or .npy."
        )
    if not writer.is_folder and out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; --out is a folder for PNG files, or ends in .npz or .npy.")
    return writer


class Writer:
    """N numbered images that arrive in any order.

    Args:
        file: Where they go.
        num: N.
    """

    is_folder = False

    def __init__(self, file: Path, num: int) -> None:
        self.file, self.num = file, num

    @property
    def record(self) -> Path:
        """The file that says how the images were made, once they are complete."""
        return self.file / SAMPLES_RECORD if self.is_folder else sample_record_path(self.file)

    def open(self, settings: dict[str, Any]) -> None:
        """Make the files, or see that those that are there are of the same images. The main process calls this.

        Args:
            settings: What makes an image what it is, JSON values; what is half full is only filled up with the same.

        Raises:
            ValueError: There are images of other settings, or something else.
            OSError: The disk has no room for the file.
        """
        out, record = self.file, self.record
        if not self.is_folder:
            record = record if out.exists() else partial_of(out) / SAMPLES_RECORD
            settings = {**settings, "num": self.num}  # a folder may be filled up to more, a file is what it is
        settings = json.loads(json.dumps(settings))  # tuples are lists, as they will be when they are read
        if record.exists() or out.is_file() or self.holds_something():
            require_same_settings(record, settings, out if out.exists() else partial_of(out))
        else:
            self.check_names()
            write_json(record, settings)
        if out.is_file():
            shutil.rmtree(partial_of(out), ignore_errors=True)  # what a kill has left of one that is complete
        self.allocate()

    def holds_something(self) -> bool:
        """Tell whether there is a folder with files in it."""
        return False

    def check_names(self) -> None:
        """Raise ValueError if what will be written beside `file` is there already, and not of an earlier drawing."""

    def allocate(self) -> None:
        """Make the files at their full size, unless they are there.

        Raises:
            ValueError: One that is there is too short.
            OSError: The disk has no room; what was there before is kept.
        """

    def missing(self) -> list[int]:
        """Give the numbers of the images that are not there yet."""
        raise NotImplementedError

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """Store images (B, H, W, 3) uint8 under their numbers."""
        raise NotImplementedError

    def save(self) -> None:
        """Write what is only in the memory."""

    def finish(self, labels: Sequence[int]) -> None:
        """Make the result complete, which is checked; `labels` are those of all images."""
        raise NotImplementedError

    def check_complete(self) -> None:
        """Raise OSError if an image is missing."""
        if missing := self.missing():
            raise OSError(
                f"{str(self.file)!r} lacks {len(missing)} of its images, {missing[0]} for one; run the same command "
                "again."
            )


class FolderWriter(Writer):
    """000000.png, 000001.png, ..., and their classes in labels.json, which readers of datasets know."""

    is_folder = True

    def holds_something(self) -> bool:
        """Tell whether there is a folder with files in it, but for the lock of `alone_at`."""
        return self.file.is_dir() and any(file.suffix != ".lock" for file in self.file.iterdir())

    def allocate(self) -> None:
        """Remove what a killed process has left."""
        remove_temporary(self.file)

    def missing(self) -> list[int]:
        """Give the numbers of the images without a whole file."""
        with os.scandir(self.file) as entries:
            there = {entry.name for entry in entries if entry.name.endswith(".png") and _is_whole(entry.path)}
        return [i for i in range(self.num) if f"{i:06d}.png" not in there]

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """Write images (B, H, W, 3) uint8 to files, which have their names only when they are whole."""
        for i, image in zip(indices, images, strict=True):
            with written_aside(self.file / f"{i:06d}.png") as temporary:
                Image.fromarray(image).save(temporary, format="PNG")

    def finish(self, labels: Sequence[int]) -> None:
        """Check that all images are there, and write labels.json, unless the folder is already larger."""
        self.check_complete()
        before = read_sample_record(self.file).get("num", 0)
        if not isinstance(before, int) or self.num >= before:
            add_to_record(self.file, {"num": self.num})
            pairs = [[f"{i:06d}.png", int(label)] for i, label in enumerate(labels)]
            write_text(self.file / "labels.json", json.dumps({"labels": pairs}))


class ArrayWriter(Writer):
    """Images (N, H, W, 3) uint8 in one file: OUT.npy; or OUT.npz, arr_0 images and arr_1 labels, as of ADM and DiT.

    The labels of OUT.npy are OUT.labels.npy. Until it is complete, OUT.partial holds the file at its full size, and a
    checksum for each image, which is written once the image itself is on the disk, and is zero until then.

    Images are written, and the file is not mapped: then a full disk is an error with a sentence, not a signal that
    kills the process, and machines that share a disk write bytes, not pages, in which neighbours would lose an image.
    """

    def __init__(self, file: Path, num: int, image_size: int) -> None:
        super().__init__(file, num)
        self.partial = partial_of(file)
        self.zipped = file.suffix.lower() == ".npz"
        self.images, self.checksums = self.partial / f"images{file.suffix}", self.partial / "checksums"
        self.earlier = self.partial / "done"  # of earlier versions: a byte for each image, 1 if it is there
        self.labels_file = file.with_suffix(".labels.npy")
        self.bytes_each = image_size * image_size * 3
        self.npy_header = _npy_header((num, image_size, image_size, 3), np.uint8)
        self.member = zipfile.ZipInfo("arr_0.npy")  # of an npz; stored, not compressed, so that each image has a place
        self.member.CRC = self.member.header_offset = 0
        self.member.file_size = self.member.compress_size = len(self.npy_header) + num * self.bytes_each
        self.start = len(self._header())  # where image 0 is
        self.size = self.start + num * self.bytes_each

    def check_names(self) -> None:
        """Raise ValueError if a record or labels of something else stand where those of the images will."""
        record, labels = self.record, self.labels_file
        strange = [record] if record.exists() and b'"sampler"' not in record.read_bytes() else []
        strange += [labels] if not self.zipped and labels.exists() and not record.exists() else []
        for file in strange:
            raise ValueError(f"{str(file)!r} is there already, and would be overwritten; choose another --out.")

    def allocate(self) -> None:
        """Make the files at their full size, unless they are there; see `Writer`."""
        if self.file.exists():
            self._check()
            return
        remove_temporary(self.partial)
        remove_temporary(self.file.parent, self.labels_file)
        fresh = not self.images.exists()
        if fresh:  # what is known is of images that are no longer there
            self.checksums.unlink(missing_ok=True)
            self.earlier.unlink(missing_ok=True)
        lengths = {self.images: self.size, self.checksums: self.num * CHECKSUM}
        try:
            for file, length in lengths.items():
                if not file.exists():
                    with written_aside(file) as temporary, open(temporary, "wb") as f:
                        f.write(self._header() if file == self.images else b"")
                        f.flush()
                        _reserve(f, length)
                elif file.stat().st_size < length:
                    raise ValueError(f"{str(file)!r} is cut short; remove {str(self.partial)!r} to begin anew.")
        except OSError as error:
            if fresh:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise OSError(f"{self.num} images take {self.num * self.bytes_each / 1e9:.3g} GB: {error}") from error
        if not fresh:
            self._forget_damaged()

    def _forget_damaged(self) -> None:
        """Let images that do not have their checksum be drawn again; take over those of earlier versions."""
        known = np.fromfile(self.checksums, np.uint64, self.num)
        trusted = self.earlier.exists()
        there = np.fromfile(self.earlier, np.uint8, self.num) == 1 if trusted else known != 0
        with open(self.images, "rb") as f:
            for i in np.flatnonzero(there):
                f.seek(self.start + int(i) * self.bytes_each)
                found = _pixel_checksum(f.read(self.bytes_each))
                known[i] = found if trusted or found == known[i] else 0
        with written_aside(self.checksums) as temporary:
            temporary.write_bytes(known.tobytes())
        self.earlier.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Give the numbers of the images that are not on the disk yet."""
        if self.file.exists():
            return []
        return np.flatnonzero(np.fromfile(self.checksums, np.uint64, self.num) == 0).tolist()

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """Write images (B, H, W, 3) uint8 in their places, and then their checksums."""
        contents = [image.tobytes() for image in images]
        try:
            with open(self.images, "r+b") as f, open(self.checksums, "r+b") as checksums:
                for i, content in zip(indices, contents, strict=True):
                    f.seek(self.start + i * self.bytes_each)
                    f.write(content)
                f.flush()
                os.fsync(f.fileno())
                for i, content in zip(indices, contents, strict=True):
                    checksums.seek(i * CHECKSUM)
                    checksums.write(_pixel_checksum(content).tobytes())
        except OSError as error:
            raise OSError(f"cannot write {str(self.images)!r}: {error}") from error

    def finish(self, labels: Sequence[int]) -> None:
        """Write the labels and the record, and give the file its name; the images stay where they are."""
        if self.file.exists():
            return
        self.check_complete()
        labels, record = np.array(labels, np.int64), read_json(self.partial / SAMPLES_RECORD)
        try:
            if self.zipped:
                self._close_zip(labels)
            else:
                with open(self.images, "r+b") as f:
                    f.write(self._header())
                with written_aside(self.labels_file) as temporary, open(temporary, "wb") as f:
                    np.save(f, labels)
                record["file_checksum"] = checksum_of(self.images)  # a zip has its own
            write_json(self.record, record)
            self.images.replace(self.file)
        except OSError as error:
            raise OSError(f"cannot complete {str(self.file)!r}: {error}; run the same command again") from error
        shutil.rmtree(self.partial, ignore_errors=True)

    def _check(self) -> None:
        """Raise ValueError if the complete file is damaged; an .npy of earlier versions has no checksum."""
        try:
            if self.file.stat().st_size < self.size:
                raise ValueError("it is cut short")
            with open(self.file, "rb") as f:
                f.seek(self.start - len(self.npy_header))
                if f.read(len(self.npy_header)) != self.npy_header:
                    raise ValueError("it does not begin as it was written")
            if self.zipped:
                with zipfile.ZipFile(self.file) as archive:
                    same = archive.testzip() is None
            else:
                known = read_json(self.record).get("file_checksum")
                same = known is None or known == checksum_of(self.file)
            if not same:
                raise ValueError("it does not have its checksum")
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{str(self.file)!r} is damaged: {error}; remove it to draw its images again.") from None

    def _header(self) -> bytes:
        """Give all that stands before image 0."""
        return (self.member.FileHeader(zip64=True) if self.zipped else b"") + self.npy_header

    def _close_zip(self, labels: np.ndarray) -> None:
        """Give the archive its checksum, the labels (N,), and its directory."""
        with open(self.images, "r+b") as f:
            f.truncate(self.size)  # if this was tried before
            self.member.CRC = zlib.crc32(self.npy_header)
            f.seek(self.start)
            while chunk := f.read(CHUNK):
                self.member.CRC = zlib.crc32(chunk, self.member.CRC)
            f.seek(0)
            f.write(self._header())
            f.seek(0, os.SEEK_END)
            with zipfile.ZipFile(f, "a") as archive:
                archive.filelist.append(self.member)
                archive.NameToInfo[self.member.filename] = self.member
                archive.writestr(zipfile.ZipInfo("arr_1.npy"), _npy_header(labels.shape, np.int64) + labels.tobytes())


class EvaluatorWriter(Writer):
    """An evaluator: no image is kept. OUT.partial holds what each process has gathered, saved every few minutes.

    A state is a file with a name of its own. Whoever takes one over removes it when he has saved what was in it, so
    that at a kill at any moment each image is in one file, or in one and in another that holds all of that file's.
    """

    SAVE_SECONDS = 300.0

    def __init__(self, file: Path, num: int, evaluator: ImageEvaluator, state: PartialState) -> None:
        super().__init__(file, num)
        self.evaluator = evaluator
        self.rank, self.num_processes = state.process_index, state.num_processes
        self.partial = partial_of(file)
        self.mine = self.partial / f"state-{uuid.uuid4().hex}.pt"
        self.taken_over: list[Path] = []
        self.saved = time.monotonic()

    def allocate(self) -> None:
        """Remove what a killed process has left."""
        remove_temporary(self.partial)

    def missing(self) -> list[int]:
        """Give the numbers of missing images; this process's share of what any processes gathered is loaded."""
        if self.file.exists():
            return []
        held = {part: self._take(part, self.evaluator.images_in, mmap=True) for part in self.partial.glob("state-*.pt")}
        there: set[int] = set()
        for k, part in enumerate(sorted(held, key=lambda part: (-len(held[part]), part.name))):
            mine = k % self.num_processes == self.rank
            if not held[part] <= there:
                if not held[part].isdisjoint(there):
                    raise ValueError(f"{str(part)!r} holds images that another state holds, too; remove one of them.")
                if mine:
                    self._take(part, self.evaluator.load_state_dict)
            there |= held[part]
            self.taken_over += [part] * mine
        return [i for i in range(self.num) if i not in there]

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """Hand images (B, H, W, 3) uint8 to the evaluator."""
        self.evaluator.update(torch.from_numpy(images), indices, labels)
        if time.monotonic() - self.saved > self.SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what this process has gathered."""
        with written_aside(self.mine) as temporary, open(temporary, "wb") as file:  # torch.save's own has no OSError
            torch.save(self.evaluator.state_dict(), file)
        for part in self.taken_over:
            part.unlink(missing_ok=True)
        self.taken_over, self.saved = [], time.monotonic()

    def finish(self, labels: Sequence[int]) -> None:
        """Do nothing: the record is written by whoever computes the numbers."""

    def _take(self, part: Path, take: Callable[[dict[str, Any]], Any], mmap: bool = False) -> Any:
        """Call a method of the evaluator with a state, whose damage it finds."""
        try:
            return take(torch.load(part, map_location="cpu", weights_only=True, mmap=mmap))
        except Exception as error:  # a damaged file raises almost anything
            why = f": {str(error).rstrip('.')}" if isinstance(error, ValueError) else ""
            raise ValueError(
                f"{str(part)!r} is damaged, or of another evaluation{why}; remove it, and its images are drawn again."
            ) from error


def _is_whole(png: str) -> bool:
    """Tell whether a file begins and ends as a PNG does."""
    with open(png, "rb") as file:
        begin = file.read(8)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8))
        return begin == b"\x89PNG\r\n\x1a\n" and file.read() == b"IEND\xaeB`\x82"


def _pixel_checksum(image: bytes) -> np.uint64:
    """Compute the checksum of the pixels of an image."""
    return np.uint64(xxhash.xxh3_64_intdigest(image))


def _npy_header(shape: tuple[int, ...], dtype: type) -> bytes:
    file = io.BytesIO()
    description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def _reserve(file: BinaryIO, size: int) -> None:
    """Make a file so large, with room on the disk where the system, and the file system, can promise it."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    file.truncate(size)
