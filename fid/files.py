"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
        temporary.unlink(missing_ok=True)
