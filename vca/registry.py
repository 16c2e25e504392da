"""A choice is a word, an entry of a dict, and a class: the functions that turn the first into the last."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

TYPES = {  # type -> how it is called in an error and in --help
    int: "a whole number (int)",
    float: "a number (float)",
    bool: "true or false (bool)",
    str: "text",
    NoneType: "null",
}
LISTS = {str: "text", float: "numbers (float)", int: "whole numbers (int)"}  # type of the items -> the same


def nearest(word: str, choices: Iterable[str], most: int = 1) -> str:
    """Write `" did you mean 'linear'?"` with the `most` of `choices` that are close to `word`; "" if none is."""
    close = difflib.get_close_matches(str(word), list(choices), n=most)
    return f" did you mean {' or '.join(map(repr, close))}?" if close else ""


def lookup(registry: Mapping[str, Any], name: str, where: str) -> Any:
    """Find the entry called `name`.

    Args:
        registry: name -> entry.
        name: The word that the user wrote.
        where: What the word is called in the config, for the error, e.g. `process.path`.

    Raises:
        ValueError: No such entry; says the nearest name and all of them.
    """
    if not isinstance(name, str) or name not in registry:  # a mapping has no hash
        raise ValueError(f"{where} is {name!r};{nearest(name, registry)} choose one of {sorted(registry)}.")
    return registry[name]


def lookup_spec(registry: Mapping[str, Any], spec: str | Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """Find the entry that `spec` names, and give it with the spec as a dict with its name.

    Raises:
        ValueError: It has no name, or an unknown one.
    """
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in spec:
        raise ValueError(f"{where} is {spec}; it needs a name, one of {sorted(registry)}.")
    return lookup(registry, spec["name"], f"{where}.name"), spec


def options_of(entry: Callable[..., Any]) -> list[str]:
    """List the keyword-only arguments of a class or function: the options that a config may set."""
    parameters = inspect.signature(entry).parameters.values()
    return sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def annotations_of(entry: Callable[..., Any]) -> dict[str, Any]:
    """Give the options of a class or function, with their types."""
    parameters = inspect.signature(entry).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}


def defaults_of(entry: Callable[..., Any]) -> dict[str, Any]:
    """Give the options of a class or function that have a default, with that."""
    parameters = inspect.signature(entry).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def create(registry: Mapping[str, Any], spec: str | Mapping[str, Any], where: str, *args: Any, **given: Any) -> Any:
    """Call the entry that `spec` names with `args`, the options in `spec`, and `given`.

    Args:
        registry: name -> class or function whose keyword-only arguments are its options.
        spec: A name, or `{"name": ..., option: value, ...}`.
        where: What the spec is called in the config, for the errors.
        *args: Positional arguments of the entry.
        **given: Keyword arguments that the program supplies; a spec cannot set them.

    Raises:
        ValueError: The spec has no name, an unknown one, an option that the entry does not take or of a wrong type, or
            lacks one that it needs.
    """
    entry, options = lookup_spec(registry, spec, where)
    name = options.pop("name")
    allowed = [option for option in options_of(entry) if option not in given]
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"{where} {name!r} takes no {option!r};{nearest(option, allowed)} it takes {allowed}. "
                f"If it stands in the file of --config, replace all of {where} there or here: {{name: {name}}}."
            )
        check_type(entry, option, options[option], f"{where} {name!r}")
    parameters = inspect.signature(entry).parameters
    missing = [o for o in allowed if o not in options and parameters[o].default is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"{where} {name!r} needs {missing[0]!r}, so give {where}.{missing[0]}.")
    return entry(*args, **options, **given)


def check_type(entry: Callable[..., Any], option: str, value: Any, where: str) -> None:
    """Raise ValueError if a value is not of the type of an option: a number, a word, a truth value, a list, a mapping.

    Which numbers and words are right is the entry's own business.
    """
    kind = annotations_of(entry)[option]
    if not any(_is(member, value) for member in members_of(kind)):
        finite = not isinstance(value, float) or math.isfinite(value)
        allowed = describe_type(kind) if finite else "a finite number"
        raise ValueError(f"{where}: {option} is {value!r}; it must be {allowed}.")


def members_of(kind: Any) -> tuple[Any, ...]:
    """List the types of a union, or the one type, without what is annotated of them."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(get_args(member)[0] if get_origin(member) is Annotated else member for member in members)


def describe_type(kind: Any) -> str:
    """Put the type of a setting or an option into words, without classes whose objects only a program can make."""
    return " or ".join(filter(None, map(_describe, members_of(kind)))) or "a value"


def _describe(kind: Any) -> str:
    origin, items = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {list(items)}"
    if origin is tuple:
        words = ",".join(get_args(item)[0] for item in items if get_origin(item) is Literal)
        numbers = "2,3" if (int,) in map(members_of, items) else "0.1,0.9"
        return f"{len(items)} values, written so: [{words or numbers}]"
    if origin in (list, Sequence):
        return f"a list of {LISTS.get(members_of(items[0])[0], 'values')}, written so: [3,7]"
    return "a name with options" if origin in (dict, Mapping) else TYPES.get(kind, "")


def _is(kind: Any, value: Any) -> bool:
    """Say whether a value is of a kind: a whole or finite number, a truth value, a word, None, a list or a mapping."""
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    origin = get_origin(kind)
    allowed = {Literal: str, tuple: list | tuple, Sequence: list | tuple, Mapping: Mapping}.get(origin, kind)
    if allowed in (bool, str, NoneType, list | tuple, Mapping):
        return isinstance(value, allowed)
    # Any other kind is that of an object, which a program has made: no value of a file is one.
    return not isinstance(value, bool | int | float | str | None | list | dict)
