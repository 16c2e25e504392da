"""Files and folders that are there whole or not at all."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def written_aside(file: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `file`, which gets its own name when the block has written it; make the folders.

    Raises:
        OSError: It could not be written, say because the disk is full; `file` is as it was, nothing else is left.
    """
    file = Path(file)
    temporary = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(file)
    except OSError as error:
        raise OSError(f"cannot write {str(file)!r}: {error}") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


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
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a program that was killed has left
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(folder)
    except OSError as error:
        raise OSError(f"cannot write {str(folder)!r}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
