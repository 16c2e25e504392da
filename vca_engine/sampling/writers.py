"""Where N images go: a folder of PNG files, one npy or npz, or an evaluator; filled in any order, resumable.

A file is made at its full size first, so that a disk that is too small is found before anything is drawn; then every
process writes its images in their places.
"""

import io
import itertools
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

from vca_engine.files import write_text, written_aside
from vca_engine.records import differences, listed

RECORD = "samples.json"
CHUNK = 2**24  # bytes read at once


class Sink(Protocol):
    """N numbered images that arrive in any order."""

    file: Path  # where they go

    def missing(self) -> list[int]:
        """Numbers of the images that are not there yet."""

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """Store images (B, H, W, 3) uint8 under their numbers."""

    def finish(self, labels: Sequence[int]) -> Path:
        """Make the result complete, which is checked, and say where it is; `labels` of all images."""


class Evaluator(Protocol):
    """What takes images and can go on later; `fid.Evaluator` is one."""

    def update(self, images: Any, index: Any, labels: Any) -> Any:
        """Adds a batch."""

    def state_dict(self) -> dict[str, Any]:
        """All that this process has gathered, as tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Adds what `state_dict` gave."""

    def images_in(self, state: dict[str, Any]) -> set[int]:
        """The numbers of the images that a state holds."""


def open_sink(
    out: Path,
    num: int,
    settings: dict[str, Any],
    state: PartialState,
    image_size: int,
    evaluator: Evaluator | None = None,
) -> Sink:
    """The sink for `out`: a file if it ends in .npy or .npz, the record of an evaluation if in .json, else a folder of PNGs.

    Args:
        out: File or folder.
        num: Number of images.
        settings: What makes an image what it is, JSON values; a half-filled sink is only filled up with the same.
        state: The processes, of which the main one makes the files.
        image_size: Height and width.
        evaluator: Where images go if `out` ends in .json.

    Raises:
        ValueError: `out` holds images of other settings, or something else.
        OSError: The disk has no room for the file.
    """
    if out.suffix == ".json" and evaluator is None:
        raise ValueError(f"{str(out)!r} is the record of an evaluation; name the reference with --fid, too.")
    is_array = out.suffix.lower() in (".npy", ".npz")
    if is_array or out.suffix == ".json":
        if out.is_dir():
            raise ValueError(f"{str(out)!r} is a folder; --out is a folder for PNG files, or ends in .npz or .npy.")
        settings = {**settings, "num": num}  # a folder may be filled up to more, a file is what it is
        record = record_of(out) if out.exists() else partial_of(out) / RECORD
    else:
        record = out / RECORD
        if out.is_file() or out.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif"):
            raise ValueError(
                f"{str(out)!r} is no folder; with --num, --out is a folder for PNG files, or ends in .npz or .npy."
            )
    settings = json.loads(json.dumps(settings))  # tuples are lists, as they will be when they are read
    sink = ArraySink(out, num, image_size) if is_array else None
    if state.is_main_process:
        if record.exists() or out.is_file() or (out.is_dir() and any(out.iterdir())):
            same_as_before(record, settings, out if out.exists() else partial_of(out))
        else:
            if sink:
                sink.check_beside()
            write_text(record, json.dumps(settings, indent=2))
        if out.is_file():
            shutil.rmtree(partial_of(out), ignore_errors=True)  # what a kill has left of one that is complete
        if sink:
            sink.allocate()
    state.wait_for_everyone()
    if out.suffix == ".json":
        return EvaluatorSink(out, num, evaluator, state)
    return sink or FolderSink(out, num)


def read_notes(out: Path) -> dict[str, Any]:
    """The record of what is being made, or is complete: its settings, and what `note` added."""
    file = partial_of(out) / RECORD
    return json.loads((file if file.exists() else record_of(out)).read_text(encoding="utf-8"))


def note(out: Path, facts: dict[str, Any]) -> None:
    """Add to the record of what is being made."""
    file = out / RECORD if out.is_dir() else partial_of(out) / RECORD
    write_text(file, json.dumps({**json.loads(file.read_text(encoding="utf-8")), **facts}, indent=2))


def record_of(out: Path) -> Path:
    """The record of what is complete: FILE.npz.json, in a folder samples.json; that of an evaluation is itself one."""
    if out.suffix == ".json":
        return out
    return out / RECORD if out.is_dir() else out.with_name(out.name + ".json")


def partial_of(out: Path) -> Path:
    """The folder of a file that is not complete yet."""
    return out.with_name(out.name + ".partial")


