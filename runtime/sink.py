"""Where N images go: a folder of PNG files or one npz, filled in any order by several processes, resumable."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import PartialState
from PIL import Image

from runtime.files import write_text, written_aside


class Sink(Protocol):
    """N numbered images that arrive in any order."""

    def missing(self) -> list[int]:
        """Numbers of the images that are not there yet."""

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """Store images (B, H, W, 3) uint8 under their numbers."""

    def finish(self) -> Path:
        """Make the result complete, and say where it is."""


def open_sink(out: Path, num: int, settings: dict[str, Any], state: PartialState) -> Sink:
    """The sink for `out`: an npz file if it ends so, else a folder of PNG files.

    Args:
        out: File or folder.
        num: Number of images.
        settings: What makes an image what it is, JSON values; a half-filled sink is only filled up with the same.
        state: The processes, of which the main one makes the files.

    Raises:
        ValueError: `out` holds images of other settings, or something else.
    """
    if out.suffix == ".npz":
        if out.is_dir():
            raise ValueError(f"{str(out)!r} is a folder; --out is a folder for PNG files, or a file that ends in .npz.")
        settings = {**settings, "num": num}  # a folder may be filled up to more, a file is what it is
        record = record_of(out) if out.exists() else out.with_name(out.name + ".partial") / "samples.json"
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
    return NpzSink(out, num) if out.suffix == ".npz" else FolderSink(out, num)


def record_of(npz: Path) -> Path:
    """Where the settings of a complete npz stand: beside it, FILE.npz.json."""
    return npz.with_name(npz.name + ".json")


class FolderSink:
    """000000.png, 000001.png, ..."""

    def __init__(self, folder: Path, num: int) -> None:
        self.folder, self.num = folder, num

    def missing(self) -> list[int]:
        """See `Sink`."""
        there = {file.name for file in self.folder.glob("*.png")}
        return [i for i in range(self.num) if f"{i:06d}.png" not in there]

    def write(self, indices: Sequence[int], images: np.ndarray, labels: Sequence[int]) -> None:
        """See `Sink`. A file has its name only when it is whole."""
        for i, image in zip(indices, images, strict=True):
            with written_aside(self.folder / f"{i:06d}.png") as temporary:
                Image.fromarray(image).save(temporary, format="PNG")

    def finish(self) -> Path:
        """See `Sink`."""
        return self.folder


class NpzSink:
    """arr_0 images (N, H, W, 3) uint8 and arr_1 labels (N,), the form that ADM, DiT and SiT write.

    Until it is complete, OUT.partial holds one .npz a batch, named by its first image.
    """

    def __init__(self, file: Path, num: int) -> None:
        self.file, self.num = file, num
        self.partial = file.with_name(file.name + ".partial")

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


def _check(record: Path, settings: dict[str, Any], out: Path) -> None:
    if not record.exists():
        raise ValueError(f"{str(out)!r} is there already and was not made by sample.py; choose another --out.")
    try:
        old = dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{str(record)!r} is damaged, so what is there is unknown; choose another --out.") from None
    different = {k: (old.get(k), v) for k, v in settings.items() if old.get(k) != v}
    if different:
        text = ", ".join(f"{k} {a!r} (now {b!r})" for k, (a, b) in different.items())
        raise ValueError(f"{str(out)!r} holds images made with {text}; choose another --out, or remove it.")
