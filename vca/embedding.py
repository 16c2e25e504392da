"""Inputs of the transformer beside the patches: position, timestep, and label with the null class."""

import math

import torch
from torch import Tensor, nn


def sincos_2d(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Compute the fixed position table: half of the channels encode the column, half the row, as [sin, cos].

    Args:
        dim: Channels D, a multiple of 4.
        grid_size: (H, W).

    Returns:
        (H*W, D) float32, row by row: [sin(x f), cos(x f), sin(y f), cos(y f)] with column x, row y and frequencies
        f_i = 10000^(-i / (D/4)), i = 0 ... D/4 - 1.

    Raises:
        ValueError: `dim` is not a multiple of 4.

    Source: Peebles & Xie 2023, arXiv:2212.09748 (the ViT frequencies, columns first).
    """
    if dim % 4:
        raise ValueError(f"hidden_size is {dim}; the 2-D position table needs a multiple of 4.")
    height, width = grid_size
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # (D/4,)
    column = torch.arange(width, dtype=torch.float64)[:, None] * frequency  # (W, D/4)
    row = torch.arange(height, dtype=torch.float64)[:, None] * frequency  # (H, D/4)
    column = torch.cat([column.sin(), column.cos()], dim=1).repeat(height, 1)  # (H*W, D/2)
    row = torch.cat([row.sin(), row.cos()], dim=1).repeat_interleave(width, dim=0)  # (H*W, D/2)
    return torch.cat([column, row], dim=1).float()


class TimestepEmbedding(nn.Module):
    """MLP([cos(t f), sin(t f)]) with f_i = 10000^(-i/128), i = 0 ... 127: (B,) -> (B, D).

    t enters as it is: 0 ... 999 in DiT, [0, 1] in SiT. Source: arXiv:2212.09748 and arXiv:2401.08740.
    """

    num_frequencies = 128

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times: (B,) -> (B, D)."""
        index = torch.arange(self.num_frequencies, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(-math.log(10000) / self.num_frequencies * index)  # (B, 128)
        features = torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, 256)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """A table of `num_classes` rows and, if labels are ever dropped, one more for the null class: (B,) -> (B, D).

    In training mode each label becomes the null class `num_classes` with probability `class_dropout_prob`; in
    evaluation never: then who trains may `drop` labels by random numbers of their own.

    Source: Ho & Salimans 2022, arXiv:2207.12598.
    """

    def __init__(self, num_classes: int, dim: int, class_dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), dim)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels: (B,) integers -> (B, D)."""
        if self.training and self.class_dropout_prob > 0:
            y = self.drop(y, torch.rand(y.shape, device=y.device))
        return self.embedding_table(y)

    def drop(self, y: Tensor, u: Tensor) -> Tensor:
        """Replace the labels y (B,) where u < class_dropout_prob by the null class; u (B,) is uniform in [0, 1)."""
        return torch.where(u < self.class_dropout_prob, self.num_classes, y)
