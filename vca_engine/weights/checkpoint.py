"""Checkpoints: a folder a step, safetensors and JSON only, written aside and renamed, so that each one is whole.

RUN/checkpoints/step-00002000/{model,ema,ema-0.05,ema-0.1,optimizer,meter}.safetensors, checkpoint.json
RUN/snapshots/step-00002000/{ema-0.05,ema-0.1}.safetensors, checkpoint.json
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vca import before_joint
from vca_engine.distributed import shard_like
from vca_engine.files import checksum_of, nearest_there, set_usual_mode
from vca_engine.records import read_json, with_checksum

RECORD = "checkpoint.json"
FORMAT = 4  # 2: sample.rows; 3: attention without `softmax`
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
GO_BACK = "Remove its folder to use the checkpoint before it."
Parts = Mapping[str, Mapping[str, Tensor]]


def folder_of(run_dir: Path, step: int, kind: str = CHECKPOINTS) -> Path:
    """Give the folder of the checkpoint, or snapshot, of a step."""
    return run_dir / kind / f"step-{step:08d}"


def save(final: Path, step: int, parts: Parts, record: Mapping[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        final: Its folder; one that is there is replaced.
        step: Optimizer steps done.
        parts: Name of a file -> its tensors.
        record: What else to keep, JSON values: `config` and `shape` at least. The record also gets an id of its own.

    Raises:
        OSError: The disk is full, say; nothing is left behind, and the earlier checkpoints are untouched.
    """
    temporary, old = (
        final.with_name(f".{name}") for name in (f"{final.name}-{uuid.uuid4().hex[:8]}", f"old-{final.name}")
    )
    try:
        temporary.mkdir(parents=True)
        files = {name: temporary / f"{name}.safetensors" for name in parts}
        for name, tensors in parts.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, files[name])
        set_usual_mode(*files.values())
        sums = {file.name: checksum_of(file) for file in files.values()}
        record = {"format": FORMAT, "step": step, "id": uuid.uuid4().hex, **record, "files": sums}
        (temporary / RECORD).write_text(with_checksum(record), encoding="utf-8")
        for written in temporary.iterdir():
            _flush(written)  # the bytes are on the disk before the name is
        if final.exists():  # an earlier try at this step; `recover` brings it back if we die between the two lines
            os.rename(final, old)
        os.rename(temporary, final)
        with suppress(OSError):  # not every file system can
            _flush(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"the checkpoint of step {step} could not be written to {final}: {error}") from error


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Name an optimizer's state, in the shapes of the model's parameters, after these: NAME/exp_avg."""
    state, places = optimizer.state_dict()["state"], _places(model, optimizer)
    return {f"{name}/{key}": value for name, i in places.items() for key, value in state.get(i, {}).items()}


def steps(run_dir: Path, kind: str = CHECKPOINTS) -> list[Path]:
    """List the checkpoints, or snapshots, of a run, oldest first, those that are damaged, too.

    Raises:
        OSError: Their folder is there, and cannot be read.
    """
    folder = run_dir / kind
    for path in (run_dir, folder):
        if path.is_symlink() and not path.exists():
            to = os.readlink(path)
            raise OSError(f"{str(path)!r} is a link to {to!r}, which is not there; mount its disk, or remove the link.")
    try:
        return sorted(f for f in folder.iterdir() if re.fullmatch(r"step-\d{8,}", f.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def recover(run_dir: Path) -> None:
    """Mend what a killed process left of what it was writing or deleting."""
    for folder in (run_dir / CHECKPOINTS, run_dir / SNAPSHOTS):
        for old in folder.glob(".old-step-*"):
            final = folder / old.name.removeprefix(".old-")
            if (old / RECORD).is_file() and not final.exists():
                os.rename(old, final)
        for left in (*folder.glob(".step-*"), *folder.glob(".old-step-*")):
            shutil.rmtree(left, ignore_errors=True)


def prune(run_dir: Path, newest: int, every: int | None = None, spare: Collection[int] = ()) -> None:
    """Delete all checkpoints but the newest ones, those of steps that are multiples of `every`, and those to spare.

    What was to be kept when it was written (its own config's keep_every) is kept, too.
    """
    for folder in steps(run_dir)[:-newest]:
        step = int(folder.name.removeprefix("step-"))
        try:
            then = read_record(folder)["config"].get("train", {}).get("keep_every")
        except ValueError:  # a damaged one is not ours to judge
            continue
        if step not in spare and not any(period and step % period == 0 for period in (every, then)):
            gone = folder.with_name(f".{folder.name}-old")  # a half-deleted one must not look whole
            os.rename(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)  # `recover` tries again


def newest(path: Path) -> Path | None:
    """Find the checkpoint that a path means: itself, or the newest of a run; None where it is neither."""
    if (path / RECORD).is_file():
        return path
    found = steps(path)
    return found[-1] if found else None


def runs_in(folder: Path) -> str:
    """Write "it holds the runs demo, digits_sit; name one, e.g. runs/demo." of a folder of runs; "" of another."""
    try:
        found = [place.name for place in sorted(folder.iterdir()) if place.name[0] != "." and newest(place)]
    except OSError:  # no folder, or one that cannot be read
        return ""
    if not found:
        return ""
    listed = f"{', '.join(found[:5])}{f' and {len(found) - 5:,} more' if len(found) > 5 else ''}"
    return f"it holds the run{'s' * (len(found) > 1)} {listed}; name one, e.g. {folder / found[0]}."


def find(path: str | Path) -> Path:
    """Find the checkpoint that a path means: itself, or the newest of a run.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: It is neither a checkpoint nor a run with one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {str(path)!r}: there is no such file or folder{nearest_there(path)}; name a run's "
            "folder, or one of its checkpoints/step-* folders."
        )
    if found := newest(path):
        return found
    allowed = f"give a run's folder, or one of its checkpoints/step-* folders, which hold {RECORD} and safetensors."
    raise ValueError(f"{str(path)!r} is not a checkpoint; {runs_in(path) or allowed}")


