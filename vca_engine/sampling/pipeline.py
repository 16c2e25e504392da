"""A trained model, ready to draw: `pipe(class_labels=[...])`, from a run, a checkpoint, published weights or the hub.

    from vca_engine import Pipeline

    pipe = Pipeline.from_pretrained("runs/sit_b2_vca")          # or a .pt of DiT or SiT, or facebook/DiT-XL-2-256
    output = pipe(class_labels=["goldfish", 7], guidance_scale=4.0, num_inference_steps=50, seed=0)
    output.images[0].save("goldfish.png")
    pipe.save_pretrained("my_model")                            # one folder that holds all that it needs

`sample.py` and `app.py` draw through it, too.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor, nn

from vca_engine import assemble
from vca_engine.config.reading import Spec, from_dict
from vca_engine.config.schema import Config, SampleConfig, to_dict
from vca_engine.files import folder_written_aside, sha256_of_weights
from vca_engine.images.labels import DataInfo
from vca_engine.precision import chosen_device, set_tf32
from vca_engine.records import differences, listed
from vca_engine.sampling.classes import find_classes
from vca_engine.sampling.guidance import guidance_of
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.sampling.model_card import facts_of, model_card
from vca_engine.weights import checkpoint
from vca_engine.weights.files import locate
from vca_engine.weights.published import read_published

VAE = "vae"  # where a folder that holds all it needs has its autoencoder
OF_TRAINING = ("training steps", "training data", "checkpoint")  # of a model card, unknown of published weights


class Output(NamedTuple):
    """The images that a call of a pipeline gives, and how they were made.

    Attributes:
        images: PIL images; or (B, H, W, 3) uint8 with output_type "np".
        record: How they were made, JSON values.
    """

    images: Any
    record: dict[str, Any]


@dataclass
class Pipeline:
    """A network with its process, its codec and the names of its classes.

    Args:
        config: What it was trained with, as far as that is known; `config.sample` are its defaults of drawing.
        info: Size and channels of its images, and the names of its classes.
        network: In evaluation mode.
        process: Diffusion or flow.
        codec: Latents to images.
        source: Where the weights come from, JSON values: path, kind, step, part, ...
        folder: Where samples go unless it is said.
        precision: `no`, the weights' own float32, or `bf16`, autocast.
        tf32: Whether a GPU may round the inputs of float32 products to TF32.
        compiled: Whether its blocks are compiled.
    """

    config: Config
    info: DataInfo
    network: nn.Module
    process: assemble.Process
    codec: nn.Module
    source: dict[str, Any]
    folder: Path
    precision: Literal["no", "bf16"] = "no"
    tf32: bool = True
    compiled: bool = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        weights: str = "ema",
        process: str | Spec | None = None,
        vae: str | None = None,
        device: str | torch.device | None = None,
        precision: Literal["no", "bf16"] = "no",
        tf32: bool = True,
        compile: bool = False,
    ) -> Self:
        """Load a model; what a path holds is told by its content, and no code in it is run.

        Args:
            path: A run's folder (its newest checkpoint), one of its checkpoints, a folder written by `save_pretrained`;
                a .pt of the published DiT or SiT, or a .safetensors file with their keys; a folder of diffusers' DiT;
                or a name on the Hugging Face hub of one of these.
            weights: Of a run: ema, ema-0.05 and the like, or model.
            process: diffusion or flow, by name or with its options, where the weights do not say it: published ones.
            vae: The autoencoder, a folder of diffusers or a hub name. Not given means where it was in training, or
                that of the published models.
            device: Not given means the GPU if there is one.
            precision: no (float32) or bf16.
            tf32: Whether a GPU may round the inputs of float32 products to TF32.
            compile: Compile each block with torch.compile.

        Raises:
            FileNotFoundError: There is no such path, name, or part of it.
            ValueError: It holds something else, or what cannot be told from it was not given.
        """
        device = torch.device(device or chosen_device("auto"))
        set_tf32(tf32)
        there, record, tensors = _read(locate(path), weights, process)
        config, info, network, codec = _model_of(record, tensors, there, vae)
        network.eval().requires_grad_(False).to(device)
        if compile:
            for block in network.blocks:
                block.compile()
        source, folder = _source_of(record, there, weights, config)
        if not Path(path).exists():  # of the hub: samples do not belong into its cache
            source["path"], folder = str(path), Path("runs", str(path).rpartition("/")[2])
        process = assemble.process(config)
        return cls(config, info, network, process, codec.to(device), source, folder, precision, tf32, compile)

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

    def label_ids(self, classes: Sequence[int | str]) -> list[int]:
        """Find the numbers of classes given by number (int) or name (str); see `find_classes`."""
        return find_classes(classes, self.class_names)

    def image_sampler(
        self, sampling: SampleConfig, *, guide: "Pipeline | None" = None, negative: int | None = None
    ) -> ImageSampler:
        """Make what draws images as `sampling` says.

        Args:
            sampling: Sampler, guidance and seed.
            guide: A worse model of the same images to be guided away from.
            negative: A class to be guided away from, instead of none.

        Raises:
            ValueError: A sampler or a guidance that this model cannot have.
        """
        config, step = dataclasses.replace(self.config, sample=sampling), self.source.get("step")
        _check_sampling(self, sampling, guide, negative)
        return ImageSampler(
            self.network,
            assemble.sampler(config, self.process),
            self.codec.decode,
            seed=sampling.seed,
            guidance=guidance_of(sampling, negative=negative, guide=guide.network if guide else None),
            noise_level=self.process.noise_level,
            dtype=torch.bfloat16 if self.precision == "bf16" else None,
            weights="these weights" if step is None else f"{self.source['part']} of step {step}",
        )

    def settings(
        self, sampling: SampleConfig, *, guide: "Pipeline | None" = None, negative: int | None = None
    ) -> dict[str, Any]:
        """Say what, beside its number and label, makes an image what it is: JSON values."""
        return {
            "weights": {"sha256": self.sha256, "part": self.source["part"], "step": self.source.get("step")},
            **assemble.describe_sampling(dataclasses.replace(self.config, sample=sampling)),
            "negative_class": negative,
            "guide": {"sha256": guide.sha256, "step": guide.source.get("step")} if guide else None,
            "codec": self.codec.identity,
            "precision": self.precision,
            "tf32": self.tf32 and self.device.type == "cuda",
            "compile": self.compiled,
        }

    def facts(self) -> dict[str, Any]:
        """Say what else is to be known of an image: where the weights were, the device, versions. JSON values."""
        gpu = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if gpu else f"cpu, {torch.get_num_threads()} threads"
        where = {"checkpoint": self.source, "autoencoder": self.config.codec.get("path")}
        return {**where, "device": device, **checkpoint.versions()}

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        *,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        sampler: str | Spec | None = None,
        output_type: Literal["pil", "np"] = "pil",
        **options: Any,
    ) -> Output:
        """Draw an image of each class; image i is a function of the seed, i and its class, to rounding.

        Args:
            class_labels: Numbers or names.
            guidance_scale: 1 is no guidance; not given means as the model's config says, here and in what follows.
            num_inference_steps: Of the sampler; for ode and sde points of time.
            seed: Of all of them.
            sampler: By name with its options, `{"name": "ode", "method": "heun"}`; options alone change the model's.
            output_type: pil or np.
            options: Other fields of `SampleConfig`: guidance_interval=(0, 0.7), guided_channels=3, group_size=64.

        Raises:
            ValueError: An unknown class, or a sampler or guidance that this model cannot have.
            TypeError: An option that is none.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type is {output_type!r}; choose pil or np.")
        given = {"cfg_scale": guidance_scale, "seed": seed, **options}
        sampling = _with_given(self.config.sample, sampler, num_inference_steps, **given)
        labels = self.label_ids([class_labels] if isinstance(class_labels, int | str) else class_labels)
        if not labels:
            raise ValueError("class_labels is empty; name at least one class.")
        image_sampler = self.image_sampler(sampling)
        images = image_sampler.all(labels, sampling.group_size)
        record = {**self.settings(sampling), "labels": labels, "nfe": image_sampler.nfe, **self.facts()}
        return Output([Image.fromarray(image) for image in images] if output_type == "pil" else images, record)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that holds all that `from_pretrained` needs: weights, config, autoencoder, and a model card.

        It is a checkpoint as training writes it, with the autoencoder beside, so that sample.py and `train.py --init`
        take it, too.

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
            (made / "README.md").write_text(_card(self, folder.name), encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Put what `save_pretrained` writes on the Hugging Face hub, under owner/name; gives its address."""
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / repo_id.rpartition("/")[2]
            self.save_pretrained(made)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=made)
        return str(address)


def _check_sampling(model: Pipeline, sampling: SampleConfig, guide: Pipeline | None, negative: int | None) -> None:
    """Raise ValueError unless the model can draw so: with noise, away from a guide in the same latents, or a class."""
    if (guide or negative is not None) and sampling.cfg_scale == 1.0:
        raise ValueError("cfg_scale is 1.0, which is no guidance; a guide or a negative class needs another, e.g. 4.")
    if guide:
        of_guide, of_model = (
            {**assemble.drawing_options(pipe.config), "codec": pipe.codec.identity} for pipe in (guide, model)
        )
        if different := differences(of_guide, of_model):
            text = listed(different, "the model")
            raise ValueError(f"the guide has {text}; it has to predict the same thing as the model.")
    config = dataclasses.replace(model.config, sample=sampling)
    if model.source.get("no_variance") and assemble.describe_sampling(config)["sampler"]["name"] == "ddpm":
        raise ValueError("these weights learned no variance, with which ddpm draws; choose ddim, dpm-solver or unipc.")


def _with_given(
    sampling: SampleConfig, sampler: str | Spec | None, num_steps: int | None, **given: Any
) -> SampleConfig:
    """Change settings of drawing by the arguments of a call, where these are not None."""
    sampling = sampling.changed(sampler={"name": sampler} if isinstance(sampler, str) else sampler)
    return sampling.changed(sampler=None if num_steps is None else {"num_steps": num_steps}, **given)


def _read(path: Path, weights: str, process: str | Spec | None) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Read a record and tensors; gives the folder of the checkpoint, too, or `path` itself if it is of others."""
    folder = checkpoint.newest(path)
    if not folder:
        if weights != "ema":
            raise ValueError(f"weights is {weights!r}, but {str(path)!r} holds one set of weights; leave it out.")
        return path, *read_published(path, process)
    if process:
        raise ValueError(f"process is {process!r}, but {str(path)!r} says itself what it is; leave it out.")
    record = checkpoint.read_record(folder)
    if weights not in (parts := checkpoint.weights_in(folder)):
        raise ValueError(f"weights is {weights!r}; {str(folder)!r} has {parts}.")
    return folder, record, checkpoint.read(folder, weights)


def _model_of(
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
    return config, info, network, codec


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


def _source_of(record: Mapping[str, Any], path: Path, part: str, config: Config) -> tuple[dict[str, Any], Path]:
    """Say where weights come from, JSON values; and give the folder for samples: that of their run, if there is one."""
    if record.get("origin"):  # of others, or a saved pipeline, which is to be shared as it is
        known, folder = record["origin"], Path("runs", path.name if "shape" in record else path.stem)
    else:
        known = {"kind": "checkpoint", "part": part, "step": record["step"], "id": record["id"]}
        in_run = path.parent.name in (checkpoint.CHECKPOINTS, checkpoint.SNAPSHOTS)
        folder = path.parent.parent if in_run else path
    model = config.model
    fields = ("patch_size", "hidden_size", "depth", "num_heads")
    changed = ", ".join(f"{key} {getattr(model, key)}" for key in fields if getattr(model, key))
    size = f"{model.size} ({changed})" if changed else model.size
    return {**known, "path": str(path), "size": size, "attention": model.attention["name"]}, folder


def _saved_record(pipe: Pipeline) -> dict[str, Any]:
    """Make the record of a checkpoint that holds the pipeline; of folders of this machine only the last name."""
    record = {
        "step": pipe.source.get("step") or 0,
        "id": pipe.source.get("id"),
        "config": to_dict(pipe.config),
        "shape": to_dict(pipe.info),
        "codec": pipe.codec.identity,
        "origin": pipe.source,
        **checkpoint.versions(),
    }
    return _without_folders(record)


def _card(pipe: Pipeline, title: str) -> str:
    """Write the README.md of a folder of the pipeline."""
    scale = pipe.config.sample.cfg_scale
    usage = "from vca_engine import Pipeline  # in a clone of the repository\n\n"
    usage += f'pipe = Pipeline.from_pretrained("{title}")\n'
    usage += f"images = pipe(class_labels=[{pipe.class_names[0]!r}], guidance_scale={scale}, seed=0).images"
    trained = pipe.source.get("step") is not None
    known = facts_of(_saved_record(pipe), pipe.source["part"])
    facts = {
        "network": f"{type(pipe.network).__name__}, {sum(p.numel() for p in pipe.network.parameters()):,} parameters",
        **{name: fact for name, fact in known.items() if trained or name not in OF_TRAINING},
        "from": pipe.source["kind"],
        "SHA-256 of the weights": pipe.sha256,
    }
    tags = ["visual-contrast-attention"] if pipe.config.model.attention["name"] == "vca" else []
    return model_card(title, usage, facts, tags=tags, license="apache-2.0" if trained else "other")


def _without_folders(value: Any) -> Any:
    """Leave of each absolute path in nested dicts its last name only."""
    if isinstance(value, dict):
        return {key: _without_folders(v) for key, v in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
