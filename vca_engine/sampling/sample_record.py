"""The record of N images: how they were made. It stands beside them, and only the same settings go on with them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dit_vca.sampler import even_steps
from vca_engine.config.schema import SampleConfig
from vca_engine.files import write_text
from vca_engine.records import differences, listed, read_json

SAMPLES_RECORD = "samples.json"  # in a folder


def partial_of(out: Path) -> Path:
    """Name the folder of a file that is not complete yet."""
    return out.with_name(out.name + ".partial")


def sample_record_path(out: Path) -> Path:
    """Name the record of what is complete: FILE.npz.json, in a folder samples.json; an evaluation is itself one."""
    if out.suffix == ".json":
        return out
    return out / SAMPLES_RECORD if out.is_dir() else out.with_name(out.name + ".json")


def read_sample_record(out: Path) -> dict[str, Any]:
    """Read the record of what is being made, or is complete: its settings, and what was added."""
    file = partial_of(out) / SAMPLES_RECORD
    return read_json(file if file.exists() else sample_record_path(out))


def add_to_record(out: Path, facts: dict[str, Any]) -> None:
    """Add to the record of what is being made."""
    file = out / SAMPLES_RECORD if out.is_dir() else partial_of(out) / SAMPLES_RECORD
    write_text(file, json.dumps({**read_json(file), **facts}, indent=2))


def require_same_settings(record: Path, settings: dict[str, Any], out: Path) -> None:
    """Check that what is at `out` was made with the same settings, as its record says.

    Raises:
        ValueError: It was made with others, or its record is missing or damaged.
    """
    if not record.exists():
        raise ValueError(f"{str(out)!r} is there already and was not made by sample.py; choose another --out.")
    try:
        old = read_json(record)
        old = _with_settings_of_today(dict(old.get("sample", old)))  # of the record of an evaluation
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        raise ValueError(f"{str(record)!r} is damaged, so what is there is unknown; choose another --out.") from None
    if different := differences({key: old.get(key) for key in settings}, settings):
        what = "a measurement" if out.suffix == ".json" else "images"
        raise ValueError(
            f"{str(out)!r} holds {what} made with {listed(different, most=40)}; choose another --out, or remove it."
        )


def _with_settings_of_today(record: dict[str, Any]) -> dict[str, Any]:
    """Add what earlier versions did not write, where they did what is done now.

    An option of SampleConfig that they had not is at its default. They rounded pixels to even at .5, where float32
    images fall by chance only; and they took the steps of ddpm and ddim by the product of the stride, which for most
    numbers of steps are those of its running sum.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(SampleConfig)}
    record = {**defaults, "quantize": "dit", **record}
    sampler, num_timesteps = record.get("sampler"), record.get("process", {}).get("num_timesteps")
    respaced = isinstance(sampler, dict) and sampler.get("name") in ("ddpm", "ddim")
    if respaced and "spacing" not in sampler and num_timesteps:
        stride = (num_timesteps - 1) / (sampler["num_steps"] - 1)
        steps = even_steps(num_timesteps, sampler["num_steps"])
        if all(round(i * stride) == step for i, step in enumerate(steps)):
            record["sampler"] = {**sampler, "spacing": "even"}
    return record
