"""Files that say of which class each image is: our own two forms, StyleGAN's and EDM's, and Hugging Face's."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vca_engine.images.files import LABEL_FILES, OWN_LABEL_FILES, SUFFIXES, ImageFiles

ONE_CLASS = "all"  # name of the class of images of which a dataset.json says that they have none
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")  # of metadata; the first that is there
Pairs = list[tuple[str, Any]]  # a file as it is written, below the folder of the file of labels, and its class
IsThere = Callable[[str], bool]


class NoLabelsError(ValueError):
    """A file of another program, called as a file of labels, that gives no labels; says why."""


@dataclass
class Labels:
    """The classes of images, as files of labels give them.

    Args:
        where: The file, or the first of several, for messages.
        own: It is one of `OWN_LABEL_FILES`.
        classes: Numbers or names, in the order of the images.
        class_names: Names of the classes 0, 1, ...; None where the file does not give them.
    """

    where: str
    own: bool
    classes: list[Any]
    class_names: list[str] | None


class Paths:
    """Paths of files, found as people and programs write them.

    Found is the path that is written so; or else the only one that is the same but for letter case, Unicode's forms of
    one letter, slashes, and spaces around it.

    Args:
        paths: Those that there are.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = {*paths}
        self._alike: dict[str, list[str]] = {}
        for path in sorted(self.paths):
            self._alike.setdefault(self._key(path), []).append(path)

    def find(self, written: str) -> str | None:
        """Find a path; None if it is not there.

        Raises:
            ValueError: It may be one of several.
        """
        if written in self.paths:
            return written
        found = self._alike.get(self._key(written), [])
        if len(found) > 1:
            raise ValueError(f"{written!r} may be {found[0]!r} or {found[1]!r}")
        return found[0] if found else None

    @staticmethod
    def _key(path: str) -> str:
        parts = path.replace("\\", "/").split("/")
        return composed("/".join(part.strip() for part in parts if part.strip() not in ("", "."))).casefold()


def composed(name: str) -> str:
    """Write a name in Unicode's form NFC: an accented letter is one character, and names that look alike are equal."""
    return unicodedata.normalize("NFC", name)


def read_label_files(files: ImageFiles) -> tuple[Labels | None, list[str]]:
    """Read the classes of images from their files of labels, of the first of `LABEL_FILES` that gives any.

    Returns:
        The classes, or None without such a file; and sentences that the user should read.

    Raises:
        ValueError: It cannot be read, or does not fit the images.
    """
    labels, notes = None, []
    for form in LABEL_FILES:
        there = sorted(path for path in files.label_files if path.rsplit("/", 1)[-1].lower() == form)
        if not there:
            continue
        where = files.path_below_root(there[0])
        if labels:
            notes.append(f"the classes are those of {labels.where!r}; {where!r} is not read.")
            continue
        try:
            labels = _read(files, form, there)
        except NoLabelsError as error:
            notes.append(str(error))
            continue
        except ValueError as error:
            more = "" if form in OWN_LABEL_FILES else " If the folders are the classes, remove this file."
            raise ValueError(f"{error}{more}") from None
        if not labels.own:
            notes.append(f"the classes are those of {where!r}, and not the folders.")
    return labels, notes


def _read(files: ImageFiles, form: str, there: list[str]) -> Labels:
    """Read files of labels of one form, each of which names images below its own folder."""
    where = files.path_below_root(there[0])
    images = [files.prefix + name for name in files.names]
    paths, written, class_names = Paths(images), [], None
    for path in there:
        folder = path[: path.rfind("/") + 1]
        read, how = READERS[form]
        try:
            pairs, names = read(files.read_labels(path), lambda file, folder=folder: paths.find(folder + file))
        except NoLabelsError as error:
            raise NoLabelsError(f"{files.path_below_root(path)!r} gives no classes: {error}.") from None
        except (ValueError, TypeError, RecursionError, csv.Error) as error:
            where = files.path_below_root(path)
            raise ValueError(f"{where!r} cannot be read ({str(error).rstrip('.')}); write {how}.") from None
        if pairs is None:
            pairs = [(image.removeprefix(folder), ONE_CLASS) for image in images if image.startswith(folder)]
        written += [(folder + file, value) for file, value in pairs]
        class_names = class_names or names
    return Labels(where, form in OWN_LABEL_FILES, _classes(paths, images, written, where), class_names)


def _classes(paths: Paths, images: list[str], written: Pairs, where: str) -> list[Any]:
    """Find the class of each image.

    Raises:
        ValueError: An image without one or with two, or a class of an image that is not there.
    """
    found, missing = {}, []
    for file, value in written:
        try:
            image = paths.find(file)
        except ValueError as error:
            raise ValueError(f"{where!r} names an image whose name only letter case tells apart: {error}.") from None
        if image is None:
            missing.append(file)
        elif image in found:
            raise ValueError(f"{where!r} names an image twice, {file!r}.")
        else:
            found[image] = value
    if missing:
        raise ValueError(
            f"{where!r} names {min(missing)!r}, which is not there ({len({*missing})} of {len(written)} are missing)."
        )
    if without := [image for image in images if image not in found]:
        raise ValueError(f"{where!r} gives {without[0]!r} no class ({len(without)} of {len(images)} images have none).")
    return [found[image] for image in images]


