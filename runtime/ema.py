"""Exponential moving average of the weights."""

import copy

import torch
from torch import nn


class Ema:
    """A copy of a model whose weights follow it: w_ema <- decay w_ema + (1 - decay) w.

    Args:
        model: The model to follow; the copy starts equal to it, in evaluation mode.
        decay: 0 ... 1; 0.9999 in the published runs.
        warmup: Use min(decay, (1 + step) / (10 + step)), so that a short run is not dominated by its start.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow `model` after optimizer step number `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
