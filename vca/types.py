"""The calls between a network, a process and a sampler."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # model(x_t, t, y): (B, C, H, W), (B,), (B,) -> (B, C_out, H, W)
Predict = Callable[[Tensor, Tensor], Tensor]  # a model with labels and guidance applied: (B, C, H, W), (B,) -> the same
Generator = torch.Generator | list[torch.Generator] | None  # a list draws the numbers of each sample separately


class Sampler(Protocol):
    """The way from noise to data with a trained network."""

    def __call__(self, predict: Predict, noise: Tensor, generator: Generator = None) -> Tensor:
        """Turn noise (B, C, H, W) into samples (B, C, H, W)."""
