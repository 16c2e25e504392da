"""A run as data: frozen dataclasses that say, field by field, what a YAML file and the command line may set.

The type of a number holds its range, and the type of a path marks it as a path.

`data`, `codec`, `process`, `model.attention` and `sample.sampler` are specs, `{name: ..., option: value}`. The class
that a spec names checks the options when it is built, before the first step.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vca_engine.config.reading import FilePath, Spec, Strict
from vca_engine.config.yamlfile import write_yaml
from vca_engine.files import write_text

Seed = Annotated[int, Field(ge=0, lt=2**64)]
Size = Annotated[int, Field(ge=1, le=2**20)]  # of a network
Count = Annotated[int, Field(ge=1, le=10_000)]  # of images to look at
Batch = Annotated[int, Field(ge=1, le=65_536)]  # of images that are in memory together
Steps = Annotated[int, Field(ge=1, le=10**9)]
ImagesMeasured = Annotated[int, Field(ge=2, le=10**7)]  # of a distance
Share = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[float, Field(ge=0, le=1)]  # of noise
Scale = Annotated[float, Field(ge=-1000, le=1000)]  # of guidance


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise ValueError "key is value; allowed" unless `condition`."""
    if not condition:
        raise ValueError(f"{key} is {value!r}; {allowed}.")


@dataclass(frozen=True)
class ModelConfig(Strict):
    """The network.

    Args:
        name: Name of a recogniser, for process classify: deit_tiny, pvt_tiny, swin_tiny, cswin_tiny, ...
            (classify.MODELS).
        drop_path: Probability that training leaves out the last block of a recogniser for an image; it is lower for
            earlier blocks.
        size: SIZE/PATCH, with SIZE one of S, B, L, XL; sets patch_size, hidden_size, depth and num_heads, in
            place of those in earlier files.
        patch_size: Side of a patch, in place of that of size.
        hidden_size: Width, in place of that of size.
        depth: Number of blocks, in place of that of size.
        num_heads: Number of attention heads, in place of that of size.
        mlp_ratio: Width of the MLP divided by hidden_size.
        class_dropout_prob: Share of labels replaced by the null class in training; 0 means no guidance.
        attention: Attention, vca, mhsa, differential, agent or linear; by name with its options.
    """

    name: str | None = None
    drop_path: Share = 0.0
    size: str = field(default="S/2", metadata={"replaces": ("patch_size", "hidden_size", "depth", "num_heads")})
    patch_size: Size | None = None
    hidden_size: Size | None = None
    depth: Size | None = None
    num_heads: Size | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=1000)] = 4.0
    class_dropout_prob: Share = 0.1
    attention: Spec = field(default_factory=lambda: {"name": "vca"})