def read_record(folder: Path) -> dict[str, Any]:
    """Read checkpoint.json of a checkpoint, in the words of the present format.

    Raises:
        ValueError: It is damaged, or of another format.
    """
    try:
        record = read_json(folder / RECORD)
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} lacks {RECORD}. {GO_BACK}") from None
    except ValueError as error:
        raise ValueError(f"{error} {GO_BACK}") from None
    version, wrong = record.get("format"), ""
    if type(version) is not int:
        wrong = f"its format is {version!r}"
    elif version <= FORMAT:
        wrong = _wrong(record, folder)
    if wrong:
        raise ValueError(f"{str(folder / RECORD)!r} is damaged or not a checkpoint's record: {wrong}. {GO_BACK}")
    if version not in (2, 3, FORMAT):
        raise ValueError(
            f"{str(folder)!r} is of format {version}, and this program reads 2 to {FORMAT}; use the version of the "
            "program that wrote it, or a newer one."
        )
    sample, model = (record["config"].get(group, {}) for group in ("sample", "model"))
    if version == 2 and isinstance(sample, dict) and "rows" in sample:
        sample["per_class"] = sample.pop("rows")
    if version < 4 and isinstance(model, dict) and isinstance(model.get("attention", "vca"), dict | str):
        record["config"]["model"] = {**model, "attention": before_joint(model.get("attention", "vca"))}
    return record


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of a part of a checkpoint, name -> tensor of its own shape.

    Raises:
        FileNotFoundError: There is no such part; says which there are.
        ValueError: The file is damaged, of another checkpoint, or of a run that has diverged; see `check_finite`.
    """
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        there = sorted(f.stem for f in folder.glob("*.safetensors"))
        raise FileNotFoundError(f"the checkpoint lacks {str(file)!r}; it has {there}. {GO_BACK}")
    try:
        tensors = read_safetensors(file)
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is truncated or not a safetensors file: {error}. {GO_BACK}") from None
    if name != "meter":  # which has the norms of skipped steps, too
        check_finite(tensors, file)
    known = read_record(folder).get("files", {}).get(file.name)  # not there in checkpoints of versions before
    if known is not None and known != checksum_of(file):
        raise ValueError(
            f"{str(file)!r} is damaged, or of another checkpoint: it does not have its checksum. {GO_BACK}"
        )
    return tensors


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file, name -> tensor of its own shape (N, ...); its path need not be UTF-8.

    Raises:
        SafetensorError: It is something else, or damaged.
    """
    try:
        str(file).encode()
    except UnicodeEncodeError:  # which the library cannot open
        return safetensors.torch.load(file.read_bytes())
    return load_file(file)


