"""From labels to images: guidance, randomness per image, and the call of sampler and codec."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vca_engine.images import NonFiniteError, to_uint8
from vca_engine.sampling.classes import check_labels
from vca_engine.sampling.guidance import Guidance, Predict, guided
from vca_engine.seeds import mix

Sample = Callable[[Predict, Tensor, list[torch.Generator]], Tensor]


class ImageSampler:
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
        """Draw where images begin, standard normal (B, C, h, w); also gives their generators, for all that follows."""
        seed = self.seed if seed is None else seed
        generators = [torch.Generator().manual_seed(mix(seed, i)) for i in indices]
        shape = (self.network.in_channels, *self.network.input_size)
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device), generators

    def predict(self, labels: Sequence[int]) -> Predict:
        """Apply labels (B,) and guidance to the network: (B, C, h, w), (B,) -> (B, C_out, h, w).

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
        """Draw the latents of one batch.

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
        """Decode latents (B, C, h, w) to images (B, H, W, 3) uint8, all or those in some places.

        Raises:
            NonFiniteError: Some of them hold NaN or infinite values; says how many, and what to try.
        """
        with self.advising():
            decoded = self.decode(latents)  # all of them, in one shape
            return to_uint8(decoded if places is None else decoded[list(places)])

    @contextlib.contextmanager
    def advising(self) -> Iterator[None]:
        """Add the weights, and what to try, to the error of whatever in the block is not finite."""
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
        """Draw one batch of images, (B, H, W, 3) uint8; see `latents`."""
        return self.images(self.latents(labels, indices))

    def all(self, labels: Sequence[int], batch_size: int) -> np.ndarray:
        """Draw images 0, 1, ... of these labels, (N, H, W, 3) uint8, `batch_size` at a time."""
        batches = [range(k, min(k + batch_size, len(labels))) for k in range(0, len(labels), batch_size)]
        return np.concatenate([self([labels[i] for i in indices], indices) for indices in batches])

    def group(
        self, number: int, size: int, label: Callable[[int], int], places: Sequence[int] | None = None
    ) -> np.ndarray:
        """Draw images number * size ... (number + 1) * size - 1, (size, H, W, 3) uint8, or those in some places.

        Drawn by whole groups, an image has always the same neighbours, and all arithmetic the same shapes: so it is the
        same bit for bit on one kind of device, and for solvers that choose their steps for a whole batch, too.
        """
        indices = range(number * size, (number + 1) * size)
        return self.images(self.latents([label(i) for i in indices], indices), places)

    def _call(self, network: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Make the call of a network, counted, in the precision that was asked for, with an output of the input's."""

        def call(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.evaluations += len(x_t)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                return network(x_t, t, y).to(x_t.dtype)

        return call
