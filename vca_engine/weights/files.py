"""Weights to start from: out of a run of ours, a torch file, a safetensors file, a folder of diffusers, or the hub.

What a path holds is told by its content, not its name, and reading it never runs code.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vca import before_joint
from vca_engine.records import read_json
from vca_engine.weights import checkpoint
from vca_engine.weights.diffusers import from_diffusers

DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in older versions of diffusers
DIFFUSERS_FILE = "diffusion_pytorch_model"
HUB_FILE = "model.safetensors"  # beside config.json, as `DiT.save_pretrained` writes them
NEEDED = ["model_index.json", "transformer/*", "vae/*", "*.json", "*.safetensors", "README.md"]  # of a model on the hub
WRAPPERS = ("ema", "model", "state_dict")  # the averaged weights first: published results are theirs


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
    """Find `path` on this machine: a local path as it is; a model of the hub, owner/name, is downloaded first.

    It is on the hub if there is neither such a path nor a folder of the owner's name, so that a mistyped local path is
    not looked for there. A model that has been downloaded is found again without a network.

    Raises:
        FileNotFoundError: There is no such path, and the hub has no such model or cannot be reached.
    """
    local = Path(path)
    if local.exists():
        return local
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) or local.parent.exists():
        raise FileNotFoundError(f"no weights at {str(path)!r}: there is no such file or folder.")
    try:
        return Path(snapshot_download(str(path), allow_patterns=NEEDED))
    except RepositoryNotFoundError:
        reason = "the Hugging Face hub has no model of that name, or none that you may see; check the name"
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        reason = f"the Hugging Face hub cannot give it now; check the name, or the network: {why}"
    raise FileNotFoundError(f"no weights at {str(path)!r}: there is no such file or folder, and {reason}.")


def read_weights(path: str | Path) -> Weights:
    """Read the tensors that a path holds; of several sets, the averaged ones; of diffusers, with the published keys.

    Args:
        path: A run's folder or one of its checkpoints; a safetensors file; a file of `torch.save` that holds a state
            dict, or one under `ema`, `model` or `state_dict`; a folder saved by a diffusers DiT or its pipeline, or by
            `DiT.save_pretrained`; or the name of such a model on the hub, e.g. facebook/DiT-XL-2-256.

    Raises:
        FileNotFoundError: There is no such path, or a folder lacks one of its files.
        ValueError: A damaged file, one that needs code to be loaded, weights of a run that has diverged, or something
            else than weights.
    """
    path = locate(path)
    found = _read_folder(path) if path.is_dir() else _read_file(path)
    tensors = {re.sub(r"^((module|_orig_mod)\.)+", "", key): tensor for key, tensor in found.tensors.items()}
    if not any(key.startswith("transformer_blocks.") for key in tensors):
        return found._replace(tensors=tensors)
    try:
        return found._replace(tensors=from_diffusers(tensors), kind="diffusers")
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
    return None if "_class_name" in config else before_joint(config.get("attention", "vca"))


def _read_folder(path: Path) -> Weights:
    if folder := checkpoint.newest(path):
        class_names = checkpoint.read_record(folder)["shape"].get("class_names")
        return Weights(checkpoint.read(folder, "ema"), "ours", class_names)
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{str(path)!r} holds no weights; give a run's folder, one of its checkpoints/step-* folders, a folder of "
            f"diffusers' DiT, or a file."
        )
    config = read_json(folder / "config.json")
    if "_class_name" not in config and (folder / HUB_FILE).is_file():
        return _read_file(folder / HUB_FILE)._replace(options=config)
    name = config.get("_class_name")
    if name not in DIFFUSERS_CLASSES:
        raise ValueError(f"{str(folder)!r} holds a {name}; of diffusers, only a {DIFFUSERS_CLASSES[0]} can be read.")
    return Weights(_read_shards(folder), "diffusers")


def _read_shards(folder: Path) -> dict[str, Tensor]:
    for file in (folder / f"{DIFFUSERS_FILE}{ending}" for ending in (".safetensors", ".bin")):
        index = file.with_name(f"{file.name}.index.json")
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            return {key: tensor for shard in shards for key, tensor in _read_file(folder / shard).tensors.items()}
        if file.is_file():
            return _read_file(file).tensors
    raise FileNotFoundError(f"{str(folder)!r} lacks its weights, {DIFFUSERS_FILE}.safetensors or .bin.")


def _read_file(file: Path) -> Weights:
    """Read one file: safetensors start with a length and a brace, torch files as a zip or a pickle."""
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is missing.")
    with open(file, "rb") as f:
        head = f.read(9)
    if head[8:] == b"{":
        try:
            found = Weights(load_file(file), "safetensors")
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is truncated or not a safetensors file: {error}.") from None
    elif head.startswith((b"PK\x03\x04", b"\x80")):
        found = _unwrap(_load_torch(file, memory_mapped=head.startswith(b"PK")), file)
    else:
        raise ValueError(
            f"{str(file)!r} is empty, or neither a safetensors nor a torch file; name a run's folder, or a .pt."
        )
    checkpoint.check_finite(found.tensors, file)
    return found


def _load_torch(file: Path, memory_mapped: bool) -> Any:
    """Load what `torch.save` wrote, tensors and plain values only; published files also hold a Namespace of options."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
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


def _unwrap(content: Any, file: Path) -> Weights:
    """Find the state dict in what a file holds, and the plain values of its `args`, if it has any."""
    content = content if isinstance(content, Mapping) else {}
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    options = None
    if isinstance(args, Mapping):
        options = {key: value for key, value in args.items() if isinstance(key, str) and _is_plain(value)}
    for candidate in (*map(content.get, WRAPPERS), content):
        if isinstance(candidate, Mapping):
            tensors = {k: v for k, v in candidate.items() if isinstance(k, str) and isinstance(v, Tensor)}
            if tensors:
                return Weights(tensors, "torch", options=options)
    raise ValueError(f"{str(file)!r} holds no state dict, neither itself nor under one of {', '.join(WRAPPERS)}.")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)  # a bool is an int
