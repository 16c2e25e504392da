"""Classes to draw: by number or name, a few of many, at random."""

import operator
import re
from collections.abc import Sequence

import numpy as np

from vca.registry import nearest
from vca_engine.images.label_files import composed


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raise ValueError if a label is not in 0 ... num_classes - 1."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} does not exist; this model has classes 0 ... {num_classes - 1}.")


def find_class(word: int | str, names: Sequence[str]) -> int:
    """Find the number of a class from its number or its name.

    A name is that of the class, or one of several between commas (ImageNet's "tench, Tinca tinca"); capitals and
    Unicode's forms of one letter do not matter. A word that is a number as Python writes it (10, not 010) is one,
    unless a class is named so. An int is always a number.

    Raises:
        ValueError: There is no such class, or more than one.
    """
    if isinstance(word, bool):
        raise ValueError(f"class {word} is neither a number nor a name.")
    if not isinstance(word, str):
        number = operator.index(word)
        check_labels([number], len(names))
        return number
    wanted = composed(word.strip().lower())
    known = [composed(name.lower()) for name in names]
    whole = [k for k, name in enumerate(known) if name == wanted]
    parts = [k for k, name in enumerate(known) if wanted in (part.strip() for part in name.split(","))]
    found = whole or parts
    if len(found) == 1:
        return found[0]
    if found:
        text = ", ".join(f"{k} ({names[k]})" for k in found[:5])
        raise ValueError(f"class {word!r} is the name of several: {text}; choose one by its number.")
    if re.fullmatch(r"0|-?[1-9][0-9]*", wanted):
        return find_class(int(wanted), names)
    known = {part.strip().lower() for name in names for part in (name, *name.split(","))}
    shown = names if len(names) <= 4 else [*names[:3], "...", names[-1]]
    hint = nearest(wanted, sorted(known), most=3) or f" it has {len(names)} classes, {', '.join(shown)}."
    raise ValueError(f"class {word!r} is no class of this model;{hint}")


def find_classes(words: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Find the numbers of classes; a single word that is no name may be several between commas: "3,goldfish".

    Raises:
        ValueError: There is no such class, or more than one, see `find_class`.
    """
    if (
        len(words) == 1
        and isinstance(words[0], str)
        and composed(words[0].strip().lower()) not in (composed(name.lower()) for name in names)
    ):
        words = words[0].split(",")
    return [find_class(word, names) for word in words]


def evenly_spaced_classes(classes: Sequence[int], most: int = 10) -> list[int]:
    """Choose all classes, or `most` evenly spaced ones."""
    columns = min(most, len(classes))
    return [classes[i * len(classes) // columns] for i in range(columns)]


def random_label(seed: int, index: int, num_classes: int) -> int:
    """Give the uniformly random label of image `index`, a function of (seed, index)."""
    return int(np.random.default_rng([seed, index, 1]).integers(num_classes))
