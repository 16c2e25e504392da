"""Averages of the weights, updated in each step."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vca_engine.distributed import shard_like


class Ema:
    """Average that follows the weights of a model: w_ema <- beta w_ema + (1 - beta) w, in float32 at least.

    Args:
        model: The model to follow; the average starts equal to it.
        beta: Function of the number of the step, from 1: `constant` or `power`.

    Attributes:
        weights: Name of a parameter -> its average, sharded as the parameter is.
    """

    def __init__(self, model: nn.Module, beta: Callable[[int], float]) -> None:
        self.beta = beta
        self.weights: dict[str, Tensor] = {
            name: p.detach().clone().to(torch.promote_types(p.dtype, torch.float32))
            for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow `model` after optimizer step number `step`, from 1."""
        weights = list(self.weights.values())
        torch._foreach_lerp_(
            weights, [p.to(w.dtype) for p, w in zip(model.parameters(), weights, strict=True)], 1 - self.beta(step)
        )

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the averages out of a checkpoint's tensors, which hold buffers, too."""
        for name, weight in self.weights.items():
            weight.copy_(shard_like(tensors[name], weight))


def constant(decay: float, warmup: bool) -> Callable[[int], float]:
    """Average by `decay`; with warm-up by min(decay, (1 + step) / (10 + step)), so that the start does not dominate."""
    return lambda step: min(decay, (1 + step) / (10 + step)) if warmup else decay


def power(std: float) -> Callable[[int], float]:
    """Average by (1 - 1/step)^(gamma + 1), of the power function of relative width `std`."""
    exponent = gamma_of(std) + 1
    return lambda step: (1 - 1 / step) ** exponent


def gamma_of(std: float) -> float:
    """Find the exponent gamma >= 0 of the power function of relative width `std`, in (0, 1/sqrt(12)].

    Raises:
        ValueError: Any other width.
    """
    if not 0 < std <= 12**-0.5:
        raise ValueError(f"the relative width of an average is {std}; choose one above 0 and at most 0.288.")
    # std^2 (g + 2)^2 (g + 3) = g + 1, a cubic with one root above -1.
    s = std**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    return max(0.0, float(roots.real[np.abs(roots.imag) < 1e-6 * np.abs(roots)].max()))


def name_of(std: float) -> str:
    """Name the file of a power-function average: ema-0.05."""
    return f"ema-{std:g}"
