"""What a network and its training take, by counting and by arithmetic: multiply-adds, memory and disk."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from vca import VisualContrastAttention
from vca_engine import assemble
from vca_engine.config.schema import Config
from vca_engine.images.labels import DataInfo

SHAPES = {"digits": (8, 1, 10), "mnist": (32, 1, 10)}  # image size, channels and classes, where these are known
IMAGENET = 3, 1000  # channels and classes of a folder that was not looked at
STABLE_DIFFUSION = SimpleNamespace(downsample=8, channels=4)  # in the place of its autoencoder, which may not be there
BYTES = 4  # of a weight, an average of it, and each of AdamW's two moments
IMAGES_OF_IMAGENET, IMAGES_OF_FID = 1_281_167, 50_000
EVALUATIONS = 250  # of the network for an image, by the published samplers without guidance
BYTES_OF_LATENT = 2 * 2 * 4 * 2  # of a place in it: mirrored or not, mean and deviation, channels, bytes of float16
BACKWARD = 2  # multiply-adds of a backward pass over those of the forward pass: with respect to inputs, and to weights


@dataclass(frozen=True)
class Cost:
    """Size and work of a network.

    Args:
        parameters: Number of its parameters.
        multiply_adds: Of a forward pass of one sample; see `multiply_adds`.
        contrast_tokens: Numbers of contrast tokens that its layers have, ascending.
    """

    parameters: int
    multiply_adds: int
    contrast_tokens: list[int]


def network_of(config: Config) -> nn.Module:
    """Make the network of a config on the meta device, without its images and its autoencoder.

    Where the config does not say them, images have the channels and classes of ImageNet, and latents those of Stable
    Diffusion's autoencoder.

    Raises:
        ValueError: Sizes that do not fit.
    """
    size, channels, classes = shape_of(config)
    codec = assemble.codec(config, channels) if config.codec["name"] == "pixels" else STABLE_DIFFUSION
    with torch.device("meta"):
        return assemble.network(config, DataInfo(size, channels, [str(k) for k in range(classes)]), codec)


def shape_of(config: Config) -> tuple[int, int, int]:
    """Give the side and the channels of a config's images, and the number of their classes, without looking at them."""
    return SHAPES.get(config.data["name"], (config.data.get("image_size", 256), *IMAGENET))


def cost_of(config: Config) -> Cost:
    """Count what the network of a config takes; see `network_of`."""
    network, image = network_of(config), None
    if not assemble.is_generator(config):
        size, channels, _ = shape_of(config)
        image = torch.zeros(1, channels, size, size, device="meta")
    layers = [m for m in network.modules() if isinstance(m, VisualContrastAttention)]
    parameters = sum(p.numel() for p in network.parameters())
    return Cost(parameters, multiply_adds(network, image), sorted({m.num_contrast_tokens for m in layers}))


def multiply_adds(network: nn.Module, image: Tensor | None = None) -> int:
    """Count the multiply-adds of the products of a forward pass of one sample: what papers call the FLOPs of a network.

    Args:
        network: On the meta device, where an attention call counts as its two products; a DiT or SiT, or else one that
            takes an image.
        image: (1, C, H, W) on the meta device, for that.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import: see docs/architecture.md, start-up

    if image is None:
        with torch.device("meta"):
            x = torch.zeros(1, network.in_channels, *network.input_size)
            inputs = x, torch.zeros(1), torch.zeros(1, dtype=torch.long)
    else:
        inputs = (image,)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(*inputs)
    return counter.get_total_flops() // 2


def memory_of_weights(config: Config, num_parameters: int) -> dict[str, int]:
    """Compute the bytes that weights, and what goes with them, take in training; activations are not among them."""
    weights, averages = BYTES * num_parameters, 1 + len(config.train.ema_stds)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        f"{averages} averages": averages * weights,
    }


def files_kept(config: Config) -> tuple[int, int]:
    """Count the checkpoints and the snapshots that are there at most."""
    cfg = config.train
    # One more is written before an old one goes, and the best FID's or accuracy's is spared.
    more = 1 + bool(config.fid.every or config.eval.data) if cfg.keep_checkpoints else 0
    num = len(cfg.kept()) + more
    return num, math.ceil(cfg.num_steps / cfg.snapshot_every) if cfg.ema_stds else 0


def disk_of(config: Config, num_parameters: int) -> int:
    """Compute the bytes that the checkpoints and snapshots of a run take at most."""
    num, num_snapshots = files_kept(config)
    memory = memory_of_weights(config, num_parameters)
    snapshot = memory["weights"] * len(config.train.ema_stds)
    return num * (sum(memory.values()) - memory["gradients"]) + num_snapshots * snapshot


def flops_of_training(config: Config, cost: Cost) -> float:
    """Compute the floating-point operations of the products of a whole training; a multiply-add is two."""
    images = config.train.num_steps * config.train.batch_size
    return 2.0 * (1 + BACKWARD) * cost.multiply_adds * images


def estimate(configs: Mapping[str, Config], speed: float, price: float | None) -> Iterator[str]:
    """Write a line for each config: GPU-hours, disk and money of a training, with the images of an FID; and their sums.

    Args:
        configs: What a line is called -> the config.
        speed: Operations that a GPU does in a second.
        price: Of a GPU-hour, if it is known.
    """
    yield f"{'config':<24}{'GPU-hours':>14}{'disk':>14}" + f"{'price':>14}" * bool(price)
    lines, sizes = {}, set()
    for name, config in configs.items():
        cost, images = cost_of(config), 0
        if assemble.is_generator(config):
            images = IMAGES_OF_FID * EVALUATIONS
            sizes.add(shape_of(config)[0] // STABLE_DIFFUSION.downsample)
        hours = (flops_of_training(config, cost) + 2 * cost.multiply_adds * images) / speed / 3600
        lines[name] = hours, disk_of(config, cost.parameters)
    if sizes:
        lines["latents"] = 0.0, sum(IMAGES_OF_IMAGENET * BYTES_OF_LATENT * side**2 for side in sizes)
    lines["all"] = sum(hours for hours, _ in lines.values()), sum(disk for _, disk in lines.values())
    for name, (hours, disk) in lines.items():
        yield f"{name:<24}{hours:>14,.1f}{gib(disk):>14}" + (f"{hours * price:>14,.0f}" if price else "")
    yield (
        "A backward pass is taken to cost two forward passes, and an image of an FID "
        f"{EVALUATIONS} evaluations of the network.\nNot counted: the autoencoder, Inception, loading, previews and "
        "evaluations. Disk: all checkpoints and snapshots that are kept."
    )


def gib(num_bytes: float) -> str:
    """Write `12.3 GiB`, or MiB below 1 GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Write `12.3 hours`, or minutes below 2 hours, or seconds below 2 minutes."""
    if seconds < 120:
        return f"{seconds:,.0f} seconds"
    return f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
