"""Classifier-free guidance: a network with labels as what a sampler asks, `predict(x_t, t)`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vca import Predict
from vca_engine.config.schema import SampleConfig
from vca_engine.sampling.classes import check_labels


@dataclass(frozen=True)
class Guidance:
    """How an output is led away from another, worse one: other + cfg_scale (output - other).

    Args:
        cfg_scale: 1 is none.
        channels: Guide the first so many latent channels; None means all. What comes after the latent channels (a
            learned variance) is never guided.
        interval: Lowest and highest noise level, from 0 (data) to 1 (noise), at which there is guidance; None means
            all.
        negative: The label of the other output; None means the null class, or, with `guide`, the label itself.
        guide: The network of the other output, a worse one (autoguidance); None means the same network.

    Source: Ho & Salimans 2022, arXiv:2207.12598; interval: Kynkäänniemi et al. 2024, arXiv:2404.07724; guide: Karras
    et al. 2024, arXiv:2406.02507; channels: Peebles & Xie 2023, the released code, which guides 3 of 4.
    """

    cfg_scale: float = 1.0
    channels: int | None = None
    interval: tuple[float, float] | None = None
    negative: int | None = None
    guide: nn.Module | None = None

    def check(self, network: nn.Module) -> None:
        """Check that a network can be guided so.

        Raises:
            ValueError: It has no null class, fewer channels or classes, or the guide is for other latents or classes.
        """
        if self.cfg_scale != 1.0 and self.guide is None and self.negative is None and network.null_class is None:
            raise ValueError(
                f"cfg_scale is {self.cfg_scale}, but this model has no null class (class_dropout_prob 0); "
                "use cfg_scale 1."
            )
        if self.channels is not None and self.channels > network.in_channels:
            raise ValueError(
                f"guided_channels is {self.channels}; the latents have {network.in_channels} channels. Choose at most "
                "as many, or leave it out."
            )
        if self.negative is not None:
            check_labels([self.negative], network.num_classes)
        if self.guide is not None:
            for name in ("in_channels", "input_size", "num_classes"):
                mine, other = getattr(network, name), getattr(self.guide, name)
                if mine != other:
                    raise ValueError(f"the guide has {name} {other}, the model {mine}; a guide is for the same images.")


def guidance_of(sampling: SampleConfig, *, negative: int | None = None, guide: nn.Module | None = None) -> Guidance:
    """Make the guidance of `sampling`; for `negative` and `guide` see `Guidance`."""
    return Guidance(sampling.cfg_scale, sampling.guided_channels, sampling.guidance_interval, negative, guide)


def guidance_options_in_words(sampling: SampleConfig) -> list[str]:
    """Write what is guided, and when, if that is not all: `first 3 channels guided`, `interval 0 to 0.7`."""
    words = []
    if sampling.guided_channels is not None:
        words.append(f"first {sampling.guided_channels} channels guided")
    if sampling.guidance_interval is not None:
        words.append("interval {:g} to {:g}".format(*sampling.guidance_interval))
    return words


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    guidance: Guidance,
    *,
    null_class: int | None,
    channels: int,
    noise_level: Callable[[Tensor], Tensor] | None = None,
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Predict:
    """Make predict(x_t, t) of a network `model`, guided, for labels y (B,).

    Args:
        model: `model(x_t, t, y)` -> (B, C_out, H, W).
        y: Labels (B,).
        guidance: How; of the guide it only says that there is one.
        null_class: Label of the unconditional output; not needed without guidance.
        channels: Latent channels C.
        noise_level: t -> noise level; needed with an interval. All t of a batch are taken to be the same.
        guide: `guidance.guide` as a call.

    Returns:
        predict: (B, C, H, W), (B,) -> (B, C_out, H, W). Without guidance it is one pass of B images, with it one of 2
        B, or two of B where the guide is another network.
    """
    scale = guidance.cfg_scale
    if scale == 1.0:
        return lambda x_t, t: model(x_t, t, y)
    channels = guidance.channels or channels
    label = guidance.negative if guidance.negative is not None else null_class
    other_y = y if guide is not None and guidance.negative is None else torch.full_like(y, label)
    both = torch.cat([y, other_y])  # (2B,)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        if guidance.interval and not guidance.interval[0] <= float(noise_level(t[0])) <= guidance.interval[1]:
            return model(x_t, t, y)
        if guide is not None:
            output, other = model(x_t, t, y), guide(x_t, t, other_y)  # 2 x (B, C_out, H, W)
        else:
            output, other = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        mixed = other[:, :channels] + scale * (output[:, :channels] - other[:, :channels])
        return torch.cat([mixed, output[:, channels:]], dim=1)

    return predict
