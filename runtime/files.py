"""Files that are there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
