"""Visual-Contrast Attention: n contrast tokens stand between the N queries and the N keys, so the cost is N n, not N^2.

Letters, here and in every comment: B batch, P prefix tokens (a class token), N = H W patch tokens, C channels, h heads,
d = C / h, n = a b contrast tokens pooled from the H x W map of queries.

Source: Pu et al., Linear Differential Vision Transformer: Learning Visual Contrasts via Pairwise Differentials,
NeurIPS 2025, arXiv:2511.00833. The differential operation is that of Ye et al., Differential Transformer,
arXiv:2410.05258.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.layer import Attention, to_map

Stage = Literal["differential", "plain"]
Stream = Literal["pool", "embed", "pool+embed"]
Softmax = Literal["joint", "separate"]
MOST_KEPT = 64  # interpolated embeddings that a layer keeps; by default there are at most 8x8 contrast grids


def default_contrast_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Give half of each side of a grid of patch tokens (H, W), at least 1 and at most 8."""
    height, width = grid
    return min(max(1, height // 2), 8), min(max(1, width // 2), 8)


def interpolate(embed: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Interpolate embeddings (1, a b, C) of a grid (a, b) to (1, a' b', C) of a new one (a', b').

    Bilinear, so that nothing overshoots; smoothed where the grid shrinks. Differentiable.
    """
    image = embed.transpose(1, 2).unflatten(2, grid)  # (1, C, a, b)
    image = F.interpolate(image, new_grid, mode="bilinear", align_corners=False, antialias=True)  # (1, C, a', b')
    return image.flatten(2).transpose(1, 2)  # (1, a' b', C)


def lambda_init(layer_index: int) -> float:
    """Compute 0.8 - 0.6 exp(-0.3 layer_index), from 0 for the first block. Source: arXiv:2410.05258, section 2."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_index)


class Differential(nn.Module):
    """The operation that ends both stages: (1 - lambda_init) RMSNorm(positive - lambda negative).

    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, one for all heads. Computed in
    float32 at least, whatever autocast does, and returned in the dtype it was given.

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
        """Compute the difference of the two streams: 2 x (..., h, N, d) -> (..., h, N, d)."""
        dtype = torch.promote_types(positive.dtype, torch.float32)
        contrast = positive.to(dtype) - self.scale(dtype) * negative.to(dtype)  # (..., h, N, d)
        # In this order since the first version, whose checkpoints draw the same bits.
        return ((1 - self.lambda_init) * self._norm(contrast, self.norm.weight)).to(positive.dtype)

    def scale(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute lambda, ()."""
        q1, k1, q2, k2 = (v.to(dtype) for v in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init

    def subtrahend(self, x: Tensor) -> Tensor:
        """Compute -lambda x, (..., d), for a sum that subtracts; `normalise` does the rest."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (-self.scale(dtype) * x.to(dtype)).to(x.dtype)

    def normalise(self, contrast: Tensor) -> Tensor:
        """Compute (1 - lambda_init) RMSNorm of a difference: (..., h, N, d) -> (..., h, N, d)."""
        dtype = torch.promote_types(contrast.dtype, torch.float32)
        return self._norm(contrast.to(dtype), (1 - self.lambda_init) * self.norm.weight).to(contrast.dtype)

    def _norm(self, contrast: Tensor, gain: Tensor) -> Tensor:
        contrast = contrast.transpose(-3, -2)  # (..., N, h, d), as attention leaves it in memory, so nothing is copied
        normed = F.rms_norm(contrast, self.norm.normalized_shape, gain.to(contrast.dtype), self.norm.eps)
        return normed.transpose(-3, -2)  # (..., h, N, d)


class VisualContrastAttention(Attention):
    """Attention through n contrast tokens, with a positive and a negative stream whose difference is learned.

        q, k, v = split(W_qkv x)
        t       = AdaptiveAvgPool_{a x b}(q of the patch tokens as an H x W map)
        t+      = t + e+,   t- = t + e-
        Stage I,  global contrast:       V^ = (1 - lambda_init) RMSNorm(softmax(t+ k^T / sqrt d) v
                                                                        - lambda1 softmax(t- k^T / sqrt d) v)
        Stage II, patch-wise attention:  o  = (1 - lambda_init) RMSNorm((A+ - lambda2 A-) V^)
            joint:     [A+, A-] = softmax(q [t+; t-]^T / sqrt d), one softmax over the 2n columns, then split
            separate:  A+ = softmax(q t+^T / sqrt d),   A- = softmax(q t-^T / sqrt d)
        out     = W_proj(concat_heads(o) + DWConv3x3(v of the patch tokens as an H x W map))

    No N x N and no N x n map is ever in memory: every softmax is inside `scaled_dot_product_attention`. The joint Stage
    II is one such call, with the keys [t+; t-] and the values [V^; -lambda2 V^].

    Which form is whose: the paper's text writes two softmaxes. Two public re-implementations, one of which names the
    commit of the authors' code that it follows, agree on one softmax, and on e+ and e- that start as N(0, 1). The
    authors' own files for DiT and SiT were not to be had.

    A call may have another grid of patch tokens than (H, W): `layer(x, grid=(H', W'))`. Its contrast grid is then what
    `contrast_grid` says of that grid, a fixed (a, b) at most (H', W'), and e+ and e- are interpolated where it is not
    that of construction: in each call where gradients are recorded, else once for each contrast grid. What was
    interpolated is kept until e+ and e- change, or `train()` or `eval()` is called; after writing to the `.data` of a
    parameter, which leaves no trace, call `eval()`.

    Args:
        dim: Channels C.
        num_heads: Heads h; divides C.
        grid_size: (H, W) of the patch tokens, or the side of a square; a call may have another.
        layer_index: Index of the block, from 0; sets lambda_init.
        contrast_grid: (a, b), at most (H, W). Not given means half of each side, at least 1 and at most 8, so that the
            cost is linear in the tokens beyond 16x16; "half" means half of each side whatever the size, which costs the
            multiply-adds of full attention.
        num_prefix_tokens: P tokens in front of the patches (a class token). They are keys and queries like the others,
            but are not pooled and have no convolution.
        qkv_bias: Whether `qkv` has a bias.
        qk_norm: Whether queries (before they are pooled) and keys are normalised, by `HeadNorm`.
        dwc: Whether to add the depth-wise convolution of the values.
        softmax: Of Stage II, `joint` or `separate`; without an effect where that is plain.
        embed_std: Standard deviation of e+ and e- at the start. At 0.02 both streams start almost equal, and so the
            layer as agent attention with a convolution.
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
        grid_size: int | tuple[int, int],
        *,
        layer_index: int,
        contrast_grid: tuple[int, int] | Literal["half"] | None = None,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dwc: bool = True,
        softmax: Softmax = "joint",
        embed_std: float = 1.0,
        stages: tuple[Stage, Stage] = ("differential", "differential"),
        positive: Stream = "pool+embed",
        negative: Stream = "pool+embed",
    ) -> None:
        common = {"num_prefix_tokens": num_prefix_tokens, "qkv_bias": qkv_bias, "qk_norm": qk_norm, "dwc": dwc}
        super().__init__(dim, num_heads, grid_size, **common)
        self._contrast_rule = self._check_contrast_grid(contrast_grid)
        self.contrast_grid = self.contrast_grid_of(self.grid_size)
        self._interpolated: dict[tuple[str, tuple[int, int]], tuple[Tensor, int, Tensor]] = {}
        if isinstance(stages, str) or len(stages) != 2 or not set(stages) <= {"differential", "plain"}:
            raise ValueError(f"attention.stages is {stages!r}; write two of 'differential' and 'plain'.")
        for name, stream in (("positive", positive), ("negative", negative)):
            if stream not in ("pool", "embed", "pool+embed"):
                raise ValueError(f"attention.{name} is {stream!r}; choose one of 'pool', 'embed', 'pool+embed'.")
        if softmax not in ("joint", "separate"):
            raise ValueError(f"attention.softmax is {softmax!r}; choose joint or separate.")
        if not embed_std > 0:
            raise ValueError(f"attention.embed_std is {embed_std}; choose a positive number.")
        self.positive, self.negative, self.softmax = positive, negative, softmax
        self.num_contrast_tokens = math.prod(self.contrast_grid)

        shape = (1, self.num_contrast_tokens, dim)
        has_negative = "differential" in stages
        self.positive_embed = nn.Parameter(torch.randn(shape) * embed_std) if "embed" in positive else None
        self.negative_embed = (
            nn.Parameter(torch.randn(shape) * embed_std) if "embed" in negative and has_negative else None
        )
        self.stage1 = Differential(self.head_dim, layer_index) if stages[0] == "differential" else None
        self.stage2 = Differential(self.head_dim, layer_index) if stages[1] == "differential" else None

    def contrast_grid_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Give the contrast grid (a, b) of a grid of patch tokens (H, W)."""
        height, width = grid
        if self._contrast_rule is None:
            return default_contrast_grid(grid)
        if self._contrast_rule == "half":
            return max(1, height // 2), max(1, width // 2)
        return min(self._contrast_rule[0], height), min(self._contrast_rule[1], width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend through contrast tokens pooled from the grid (H, W): 3 x (B, h, P+N, d) -> (B, h, P+N, d)."""
        tokens = self.contrast_tokens(q, grid)  # (B, h, 2n, d), or (B, h, n, d) where both stages are plain
        positive, negative = tokens.tensor_split([math.prod(self.contrast_grid_of(grid))], dim=2)  # 2 x (B, h, n, d)
        if self.stage1:  # 2n queries look at the P+N keys
            both = F.scaled_dot_product_attention(tokens, k, v)  # (B, h, 2n, d)
            contrast = self.stage1(*both.chunk(2, dim=2))  # (B, h, n, d)
        else:
            contrast = F.scaled_dot_product_attention(positive, k, v)  # (B, h, n, d)

        if self.stage2 and self.softmax == "joint":  # P+N queries look at 2n contrast tokens
            values = torch.cat([contrast, self.stage2.subtrahend(contrast)], dim=2)  # (B, h, 2n, d)
            return self.stage2.normalise(F.scaled_dot_product_attention(q, tokens, values))  # (B, h, P+N, d)
        out = F.scaled_dot_product_attention(q, positive, contrast)  # (B, h, P+N, d)
        return self.stage2(out, F.scaled_dot_product_attention(q, negative, contrast)) if self.stage2 else out

    def contrast_tokens(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pool queries on the grid (H, W) to [t+; t-]: (B, h, P+N, d) -> (B, h, 2n, d).

        Where no stage has t-, to t+, (B, h, n, d).
        """
        contrast_grid = self.contrast_grid_of(grid)
        image = to_map(q[:, :, self.num_prefix_tokens :], grid)  # (B, C, H, W)
        pooled = F.adaptive_avg_pool2d(image, contrast_grid)  # (B, C, a, b)
        pooled = pooled.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)  # (B, h, n, d)
        streams = [self._stream(pooled, self.positive, self._embed("positive_embed", contrast_grid))]
        if self.stage1 or self.stage2:
            streams.append(self._stream(pooled, self.negative, self._embed("negative_embed", contrast_grid)))
        return torch.cat(streams, dim=2).contiguous()  # kernels without a map in memory need a last stride of 1

    def extra_repr(self) -> str:
        """Write the grids and the form, for `print(model)`."""
        return f"{super().extra_repr()}, contrast_grid={self.contrast_grid}, softmax={self.softmax!r}, " + (
            f"positive={self.positive!r}, negative={self.negative!r}"
        )

    def train(self, mode: bool = True) -> "VisualContrastAttention":
        """Set the mode of training, and forget what was interpolated."""
        self._interpolated.clear()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was interpolated: a copy has parameters of its own."""
        return {**self.__dict__, "_interpolated": {}}

    def _embed(self, name: str, contrast_grid: tuple[int, int]) -> Tensor | None:
        """Give an embedding for a contrast grid (a, b): (1, a b, C), or None if there is none."""
        embed = getattr(self, name)
        if embed is None or contrast_grid == self.contrast_grid:
            return embed
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return interpolate(embed, self.contrast_grid, contrast_grid)
        version = 0 if embed.is_inference() else embed._version
        kept, at, found = self._interpolated.get((name, contrast_grid), (None, 0, embed))
        if kept is not embed or at != version or (found.device, found.dtype) != (embed.device, embed.dtype):
            found = interpolate(embed, self.contrast_grid, contrast_grid)
            if len(self._interpolated) >= MOST_KEPT:
                self._interpolated.clear()
            self._interpolated[name, contrast_grid] = embed, version, found
        return found

    def _stream(self, pooled: Tensor, kind: Stream, embed: Tensor | None) -> Tensor:
        """Make contrast tokens of pooled queries (B, h, n, d) and an embedding (1, n, C): (B, h, n, d)."""
        if kind == "pool":
            return pooled
        embed = embed.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).to(pooled.dtype)  # (1, h, n, d)
        return pooled + embed if kind == "pool+embed" else embed.expand_as(pooled)

    def _check_contrast_grid(self, contrast_grid: tuple[int, int] | str | None) -> tuple[int, int] | str | None:
        """Give the rule of the contrast grid: None, `half`, or a fixed (a, b)."""
        height, width = self.grid_size
        if contrast_grid in (None, "half"):
            return contrast_grid
        grid = tuple(contrast_grid) if isinstance(contrast_grid, list | tuple) else contrast_grid
        if not (isinstance(grid, tuple) and len(grid) == 2 and all(type(side) is int and side > 0 for side in grid)):
            raise ValueError(
                f"attention.contrast_grid is {contrast_grid!r}; write two positive integers, e.g. [8, 8], or half."
            )
        if grid[0] > height or grid[1] > width:
            default = default_contrast_grid(self.grid_size)
            raise ValueError(
                f"attention.contrast_grid {grid[0]}x{grid[1]} is larger than the {height}x{width} grid of patch tokens;"
                f" choose at most [{height}, {width}], or leave it out for [{default[0]}, {default[1]}]."
            )
        return grid


class AgentAttention(VisualContrastAttention):
    """Attention through n pooled queries t, the agents, without contrast.

    It computes softmax(q t^T / sqrt d) softmax(t k^T / sqrt d) v: it is `VisualContrastAttention` with both stages
    plain and t+ = t, its predecessor and nearest control.

    Args:
        dim: Channels C.
        num_heads: Heads h; divides C.
        grid_size: (H, W) of the patch tokens, or the side of a square.
        layer_index: Not used: this layer is the same in every block.
        contrast_grid: (a, b) of the agents; as of `VisualContrastAttention`.
        num_prefix_tokens: P tokens in front of the patches.
        qkv_bias: Whether `qkv` has a bias.
        qk_norm: Whether queries and keys are normalised, by `HeadNorm`.
        dwc: Whether to add the depth-wise convolution of the values, as the paper does.

    Raises:
        ValueError: An argument that does not fit.

    Source: Han et al. 2024, Agent Attention, arXiv:2312.08874, equation 4, without its tables of biases.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: int | tuple[int, int],
        *,
        layer_index: int = 0,
        contrast_grid: tuple[int, int] | Literal["half"] | None = None,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dwc: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            grid_size,
            layer_index=layer_index,
            contrast_grid=contrast_grid,
            num_prefix_tokens=num_prefix_tokens,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            dwc=dwc,
            stages=("plain", "plain"),
            positive="pool",
        )
