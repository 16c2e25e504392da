"""Files and folders that are there whole or not at all."""

import errno
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from torch import nn

LARGEST = 2**28  # bytes of a file that `content_of` reads
NAME = 50  # characters of a file's name that stand in its temporary one, which no file system then finds too long


def expanded(path: str) -> str:
    """Put the home folder in the place of ~ or ~USER at the start of a path, unless that is there under its very name.

    This is done where a path is read, of a file of settings or a command line, and nowhere else.
    """
    return path if os.path.lexists(path) else os.path.expanduser(path)


def nearest_there(path: str | Path) -> str:
    """Write "; the nearest there is 'runs/mini'" of a path that is not there, by the names beside it; "" if none is."""
    path = Path(path)
    with suppress(OSError, ValueError):
        if close := get_close_matches(path.name, os.listdir(path.parent), 1):
            return f"; the nearest there is {str(path.with_name(close[0]))!r}"
    return ""


def content_of(file: str | Path) -> bytes:
    """Read a file of settings or of a record, but no named pipe, which may never be written to, and no endless device.

    Raises:
        OSError: It cannot be read.
    """
    if Path(file).resolve().is_fifo():  # the <(COMMAND) of a shell has no name there
        raise OSError(errno.ESPIPE, "it is a named pipe, not a file", str(file))
    with open(file, "rb") as opened:
        content = opened.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise OSError(errno.EFBIG, f"it is larger than {LARGEST:,} bytes", str(file))
    return content


def typed_path(word: str) -> Path:
    """Read a path on a command line, for argparse."""
    return Path(expanded(word))


@contextmanager
def written_aside(file: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `file`, which gets its own name when the block has written it; make the folders.

    The temporary name is of this call alone: two programs that write one file do not meet in it.

    Raises:
        OSError: It could not be written, say because the disk is full; `file` is as it was, nothing else is left.
    """
    file = Path(file)
    temporary = _temporary(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        set_usual_mode(temporary)
        temporary.replace(file)
    except OSError as error:
        raise OSError(f"cannot write {str(file)!r}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a read-only disk says even of what is not there that it cannot be removed
            temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file aside, then rename it."""
    with written_aside(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_free(folder: Path) -> None:
    """Refuse to write into what is there already, unless it is an empty folder.

    Raises:
        ValueError: It is a file, or a folder that holds something.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is there already; choose another folder, or empty this one.")


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Make a temporary folder beside `folder`, which gets its own name when the block has written it.

    Raises:
        ValueError: `folder` is there already, see `require_free`.
        OSError: It could not be written, say because the disk is full; nothing is left.
    """
    require_free(folder)
    folder = folder.absolute()
    temporary = _temporary(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        set_usual_mode(*temporary.rglob("*.safetensors"))
        temporary.replace(folder)
    except OSError as error:
        raise OSError(f"cannot write {str(folder)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporary(folder: Path, of: Path | None = None) -> None:
    """Remove what programs that were killed have left of files written aside; for who alone is at work there.

    Args:
        folder: Where they are.
        of: The file that was to be written; None for all.
    """
    name, short = ("*", "*") if of is None else map(glob.escape, (of.name, _short_name(of)))
    found = [*folder.glob(f".{short}.????????.tmp"), *folder.glob(f".{name}.partial")]  # .partial: earlier versions
    if of is not None:  # .PID.NAME: the first ones
        found += [f for f in folder.glob(f".[0-9]*.{name}") if f.name[1:].removesuffix(f".{of.name}").isdecimal()]
    for left in found:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def set_usual_mode(*files: Path) -> None:
    """Let those read files whom the user's umask lets; safetensors are written for their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        with suppress(OSError):  # a file system without modes, or a file that was not written
            file.chmod(0o666 & ~umask)


def hold(file: Path, busy: str) -> FileLock | None:
    """Lock a file, which other programs then cannot; the lock goes with the program.

    Args:
        file: It is made if it is not there, and its folder, too.
        busy: The sentence if another program holds it.

    Returns:
        The lock, taken; None on a file system without locks.

    Raises:
        ValueError: Another program holds it.
        OSError: Its folder cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(busy) from None
    except (OSError, NotImplementedError):
        return None
    return lock


def is_older(file: Path, *sources: Path) -> bool:
    """Say whether a file is not there, or was not written after what it is made of; no if there is nothing of that."""
    times = [source.stat().st_mtime_ns for source in sources if source.is_file()]
    return bool(times) and not (file.is_file() and file.stat().st_mtime_ns > max(times))


def checksum_of(content: str | Path | bytes | memoryview) -> str:
    """Compute the checksum by which damage is found: XXH3 of bytes, or of what a file holds; of no use against intent.

    Raises:
        OSError: The file cannot be read.
    """
    digest = xxhash.xxh3_64()
    if isinstance(content, bytes | memoryview):
        digest.update(content)
    else:
        with Path(content).open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return f"xxh3:{digest.hexdigest()}"


def sha256_of(file: str | Path) -> str:
    """Compute the SHA-256 of a file's content, in hexadecimal digits."""
    with Path(file).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sha256_of_weights(module: "nn.Module") -> str:
    """Compute the SHA-256 of all weights and statistics of a network, in the order of their names.

    The counters of batch normalisation are left out: older files lack them, and they change no output.
    """
    import torch  # only here, so that what merely writes a file need not wait for it

    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        if not key.endswith("num_batches_tracked"):
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _temporary(path: Path) -> Path:
    """Name a file or folder beside `path` that no other program writes; see `remove_temporary`."""
    return path.with_name(f".{_short_name(path)}.{uuid.uuid4().hex[:8]}.tmp")


def _short_name(path: Path) -> str:
    """Shorten a name to at most `NAME` characters, so that two long names that begin alike stay two."""
    if len(path.name) <= NAME:
        return path.name
    return f"{path.name[: NAME - 9]}-{xxhash.xxh3_64_hexdigest(os.fsencode(path.name))[:8]}"
