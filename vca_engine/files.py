"""Files and folders that are there whole or not at all."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


@contextmanager
def written_aside(file: Path) -> Iterator[Path]:
    """A temporary name beside `file`, which gets its own name when the block has written it; folders are made.

    Raises:
        OSError: It could not be written, say because the disk is full; `file` is as it was, nothing else is left.
    """
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
    """A temporary folder beside `folder`, which gets its own name when the block has written it.

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


def sha256_of(module: nn.Module) -> str:
    """Of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
