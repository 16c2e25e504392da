"""Weights to start from: out of a run of ours, a torch file, a safetensors file, a folder of diffusers, or the hub.

The content of a path, not its name, decides how it is read. Reading it never runs code.
"""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from vca import before_joint
from vca_engine import hub
from vca_engine.records import read_json
from vca_engine.weights import checkpoint
from vca_engine.weights.diffusers import from_diffusers
from vca_engine.weights.wrappings import MARKS, describe_keys, find_networks, has_nameless_average

DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in older versions of diffusers
DIFFUSERS_FILE = "diffusion_pytorch_model"
HUB_FILE = "model.safetensors"  # beside config.json, as `DiT.save_pretrained` writes them
NEEDED = ["model_index.json", "transformer/*", "vae/*", "*.json", "*.safetensors", "README.md"]  # of a model on the hub
# Types that stand beside weights in files of torch.save. Nothing here needs their values, and nothing of theirs is run.
HARMLESS = [f"numpy.{name}" for name in ("dtype", "ndarray")]
HARMLESS += [
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
]
HARMLESS += [
    f"{module}.{flavour}Path"
    for module in ("pathlib", "pathlib._local")
    for flavour in ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")
]
HARMLESS += [f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "str", "tuple")]
HARMLESS += [f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")]


class Weights(NamedTuple):
    """The content of a path of weights, as `read_weights` gives it.

    Attributes:
        tensors: Published key -> tensor on the CPU, of the file's own shapes and dtypes.
        kind: `ours`, `torch`, `safetensors` or `diffusers`.
        class_names: Of the labels; known for `ours` only.
        options: What is written beside the weights of their making, plain values only: the `args` of a published
            training checkpoint (its `model`, `path_type`, `prediction`, ...), or the keywords of a model saved for the
            hub.
    """

    tensors: dict[str, Tensor]
    kind: str
    class_names: list[str] | None = None
    options: dict[str, Any] | None = None


def locate(path: str | Path) -> Path:
    """Find weights on this machine or on the hub, which are downloaded then; see `hub.find_or_download`.

    Raises:
        FileNotFoundError: There is no such path, and the hub has no such model or cannot be reached.
    """
    try:
        return hub.find_or_download(path, NEEDED)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no weights at {str(path)!r}: {error}.") from None


def read_weights(path: str | Path, marks: Sequence[str] = MARKS) -> Weights:
    """Read the tensors that a path holds; of several sets, the averaged ones; of diffusers, with the published keys.

    Args:
        path: A run's folder or one of its checkpoints; a safetensors file; a file of `torch.save` that holds a state
            dict, itself or under any name, see `wrappings`; a folder saved by a diffusers DiT or its pipeline, or by
            `DiT.save_pretrained`; or the name of such a model on the hub, e.g. facebook/DiT-XL-2-256.
        marks: Keys of which the network in a file has one.

    Raises:
        FileNotFoundError: There is no such path, or a folder lacks one of its files.
        ValueError: A damaged file, one that needs code to be loaded, weights of a run that has diverged, or something
            else than weights.
    """
    path = locate(path)
    if folder := checkpoint.newest(path):
        class_names = checkpoint.read_record(folder)["shape"].get("class_names")
        return Weights(checkpoint.read(folder, "ema"), "ours", class_names)
    content, kind, options = _read_folder(path) if path.is_dir() else _read_file(path)
    tensors = checkpoint.check_finite(_network_in(content, path, marks), path)
    if not any(key.startswith("transformer_blocks.") for key in tensors):
        return Weights(tensors, kind, options=options)
    try:
        return Weights(from_diffusers(tensors), "diffusers", options=options)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def attention_of(path: str | Path) -> dict[str, Any] | None:
    """Read the attention that weights of ours were trained with, a spec with its options; None where a path says none.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: It holds a damaged record.
    """
    path = locate(path)
    if folder := checkpoint.newest(path):
        model = checkpoint.read_record(folder)["config"].get("model")
        attention = model.get("attention") if isinstance(model, dict) else None
        return attention if isinstance(attention, dict) else None
    file = path / "config.json"
    if not (file.is_file() and (path / HUB_FILE).is_file()):
        return None
    config = read_json(file)
    of_others = {"_class_name", "architecture"} & config.keys()  # of diffusers, of timm
    return None if of_others else before_joint(config.get("attention", "vca"))


class _Content(NamedTuple):
    """All that a file or folder holds: nested values, what kind it is, and what it says of its making."""

    values: Any
    kind: str
    options: dict[str, Any] | None = None


def _read_folder(path: Path) -> _Content:
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    if not (folder / "config.json").is_file():
        allowed = "give a run's folder, one of its checkpoints/step-* folders, a folder of diffusers' DiT, or a file."
        raise ValueError(f"{str(path)!r} holds no weights; {checkpoint.runs_in(path) or allowed}")
    config = read_json(folder / "config.json")
    if "_class_name" not in config and (folder / HUB_FILE).is_file():
        return _read_file(folder / HUB_FILE)._replace(options=config)
    name = config.get("_class_name")
    if name not in DIFFUSERS_CLASSES:
        raise ValueError(f"{str(folder)!r} holds a {name}; of diffusers, only a {DIFFUSERS_CLASSES[0]} can be read.")
    return _Content(_read_shards(folder), "diffusers")


def _read_shards(folder: Path) -> dict[str, Any]:
    for file in (folder / f"{DIFFUSERS_FILE}{ending}" for ending in (".safetensors", ".bin")):
        index = file.with_name(f"{file.name}.index.json")
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            return {key: tensor for shard in shards for key, tensor in _read_file(folder / shard).values.items()}
        if file.is_file():
            return _read_file(file).values
    raise FileNotFoundError(f"{str(folder)!r} lacks its weights, {DIFFUSERS_FILE}.safetensors or .bin.")


def _read_file(file: Path) -> _Content:
    """Read one file: safetensors start with a length and a brace, torch files as a zip or a pickle."""
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is missing.")
    with open(file, "rb") as f:
        head = f.read(9)
    if head[8:] == b"{":
        try:
            return _Content(checkpoint.read_safetensors(file), "safetensors")
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is truncated or not a safetensors file: {error}.") from None
    if head.startswith((b"PK\x03\x04", b"\x80")):
        content = _load_torch(file, memory_mapped=head.startswith(b"PK"))
        return _Content(content, "torch", _options_in(content))
    raise ValueError(
        f"{str(file)!r} is empty, or neither a safetensors nor a torch file; name a run's folder, or a .pt."
    )


class _Unread:
    """A value of a harmless type in a torch file, of which nothing is kept."""

    def __new__(cls, *args: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*factory: Any) -> dict[Any, Any]:
    """Make what a defaultdict in a torch file is read as."""
    return {}


def _load_torch(file: Path, memory_mapped: bool) -> Any:
    """Load what `torch.save` wrote: tensors, plain values, and no others than those of harmless types."""
    allowed = [argparse.Namespace, (_plain_dict, "collections.defaultdict"), *((_Unread, name) for name in HARMLESS)]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=memory_mapped)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(f"{str(file)!r} is damaged, or would need code to be loaded.") from None
        raise ValueError(
            f"{str(file)!r} holds a {code[1]}, and loading that would run its code, which this program never does; if "
            f"the file is whole and you trust it, load it yourself and save its state dict alone."
        ) from None
    except Exception as error:  # a damaged pickle raises almost anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{str(file)!r} is truncated or not a file of weights: {reason}") from None


