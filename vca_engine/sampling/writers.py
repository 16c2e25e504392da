"""N images go into a folder of PNG files, one npy or npz, or an evaluator; in any order, and on after an interruption.

A file is made at its full size first, so that a disk that is too small is found before anything is drawn; then every
process writes its images in their places.
"""

import io
import json
import os
import shutil
import time
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from vca_engine.files import remove_temporary, write_text, written_aside
from vca_engine.sampling.sample_record import (
    SAMPLES_RECORD,
    add_to_record,
    partial_of,
    read_sample_record,
    require_same_settings,
    sample_record_path,
)

CHUNK = 2**24  # bytes read at once


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


def open_writer(
    out: Path,
    num: int,
    settings: dict[str, Any],
    state: PartialState,
    image_size: int,
    evaluator: ImageEvaluator | None = None,
) -> "Writer":
    """Open what writes to `out`: a file if it ends in .npy or .npz, an evaluation if in .json, else a folder of PNGs.

    Args:
        out: File or folder.
        num: Number of images.
        settings: What makes an image what it is, JSON values; what is half full is only filled up with the same.
        state: The processes, of which the main one makes the files.
        image_size: Height and width.
        evaluator: Where images go if `out` ends in .json.

    Raises:
        ValueError: `out` holds images of other settings, or something else.
        OSError: The disk has no room for the file.
    """
    if out.suffix == ".json":
        if evaluator is None:
            raise ValueError(f"{str(out)!r} is the record of an evaluation; name the reference with --fid, too.")
        writer = EvaluatorWriter(out, num, evaluator, state)
    elif out.suffix.lower() in (".npy", ".npz"):
        writer = ArrayWriter(out, num, image_size)
    else:
        writer = FolderWriter(out, num)
    if writer.is_folder:
        record = out / SAMPLES_RECORD
        if out.is_file() or out.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif"):
            raise ValueError(
                f"{str(out)!r} is no folder; with --num, --out is a folder for PNG files, or ends in .npz or .npy."
            )
    else:
        record = sample_record_path(out) if out.exists() else partial_of(out) / SAMPLES_RECORD
        settings = {**settings, "num": num}  # a folder may be filled up to more, a file is what it is
        if out.is_dir():
            raise ValueError(f"{str(out)!r} is a folder; --out is a folder for PNG files, or ends in .npz or .npy.")
    settings = json.loads(json.dumps(settings))  # tuples are lists, as they will be when they are read
    if state.is_main_process:
        if record.exists() or out.is_file() or (out.is_dir() and any(out.iterdir())):
            require_same_settings(record, settings, out if out.exists() else partial_of(out))
        else:
            writer.check_names()
            write_text(record, json.dumps(settings, indent=2))
        if out.is_file():
            shutil.rmtree(partial_of(out), ignore_errors=True)  # what a kill has left of one that is complete
        writer.allocate()
    state.wait_for_everyone()
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
        if self.num >= before:
            add_to_record(self.file, {"num": self.num})
            pairs = [[f"{i:06d}.png", int(label)] for i, label in enumerate(labels)]
            write_text(self.file / "labels.json", json.dumps({"labels": pairs}))


