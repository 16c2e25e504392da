"""Records of what was made, and how: read from JSON, compared, and the differences as a sentence."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vca_engine.files import checksum_of, content_of, write_text

SHORT = {  # how settings of a sample's record may be typed
    "cfg": "cfg_scale",
    "steps": "sampler.num_steps",
    "sampler": "sampler.name",
}


def setting_of(record: Mapping[str, Any], name: str) -> Any:
    """Look up a setting by its dotted name, `cfg_scale`, `sampler.num_steps`; None if it is not there."""
    found: Any = record
    for key in name.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def write_json(file: str | Path, record: Mapping[str, Any]) -> None:
    """Write an object as JSON, aside, with a checksum of itself, by which `read_json` finds damage.

    Raises:
        OSError: It could not be written.
    """
    write_text(Path(file), with_checksum(record))


def with_checksum(record: Mapping[str, Any]) -> str:
    """Write an object as the text of a JSON file, with a checksum of itself."""
    return json.dumps({**record, "checksum": _checksum(record)}, indent=2) + "\n"


def read_json(file: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; if it has a checksum of ours, check it, and leave it out.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
        ValueError: It holds something else, is cut short, or does not have its checksum; names it.
    """
    try:
        content = json.loads(content_of(file).decode())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} in the place of an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}.") from None
    if str(content.get("checksum")).startswith("xxh3:") and content.pop("checksum") != _checksum(content):
        raise ValueError(
            f"{str(file)!r} is damaged, or was changed by hand: it does not have its checksum. If you changed it, "
            'remove its line "checksum".'
        )
    return content


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line, but for lines that are damaged; [] if there is no file.

    Raises:
        OSError: It cannot be read.
    """
    found = []
    for text in file.read_bytes().split(b"\n") if file.is_file() else []:
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            found += [line] if isinstance(line, dict) else []
    return found


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


def _checksum(record: Mapping[str, Any]) -> str:
    content = json.loads(json.dumps(record))  # tuples are lists and keys are text, as they will be when they are read
    return checksum_of(json.dumps(content, sort_keys=True).encode())
