"""Config -> model, process, data and codec: the one place where names in a YAML file become objects."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import dit_vca
import fid
import sit_vca
from dit_vca import Diffusion, DiT, from_diffusers
from runtime.codecs import CODECS, draw
from runtime.config import Config, SampleConfig, require
from runtime.data import DATASETS, Images
from runtime.generation import Guidance
from runtime.latents import LatentDataset
from runtime.reading import Strict
from runtime.weights import read_weights
from sit_vca import PATHS, TIMES, SiT, Transport
from vca import ATTENTIONS, Adapted, Transformer, adapt, build, defaults_of, lookup, options_of, parse_size

PROCESSES = {"diffusion": (Diffusion, DiT), "flow": (Transport, SiT)}
SAMPLERS = {"diffusion": dit_vca.SAMPLERS, "flow": sit_vca.SAMPLERS}
PARTS = {  # what is a name with options in a config -> its registry
    "process": {name: process for name, (process, _) in PROCESSES.items()},
    "path": PATHS,
    "time": TIMES,
    "data": DATASETS,
    "codec": CODECS,
    "attention": ATTENTIONS,
    "sampler": {**dit_vca.SAMPLERS, **sit_vca.SAMPLERS},
}
Process = Diffusion | Transport


@dataclass(frozen=True)
class Shape(Strict):
    """What a model has to know of its data, kept in each checkpoint so that sampling needs no data.

    Args:
        image_size: Side of the square images.
        channels: Of the images.
        class_names: Of the labels 0, 1, ...
    """

    image_size: int
    channels: int
    class_names: list[str]

    def __post_init__(self) -> None:
        require(self.image_size > 0, "image_size", self.image_size, "choose at least 1")
        require(self.channels > 0, "channels", self.channels, "choose at least 1")
        require(bool(self.class_names), "class_names", self.class_names, "a model has at least one class")


def build_process(config: Config) -> Process:
    """The process, `diffusion` or `flow`, with its options."""
    return build(PARTS["process"], config.process, "process")


def resolved_process(config: Config) -> dict[str, Any]:
    """The spec of the process with every option."""
    process, _ = lookup(PROCESSES, config.process["name"], "process.name")
    return {"name": config.process["name"], **defaults_of(process), **config.process}


def drawn_by(config: Config) -> dict[str, Any]:
    """What of the process drawing depends on; how t and the loss were weighted in training is not of it."""
    return {key: value for key, value in resolved_process(config).items() if key not in ("time", "weight")}


def build_sampler(config: Config, process: Process) -> Callable[..., Tensor]:
    """The sampler of `sample.sampler`; where that has no name, the published one of the process."""
    return process.sampler(config.sample.sampler)


def build_guidance(sample: SampleConfig, **others: Any) -> Guidance:
    """The guidance of `sample`; `others` are fields of `Guidance` that it does not have."""
    return Guidance(sample.cfg_scale, sample.guided_channels, sample.guidance_interval, **others)


def describe_sampling(config: Config) -> dict[str, Any]:
    """What, beside the weights and the labels, makes an image what it is: JSON values, with every option of the sampler."""
    kind, spec = config.process["name"], dict(config.sample.sampler or {})
    process, _ = lookup(PROCESSES, kind, "process.name")
    name = spec.pop("name", process.published_sampler)
    options = defaults_of(lookup(SAMPLERS[kind], name, "sample.sampler.name"))
    fields = ("cfg_scale", "guided_channels", "guidance_interval", "seed", "group_size")
    return {
        "process": resolved_process(config),
        "sampler": {"name": name, **options, **spec},
        **{name: getattr(config.sample, name) for name in fields},
        "quantize": "dit",  # how pixels are rounded to uint8, see `vca_engine.images.quantize`
    }


def build_codec(config: Config, channels: int) -> Any:
    """The codec for images of `channels` channels."""
    return build(CODECS, config.codec, "codec", channels)


def build_evaluator(config: Config, device: Any) -> fid.Evaluator:
    """The evaluator of `config.fid`, with its reference open and its network on `device`."""
    c = config.fid
    reference = fid.open_reference(c.reference, fid.LABELS[c.extractor])  # before the network: it fails sooner
    extractor = fid.build_extractor(c.extractor, c.weights, c.preset)
    return fid.Evaluator(reference, extractor=extractor, metrics=c.metrics, device=device)


def build_images(config: Config) -> Images:
    """The dataset of images."""
    return build(DATASETS, config.data, "data")


def needed_latents(config: Config, codec: Any) -> dict[str, Any]:
    """What cached latents have to be made of to be those of the config's data and codec, wherever these lie."""
    options = {key: value for key, value in config.data.items() if key != "images"}
    defaults = defaults_of(lookup(DATASETS, config.data["name"], "data.name"))
    return {"data": {**defaults, **options}, "codec": codec.identity}


