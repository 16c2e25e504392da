"""Your own images: files in a folder or in a .zip, the class of each, and how one becomes RGB."""

import csv
import io
import json
import os
import re
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # of Pillow; some others run programs
LABEL_FILES = ("labels.json", "labels.csv")


class ImageFiles:
    """The image files of a folder, or of a .zip of one; hidden ones and what macOS adds are left out.

    Args:
        root: The folder or .zip; where all images lie in one folder of it, in folders of that or beside a file of labels,
            that one is meant.

    Attributes:
        names: Paths below the root, sorted.
        folders: Names of the folders at the root, sorted.
        labels: Which of `LABEL_FILES` is at the root; None without one.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: A .zip that is none, or no images.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}
        if self.root.is_dir():
            self.zipped, found = False, self._walk()
        elif self.root.is_file() and self.root.suffix.lower() == ".zip":
            self.zipped, members = True, self._open_archive().infolist()
            self._members = {member.filename.replace("\\", "/").removeprefix("./"): member for member in members}
            found = list(self._members)
        else:
            raise FileNotFoundError(f"data.images {root!r} is neither a folder nor a .zip file.")
        found = [n for n in found if not any(p.startswith(".") or p == "__MACOSX" for p in PurePosixPath(n).parts)]
        self.prefix = _prefix_of(found)
        found = [
            name.removeprefix(self.prefix) for name in found if name.startswith(self.prefix) and name != self.prefix
        ]
        self.folders = sorted({n.split("/", 1)[0] for n in found if "/" in n})
        self.labels = next((name for name in LABEL_FILES if name in found), None)
        self.names = sorted({name for name in found if _is_image(name)})
        if not self.names:
            raise ValueError(
                f"data.images {root!r} holds no images (looked for {' '.join(SUFFIXES)} in any letter case)."
            )

    def path(self, name: str) -> str:
        """What a message calls a file."""
        return str(self.root / self.prefix / name)

    def open(self, name: str) -> IO[bytes]:
        """A file, for reading."""
        if self.zipped:
            return io.BytesIO(self._open_archive().read(self._members[self.prefix + name]))
        return (self.root / self.prefix / name).open("rb")

    def stamp(self, name: str) -> str:
        """What changes with a file's content, as a rule, and is had without reading it: its size, or a .zip's checksum."""
        if self.zipped:
            return f"{self._members[self.prefix + name].CRC:08x}"
        return str((self.root / self.prefix / name).stat().st_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def _open_archive(self) -> zipfile.ZipFile:
        """The .zip, opened once in each process: two that share a file share its position."""
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = (os.getpid(), zipfile.ZipFile(self.root))
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"data.images '{self.root}' is not a .zip file, or is cut short: {error}.") from None
        return self._archive[1]

    def _walk(self) -> list[str]:
        """As `namelist` of a .zip; links to folders are followed, unless they lead back to where they are."""
        found, above = [], {str(self.root): {_identity(self.root)}}
        for folder, inside, files in os.walk(self.root, followlinks=True):
            here, chain = Path(folder).relative_to(self.root).as_posix(), above.pop(folder)
            paths = {name: os.path.join(folder, name) for name in inside}
            inside[:] = [name for name, path in paths.items() if _identity(path) not in chain]
            above |= {paths[name]: chain | {_identity(paths[name])} for name in inside}
            found += [name if here == "." else f"{here}/{name}" for name in [*files, *(f"{name}/" for name in inside)]]
        return found


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _prefix_of(names: list[str]) -> str:
    """The one folder, with its slash, that holds all images, in folders or beside a file of labels; else nothing."""
    images = [name for name in names if _is_image(name)]
    tops = {name.split("/", 1)[0] for name in images if "/" in name}
    if len(tops) != 1 or any("/" not in name for name in images) or {*LABEL_FILES} & {*names}:
        return ""
    prefix = f"{tops.pop()}/"
    inside = [name.removeprefix(prefix) for name in images]
    in_folders = all("/" in name for name in inside) and len({name.split("/", 1)[0] for name in inside}) > 1
    return prefix if in_folders or {prefix + file for file in LABEL_FILES} & {*names} else ""


def _identity(folder: str | Path) -> tuple[int, int]:
    """The same for each name of a folder."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def classes_of(files: ImageFiles) -> tuple[list[str], np.ndarray, list[str]]:
    """Names of the images, their classes (N,) and the names of these.

    A class is what the file of labels says, or else a folder, in alphabetical order; images below it belong to it.

    Raises:
        ValueError: An image without a class, a class without images, or a file of labels that does not fit the images.
    """
    if files.labels:
        return _read_labels(files)
    loose = [name for name in files.names if "/" not in name]
    if loose:
        raise ValueError(
            f"data.images '{files.root}' holds images without a class, {loose[0]!r} and {len(loose) - 1} more: put each "
            f"into a folder with the name of its class, or write a labels.csv of lines FILE,CLASS."
        )
    owners = [name.split("/", 1)[0] for name in files.names]
    if empty := sorted({*files.folders} - {*owners}):
        raise ValueError(f"the class folder {files.path(empty[0])!r} holds no images; remove it, or put some in.")
    number = {name: k for k, name in enumerate(files.folders)}
    return files.names, np.array([number[owner] for owner in owners], dtype=np.int64), files.folders