@dataclass(frozen=True)
class TrainConfig(Strict):
    """The optimisation.

    Args:
        num_steps: Total number of optimizer steps.
        batch_size: Images per optimizer step, of all processes together.
        accumulate: Parts into which the batch is cut, each with its own forward pass, to save memory.
        lr: Learning rate of AdamW.
        betas: The two betas of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup_lr: Learning rate at the start of the warm-up.
        warmup_steps: Steps over which the learning rate rises linearly from warmup_lr.
        schedule: Learning rate after the warm-up: constant, or cosine, which falls to min_lr at num_steps.
        min_lr: Learning rate at the end of the cosine.
        cooldown_steps: Last steps of num_steps, all of them with min_lr; the cosine ends before them.
        max_grad_norm: Largest norm of the gradients, to which larger ones are scaled down; by default there is none.
        max_skipped: Number of skipped steps in a row that ends training; a step is skipped if its loss or gradient is
            not finite.
        ema_decay: Decay of the averaged weights, which draw the images.
        ema_warmup: Use min(ema_decay, (1 + step) / (10 + step)), so that the start does not dominate a short run.
        ema_stds: Relative widths of the power-function averages (EDM2); [] keeps none. After the training,
            python -m vca_engine.training.reconstruct makes averages of any other width out of them.
        snapshot_every: Steps between two snapshots of the power-function averages; the end of training writes one, too.
        precision: Precision of the arithmetic, auto, no or bf16; no is float32, and auto is bf16 on a GPU that has it,
            else no.
        tf32: Let GPUs round the inputs of float32 products to TF32.
        compile: Compile each block with torch.compile.
        fused: AdamW as one kernel; otherwise each step waits for the device to find out whether it is skipped.
        grad_checkpointing: Compute the activations of each block again in the backward pass, to save memory.
        channels_last: Use the memory layout that GPUs prefer for the autoencoder's convolutions; no effect on a CPU.
        preload: Keep all cached latents in the memory of the device.
        num_workers: Processes that load data, for each training process; by default up to 4 for images, and none for
            cached latents, which the training process itself reads faster.
        timeout: Minutes that a process waits for data or for another process before the run ends with an error; choose
            more than a preview takes.
        log_every: Steps between two lines of metrics.jsonl.
        tracker: Program that also shows the metrics: tensorboard, wandb, trackio or none.
        sample_every: Steps between two preview grids.
        checkpoint_every: Steps between two checkpoints; the end of training writes one, too.
        keep_checkpoints: Number of newest checkpoints to keep; by default all.
        keep_every: Also keep the checkpoints of all steps that are multiples of this.
    """

    num_steps: Steps = 400_000
    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 256
    accumulate: Annotated[int, Field(ge=1, le=10**6)] = 1
    lr: Annotated[float, Field(gt=0, le=100)] = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    warmup_lr: Annotated[float, Field(ge=0, le=100)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: Annotated[float, Field(ge=0, le=100)] = 0.0
    cooldown_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    max_grad_norm: Annotated[float, Field(gt=0, le=10**6)] | None = None
    max_skipped: Steps = 10
    ema_decay: Share = 0.9999
    ema_warmup: bool = True
    ema_stds: list[Annotated[float, Field(gt=0, le=12**-0.5)]] = field(default_factory=lambda: [0.05, 0.1])
    snapshot_every: Steps = 20_000
    precision: Literal["auto", "no", "bf16"] = "auto"
    tf32: bool = True
    compile: bool = False
    fused: bool = True
    grad_checkpointing: bool = False
    channels_last: bool = True
    preload: bool = False
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    timeout: Annotated[int, Field(ge=1, le=10**6)] = 30
    log_every: Steps = 100
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    sample_every: Steps = 10_000
    checkpoint_every: Steps = 10_000
    keep_checkpoints: Steps | None = None
    keep_every: Steps | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        different = len({f"{std:g}" for std in self.ema_stds}) == len(self.ema_stds)
        require(different, "train.ema_stds", self.ema_stds, "choose different numbers")
        for name in ("warmup_lr", "min_lr"):
            value = getattr(self, name)
            require(value <= self.lr, f"train.{name}", value, f"choose at most train.lr, {self.lr:g}")
        if self.warmup_lr and not self.warmup_steps:
            raise ValueError("train.warmup_lr is given, but no train.warmup_steps; give both, or neither.")
        if self.schedule == "constant" and (self.min_lr or self.cooldown_steps):
            given = "min_lr" if self.min_lr else "cooldown_steps"
            raise ValueError(f"train.{given} is of the cosine schedule; give --train.schedule cosine, or leave it out.")
        steps = self.warmup_steps + self.cooldown_steps
        require(
            not self.cooldown_steps or steps < self.num_steps,
            "train.cooldown_steps",
            self.cooldown_steps,
            f"warm-up and cool-down have to leave some of the {self.num_steps:,} steps to the cosine",
        )
        if self.keep_every and not self.keep_checkpoints:
            raise ValueError(
                "train.keep_every is given, but all checkpoints are kept; give train.keep_checkpoints, too."
            )

    def workers(self, cached: bool = False) -> int:
        """Give the number of processes that load images, or cached latents."""
        if self.num_workers is not None:
            return self.num_workers
        return 0 if cached else min(4, os.cpu_count() or 1)

    def kept(self) -> list[int]:
        """List the steps whose checkpoints are kept at the end."""
        every = self.checkpoint_every
        steps = sorted({*range(every, self.num_steps + 1, every), self.num_steps})
        if not self.keep_checkpoints:
            return steps
        old, newest = steps[: -self.keep_checkpoints], steps[-self.keep_checkpoints :]
        return [s for s in old if self.keep_every and s % self.keep_every == 0] + newest


@dataclass(frozen=True)
class SampleConfig(Strict):
    """How images are drawn, in previews and by default in sample.py.

    Args:
        sampler: Sampler by name with its options; ddpm, ddim, dpm-solver or unipc for a diffusion, ode or sde for a
            flow. The default is the published one, 250 steps of ddpm or sde. For ode and sde, num_steps counts points
            of time, as published: one more than the steps between them.
        cfg_scale: Scale of guidance, 1 is none: other + cfg_scale (output - other), where other is the output without a
            class.
        guided_channels: Number of first channels to guide; by default all; 3 reproduces the published tables.
        guidance_interval: Lowest and highest noise level with guidance, from 0 (data) to 1 (noise), e.g. [0,0.7]; by
            default all.
        classes: Classes of a grid, by number or name, one per row; by default all, or 10 evenly spaced ones.
        per_class: Images of each class in a grid.
        seed: Seed of the images, independent of that of training.
        group_size: Number of neighbours among N numbered images that are always drawn together. Therefore no image
            depends on the batch size or the number of processes, not even by rounding. A larger group is faster for a
            small network.
    """

    sampler: Spec | None = None
    cfg_scale: Scale = 1.0
    guided_channels: Size | None = None
    guidance_interval: tuple[Level, Level] | None = None
    classes: list[str] | None = None
    per_class: Count = 8
    seed: Seed = 0
    group_size: Batch = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classes != [], "sample.classes", self.classes, "name at least one class, or leave it out")
        low, high = self.guidance_interval or (0, 1)
        allowed = "choose two noise levels between 0 and 1, the lower first"
        require(low <= high, "sample.guidance_interval", self.guidance_interval, allowed)

    def changed(self, **given: Any) -> "SampleConfig":
        """Change the fields that are given and not None; a sampler without a name changes options of the old one."""
        given = {name: value for name, value in given.items() if value is not None}
        if "name" not in given.get("sampler", {"name": None}):
            given["sampler"] = {**(self.sampler or {}), **given["sampler"]}
        return dataclasses.replace(self, **given)


