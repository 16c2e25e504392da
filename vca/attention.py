"""Visual-Contrast Attention: n contrast tokens stand between the N queries and the N keys, so the cost is N n, not N^2.

Letters, here and in every comment: B batch, P prefix tokens (a class token), N = H W patch tokens, C channels, h heads,
d = C / h, n = a b contrast tokens pooled from the H x W map of queries.

Source: Pu et al., Linear Differential Vision Transformer: Learning Visual Contrasts via Pairwise Differentials,
NeurIPS 2025, arXiv:2511.00833. The differential operation is that of Ye et al., Differential Transformer,
arXiv:2410.05258.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stage = Literal["differential", "plain"]
Stream = Literal["pool", "embed", "pool+embed"]


def lambda_init(layer_index: int) -> float:
    """0.8 - 0.6 exp(-0.3 layer_index); `layer_index` is 0 for the first block. Source: arXiv:2410.05258, section 2."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_index)


def check_heads(dim: int, num_heads: int) -> int:
    """The width of a head, dim / num_heads.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"hidden_size {dim} is not a multiple of num_heads {num_heads}.")
    return dim // num_heads


class HeadNorm(nn.RMSNorm):
    """RMSNorm of the queries or keys of each head over its d channels (eps 1e-6), so that no logit outgrows bf16.

    Computed in float32 at least, whatever autocast does, and returned in the dtype it was given.

    Source: Dehghani et al. 2023, arXiv:2302.05442, section 3.2, there with LayerNorm; with RMSNorm as in Esser et al.
    2024, arXiv:2403.03206, section 5.3.2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


