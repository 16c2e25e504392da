"""The controls: full self-attention and full differential attention, with the call of `VisualContrastAttention`.

Letters as in `vca/attention.py`: B batch, P prefix tokens, N patch tokens, C channels, h heads, d = C / h.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention import DepthwiseConv, Differential, check_heads, head_norms


class SelfAttention(nn.Module):
    """Multi-head self-attention, as in the published DiT and SiT: W_proj concat_heads(softmax(q k^T / sqrt d) v).

    Args:
        dim: Channels C.
        num_heads: Heads h; divides C.
        grid_size: (H, W) of the patch tokens; used by the convolution only.
        layer_index: Not used: this layer is the same in every block.
        qkv_bias: Whether `qkv` has a bias.
        qk_norm: Whether queries and keys are normalised, by `HeadNorm`.
        dwc: Whether to add a depth-wise 3x3 convolution of the values, the control that separates VCA from its own.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        *,
        layer_index: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dwc: bool = False,
    ) -> None:
        super().__init__()
        head_dim = check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = head_norms(head_dim, qk_norm)
        self.dwc = DepthwiseConv(dim, tuple(grid_size)) if dwc else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P+N, C) -> (B, P+N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, h, P+N, d)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # (B, h, P+N, d)
        out = out.transpose(1, 2).flatten(2)  # (B, P+N, C)
        if self.dwc:
            out = out + self.dwc(v)
        return self.proj(out)


class DifferentialAttention(nn.Module):
    """Full N x N differential attention: (1 - lambda_init) RMSNorm((A1 - lambda A2) v).

        A_i = softmax(q_i k_i^T / sqrt(d/2))

    The queries and keys of a head are split into two halves of d/2, the values are not, so the parameters are those of
    self-attention, four lambda vectors of d/2 and one gain of d.

    Args:
        dim: Channels C.
        num_heads: Heads h; C / h must be even.
        grid_size: (H, W) of the patch tokens; used by the convolution only.
        layer_index: Index of the block, from 0; sets lambda_init.
        qkv_bias: Whether `qkv` has a bias.
        dwc: Whether to add a depth-wise 3x3 convolution of the values.

    Raises:
        ValueError: `dim` is not a multiple of 2 `num_heads`.

    Source: Ye et al., Differential Transformer, arXiv:2410.05258, equations 1 to 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        *,
        layer_index: int,
        qkv_bias: bool = True,
        dwc: bool = False,
    ) -> None:
        super().__init__()
        head_dim = check_heads(dim, num_heads)
        if head_dim % 2:
            raise ValueError(f"differential attention halves its heads, but {dim} / {num_heads} = {head_dim} is odd.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.differential = Differential(head_dim, layer_index, lambda_dim=head_dim // 2)
        self.dwc = DepthwiseConv(dim, tuple(grid_size)) if dwc else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P+N, C) -> (B, P+N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, h, P+N, d)
        streams = zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)  # 2 x (B, h, P+N, d/2)
        out = self.differential(*(self._attend(q_i, k_i, v) for q_i, k_i in streams))  # (B, h, P+N, d)
        out = out.transpose(1, 2).flatten(2)  # (B, P+N, C)
        if self.dwc:
            out = out + self.dwc(v)
        return self.proj(out)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Zeros widen q and k from d/2 to d: kernels without an N x N map need q, k and v of one width."""
        half = q.shape[-1]
        q, k = F.pad(q, (0, half)), F.pad(k, (0, half))  # (B, h, P+N, d)
        return F.scaled_dot_product_attention(q, k, v, scale=half**-0.5)  # (B, h, P+N, d)