def check_finite(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Give back the tensors, of any shapes, if all their values are finite.

    Raises:
        ValueError: One of them has NaN or infinite values; says which, of which file.
    """
    comparable = ((key, t.float() if t.itemsize == 1 else t) for key, t in tensors.items())  # not all of 8 bits are
    if bad := [key for key, tensor in comparable if not tensor.isfinite().all()]:
        raise ValueError(
            f"{str(file)!r} holds values that are not finite in {_some(bad)}: the run has diverged. Name an earlier "
            "checkpoint of it; or remove this one where the newest is taken."
        )
    return tensors


def weights_in(folder: Path) -> list[str]:
    """List the parts of a checkpoint that are weights of the model."""
    return sorted({file.stem for file in folder.glob("*.safetensors")} - {"optimizer", "meter"})


def load_exactly(network: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Load weights into the network that they are of.

    Args:
        network: It gets the weights, in its own dtype.
        tensors: Name -> tensor, exactly those of the network, in its shapes.
        where: Their file or folder, for the error.

    Raises:
        ValueError: They are of another network; says which names or shapes.
    """
    expected = network.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = sorted(k for k in expected.keys() & tensors.keys() if expected[k].shape != tensors[k].shape)
    parts = [f"lacks {_some(missing)}"] if missing else []
    if extra:
        parts.append(f"has {_some(extra)} too many")
    if shapes:
        given, needed = (tuple(of[shapes[0]].shape) for of in (tensors, expected))
        parts.append(f"has {shapes[0]} of shape {given} where {needed} is needed")
    if parts:
        raise ValueError(f"{str(where)!r} holds another network than expected: it {', and '.join(parts)}.")
    network.load_state_dict(tensors)


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load the optimizer's state, sharded as the model's parameters are.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is truncated or not safetensors.
    """
    tensors = read(folder, "optimizer")
    places, parameters = _places(model, optimizer), dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {i: {} for i in places.values()}
    for key, value in tensors.items():
        name = key.rpartition("/")[0]
        i, parameter = places[name], parameters[name]
        state[i][key.rpartition("/")[2]] = shard_like(value, parameter) if value.shape == parameter.shape else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _places(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Number the parameters of a model, by name, as the optimizer's state does: group after group."""
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    return {name: numbers[id(p)] for name, p in model.named_parameters()}


@functools.cache
def versions() -> dict[str, Any]:
    """Collect the versions of Python and packages, and the revision of this repository, if known."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "accelerate", "diffusers", "torchdiffeq", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    clone = Path(__file__).resolve().parents[2]
    if not (clone / ".git").exists():  # installed: the repository around it, if there is one, is another
        return {"versions": found, "revision": None}
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        revision = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    return {"versions": found, "revision": revision}


def _wrong(record: dict[str, Any], folder: Path) -> str:
    """Say what is wrong with a record of the present format or one before it; nothing if nothing is."""
    if missing := {"step", "id", "config", "shape"} - record.keys():
        return f"it lacks {sorted(missing)}"
    step, named = record["step"], re.fullmatch(r"step-(\d+)", folder.name)
    if type(step) is not int:
        return f"its step is {step!r}"
    if named and int(named[1]) != step:
        return f"it is of step {step:,}"
    return next((f"its {k} is {record[k]!r}" for k in ("config", "shape") if not isinstance(record[k], dict)), "")


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _some(names: list[str]) -> str:
    """Join the first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
