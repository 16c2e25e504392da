"""Pyramid Vision Transformer, version 1: four stages of ever fewer and wider tokens, with fewer keys than queries.

Source: Wang et al. 2021, Pyramid Vision Transformer, arXiv:2102.12122.
"""

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from classify.block import Block, DropPath, check_images, drop_paths, initialise_linear_layers, to_image, to_tokens
from vca.transformer import PatchEmbedding

DIMS = 64, 128, 320, 512  # channels of the four stages
HEADS = 1, 2, 5, 8
MLP_RATIOS = 8, 8, 4, 4
REDUCTIONS = 8, 4, 2, 1
PATCH_SIZES = 4, 2, 2, 2  # pixels, or tokens of the stage before, along the side of a token


class SpatialReductionAttention(nn.Module):
    """Self-attention whose keys and values are those of the map made r times smaller along each side.

        out = W_proj softmax(q k^T / sqrt d) v,   q = W_q x,   k, v = W_kv y
        y   = LN(Conv_{r x r, stride r}(x as an H x W map)),   or x where r = 1

    Args:
        dim: Channels C.
        num_heads: Heads h; divides C.
        side: Side of the square map of patch tokens; a multiple of `reduction`.
        reduction: r.
    """

    def __init__(self, dim: int, num_heads: int, side: int, reduction: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.side = side
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, kernel_size=reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (B, P+N, C) -> (B, P+N, C), where P is 0 unless r is 1."""
        y = self.norm(to_tokens(self.sr(to_image(x, self.side)))) if self.sr else x  # (B, N / r^2, C)
        qkv = self.q(x), *self.kv(y).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in qkv)  # each (B, h, its tokens, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class StagePatchEmbedding(PatchEmbedding):
    """p x p patches of an image or of the stage before, mapped to C channels and normalised."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__(patch_size, in_channels, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches: (B, c, H*p, W*p) -> (B, H*W, C)."""
        return self.norm(super().forward(x))


class PVT(nn.Module):
    """The network: `model(x)`, (B, C, image_size, image_size) -> (B, num_classes).

    Its state-dict keys are those of the published models: `patch_embed1.{proj,norm}`, `pos_embed1`, `block1.0.{norm1,
    attn.q,attn.kv,attn.sr,attn.norm,attn.proj,norm2,mlp.fc1,mlp.fc2}`, ..., `cls_token`, `norm`, `head`.

    Args:
        image_size: Side of the images in pixels, a multiple of 32.
        in_channels: Channels C of the images.
        num_classes: Length of the output.
        depths: Number of blocks of each stage.
        class_token: Whether a class token joins in the last stage, from which the class is read after a last norm, as
            published; else the mean of the tokens is read, without a norm.
        drop_path_rate: Of the last block.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        depths: tuple[int, ...] = (2, 2, 2, 2),
        class_token: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.sides: list[int] = []  # of the map of tokens in each stage
        paths = iter(drop_paths(drop_path_rate, sum(depths)))
        side, channels = image_size, in_channels
        for stage, (dim, depth, patch) in enumerate(zip(DIMS, depths, PATCH_SIZES, strict=True), start=1):
            side //= patch
            self.sides.append(side)
            num_tokens = side**2 + (class_token and stage == len(DIMS))
            blocks = [self._block(stage - 1, side, next(paths)) for _ in range(depth)]
            self.add_module(f"patch_embed{stage}", StagePatchEmbedding(patch, channels, dim))
            self.register_parameter(f"pos_embed{stage}", nn.Parameter(torch.empty(1, num_tokens, dim)))
            self.add_module(f"block{stage}", nn.ModuleList(blocks))
            channels = dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels)) if class_token else None
        self.norm = nn.LayerNorm(channels, eps=1e-6) if class_token else None
        self.head = nn.Linear(channels, num_classes)
        initialise_linear_layers(self)
        for name, parameter in self.named_parameters():
            if name == "cls_token" or name.startswith("pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def stages(self) -> list[nn.ModuleList]:
        """The blocks of each stage."""
        return [getattr(self, f"block{stage}") for stage in range(1, len(DIMS) + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of images: (B, C, image_size, image_size) -> (B, num_classes)."""
        check_images(x, (self.in_channels, self.image_size, self.image_size))
        for stage, (blocks, side) in enumerate(zip(self.stages, self.sides, strict=True), start=1):
            x = getattr(self, f"patch_embed{stage}")(x)  # (B, N, C)
            if self.cls_token is not None and stage == len(DIMS):
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1+N, C)
            x = x + getattr(self, f"pos_embed{stage}")
            for block in blocks:
                x = block(x)
            if stage < len(DIMS):
                x = to_image(x, side)  # (B, C, H, W)
        return self.head(x.mean(dim=1) if self.cls_token is None else self.norm(x[:, 0]))

    @staticmethod
    def _block(stage: int, side: int, drop_path: float) -> Block:
        dim = DIMS[stage]
        attention = SpatialReductionAttention(dim, HEADS[stage], side, REDUCTIONS[stage])
        norms = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        return Block(attention, *norms, Mlp(dim, MLP_RATIOS[stage] * dim), DropPath(drop_path), DropPath(drop_path))
