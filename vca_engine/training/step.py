"""The optimizer's step: learning rate, the norm of the gradient, and steps that are skipped without asking the device."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from vca_engine.config.schema import TrainConfig
from vca_engine.distributed import whole


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Of the step after `step` done ones: linear warm-up, then constant or cosine to 0."""
    warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    if cfg.schedule == "constant":
        return cfg.lr * warmup
    progress = max(0.0, step - cfg.warmup_steps) / max(1, cfg.num_steps - cfg.warmup_steps)
    return cfg.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def poison(loss: Tensor) -> Tensor:
    """`loss` (); where that is not finite, so are all gradients, and after their exchange those of all processes."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients of all parameters down to `max_norm`, if given; returns their norm before, ()."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return whole(norm)


def step_unless(optimizer: Optimizer, skipped: Tensor) -> None:
    """Take an optimizer's step unless `skipped` () is true, which changes nothing, the optimizer's state included.

    A fused optimizer looks at `skipped` on the device, as it does for torch's GradScaler; another one has to wait for it.
    """
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not bool(skipped):
        optimizer.step()
