"""The parts that PVT and CSwin share: blocks, drop path, the first weights, tokens and maps, a check of the images."""

from timm.layers import DropPath
from torch import Tensor, nn


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x)), each with drop path.

    Args:
        attn: (B, N, C) -> (B, N, C).
        norm1: Before `attn`.
        norm2: Before `mlp`.
        mlp: (B, N, C) -> (B, N, C).
        drop_path: Drops what is added, in training, for some of the images.
    """

    def __init__(
        self, attn: nn.Module, norm1: nn.Module, norm2: nn.Module, mlp: nn.Module, drop_path: nn.Module
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.drop_path = drop_path
        self.norm2 = norm2
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to tokens, or to a map as tokens: (B, N, C) or (B, H, W, C) -> the same."""
        tokens = x.flatten(1, -2)  # (B, N, C)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens.reshape(x.shape)


def drop_paths(rate: float, num_blocks: int) -> list[DropPath]:
    """Make the drop path of each block; the probability grows linearly from 0 in the first to `rate` in the last."""
    return [DropPath(rate * index / max(num_blocks - 1, 1)) for index in range(num_blocks)]


def initialise(model: nn.Module) -> None:
    """Draw the weights of all linear layers from a truncated normal, std 0.02, and set their biases to zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_images(x: Tensor, channels: int, image_size: int) -> None:
    """Raise ValueError unless images are (B, channels, image_size, image_size)."""
    if x.ndim != 4 or tuple(x.shape[1:]) != (channels, image_size, image_size):
        raise ValueError(f"x is {tuple(x.shape)}; this model takes (B, {channels}, {image_size}, {image_size}).")


def to_tokens(image: Tensor) -> Tensor:
    """View a map as tokens, row by row: (B, C, H, W) -> (B, H*W, C)."""
    return image.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, side: int) -> Tensor:
    """View tokens as a square map: (B, side*side, C) -> (B, C, side, side)."""
    return tokens.transpose(1, 2).unflatten(2, (side, side))
