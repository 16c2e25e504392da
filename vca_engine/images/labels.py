"""The class of each of your own images: by its folder, or by a file of labels beside them."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from vca_engine.config.reading import Strict
from vca_engine.config.schema import require
from vca_engine.images.files import ImageFiles, by_suffix
from vca_engine.images.label_files import Labels, composed, read_label_files

MOST_CHARACTERS = 240  # of a list of classes with their counts
# Folders of the parts of a data set, such as train2017; several of them beside each other are hardly its classes.
SPLIT = re.compile(r"(train(ing)?|val(id|idation)?|dev|eval(uation)?|test(ing)?|holdout|unlabeled)([\W\d_].*)?", re.I)


def classes_of(files: ImageFiles) -> tuple[np.ndarray, list[str], list[str]]:
    """Find the classes of the images (N,) int64, the names of these, and sentences that the user should read.

    A class is what a file of labels says, or else a folder, in alphabetical order; images below it belong to it.

    Raises:
        ValueError: An image without a class, a class without images, or a file of labels that does not fit the images.
    """
    labels, notes = read_label_files(files)
    if not (labels and labels.own):
        _check_splits(files)
    classes, names = _numbered(labels) if labels else _by_folder(files, notes)
    _check_names(names, labels.where if labels else str(files.root))
    return classes, names, notes + files.warnings()


def _by_folder(files: ImageFiles, notes: list[str]) -> tuple[np.ndarray, list[str]]:
    loose = [name for name in files.names if "/" not in name]
    if loose:
        raise ValueError(
            f"data.images '{files.root}' holds images without a class, {loose[0]!r} and {len(loose) - 1} more: put "
            "each into a folder with the name of its class, or write a labels.csv of lines FILE,CLASS."
            + "".join(f" {note}" for note in notes)
        )
    owners = [name.split("/", 1)[0] for name in files.names]
    if empty := sorted({*files.folders} - {*owners}):
        there = [name for name in files.left_out if name.startswith(f"{empty[0]}/")]
        found = f" that can be read ({by_suffix(there)})" if there else ""
        raise ValueError(
            f"the class folder {files.path(empty[0])!r} holds no images{found}; remove it, or put some in."
        )
    number = {name: k for k, name in enumerate(files.folders)}
    return np.array([number[owner] for owner in owners], dtype=np.int64), files.folders


def _check_splits(files: ImageFiles) -> None:
    """Raise ValueError if the first folders that differ are those of the parts of a data set."""
    folders = [files.prefix + os.path.dirname(name) for name in files.names]
    above = os.path.commonpath(folders)
    first = {folder[len(above) :].lstrip("/").split("/", 1)[0] for folder in folders}
    parts = sorted(name for name in first if SPLIT.fullmatch(name))
    if len(parts) > 1:
        one = next((name for name in parts if name.lower().startswith("train")), parts[0])
        give = f"unpack it, and name one, --data.images FOLDER/{one}"
        if not files.zipped:
            give = f"name one, --data.images {files.path_below_root(os.path.join(above, one))}"
        raise ValueError(
            f"data.images '{files.root}' holds the folders {', '.join(parts)}, which look like the parts of a data set "
            f"and not like classes: {give}. If they are classes, write a labels.csv of lines FILE,CLASS."
        )


def _numbered(labels: Labels) -> tuple[np.ndarray, list[str]]:
    """Number the classes of a file of labels: in the order of its class names, or else of the alphabet."""
    where, values, names = labels.where, labels.classes, labels.class_names
    if all(isinstance(value, str) and value for value in values):
        if names is None:
            spellings = {composed(value): value for value in sorted({*values}, reverse=True)}
            names = sorted(spellings.values())
        number = {composed(name): k for k, name in enumerate(names)}
        if unknown := sorted(value for value in {*values} if composed(value) not in number):
            raise ValueError(f"{where!r} has the class {unknown[0]!r}, which is not one of its class_names.")
        return np.array([number[composed(value)] for value in values], dtype=np.int64), names
    if not all(type(value) is int for value in values):
        raise ValueError(f"{where!r} has classes that are neither all whole numbers nor all names.")
    lowest, highest = min(values), max(values)
    if names is None and lowest >= 0 and (highest >= len(values) or len({*values}) <= highest):
        begin = f" and begin at {lowest}" if lowest else ""
        raise ValueError(
            f"{where!r} has class numbers up to {highest} with gaps; number them from 0, or give names: the numbers "
            f"there are {len({*values})}{begin}."
        )
    numbers = [max(min(value, 2**62), -(2**62)) for value in values]  # whatever is out of range stays so
    return np.array(numbers, dtype=np.int64), names or [str(k) for k in range(highest + 1)]


def _check_names(names: list[str], where: str) -> None:
    """Raise ValueError unless the names of classes differ, also to the eye, and can be stored."""
    alike = defaultdict(list)
    for name in names:
        alike[composed(name)].append(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where!r}: the class name {name!r} is not text in UTF-8; give it another.") from None
    if twice := [group for group in alike.values() if len(group) > 1]:
        written = f", written {twice[0][0]!a} and {twice[0][1]!a}" if len({*twice[0]}) > 1 else ""
        raise ValueError(f"{where!r} has a class name twice, {twice[0][0]!r}{written}; make them one.")


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

    def describe_classes(self, labels: np.ndarray) -> str:
        """Say how many of the images with these labels (N,) each class has; of many classes, the least and the most."""
        counts, names = np.bincount(labels, minlength=len(self.class_names)), self.class_names
        if len(names) == 1:
            return f"1 class ({names[0]})"
        shown = [f"{name}: {count:,}" for name, count in zip(names, counts, strict=True)]
        text = ", ".join(shown)
        if len(text) > MOST_CHARACTERS:
            text = f"from {shown[int(counts.argmin())]} to {shown[int(counts.argmax())]}"
        return f"{len(names):,} classes ({text})"

    def __post_init__(self) -> None:
        require(self.image_size > 0, "image_size", self.image_size, "choose at least 1")
        require(self.channels > 0, "channels", self.channels, "choose at least 1")
        require(bool(self.class_names), "class_names", self.class_names, "a model has at least one class")
