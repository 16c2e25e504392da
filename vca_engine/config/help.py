"""The --help of a program: its settings with their meanings, types, ranges and defaults, as their classes say them."""

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from docstring_parser import parse as parse_docstring

from vca import annotations_of, defaults_of, describe_type, members_of
from vca_engine.config.reading import Registries, bounds_of, is_path, is_spec

CONFIG = "YAML file of settings, or a row of configs/paper.yaml; e.g. sit_b2_vca. What comes later overrides it."
OF_PROGRAMS = ("layer_index", "num_prefix_tokens")  # options that a program gives, so that no user can
MEANINGS_AT, BRIEF_AT, BRIEF_WIDTH = 24, 32, 100  # columns where the meanings begin, and of the first screen
LETTERS = {int: "N", float: "X", bool: ""}  # what stands for a value on the first screen
Usual = Mapping[str, Sequence[str]]  # title -> settings, and options of parts such as data.images
Row = tuple[str, str]  # an option, and its meaning


class Entry(NamedTuple):
    """A setting, or an option of a part.

    Attributes:
        key: Its dotted name.
        kind: Its type.
        default: Its default; dataclasses.MISSING if it has to be given.
        text: Its meaning.
        words: Those that it can be, where they are few.
    """

    key: str
    kind: Any
    default: Any
    text: str
    words: Sequence[str] = ()

    def full(self) -> Row:
        """Write it as an option, and all that is known of it: meaning, type, range and default."""
        words = self.words or _words_of(self.kind)
        value = "{" + ",".join(words) + "}" if words else self.key.rpartition(".")[2].upper()
        if words and any(get_origin(k) is list for k in members_of(self.kind)):
            value = f"[{value},...]"
        kind = "" if words or self.kind is bool else describe_type(self.kind).removesuffix(" or null")
        known = "required" if self.default is dataclasses.MISSING else f"default {shown(self.default)}"
        details = "; ".join(filter(None, (kind, bounds_of(self.kind), known)))
        return f"--{self.key} {'[{true,false}]' if self.kind is bool else value}", f"{self.text} ({details})"

    def brief(self) -> Row:
        """Write it as an option, and the beginning of its meaning, with its default."""
        kind, default = members_of(self.kind)[0], self.default
        value = "PATH" if is_path(self.kind) else LETTERS.get(kind, "NAME")
        value = "{true,false}" if default is True else value
        default = default["name"] if isinstance(default, dict) and default.keys() == {"name"} else default
        known = "" if default is None or default is False or default is dataclasses.MISSING else f" ({shown(default)})"
        return f"--{self.key} {value}".strip(), _beginning(self.text) + known


Section = tuple[str, str, list[Entry]]  # title, sentence below it, what it lists


def write_help(
    cls: type, usage: str, description: str, *, choices: Registries, parts: Registries, usual: Usual | None = None
) -> str:
    """Write what --help prints: every setting and every part with its options; or the usual ones, a line each.

    Args:
        cls: The dataclass of the settings.
        usage: Its line of how to call the program.
        description: What stands above the settings; with `usual`, its first two paragraphs do.
        choices: Setting -> registry in which its word is a name.
        parts: Last name of a spec -> registry of the classes that it names.
        usual: Those to list; not given means all.
    """
    sections, written, width = _settings(cls, choices, ""), [], shutil.get_terminal_size().columns - 2
    specs = [entry.key for _, _, entries in sections for entry in entries if is_spec(entry.kind)]
    sections += [section for key in specs for section in _options(key, parts, written)]
    general = [
        ("-h, --help" + " [all]" * bool(usual), f"Show this message{', or all settings,' * bool(usual)} and exit."),
        ("--config FILE", _beginning(CONFIG) if usual else CONFIG),
        ("--print_config", "Print the resulting settings as YAML and exit."),
    ]
    if usual:
        known: dict[str, Entry] = {}
        for _, _, entries in sections:
            known |= {entry.key: entry for entry in entries if entry.key not in known}
        description = "\n\n".join(description.split("\n\n")[:2])
        groups = [(title, "", [known[key].brief() for key in keys]) for title, keys in usual.items()]
        column, width = BRIEF_AT, min(width, BRIEF_WIDTH)
    else:
        groups = [(title, text, [entry.full() for entry in entries]) for title, text, entries in sections]
        column = MEANINGS_AT
    lines = [f"usage: {usage}", "", description.strip()]
    for title, text, rows in [("options", "", general), *groups]:
        lines += _section(title, text, rows, column, width)
    return "\n".join(lines)


