"""The command line of a program: YAML files and options -> a dataclass, or one sentence and exit code 2."""

import dataclasses
import functools
import itertools
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, get_origin

from vca import lookup, members_of
from vca_engine.config.help import Usual, default_of, write_help
from vca_engine.config.paper import read_config
from vca_engine.config.reading import (
    MissingSettingError,
    Registries,
    Settings,
    Word,
    is_spec,
    leaves,
    refused,
    replaced_settings,
    typed,
    unknown,
    validate,
)
from vca_engine.config.yamlfile import NULLS, TRUTH, Plain, parse_yaml, read_yaml, write_yaml
from vca_engine.files import expanded
from vca_engine.terminal import steady_output

NO_TEXT = re.compile("[\0\ud800-\udfff]")  # the second are bytes that are not UTF-8, as Python hands them over
ROOT = Path(__file__).resolve().parents[2]  # of a clone, or where packages are installed
PACKAGES = {"classify", "dit_vca", "fid", "sit_vca", "vca", "vca_engine"}  # that are installed


def parse(
    cls: type[Settings],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    first: str | None = None,
    others: str | None = None,
    parts: Registries | None = None,
    choices: Registries | None = None,
    usual: Usual | None = None,
) -> Settings:
    """Make an instance of a dataclass from the command line, which may name YAML files; what is later overrides.

    Args:
        cls: The dataclass; its docstring describes its fields, for --help.
        argv: The words; not given means those of this process.
        prog: Name of the program.
        description: What stands above the options in --help.
        first: The field that a word without an option is the value of.
        others: The list that all further such words are the items of.
        parts: Registries whose entries say of what type the options of specs are.
        choices: Setting, such as fid.metrics -> registry in which its word, or each of its words, is a name.
        usual: What --help lists, in groups: title -> settings; --help all lists all, as --help does if this is not
            given.

    Raises:
        SystemExit: After --help or --print_config; with code 2 after a user's mistake, which one sentence names.
    """
    words = list(sys.argv[1:] if argv is None else map(str, argv))
    asked = next((place for place, word in enumerate(words) if word in ("-h", "--help")), None)
    if asked is not None:
        usage = f"{prog} {f'{first.upper()} ' if first else ''}[--config FILE ...] [--SETTING VALUE ...]"
        usual = None if words[asked + 1 : asked + 2] == ["all"] else usual
        print(write_help(cls, usage, description, choices=choices or {}, parts=parts or {}, usual=usual))
        raise SystemExit(0)
    try:
        values, printed, comments = _values(cls, words, first, others)
        values = typed(cls, values, parts or {})
        _check_texts(values)
        _check_parts(values, parts or {})
        try:
            found = validate(cls, values)
        except MissingSettingError:
            if not printed:
                raise
        _check_choices(values, choices or {})
        if not printed:
            return found
        print("".join(f"# {line}\n" for line in comments) + write_yaml(_with_defaults(cls, values)), end="")
        raise SystemExit(0)
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _values(
    cls: type, words: Sequence[str], first: str | None, others: str | None
) -> tuple[dict[str, Any], bool, list[str]]:
    """Read the words as nested dicts of words, files merged in where they are named.

    Returns:
        These; whether to print them; and what is known of the configs that were named.

    Raises:
        ValueError: An unknown option, one without a value, or a file that cannot be read.
    """
    kinds, found, printed, comments, rest = dict(leaves(cls)), {}, False, [], deque(words)
    on_command_line: set[str] = set()
    while rest:
        word = rest.popleft()
        if word and not word.startswith("-") and first and first not in found:
            found[first] = Word(word)
            continue
        if word and not word.startswith("-") and others and isinstance(found.get(others, []), list):
            found[others] = [*found.get(others, []), Word(word)]
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if key == "print_config" and not equals:
            printed = True
            continue
        if word and not word.startswith("-"):
            raise ValueError(_misplaced(words, len(words) - len(rest) - 1, kinds))
        if not word.startswith("--") or (key != "config" and _owner(key, kinds) is None):
            raise ValueError(unknown(key if word.startswith("--") else word, list(kinds), typed=True))
        if not equals:
            positional = rest and (others or (first and first not in found)) and rest[0].lower() not in TRUTH
            if kinds.get(key) is bool and (not rest or rest[0].startswith("--") or positional):
                value = "true"
            elif rest and rest[0] and not rest[0].startswith("--"):
                value = rest.popleft()
            elif rest and not rest[0]:
                raise ValueError(
                    f"--{name} is empty, as of a variable that is not set; to take a setting back, write --{name}=."
                )
            else:
                raise ValueError(f"--{name} needs a value; one that begins with -- is written so: --{name}=VALUE.")
        if key == "config":
            files, lines = read_config(value)
            comments += lines
            for settings in files:
                _forget_replaced(found, _keys(settings), cls)
                _merge(found, settings, cls)
        elif dataclasses.is_dataclass(kinds.get(key)):
            if value in NULLS:
                raise ValueError(refused(name, Plain(value), kinds[key], {"type": "dataclass_type"}))
            group = _braces(name, value) if value.startswith("{") else read_yaml(value)
            group = functools.reduce(lambda inner, part: {part: inner}, reversed(key.split(".")), group)
            on_command_line |= _keys(group)
            _forget_replaced(found, _keys(group), cls, on_command_line)
            _merge(found, group, cls)
        else:
            on_command_line.add(key)
            _forget_replaced(found, {key}, cls, on_command_line)
            spec = value.startswith("{") and is_spec(kinds.get(key))
            _put(found, key, _braces(name, value) if spec else Word(value), cls)
    return found, printed, comments


