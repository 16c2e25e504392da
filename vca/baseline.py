"""The controls: full, differential and linear attention, with the call of `VisualContrastAttention`.

Letters as in `vca/layer.py`: B batch, P prefix tokens, N patch tokens, C channels, h heads, d = C / h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vca.attention import Differential
from vca.layer import Attention, check_heads


class SelfAttention(Attention):
    """Multi-head self-attention, as in the published DiT and SiT: W_proj concat_heads(softmax(q k^T / sqrt d) v).

    Args:
        dim: Channels C.
        num_heads: Heads h; divides C.
        grid_size: (H, W) of the patch tokens, or the side of a square.
        layer_index: Not used: this layer is the same in every block.
        num_prefix_tokens: P tokens in front of the patches.
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
        grid_size: int | tuple[int, int],
        *,
        layer_index: int = 0,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dwc: bool = False,
    ) -> None:
        common = {"num_prefix_tokens": num_prefix_tokens, "qkv_bias": qkv_bias, "qk_norm": qk_norm, "dwc": dwc}
        super().__init__(dim, num_heads, grid_size, **common)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend with each head: 3 x (B, h, P+N, d) -> (B, h, P+N, d); the grid (H, W) does not matter."""
        return F.scaled_dot_product_attention(q, k, v)


class DifferentialAttention(Attention):
    """Full N x N differential attention: (1 - lambda_init) RMSNorm((A1 - lambda A2) v).

        A_i = softmax(q_i k_i^T / sqrt(d/2))

    The queries and keys of a head are split into two halves of d/2, the values are not, so the parameters are those of
    self-attention, four lambda vectors of d/2 and one gain of d.

    Args:
        dim: Channels C.
        num_heads: Heads h; C / h must be even.
        grid_size: (H, W) of the patch tokens, or the side of a square.
        layer_index: Index of the block, from 0; sets lambda_init.
        num_prefix_tokens: P tokens in front of the patches.
        qkv_bias: Whether `qkv` has a bias.
        qk_norm: Whether the halves of queries and keys are normalised, by `HeadNorm`.
        dwc: Whether to add a depth-wise 3x3 convolution of the values.

    Raises:
        ValueError: `dim` is not a multiple of 2 `num_heads`.

    Source: Ye et al., Differential Transformer, arXiv:2410.05258, equations 1 to 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: int | tuple[int, int],
        *,
        layer_index: int,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dwc: bool = False,
    ) -> None:
        head_dim = check_heads(dim, num_heads)
        if head_dim % 2:
            raise ValueError(f"differential attention halves its heads, but {dim} / {num_heads} = {head_dim} is odd.")
        common = {"num_prefix_tokens": num_prefix_tokens, "qkv_bias": qkv_bias, "qk_norm": qk_norm, "dwc": dwc}
        super().__init__(dim, num_heads, grid_size, **common, norm_dim=head_dim // 2)
        self.differential = Differential(head_dim, layer_index, lambda_dim=head_dim // 2)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project (B, P+N, C) to queries, keys and values, 3 x (B, h, P+N, d), each half normalised by itself."""
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1))
        halves = (norm(z.unflatten(-1, (2, -1))).flatten(-2) for z, norm in ((q, self.q_norm), (k, self.k_norm)))
        return *halves, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend with each head: 3 x (B, h, P+N, d) -> (B, h, P+N, d); the grid (H, W) does not matter."""
        streams = zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)  # 2 x (B, h, P+N, d/2)
        return self.differential(*(self._attend_half(q_i, k_i, v) for q_i, k_i in streams))

    @staticmethod
    def _attend_half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Widen q and k by zeros from d/2 to d: kernels without an N x N map need q, k and v of one width."""
        half = q.shape[-1]
        q, k = F.pad(q, (0, half)), F.pad(k, (0, half))  # (B, h, P+N, d)
        return F.scaled_dot_product_attention(q, k, v, scale=half**-0.5)  # (B, h, P+N, d)


class LinearAttention(Attention):
    """Linear attention with ReLU.

    o_i = relu(q_i) S / (relu(q_i) . z + eps),   S = sum_j relu(k_j) v_j^T,   z = sum_j relu(k_j)

    The sums over the tokens are in float32 at least, whatever autocast does; eps is 1e-6 times the number of tokens.

    Args:
        dim: Channels C.
        num_heads: Heads h; divides C.
        grid_size: (H, W) of the patch tokens, or the side of a square.
        layer_index: Not used: this layer is the same in every block.
        num_prefix_tokens: P tokens in front of the patches.
        qkv_bias: Whether `qkv` has a bias.
        qk_norm: Whether queries and keys are normalised before the ReLU, by `HeadNorm`.
        dwc: Whether to add the depth-wise 3x3 convolution of the values, as LiT does.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.

    Source: Xie et al. 2024, SANA, arXiv:2410.10629, section 2.2; Wang et al. 2025, LiT, arXiv:2501.12976, section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: int | tuple[int, int],
        *,
        layer_index: int = 0,
        num_prefix_tokens: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dwc: bool = True,
    ) -> None:
        common = {"num_prefix_tokens": num_prefix_tokens, "qkv_bias": qkv_bias, "qk_norm": qk_norm, "dwc": dwc}
        super().__init__(dim, num_heads, grid_size, **common)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend with each head: 3 x (B, h, P+N, d) -> (B, h, P+N, d); the grid (H, W) does not matter."""
        dtype = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):  # none, on whatever device
            q, k, values = q.to(dtype).relu(), k.to(dtype).relu(), v.to(dtype)
            sums = k.mT @ values / k.shape[2]  # (B, h, d, d), S / N
            total = k.mean(dim=2, keepdim=True).mT  # (B, h, d, 1), z / N
            return (q @ sums / (q @ total + 1e-6)).to(v.dtype)
