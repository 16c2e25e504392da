"""From labels to images: guidance, randomness per image, and the call of sampler and codec."""

import contextlib
import difflib
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.seeds import mix
from vca_engine.images import NonFiniteError, to_uint8

Predict = Callable[[Tensor, Tensor], Tensor]
Sample = Callable[[Predict, Tensor, list[torch.Generator]], Tensor]


@dataclass(frozen=True)
class Guidance:
    """How an output is led away from another, worse one: other + cfg_scale (output - other).

    Args:
        cfg_scale: 1 is none.
        channels: Guide the first so many latent channels; None means all. What comes after the latent channels (a learned
            variance) is never guided.
        interval: Lowest and highest noise level, from 0 (data) to 1 (noise), at which there is guidance; None means all.
        negative: The label of the other output; None means the null class, or, with `guide`, the label itself.
        guide: The network of the other output, a worse one (autoguidance); None means the same network.

    Source: Ho & Salimans 2022, arXiv:2207.12598; interval: Kynkäänniemi et al. 2024, arXiv:2404.07724; guide: Karras et
    al. 2024, arXiv:2406.02507; channels: Peebles & Xie 2023, the released code, which guides 3 of 4.
    """

    cfg_scale: float = 1.0
    channels: int | None = None
    interval: tuple[float, float] | None = None
    negative: int | None = None
    guide: nn.Module | None = None

    def check(self, network: nn.Module) -> None:
        """Whether a network can be guided so.

        Raises:
            ValueError: It has no null class, fewer channels or classes, or the guide is for other latents or classes.
        """
        if self.cfg_scale != 1.0 and self.guide is None and self.negative is None and network.null_class is None:
            raise ValueError(
                f"cfg_scale is {self.cfg_scale}, but this model has no null class (class_dropout_prob 0); use cfg_scale 1."
            )
        if self.channels is not None and self.channels > network.in_channels:
            raise ValueError(f"guided_channels is {self.channels}; the latents have {network.in_channels} channels.")
        if self.negative is not None:
            check_labels([self.negative], network.num_classes)
        if self.guide is not None:
            for name in ("in_channels", "input_size", "num_classes"):
                mine, other = getattr(network, name), getattr(self.guide, name)
                if mine != other:
                    raise ValueError(f"the guide has {name} {other}, the model {mine}; a guide is for the same images.")


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
    """`model` as predict(x_t, t) for labels y (B,), guided.

    Args:
        model: `model(x_t, t, y)` -> (B, C_out, H, W).
        y: Labels (B,).
        guidance: How; of the guide it only says that there is one.
        null_class: Label of the unconditional output; not needed without guidance.
        channels: Latent channels C.
        noise_level: t -> noise level; needed with an interval. All t of a batch are taken to be the same.
        guide: `guidance.guide` as a call.

    Returns:
        predict: (B, C, H, W), (B,) -> (B, C_out, H, W). Without guidance it is one pass of B images, with it one of 2 B,
        or two of B where the guide is another network.
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


class Drawer:
    """Draws images by number: image i is a function of the seed, i and its label.

    Args:
        network: In evaluation mode, on the device to use.
        sample: (predict, noise, generators) -> latents.
        decode: Latents -> images in [-1, 1].
        seed: Of all images.
        guidance: Not given means none.
        noise_level: t of the process -> 0 (data) ... 1 (noise); needed with an interval of guidance.
        dtype: Of autocast; None means the network's own arithmetic.
        weights: What a message calls the network's weights.

    Attributes:
        evaluations: Images that went through the network, or its guide, counted as they went.
        drawn: Images that were drawn.

    Raises:
        ValueError: Guidance that the network cannot give.
    """

    def __init__(
        self,
        network: nn.Module,
        sample: Sample,
        decode: Callable[[Tensor], Tensor],
        *,
        seed: int,
        guidance: Guidance | None = None,
        noise_level: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        weights: str = "these weights",
    ) -> None:
        self.network, self.sample, self.decode, self.seed, self.weights = network, sample, decode, seed, weights
        self.guidance, self.noise_level, self.dtype = guidance or Guidance(), noise_level, dtype
        self.guidance.check(network)
        self.device = next(network.parameters()).device
        self.evaluations = self.drawn = 0

    @property
    def nfe(self) -> float | None:
        """Network evaluations an image, each of the two passes of guidance being one; None before the first image."""
        return self.evaluations / self.drawn if self.drawn else None

    def begin(self, indices: Sequence[int], seed: int | None = None) -> tuple[Tensor, list[torch.Generator]]:
        """Where images begin, standard normal (B, C, h, w), and their generators, from which all that follows is drawn."""
        seed = self.seed if seed is None else seed
        generators = [torch.Generator().manual_seed(mix(seed, i)) for i in indices]
        shape = (self.network.in_channels, *self.network.input_size)
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device), generators

    def predict(self, labels: Sequence[int]) -> Predict:
        """The network with labels and guidance applied: (B, C, h, w), (B,) -> (B, C_out, h, w).

        Raises:
            ValueError: A label out of range.
        """
        check_labels(labels, self.network.num_classes)
        guide = self.guidance.guide
        return guided(
            self._call(self.network),
            torch.tensor(list(labels), device=self.device),
            self.guidance,
            null_class=self.network.null_class,
            channels=self.network.in_channels,
            noise_level=self.noise_level,
            guide=guide and self._call(guide),
        )

    @torch.no_grad()
    def latents(
        self,
        labels: Sequence[int],
        indices: Sequence[int],
        *,
        noise: Tensor | None = None,
        watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """The latents of one batch.

        Args:
            labels: A class for each image.
            indices: The number of each image.
            noise: Where they begin, (B, C, h, w), instead of their own noise.
            watch: Is called with x_t, t and the guided output at every evaluation.

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: A label out of range.
            NonFiniteError: The sampler cannot go on, mostly after NaN or infinite values; says what to try.
        """
        predict = self.predict(labels)

        def watched(x_t: Tensor, t: Tensor) -> Tensor:
            output = predict(x_t, t)
            watch(x_t, t, output)
            return output

        own, generators = self.begin(indices)
        self.drawn += len(indices)
        with self.advising():
            return self.sample(watched if watch else predict, own if noise is None else noise, generators)

    @torch.no_grad()
    def images(self, latents: Tensor, places: Sequence[int] | None = None) -> np.ndarray:
        """(B, C, h, w) -> (B, H, W, 3) uint8, of all or of those in some places.

        Raises:
            NonFiniteError: Some of them hold NaN or infinite values; says how many, and what to try.
        """
        with self.advising():
            decoded = self.decode(latents)  # all of them, in one shape
            return to_uint8(decoded if places is None else decoded[list(places)])

    @contextlib.contextmanager
    def advising(self) -> Iterator[None]:
        """Whatever in the block is not finite is said with the weights, and with what to try."""
        try:
            yield
        except FloatingPointError as error:
            guided, scale = self.guidance.cfg_scale != 1.0, f"{self.guidance.cfg_scale:g}"
            ways = ["an earlier checkpoint", "other --weights", "more steps", "another sampler"]
            ways += ["a lower cfg_scale"] * guided + ["--precision no"] * (self.dtype is not None)
            raise NonFiniteError(
                f"{error}, drawn with {self.weights}{f' and cfg_scale {scale}' if guided else ''}; try "
                f"{', '.join(ways[:-1])} or {ways[-1]}."
            ) from error

    def __call__(self, labels: Sequence[int], indices: Sequence[int]) -> np.ndarray:
        """One batch of images, (B, H, W, 3) uint8; see `latents`."""
        return self.images(self.latents(labels, indices))

    def all(self, labels: Sequence[int], batch_size: int) -> np.ndarray:
        """Images 0, 1, ... of these labels, (N, H, W, 3) uint8, so many at a time."""
        batches = [range(k, min(k + batch_size, len(labels))) for k in range(0, len(labels), batch_size)]
        return np.concatenate([self([labels[i] for i in indices], indices) for indices in batches])

    def group(
        self, number: int, size: int, label: Callable[[int], int], places: Sequence[int] | None = None
    ) -> np.ndarray:
        """Images number * size ... (number + 1) * size - 1, (size, H, W, 3) uint8; or of these the ones in some places.

        Drawn by whole groups, an image has always the same neighbours, and all arithmetic the same shapes: so it is the
        same bit for bit on one kind of device, and for solvers that choose their steps for a whole batch, too.
        """
        indices = range(number * size, (number + 1) * size)
        return self.images(self.latents([label(i) for i in indices], indices), places)

    def _call(self, network: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The network, counted, in the precision that was asked for, with an output of the input's."""

        def call(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.evaluations += len(x_t)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                return network(x_t, t, y).to(x_t.dtype)

        return call


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raise ValueError if a label is not in 0 ... num_classes - 1."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} does not exist; this model has classes 0 ... {num_classes - 1}.")