class FolderSink:
    """000000.png, 000001.png, ..., and their classes in labels.json, which readers of datasets know."""

    def __init__(self, folder: Path, num: int) -> None:
        self.file, self.num = folder, num

    def missing(self) -> list[int]:
        """See `Sink`."""
        with os.scandir(self.file) as entries:
            there = {entry.name for entry in entries if entry.name.endswith(".png") and _is_whole(entry.path)}
        return [i for i in range(self.num) if f"{i:06d}.png" not in there]

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """See `Sink`. A file has its name only when it is whole."""
        for i, image in zip(indices, images, strict=True):
            with written_aside(self.file / f"{i:06d}.png") as temporary:
                Image.fromarray(image).save(temporary, format="PNG")

    def finish(self, labels: Sequence[int]) -> Path:
        """See `Sink`."""
        _check_complete(self)
        before = read_notes(self.file).get("num", 0)
        if self.num >= before:  # of a folder that is already larger, there is nothing to say
            note(self.file, {"num": self.num})
            pairs = [[f"{i:06d}.png", int(label)] for i, label in enumerate(labels)]
            write_text(self.file / "labels.json", json.dumps({"labels": pairs}))
        return self.file


class ArraySink:
    """Images (N, H, W, 3) uint8 in one file: OUT.npy; or OUT.npz with arr_0 images and arr_1 labels, as ADM and DiT write.

    The labels of OUT.npy are OUT.labels.npy. Until it is complete, OUT.partial holds the file at its full size, and a byte
    for each image that says whether it is there: 1 only once the image itself is on the disk.
    """

    def __init__(self, file: Path, num: int, image_size: int) -> None:
        self.file, self.num = file, num
        self.partial = partial_of(file)
        self.zipped = file.suffix.lower() == ".npz"
        self.images, self.done = self.partial / f"images{file.suffix}", self.partial / "done"
        self.shape = (num, image_size, image_size, 3)
        self.header = _npy_header(self.shape, np.uint8)
        self.bytes = image_size * image_size * 3  # of an image
        self.member = zipfile.ZipInfo("arr_0.npy")  # of an npz; stored, not compressed, so that each image has a place
        self.member.CRC = self.member.header_offset = 0
        self.member.file_size = self.member.compress_size = len(self.header) + num * self.bytes
        self.start = len(self._zip_header()) + len(self.header)  # of image 0

    def check_beside(self) -> None:
        """Raise ValueError if what will be written beside the file is there already, and not of an earlier drawing."""
        record, labels = record_of(self.file), self.file.with_suffix(".labels.npy")
        strange = [record] if record.exists() and '"sampler"' not in record.read_text(errors="replace") else []
        strange += [labels] if not self.zipped and labels.exists() and not record.exists() else []
        for file in strange:
            raise ValueError(f"{str(file)!r} is there already, and would be overwritten; choose another --out.")

    def allocate(self) -> None:
        """Make the files at their full size, unless they are there.

        Raises:
            ValueError: One that is there is too short.
            OSError: The disk has no room; what was there before is kept.
        """
        size = self.start + self.num * self.bytes
        if self.file.exists():
            if self.file.stat().st_size < size:
                raise ValueError(f"{str(self.file)!r} is cut short; remove it to draw its images again.")
            return
        fresh = not self.images.exists()
        if fresh:
            self.done.unlink(missing_ok=True)  # of images that are no longer there
        try:
            for file, head, length in (
                (self.images, self._zip_header() + self.header, size),
                (self.done, b"", self.num),
            ):
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
            raise OSError(f"{self.num} images take {self.num * self.bytes / 1e9:.3g} GB: {error}") from error

    def missing(self) -> list[int]:
        """See `Sink`."""
        if self.file.exists():
            return []
        return np.flatnonzero(np.fromfile(self.done, np.uint8, self.num) == 0).tolist()

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """See `Sink`."""
        try:
            with open(self.images, "r+b") as f, open(self.done, "r+b") as done:
                for i, image in zip(indices, images, strict=True):
                    f.seek(self.start + i * self.bytes)
                    f.write(np.ascontiguousarray(image))
                f.flush()
                os.fsync(f.fileno())
                for i in indices:
                    done.seek(i)
                    done.write(b"\1")
        except OSError as error:
            raise OSError(f"cannot write {str(self.images)!r}: {error}") from error

    def finish(self, labels: Sequence[int]) -> Path:
        """See `Sink`. The images stay where they are."""
        if self.file.exists():
            return self.file
        _check_complete(self)
        labels = np.array(labels, np.int64)
        try:
            if self.zipped:
                self._close_zip(labels)
            else:
                with written_aside(self.file.with_suffix(".labels.npy")) as temporary, open(temporary, "wb") as f:
                    np.save(f, labels)
            write_text(record_of(self.file), (self.partial / RECORD).read_text(encoding="utf-8"))
            self.images.replace(self.file)
        except OSError as error:
            raise OSError(f"cannot complete {str(self.file)!r}: {error}; run the same command again") from error
        shutil.rmtree(self.partial, ignore_errors=True)
        return self.file

    def _zip_header(self) -> bytes:
        return self.member.FileHeader(zip64=True) if self.zipped else b""

    def _close_zip(self, labels: np.ndarray) -> None:
        """Give the archive its checksum, the labels, and its directory."""
        with open(self.images, "r+b") as f:
            end = self.start + self.num * self.bytes
            f.truncate(end)  # if this was tried before
            f.seek(self.start - len(self.header))
            self.member.CRC = 0
            while left := end - f.tell():
                self.member.CRC = zlib.crc32(f.read(min(CHUNK, left)), self.member.CRC)
            f.seek(0)
            f.write(self._zip_header())
            f.seek(0, os.SEEK_END)
            with zipfile.ZipFile(f, "a") as archive:
                archive.filelist.append(self.member)
                archive.NameToInfo[self.member.filename] = self.member
                archive.writestr(zipfile.ZipInfo("arr_1.npy"), _npy_header(labels.shape, np.int64) + labels.tobytes())


