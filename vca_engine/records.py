"""Records of what was made, and how: read from JSON, compared, and the differences as a sentence."""

import json
from pathlib import Path
from typing import Any


def read_json(file: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else, or is cut short; names it.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} in the place of an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}.") from None
    return content


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Compare two records: dotted key -> (old value, new value), for the keys whose values differ."""
    found = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def listed(found: dict[str, tuple[Any, Any]], second: str = "now", most: int | None = None) -> str:
    """Write differences as `key old (now new), ...`.

    Args:
        found: What `differences` gave.
        second: What the new value is called in the text.
        most: Characters of a value, above which its middle is left out, as of a checksum; None for all.
    """
    return ", ".join(f"{key} {_short(a, most)} ({second} {_short(b, most)})" for key, (a, b) in found.items())


def _short(value: Any, most: int | None) -> str:
    text = repr(value)
    return text if most is None or len(text) <= most else f"{text[:16]}...{text[-8:]}"