NEED_GUIDANCE = ("guided_channels", "guidance_interval")  # fields of SampleConfig that change nothing at cfg_scale 1


@dataclass(frozen=True)
class FidConfig(Strict):
    """How drawn images are measured, by sample.py --fid and during training.

    Args:
        reference: What drawn images are compared with: a file of statistics, or images (a folder, .zip, .npz, .npy).
        extractor: Network that computes the features.
        preset: Protocol of Inception.
        weights: File with the extractor's weights; by default the one that python -m fid finds by itself.
        metrics: Names of metrics, which python -m fid eval --help explains; by default those of the preset.
        every: Training steps between two evaluations of the averaged weights; by default there are none.
        num: Images of an evaluation in training; the literature's FID takes 50000.
    """

    reference: FilePath | None = None
    extractor: str = "inception"  # a name in `fid`, which the programs hand to the reader of settings
    preset: str = "adm"
    weights: FilePath | None = None
    metrics: list[str] | None = None
    every: Steps | None = None
    num: ImagesMeasured = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is not None and self.reference is None:
            raise ValueError(
                "fid.every is given, but no fid.reference; name the file or folder to compare with: "
                "--fid.reference PATH."
            )

    def evaluator_options(self) -> dict[str, Any]:
        """Give the keywords of `fid.open_evaluator`: extractor, its weights, preset, metrics and reference."""
        return {name: getattr(self, name) for name in ("reference", "extractor", "weights", "preset", "metrics")}


@dataclass(frozen=True)
class EvalConfig(Strict):
    """How a recogniser is measured in training: with its averaged weights, on images that it does not learn from.

    Args:
        data: Images to evaluate a recogniser on; give only the options that differ from those of data: images DIR, or
            split test. By default nothing is measured.
        every: Training steps between two evaluations; by default there is one, at the end.
        crop: Share of the shorter side of an image that the network sees: 0.875 is 224 of 256 pixels.
    """

    data: Spec | None = None
    every: Steps | None = None
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is not None and self.data is None:
            raise ValueError(
                "eval.every is given, but no eval.data; name the images to evaluate on: --eval.data.images DIR."
            )


@dataclass(frozen=True)
class CacheConfig(Strict):
    """How cache_latents.py encodes images.

    Args:
        moments: Keep mean and standard deviation, from which training draws a new latent in every epoch; if false, keep
            one latent.
        precision: Precision of the codec's arithmetic.
        batch_size: Images encoded together, on each process.
        shard_size: Images in a file.
        on_error: Stop at an image that cannot be read, or skip it and list it in the manifest. An error of the disk,
            such as a link that leads nowhere, always stops.
    """

    moments: bool = True
    precision: Literal["no", "bf16"] = "no"
    batch_size: Batch = 32
    shard_size: Annotated[int, Field(ge=1, le=10**6)] = 1024
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Config(Strict):
    """A run: everything that train.py needs. The checkpoint keeps it for sample.py.

    Args:
        run_dir: Folder of the run: checkpoints, previews, metrics. The same command goes on where it stopped.
        process: Process, diffusion (DiT), flow (SiT) or classify (recogniser); by name with its options.
        data: Kind of images, folder, mnist or digits; by name with its options.
        codec: Codec between images and latents, pixels or vae; by name with its options.
        init: Weights to start from: a run, or one of its checkpoints; a .safetensors or published .pt file; a folder of
            diffusers; a name on the hub, e.g. facebook/DiT-XL-2-256. The default is random weights.
        latents: Folder of latents that cache_latents.py made with the same config; by default every step reads and
            encodes images.
        cache: How latents are cached.
        seed: Seed of initialisation, data order and noise.
        model: The network.
        train: The optimisation.
        sample: How images are drawn.
        fid: How drawn images are measured.
        eval: How a recogniser is measured.
    """

    run_dir: FilePath
    process: Spec
    data: Spec
    codec: Spec
    init: FilePath | None = None
    latents: FilePath | None = None
    cache: CacheConfig = field(default_factory=CacheConfig)
    seed: Seed = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    fid: FidConfig = field(default_factory=FidConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("process", "data", "codec"):
            spec = getattr(self, key)
            require("name" in spec, key, spec, f"it needs a name, so give {key}.name")
            require(isinstance(spec["name"], str), f"{key}.name", spec["name"], "it must be a word")


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into nested dicts of plain values, fit for YAML and JSON; tuples become lists."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


def save_yaml(config: Any, path: Path) -> None:
    """Write the resolved config."""
    write_text(path, write_yaml(to_dict(config)))
