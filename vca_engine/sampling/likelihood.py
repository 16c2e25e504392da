"""The likelihood of real images under a flow, in bits per dimension."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vca_engine.images.codecs import PixelCodec, sample_posterior
from vca_engine.images.datasets import ImageDataset
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.seeds import mix, uniform

BitsPerDim = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Sequence[torch.Generator]], Tensor]


def unit(codec: nn.Module) -> str:
    """Of what the bits are: pixels of 8 bits, where there is no autoencoder; else latents, which compare with no pixels."""
    return "8-bit pixels" if isinstance(codec, PixelCodec) else "latents"


@torch.no_grad()
def bits_of(
    images: ImageDataset, indices: Sequence[int], drawer: ImageSampler, bits_per_dim: BitsPerDim, codec: nn.Module
) -> list[float]:
    """Bits per dimension of some images of a dataset, each a function of the seed, its number and its class.

    Pixels x = k / 127.5 - 1 get uniform noise of their own width 1 / 127.5, and log2(127.5) bits for the change of scale, so
    that the result bounds the bits of the discrete pixels from above. Latents are drawn from the autoencoder's posterior.

    Args:
        images: The dataset.
        indices: Which of them; one batch.
        drawer: Without guidance.
        bits_per_dim: (predict, x, generators) -> (B,); of the ODE.
        codec: Images to latents.

    Raises:
        NonFiniteError: Some of them have none; says what to try.

    Source: Theis et al. 2016, arXiv:1511.01844, section 3.1 (uniform noise).
    """
    pairs = [images[i, False] for i in indices]
    x = torch.stack([image for image, _ in pairs]).to(drawer.device)  # (B, C, H, W) in [-1, 1]
    positions = torch.tensor(list(indices), device=drawer.device)
    moments, extra = codec.moments(x), 0.0
    if isinstance(codec, PixelCodec):
        u = uniform(mix(drawer.seed, 1), positions, x[0].numel()).view(x.shape)  # in (0, 1)
        moments, extra = x + ((u - 0.5) / 127.5).to(x.dtype), math.log2(127.5)
    latents = sample_posterior(moments, codec.channels, drawer.seed, positions)  # (B, C, h, w)
    generators = [torch.Generator().manual_seed(mix(drawer.seed, i)) for i in indices]
    with drawer.advising():
        bits = bits_per_dim(drawer.predict([label for _, label in pairs]), latents, generators)
        if not (finite := bits.isfinite()).all():
            raise FloatingPointError(f"{int((~finite).sum())} of {len(bits)} images have no finite likelihood")
    drawer.drawn += len(indices)
    return (bits + extra).tolist()
