"""A trained model in memory, and on the disk: the one way to load it from a path, and the one way to save it."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from vca_engine import assemble
from vca_engine.config.reading import Spec, from_dict
from vca_engine.config.schema import Config, to_dict
from vca_engine.files import folder_written_aside, sha256_of_weights
from vca_engine.images.labels import DataInfo
from vca_engine.precision import chosen_device, set_tf32
from vca_engine.sampling.model_card import GENERATOR, RECOGNISER, facts_of, model_card
from vca_engine.weights import checkpoint
from vca_engine.weights.files import locate
from vca_engine.weights.published import read_published

VAE = "vae"  # where a folder that holds all it needs has its autoencoder
OF_TRAINING = ("training steps", "training data", "checkpoint")  # of a model card, unknown of published weights


@dataclass
class TrainedModel:
    """A network with its process, its codec and the names of its classes.

    Args:
        config: What it was trained with, as far as that is known; `config.sample` are its defaults of drawing.
        info: Size and channels of its images, and the names of its classes.
        network: In evaluation mode.
        process: Diffusion, flow or classification.
        codec: Latents to images.
        source: Where the weights come from, JSON values: path, kind, step, part, ...
        folder: Where samples go unless it is said.
    """

    config: Config
    info: DataInfo
    network: nn.Module
    process: assemble.Process
    codec: nn.Module
    source: dict[str, Any]
    folder: Path

    def __str__(self) -> str:
        s, name = self.source, type(self.network).__name__
        step = f", step {s['step']:,}" if s.get("step") is not None else ""
        images = f"{self.info.image_size} pixels, {self.network.num_classes:,} classes"
        return f"{s['path']}: {name}-{s['size']} with {s['attention']}, {s['kind']}{step}; {images}"

    @property
    def device(self) -> torch.device:
        """The device that it draws on."""
        return next(self.network.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """The names of the labels 0, 1, ..."""
        return self.info.class_names

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the network's weights, whatever file they were in."""
        return sha256_of_weights(self.network)

    def prepare(self, device: str | torch.device | None, *, tf32: bool, compile: bool) -> None:
        """Bring it to a device, not given the GPU if there is one, and set how it computes there.

        Args:
            device: Where.
            tf32: Whether a GPU may round the inputs of float32 products to TF32.
            compile: Compile each block with torch.compile.
        """
        self.to(device or chosen_device("auto"))
        set_tf32(tf32)
        if compile:
            for block in assemble.blocks(self.network):
                block.compile()

    def to(self, device: str | torch.device) -> Self:
        """Bring network and autoencoder to a device, and give back the model itself."""
        self.network.to(device)
        self.codec.to(device)
        return self

    def facts(self) -> dict[str, Any]:
        """Say where the weights were, on which device they are used, and by which versions: JSON values."""
        gpu = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if gpu else f"cpu, {torch.get_num_threads()} threads"
        return {"checkpoint": self.source, "device": device, **checkpoint.versions()}

    def usage(self, name: str) -> str:
        """Write lines of Python that use the model out of the folder, or from the hub, by its name."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> None:
        """Write a folder that holds all that `from_pretrained` needs: weights, config, autoencoder, and a model card.

        It is a checkpoint as training writes it, with the autoencoder beside, so that sample.py and `train.py --init`
        take it, too.

        Args:
            folder: Where; it may be there if it is empty.
            license: That you give the weights, as the hub calls it, e.g. mit; not given means that the card names none.

        Raises:
            ValueError: The folder holds something already.
            OSError: It cannot be written; nothing is left behind.
        """
        folder = Path(folder)
        with folder_written_aside(folder) as made:
            record = {key: value for key, value in _saved_record(self).items() if value is not None}
            checkpoint.save(made, record.pop("step"), {"ema": self.network.state_dict()}, record)
            if hasattr(self.codec, "vae"):
                self.codec.vae.register_to_config(_name_or_path=Path(self.config.codec["path"]).name)
                self.codec.vae.save_pretrained(made / VAE)
            (made / "README.md").write_text(_card(self, folder.name, license), encoding="utf-8")

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, license: str | None = None
    ) -> str:
        """Put what `save_pretrained` writes on the Hugging Face hub, under owner/name; gives its address."""
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / repo_id.rpartition("/")[2]
            self.save_pretrained(made, license=license)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=made)
        return str(address)


def load_model(
    path: str | Path,
    weights: str,
    process: str | Spec | None = None,
    vae: str | None = None,
    read: Callable[..., tuple[dict[str, Any], dict[str, Tensor]]] = read_published,
) -> TrainedModel:
    """Load a model on the CPU; see `Pipeline.from_pretrained` for the arguments and errors.

    Args:
        path: A run, a checkpoint, or weights of others.
        weights: Of a run: ema, ...
        process: Of weights of others, where they do not say it.
        vae: The autoencoder, where it is not where it was.
        read: (path, process) -> record and tensors of weights of others.
    """
    local = locate(path)
    ours = checkpoint.newest(local)
    if ours is None:
        if weights != "ema":
            raise ValueError(f"weights is {weights!r}, but {str(local)!r} holds one set of weights; leave it out.")
        record, tensors = read(local, process)
    else:
        if process:
            raise ValueError(f"process is {process!r}, but {str(local)!r} says itself what it is; leave it out.")
        record = checkpoint.read_record(ours)
        if weights not in (parts := checkpoint.weights_in(ours)):
            raise ValueError(f"weights is {weights!r}; {str(ours)!r} has {parts}.")
        tensors = checkpoint.read(ours, weights)
    found = ours or local
    config, info, network, codec = _make_model(record, tensors, found, vae)

    if record.get("origin"):  # of others, or a saved model, which is to be shared as it is
        known, folder = record["origin"], Path("runs", found.name if ours else found.stem)
    else:
        known = {"kind": "checkpoint", "part": weights, "step": record["step"], "id": record["id"]}
        in_run = found.parent.name in (checkpoint.CHECKPOINTS, checkpoint.SNAPSHOTS)
        folder = found.parent.parent if in_run else found
    if not Path(path).exists():  # of the hub: samples do not belong into its cache
        found, folder = path, Path("runs", str(path).rpartition("/")[2])
    model, fields = config.model, ("patch_size", "hidden_size", "depth", "num_heads")
    changed = ", ".join(f"{key} {getattr(model, key)}" for key in fields if getattr(model, key))
    size = model.name or model.size  # of a recogniser, or of a generator
    size = f"{size} ({changed})" if changed else size
    source = {**known, "path": str(found), "size": size, "attention": model.attention["name"]}
    network.eval().requires_grad_(False)
    return TrainedModel(config, info, network, assemble.process(config), codec, source, folder)


def _make_model(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, vae: str | None
) -> tuple[Config, DataInfo, nn.Module, nn.Module]:
    """Make what a record describes: its config, the kind of its images, the network with the tensors, and the codec."""
    where = str(path / checkpoint.RECORD if "shape" in record else path)
    config = from_dict(Config, record["config"], where)
    info = from_dict(DataInfo, record["shape"], f"{where}, shape") if "shape" in record else None
    config = dataclasses.replace(config, codec=_with_autoencoder(config.codec, path, vae))
    try:
        codec = assemble.codec(config, info and info.channels)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. If it is elsewhere now, say so by vae (--vae).") from None
    if info is None:  # of others: their size is known in latents only
        latents = record["latents"]
        if codec.channels != latents["channels"]:
            raise ValueError(
                f"{where!r} takes latents of {latents['channels']} channels, and the autoencoder "
                f"{config.codec['path']!r} gives {codec.channels}; name the right one by vae."
            )
        size = {"image_size": latents["size"] * codec.downsample, "channels": codec.image_channels}
        info = from_dict(DataInfo, {**size, "class_names": latents["class_names"]}, where)
    network = assemble.network(config, info, codec)
    checkpoint.load_exactly(network, tensors, path)
    return assemble.with_image_size(config, info.image_size), info, network, codec


def _with_autoencoder(codec: Spec, path: Path, vae: str | None) -> Spec:
    """Choose the autoencoder: `vae`, or the one beside the weights, or else the one that the codec names.

    A relative path that is not there is looked for from the folders above the weights, too.
    """
    if codec["name"] != "vae":
        if vae:
            raise ValueError(f"vae is {vae!r}, but the codec of this model is {codec['name']!r}; leave it out.")
        return codec
    beside = path / VAE
    name = vae or (str(beside) if beside.is_dir() else codec.get("path"))
    found = Path(name or ".")
    if not (found.is_absolute() or found.exists()):
        above = (parent / found for parent in path.resolve().parents)
        name = str(next((folder for folder in above if folder.is_dir()), name))
    return {**codec, "path": name} if name else codec


def _saved_record(model: TrainedModel) -> dict[str, Any]:
    """Make the record of a checkpoint that holds the model; of folders of this machine only the last name."""
    record = {
        "step": model.source.get("step") or 0,
        "id": model.source.get("id"),
        "config": to_dict(model.config),
        "shape": to_dict(model.info),
        "codec": model.codec.identity,
        "origin": model.source,
        **checkpoint.versions(),
    }
    return _without_folders(record)


def _card(model: TrainedModel, title: str, license: str | None) -> str:
    """Write the README.md of a folder of the model."""
    trained = model.source.get("step") is not None
    known = facts_of(_saved_record(model), model.source["part"])
    facts = {
        "network": f"{type(model.network).__name__}, {sum(p.numel() for p in model.network.parameters()):,} parameters",
        **{name: fact for name, fact in known.items() if trained or name not in OF_TRAINING},
        "from": model.source["kind"],
        "SHA-256 of the weights": model.sha256,
    }
    tags = [*(GENERATOR if assemble.is_generator(model.config) else RECOGNISER)]
    tags += ["visual-contrast-attention"] if model.config.model.attention["name"] == "vca" else []
    return model_card(title, model.usage(title), facts, tags=tags, license=license)


def _without_folders(value: Any) -> Any:
    """Leave of each absolute path in nested dicts its last name only."""
    if isinstance(value, dict):
        return {key: _without_folders(v) for key, v in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
