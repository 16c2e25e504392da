"""A trained model that draws images: `pipe(class_labels=[...])`. It is a run, a checkpoint, or weights of others.

    from vca_engine import Pipeline

    pipe = Pipeline.from_pretrained("runs/sit_b2_vca")          # or a .pt of DiT or SiT, or facebook/DiT-XL-2-256
    output = pipe(class_labels=["goldfish", 7], guidance_scale=4.0, num_inference_steps=50, seed=0)
    output.images[0].save("goldfish.png")
    pipe.save_pretrained("my_model")                            # one folder, with the autoencoder

`sample.py` and `app.py` draw with it, too.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from PIL import Image

from vca_engine import assemble
from vca_engine.config.reading import Spec
from vca_engine.config.schema import SampleConfig
from vca_engine.records import differences, listed
from vca_engine.sampling.classes import find_classes
from vca_engine.sampling.guidance import guidance_of
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.sampling.trained_model import TrainedModel, load_model


class Output(NamedTuple):
    """Images that a pipeline has drawn, and how they were made.

    Attributes:
        images: PIL images; or (B, H, W, 3) uint8 with output_type "np".
        record: How the images were made: JSON values.
    """

    images: Any
    record: dict[str, Any]


@dataclass
class Pipeline(TrainedModel):
    """A trained model that draws.

    Args:
        precision: `no` for float32, or `bf16` for autocast.
        tf32: Whether a GPU may round the inputs of float32 products to TF32.
        compiled: Whether the blocks of the network are compiled.
    """

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
        """Load a model. The content of the path decides how it is read; no code in it is run.

        Args:
            path: A run's folder (its newest checkpoint is taken), one of its checkpoints, a folder written by
                `save_pretrained`; a .pt of the published DiT or SiT, or a .safetensors file with their keys; a folder
                of diffusers' DiT; or the name of one of these on the Hugging Face hub.
            weights: The weights to take from a run: ema, ema-0.05 and the like, or model.
            process: diffusion or flow, by name or as a spec with options. Only for published weights, and only what
                they do not say themselves, e.g. the path of a flow.
            vae: The autoencoder, a folder of diffusers or a hub name. By default the path of the training, or the
                autoencoder of the published models.
            device: By default the GPU if there is one, else the CPU.
            precision: no (float32) or bf16.
            tf32: Whether a GPU may round the inputs of float32 products to TF32.
            compile: Whether to compile each block with torch.compile.

        Raises:
            FileNotFoundError: The path, the name, or a file that belongs to it does not exist.
            ValueError: The path holds no generator, or it does not say which `process` or `vae` it needs.
        """
        model = load_model(path, weights, process, vae)
        if not assemble.is_generator(model.config):
            raise ValueError(
                f"{str(path)!r} holds a recogniser, {model.config.model.name}, which draws no images; use python -m "
                "classify."
            )
        model.prepare(device, tf32=tf32, compile=compile)
        return cls(**vars(model), precision=precision, tf32=tf32, compiled=compile)

    def label_ids(self, classes: Sequence[int | str]) -> list[int]:
        """Find the numbers of classes, which are given by number (int) or name (str); see `find_classes`."""
        return find_classes(classes, self.class_names)

    def image_sampler(
        self, sampling: SampleConfig, *, guide: "Pipeline | None" = None, negative: int | None = None
    ) -> ImageSampler:
        """Make an image sampler with the settings of `sampling`.

        Args:
            sampling: Sampler, guidance and seed.
            guide: A worse model of the same images, whose output replaces the unconditional one in guidance.
            negative: A class whose output replaces the unconditional one in guidance.

        Raises:
            ValueError: The model cannot draw with this sampler or this guidance.
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
        """List all that determines an image, beside its number and its label: JSON values."""
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
        """List further facts for the record of an image: paths of autoencoder and weights, device, versions."""
        return {"autoencoder": self.config.codec.get("path"), **super().facts()}

    def usage(self, name: str) -> str:
        """Write Python code that draws with the model of the folder, or of the hub, called `name`."""
        scale, first = self.config.sample.cfg_scale, self.class_names[0]
        return (
            "from vca_engine import Pipeline  # in a clone of the repository, or anywhere after pip install . in it\n\n"
            f'pipe = Pipeline.from_pretrained("{name}")\n'
            f"images = pipe(class_labels=[{first!r}], guidance_scale={scale}, seed=0).images"
        )

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        *,
        num_images_per_class: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        sampler: str | Spec | None = None,
        output_type: Literal["pil", "np"] = "pil",
        **options: Any,
    ) -> Output:
        """Draw images of each class. Up to rounding, image i is a function of the seed, i and its class.

        An argument that is None has the value of the model's config.

        Args:
            class_labels: Numbers or names of classes.
            num_images_per_class: Images of each class, one after the other: with 3, [1, 2] are 1, 1, 1, 2, 2, 2.
            guidance_scale: Scale of guidance; 1 is no guidance.
            num_inference_steps: Steps of the sampler; for ode and sde, points of time.
            seed: Seed of all images.
            sampler: Sampler by name or with its options, `{"name": "ode", "method": "heun"}`. Options without a name
                change the sampler of the model's config.
            output_type: pil or np.
            options: Other fields of `SampleConfig`: guidance_interval=(0, 0.7), guided_channels=3, group_size=64.

        Raises:
            ValueError: There is no such class, `num_images_per_class` is below 1, or the model cannot draw with this
                sampler or this guidance.
            TypeError: `options` has a name that is no field of `SampleConfig`.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type is {output_type!r}; choose pil or np.")
        given = {"cfg_scale": guidance_scale, "seed": seed, **options}
        sampling = _with_given(self.config.sample, sampler, num_inference_steps, **given)
        labels = self.label_ids([class_labels] if isinstance(class_labels, int | str) else class_labels)
        if not labels:
            raise ValueError("class_labels is empty; name at least one class.")
        if not isinstance(num_images_per_class, int) or num_images_per_class < 1:
            raise ValueError(f"num_images_per_class is {num_images_per_class!r}; choose a whole number of at least 1.")
        labels = [label for label in labels for _ in range(num_images_per_class)]
        image_sampler = self.image_sampler(sampling)
        images = image_sampler.all(labels, sampling.group_size)
        record = {**self.settings(sampling), "labels": labels, "nfe": image_sampler.nfe, **self.facts()}
        return Output([Image.fromarray(image) for image in images] if output_type == "pil" else images, record)


def _check_sampling(model: Pipeline, sampling: SampleConfig, guide: Pipeline | None, negative: int | None) -> None:
    """Raise ValueError if the model cannot draw with this sampler and guidance, or the guide is of other latents."""
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
    """Change settings of drawing to the arguments of a call that are not None."""
    sampling = sampling.changed(sampler={"name": sampler} if isinstance(sampler, str) else sampler)
    return sampling.changed(sampler=None if num_steps is None else {"num_steps": num_steps}, **given)