def head_norms(dim: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    """The norms of the queries and of the keys of a head of width `dim`, or two that do nothing."""
    return (HeadNorm(dim), HeadNorm(dim)) if qk_norm else (nn.Identity(), nn.Identity())


def to_map(tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """(B, h, H*W, d) tokens, row by row, as a (B, h*d, H, W) feature map."""
    return tokens.transpose(2, 3).flatten(1, 2).unflatten(2, grid_size)


class Differential(nn.Module):
    """The operation that ends both stages: (1 - lambda_init) RMSNorm(positive - lambda negative).

    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, one for all heads. Computed in
    float32 at least, whatever autocast does, and returned in the dtype of `positive`.

    Args:
        dim: Width of a head, over which RMSNorm goes (eps 1e-5).
        layer_index: Index of the block, from 0.
        lambda_dim: Length of the four lambda vectors; `dim` if not given.

    Source: arXiv:2410.05258, equations 2 and 3; arXiv:2511.00833.
    """

    def __init__(self, dim: int, layer_index: int, lambda_dim: int | None = None) -> None:
        super().__init__()
        self.lambda_init = lambda_init(layer_index)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(torch.empty(lambda_dim or dim).normal_(std=0.1)))
        self.norm = nn.RMSNorm(dim, eps=1e-5)

    def forward(self, positive: Tensor, negative: Tensor) -> Tensor:
        """(..., d), (..., d) -> (..., d)."""
        dtype = torch.promote_types(positive.dtype, torch.float32)
        q1, k1, q2, k2 = (v.to(dtype) for v in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        lam = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init  # ()
        contrast = positive.to(dtype) - lam * negative.to(dtype)  # (..., d)
        out = F.rms_norm(contrast, self.norm.normalized_shape, self.norm.weight.to(dtype), self.norm.eps)
        return ((1 - self.lambda_init) * out).to(positive.dtype)


class DepthwiseConv(nn.Conv2d):
    """3x3 depth-wise convolution of the values as an image, added to what attention returns; no prefix token has one."""

    def __init__(self, dim: int, grid_size: tuple[int, int]) -> None:
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.grid_size = grid_size

    def forward(self, v: Tensor) -> Tensor:
        """(B, h, P+N, d) -> (B, P+N, C)."""
        num_prefix_tokens = v.shape[2] - math.prod(self.grid_size)
        local = super().forward(to_map(v[:, :, num_prefix_tokens:], self.grid_size))  # (B, C, H, W)
        local = local.flatten(2).transpose(1, 2)  # (B, N, C)
        return F.pad(local, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else local  # (B, P+N, C)


class VisualContrastAttention(nn.Module):
    """Attention through n contrast tokens, with a positive and a negative stream whose difference is learned.

        q, k, v = split(W_qkv x)
        t       = AdaptiveAvgPool_{a x b}(q of the patch tokens as an H x W map)
        t+      = t + e+,   t- = t + e-
        Stage I,  global contrast:       V^ = (1 - lambda_init) RMSNorm(softmax(t+ k^T / sqrt d) v
                                                                        - lambda1 softmax(t- k^T / sqrt d) v)
        Stage II, patch-wise attention:  o  = (1 - lambda_init) RMSNorm(softmax(q t+^T / sqrt d) V^
                                                                        - lambda2 softmax(q t-^T / sqrt d) V^)
        out     = W_proj(concat_heads(o) + DWConv3x3(v of the patch tokens as an H x W map))

    No N x N and no N x n map is ever in memory: every softmax is inside `scaled_dot_product_attention`.

    Args:
        dim: Channels C.
        num_heads: Heads h; divides C.
        grid_size: (H, W) of the patch tokens.
        layer_index: Index of the block, from 0; sets lambda_init.
        contrast_grid: (a, b), at most (H, W); half of each side, at least 1, if not given. That costs as many
            multiply-adds as full attention; a fixed grid at growing H W is what makes the cost linear.
        num_prefix_tokens: P tokens in front of the patches (a class token). They are keys and queries like the others,
            but are not pooled and have no convolution.
        qkv_bias: Whether `qkv` has a bias.
        qk_norm: Whether queries (before they are pooled) and keys are normalised, by `HeadNorm`.
        dwc: Whether to add the depth-wise convolution of the values.
        stages: For Stage I and Stage II, `differential`, or `plain`: the positive stream only, no difference, no norm.
        positive: What t+ is: `pool` (t), `embed` (e+) or `pool+embed` (t + e+).
        negative: The same for t-.

    Raises:
        ValueError: An argument that does not fit; says which, and what would.

    Source: arXiv:2511.00833, section 3; `stages` is its Table 3, `positive` and `negative` its Table 4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        *,
        layer_index: int,
        contrast_grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dwc: bool = True,
        stages: tuple[Stage, Stage] = ("differential", "differential"),
        positive: Stream = "pool+embed",
        negative: Stream = "pool+embed",
    ) -> None:
        super().__init__()
        head_dim = check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.grid_size = tuple(grid_size)
        self.num_prefix_tokens = num_prefix_tokens
        self.contrast_grid = self._check_contrast_grid(contrast_grid)
        if isinstance(stages, str) or len(stages) != 2 or not set(stages) <= {"differential", "plain"}:
            raise ValueError(f"attention.stages is {stages!r}; write two of 'differential' and 'plain'.")
        for name, stream in (("positive", positive), ("negative", negative)):
            if stream not in ("pool", "embed", "pool+embed"):
                raise ValueError(f"attention.{name} is {stream!r}; choose one of 'pool', 'embed', 'pool+embed'.")
        self.positive, self.negative = positive, negative

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = head_norms(head_dim, qk_norm)
        self.positive_embed = self._embedding(dim) if "embed" in positive else None
        self.negative_embed = self._embedding(dim) if "embed" in negative and "differential" in stages else None
        self.stage1 = Differential(head_dim, layer_index) if stages[0] == "differential" else None
        self.stage2 = Differential(head_dim, layer_index) if stages[1] == "differential" else None
        self.dwc = DepthwiseConv(dim, self.grid_size) if dwc else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P+N, C) -> (B, P+N, C)."""
        self._check_tokens(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, h, P+N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        pooled = self.pool(q)  # (B, h, n, d)
        positive = self.stream(pooled, self.positive, self.positive_embed)  # (B, h, n, d)
        if self.stage1 or self.stage2:
            negative = self.stream(pooled, self.negative, self.negative_embed)  # (B, h, n, d)

        if self.stage1:  # both streams in one call: 2n queries look at the P+N keys
            both = F.scaled_dot_product_attention(torch.cat([positive, negative], dim=2), k, v)  # (B, h, 2n, d)
            contrast = self.stage1(*both.chunk(2, dim=2))  # (B, h, n, d)
        else:
            contrast = F.scaled_dot_product_attention(positive, k, v)  # (B, h, n, d)

        out = F.scaled_dot_product_attention(q, positive, contrast)  # (B, h, P+N, d)
        if self.stage2:
            out = self.stage2(out, F.scaled_dot_product_attention(q, negative, contrast))  # (B, h, P+N, d)

        out = out.transpose(1, 2).flatten(2)  # (B, P+N, C)
        if self.dwc:
            out = out + self.dwc(v)
        return self.proj(out)

    def pool(self, q: Tensor) -> Tensor:
        """The queries of the patch tokens, averaged to the contrast grid: (B, h, P+N, d) -> (B, h, n, d)."""
        image = to_map(q[:, :, self.num_prefix_tokens :], self.grid_size)  # (B, C, H, W)
        pooled = F.adaptive_avg_pool2d(image, self.contrast_grid)  # (B, C, a, b)
        # Contiguous, since kernels without an attention map in memory need keys whose last stride is 1.
        return pooled.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3).contiguous()  # (B, h, n, d)

    def stream(self, pooled: Tensor, kind: Stream, embed: Tensor | None) -> Tensor:
        """t+ or t-, (B, h, n, d), from the pooled queries (B, h, n, d) and the embedding (1, n, C)."""
        if kind == "pool":
            return pooled
        embed = embed.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).to(pooled.dtype)  # (1, h, n, d)
        return pooled + embed if kind == "pool+embed" else embed.expand_as(pooled)

    def extra_repr(self) -> str:
        """The grids, for `print(model)`."""
        return f"grid_size={self.grid_size}, contrast_grid={self.contrast_grid}, positive={self.positive!r}, " + (
            f"negative={self.negative!r}"
        )

    def _embedding(self, dim: int) -> nn.Parameter:
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, math.prod(self.contrast_grid), dim), std=0.02))

    def _check_contrast_grid(self, contrast_grid: tuple[int, int] | None) -> tuple[int, int]:
        height, width = self.grid_size
        if contrast_grid is None:
            return max(1, height // 2), max(1, width // 2)
        grid = tuple(contrast_grid) if isinstance(contrast_grid, list | tuple) else contrast_grid
        if not (isinstance(grid, tuple) and len(grid) == 2 and all(type(side) is int and side > 0 for side in grid)):
            raise ValueError(f"attention.contrast_grid is {contrast_grid!r}; write two positive integers, e.g. [8, 8].")
        if grid[0] > height or grid[1] > width:
            raise ValueError(
                f"attention.contrast_grid {grid[0]}x{grid[1]} is larger than the {height}x{width} grid of patch tokens;"
                f" choose at most [{height}, {width}], or leave it out for [{max(1, height // 2)}, {max(1, width // 2)}]."
            )
        return grid

    def _check_tokens(self, x: Tensor) -> None:
        height, width = self.grid_size
        if x.shape[1] != self.num_prefix_tokens + height * width:
            raise ValueError(
                f"got {x.shape[1]} tokens; this layer was built for {self.num_prefix_tokens} prefix tokens and a "
                f"{height}x{width} grid, {self.num_prefix_tokens + height * width} in all."
            )
