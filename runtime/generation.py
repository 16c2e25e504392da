"""From labels to images: guidance, randomness per image, and the call of sampler and codec."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from runtime.images import to_uint8
from runtime.seeds import mix

Predict = Callable[[Tensor, Tensor], Tensor]
Sample = Callable[[Predict, Tensor, Sequence[torch.Generator]], Tensor]


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    *,
    null_class: int | None,
    cfg_scale: float,
    channels: int,
) -> Predict:
    """`model` as predict(x_t, t) for labels y, with classifier-free guidance: uncond + cfg_scale (cond - uncond).

    Args:
        model: `model(x_t, t, y)` -> (B, C_out, H, W).
        y: Labels (B,).
        null_class: Label of the unconditional output; not needed at cfg_scale 1.
        cfg_scale: 1 is no guidance.
        channels: Only the first `channels` outputs are guided, the others (a learned variance) stay conditional.

    Source: Ho & Salimans 2022, arXiv:2207.12598; guided channels: Peebles & Xie 2023, the released code.
    """
    if cfg_scale == 1.0:
        return lambda x_t, t: model(x_t, t, y)
    labels = torch.cat([y, torch.full_like(y, null_class)])  # (2B,)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        cond, uncond = model(torch.cat([x_t, x_t]), torch.cat([t, t]), labels).chunk(2)  # 2 x (B, C_out, H, W)
        mixed = uncond[:, :channels] + cfg_scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([mixed, cond[:, channels:]], dim=1)

    return predict


def check_guidance(model: nn.Module, cfg_scale: float, guided_channels: int | None) -> int:
    """The number of guided channels.

    Raises:
        ValueError: The model has no null class to be guided away from, or fewer channels.
    """
    if cfg_scale != 1.0 and model.null_class is None:
        raise ValueError(
            f"cfg_scale is {cfg_scale}, but this model has no null class (class_dropout_prob 0); use cfg_scale 1."
        )
    if guided_channels is not None and guided_channels > model.in_channels:
        raise ValueError(f"guided_channels is {guided_channels}; the latents have {model.in_channels} channels.")
    return guided_channels or model.in_channels


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raise ValueError if a label is not in 0 ... num_classes - 1."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} does not exist; this model has classes 0 ... {num_classes - 1}.")


def spread(classes: Sequence[int], most: int = 10) -> list[int]:
    """All classes, or `most` evenly spaced ones."""
    columns = min(most, len(classes))
    return [classes[i * len(classes) // columns] for i in range(columns)]


def random_label(seed: int, index: int, num_classes: int) -> int:
    """The uniformly random label of image `index`, a function of (seed, index)."""
    return int(np.random.default_rng([seed, index, 1]).integers(num_classes))


@torch.no_grad()
def generate(
    model: nn.Module,
    sample: Sample,
    decode: Callable[[Tensor], Tensor],
    labels: Sequence[int],
    indices: Sequence[int],
    *,
    seed: int,
    cfg_scale: float = 1.0,
    guided_channels: int | None = None,
) -> np.ndarray:
    """One batch of images. Image i is a function of (seed, i) and its label, whatever else is in the batch.

    Args:
        model: The network, in evaluation mode, on the device to use.
        sample: (predict, noise, generators) -> latents.
        decode: Latents -> images in [-1, 1].
        labels: A class for each image.
        indices: The number i of each image.
        seed: Seed of all images.
        cfg_scale: Guidance; 1 is none.
        guided_channels: Latent channels that are guided; all if not given.

    Returns:
        (B, H, W, 3) uint8.

    Raises:
        ValueError: A label out of range, or guidance that the model cannot give.
    """
    check_labels(labels, model.num_classes)
    channels = check_guidance(model, cfg_scale, guided_channels)
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(mix(seed, i)) for i in indices]
    shape = (model.in_channels, *model.input_size)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)  # (B, C, H, W)
    y = torch.tensor(list(labels), device=device)  # (B,)
    predict = guided(model, y, null_class=model.null_class, cfg_scale=cfg_scale, channels=channels)
    return to_uint8(decode(sample(predict, noise, generators)))
