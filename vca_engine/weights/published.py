"""Weights of others as models of this program: what they say of themselves, and what has to be said of them.

All sizes are those of the tensors; no code of a file is run.
"""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_vca import BETAS
from vca import SIZES, Transformer, before_joint, check_type, defaults_of, lookup
from vca_engine import assemble
from vca_engine.config.reading import Spec
from vca_engine.config.schema import Config, ModelConfig
from vca_engine.images.codecs import VAECodec
from vca_engine.images.labels import DataInfo
from vca_engine.weights.adapt import adapt
from vca_engine.weights.architecture import keywords_of, process_of
from vca_engine.weights.diffusers import from_diffusers
from vca_engine.weights.files import Weights, read_json, read_weights

PUBLISHED_VAE = "stabilityai/sd-vae-ft-ema"  # of the published DiT and SiT
VAE = "vae"  # where a folder that holds all it needs has its autoencoder


class Published(NamedTuple):
    """What weights of others become: what a checkpoint of ours holds, as far as they say it."""

    config: Config
    shape: DataInfo
    network: nn.Module
    codec: nn.Module
    origin: dict[str, Any]


def read_published(path: Path, process: str | Spec | None = None, vae: str | None = None) -> Published:
    """A model out of published weights, of a folder of diffusers, or of one that `DiT.save_pretrained` wrote.

    Args:
        path: File or folder.
        process: What they do not say of their process: diffusion or flow, by name or with options.
        vae: The autoencoder; not given means the folder's own, or that of the published models.

    Raises:
        FileNotFoundError: There is no such path, or no autoencoder.
        ValueError: Something else than a DiT or SiT, or what was given contradicts what they say.
    """
    found = read_weights(path)
    tensors, known = found.tensors, _diffusers_config(path) if found.kind == "diffusers" else {}
    if found.kind == "diffusers":
        tensors = from_diffusers(tensors)
    names = known.pop("class_names", None)
    spec = _process_spec(process, known.pop("process", None), found, tensors)
    own = {key: value for key, value in (found.options or {}).items() if key in defaults_of(Transformer)}
    for key, value in own.items():
        check_type(Transformer, key, value, f"{str(path)!r}")
        sizes = value if isinstance(value, list) else [value] if type(value) is int else []
        if not all(type(size) is int and 0 < size <= 2**20 for size in sizes) or value == []:
            raise ValueError(f"{str(path)!r}: {key} is {value!r}; no network has such a size.")
    try:
        if "hidden_size" in own or "depth" in own:  # of a folder that DiT.save_pretrained or SiT.save_pretrained wrote
            keywords = {**defaults_of(Transformer), **own}
            keywords["attention"] = before_joint(keywords["attention"])
        else:
            keywords = keywords_of(tensors, num_classes=names and len(names), **known)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r}: {error} The folder of a run says all of it, and so does one that DiT.save_pretrained or "
            "SiT.save_pretrained wrote."
        ) from None
    if vae is None:
        vae = str(path / VAE) if (path / VAE).is_dir() else PUBLISHED_VAE
    names = names or _class_names(keywords["num_classes"])
    sizes = {key: keywords[key] for key in ("hidden_size", "depth", "num_heads")}
    letter = next((name for name, size in SIZES.items() if size == sizes), None)
    model = ModelConfig(
        size=f"{letter or 'S'}/{keywords['patch_size']}",
        mlp_ratio=keywords["mlp_ratio"],
        class_dropout_prob=keywords["class_dropout_prob"],
        attention={"name": keywords["attention"]} if isinstance(keywords["attention"], str) else keywords["attention"],
        **({} if letter else sizes),
    )
    data = {"name": "folder"}
    config = Config(run_dir="", process=spec, data=data, codec={"name": "vae", "path": vae}, model=model)
    try:
        codec = VAECodec(path=vae)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Say where an autoencoder is by vae (--vae).") from None
    if codec.channels != keywords["in_channels"]:
        raise ValueError(
            f"{str(path)!r} takes latents of {keywords['in_channels']} channels, and the autoencoder {vae!r} gives "
            f"{codec.channels}; name the right one by vae."
        )
    shape = DataInfo(keywords["input_size"] * codec.downsample, codec.image_channels, names)
    network = assemble.network(config, shape, codec)
    adapted = adapt(tensors, network, num_classes=keywords["num_classes"])
    missing = [name for name in adapted.missing if name != "pos_embed"]
    unused = [name for name in adapted.unused if name != "pos_embed"]
    if missing or unused:
        raise ValueError(f"{str(path)!r} is no DiT or SiT as published: it lacks {missing[:3]}, and has {unused[:3]}.")
    network.load_state_dict(adapted.state)
    kind = "of diffusers" if found.kind == "diffusers" else "published file"
    origin = {"kind": kind, "part": "ema", "step": None, "id": None}
    rows = len(tensors["final_layer.linear.weight"]) // keywords["patch_size"] ** 2
    if spec["name"] == "diffusion" and rows == keywords["in_channels"]:
        origin["no_variance"] = True
    return Published(config, shape, network, codec, origin)


