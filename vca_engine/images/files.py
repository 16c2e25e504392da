"""The image files of a folder, or of a .zip of one: which there are, and what is in one."""

import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image

from vca_engine.images.pixels import FORMATS, OPTIONAL, centre_crop, check_beginning, read_image

ENDINGS = Image.registered_extensions()  # of all formats that Pillow knows
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"),
    *sorted(suffix for suffix, kind in ENDINGS.items() if kind in OPTIONAL),
)
# Of images that are not read; their files are counted, so that none is left out unseen.
OTHER_SUFFIXES = {*ENDINGS, ".heic", ".heif", ".hif", ".jxl", ".svg", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
OTHER_SUFFIXES -= {*SUFFIXES}
OWN_LABEL_FILES = ("labels.json", "labels.csv")  # beside the folders of the images
LABEL_FILES = (*OWN_LABEL_FILES, "dataset.json", "metadata.csv", "metadata.jsonl")  # the first that is there counts
# Bytes of a file. The largest image that Pillow opens, of 179 million pixels, has as many with 3 x 16 bits a pixel,
# uncompressed; whatever has more is no image, or made to fill the memory.
MAX_SIZE = 2**30
T = TypeVar("T")


class UnreadableImageError(ValueError):
    """A file that is no image, or a damaged one; says which."""


class ImageFiles:
    """The image files of a folder, or of a .zip of one; hidden ones and what macOS adds are left out.

    It is read once for all that is there, and can be handed to other processes, each of which opens a .zip for itself.

    Args:
        root: The folder or .zip; where all images lie in one folder of it, in folders of that or beside a file of
            labels, that one is meant.

    Attributes:
        zipped: Whether it is a .zip.
        prefix: That one folder, with a /; else nothing.
        names: Of the images, as paths below the root and the prefix, sorted.
        folders: Names of the folders there, sorted.
        label_files: Those of `LABEL_FILES` that are there, in any letter case, as paths below the root. The own ones
            lie beside the folders of the images; those of others, anywhere.
        left_out: Files that are images, as their names say, but none that can be read, as paths below the prefix.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: No images; a .zip that is none, encrypted, or with names that a folder cannot have; or something
            that is called as an image and is a FIFO, a device or a socket.
        OSError: A folder cannot be listed.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}
        self.zipped = self.root.suffix.lower() == ".zip" and self.root.is_file()
        if not self.zipped and not self.root.is_dir():
            why = "it is another file" if self.root.exists() else "there is nothing of that name"
            raise FileNotFoundError(f"{str(root)!r} is neither a folder nor a .zip file: {why}; check the path.")
        if self.zipped:
            self._members = _members_of(self._open_archive(), str(root))
        found = self.listing()
        self.prefix = _prefix_of(found)
        below = [n.removeprefix(self.prefix) for n in found if n.startswith(self.prefix) and n != self.prefix]
        self.folders = sorted({name.split("/", 1)[0] for name in below if "/" in name})
        own = [self.prefix + name for name in below if name.lower() in OWN_LABEL_FILES]
        self.label_files = own + [name for name in found if _last(name) in LABEL_FILES[len(OWN_LABEL_FILES) :]]
        self.names = sorted(filter(is_image, below))
        self.left_out = sorted(filter(_is_unread_image, below))
        if not self.names:
            there = [name for name in found if not name.endswith("/")]
            raise ValueError(
                f"{str(root)!r} holds no images (looked for {', '.join(SUFFIXES)} in any letter case, recursively); "
                f"found {by_suffix(there) or 'no files'}."
            )

    def listing(self) -> list[str]:
        """List all that is there now, as paths below the root, in no order; folders end in a /."""
        return list(self._members) if self.zipped else _walk(str(self.root))

    def changes(self) -> tuple[int, int]:
        """Count the images that have come and those that have gone since the names were read."""
        before = {self.prefix + name for name in self.names}
        now = set(filter(is_image, self.listing()))
        return len(now - before), len(before - now)

    def warnings(self) -> list[str]:
        """Say in a sentence which images are left out; no sentence if none are."""
        if not self.left_out:
            return []
        text = f"{str(self.root)!r}: {len(self.left_out)} files are left out, whose format cannot be read"
        folders = Counter(name.split("/", 1)[0] for name in self.left_out if "/" in name)
        counts = ", ".join(f"{n} in {folder!r}" for folder, n in folders.most_common(5))
        return [f"{text}: {by_suffix(self.left_out)}{f' ({counts})' if counts else ''}; convert them to PNG or JPEG."]

    def path(self, name: str) -> str:
        """Say what a message calls an image."""
        return self.path_below_root(self.prefix + name)

    def path_below_root(self, path: str) -> str:
        """Say what a message calls one of `label_files`."""
        return os.path.join(self.root, path)

    def read(self, name: str) -> bytes:
        """Read the content of an image file.

        Raises:
            OSError: The disk does not give it, or it has gone.
            UnreadableImageError: It has more than `MAX_SIZE` bytes, is in no known format, or cannot be unpacked.
        """
        return self._read(self.prefix + name, check_beginning)

    def read_labels(self, path: str) -> bytes:
        """Read one of `label_files`.

        Raises:
            OSError: The disk does not give it, or it has gone.
            ValueError: It has more than `MAX_SIZE` bytes, or cannot be unpacked.
        """
        return self._read(path, lambda head: None)

    def _read(self, path: str, check: Callable[[bytes], None]) -> bytes:
        """Read a file below the root; `check` gets its first 16 bytes, and raises where the rest need not be read."""
        where = self.path_below_root(path)
        with self._open(path) as (file, size):
            if size > MAX_SIZE:
                raise UnreadableImageError(f"{where!r} has {size / 2**30:.1f} GiB; no image file has more than 1.")
            head = file.read(16)
            with naming(where):
                check(head)
            return head + file.read()

    def decode(self, name: str, how: Callable[[IO[bytes]], T]) -> T:
        """Read an image file with the function `how`.

        Raises:
            OSError: The disk does not give it, or it has gone.
            UnreadableImageError: See `read`; and whatever `how` raises, as a sentence with the file's name.
        """
        content = io.BytesIO(self.read(name))
        with naming(self.path(name)):
            return how(content)

    def pixels(self, name: str, size: int) -> np.ndarray:
        """Read an image as it is trained on and measured against: RGB, cropped to (size, size, 3) uint8.

        Raises:
            OSError: The disk does not give it, or it has gone.
            UnreadableImageError: No image, a damaged or an animated one, or one far too small.
        """
        return self.decode(name, lambda file: centre_crop(read_image(file), size))

    def sizes(self, most: int) -> dict[str, tuple[int, int]]:
        """Read the widths and heights of images, before they are turned as their cameras say, without decoding them.

        Args:
            most: Images to open; of more, evenly chosen ones.

        Returns:
            Name -> (width, height); without those that cannot be read as images, unless that is all of them.

        Raises:
            OSError: The disk does not give one, or it has gone.
            UnreadableImageError: None can be read; names the first.
        """
        step, found, first = max(1, len(self.names) / most), {}, None
        for name in (self.names[int(i * step)] for i in range(min(most, len(self.names)))):
            try:
                found[name] = self._size(name)
            except UnreadableImageError as error:
                first = first or error
        if not found:
            raise first
        return found

    def _size(self, name: str) -> tuple[int, int]:
        """Read the width and the height of an image; see `sizes`."""
        with self._open(self.prefix + name) as (file, _), naming(self.path(name)):
            return Image.open(file, formats=FORMATS).size

    def content_key(self, name: str) -> str:
        """Give what changes with a file's content, as a rule, without reading it: its size, or a .zip's checksum.

        Raises:
            OSError: The disk does not give it, or it has gone.
        """
        if self.zipped:
            return f"{self._members[self.prefix + name].CRC:08x}"
        try:
            return str(os.stat(self.path(name)).st_size)
        except OSError as error:
            raise _unread(self.path(name), error) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    @contextmanager
    def _open(self, path: str) -> Iterator[tuple[IO[bytes], int]]:
        """Open a file below the root and give it with its size; of a .zip, no more than that is unpacked.

        Raises:
            OSError: The disk does not give it, or it has gone; within the block, too.
            UnreadableImageError: It cannot be unpacked; within the block, too.
        """
        where = self.path_below_root(path)
        try:
            if self.zipped:
                member = self._members[path]
                with self._open_archive().open(member) as file:
                    yield file, member.file_size
            else:
                with open(where, "rb", buffering=0) as file:
                    yield file, os.fstat(file.fileno()).st_size
        except UnreadableImageError:
            raise
        except OSError as error:  # the disk's fault, not the image's
            raise _unread(where, error) from None
        except Exception as error:  # of a .zip
            raise UnreadableImageError(f"{where!r} cannot be unpacked: {error}.") from None

    def _open_archive(self) -> zipfile.ZipFile:
        """Open the .zip, once in each process: two that share a file share its position."""
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = (os.getpid(), zipfile.ZipFile(self.root))
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"{str(self.root)!r} is not a .zip file, or is cut short: {error}.") from None
        return self._archive[1]


def is_image(name: str) -> bool:
    """Tell whether a file is an image by its name; that of a folder ends in a /."""
    return name.lower().endswith(SUFFIXES)


def by_suffix(names: Iterable[str]) -> str:
    """Count files by how their names end, e.g. `3 *.heic, 1 *.jxl`."""
    suffixes = Counter(PurePosixPath(name).suffix.lower() for name in names)
    return ", ".join(f"{n} *{suffix}" if suffix else f"{n} without an ending" for suffix, n in suffixes.most_common(5))


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn any error of reading an image within the block into a sentence with the file's name."""
    try:
        yield
    except Exception as error:  # damaged files make Pillow raise almost anything
        reason = str(error).rstrip(".") or type(error).__name__
        raise UnreadableImageError(f"{path!r} cannot be read as an image: {reason}.") from None


def _last(path: str) -> str:
    """Give the last part of a path, in small letters; "" of a folder, whose path ends in a /."""
    return path.rsplit("/", 1)[-1].lower()


def _is_unread_image(path: str) -> bool:
    """Say whether a file is called as an image in a format that is not read, or as no kind of file in a folder."""
    suffix = PurePosixPath(_last(path)).suffix.strip()
    known = suffix in OTHER_SUFFIXES or (suffix in SUFFIXES and not is_image(path))
    return not path.endswith("/") and (known or (not suffix and "/" in path))


def _is_hidden(part: str) -> bool:
    """Say whether a name is that of a hidden file or folder, or one that macOS puts into archives."""
    return part.startswith(".") or part == "__MACOSX"


def _walk(root: str) -> list[str]:
    """List all below a folder; links to folders are followed, unless they lead back to where they are.

    A folder's own list says what is a file and what is not, so that no ordinary file is asked for more.
    """
    with _listing(root):
        found, waiting = [], [("", {_inode(root)})]
    while waiting:
        here, above = waiting.pop()
        with _listing(os.path.join(root, here)):
            entries = [entry for entry in os.scandir(os.path.join(root, here)) if not _is_hidden(entry.name)]
        for entry in entries:
            name = here + entry.name
            if _is_folder(entry):
                with _listing(entry.path):
                    inode = _inode(entry.path)
                if inode not in above:
                    found.append(f"{name}/")
                    waiting.append((f"{name}/", above | {inode}))
                continue
            if not is_image(name) and entry.is_symlink() and not os.path.exists(entry.path):  # it may be of a folder
                raise ValueError(f"{entry.path!r} is a link that leads nowhere; is its disk there? Mend or remove it.")
            if (is_image(name) or _last(name) in LABEL_FILES) and _is_special(entry):
                raise ValueError(
                    f"{entry.path!r} is no file but a FIFO, a device or a socket, or a link to one; remove it."
                )
            found.append(name)
    return found


@contextmanager
def _listing(folder: str) -> Iterator[None]:
    """Name the folder in an error of the disk."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{folder!r} cannot be listed: {error.strerror or error}.") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, say: whoever reads it is told
        return False


def _is_special(entry: os.DirEntry) -> bool:
    """Say whether it is there and no file: to open it may wait for ever, to read it may never end."""
    try:
        return not entry.is_file() and os.path.exists(entry.path)
    except OSError:
        return False


def _inode(folder: str) -> tuple[int, int]:
    """Give a pair that is the same for all names of one folder."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _members_of(archive: zipfile.ZipFile, root: str) -> dict[str, zipfile.ZipInfo]:
    """List all in a .zip by the names that they have when it is unpacked, as `_walk` gives them."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        path = _name_of(member).replace("\\", "/")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts or re.match(r"/|[A-Za-z]:", path):
            raise ValueError(f"{root!r} holds {member.filename!r}, which leads out of its folder; pack it anew.")
        if not parts or any(map(_is_hidden, parts)):
            continue
        name = "/".join(parts) + ("/" if path.endswith("/") else "")
        if name in found and not name.endswith("/"):
            raise ValueError(f"{root!r} holds {name!r} twice, and only one of them can be meant; pack it anew.")
        if member.flag_bits & 1:
            raise ValueError(f"{root!r} is encrypted ({name!r} for one); unpack it, or pack it without a password.")
        found[name] = member
    return found


def _name_of(member: zipfile.ZipInfo) -> str:
    """Give the name of a file in a .zip; macOS writes UTF-8 without saying so, which zipfile takes for cp437."""
    with suppress(UnicodeError):
        if not member.flag_bits & 0x800:
            return member.filename.encode("cp437").decode()
    return member.filename


def _prefix_of(names: list[str]) -> str:
    """Find the one folder that holds all images, in folders or beside a file of labels: with a slash; else ""."""
    images = [name for name in names if is_image(name)]
    tops = {name.split("/", 1)[0] for name in images if "/" in name}
    labelled = {name.rpartition("/")[0] for name in names if _last(name) in OWN_LABEL_FILES}  # folders
    if len(tops) != 1 or any("/" not in name for name in images) or "" in labelled:
        return ""
    prefix = f"{tops.pop()}/"
    inside = [name.removeprefix(prefix) for name in images]
    in_folders = all("/" in name for name in inside) and len({name.split("/", 1)[0] for name in inside}) > 1
    return prefix if in_folders or prefix[:-1] in labelled else ""


def _unread(path: str, error: OSError) -> OSError:
    return OSError(f"{path!r} cannot be read: {error.strerror or error}.")
