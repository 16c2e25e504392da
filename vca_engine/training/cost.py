"""What a network and its training take, by counting and by arithmetic: multiply-adds, memory and disk."""

import math
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
BACKWARD = 2  # multiply-adds of a backward pass over those of the forward pass: with respect to inputs, and to weights


@dataclass(frozen=True)
class Cost:
    """What a network takes.

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


def gib(num_bytes: float) -> str:
    """Write `12.3 GiB`, or MiB below 1 GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