def _process_spec(given: str | Spec | None, known: Spec | None, found: Weights, tensors: Mapping[str, Tensor]) -> Spec:
    """What the weights say of their process (`known`, their own options, or their last layer), with what is given."""
    given = {"name": given} if isinstance(given, str) else dict(given or {})
    options, said = found.options or {}, known
    if str(options.get("model", "")).startswith("DiT"):
        said = {"name": "diffusion"}
    elif str(options.get("model", "")).startswith("SiT"):
        keys = {"path": "path_type", "prediction": "prediction", "weight": "loss_weight"}
        said = {ours: str(options[key]).lower() for ours, key in keys.items() if options.get(key)}
        said = {"name": "flow", **said}
    name = given.get("name") or (said or {}).get("name") or process_of(tensors)
    lookup(assemble.PROCESSES, name, "process.name")
    if not said:
        with contextlib.suppress(ValueError):  # weights that tell nothing
            if (likely := process_of(tensors)) != name:
                warnings.warn(f"the weights look like those of a {likely}, and are taken for a {name}.", stacklevel=2)
    if said and name != said["name"]:
        raise ValueError(f"process.name is {name!r}, but the weights say themselves that they are of a {said['name']}.")
    return {**(said or {}), **given, "name": name}


def _diffusers_config(folder: Path) -> dict[str, Any]:
    """What a folder of diffusers says beside the tensors."""
    index = folder / "model_index.json"
    config = read_json(folder / ("transformer" if index.is_file() else "") / "config.json")
    known = {"num_heads": config.get("num_attention_heads"), "input_size": config.get("sample_size")}
    if index.is_file() and (labels := read_json(index).get("id2label")):
        known["class_names"] = [labels[str(k)].strip() for k in range(len(labels))]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    known["process"] = _schedule(read_json(scheduler)) if scheduler.is_file() else {"name": "diffusion"}
    return {key: value for key, value in known.items() if value}


def _schedule(config: Mapping[str, Any]) -> Spec:
    """The process of diffusers' scheduler.

    Raises:
        ValueError: One that this program has not.
    """
    num, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    if config.get("trained_betas"):
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        betas = torch.linspace(*ends, num, dtype=torch.float64)
    else:
        betas = BETAS["cosine"](num) if kind == "squaredcos_cap_v2" else torch.zeros(num)
    name = next((n for n, make in BETAS.items() if torch.allclose(make(num), betas.double(), rtol=1e-3)), None)
    if name is None or config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(
            f"the scheduler has betas {kind!r} and predicts {config.get('prediction_type')!r}; known are the betas "
            f"{sorted(BETAS)} of this program, and the noise (epsilon)."
        )
    return {"name": "diffusion", "betas": name, "num_timesteps": num}


def _class_names(num_classes: int) -> list[str]:
    """Of ImageNet's 1000 classes; of others, their numbers."""
    if num_classes == 1000:
        from torchvision.models import ResNet18_Weights  # slow to import: see docs/architecture.md, start-up

        return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    return [str(k) for k in range(num_classes)]