def find_class(word: int | str, names: Sequence[str]) -> int:
    """The number of a class from its number or its name.

    A name is that of the class, or one of several between commas (ImageNet's "tench, Tinca tinca"); capitals do not matter.
    A word that is a number as Python writes it (10, not 010) is one, unless a class is named so. An int is always a number.

    Raises:
        ValueError: There is no such class, or more than one.
    """
    if isinstance(word, bool):
        raise ValueError(f"class {word} is neither a number nor a name.")
    if not isinstance(word, str):
        number = operator.index(word)
        check_labels([number], len(names))
        return number
    wanted = word.strip().lower()
    whole = [k for k, name in enumerate(names) if name.lower() == wanted]
    parts = [k for k, name in enumerate(names) if wanted in (part.strip() for part in name.lower().split(","))]
    found = whole or parts
    if len(found) == 1:
        return found[0]
    if found:
        text = ", ".join(f"{k} ({names[k]})" for k in found[:5])
        raise ValueError(f"class {word!r} is the name of several: {text}; choose one by its number.")
    if re.fullmatch(r"0|-?[1-9][0-9]*", wanted):
        return find_class(int(wanted), names)
    known = {part.strip().lower(): name for name in names for part in (name, *name.split(","))}
    close = difflib.get_close_matches(wanted, known, n=3)
    hint = (
        f"did you mean {' or '.join(repr(known[c]) for c in close)}?"
        if close
        else f"it has {len(names)} classes, "
        + (f"{', '.join(names[:3])}, ..., {names[-1]}." if len(names) > 4 else f"{', '.join(names)}.")
    )
    raise ValueError(f"class {word!r} is no class of this model; {hint}")


def spread(classes: Sequence[int], most: int = 10) -> list[int]:
    """All classes, or `most` evenly spaced ones."""
    columns = min(most, len(classes))
    return [classes[i * len(classes) // columns] for i in range(columns)]


def random_label(seed: int, index: int, num_classes: int) -> int:
    """The uniformly random label of image `index`, a function of (seed, index)."""
    return int(np.random.default_rng([seed, index, 1]).integers(num_classes))


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation between noise a and b, each (..., C, h, w) as one vector: a at share 0, b at 1.

    Source: Shoemake 1985, Animating rotation with quaternion curves; the norm stays that of noise on the way.
    """
    u, v = a.flatten(-3), b.flatten(-3)
    angle = torch.acos((F.normalize(u, dim=-1) * F.normalize(v, dim=-1)).sum(-1))
    angle = angle[..., None, None, None]
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