def _network_in(content: Any, file: Path, marks: Sequence[str]) -> dict[str, Tensor]:
    """Find the weights of the network in what a file holds: of several the largest, of equal ones the averaged.

    Raises:
        ValueError: There is no tensor in it, or no network with one of `marks`.
    """
    networks = find_networks(content, marks)
    if not networks:
        raise ValueError(
            f"{str(file)!r} holds no state dict, itself or under one of ema, model, state_dict or any other name, of a "
            f"{'DiT or SiT' if marks is MARKS else 'recogniser'}: no key ends in {' or '.join(marks)}. It holds "
            f"{describe_keys(content) or 'no names'}. Give another file, or the folder of a run."
        )
    chosen, *others = networks
    if equal := [other for other in others if other.rank == chosen.rank and not _same(other.tensors, chosen.tensors)]:
        warnings.warn(
            f"{str(file)!r} holds several networks of one size; {chosen} is taken, not {', '.join(map(str, equal))}.",
            stacklevel=3,
        )
    elif not chosen.rank[1] and has_nameless_average(content):
        warnings.warn(
            f"{str(file)!r} holds averaged weights as a list without names, which cannot be read; {chosen} is taken, "
            "which is not averaged.",
            stacklevel=3,
        )
    return chosen.tensors


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _options_in(content: Any) -> dict[str, Any] | None:
    """Give the plain values of the `args` of a training script, if the file has any."""
    args = content.get("args") if isinstance(content, Mapping) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, Mapping):
        return None
    return {key: value for key, value in args.items() if isinstance(key, str) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)  # a bool is an int