def _names_in(content: Mapping[str, Any]) -> list[str] | None:
    names = content.get("class_names")
    if names is None:
        return None
    if not (isinstance(names, list) and names and all(isinstance(name, str | int) for name in names)):
        raise ValueError("class_names is no list of names")
    return [str(name) for name in names]


def _labels_json(content: bytes, is_there: IsThere) -> tuple[Pairs, list[str] | None]:
    """Read `{"FILE": CLASS, ...}` or what a dataset.json holds."""
    listed = json.loads(content, object_pairs_hook=list)  # which keeps a key that stands twice
    if not (isinstance(listed, list) and all(isinstance(pair, tuple) for pair in listed)):
        raise ValueError("it is no object")
    found = dict(listed)
    if isinstance(found.get("labels"), list):
        return [(str(file), value) for file, value in found["labels"]], _names_in(found)
    return [(file, value) for file, value in listed if file != "class_names"], _names_in(found)


def _labels_csv(content: bytes, is_there: IsThere) -> tuple[Pairs, None]:
    """Read lines `FILE,CLASS`, perhaps below a header."""
    pairs = [(file, value.strip()) for file, value in _rows(content)]
    if pairs and PurePosixPath(pairs[0][0].strip()).suffix.lower() not in SUFFIXES and not is_there(pairs[0][0]):
        pairs = pairs[1:]  # a header
    return list(zip([file for file, _ in pairs], _numbers([value for _, value in pairs]), strict=True)), None


def _dataset_json(content: bytes, is_there: IsThere) -> tuple[Pairs | None, list[str] | None]:
    """Read `{"labels": [["FILE", CLASS], ...]}`, or null in the place of the list, where images have no classes."""
    found = json.loads(content)
    if not isinstance(found, dict) or not isinstance(found.get("labels", ""), list | None):
        raise NoLabelsError('it has no list "labels"')
    if found["labels"] is None:
        return None, None
    return [(str(file), value) for file, value in found["labels"]], _names_in(found)


def _metadata_csv(content: bytes, is_there: IsThere) -> tuple[Pairs, None]:
    """Read a table with a column `file_name` and one of `LABEL_COLUMNS`."""
    header, *rows = [*_rows(content)] or [[]]
    header = [column.strip() for column in header]
    file, label = _columns(header)
    i, j = header.index(file), header.index(label)
    if any(len(row) <= max(i, j) for row in rows):
        raise ValueError(f"not all its lines have {max(i, j) + 1} columns")
    rows = [row for row in rows if row[j].strip()]
    return list(zip([row[i] for row in rows], _numbers([row[j].strip() for row in rows]), strict=True)), None


def _metadata_jsonl(content: bytes, is_there: IsThere) -> tuple[Pairs, None]:
    """Read lines that are objects with a key `file_name` and one of `LABEL_COLUMNS`."""
    rows = [json.loads(line) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not all its lines are objects")
    file, label = _columns(list(dict.fromkeys(key for row in rows for key in row)))
    return [(str(row.get(file)), row[label]) for row in rows if row.get(label) is not None], None


def _columns(columns: list[str]) -> tuple[str, str]:
    """Find the columns of files and of labels."""
    known = {column.lower(): column for column in reversed(columns)}
    label = next((known[name] for name in LABEL_COLUMNS if name in known), None)
    if "file_name" not in known or label is None:
        missing = f"one of {', '.join(LABEL_COLUMNS)}" if "file_name" in known else "file_name"
        raise NoLabelsError(f"it has the columns {', '.join(columns) or 'none'}, but not {missing}")
    return known["file_name"], label


def _rows(content: bytes) -> Iterator[list[str]]:
    """Give the rows of a table, of which only line ends end one, and not all that Unicode counts among these."""
    lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    return (row for row in csv.reader(lines, skipinitialspace=True) if row)


def _numbers(words: list[str]) -> list[Any]:
    """Turn words into numbers if all of them are numbers; 007 is a name, unless 00, 01, ... are all there."""
    if not all(re.fullmatch(r"-?[0-9]+", word) for word in words):
        return words
    numbers = [int(word) for word in words]
    padded = any(re.match("-?0[0-9]", word) for word in words)
    return words if padded and {*numbers} != {*range(len({*numbers}))} else numbers


PAIRS = '{"labels": [["FILE", CLASS], ...]}'
READERS: dict[str, tuple[Callable[[bytes, IsThere], tuple[Pairs | None, list[str] | None]], str]] = {
    "labels.json": (_labels_json, f'{{"FILE": CLASS, ...}} or {PAIRS}'),
    "labels.csv": (_labels_csv, "lines FILE,CLASS"),
    "dataset.json": (_dataset_json, PAIRS),
    "metadata.csv": (_metadata_csv, "a line file_name,label and lines FILE,CLASS"),
    "metadata.jsonl": (_metadata_jsonl, 'lines {"file_name": "FILE", "label": CLASS}'),
}
