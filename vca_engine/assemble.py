"""A Config as objects: process, sampler, codec, data, network. Only here do names in a YAML file become objects."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dit_vca
import sit_vca
from classify import Classification
from dit_vca import Diffusion, DiT
from sit_vca import PATHS, TIMES, SiT, Transport
from vca import ATTENTIONS, Sampler, Transformer, create, defaults_of, lookup, nearest, options_of, parse_size
from vca_engine.config.reading import Spec
from vca_engine.config.schema import Config, to_dict
from vca_engine.images.codecs import CODECS
from vca_engine.images.datasets import DATASETS, ImageDataset
from vca_engine.images.labels import DataInfo
from vca_engine.images.latents import LatentDataset
from vca_engine.records import differences

Process = Diffusion | Transport | Classification
OF_GENERATORS = (  # settings that change nothing in a recogniser
    *("latents", "cache", "sample", "fid"),
    *(f"model.{key}" for key in ("size", "mlp_ratio", "class_dropout_prob")),
    *(f"train.{key}" for key in ("sample_every", "preload", "channels_last")),
)
OF_RECOGNISERS = ("model.name", "model.drop_path", "eval")


@dataclass(frozen=True)
class ProcessKind:
    """A process with all that belongs to it.

    Args:
        process: Its class.
        network: (config, info, codec) -> its network.
        samplers: Name -> class `(process, *, ...)`; none where it does not make images.
        published_sampler: Name of the sampler of the published tables.
        unused: Settings, or groups of them, that change nothing.
    """

    process: type
    network: Callable[[Config, DataInfo, Any], nn.Module]
    samplers: Mapping[str, type]
    published_sampler: str | None
    unused: tuple[str, ...] = OF_RECOGNISERS


def _generator(cls: type[Transformer], config: Config, info: DataInfo, codec: Any) -> Transformer:
    """Make a DiT or SiT for latents of images as `info` says."""
    options = parse_size(config.model.size)
    options |= _sizes(config)
    side = codec.downsample * options["patch_size"]
    if info.image_size % side:
        raise ValueError(
            f"images of {info.image_size}x{info.image_size} cannot be cut into patches: the codec divides the side by "
            f"{codec.downsample}, the patch by {options['patch_size']}; choose images with sides of "
            f"a multiple of {side}, or another --model.patch_size."
        )
    return cls(
        input_size=info.image_size // codec.downsample,
        in_channels=codec.channels,
        num_classes=len(info.class_names),
        mlp_ratio=config.model.mlp_ratio,
        class_dropout_prob=config.model.class_dropout_prob,
        attention=config.model.attention,
        **options,
    )


def _recogniser(config: Config, info: DataInfo, codec: Any) -> nn.Module:
    """Make a recogniser for images as `info` says."""
    if find_spec("timm") is None:
        raise ValueError("process classify needs the package timm; run: pip install timm")
    from classify import MODELS, create  # slow to import: see docs/architecture.md, start-up

    if config.model.name is None:
        raise ValueError(f"model.name is not given; name a recogniser, one of {sorted(MODELS)}.")
    return create(
        config.model.name,
        config.model.attention,
        num_classes=len(info.class_names),
        image_size=info.image_size,
        in_channels=info.channels,
        drop_path_rate=config.model.drop_path,
        **_sizes(config),
    )


def _sizes(config: Config) -> dict[str, int]:
    """Give the sizes of the network that a config says in numbers."""
    sizes = {key: getattr(config.model, key) for key in ("patch_size", "hidden_size", "depth", "num_heads")}
    return {key: value for key, value in sizes.items() if value is not None}


PROCESSES = {
    "diffusion": ProcessKind(Diffusion, partial(_generator, DiT), dit_vca.SAMPLERS, "ddpm"),
    "flow": ProcessKind(Transport, partial(_generator, SiT), sit_vca.SAMPLERS, "sde"),
    "classify": ProcessKind(Classification, _recogniser, {}, None, OF_GENERATORS),
}


def parts(*, drawing: bool = False) -> dict[str, Mapping[str, Any]]:
    """Gather what is a name with options in a config: its registry, with what was entered until now.

    Args:
        drawing: Leave out the processes that make no images.
    """
    return {
        "process": {name: kind.process for name, kind in PROCESSES.items() if kind.samplers or not drawing},
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


def command_to_use(process: str, folder: Path) -> str:
    """Say what to type to use the weights in a folder, as its process is."""
    if lookup(PROCESSES, process, "process.name").samplers:
        return f"Sample with: python sample.py {folder}"
    return f"Recognise with: python -m classify predict {folder} IMAGE ..."


def is_generator(config: Config) -> bool:
    """Say whether the network makes images; else it names the class of one."""
    return bool(process_kind(config).samplers)


def check_settings(config: Config) -> None:
    """Raise ValueError for a setting that the process has no use for, a codec that it cannot use, or vain eval.data."""
    is_balanced(config)  # which raises it for a word that it may not be
    unused = process_kind(config).unused
    default = Config(config.run_dir, config.process, config.data, config.codec)
    for key, (_, given) in differences(to_dict(default), to_dict(config)).items():
        if any(f"{key}.".startswith(f"{name}.") for name in unused):
            name = config.process["name"]
            raise ValueError(f"{key} is {given!r}, for which process {name} has no use; leave it out.")
    if not is_generator(config) and config.codec["name"] != "pixels":
        raise ValueError(f"codec.name is {config.codec['name']!r}; a recogniser looks at pixels, so choose pixels.")
    if spec := spec_to_evaluate(config):
        defaults = defaults_of(lookup(DATASETS, spec["name"], "eval.data.name"))
        if {**defaults, **spec, "image_size": 0} == {**defaults, **config.data, "image_size": 0}:
            raise ValueError("eval.data is data itself, which tells nothing; name others, e.g. --eval.data.images DIR.")


def process(config: Config) -> Process:
    """Make the process, `diffusion`, `flow` or `classify`, with its options."""
    return create({name: kind.process for name, kind in PROCESSES.items()}, config.process, "process")


def ends_of_time(config: Config) -> tuple[str, str]:
    """Say what is at the first time of a process and at the last one, noise or data; nothing of a recogniser."""
    if not is_generator(config):
        return "", ""
    noise_first = float(process(config).noise_level(torch.zeros(()))) > 0.5
    return ("noise", "data") if noise_first else ("data", "noise")


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
    """Open the dataset of images.

    Raises:
        ValueError: Something is wrong with it, or outputs are to lie in its folder, where they would count as images.
    """
    folder = config.data.get("images")
    for name in ("run_dir", "latents", "out"):
        place = getattr(config, name, None)
        if isinstance(folder, str) and place and Path(place).resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"{name} {place!r} lies in data.images {folder!r}, so that pictures in it would be taken for images; "
                f"choose a place outside, --{name} FOLDER. If something is in it already, move it there."
            )
    return create(DATASETS, config.data, "data")


def is_balanced(config: Config) -> bool:
    """Say whether training draws each class equally often, as data.balance asks, of images and of their latents.

    Raises:
        ValueError: data.balance is no word that it may be.
    """
    balance = config.data.get("balance")
    if balance not in (None, "classes"):
        raise ValueError(f"data.balance is {balance!r}; choose classes, or leave it out.")
    return balance is not None


def with_image_size(config: Config, image_size: int | None) -> Config:
    """Complete data.image_size by that of the images, where the config does not say it and the data take one.

    Args:
        config: What was asked for, or what a checkpoint holds: those of earlier versions may leave it out.
        image_size: Side of the images, as the data, their latents, or the checkpoint say; None changes nothing.
    """
    return dataclasses.replace(config, data=_sized(config.data, image_size))


def _sized(spec: Spec, image_size: int | None) -> dict[str, Any]:
    """Complete the image_size of a dataset's spec, if it has that option and does not give it.

    A dataset that is not in `DATASETS` stays as it is: a model can be used where only its training knew the data.
    """
    options = next((options_of(cls) for name, cls in DATASETS.items() if name == spec["name"]), ())
    missing = "image_size" in options and spec.get("image_size") is None
    return {**spec, "image_size": image_size} if missing and image_size else dict(spec)


def spec_to_evaluate(config: Config) -> dict[str, Any] | None:
    """Complete eval.data by what it does not change of data, if it is of the same kind; None if it is not given."""
    spec = config.eval.data
    if spec is None or spec.get("name", config.data["name"]) != config.data["name"]:
        return spec
    return {**config.data, **spec}


def images_to_evaluate(spec: Spec, info: DataInfo, where: str = "eval.data", by_name: bool = True) -> ImageDataset:
    """Open a dataset that a recogniser is evaluated on, with its labels.

    Args:
        spec: The dataset by name with its options.
        info: Of what the network was made for.
        where: What a message calls the spec: eval.data, or data.
        by_name: Number its classes as those of `info`, by their names; else it has as many, in the same order.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It has another class, or images of another kind, than the network was made for.
    """
    try:
        found = create(DATASETS, _sized(spec, info.image_size) if "name" in spec else spec, "data")
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{where.removesuffix('data')}{error}") from None
    for name, number in {"image_size": info.image_size, "channels": info.channels}.items():
        if getattr(found, name) != number:
            raise ValueError(
                f"{where} has {name} {getattr(found, name)}, and the network takes {number}; choose the same."
            )
    if not by_name:
        if found.num_classes != len(info.class_names):
            raise ValueError(f"{where} has {found.num_classes} classes, and the network {len(info.class_names)}.")
        return found
    try:
        found.rename_classes(info.class_names)
    except ValueError as error:
        raise ValueError(f"{where} does not fit the classes of the network: {error}") from None
    return found


def network(config: Config, info: DataInfo, codec: Any) -> nn.Module:
    """Make the network, DiT, SiT or a recogniser, for images as `info` says.

    Raises:
        ValueError: Sizes that do not fit, say of images that the patches do not divide.
    """
    return process_kind(config).network(config, info, codec)


def blocks(network: nn.Module) -> list[nn.Module]:
    """List the blocks of a network, each of which is compiled by itself."""
    if isinstance(network, Transformer):
        return list(network.blocks)
    from classify.swap import find_blocks  # slow to import: see docs/architecture.md, start-up

    return [place.blocks[place.index] for place in find_blocks(network)]


def recompute_blocks(network: nn.Module) -> None:
    """Keep no activation inside a block for the backward pass, which computes the block again: gradient checkpointing.

    Args:
        network: Changed in place. Copies that are made of it afterwards do the same.
    """
    if isinstance(network, Transformer):
        network.grad_checkpointing = True
        return
    for block in blocks(network):
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that the backward pass calls again; torch.compile sees both, since this is no code of torch."""
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


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
    """Say what cached latents have to be made of to be those of the config's data and codec, wherever these lie.

    Args:
        config: With its image size; see `with_image_size`.
        codec: Its codec.
    """
    options = defaults_of(lookup(DATASETS, config.data["name"], "data.name")) | config.data
    no_matter = ("images", "balance")  # where they are, and how often training draws each
    return {"data": {k: v for k, v in options.items() if k not in no_matter}, "codec": codec.identity}


def check_images_of_latents(config: Config, latents: LatentDataset) -> None:
    """Check that data.images, if it is given, is what cached latents were made of; images that have gone are not read.

    Raises:
        ValueError: It is another folder, or its images are not the same any more.
    """
    folder, made_of = config.data.get("images"), latents.manifest["settings"]
    if folder is None or "images" not in made_of:
        return
    source, num = made_of.get("source"), latents.manifest["num_images"] + len(latents.manifest["skipped"])
    before = f"{num:,} images of {latents.num_classes:,} classes in {source!r}"
    if Path(folder).exists():
        found = images(with_image_size(config, latents.image_size))
        if found.fingerprint == made_of["images"]:
            return
        now = f"holds {len(found):,} images of {found.num_classes:,} classes, which are not those"
    elif source is not None and Path(folder).resolve() == Path(source).resolve():
        return
    else:
        now = "is not there, and is not the folder"
    raise ValueError(
        f"data.images {folder!r} {now} that latents {config.latents!r} were made of, {before}. Leave data.images out "
        "to train on these latents; or name another folder, --latents FOLDER, for those of your images, which "
        "cache_latents.py makes; or train without a cache, --latents= (nothing after it)."
    )


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
