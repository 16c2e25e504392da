"""CSwin: attention inside stripes, of one half of the heads upright and of the other level, and a local encoding.

Source: Dong et al. 2022, CSWin Transformer, arXiv:2107.00652.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from classify.block import DropPath, check_images, drop_paths, initialise_linear_layers, to_image, to_tokens

HEADS = 2, 4, 8, 16
STRIPES = 1, 2, 7, math.inf  # width of a stripe in each stage; the last looks at the whole map
DIM = 64  # channels of the first stage; doubled by each merge


class StripeAttention(nn.Module):
    """Self-attention inside windows of a x b tokens, with a 3x3 convolution of the values of a window added (LePE).

    Args:
        dim: Channels of its heads.
        num_heads: Heads; divides `dim`.
        side: Side of the square map of tokens.
        window: (a, b), which divide the side.
    """

    def __init__(self, dim: int, num_heads: int, side: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.side, self.window = num_heads, side, window
        self.get_v = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: 3 x (B, N, C) -> (B, N, C)."""
        q, k, v = (self._cut(z) for z in (q, k, v))  # 3 x (B*M, a*b, C), M windows
        local = to_tokens(self.get_v(v.transpose(1, 2).unflatten(2, self.window)))  # (B*M, a*b, C)
        heads = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)  # (B*M, a*b, C)
        return self._join(out + local)

    def _cut(self, tokens: Tensor) -> Tensor:
        """Cut the map into windows: (B, N, C) -> (B*M, a*b, C)."""
        a, b = self.window
        rows = tokens.unflatten(1, (self.side // a, a, self.side // b, b))  # (B, H/a, a, W/b, b, C)
        return rows.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def _join(self, windows: Tensor) -> Tensor:
        """Put the windows together: (B*M, a*b, C) -> (B, N, C)."""
        a, b = self.window
        rows = windows.unflatten(0, (-1, self.side // a, self.side // b)).unflatten(3, (a, b))
        return rows.transpose(2, 3).flatten(1, 4)


class StripeBlock(nn.Module):
    """x += W_proj [upright stripes, level stripes](LN(x)); x += MLP(LN(x)), each with drop path.

    Args:
        dim: Channels C.
        num_heads: Heads; half of them attend in upright stripes of the whole height, half in level ones.
        side: Side of the square map of tokens.
        stripe: Width of a stripe; from `side` on, all heads look at the whole map.
        drop_path: Rate of the `DropPath` of both.
    """

    def __init__(self, dim: int, num_heads: int, side: int, stripe: float, drop_path: float) -> None:
        super().__init__()
        windows = [(side, side)] if stripe >= side else [(side, stripe), (stripe, side)]
        share = len(windows)
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attns = nn.ModuleList(StripeAttention(dim // share, num_heads // share, side, w) for w in windows)
        self.proj = nn.Linear(dim, dim)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (B, N, C) -> (B, N, C)."""
        x = x + self.drop_path1(self.proj(self._attend(self.qkv(self.norm1(x)))))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attend with each half of the channels in its stripes: (B, N, 3C) -> (B, N, C)."""
        parts = [z.chunk(len(self.attns), dim=-1) for z in qkv.chunk(3, dim=-1)]  # of q, of k and of v
        return torch.cat([attend(*part) for attend, *part in zip(self.attns, *parts, strict=True)], dim=-1)


class ToTokens(nn.Module):
    """A map as tokens, row by row: (B, C, H, W) -> (B, H*W, C)."""

    def forward(self, image: Tensor) -> Tensor:
        """View as tokens: (B, C, H, W) -> (B, H*W, C)."""
        return to_tokens(image)


class Merge(nn.Module):
    """3x3 convolution of stride 2 and LayerNorm: (B, H*W, C) -> (B, H/2 * W/2, 2C)."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens: (B, H*W, C) -> (B, H/2 * W/2, 2C)."""
        return self.norm(to_tokens(self.conv(to_image(x, self.side))))


class CSwin(nn.Module):
    """The network: `model(x)`, (B, C, image_size, image_size) -> (B, num_classes).

    Its state-dict keys are those of the published models: `stage1_conv_embed.{0,2}`, `stage1.0.{norm1,qkv,
    attns.0.get_v,attns.1.get_v,proj,norm2,mlp.fc1,mlp.fc2}`, ..., `merge1.{conv,norm}`, ..., `norm`, `head`.

    Args:
        image_size: Side of the images in pixels, a multiple of 32, so that the stripes divide the map of each stage.
        in_channels: Channels C of the images.
        num_classes: Length of the output.
        depths: Number of blocks of each stage; the published CSWin-T has 1, 2, 21, 1.
        drop_path_rate: Of the last block.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        depths: tuple[int, ...] = (2, 4, 18, 1),
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.sides = [image_size // 4 // 2**stage for stage in range(len(HEADS))]  # of the map of tokens in each stage
        stem = nn.Conv2d(in_channels, DIM, kernel_size=7, stride=4, padding=2)
        self.stage1_conv_embed = nn.Sequential(stem, ToTokens(), nn.LayerNorm(DIM))
        paths = iter(drop_paths(drop_path_rate, sum(depths)))
        dim = DIM
        for stage, (side, depth, heads, stripe) in enumerate(zip(self.sides, depths, HEADS, STRIPES, strict=True), 1):
            if stage > 1:
                self.add_module(f"merge{stage - 1}", Merge(dim, 2 * side))
                dim *= 2
            blocks = [StripeBlock(dim, heads, side, stripe, next(paths)) for _ in range(depth)]
            self.add_module(f"stage{stage}", nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        initialise_linear_layers(self)

    @property
    def stages(self) -> list[nn.ModuleList]:
        """The blocks of each stage."""
        return [getattr(self, f"stage{stage}") for stage in range(1, len(HEADS) + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of images: (B, C, image_size, image_size) -> (B, num_classes)."""
        check_images(x, (self.in_channels, self.image_size, self.image_size))
        x = self.stage1_conv_embed(x)  # (B, N, C)
        for stage, blocks in enumerate(self.stages):
            if stage > 0:
                x = getattr(self, f"merge{stage}")(x)
            for block in blocks:
                x = block(x)
        return self.head(self.norm(x).mean(dim=1))
