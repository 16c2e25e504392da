"""The configs of the paper's tables, rows of configs/paper.yaml: found by a name where a file of settings may stand."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vca import nearest
from vca_engine.config.yamlfile import read_yaml
from vca_engine.files import expanded

INSTALLED, CLONE = (Path(__file__).resolve().parents[k] / "configs" / "paper.yaml" for k in (1, 2))
TABLES = INSTALLED if INSTALLED.is_file() else CLONE
TINY = "-tiny"
ABOUT = ("title", "measure", "about", "like", "tiny")  # keys of a part that are no settings


@dataclass(frozen=True, eq=False)
class PaperRow:
    """A config of the paper's tables.

    Args:
        name: What stands after --config.
        title: Of the network, e.g. `DiT, S/2, VCA`.
        measure: FID-50K or top-1.
        about: The data and the length of the training.
        settings: Those of each part, later ones overriding earlier ones.
        published: The value in the VCA paper; None if it is not known here.
        original: The value of a baseline in the paper of its model; None if it is not known here.
    """

    name: str
    title: str
    measure: str
    about: str
    settings: tuple[dict[str, Any], ...]
    published: float | None = None
    original: float | None = None

    def comments(self) -> list[str]:
        """Write what is known of the config as lines: commands, cost and value."""
        if self.name.endswith(TINY):
            return [
                f"{self.title}, tiny: a trial of the commands, whose numbers are not the paper's.",
                f"  python train.py --config {self.name}",
            ]
        evaluated = " --eval.data.images DIR" if self.measure == "top-1" else ""
        lines = [
            f"{self.title}: {self.about}.",
            f"  accelerate launch train.py --config {self.name} --data.images DIR{evaluated}",
        ]
        if not evaluated:
            lines.append(f"  accelerate launch sample.py runs/{self.name} --num 50000 --fid REFERENCE")
        published = "not known here" if self.published is None else f"{self.published:g}"
        original = "" if self.original is None else f", and {self.original:g} in the paper of the model"
        cost = f"Cost: python reproduce.py --list --rows [{self.name}]"
        return [*lines, f"{cost}. Not yet run by us; {self.measure} in the VCA paper: {published}{original}."]


@functools.cache
def _content() -> dict[str, Any]:
    """Read configs/paper.yaml."""
    return read_yaml(str(TABLES))


@functools.cache
def read_tables() -> dict[str, dict[str, PaperRow]]:
    """Read configs/paper.yaml: table -> name -> row. A row may be in several tables.

    Raises:
        ValueError: It cannot be read.
    """
    content = _content()
    found: dict[str, PaperRow] = {}
    tables = {}
    for table, lines in content["tables"].items():
        for name, values in lines.items():
            values = values if isinstance(values, dict) else {"vca": values}
            numbers = {key: float(value) if value else None for key, value in values.items()}
            if name not in found:
                found[name] = _row(name, content["parts"], numbers.get("vca"), numbers.get("own"))
        tables[table] = {name: found[name] for name in lines}
    return tables


def find_row(name: str) -> PaperRow:
    """Find a row by its name, which may end in -tiny.

    Raises:
        ValueError: There is none; says the nearest.
    """
    rows = _all_rows()
    if name not in rows:
        raise ValueError(
            f"{name!r} is not a row of configs/{TABLES.name};{nearest(name, rows)} "
            "python reproduce.py --list shows all."
        )
    return rows[name]


def read_config(path: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Read settings by what stands after --config: a file, or the name of a row.

    `configs/ROW.yaml` is the row, too: each had such a file once. `NAME` is also short for `configs/NAME.yaml`.

    Returns:
        The settings, later ones overriding earlier ones; and lines that say what they are, if they are a row's.

    Raises:
        ValueError: It is neither, or cannot be read.
    """
    place = Path(expanded(path))
    name = place.name.removesuffix(".yaml") if place.parent.name == "configs" else path
    is_free = os.path.isdir(place) or not os.path.lexists(place)
    may_be_row = is_free and not (name == path and place.suffix)
    if may_be_row and name in _all_rows():
        row = _all_rows()[name]
        return list(row.settings), row.comments()
    if may_be_row and name == path and place.parent == Path():
        if os.path.isfile(file := f"{TABLES.parent}/{name}.yaml"):  # False for what is no name, too
            return [read_yaml(file)], []
        raise ValueError(
            f"--config is {path!r}, which is neither a file nor a row of configs/{TABLES.name};"
            f"{nearest(name, _all_rows())} python reproduce.py --list shows all rows."
        )
    try:
        settings = read_yaml(path)
    except ValueError as error:
        close = nearest(name, _all_rows()) if may_be_row else ""
        raise ValueError(f"{error}{close}") from None
    if settings.keys() == {"parts", "tables"}:
        raise ValueError(f"{path} is a table of configs; name one of its rows, e.g. --config sit_b2_vca.")
    return [settings], []


@functools.cache
def _all_rows() -> dict[str, PaperRow]:
    """Gather the rows of all tables, and their tiny forms."""
    rows = {name: row for table in read_tables().values() for name, row in table.items()}
    return rows | {f"{name}{TINY}": _row(f"{name}{TINY}", _content()["parts"], None, None) for name in rows}


def _row(name: str, parts: dict[str, Any], published: float | None, original: float | None) -> PaperRow:
    """Make a row of the parts of its name."""
    chain = list(_chain(name.removesuffix(TINY), parts))
    settings = [{key: value for key, value in part.items() if key not in ABOUT} for part in chain]
    run_dir = f"runs/{name}"
    if name.endswith(TINY):
        settings += [part["tiny"] for part in chain if "tiny" in part]
        run_dir = f"runs/tiny/{name.removesuffix(TINY)}"
    known = {key: value for part in chain for key, value in part.items() if key in ("measure", "about")}
    if name.endswith(TINY) and known["measure"] == "FID-50K":
        known["measure"] = "Frechet distance"
    title = ", ".join(part["title"] for part in chain if "title" in part)
    return PaperRow(
        name, title, **known, settings=(*settings, {"run_dir": run_dir}), published=published, original=original
    )


def _chain(name: str, parts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Split a name into its parts, each after those that it is like."""
    while name:
        word = max((part for part in parts if f"{name}_".startswith(f"{part}_")), key=len, default=None)
        if word is None:
            raise ValueError(f"configs/{TABLES.name}: {name!r} does not begin with one of its parts, {sorted(parts)}.")
        like, part = [], parts[word]
        while part:
            like.insert(0, part)
            part = parts.get(part.get("like"))
        yield from like
        name = name.removeprefix(word).removeprefix("_")
