"""The record of N images: how they were made. It stands beside them, and only the same settings go on with them."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dit_vca.sampler import even_steps
from vca_engine.config.schema import SampleConfig
from vca_engine.files import hold, remove_temporary
from vca_engine.records import differences, listed, read_json, write_json

SAMPLES_RECORD = "samples.json"  # in a folder


@contextmanager
def alone_at(record: Path, out: Path, *, is_main: bool = True) -> Iterator[None]:
    """Keep other programs from writing a record, and what it is of, while the block does; remove what killed ones left.

    Args:
        record: The record; the lock is a hidden file beside it.
        out: What the message calls the place.
        is_main: True on the process that locks for all that draw together.

    Raises:
        ValueError: Another program is at work there.
        OSError: Nothing can be written there.
    """
    if not is_main:
        yield
        return
    file = record.with_name(f".{record.name}.lock")
    try:
        lock = hold(file, f"another program is writing {str(out)!r}; wait for it, or choose another --out.")
    except OSError as error:
        raise OSError(f"cannot write {str(out)!r}: {error.strerror or error}; choose another --out.") from error
    try:
        remove_temporary(record.parent, record)
        remove_temporary(out.parent, out)
        yield
    finally:
        if lock:
            with suppress(OSError):  # a system that does not remove a file in use; it does no harm
                file.unlink()  # while it is held, so that nobody else's is removed
            lock.release()


def partial_of(out: Path) -> Path:
    """Name the folder of a file that is not complete yet."""
    return out.with_name(out.name + ".partial")


def sample_record_path(out: Path) -> Path:
    """Name the record of what is complete: FILE.npz.json, in a folder samples.json; an evaluation is itself one."""
    if out.suffix.lower() == ".json":
        return out
    return out / SAMPLES_RECORD if out.is_dir() else out.with_name(out.name + ".json")


def read_sample_record(out: Path) -> dict[str, Any]:
    """Read the record of what is being made, or is complete: its settings, and what was added."""
    file = partial_of(out) / SAMPLES_RECORD
    return read_json(file if file.exists() else sample_record_path(out))


def add_to_record(out: Path, facts: dict[str, Any]) -> None:
    """Add to the record of what is being made."""
    file = out / SAMPLES_RECORD if out.is_dir() else partial_of(out) / SAMPLES_RECORD
    write_json(file, {**read_json(file), **facts})


def check_picture_record(file: Path) -> None:
    """Raise ValueError if a file, where the record of a picture will stand, is there and is something else."""
    try:
        ours = not file.exists() or "picture" in read_json(file)
    except ValueError as error:
        raise ValueError(f"{error} A record would stand there; choose another --out, or move it.") from None
    if not ours:
        raise ValueError(f"{str(file)!r}, where a record would stand, is of something else; choose another --out.")


def require_same_settings(record: Path, settings: dict[str, Any], out: Path) -> None:
    """Check that what is at `out` was made with the same settings, as its record says.

    Raises:
        ValueError: It was made with others, or its record is missing or damaged.
    """
    if not record.exists():
        raise ValueError(f"{str(out)!r} is there already and was not made by sample.py; choose another --out.")
    unknown = "So it is unknown what is there; choose another --out."
    try:
        old = read_json(record)
    except ValueError as error:
        raise ValueError(f"{error} {unknown}") from None
    try:
        old = _with_settings_of_today(dict(old.get("sample", old)))  # of the record of an evaluation
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        raise ValueError(f"{str(record)!r} is damaged: its settings cannot be. {unknown}") from None
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
        if not 1 < sampler["num_steps"] <= num_timesteps <= 10**6:
            raise ValueError("no sampler has so many steps")
        stride = (num_timesteps - 1) / (sampler["num_steps"] - 1)
        steps = even_steps(num_timesteps, sampler["num_steps"])
        if all(round(i * stride) == step for i, step in enumerate(steps)):
            record["sampler"] = {**sampler, "spacing": "even"}
    return record
