"""Randomness as a function of where it is used, so that nothing has to be saved to resume."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers, like the two below
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def mix(*parts: int) -> int:
    """Make a 63-bit seed, a function of non-negative integers, e.g. (seed, step, rank), without visible pattern."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)


def normal(seed: int, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw standard normal numbers, those of each position a function of (seed, position) alone, on any device.

    Box and Muller's transform: of the two halves u, v of a 64-bit number in units of 2^32, (-2 log u)^(1/2) cos(2 pi v)
    and the same with sin. Devices differ by the rounding of log and cos.

    Args:
        seed: Of the whole set, not negative.
        positions: (B,) int64, not negative.
        shape: Of the numbers of one position.

    Returns:
        (B, *shape) float32.
    """
    num = math.prod(shape)
    bits = _stream(seed, positions, (num + 1) // 2)  # (B, num / 2)
    u, v = (((half & 0xFFFFFFFF).double() + 0.5).div(2**32).float() for half in (bits, bits >> 32))
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :num]
    return pairs.unflatten(1, tuple(shape))


def uniform(seed: int, positions: Tensor, num: int) -> Tensor:
    """Draw numbers in (0, 1), (B, num) float64, those of each position (B,) a function of (seed, position) alone."""
    return ((_stream(seed, positions, num) >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52


def splitmix64(index: Tensor) -> Tensor:
    """Hash integers (N,) -> (N,) int64: the first output of the SplitMix64 generator that begins at each of them.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    return _finalise(index.long() + GOLDEN)


def _stream(seed: int, positions: Tensor, num: int) -> Tensor:
    """Compute the first `num` 64-bit numbers of the SplitMix64 stream of each position, (B, num) int64."""
    starts = _finalise(_finalise(positions.long() * GOLDEN) + mix(seed))  # (B,)
    counts = torch.arange(1, num + 1, device=positions.device)  # (num,)
    return _finalise(starts[:, None] + counts * GOLDEN)


def _finalise(z: Tensor) -> Tensor:
    """Apply the output function of SplitMix64, on int64 that wrap around."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * FIRST
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * SECOND
    return z ^ (z >> 31 & (1 << 33) - 1)