def _is_whole(png: str) -> bool:
    """Whether a file begins and ends as a PNG does."""
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


def _check_complete(sink: Sink) -> None:
    """What is said to be complete is."""
    if missing := sink.missing():
        raise OSError(
            f"{str(sink.file)!r} lacks {len(missing)} of its images, {missing[0]} for one; run the same command again."
        )


class EvaluatorSink:
    """An evaluator: no image is kept. OUT.partial holds what each process has gathered, saved every few minutes.

    A state is a file with a name of its own. Whoever takes one over removes it when he has saved what was in it, so that
    at a kill at any moment each image is in one file, or in one and in another that holds all of that file's.
    """

    SAVE_SECONDS = 300.0

    def __init__(self, file: Path, num: int, evaluator: Evaluator, state: PartialState) -> None:
        self.file, self.num, self.evaluator = file, num, evaluator
        self.rank, self.size = state.process_index, state.num_processes
        self.partial = partial_of(file)
        self.mine = self.partial / f"state-{uuid.uuid4().hex}.pt"
        self.taken_over: list[Path] = []
        self.saved = time.monotonic()

    def missing(self) -> list[int]:
        """See `Sink`. Also loads this process's share of what was gathered, by however many processes."""
        if self.file.exists():
            return []
        held = {part: self._images_in(part) for part in self.partial.glob("state-*.pt")}
        there: set[int] = set()
        for k, part in enumerate(sorted(held, key=lambda part: (-len(held[part]), part.name))):
            mine = k % self.size == self.rank
            if not held[part] <= there:
                if not held[part].isdisjoint(there):
                    raise ValueError(f"{str(part)!r} holds images that another state holds, too; remove one of them.")
                if mine:
                    self.evaluator.load_state_dict(torch.load(part, map_location="cpu", weights_only=True))
            there |= held[part]
            self.taken_over += [part] * mine
        return [i for i in range(self.num) if i not in there]

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """See `Sink`."""
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

    def finish(self, labels: Sequence[int]) -> Path:
        """See `Sink`. The record itself is written by whoever computes the numbers."""
        return self.file

    def _images_in(self, part: Path) -> set[int]:
        try:
            return self.evaluator.images_in(torch.load(part, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # a damaged file raises almost anything
            raise ValueError(f"{str(part)!r} is damaged; remove it, and its images are drawn again.") from error


def same_as_before(record: Path, settings: dict[str, Any], out: Path) -> None:
    """Raise ValueError unless what is at `out` was made with the same settings, as its record says."""
    if not record.exists():
        raise ValueError(f"{str(out)!r} is there already and was not made by sample.py; choose another --out.")
    try:
        old = dict(json.loads(record.read_text(encoding="utf-8")))
        old = _as_said_now(dict(old.get("sample", old)))  # of the record of an evaluation
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        raise ValueError(f"{str(record)!r} is damaged, so what is there is unknown; choose another --out.") from None
    if different := differences({key: old.get(key) for key in settings}, settings):
        what = "a measurement" if out.suffix == ".json" else "images"
        raise ValueError(
            f"{str(out)!r} holds {what} made with {listed(different, most=40)}; choose another --out, or remove it."
        )


def _as_said_now(record: dict[str, Any]) -> dict[str, Any]:
    """A record with what earlier versions did not say, where they did what is done now.

    They rounded pixels to even at .5, where float32 images fall by chance only; and they took the steps of ddpm and ddim by
    the product of the stride, which for most numbers of steps are those of its running sum.
    """
    record = {"quantize": "dit", **record}
    sampler, num_steps = record.get("sampler"), record.get("process", {}).get("num_timesteps")
    if isinstance(sampler, dict) and sampler.get("name") in ("ddpm", "ddim") and "spacing" not in sampler and num_steps:
        stride = (num_steps - 1) / (sampler["num_steps"] - 1)
        places = itertools.accumulate([stride] * (sampler["num_steps"] - 1), initial=0.0)
        if all(round(i * stride) == round(place) for i, place in enumerate(places)):
            record["sampler"] = {**sampler, "spacing": "even"}
    return record
