"""Files that are there whole or not at all."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, with its suffix, which gets its own name when the block has written it.

    Raises:
        OSError: It could not be written, say because the disk is full; `path` is as it was, nothing else is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write '{path}': {error}.") from error
    finally:
        with suppress(OSError):  # of a file system that is read-only
            temporary.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
