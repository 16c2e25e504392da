"""Pieces of a step: its random numbers, the norm of the gradient, and skipping it without asking the device."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from vca_engine.config.schema import TrainConfig
from vca_engine.distributed import full_tensor
from vca_engine.seeds import mix, normal, uniform


def draws(seed: int, positions: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw what a step needs as a function of the seed and the positions (B,) of the images in the run.

    Returns:
        Noise (B, *shape), standard normal, and u (B, 2) in (0, 1): one for the time, one for dropping the label.
    """
    return normal(mix(seed, 1), positions, shape), uniform(mix(seed, 2), positions, 2)


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Compute the rate of the step after `step` done ones: linear warm-up, then constant or cosine, then cool-down."""
    if step < cfg.warmup_steps:
        return cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * ((step + 1) / cfg.warmup_steps)
    if cfg.schedule == "constant":
        return cfg.lr
    last = cfg.num_steps - cfg.cooldown_steps
    progress = (step - cfg.warmup_steps) / max(1, last - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def nan_if_not_finite(loss: Tensor) -> Tensor:
    """Pass `loss` () on; where it is not finite, all gradients get NaN, and so do those of the other processes."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients of all parameters down to a norm of `max_norm`, if given; return their norm before, ()."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return full_tensor(norm)


def step_unless(optimizer: Optimizer, skipped: Tensor) -> None:
    """Take an optimizer's step unless `skipped` () is true, which changes nothing, the optimizer's state included.

    A fused optimizer looks at `skipped` on the device, as it does for torch's GradScaler; another has to wait for it.
    """
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not bool(skipped):
        optimizer.step()