def _misplaced(words: Sequence[str], place: int, kinds: dict[str, Any]) -> str:
    """Write the sentence for a word without the name of a setting, which may be one more item of a list."""
    word, start = words[place], max((i for i in range(place) if words[i].startswith("--")), default=0)
    name, _, value = words[start].removeprefix("--").partition("=")
    if any(get_origin(kind) in (list, tuple) for kind in members_of(kinds.get(name.replace("-", "_")))):
        more = itertools.takewhile(lambda other: not other.startswith("-"), words[start + 1 :])
        items = ",".join(filter(None, (item.strip("[], ") for item in (value, *more))))
        return f"{word!r} stands without the name of a setting; if it is of --{name}, write --{name} [{items}]."
    option = "config" if word.endswith((".yaml", ".yml")) else "OPTION"
    option = "data.images" if "data" in kinds and os.path.isdir(word) else option
    return f"{word!r} stands without the name of a setting; write --{option} {word}. See --help."


def _check_texts(values: Any, key: str = "") -> None:
    """Check each setting, option and item of a list that is a text.

    Raises:
        ValueError: It is empty, or holds what no file and no name can: names it.
    """
    if values == "":
        raise ValueError(f"{key} is empty, as of a variable that is not set; give it a value, or leave it out.")
    if isinstance(values, str) and NO_TEXT.search(values):
        raise ValueError(f"{key} is {str(values)!r}; it may hold neither NUL nor bytes that are not UTF-8.")
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, each in items:
        _check_texts(each, f"{key}.{name}" if key else str(name))


def _braces(name: str, value: str) -> dict[str, Any]:
    """Read the {KEY: VALUE, ...} of an option.

    Raises:
        ValueError: It is no mapping, as when the shell has cut it at its spaces.
    """
    try:
        return parse_yaml(value)
    except ValueError as error:
        raise ValueError(
            f"--{name} is {value!r}, which cannot be read: {error}. Write it in quotes: --{name} '{{KEY: VALUE, ...}}'."
        ) from None


def _owner(key: str, kinds: dict[str, Any]) -> str | None:
    """Find the setting that `key` is, or is an option of."""
    if key in kinds:
        return key
    return next((k for k, kind in kinds.items() if is_spec(kind) and key.startswith(f"{k}.")), None)


def _merge(found: dict[str, Any], more: dict[str, Any], cls: type) -> None:
    """Let the settings of a file override; a group in it that is empty changes nothing.

    Raises:
        ValueError: A group that is a value.
    """
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    for name, value in more.items():
        if "." in name and _owner(name, dict(leaves(cls))):
            _put(found, name, value, cls)
        elif not dataclasses.is_dataclass(fields.get(name)):
            found[name] = value
        elif isinstance(value, dict):
            _merge(found.setdefault(name, {}), value, fields[name])
        elif not (isinstance(value, Plain) and value in NULLS):
            raise ValueError(refused(name, value, fields[name], {"type": "dataclass_type"}))


