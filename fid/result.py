"""The result of an evaluation: the numbers, and the record of how they were made."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fid.metrics import METRICS
from fid.networks.extractor import FeatureExtractor
from vca_engine.records import read_json, write_json

VERSION = 1  # of the numbers: it changes when any of them can


@dataclass(frozen=True)
class Result:
    """The numbers, as attributes (`result.fid`), and the record of how they were made.

    Args:
        values: Name -> number; None where it cannot be said, as the error of a value without groups.
        record: All of the JSON record but the values.
    """

    values: dict[str, Any]
    record: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("values", "record"):  # asked for while it is being unpickled
            raise AttributeError(name)
        if name in self.values:
            return self.values[name]
        raise AttributeError(f"this result has no {name!r}; it has {', '.join(self.values)}.")

    @property
    def warnings(self) -> list[str]:
        """All that may make the numbers wrong, or not comparable."""
        return self.record.get("warnings", [])

    def to_dict(self) -> dict[str, Any]:
        """Put numbers and record side by side, as the file has them; of JSON's types."""
        return {"schema": 1, **self.values, **self.record}

    def to_json(self, path: str | Path) -> None:
        """Write the file, with a checksum; whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what `to_json` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is damaged, or holds something else.
        """
        found = read_json(path)
        if not {"num_samples", "label"} <= found.keys():
            raise ValueError(f"'{path}' is not a record of an evaluation: it does not say of how many samples.")
        if not all(isinstance(found.get(name) or {}, dict) for name in ("reference", "labels")):
            raise ValueError(f"'{path}' is not a record of an evaluation.")
        numbers = {name for metric in METRICS.values() for name in metric.numbers}
        values = {name: value for name, value in found.items() if name in numbers}
        return cls(values, {name: value for name, value in found.items() if name not in {*numbers, "schema"}})

    @property
    def cells(self) -> list[str]:
        """The numbers as the line has them: `FID 2.27 ± 0.02 (noise floor 0.31)`, `sFID 4.61`, ..."""
        return [cell for metric in METRICS.values() for cell in metric.cells(self.values, self.record)]

    def __str__(self) -> str:
        """Write one line fit for a table."""
        record = self.record
        reference = record.get("reference")
        against = "no reference" if reference is None else f"against {reference['path']}"
        if reference and reference["kind"] == "adm":
            against = "ADM ref"
        mode = (record.get("labels") or {}).get("mode")
        samples = f"{record['num_samples'] or 'an unknown number of'} {f'{mode}-label ' if mode else ''}samples"
        samples += f"; compares {record['compares']}" if record.get("compares") else ""
        return f"{'  '.join(self.cells)}  ({against}, {record.get('protocol') or 'unknown protocol'}, {samples})"


def table_of(results: Mapping[str, Result]) -> str:
    """Write the numbers of results below each other, each with its name, and mark the least distance."""
    distances = [result.values.get("fid", result.values.get("fd")) for result in results.values()]
    rows = [[name, *result.cells] for name, result in results.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    least = [distance is not None and distance == min(distances) for distance in distances]
    return "\n".join(line + "  least" * mark for line, mark in zip(lines, least, strict=True))


def comparable_with(label: str, extractor: str | None) -> str | None:
    """Say what a distance compares with if its network has no name in the field; None of FID and FD-DINOv2."""
    if label != FeatureExtractor.label:
        return None
    return f"only with numbers by {extractor}" if extractor else "only with numbers by the same extractor"


def device_name(device: torch.device) -> str:
    """Name the GPU, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def versions_of_packages() -> dict[str, Any]:
    """List the versions that the numbers may depend on."""
    return {"fid": VERSION, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
