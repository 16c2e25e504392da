"""What programs print: it never ends one of them, and nothing in it moves the cursor or hides text."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# Control characters but tab, new line and carriage return; and what turns the direction of text. Of escape sequences
# the two that progress bars and coloured logs need stay: a line up, and a colour.
HIDDEN = re.compile("\x1b(?!\\[A|\\[[0-9;]*m)|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class SteadyStream:
    """A text stream that loses what cannot be written: to a closed pipe, a full disk, or in the terminal's alphabet.

    Args:
        stream: Where the text goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        with suppress(AttributeError, ValueError, OSError):  # not every stream can
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        """Give all else as the stream itself does."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, with control characters shown as escapes."""
        self._attempt(self.stream.write, HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text))
        return len(text)

    def flush(self) -> None:
        """Let what was written be seen."""
        self._attempt(self.stream.flush)

    def _attempt(self, function: Any, *args: str) -> None:
        try:
            function(*args)
        except BrokenPipeError:  # nobody reads any more; what the buffer holds goes nowhere, also at the end
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
        except (OSError, ValueError):  # a full disk, which may have room later; or a closed stream
            pass


@contextmanager
def steady_output() -> Iterator[None]:
    """Let nothing that is printed within the block end the program."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # in the place of a stream that was closed before the program began
        sys.stdout, sys.stderr = (s if isinstance(s, SteadyStream) else SteadyStream(s or nowhere) for s in before)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = before
