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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import nn

from vca_engine import assemble
from vca_engine.config.reading import Spec, from_dict
from vca_engine.config.schema import Config, SampleConfig, differences, to_dict
from vca_engine.files import folder_written_aside, sha256_of
from vca_engine.images.labels import DataInfo
from vca_engine.precision import chosen_device, set_tf32
from vca_engine.sampling.classes import find_classes
from vca_engine.sampling.guidance import guidance_of
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.sampling.model_card import facts_of, model_card
from vca_engine.weights import checkpoint
from vca_engine.weights.files import locate
from vca_engine.weights.published import VAE, read_published

OF_TRAINING = ("training steps", "training data", "checkpoint")  # of a model card, unknown of published weights


class Output(NamedTuple):
    """What a call of a pipeline gives.

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
        shape: Of its images, with the names of its classes.
        network: In evaluation mode.
        process: Diffusion or flow.
        codec: Latents to images.
        origin: Where the weights come from, JSON values: path, kind, step, part, ...
        folder: Where samples go unless it is said.
        precision: `no`, the weights' own float32, or `bf16`, autocast.
        tf32: Whether a GPU may round the inputs of float32 products to TF32.
        compiled: Whether its blocks are compiled.
    """

    config: Config
    shape: DataInfo
    network: nn.Module
    process: assemble.Process
    codec: nn.Module
    origin: dict[str, Any]
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
            path: A run's folder (its newest checkpoint), one of its checkpoints, a folder written by `save_pretrained`; a
                .pt of the published DiT or SiT, or a .safetensors file with their keys; a folder of diffusers' DiT; or a
                name on the Hugging Face hub of one of these.
            weights: Of a run: ema, ema-0.05 and the like, or model.
            process: diffusion or flow, by name or with its options, where the weights do not say it: published ones.
            vae: Where the autoencoder is: a folder of diffusers or a hub name. Not given means where it was in training,
                or that of the published models.
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
        there = locate(path)
        ours = there.is_dir() and ((there / checkpoint.RECORD).is_file() or checkpoint.steps(there))
        if ours and process:
            raise ValueError(f"process is {process!r}, but {str(path)!r} says itself what it is; leave it out.")
        if not ours and weights != "ema":
            raise ValueError(f"weights is {weights!r}, but {str(path)!r} holds one set of weights; leave it out.")
        pipe = cls._of_checkpoint(checkpoint.find(there), weights, vae) if ours else cls._of_others(there, process, vae)
        if there != Path(path):  # of the hub: samples do not belong into its cache
            pipe.folder, pipe.origin["path"] = Path("runs", str(path).rpartition("/")[2]), str(path)
        pipe.precision, pipe.tf32, pipe.compiled = precision, tf32, compile
        pipe.network.eval().requires_grad_(False).to(device)
        pipe.codec.to(device)
        if compile:
            for block in pipe.network.blocks:
                block.compile()
        return pipe

    @classmethod
    def _of_checkpoint(cls, folder: Path, part: str, vae: str | None) -> Self:
        """Of a checkpoint."""
        record = checkpoint.read_record(folder)
        config = from_dict(Config, record["config"], str(folder / checkpoint.RECORD))
        shape = from_dict(DataInfo, record["shape"], f"{folder / checkpoint.RECORD}, shape")
        if vae and config.codec["name"] != "vae":
            raise ValueError(f"vae is {vae!r}, but the codec of this model is {config.codec['name']!r}; leave it out.")
        if config.codec["name"] == "vae" and (vae or (folder / VAE).is_dir()):
            config = dataclasses.replace(config, codec={**config.codec, "path": vae or str(folder / VAE)})
        if part not in (there := checkpoint.weights_in(folder)):
            raise ValueError(f"weights is {part!r}; {str(folder)!r} has {there}.")
        config = dataclasses.replace(config, codec=_found(config.codec, folder))
        try:
            codec = assemble.codec(config, shape.channels)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. If it is elsewhere now, say so by vae (--vae).") from None
        network = assemble.network(config, shape, codec)
        checkpoint.load_weights(folder, part, network)
        in_run = folder.parent.name in (checkpoint.CHECKPOINTS, checkpoint.SNAPSHOTS)
        known = record.get("origin") or {"kind": "checkpoint", "part": part, "step": record["step"], "id": record["id"]}
        origin = {**known, "path": str(folder), **_sizes(config)}
        run_dir = folder.parent.parent if in_run else folder
        if record.get("origin"):  # a saved pipeline, which is to be shared as it is
            run_dir = Path("runs", folder.name)
        return cls(config, shape, network, assemble.process(config), codec, origin, run_dir)

    @classmethod
    def _of_others(cls, path: Path, process: str | Spec | None, vae: str | None) -> Self:
        """Of published weights, or of diffusers."""
        config, shape, network, codec, found = read_published(path, process, vae)
        origin = {"path": str(path), **found, **_sizes(config)}
        return cls(config, shape, network, assemble.process(config), codec, origin, Path("runs", path.stem))

    def __str__(self) -> str:
        o, network = self.origin, self.network
        step = f", step {o['step']:,}" if o.get("step") is not None else ""
        return (
            f"{o['path']}: {type(network).__name__}-{o['size']} with {o['attention']}, {o['kind']}{step}; "
            f"{self.shape.image_size} pixels, {network.num_classes:,} classes"
        )

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return next(self.network.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """Of the labels 0, 1, ..."""
        return self.shape.class_names

    @functools.cached_property
    def sha256(self) -> str:
        """Of the network's weights, whatever file they were in."""
        return sha256_of(self.network)

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
        config, step = dataclasses.replace(self.config, sample=sampling), self.origin.get("step")
        if (guide or negative is not None) and sampling.cfg_scale == 1.0:
            raise ValueError("cfg_scale is 1.0, which is no guidance; with a guide or a negative class choose another.")
        if guide:
            mine, other = ({**assemble.drawing_options(p.config), "codec": p.codec.identity} for p in (self, guide))
            if different := differences(mine, other):
                text = ", ".join(f"{key} {b!r} (the model {a!r})" for key, (a, b) in different.items())
                raise ValueError(f"the guide has {text}; it has to predict the same thing as the model.")
        if self.origin.get("no_variance") and assemble.describe_sampling(config)["sampler"]["name"] == "ddpm":
            raise ValueError(
                "these weights learned no variance, with which ddpm draws; choose ddim, dpm-solver or unipc."
            )
        return ImageSampler(
            self.network,
            assemble.sampler(config, self.process),
            self.codec.decode,
            seed=sampling.seed,
            guidance=guidance_of(sampling, negative=negative, guide=guide.network if guide else None),
            noise_level=self.process.noise_level,
            dtype=torch.bfloat16 if self.precision == "bf16" else None,
            weights="these weights" if step is None else f"{self.origin['part']} of step {step}",
        )

    def settings(
        self, sampling: SampleConfig, *, guide: "Pipeline | None" = None, negative: int | None = None
    ) -> dict[str, Any]:
        """Say what, beside its number and label, makes an image what it is: JSON values."""
        return {
            "weights": {"sha256": self.sha256, "part": self.origin["part"], "step": self.origin.get("step")},
            **assemble.describe_sampling(dataclasses.replace(self.config, sample=sampling)),
            "negative_class": negative,
            "guide": {"sha256": guide.sha256, "step": guide.origin.get("step")} if guide else None,
            "codec": self.codec.identity,
            "precision": self.precision,
            "tf32": self.tf32 and self.device.type == "cuda",
            "compile": self.compiled,
        }

    def facts(self) -> dict[str, Any]:
        """Say what else is to be known of an image: where the weights were, the device, versions. JSON values."""
        gpu = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if gpu else f"cpu, {torch.get_num_threads()} threads"
        where = {"checkpoint": self.origin, "autoencoder": self.config.codec.get("path")}
        return {**where, "device": device, **checkpoint.origin()}

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
        sampling = self.config.sample.changed(sampler={"name": sampler} if isinstance(sampler, str) else sampler)
        steps = None if num_inference_steps is None else {"num_steps": num_inference_steps}
        sampling = sampling.changed(sampler=steps, cfg_scale=guidance_scale, seed=seed, **options)
        labels = self.label_ids([class_labels] if isinstance(class_labels, int | str) else class_labels)
        if not labels:
            raise ValueError("class_labels is empty; name at least one class.")
        image_sampler = self.image_sampler(sampling)
        images = image_sampler.all(labels, sampling.group_size)
        record = {**self.settings(sampling), "labels": labels, "nfe": image_sampler.nfe, **self.facts()}
        return Output([Image.fromarray(image) for image in images] if output_type == "pil" else images, record)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that holds all that `from_pretrained` needs: weights, config, autoencoder, and a model card.

        It is a checkpoint as training writes it, with the autoencoder beside, so that sample.py and `train.py --init` take
        it, too.

        Raises:
            ValueError: The folder holds something already.
            OSError: It cannot be written; nothing is left behind.
        """
        folder = Path(folder)
        with folder_written_aside(folder) as made:
            record = {key: value for key, value in self._record().items() if value is not None}
            checkpoint.save(made, record.pop("step"), {"ema": self.network.state_dict()}, record)
            if hasattr(self.codec, "vae"):
                self.codec.vae.register_to_config(_name_or_path=Path(self.config.codec["path"]).name)
                self.codec.vae.save_pretrained(made / VAE)
            (made / "README.md").write_text(self.card(folder.name), encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Put what `save_pretrained` writes on the Hugging Face hub, under owner/name; gives its address."""
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / repo_id.rpartition("/")[2]
            self.save_pretrained(made)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=made)
        return str(address)

    def card(self, title: str) -> str:
        """The README.md of a folder of these weights."""
        usage = "from vca_engine import Pipeline  # in a clone of the repository\n\n"
        usage += f'pipe = Pipeline.from_pretrained("{title}")\n'
        scale = self.config.sample.cfg_scale
        usage += f"images = pipe(class_labels=[{self.class_names[0]!r}], guidance_scale={scale}, seed=0).images"
        trained = self.origin.get("step") is not None
        facts = {
            "network": f"{type(self.network).__name__}, {sum(p.numel() for p in self.network.parameters()):,} parameters",
            **{
                k: v
                for k, v in facts_of(self._record(), self.origin["part"]).items()
                if trained or k not in OF_TRAINING
            },
            "from": self.origin["kind"],
            "SHA-256 of the weights": self.sha256,
        }
        vca = ["visual-contrast-attention"] if self.config.model.attention["name"] == "vca" else []
        return model_card(title, usage, facts, tags=vca, license="apache-2.0" if trained else "other")

    def _record(self) -> dict[str, Any]:
        """Of a checkpoint that holds these weights; of folders of this machine only the last name."""
        record = {
            "step": self.origin.get("step") or 0,
            "id": self.origin.get("id"),
            "config": to_dict(self.config),
            "shape": to_dict(self.shape),
            "codec": self.codec.identity,
            "origin": self.origin,
            **checkpoint.origin(),
        }
        return _without_folders(record)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(v) for key, v in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _found(codec: Spec, folder: Path) -> Spec:
    """The codec; a relative path that is not there is looked for from the folders above the checkpoint, too."""
    path = Path(codec.get("path") or ".")
    if path.is_absolute() or path.exists():
        return codec
    above = (parent / path for parent in folder.resolve().parents)
    return {**codec, "path": str(next((p for p in above if p.is_dir()), codec["path"]))}


def _sizes(config: Config) -> dict[str, Any]:
    """For what a person reads."""
    m = config.model
    changed = {key: getattr(m, key) for key in ("patch_size", "hidden_size", "depth", "num_heads") if getattr(m, key)}
    size = m.size + (f" ({', '.join(f'{k} {v}' for k, v in changed.items())})" if changed else "")
    return {"size": size, "attention": m.attention["name"]}
