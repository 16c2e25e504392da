"""The parts that PVT and CSwin share: blocks, drop path, the first weights, tokens and maps, a check of the images."""

import torch
from torch import Tensor, nn

from vca_engine.seeds import mix, uniform


class DropPath(nn.Module):
    """Leaves out, in training, what a branch adds, for each image by itself: x / (1 - rate) or 0.

    `draw_paths` says beforehand for which images; without that, torch's generator does.

    Args:
        rate: Probability of leaving out.

    Source: Huang et al. 2016, Deep networks with stochastic depth, arXiv:1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.u: Tensor | None = None  # (B,) in (0, 1), for the next images

    def forward(self, x: Tensor) -> Tensor:
        """Leave x out for some of the images: (B, ...) -> (B, ...)."""
        if not self.training or self.rate == 0:
            return x
        u = torch.rand(len(x), device=x.device) if self.u is None else self.u
        kept = (u >= self.rate).to(x.dtype) / (1 - self.rate)  # (B,)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def draw_paths(model: nn.Module, seed: int, positions: Tensor) -> None:
    """Draw which branches the next images leave out, as a function of (seed, position of the image in the run).

    Args:
        model: It has some number of `DropPath`.
        seed: Of the run.
        positions: (B,) int64.
    """
    paths = [module for module in model.modules() if isinstance(module, DropPath) and module.rate]
    for path, u in zip(paths, uniform(mix(seed, 5), positions, len(paths)).T, strict=True):
        path.u = u


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x)), each with drop path.

    Args:
        attn: (B, N, C) -> (B, N, C).
        norm1: Before `attn`.
        norm2: Before `mlp`.
        mlp: (B, N, C) -> (B, N, C).
        drop_path1: (B, N, C) -> (B, N, C), applied to what the first adds.
        drop_path2: The same for the second.
    """

    def __init__(
        self,
        attn: nn.Module,
        norm1: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        drop_path1: nn.Module,
        drop_path2: nn.Module,
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.drop_path1, self.drop_path2 = drop_path1, drop_path2
        self.norm2 = norm2
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to tokens, or to a map as tokens: (B, N, C) or (B, H, W, C) -> the same."""
        tokens = x.flatten(1, -2)  # (B, N, C)
        tokens = tokens + self.drop_path1(self.attn(self.norm1(tokens)))
        tokens = tokens + self.drop_path2(self.mlp(self.norm2(tokens)))
        return tokens.reshape(x.shape)


def drop_paths(rate: float, num_blocks: int) -> list[float]:
    """Give the rate of drop path of each block; it grows linearly from 0 in the first to `rate` in the last."""
    return [rate * index / max(num_blocks - 1, 1) for index in range(num_blocks)]


def initialise_linear_layers(model: nn.Module) -> None:
    """Draw the weights of all linear layers from a truncated normal, std 0.02, and set their biases to zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_images(x: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless images x are (B, C, H, W), with `shape` (C, H, W)."""
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(shape):
        channels, height, width = shape
        raise ValueError(
            f"x is {tuple(x.shape)}; this model was made for images (B, {channels}, {height}, {width}): resize them, "
            "or make it with another image_size or in_channels."
        )


def to_tokens(image: Tensor) -> Tensor:
    """View a map as tokens, row by row: (B, C, H, W) -> (B, H*W, C)."""
    return image.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, side: int) -> Tensor:
    """View tokens as a square map: (B, side*side, C) -> (B, C, side, side)."""
    return tokens.transpose(1, 2).unflatten(2, (side, side))