def _section(title: str, text: str, rows: Sequence[Row], column: int, width: int) -> list[str]:
    """Lay out a section: a line of its title, and each option with its meaning, which begins at a column."""
    wrap = partial(textwrap.wrap, break_on_hyphens=False)
    lines = ["", f"{title}:", *(f"  {line}" for line in wrap(text.replace("`", ""), max(20, width - 2)))]
    lines += [""] if text and rows else []
    for option, meaning in rows:
        wrapped = wrap(meaning.replace("`", ""), max(20, width - column)) or [""]
        if len(option) + 4 > column:
            lines.append(f"  {option}")
            lines += [" " * column + line for line in wrapped]
        else:
            lines.append(f"  {option:<{column - 2}}{wrapped[0]}")
            lines += [" " * column + line for line in wrapped[1:]]
    return lines


def shown(value: Any) -> str:
    """Write a default as one would type it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(shown, value)) + "]"
    return "not given" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def default_of(field: dataclasses.Field) -> Any:
    """Give the default of a field; dataclasses.MISSING if it has to be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _settings(cls: type, choices: Registries, prefix: str, title: str | None = None, text: str = "") -> list[Section]:
    """List the settings of a class, those of each class that it extends by themselves; then its groups of settings."""
    texts, own, groups = _descriptions(cls), {}, []
    for f in dataclasses.fields(cls):
        key = prefix + f.name
        if dataclasses.is_dataclass(f.type):
            groups += _settings(f.type, choices, f"{key}.", key, texts[f.name])
            continue
        declared = next(c for c in reversed(cls.__mro__) if f.name in inspect.get_annotations(c))
        entry = Entry(key, f.type, default_of(f), texts[f.name], [*choices.get(key, ())])
        own.setdefault(title or _first_line(declared), []).append(entry)
    return [(name, text, entries) for name, entries in own.items()] + groups


def _options(key: str, parts: Registries, written: list[str]) -> Iterator[Section]:
    """Yield what each name that a spec may have means, with its options; once for all specs of the same kind."""
    part = key.rpartition(".")[2]
    if part in written:
        return
    written.append(part)
    for name, entry in parts.get(part, {}).items():
        texts, defaults = _descriptions(entry), defaults_of(entry)
        entries = [
            Entry(f"{key}.{option}", kind, defaults.get(option, dataclasses.MISSING), texts.get(option, ""))
            for option, kind in annotations_of(entry).items()
            if option not in OF_PROGRAMS
        ]
        text = _first_line(entry)
        yield f"{key}.name {name}", f"{text}." if text else "", entries
        for entry in entries:
            yield from _options(entry.key, parts, written)


def _beginning(text: str) -> str:
    """Give the beginning of a text, up to its first stop, colon, semicolon or example."""
    return re.split(r"[:;.] |\.$|, e\.g\.", text)[0]


def _words_of(kind: Any) -> list[str]:
    """List the words that a type allows, if it allows nothing else but null."""
    members = [member for member in members_of(kind) if member is not NoneType]
    return [word for k in members for word in get_args(k)] if {*map(get_origin, members)} == {Literal} else []


def _first_line(entry: Any) -> str:
    """Give the first line of the docstring of a class or function, without its full stop."""
    return (entry.__doc__ or "").strip().partition("\n")[0].removesuffix(".")


def _descriptions(entry: Any) -> dict[str, str]:
    """Find the text of each field or option in the docstring of a class, or of those that it extends; or a function."""
    classes = [c for c in reversed(getattr(entry, "__mro__", [entry])) if c is not object]
    found = [parse_docstring(c.__doc__ or "").params for c in classes]
    return {p.arg_name: " ".join(p.description.split()) for params in found for p in params if p.description}