class ArrayWriter(Writer):
    """Images (N, H, W, 3) uint8 in one file: OUT.npy; or OUT.npz, arr_0 images and arr_1 labels, as of ADM and DiT.

    The labels of OUT.npy are OUT.labels.npy. Until it is complete, OUT.partial holds the file at its full size, and a
    byte for each image that says whether it is there: 1 only once the image itself is on the disk.

    Images are written, and the file is not mapped: then a full disk is an error with a sentence, not a signal that
    kills the process, and machines that share a disk write bytes, not pages, in which neighbours would lose an image.
    """

    def __init__(self, file: Path, num: int, image_size: int) -> None:
        super().__init__(file, num)
        self.partial = partial_of(file)
        self.zipped = file.suffix.lower() == ".npz"
        self.images, self.done = self.partial / f"images{file.suffix}", self.partial / "done"
        self.bytes_each = image_size * image_size * 3
        self.npy_header = _npy_header((num, image_size, image_size, 3), np.uint8)
        self.member = zipfile.ZipInfo("arr_0.npy")  # of an npz; stored, not compressed, so that each image has a place
        self.member.CRC = self.member.header_offset = 0
        self.member.file_size = self.member.compress_size = len(self.npy_header) + num * self.bytes_each
        self.start = len(self._header())  # where image 0 is
        self.size = self.start + num * self.bytes_each

    def check_names(self) -> None:
        """Raise ValueError if a record or labels of something else stand where those of the images will."""
        record, labels = sample_record_path(self.file), self.file.with_suffix(".labels.npy")
        strange = [record] if record.exists() and '"sampler"' not in record.read_text(errors="replace") else []
        strange += [labels] if not self.zipped and labels.exists() and not record.exists() else []
        for file in strange:
            raise ValueError(f"{str(file)!r} is there already, and would be overwritten; choose another --out.")

    def allocate(self) -> None:
        """Make the files at their full size, unless they are there; see `Writer`."""
        if self.file.exists():
            if self.file.stat().st_size < self.size:
                raise ValueError(f"{str(self.file)!r} is cut short; remove it to draw its images again.")
            return
        fresh = not self.images.exists()
        if fresh:
            self.done.unlink(missing_ok=True)  # of images that are no longer there
        try:
            for file, head, length in ((self.images, self._header(), self.size), (self.done, b"", self.num)):
                if not file.exists():
                    with written_aside(file) as temporary, open(temporary, "wb") as f:
                        f.write(head)
                        f.flush()
                        _reserve(f, length)
                elif file.stat().st_size < length:
                    raise ValueError(f"{str(file)!r} is cut short; remove {str(self.partial)!r} to begin anew.")
        except OSError as error:
            if fresh:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise OSError(f"{self.num} images take {self.num * self.bytes_each / 1e9:.3g} GB: {error}") from error

    def missing(self) -> list[int]:
        """Give the numbers of the images that are not on the disk yet."""
        if self.file.exists():
            return []
        return np.flatnonzero(np.fromfile(self.done, np.uint8, self.num) == 0).tolist()

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """Write images (B, H, W, 3) uint8 in their places, and then that they are there."""
        try:
            with open(self.images, "r+b") as f, open(self.done, "r+b") as done:
                for i, image in zip(indices, images, strict=True):
                    f.seek(self.start + i * self.bytes_each)
                    f.write(np.ascontiguousarray(image))
                f.flush()
                os.fsync(f.fileno())
                for i in indices:
                    done.seek(i)
                    done.write(b"\1")
        except OSError as error:
            raise OSError(f"cannot write {str(self.images)!r}: {error}") from error

    def finish(self, labels: Sequence[int]) -> None:
        """Write the labels and the record, and give the file its name; the images stay where they are."""
        if self.file.exists():
            return
        self.check_complete()
        labels = np.array(labels, np.int64)
        try:
            if self.zipped:
                self._close_zip(labels)
            else:
                with written_aside(self.file.with_suffix(".labels.npy")) as temporary, open(temporary, "wb") as f:
                    np.save(f, labels)
            write_text(sample_record_path(self.file), (self.partial / SAMPLES_RECORD).read_text(encoding="utf-8"))
            self.images.replace(self.file)
        except OSError as error:
            raise OSError(f"cannot complete {str(self.file)!r}: {error}; run the same command again") from error
        shutil.rmtree(self.partial, ignore_errors=True)

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

    def missing(self) -> list[int]:
        """Give the numbers of missing images; this process's share of what any processes gathered is loaded."""
        if self.file.exists():
            return []
        held = {part: self._images_in(part) for part in self.partial.glob("state-*.pt")}
        there: set[int] = set()
        for k, part in enumerate(sorted(held, key=lambda part: (-len(held[part]), part.name))):
            mine = k % self.num_processes == self.rank
            if not held[part] <= there:
                if not held[part].isdisjoint(there):
                    raise ValueError(f"{str(part)!r} holds images that another state holds, too; remove one of them.")
                if mine:
                    self.evaluator.load_state_dict(torch.load(part, map_location="cpu", weights_only=True))
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
        with written_aside(self.mine) as temporary:
            torch.save(self.evaluator.state_dict(), temporary)
        for part in self.taken_over:
            part.unlink(missing_ok=True)
        self.taken_over, self.saved = [], time.monotonic()

    def finish(self, labels: Sequence[int]) -> None:
        """Do nothing: the record is written by whoever computes the numbers."""

    def _images_in(self, part: Path) -> set[int]:
        try:
            return self.evaluator.images_in(torch.load(part, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # a damaged file raises almost anything
            raise ValueError(f"{str(part)!r} is damaged; remove it, and its images are drawn again.") from error


def _is_whole(png: str) -> bool:
    """Tell whether a file begins and ends as a PNG does."""
    with open(png, "rb") as file:
        begin = file.read(8)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8))
        return begin == b"\x89PNG\r\n\x1a\n" and file.read() == b"IEND\xaeB`\x82"


def _npy_header(shape: tuple[int, ...], dtype: type) -> bytes:
    file = io.BytesIO()
    description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def _reserve(file: BinaryIO, size: int) -> None:
    """Make a file so large, with room on the disk where the system can promise it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    file.truncate(size)
