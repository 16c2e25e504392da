"""Where N images go: a folder of PNG files, one npz or an evaluator, filled in any order by several processes, resumable."""

import json
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from runtime.files import write_text, written_aside


class Sink(Protocol):
    """N numbered images that arrive in any order."""

    file: Path  # where they go

    def missing(self) -> list[int]:
        """Numbers of the images that are not there yet."""

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """Store images (B, H, W, 3) uint8 under their numbers."""

    def finish(self) -> Path:
        """Make the result complete, and say where it is."""


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
    out: Path, num: int, settings: dict[str, Any], state: PartialState, evaluator: Evaluator | None = None
) -> Sink:
    """The sink for `out`: an npz file or the record of an evaluation if it ends in .npz or .json, else a folder of PNGs.

    Args:
        out: File or folder.
        num: Number of images.
        settings: What makes an image what it is, JSON values; a half-filled sink is only filled up with the same.
        state: The processes, of which the main one makes the files.
        evaluator: Where images go if `out` ends in .json.

    Raises:
        ValueError: `out` holds images of other settings, or something else.
    """
    if out.suffix == ".json" and evaluator is None:
        raise ValueError(f"{str(out)!r} is the record of an evaluation; name the reference with --fid, too.")
    if out.suffix in (".npz", ".json"):
        if out.is_dir():
            raise ValueError(f"{str(out)!r} is a folder; --out is a folder for PNG files, or a file that ends in .npz.")
        settings = {**settings, "num": num}  # a folder may be filled up to more, a file is what it is
        record = record_of(out) if out.exists() else partial_of(out) / "samples.json"
    else:
        record = out / "samples.json"
        if out.is_file() or out.suffix.lower() in (".png", ".jpg", ".jpeg"):
            raise ValueError(
                f"{str(out)!r} is no folder; with --num, --out is a folder for PNG files, or ends in .npz."
            )
    if state.is_main_process:
        if record.exists() or out.is_file() or (out.is_dir() and any(out.iterdir())):
            _check(record, settings, out)
        else:
            write_text(record, json.dumps(settings, indent=2))
    state.wait_for_everyone()
    if out.suffix == ".json":
        return EvaluatorSink(out, num, evaluator, state)
    return NpzSink(out, num) if out.suffix == ".npz" else FolderSink(out, num)


def record_of(out: Path) -> Path:
    """Where the settings of a complete file stand: beside an npz, FILE.npz.json; in the record of an evaluation itself."""
    return out if out.suffix == ".json" else out.with_name(out.name + ".json")


def partial_of(out: Path) -> Path:
    """The folder of a file that is not complete yet."""
    return out.with_name(out.name + ".partial")


class FolderSink:
    """000000.png, 000001.png, ..."""

    def __init__(self, folder: Path, num: int) -> None:
        self.file, self.num = folder, num

    def missing(self) -> list[int]:
        """See `Sink`."""
        there = {file.name for file in self.file.glob("*.png")}
        return [i for i in range(self.num) if f"{i:06d}.png" not in there]

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """See `Sink`. A file has its name only when it is whole."""
        for i, image in zip(indices, images, strict=True):
            with written_aside(self.file / f"{i:06d}.png") as temporary:
                Image.fromarray(image).save(temporary, format="PNG")

    def finish(self) -> Path:
        """See `Sink`."""
        return self.file


class NpzSink:
    """arr_0 images (N, H, W, 3) uint8 and arr_1 labels (N,), the form that ADM, DiT and SiT write.

    Until it is complete, OUT.partial holds one .npz a batch, named by its first image.
    """

    def __init__(self, file: Path, num: int) -> None:
        self.file, self.num = file, num
        self.partial = partial_of(file)

    def missing(self) -> list[int]:
        """See `Sink`."""
        if self.file.exists():
            return []
        there = set()
        for part in self._parts():
            with np.load(part) as arrays:
                there.update(arrays["indices"].tolist())
        return [i for i in range(self.num) if i not in there]

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """See `Sink`."""
        with written_aside(self.partial / f"{indices[0]:06d}.npz") as temporary, open(temporary, "wb") as f:
            np.savez(f, indices=np.array(indices), images=images, labels=np.array(labels))

    def finish(self) -> Path:
        """See `Sink`. The images are gathered on disk, not in memory."""
        if self.file.exists():
            return self.file
        images, labels = None, np.zeros(self.num, dtype=np.int64)
        for part in self._parts():
            with np.load(part) as arrays:
                if images is None:
                    shape = (self.num, *arrays["images"].shape[1:])
                    images = np.lib.format.open_memmap(self.partial / "all.npy", "w+", dtype=np.uint8, shape=shape)
                images[arrays["indices"]] = arrays["images"]
                labels[arrays["indices"]] = arrays["labels"]
        write_text(record_of(self.file), (self.partial / "samples.json").read_text(encoding="utf-8"))
        with written_aside(self.file) as temporary, open(temporary, "wb") as f:
            np.savez(f, arr_0=images, arr_1=labels)
        shutil.rmtree(self.partial)
        return self.file

    def _parts(self) -> list[Path]:
        return sorted(self.partial.glob("[0-9]*.npz"))


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

    def finish(self) -> Path:
        """See `Sink`. The record itself is written by whoever computes the numbers."""
        return self.file

    def _images_in(self, part: Path) -> set[int]:
        return self.evaluator.images_in(torch.load(part, map_location="cpu", weights_only=True, mmap=True))


def _check(record: Path, settings: dict[str, Any], out: Path) -> None:
    if not record.exists():
        raise ValueError(f"{str(out)!r} is there already and was not made by sample.py; choose another --out.")
    try:
        old = dict(json.loads(record.read_text(encoding="utf-8")))
        old = old.get("sample", old)  # of the record of an evaluation
    except (ValueError, TypeError):
        raise ValueError(f"{str(record)!r} is damaged, so what is there is unknown; choose another --out.") from None
    different = {k: (old.get(k), v) for k, v in settings.items() if old.get(k) != v}
    if different:
        text = ", ".join(f"{k} {a!r} (now {b!r})" for k, (a, b) in different.items())
        what = "a measurement of images" if out.suffix == ".json" else "images"
        raise ValueError(f"{str(out)!r} holds {what} made with {text}; choose another --out, or remove it.")
