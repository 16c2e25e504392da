"""Checkpoints: a folder a step, safetensors and JSON only, written aside and renamed, so that each one is whole.

RUN/checkpoints/step-00002000/{model,ema,optimizer}.safetensors, checkpoint.json
"""

import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RECORD = "checkpoint.json"
FORMAT = 1


def save(
    run_dir: Path,
    step: int,
    *,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
) -> Path:
    """Write the checkpoint of a step and return its folder.

    Args:
        run_dir: The run's folder.
        step: Optimizer steps done.
        model: Trained weights.
        ema: Averaged weights, of the same keys.
        optimizer: Its state is stored under the names of the model's parameters, which it holds in their order.
        record: What else to keep, JSON values: `config` and `shape`. The record also gets an id of its own.

    Raises:
        OSError: The disk is full, say; nothing is left behind, and the earlier checkpoints are untouched.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        for name, tensors in (
            ("model", model.state_dict()),
            ("ema", ema.state_dict()),
            ("optimizer", _optimizer_tensors(model, optimizer)),
        ):
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
        record = {"format": FORMAT, "step": step, "id": uuid.uuid4().hex, **record}
        (temporary / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
        _flush(temporary)
        shutil.rmtree(final, ignore_errors=True)  # an earlier try at this step
        os.rename(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"the checkpoint of step {step} could not be written to {final}: {error}") from error
    return final


def steps(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted(f for f in folders if re.fullmatch(r"step-\d+", f.name) and (f / RECORD).is_file())


def remove_partial(run_dir: Path) -> None:
    """Delete what a killed process left of a checkpoint that it was writing."""
    for folder in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for folder in steps(run_dir)[:-keep]:
        shutil.rmtree(folder)


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a run's folder.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: It is neither a checkpoint nor a run with one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}: there is no such file or folder.")
    if path.is_dir() and (path / RECORD).is_file():
        return path
    found = steps(path) if path.is_dir() else []
    if not found:
        raise ValueError(
            f"{str(path)!r} is not a checkpoint; give a run's folder, or one of its checkpoints/step-* folders, which "
            f"hold {RECORD} and safetensors."
        )
    return found[-1]


def read_record(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a checkpoint.

    Raises:
        ValueError: It is damaged, or of a later format.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"it has format {record['format']}, this program reads {FORMAT}")
        missing = {"step", "id", "config", "shape"} - record.keys()
        if missing:
            raise ValueError(f"it lacks {sorted(missing)}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / RECORD)!r} is damaged or not a checkpoint's record: {error}.") from None
    return record


def load_weights(folder: Path, name: str, model: nn.Module) -> None:
    """Load `name` ("model" or "ema") of a checkpoint into a model.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is truncated, not safetensors, or of another architecture; says which keys or shapes.
    """
    tensors = _read(folder / f"{name}.safetensors")
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = [k for k in expected.keys() & tensors.keys() if expected[k].shape != tensors[k].shape]
    if missing or extra or shapes:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} too many"] * bool(extra)
        for k in sorted(shapes)[:1]:
            parts.append(f"has {k} of shape {tuple(tensors[k].shape)} where {tuple(expected[k].shape)} is needed")
        raise ValueError(
            f"{str(folder)!r} holds another architecture than the config asks for: it {', and '.join(parts)}."
        )
    model.load_state_dict(tensors)


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is truncated or not safetensors.
    """
    tensors = _read(folder / "optimizer.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, _) in enumerate(model.named_parameters()):
        prefix = f"{name}/"
        state[index] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    names = [name for name, _ in model.named_parameters()]
    return {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"the checkpoint lacks {str(file)!r}; remove its folder to use the one before it.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is truncated or not a safetensors file: {error}.") from None


def _flush(folder: Path) -> None:
    """Make sure that the bytes are on the disk before the name is."""
    for file in folder.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
