"""Options that several programs share: which model it is, and how it draws."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vca_engine.config.reading import FilePath, Spec, Strict
from vca_engine.config.schema import SampleConfig

# The fields of SampleConfig, none of which has to be given: what is None stays as it is in the run's config.
SampleOptions = dataclasses.make_dataclass(
    "SampleOptions",
    [(f.name, f.type | None, None) for f in dataclasses.fields(SampleConfig)],
    bases=(Strict,),
    namespace={"__doc__": SampleConfig.__doc__},
    frozen=True,
)


def with_options(sampling: SampleConfig, options: Any) -> SampleConfig:
    """Change the settings that are given in `options`, `SampleOptions` with or without more fields.

    Raises:
        ValueError: A value that is not allowed.
    """
    return sampling.changed(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SampleConfig)})


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Strict):
    """Trained weights.

    Args:
        checkpoint: A run's folder, for its newest checkpoint, or one of its checkpoints/step-* folders. May stand
            first, without its name.
        weights: ema, the averaged weights; ema-0.05 and the like, the power-function averages; model, those of the last
            training step.
    """

    checkpoint: FilePath
    weights: str = "ema"


@dataclass(frozen=True, kw_only=True)
class WeightsOptions(CheckpointOptions):
    """The arithmetic that trained weights are used with.

    Args:
        precision: no, the weights' float32, or bf16.
        tf32: Let GPUs round the inputs of float32 products to TF32.
        compile: Compile each block with torch.compile.
        device: cuda or cpu; auto is the GPU if there is one.
    """

    precision: Literal["no", "bf16"] = "no"
    tf32: bool = True
    compile: bool = False
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def loading(self) -> dict[str, Any]:
        """Give the options of `from_pretrained`, all but the device, of which a program asks first."""
        return {name: getattr(self, name) for name in ("weights", "precision", "tf32", "compile")}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(WeightsOptions):
    """Trained weights that make images, with what published ones do not say.

    Args:
        checkpoint: A run's folder, for its newest checkpoint, or one of its checkpoints/step-* folders; a published
            .pt; a folder of diffusers' DiT; a name on the hub. May stand first, without its name.
        process: diffusion or flow, with its options, where published weights do not say it.
        vae: Where the autoencoder is now, if not where it was in training, or for published weights another than
            theirs.
    """

    process: Spec | None = None
    vae: FilePath | None = None

    def loading(self) -> dict[str, Any]:
        """Give the options of `Pipeline.from_pretrained`, all but the device, of which a program asks first."""
        return {**super().loading(), "process": self.process, "vae": self.vae}
