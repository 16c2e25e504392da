"""Words that a person types, or a file says, as settings: the type of a field decides what a word is.

    "010", no, null, 1e3, 12:30    where text is meant: that text
    2e-4, 400_000, 1e6, true, null    where a number, a truth value or nothing is meant: that

A value may be nested dicts and lists of words. One that does not fit ends in a sentence. None names a class or
function to be called: that is what registries are for, in which a word finds an entry of this program or none.
"""

import collections.abc
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from vca import annotations_of, describe_type, members_of, nearest
from vca_engine.config.yamlfile import NULLS, TRUTH, Plain, parse_yaml
from vca_engine.files import expanded

LARGEST = 1_000_000  # of the numbers among the options of a part


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Give back the options of a part, if each of their numbers is finite and at most `LARGEST`.

    Raises:
        ValueError: One of them is not; names it by its place in the part.
    """
    for option, value in options.items():
        if isinstance(value, dict):
            try:
                check_options(value)
            except ValueError as error:
                raise ValueError(f"{option}.{error}") from None
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, int | float) and not abs(each) <= LARGEST:  # NaN, too
                raise ValueError(f"{option} is {value!r}; choose at least {-LARGEST:,}, at most {LARGEST:,}.")
    return options


Spec = Annotated[dict[str, Any], AfterValidator(check_options)]
FILE = "a file, a folder, or where one is to be"  # what marks the type of a path
FilePath = Annotated[str, FILE]  # ~ at its start is the home folder
Registries = Mapping[str, Mapping[str, Any]]  # name of a field or option that is a name with options -> its registry
Settings = TypeVar("Settings")  # a dataclass
MEANT = {  # a word that people type -> last part of the settings that it may stand for
    **dict.fromkeys(("learning_rate", "base_lr"), ("lr",)),
    **dict.fromkeys(("batch", "bs"), ("batch_size",)),
    **dict.fromkeys(("cfg", "guidance", "guidance_scale"), ("cfg_scale",)),
    **dict.fromkeys(("steps", "num_inference_steps", "num_sampling_steps"), ("num_steps",)),
    **dict.fromkeys(("output", "output_dir"), ("out", "run_dir")),
    "resolution": ("image_size",),
}
OPTIONS = {  # of a part -> a setting that the programs have which take this option
    "sampler.num_steps": "sampler",
    "data.images": "data",
    "data.image_size": "codec",  # of others than sample.py, which knows it
}
EPOCHS = ("epoch", "epochs", "num_epochs")
ITEM = re.compile(r"""\s*(?:'((?:[^']|'')*)'|"([^"]*)"|([^,]*?))\s*(?:,|$)""")  # of a list on a command line


class MissingSettingError(ValueError):
    """Settings that have to be given and are not; names them."""


class Strict:
    """Base of the dataclasses that are read: no other fields than theirs, and finite numbers in their ranges.

    The range of a number is said by the type of its field; it is checked whoever makes the object.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of the range of its field."""
        for name, (kind, adapter) in _field_adapters(type(self)).items():
            try:
                adapter.validate_python(getattr(self, name))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                raise ValueError(refused(name, getattr(self, name), kind, first)) from None


class Word(str):
    """A word of a command line: [a,b] and {a: b} are a list and a mapping where the setting takes one."""

    __slots__ = ()


