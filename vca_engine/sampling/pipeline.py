"""A trained model, ready to draw: `pipe(class_labels=[...])`, from a run, a checkpoint, published weights or the hub.

    from vca_engine import Pipeline

    pipe = Pipeline.from_pretrained("runs/sit_b2_vca")          # or a .pt of DiT or SiT, or facebook/DiT-XL-2-256
    output = pipe(class_labels=["goldfish", 7], guidance_scale=4.0, num_inference_steps=50, seed=0)
    output.images[0].save("goldfish.png")
    pipe.save_pretrained("my_model")                            # one folder that holds all that it needs

`sample.py` and `app.py` draw through it, too.
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
    """The images that a call of a pipeline gives, and how they were made.

    Attributes:
        images: PIL images; or (B, H, W, 3) uint8 with output_type "np".
        record: How they were made, JSON values.
    """

    images: Any
    record: dict[str, Any]


@dataclass
class Pipeline(TrainedModel):
    """A trained model that draws.

    Args:
        precision: `no`, the weights' own float32, or `bf16`, autocast.
        tf32: Whether a GPU may round the inputs of float32 products to TF32.
        compiled: Whether its blocks are compiled.
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
        model = load_model(path, weights, process, vae)
        if not assemble.is_generator(model.config):
            raise ValueError(
                f"{str(path)!r} holds a recogniser, {model.config.model.name}, which draws no images; use python -m "
                "classify."
            )
        model.prepare(device, tf32=tf32, compile=compile)
        return cls(**vars(model), precision=precision, tf32=tf32, compiled=compile)

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
        """Say what else is to be known of an image: where its autoencoder and weights were, the device, versions."""
        return {"autoencoder": self.config.codec.get("path"), **super().facts()}

    def usage(self, name: str) -> str:
        """Write lines of Python that use the model out of the folder, or from the hub, by its name."""
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
        """Draw images of each class; image i is a function of the seed, i and its class, to rounding.

        Args:
            class_labels: Numbers or names.
            num_images_per_class: Images of each of them, one after the other: [1, 2] with 3 are the classes 1, 1, 1, 2,
                2, 2.
            guidance_scale: 1 is no guidance; not given means as the model's config says, here and in what follows.
            num_inference_steps: Of the sampler; for ode and sde points of time.
            seed: Of all of them.
            sampler: By name with its options, `{"name": "ode", "method": "heun"}`; options alone change the model's.
            output_type: pil or np.
            options: Other fields of `SampleConfig`: guidance_interval=(0, 0.7), guided_channels=3, group_size=64.

        Raises:
            ValueError: An unknown class, fewer than one image of each, or a sampler or guidance that this model cannot
                have.
            TypeError: An option that is none.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type is {output_type!r}; choose pil or np.")
        given = {"cfg_scale": guidance_scale, "seed": seed, **options}
        sampling = _with_given(self.config.sample, sampler, num_inference_steps, **given)
        labels = self.label_ids([class_labels] if isinstance(class_labels, int | str) else class_labels)
        if not labels:
            raise ValueError("class_labels is empty; name at least one class.")
        if num_images_per_class < 1:
            raise ValueError(f"num_images_per_class is {num_images_per_class}; choose at least 1.")
        labels = [label for label in labels for _ in range(num_images_per_class)]
        image_sampler = self.image_sampler(sampling)
        images = image_sampler.all(labels, sampling.group_size)
        record = {**self.settings(sampling), "labels": labels, "nfe": image_sampler.nfe, **self.facts()}
        return Output([Image.fromarray(image) for image in images] if output_type == "pil" else images, record)


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