def _keys(settings: Any, prefix: str = "") -> set[str]:
    """List the dotted names of all that nested dicts say."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix(".")}
    return {key for name, value in settings.items() for key in _keys(value, f"{prefix}{name}.")}


def _forget_replaced(found: dict[str, Any], given: Collection[str], cls: type, spare: Collection[str] = ()) -> None:
    """Let settings that are given now, such as model.size, take the place of what was said before in other words.

    Args:
        found: The settings until now.
        given: Dotted names of those that come now.
        cls: The dataclass of all settings.
        spare: Settings that stand together with these, and stay.
    """
    for key, replaced in replaced_settings(cls).items():
        for name in replaced if key in given else ():
            *groups, last = name.split(".")
            group = functools.reduce(lambda inner, part: inner.get(part) or {}, groups, found)
            if name not in spare:
                group.pop(last, None)


def _put(found: dict[str, Any], key: str, value: Any, cls: type) -> None:
    """Set one setting, or one option of a spec, which begins as its default; a bare name leaves the other options."""
    owner = _owner(key, dict(leaves(cls)))
    *groups, last = owner.split(".")
    for group in groups:
        found = found.setdefault(group, {})
        cls = next(f.type for f in dataclasses.fields(cls) if f.name == group)
    field, options = next(f for f in dataclasses.fields(cls) if f.name == last), key.removeprefix(owner).split(".")[1:]
    if is_spec(field.type) and (options or (isinstance(value, str) and value not in NULLS)):
        found[last] = found = _as_dict(found.get(last, default_of(field)))
        *inner, last = options or ["name"]
        for option in inner:
            found[option] = found = _as_dict(found.get(option))
    found[last] = value


def _as_dict(spec: Any) -> dict[str, Any]:
    """Copy a spec, so that options can be added to it; one that is a name becomes the name in it."""
    if isinstance(spec, dict):
        return dict(spec)
    return {"name": spec} if isinstance(spec, str) and spec not in NULLS else {}


def _check_parts(values: dict[str, Any], parts: Registries) -> None:
    """Raise ValueError if images are given as the name of their kind: --data DIR for --data.images DIR."""
    for key in "data", "eval.data":
        spec = functools.reduce(lambda group, name: group.get(name) or {}, key.split("."), values)
        name = spec.get("name") if isinstance(spec, dict) else None
        if isinstance(name, str) and name not in parts.get("data", ()) and os.path.exists(expanded(name)):
            what = "a folder" if os.path.isdir(expanded(name)) else "a file"
            raise ValueError(f"{key}.name is {name!r}, which is {what}; name images by --{key}.images {name}.")


def _check_choices(values: dict[str, Any], choices: Registries) -> None:
    """Raise ValueError if a word of nested settings is not a name in the registry of its setting."""
    for setting, registry in choices.items():
        words = functools.reduce(lambda group, name: (group or {}).get(name), setting.split("."), values)
        for word in [words] if isinstance(words, str) else words or []:
            lookup(registry, word, setting)


def _with_defaults(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Complete the settings; what has to be given and was not, is null."""
    found = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            found[f.name] = _with_defaults(f.type, values.get(f.name, {}))
        else:
            default = default_of(f)
            found[f.name] = values.get(f.name, None if default is dataclasses.MISSING else default)
    return found


def report_errors(prog: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a program's main: a user's mistake ends it with its sentence and exit code 2, Ctrl-C with 130.

    A mistake is an OSError, or a ValueError that this project's own code raised; any other keeps its traceback.
    What is printed ends nothing; see `terminal.steady_output`.
    """

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(main)
        def wrapped(argv: Sequence[str] | None = None) -> None:
            with steady_output():
                try:
                    main(argv)
                except (ValueError, OSError) as error:
                    raised_in, sentence = _origin(error)
                    if not (isinstance(error, OSError) or _is_ours(raised_in)):
                        raise
                    print(f"{prog}: {sentence}", file=sys.stderr)
                    raise SystemExit(2) from None
                except KeyboardInterrupt:
                    print(f"{prog}: interrupted; the same command goes on.", file=sys.stderr)
                    raise SystemExit(130) from None

        return wrapped

    return decorate


def _is_ours(file: Path) -> bool:
    """Say whether a file is of this project: of one of its packages, or else in the clone."""
    if ROOT not in file.parents:
        return False
    parts = file.relative_to(ROOT).parts
    return parts[0] in PACKAGES or ((ROOT / "pyproject.toml").is_file() and "site-packages" not in parts)


def _origin(error: Exception) -> tuple[Path, str]:
    """Find the file that raised an error, and its sentence; torch passes those of its data workers on as text."""
    file, sentence = traceback.extract_tb(error.__traceback__)[-1].filename, str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        sentence = f"{str(name)!r}: {error.strerror}."
    if sentence.startswith("Caught ") and "DataLoader worker" in sentence:
        file = re.findall(r'File "([^"]+)"', sentence)[-1]
        sentence = re.split(r"\n[\w.]+: ", sentence)[-1].strip()
    return Path(file).resolve(), sentence