def to_latents(config: Config, codec: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A batch of the data and its positions in the run -> latents (B, C, h, w); images are encoded first."""

    def latents(x: Tensor, positions: Tensor) -> Tensor:
        return draw(x if config.latents else codec.moments(x), codec.channels, config.seed, positions)

    return latents


def shape_of(data: Images | LatentDataset) -> Shape:
    """The shape of a dataset."""
    return Shape(data.image_size, data.channels, data.class_names)


def build_model(config: Config, shape: Shape, codec: Any) -> Transformer:
    """The network, DiT or SiT, for latents of images of this shape.

    Raises:
        ValueError: The image size is not a multiple of the codec's factor times the patch size.
    """
    _, model_class = lookup(PROCESSES, config.process["name"], "process.name")
    options = parse_size(config.model.size)
    overrides = {key: getattr(config.model, key) for key in ("patch_size", "hidden_size", "depth", "num_heads")}
    options |= {key: value for key, value in overrides.items() if value is not None}
    side = codec.downsample * options["patch_size"]
    if shape.image_size % side:
        raise ValueError(
            f"images of {shape.image_size}x{shape.image_size} cannot be cut into patches: the codec divides the side by "
            f"{codec.downsample}, the patch by {options['patch_size']}; choose a multiple of {side}."
        )
    return model_class(
        input_size=shape.image_size // codec.downsample,
        in_channels=codec.channels,
        num_classes=len(shape.class_names),
        mlp_ratio=config.model.mlp_ratio,
        class_dropout_prob=config.model.class_dropout_prob,
        attention=config.model.attention,
        **options,
    )


def with_attention_of(config: Config, known: dict[str, Any], *options: str) -> Config:
    """The config with options of its attention as in `known`, where it does not say them itself.

    Args:
        config: What was asked for.
        known: The attention of a run or of weights, by which the defaults of that time go on.
        options: Which; not given means all.
    """
    spec = config.model.attention
    if spec.get("name") != known.get("name"):
        return config
    taken = {option: value for option, value in known.items() if option in options or not options}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention={**taken, **spec}))


def initialise(network: Transformer, path: str, class_names: list[str] | None = None) -> Adapted:
    """Start a network from the weights at `path`, as far as they fit; see `read_weights` and `vca.adapt`.

    Args:
        network: The network, on any device; it gets the weights.
        path: A run or checkpoint of ours, a published file, a folder of diffusers, or a name on the hub.
        class_names: Of the network's labels; where the weights know theirs, class rows go by name.

    Returns:
        What was loaded, changed, missing and unused; `str()` of it is a summary.

    Raises:
        FileNotFoundError: There is no such path, or a folder lacks one of its files.
        ValueError: It holds no weights, or weights of a network of another size.
    """
    tensors, kind, old_names, _ = read_weights(path)
    try:
        adapted = adapt(
            from_diffusers(tensors) if kind == "diffusers" else tensors,
            network,
            num_classes=len(old_names) if old_names else None,
            names=(old_names, class_names) if old_names and class_names else None,
        )
    except ValueError as error:
        raise ValueError(f"the weights at {str(path)!r} do not fit: {error}") from None
    network.load_state_dict(adapted.state)
    return adapted


def sampler_help() -> str:
    """The samplers and their options, for the --help of sample.py."""
    return _table(
        "samplers and their options, e.g. --sampler.num_steps 50, --sampler.name sde --sampler.last_step tweedie:",
        {"of a diffusion": dit_vca.SAMPLERS, "of a flow": sit_vca.SAMPLERS},
    )


def options_help() -> str:
    """The names and options of the polymorphic parts, for --help."""
    parts = {
        "process": PARTS["process"],
        "process.path (flow)": PATHS,
        "process.time (flow)": TIMES,
        "data": DATASETS,
        "codec": CODECS,
        "model.attention": ATTENTIONS,
        "sample.sampler (diffusion)": dit_vca.SAMPLERS,
        "sample.sampler (flow)": sit_vca.SAMPLERS,
    }
    example = "names and their options, e.g. --process.name flow --process.path vp, --sample.sampler.num_steps 50:"
    return _table(example, parts)


def _table(title: str, parts: dict[str, dict[str, Any]]) -> str:
    """A line for each entry of each registry, with its keyword-only arguments."""
    lines = [title]
    for part, registry in parts.items():
        for i, (name, entry) in enumerate(registry.items()):
            options = ", ".join(o for o in options_of(entry) if o not in ("layer_index", "num_prefix_tokens"))
            lines.append(f"  {part if i == 0 else '':<27} {name:<13} {options}".rstrip())
    return "\n".join(lines)
