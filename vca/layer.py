"""The parts of every attention layer: heads, their norms, a convolution of the values, the projection, and one call.

Letters, here and in the other files: B batch, P prefix tokens (a class token, registers), N = H W patch tokens, C
channels, h heads, d = C / h.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_heads(dim: int, num_heads: int) -> int:
    """Compute the width of a head, dim / num_heads.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"hidden_size {dim} is not a multiple of num_heads {num_heads}; change one of them.")
    return dim // num_heads


def check_grid(grid_size: int | tuple[int, int]) -> tuple[int, int]:
    """Give (H, W); one number is the side of a square.

    Raises:
        ValueError: Not one or two positive integers.
    """
    grid = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size)
    if len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
        raise ValueError(f"grid_size is {grid_size!r}; give the sides of the map of patch tokens, e.g. 16 or (16, 16).")
    return grid


class HeadNorm(nn.RMSNorm):
    """RMSNorm of the queries or keys of each head over its channels (eps 1e-6), so that no logit outgrows bf16.

    Computed in float32 at least, whatever autocast does, and returned in the dtype it was given.

    Source: Dehghani et al. 2023, arXiv:2302.05442, section 3.2, there with LayerNorm; with RMSNorm as in Esser et al.
    2024, arXiv:2403.03206, section 5.3.2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis: (..., d) -> (..., d)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


def to_map(tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """View tokens (B, h, H*W, d), row by row, as a feature map (B, h*d, H, W); of a split `qkv`, without a copy."""
    return tokens.transpose(2, 3).flatten(1, 2).unflatten(2, grid_size)


class DepthwiseConv(nn.Conv2d):
    """3x3 depth-wise convolution of the values as an image, added to the output of attention, but for prefix tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve the tokens, the last H*W of `grid`, and join the heads: (B, h, P+N, d) -> (B, P+N, C)."""
        num_prefix_tokens = v.shape[2] - math.prod(grid)
        image = to_map(v[:, :, num_prefix_tokens:], grid)  # (B, C, H, W)
        local = super().forward(image.contiguous(memory_format=torch.channels_last))  # (B, C, H, W)
        local = local.flatten(2).transpose(1, 2)  # (B, N, C)
        return F.pad(local, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else local  # (B, P+N, C)


class Attention(nn.Module):
    """Base of the layers: a subclass says how queries, keys and values become the output of each head.

        out = W_proj(concat_heads(attend(q, k, v)) + DWConv3x3(v of the patch tokens as an H x W map))

    Args:
        dim: Channels C.
        num_heads: Heads h; divides C.
        grid_size: (H, W) of the patch tokens, or the side of a square; a call may have another.
        num_prefix_tokens: P tokens in front of the patches.
        qkv_bias: Whether `qkv` has a bias.
        qk_norm: Whether queries and keys are normalised, by `HeadNorm`.
        dwc: Whether to add the convolution.
        norm_dim: Width over which they are normalised; d if not given.

    Raises:
        ValueError: Sizes that do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: int | tuple[int, int],
        *,
        num_prefix_tokens: int,
        qkv_bias: bool,
        qk_norm: bool,
        dwc: bool,
        norm_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.grid_size = check_grid(grid_size)
        self.num_prefix_tokens = num_prefix_tokens
        norm_dim = norm_dim or self.head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = HeadNorm(norm_dim) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(norm_dim) if qk_norm else nn.Identity()
        self.dwc = DepthwiseConv(dim) if dwc else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, attn_mask: None = None, is_causal: bool = False, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Apply the layer: (B, P+N, C) -> (B, P+N, C).

        Args:
            x: The tokens, prefix tokens first, then the patches row by row.
            attn_mask: None; it is there because the blocks of timm pass it.
            is_causal: False; for the same reason.
            grid: (H, W) of the patch tokens of this call; not given means that of construction.

        Raises:
            ValueError: The tokens are not those of the grid; or a mask was given, which the layer has not.
        """
        grid = self.grid_size if grid is None else check_grid(grid)
        self._check(x, attn_mask, is_causal, grid)
        q, k, v = self.heads(x)  # 3 x (B, h, P+N, d)
        out = self.attend(q, k, v, grid).transpose(1, 2).flatten(2)  # (B, P+N, C)
        if self.dwc:
            out = out + self.dwc(v, grid)
        return self.proj(out)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values of each head: (B, P+N, C) -> 3 x (B, h, P+N, d)."""
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1))
        return self.q_norm(q), self.k_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend with each head, N patch tokens on the grid (H, W): 3 x (B, h, P+N, d) -> (B, h, P+N, d)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Write the grid, for `print(model)`."""
        return f"grid_size={self.grid_size}, num_prefix_tokens={self.num_prefix_tokens}"

    def _check(self, x: Tensor, attn_mask: None, is_causal: bool, grid: tuple[int, int]) -> None:
        if attn_mask is not None or is_causal:
            name = "attn_mask" if attn_mask is not None else "is_causal"
            raise ValueError(f"{name} was given, and {type(self).__name__} looks at all tokens; leave it out.")
        height, width = grid
        if x.shape[1] != self.num_prefix_tokens + height * width:
            what = "was built for" if grid == self.grid_size else "was called with a grid for"
            raise ValueError(
                f"got {x.shape[1]} tokens; this layer {what} {self.num_prefix_tokens} prefix tokens and a "
                f"{height}x{width} grid, {self.num_prefix_tokens + height * width} in all; for images of another "
                "resolution give the grid, layer(x, grid=(H, W))."
            )
