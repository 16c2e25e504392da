"""A Config as objects: process, sampler, codec, data, network. Only here do names in a YAML file become objects."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dit_vca
import sit_vca
from dit_vca import Diffusion, DiT
from sit_vca import PATHS, TIMES, SiT, Transport
from vca import ATTENTIONS, Sampler, Transformer, create, defaults_of, lookup, nearest, options_of, parse_size
from vca_engine.config.schema import Config
from vca_engine.images.codecs import CODECS
from vca_engine.images.datasets import DATASETS, ImageDataset
from vca_engine.images.labels import DataInfo

Process = Diffusion | Transport


@dataclass(frozen=True)
class ProcessKind:
    """A process with all that belongs to it.

    Args:
        process: Its class.
        network: The class of its network.
        samplers: Name -> class `(process, *, ...)`.
        published_sampler: Name of the sampler of the published tables.
    """

    process: type
    network: type[Transformer]
    samplers: Mapping[str, type]
    published_sampler: str


PROCESSES = {
    "diffusion": ProcessKind(Diffusion, DiT, dit_vca.SAMPLERS, "ddpm"),
    "flow": ProcessKind(Transport, SiT, sit_vca.SAMPLERS, "sde"),
}


def parts() -> dict[str, Mapping[str, Any]]:
    """Gather what is a name with options in a config: its registry, with what was entered until now."""
    return {
        "process": {name: kind.process for name, kind in PROCESSES.items()},
        "path": PATHS,
        "time": TIMES,
        "data": DATASETS,
        "codec": CODECS,
        "attention": ATTENTIONS,
        "sampler": {name: sampler for kind in PROCESSES.values() for name, sampler in kind.samplers.items()},
    }


def process_kind(config: Config) -> ProcessKind:
    """Look up what belongs to the process of a config."""
    return lookup(PROCESSES, config.process["name"], "process.name")


def process(config: Config) -> Process:
    """Make the process, `diffusion` or `flow`, with its options."""
    return create({name: kind.process for name, kind in PROCESSES.items()}, config.process, "process")


def sampler(config: Config, process: Process) -> Sampler:
    """Make the sampler of `sample.sampler`; where that has no name, the published one of the process.

    Raises:
        ValueError: An unknown name, option or value.
    """
    kind = process_kind(config)
    spec = {"name": kind.published_sampler, **(config.sample.sampler or {})}
    return create(kind.samplers, spec, "sample.sampler", process)


def check_sampler(spec: Mapping[str, Any] | None, where: str) -> None:
    """Raise ValueError for a sampler, or an option of one, that no process has: before it is known which process it is.

    Args:
        spec: With or without a name.
        where: What it is called on the command line.
    """
    samplers, options = parts()["sampler"], dict(spec or {})
    name = options.pop("name", None)
    possible = samplers.values() if name is None else [lookup(samplers, name, f"{where}.name")]
    allowed = sorted({option for sampler in possible for option in options_of(sampler)})
    for option in options:
        if option not in allowed:
            what = where if name is None else f"{where} {name!r}"
            raise ValueError(f"{what} takes no {option!r};{nearest(option, allowed)} it takes {allowed}.")


def codec(config: Config, channels: int | None) -> Any:
    """Make the codec for images of `channels` channels; None means whatever an autoencoder takes."""
    return create(CODECS, config.codec, "codec", channels)


def images(config: Config) -> ImageDataset:
    """Open the dataset of images."""
    return create(DATASETS, config.data, "data")


def network(config: Config, info: DataInfo, codec: Any) -> Transformer:
    """Make the network, DiT or SiT, for latents of images as `info` says.

    Raises:
        ValueError: The image size is not a multiple of the codec's factor times the patch size.
    """
    options = parse_size(config.model.size)
    overrides = {key: getattr(config.model, key) for key in ("patch_size", "hidden_size", "depth", "num_heads")}
    options |= {key: value for key, value in overrides.items() if value is not None}
    side = codec.downsample * options["patch_size"]
    if info.image_size % side:
        raise ValueError(
            f"images of {info.image_size}x{info.image_size} cannot be cut into patches: the codec divides the side by "
            f"{codec.downsample}, the patch by {options['patch_size']}; choose images with sides of "
            f"a multiple of {side}, or another --model.patch_size."
        )
    return process_kind(config).network(
        input_size=info.image_size // codec.downsample,
        in_channels=codec.channels,
        num_classes=len(info.class_names),
        mlp_ratio=config.model.mlp_ratio,
        class_dropout_prob=config.model.class_dropout_prob,
        attention=config.model.attention,
        **options,
    )


def describe_process(config: Config) -> dict[str, Any]:
    """Complete the spec of the process with every option."""
    return {"name": config.process["name"], **defaults_of(process_kind(config).process), **config.process}


def drawing_options(config: Config) -> dict[str, Any]:
    """Give the options of the process that change an image: all but the distribution of t and the loss weight."""
    return {key: value for key, value in describe_process(config).items() if key not in ("time", "weight")}


def describe_sampling(config: Config) -> dict[str, Any]:
    """Say what, beside weights and labels, makes an image what it is: JSON values, with every option of the sampler."""
    kind, spec = process_kind(config), dict(config.sample.sampler or {})
    name = spec.pop("name", kind.published_sampler)
    options = defaults_of(lookup(kind.samplers, name, "sample.sampler.name"))
    sampling = {f.name: getattr(config.sample, f.name) for f in dataclasses.fields(config.sample)}
    return {
        "process": describe_process(config),
        "sampler": {"name": name, **options, **spec},
        **{name: value for name, value in sampling.items() if name not in ("sampler", "classes", "per_class")},
        "quantize": "dit",  # how pixels are rounded to uint8, see `vca_engine.images.quantize`
    }


def needed_latents(config: Config, codec: Any) -> dict[str, Any]:
    """Say what cached latents have to be made of to be those of the config's data and codec, wherever these lie."""
    options = {key: value for key, value in config.data.items() if key != "images"}
    defaults = defaults_of(lookup(DATASETS, config.data["name"], "data.name"))
    return {"data": {**defaults, **options}, "codec": codec.identity}


def with_attention_of(config: Config, known: dict[str, Any], *options: str) -> Config:
    """Complete the options of the attention by those of `known`, where the config does not say them itself.

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


def sampler_help() -> str:
    """List the samplers and their options, for the --help of sample.py."""
    return _table(
        "samplers and their options, e.g. --sampler.num_steps 50, --sampler.name sde --sampler.last_step tweedie:",
        {f"of a {name}": kind.samplers for name, kind in PROCESSES.items()},
    )


def options_help() -> str:
    """List the parts of a model that are chosen by name, with their options, for --help."""
    registries = {
        "process": parts()["process"],
        "process.path (flow)": PATHS,
        "process.time (flow)": TIMES,
        "data": DATASETS,
        "codec": CODECS,
        "model.attention": ATTENTIONS,
        **{f"sample.sampler ({name})": kind.samplers for name, kind in PROCESSES.items()},
    }
    example = "names and their options, e.g. --process.name flow --process.path vp, --sample.sampler.num_steps 50:"
    return _table(example, registries)


def _table(title: str, parts: dict[str, dict[str, Any]]) -> str:
    """Write a line for each entry of each registry, with its keyword-only arguments."""
    lines = [title]
    for part, registry in parts.items():
        for i, (name, entry) in enumerate(registry.items()):
            options = ", ".join(o for o in options_of(entry) if o not in ("layer_index", "num_prefix_tokens"))
            lines.append(f"  {part if i == 0 else '':<27} {name:<13} {options}".rstrip())
    return "\n".join(lines)
