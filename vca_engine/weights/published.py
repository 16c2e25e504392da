"""Weights of others in the form of a checkpoint of ours: a record, and tensors. No code of a file is run."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vca import SIZES, Transformer, before_joint, check_type, defaults_of, lookup, sincos_2d
from vca_engine.config.reading import Spec
from vca_engine.records import read_json
from vca_engine.weights.adapt import fit_channels
from vca_engine.weights.architecture import OUTPUT, keywords_of, process_of
from vca_engine.weights.diffusers import process_of_scheduler
from vca_engine.weights.files import Weights, read_weights

PUBLISHED_VAE = "stabilityai/sd-vae-ft-ema"  # of the published DiT and SiT
OUTPUTS = {"diffusion": 2, "flow": 1}  # name -> outputs of its network for each channel: of DiT with the variance


def read_published(path: Path, process: str | Spec | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read published weights, a folder of diffusers, or one that `DiT.save_pretrained` wrote, as a checkpoint of ours.

    Args:
        path: File or folder.
        process: What they do not say of their process: diffusion or flow, by name or with options.

    Returns:
        The record, as `checkpoint.read_record` gives it, but with `latents` for `shape`, since the size of the images
        depends on the autoencoder; and the tensors, name -> tensor, exactly those of the network that it describes.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: Something else than a DiT or SiT, or what was given contradicts what they say.
    """
    found = read_weights(path)
    if found.kind == "diffusers" and not path.is_dir():
        raise ValueError(
            f"{str(path)!r} holds a DiT under diffusers' keys, which do not say the size of its input; give the whole "
            "folder that diffusers' save_pretrained wrote."
        )
    known = _read_diffusers_config(path) if found.kind == "diffusers" else {}
    names = known.pop("class_names", None)
    spec = _process_spec(process, known.pop("process", None), found)
    keywords = _keywords(path, found, {"num_classes": names and len(names), **known})
    num_classes, in_channels, patch_size = (keywords[key] for key in ("num_classes", "in_channels", "patch_size"))
    names = names or names_of_classes(num_classes)
    sizes = {key: keywords[key] for key in ("hidden_size", "depth", "num_heads")}
    letter = next((name for name, size in SIZES.items() if size == sizes), None)
    attention = keywords["attention"]
    model = {
        "size": f"{letter or 'S'}/{patch_size}",
        "mlp_ratio": keywords["mlp_ratio"],
        "class_dropout_prob": keywords["class_dropout_prob"],
        "attention": {"name": attention} if isinstance(attention, str) else attention,
        **({} if letter else sizes),
    }
    codec = {"name": "vae", "path": PUBLISHED_VAE}
    kind = "of diffusers" if found.kind == "diffusers" else "published file"
    origin = {"path": str(path), "kind": kind, "part": "ema", "step": None, "id": None}
    outputs = len(found.tensors.get(f"{OUTPUT}.weight", ())) // patch_size**2
    if spec["name"] == "diffusion" and outputs == in_channels:
        origin["no_variance"] = True
    record = {
        "config": {"run_dir": "", "process": spec, "data": {"name": "folder"}, "codec": codec, "model": model},
        "latents": {"size": keywords["input_size"], "channels": in_channels, "class_names": names},
        "origin": origin,
    }
    return record, _exactly(found.tensors, keywords, OUTPUTS[spec["name"]])


def _exactly(tensors: Mapping[str, Tensor], keywords: Mapping[str, Any], outputs: int) -> dict[str, Tensor]:
    """Give the weights the position table of our networks, and as many outputs for each channel as these have."""
    patch_size, size = keywords["patch_size"], keywords["input_size"]
    height, width = (size, size) if isinstance(size, int) else size
    table = sincos_2d(keywords["hidden_size"], (height // patch_size, width // patch_size))[None]  # (1, N, D)
    num_rows = patch_size**2 * outputs * keywords["in_channels"]
    changed = {}
    for key in (f"{OUTPUT}.weight", f"{OUTPUT}.bias"):
        if key in tensors:  # (p*p*C_out, ...)
            needed = tensors[key].new_zeros(num_rows, *tensors[key].shape[1:])
            changed[key], _ = fit_channels(tensors[key], needed, patch_size**2)
    return {**tensors, **changed, "pos_embed": table}


def _keywords(path: Path, found: Weights, known: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the keywords of the network: those that were saved with it, or else what its tensors show."""
    own = {key: value for key, value in (found.options or {}).items() if key in defaults_of(Transformer)}
    for key, value in own.items():
        check_type(Transformer, key, value, f"{str(path)!r}")
        sizes = value if isinstance(value, list) else [value] if type(value) is int else []
        if not all(type(size) is int and 0 < size <= 2**20 for size in sizes) or value == []:
            raise ValueError(f"{str(path)!r}: {key} is {value!r}; no network has such a size.")
    try:
        if "hidden_size" in own or "depth" in own:  # of a folder that DiT.save_pretrained or SiT.save_pretrained wrote
            keywords = {**defaults_of(Transformer), **own}
            return {**keywords, "attention": before_joint(keywords["attention"])}
        return keywords_of(found.tensors, **known)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r}: {error} The folder of a run says all of it, and so does one that DiT.save_pretrained or "
            "SiT.save_pretrained wrote."
        ) from None


def _process_spec(given: str | Spec | None, said: Spec | None, found: Weights) -> Spec:
    """Join what weights say of their process (`said`, their options, or else their last layer) with what is given."""
    given = {"name": given} if isinstance(given, str) else dict(given or {})
    options = found.options or {}  # the `args` of a published training checkpoint, say
    if str(options.get("model", "")).startswith("DiT"):
        said = {"name": "diffusion"}
    elif str(options.get("model", "")).startswith("SiT"):
        keys = {"path": "path_type", "prediction": "prediction", "weight": "loss_weight"}
        said = {ours: str(options[key]).lower() for ours, key in keys.items() if options.get(key)}
        said = {"name": "flow", **said}
    name = given.get("name") or (said or {}).get("name") or process_of(found.tensors)
    lookup(OUTPUTS, name, "process.name")
    if not said:
        with contextlib.suppress(ValueError):  # weights that tell nothing
            if (likely := process_of(found.tensors)) != name:
                warnings.warn(f"the weights look like those of a {likely}, and are taken for a {name}.", stacklevel=2)
    elif name != said["name"]:
        raise ValueError(f"process.name is {name!r}, but the weights say themselves that they are of a {said['name']}.")
    return {**(said or {}), **given, "name": name}


def _read_diffusers_config(folder: Path) -> dict[str, Any]:
    """Read what a folder of diffusers says beside the tensors."""
    index = folder / "model_index.json"
    config = read_json(folder / ("transformer" if index.is_file() else "") / "config.json")
    known = {"num_heads": config.get("num_attention_heads"), "input_size": config.get("sample_size")}
    if index.is_file() and (labels := read_json(index).get("id2label")):
        known["class_names"] = [labels[str(k)].strip() for k in range(len(labels))]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    known["process"] = process_of_scheduler(read_json(scheduler)) if scheduler.is_file() else {"name": "diffusion"}
    return {key: value for key, value in known.items() if value}


def names_of_classes(num_classes: int) -> list[str]:
    """Name the 1000 classes of ImageNet; other classes by their numbers."""
    if num_classes == 1000:
        from torchvision.models import ResNet18_Weights  # slow to import: see docs/architecture.md, start-up

        return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    return [str(k) for k in range(num_classes)]