def _read_labels(files: ImageFiles) -> tuple[list[str], np.ndarray, list[str]]:
    """Classes of labels.json or labels.csv, which are numbers from 0, or names.

    labels.json: `{"FILE": CLASS, ...}`, or `{"labels": [["FILE", CLASS], ...], "class_names": [...]}`, which is StyleGAN's
    and EDM's, with names. labels.csv: lines `FILE,CLASS`, perhaps with a header. Names are numbered in the order of
    `class_names`, or else in that of the alphabet.
    """
    where = files.path(files.labels)
    pairs, class_names = (_pairs_of_json if files.labels.endswith("json") else _pairs_of_csv)(files, where)
    listed, there = {file for file, _ in pairs}, {*files.names}
    if missing := sorted(listed - there):
        raise ValueError(
            f"{where!r} names {missing[0]!r}, which is not there ({len(missing)} of {len(listed)} are missing)."
        )
    if unlisted := sorted(there - listed):
        raise ValueError(
            f"{where!r} gives {unlisted[0]!r} no class ({len(unlisted)} of {len(there)} images have none)."
        )
    if len(listed) < len(pairs):
        raise ValueError(f"{where!r} names an image twice.")
    values = [value for _, value in sorted(pairs)]
    if class_names is not None and len({*class_names}) < len(class_names):
        raise ValueError(f"{where!r} has a class name twice.")
    if all(isinstance(value, str) and value for value in values):
        class_names = class_names or sorted({*values})
        if unknown := sorted({*values} - {*class_names}):
            raise ValueError(f"{where!r} has the class {unknown[0]!r}, which is not one of its class_names.")
        number = {name: k for k, name in enumerate(class_names)}
        labels = [number[value] for value in values]
    elif all(type(value) is int for value in values):
        labels = [max(min(value, 2**62), -(2**62)) for value in values]  # whatever is out of range stays so
        highest = max(values)
        if class_names is None and min(values) >= 0 and (highest >= len(values) or len({*values}) <= highest):
            raise ValueError(
                f"{where!r} has class numbers up to {highest} with gaps; number them from 0, or give names."
            )
        class_names = class_names or [str(k) for k in range(highest + 1)]
    else:
        raise ValueError(f"{where!r} has classes that are neither all whole numbers nor all names.")
    return files.names, np.array(labels, dtype=np.int64), class_names


def _pairs_of_json(files: ImageFiles, where: str) -> tuple[list[tuple[str, Any]], list[str] | None]:
    try:
        with files.open(files.labels) as file:
            content = json.load(file)
        names = content.get("class_names")
        if names is not None and not isinstance(names, list):
            raise TypeError("class_names is no list")
        pairs = content["labels"] if isinstance(content.get("labels"), list) else content.items()
        pairs = [(str(file), value) for file, value in pairs if file != "class_names"]
        return pairs, None if names is None else [str(name) for name in names]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{where!r} cannot be read ({error}); write {{"FILE": CLASS, ...}} or {{"labels": [["FILE", CLASS], ...]}}.'
        ) from None


def _pairs_of_csv(files: ImageFiles, where: str) -> tuple[list[tuple[str, Any]], None]:
    try:
        with files.open(files.labels) as file:
            rows = [
                row for row in csv.reader(file.read().decode("utf-8-sig").splitlines(), skipinitialspace=True) if row
            ]
        pairs = [(file.strip(), value.strip()) for file, value in rows]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{where!r} cannot be read ({error}); write lines FILE,CLASS.") from None
    if pairs and pairs[0][0] not in {*files.names} and PurePosixPath(pairs[0][0]).suffix.lower() not in SUFFIXES:
        pairs = pairs[1:]  # a header
    if all(re.fullmatch(r"-?[0-9]+", value) for _, value in pairs):
        return [(file, int(value)) for file, value in pairs], None
    return pairs, None


def read_image(file: IO[bytes]) -> Image.Image:
    """An image file as RGB with 8 bits, turned as its camera says.

    Grey, palette and CMYK are converted; 16 bits are scaled to 8; what is transparent is laid on white.

    Raises:
        OSError or SyntaxError: It is damaged.
        ValueError: It is no image, or animated, or has numbers without a known range.
    """
    try:
        opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("it is in no format that Pillow knows") from None
    with opened:
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and opened.format != "MPO":  # an MPO is a photograph with a preview of itself
            raise ValueError(f"it is animated, or has several pages ({frames})")
        try:
            image = ImageOps.exif_transpose(opened)
        except Exception:  # a damaged EXIF makes Pillow raise almost anything, and says nothing of the pixels
            image = opened
        image.load()
    if image.mode == "I" and opened.format != "PNG":
        raise ValueError("it has numbers of 32 bits, whose range is not known")
    if image.mode.startswith("I"):  # I;16 and its kin; PNGs of 16 bits in older versions of Pillow
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its numbers reach from {values.min()} to {values.max()}, beyond 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it has floating-point numbers, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre square as uint8 (size, size, 3): halved by box filter while it can be, then bicubic, then cropped.

    This is how ADM, DiT and SiT prepare ImageNet, so its filters are part of every published FID.

    Source: Dhariwal & Nichol 2021, arXiv:2105.05233, the released data loader.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image)[top : top + size, left : left + size]