def from_dict(cls: type[Settings], values: Mapping[str, Any], where: str, parts: Registries | None = None) -> Settings:
    """Make an instance of a dataclass from nested dicts, of JSON values or of words.

    Args:
        cls: The dataclass.
        values: What differs from its defaults.
        where: Where that stands, for the error.
        parts: Registries whose entries say of what type the options of specs are; not needed where these are JSON
            values.

    Raises:
        ValueError: A key or value that does not fit.
    """
    try:
        if not isinstance(values, dict):
            raise ValueError(f"the settings are {values!r}; they must be names with values")
        return validate(cls, typed(cls, values, parts or {}))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def validate(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Make an instance of a dataclass from nested dicts of JSON values.

    Raises:
        ValueError: A key or value that does not fit, with what is allowed there.
    """
    try:
        return _adapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _mistake(cls, values, error) from None


def typed(cls: type, values: Mapping[str, Any], parts: Registries) -> dict[str, Any]:
    """Turn each word of nested dicts into what its field takes; another stays as it is, for `validate` to refuse."""
    kinds, found = {f.name: f.type for f in dataclasses.fields(cls)}, {}
    for name, value in values.items():
        kind = kinds.get(name, Any)
        if dataclasses.is_dataclass(kind):
            found[name] = typed(kind, value, parts) if isinstance(value, dict) else as_type(value, Any)
        elif is_spec(kind):
            found[name] = _as_spec(value, name, parts)
        else:
            found[name] = as_type(value, kind)
    return found


def as_type(value: Any, kind: Any) -> Any:
    """Turn a word, or a list or dict of words, into JSON of the type `kind`, if it can be that."""
    if is_path(kind):
        found = as_type(value, str | None if NoneType in members_of(kind) else str)
        return expanded(found) if isinstance(found, str) else found
    kinds = members_of(kind)
    if isinstance(value, Word):
        value = _unpacked(value, kinds)
    if isinstance(value, dict):
        return {str(key): as_type(each, Any) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_type(each, item) for each, item in zip(value, _items(kinds, len(value)), strict=True)]
    if type(value) is int and str in kinds and int not in kinds:  # of a file that was written when 007 was a number
        return str(value)
    if not isinstance(value, str):
        return value
    if isinstance(value, Plain) and (value == "" or (value in NULLS and {NoneType, Any} & {*kinds})):
        return None
    if item := next((get_args(k)[0] for k in kinds if get_origin(k) is list and str not in kinds), None):
        return [as_type(value, item)]  # a list of one
    if str in kinds or any(value in get_args(k) for k in kinds if get_origin(k) is Literal):
        return str(value)
    if Any in kinds and isinstance(value, Plain):
        kinds = (int, float, bool) if value.lower() in ("true", "false") or value[:1] in "+-.0123456789" else ()
    for kind, read in ((int, _integer), (float, _number), (bool, _truth)):
        if kind in kinds and (found := read(value)) is not None:
            return found
    number = _number(value) if isinstance(value, Plain) and {int, bool} & {*kinds} else None
    return str(value) if number is None else number  # 2.5 for a whole number is refused as 2.5, not as '2.5'


def is_spec(kind: Any) -> bool:
    """Say whether a field or option of this type is a name with options."""
    return any(get_origin(member) in (dict, collections.abc.Mapping) for member in members_of(kind))


def is_path(kind: Any) -> bool:
    """Say whether a field or option of this type is a path."""
    return any(FILE in getattr(member, "__metadata__", ()) for member in (kind, *get_args(kind)))


def bounds_of(kind: Any) -> str:
    """Say which numbers a type allows, e.g. "at least 1, below 1,000"; of a list or pair, which each of them may be."""
    for member in (kind, *get_args(kind)):
        bounds = {}
        for data in getattr(member, "__metadata__", ()):
            for bound in getattr(data, "metadata", ()):  # of a pydantic Field
                bounds |= dataclasses.asdict(bound)
        if bounds:
            say = {name: f"{value:,}" if isinstance(value, int) else f"{value:g}" for name, value in bounds.items()}
            words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
            return ", ".join(f"{words[name]} {say[name]}" for name in words if name in say)
        if member is not kind and (inner := bounds_of(member)):
            return inner
    return ""


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and type of each setting; of groups of them, too, whose type is a dataclass."""
    for f in dataclasses.fields(cls):
        yield prefix + f.name, f.type
        if dataclasses.is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")


def replaced_settings(cls: type, prefix: str = "") -> dict[str, list[str]]:
    """Find the settings that stand for others of their group: dotted name -> dotted names of those."""
    found = {}
    for f in dataclasses.fields(cls):
        if names := f.metadata.get("replaces"):
            found[prefix + f.name] = [prefix + name for name in names]
        if dataclasses.is_dataclass(f.type):
            found |= replaced_settings(f.type, f"{prefix}{f.name}.")
    return found


def unknown(key: str, known: Sequence[str], typed: bool = False) -> str:
    """Write the sentence for a setting that does not exist, with those that may be meant.

    Args:
        key: Its name.
        known: Names of the settings that exist.
        typed: Write these as on a command line, --train.lr.
    """
    word, known = key.rpartition(".")[2], [*known, *(name for name, owner in OPTIONS.items() if owner in known)]
    if word in EPOCHS and "train.num_steps" in known:
        steps = "E epochs of M images are E * M / train.batch_size steps"
        return f"{key!r} is not a setting; training counts steps: {steps}. Give {'--' * typed}train.num_steps."
    last = {name: name.rpartition(".")[2] for name in known}
    found = [name for name in known if last[name] in MEANT.get(word, (word,))]
    if not found and "." in key:
        found = get_close_matches(key, known, 1)
    if not found:
        close = get_close_matches(word, last.values(), 1)
        found = [name for name in known if last[name] in close]
    found.sort(key=lambda name: not name.startswith("train."))  # else in the order of --help
    hint = " or ".join(f"--{name}" if typed else repr(name) for name in found[:3])
    return f"{key!r} is not a setting;{f' did you mean {hint}?' if hint else ''} see --help all."


@functools.cache
def _field_adapters(cls: type) -> dict[str, tuple[Any, TypeAdapter]]:
    """Make what checks each field of a dataclass, with its type; one that is a dataclass checks itself."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(f.type)}
    config = ConfigDict(allow_inf_nan=False)
    return {name: (kind, TypeAdapter(kind, config=config)) for name, kind in kinds.items()}


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _items(kinds: tuple[Any, ...], num: int) -> list[Any]:
    """List the type of each of the items of a list, where one of `kinds` is a list or tuple."""
    for kind in kinds:
        args = get_args(kind)
        if get_origin(kind) is tuple and len(args) == num:
            return list(args)
        if get_origin(kind) in (list, collections.abc.Sequence):
            return [args[0]] * num
    return [Any] * num


def _unpacked(word: Word, kinds: tuple[Any, ...]) -> Any:
    """Take a word of a command line out of its brackets, or as text where text is meant and there is some."""
    origins, ends = {get_origin(kind) for kind in kinds}, word[:1] + word[-1:]
    if ends == "[]" and (Any in kinds or origins & {list, tuple, collections.abc.Sequence}):
        return _split(word[1:-1])
    if ends == "{}" and (Any in kinds or origins & {dict, collections.abc.Mapping}):
        return parse_yaml(word)
    return str(word) if word and (str in kinds or list[str] in kinds) else Plain(word)


def _split(text: str) -> list[str]:
    """Split a text into the words between commas, of which those in quotes may hold commas."""
    text, found, end = text.strip(), [], 0
    while end < len(text):
        item = ITEM.match(text, end)
        single, double, word = item.groups()
        quoted = single.replace("''", "'") if single is not None else double
        found.append(Word(word) if quoted is None else quoted)
        end = item.end()
    return found


def _as_spec(value: Any, part: str, parts: Registries) -> Any:
    """Turn each option of a spec into what the entry of its name takes; without a name, the first entry with it."""
    if isinstance(value, Word) and value[:1] == "{":
        value = parse_yaml(value)
    if isinstance(value, Plain | Word) and value in NULLS:
        return None
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        return as_type(value, Any)
    registry, name, kinds = parts.get(part, {}), value.get("name"), {}
    named = [registry[name]] if isinstance(name, str) and name in registry else []
    for entry in [*reversed(registry.values()), *named]:
        kinds |= annotations_of(entry)
    found = {}
    for option, each in value.items():
        kind = kinds.get(option, str if option == "name" else Any)
        if option in parts and is_spec(kind):
            found[option] = str(each) if isinstance(each, str) and each[:1] != "{" else _as_spec(each, option, parts)
        else:
            found[option] = as_type(each, kind)
    return found


def _integer(word: str) -> int | None:
    """Read 400_000, 0x10 and 1e6, but not 010, which has been 8 and 10."""
    try:
        return int(word, 0)
    except ValueError:
        number = _number(word) if "e" in word.lower() else None
    return int(number) if number is not None and number.is_integer() and abs(number) < 2**53 else None


def _number(word: str) -> float | None:
    """Read 2e-4, .5, nan; not 010."""
    try:
        return None if re.match(r"[+-]?0[\d_]", word) else float(word)
    except ValueError:
        return None


def _truth(word: str) -> bool | None:
    return TRUTH.get(word.lower())


def _mistake(cls: type, values: Mapping[str, Any], error: ValidationError) -> ValueError:
    """Choose among the mistakes that pydantic found: an unknown setting, then a wrong value, then what is missing."""
    kinds, found = dict(leaves(cls)), error.errors(include_url=False)
    missing = [str(e["loc"][0]) for e in found if e["type"].startswith("missing") and len(e["loc"]) == 1]
    wrong = next((e for e in found if e["type"] == "unexpected_keyword_argument"), None)
    if wrong:
        return ValueError(unknown(".".join(map(str, wrong["loc"])), list(kinds)))
    wrong = next((e for e in found if len(e["loc"]) != 1 or not e["type"].startswith("missing")), None)
    if wrong is None:
        if {"process", "data", "codec"} & {*missing}:
            more = "They stand in the files of configs/: type --config FILE, e.g. --config configs/digits_sit.yaml."
        elif missing == ["checkpoint"]:
            more = "Type the folder of a run, e.g. runs/demo, as the first word."
        else:
            more = f"Type --{missing[0]} VALUE."
        return MissingSettingError(f"the following arguments are required: {', '.join(missing)}. {more}")
    key, value = "", values
    for part in wrong["loc"]:
        if f"{key}.{part}".lstrip(".") not in kinds:
            break
        key, value = f"{key}.{part}".lstrip("."), value[part]
    if wrong["type"] == "value_error" and not is_spec(kinds.get(key)):  # of the dataclass itself
        return wrong["ctx"]["error"]
    return ValueError(refused(key, value, kinds.get(key), wrong))


def refused(key: str, value: Any, kind: Any, error: Mapping[str, Any]) -> str:
    """Write the sentence for a value that a setting cannot have: what pydantic says of it has a type and a context."""
    what = error["type"]
    if what == "value_error":  # of an option of a part
        return f"{key}.{error['ctx']['error']}"
    given = "null" if value is None else repr(value)
    choices = [word for member in members_of(kind) if get_origin(member) is Literal for word in get_args(member)]
    if what == "json_invalid":
        return "a value is not text in UTF-8."
    if what == "finite_number":
        return f"{key} is {given}; it must be a finite number."
    if what in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{key} is {given}; choose {bounds_of(kind)}."
    if dataclasses.is_dataclass(kind):
        return f"{key} is {given}; it is a group of settings, such as {key}.{dataclasses.fields(kind)[0].name}."
    if choices:
        return f"{key} is {given};{nearest(str(value), choices)} choose one of {choices}."
    if is_spec(kind):
        return f"{key} is {given}; it is a name with options, so write {key}.name."
    return f"{key} is {given}; it must be {describe_type(kind)}."
