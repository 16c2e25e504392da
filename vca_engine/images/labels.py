"""The class of each of your own images: by its folder, or by a file of labels beside them."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Self

import numpy as np

from vca_engine.config.reading import Strict
from vca_engine.config.schema import require
from vca_engine.images import SUFFIXES, ImageFiles


def classes_of(files: ImageFiles) -> tuple[list[str], np.ndarray, list[str]]:
    """Find the names of the images, their classes (N,) int64 and the names of these.

    A class is what the file of labels says, or else a folder, in alphabetical order; images below it belong to it.

    Raises:
        ValueError: An image without a class, a class without images, or a file of labels that does not fit the images.
    """
    if files.labels:
        return _read_labels(files)
    loose = [name for name in files.names if "/" not in name]
    if loose:
        raise ValueError(
            f"data.images '{files.root}' holds images without a class, {loose[0]!r} and {len(loose) - 1} more: put "
            "each into a folder with the name of its class, or write a labels.csv of lines FILE,CLASS."
        )
    owners = [name.split("/", 1)[0] for name in files.names]
    if empty := sorted({*files.folders} - {*owners}):
        raise ValueError(f"the class folder {files.path(empty[0])!r} holds no images; remove it, or put some in.")
    number = {name: k for k, name in enumerate(files.folders)}
    return files.names, np.array([number[owner] for owner in owners], dtype=np.int64), files.folders


def _read_labels(files: ImageFiles) -> tuple[list[str], np.ndarray, list[str]]:
    """Read the classes of labels.json or labels.csv, which are numbers from 0, or names.

    labels.json: `{"FILE": CLASS, ...}`, or `{"labels": [["FILE", CLASS], ...], "class_names": [...]}`, which is
    StyleGAN's and EDM's, with names. labels.csv: lines `FILE,CLASS`, perhaps with a header. Names are numbered in the
    order of `class_names`, or else in that of the alphabet.
    """
    where = files.path(files.labels)
    pairs, class_names = (_pairs_of_json if files.labels.endswith("json") else _pairs_of_csv)(files, where)
    listed, there = {file for file, _ in pairs}, {*files.names}
    if missing := sorted(listed - there):
        raise ValueError(
            f"{where!r} names {missing[0]!r}, which is not there ({len(missing)} of {len(listed)} are missing)."
        )
    if unlisted := sorted(there - listed):
        raise ValueError(
            f"{where!r} gives {unlisted[0]!r} no class ({len(unlisted)} of {len(there)} images have none)."
        )
    if len(listed) < len(pairs):
        raise ValueError(f"{where!r} names an image twice.")
    values = [value for _, value in sorted(pairs)]
    if class_names is not None and len({*class_names}) < len(class_names):
        raise ValueError(f"{where!r} has a class name twice.")
    if all(isinstance(value, str) and value for value in values):
        class_names = class_names or sorted({*values})
        if unknown := sorted({*values} - {*class_names}):
            raise ValueError(f"{where!r} has the class {unknown[0]!r}, which is not one of its class_names.")
        number = {name: k for k, name in enumerate(class_names)}
        labels = [number[value] for value in values]
    elif all(type(value) is int for value in values):
        labels = [max(min(value, 2**62), -(2**62)) for value in values]  # whatever is out of range stays so
        highest = max(values)
        if class_names is None and min(values) >= 0 and (highest >= len(values) or len({*values}) <= highest):
            raise ValueError(
                f"{where!r} has class numbers up to {highest} with gaps; number them from 0, or give names."
            )
        class_names = class_names or [str(k) for k in range(highest + 1)]
    else:
        raise ValueError(f"{where!r} has classes that are neither all whole numbers nor all names.")
    return files.names, np.array(labels, dtype=np.int64), class_names


def _pairs_of_json(files: ImageFiles, where: str) -> tuple[list[tuple[str, Any]], list[str] | None]:
    try:
        listed = json.loads(files.read(files.labels), object_pairs_hook=list)  # which keeps a key that stands twice
        if not (isinstance(listed, list) and all(isinstance(pair, tuple) for pair in listed)):
            raise ValueError("it is no object")
        content = dict(listed)
        names = content.get("class_names")
        if names is not None and not (
            isinstance(names, list) and all(isinstance(n, str | int) for n in names) and names
        ):
            raise ValueError("class_names is no list of names")
        if isinstance(content.get("labels"), list):
            pairs = [(str(file), value) for file, value in content["labels"]]
        else:
            pairs = [(file, value) for file, value in listed if file != "class_names"]
        return pairs, None if names is None else [str(name) for name in names]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{where!r} cannot be read ({error}); write {{"FILE": CLASS, ...}} or {{"labels": [["FILE", CLASS], ...]}}.'
        ) from None


def _pairs_of_csv(files: ImageFiles, where: str) -> tuple[list[tuple[str, Any]], None]:
    try:
        lines = files.read(files.labels).decode("utf-8-sig").splitlines()
        rows = [row for row in csv.reader(lines, skipinitialspace=True) if row]
        pairs = [(file.strip(), value.strip()) for file, value in rows]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{where!r} cannot be read ({error}); write lines FILE,CLASS.") from None
    if pairs and pairs[0][0] not in {*files.names} and PurePosixPath(pairs[0][0]).suffix.lower() not in SUFFIXES:
        pairs = pairs[1:]  # a header
    if not all(re.fullmatch(r"-?[0-9]+", value) for _, value in pairs):
        return pairs, None
    numbers = {int(value) for _, value in pairs}
    padded = any(re.match("-?0[0-9]", value) for _, value in pairs)
    if padded and numbers != {
        *range(len(numbers))
    }:  # names such as 007; 00, 01, 02 are numbers, as they have always been
        return pairs, None
    return [(file, int(value)) for file, value in pairs], None


def check_label_range(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Give the labels (N,) back, if they are those of the classes.

    Raises:
        ValueError: There are none, or one is not in 0 ... num_classes - 1; says which.
    """
    if len(labels) == 0:
        raise ValueError("the data holds no images.")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"image {wrong[0]} has label {labels[wrong[0]]}, but there are {num_classes} classes, 0 ... "
            f"{num_classes - 1}."
        )
    return labels


@dataclass(frozen=True)
class DataInfo(Strict):
    """The facts of the data that a model depends on, kept in each checkpoint so that sampling needs no data.

    Args:
        image_size: Side of the square images.
        channels: Of the images.
        class_names: Of the labels 0, 1, ...
    """

    image_size: int
    channels: int
    class_names: list[str]

    @classmethod
    def of(cls, data: Any) -> Self:
        """Describe a dataset, of images or of latents."""
        return cls(data.image_size, data.channels, data.class_names)

    def __post_init__(self) -> None:
        require(self.image_size > 0, "image_size", self.image_size, "choose at least 1")
        require(self.channels > 0, "channels", self.channels, "choose at least 1")
        require(bool(self.class_names), "class_names", self.class_names, "a model has at least one class")
