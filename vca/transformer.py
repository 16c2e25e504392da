"""The adaLN-Zero transformer that DiT and SiT share: one backbone, any attention of `ATTENTIONS`.

With `attention={"name": "mhsa"}` its state-dict keys and its outputs are those of the published models.

Source: Peebles & Xie 2023, Scalable Diffusion Models with Transformers, arXiv:2212.09748.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vca.attention import AgentAttention, VisualContrastAttention
from vca.baseline import DifferentialAttention, LinearAttention, SelfAttention
from vca.embedding import LabelEmbedding, TimestepEmbedding, sincos_2d
from vca.layer import check_heads
from vca.registry import create, defaults_of, lookup, lookup_spec

ATTENTIONS = {
    "vca": VisualContrastAttention,
    "mhsa": SelfAttention,
    "differential": DifferentialAttention,
    "agent": AgentAttention,
    "linear": LinearAttention,
}

SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


def parse_size(size: str) -> dict[str, int]:
    """Turn `"B/2"` into hidden_size, depth, num_heads and patch_size, keywords of `Transformer`.

    Raises:
        ValueError: Not SIZE/PATCH with a known size and a positive patch.
    """
    match = re.fullmatch(r"([A-Za-z]+)/([1-9]\d*)", size)
    if match is None:
        raise ValueError(f"model.size is {size!r}; write SIZE/PATCH with SIZE in {sorted(SIZES)}, e.g. 'B/2'.")
    return {**lookup(SIZES, match[1], "model.size"), "patch_size": int(match[2])}


def resolved_attention(attention: str | Mapping[str, Any]) -> dict[str, Any]:
    """Complete the spec of an attention, or its name, with the defaults of all options that are not given.

    Raises:
        ValueError: It has no name, or an unknown one.
    """
    entry, spec = lookup_spec(ATTENTIONS, attention, "model.attention")
    defaults = {k: v for k, v in defaults_of(entry).items() if k not in ("layer_index", "num_prefix_tokens")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in {**defaults, **spec}.items()}


def before_joint(attention: str | Mapping[str, Any]) -> dict[str, Any]:
    """Complete the spec of an attention, of a file older than the option `softmax`, with the defaults of then.

    A spec that says its `softmax` is of later, and stays as it is.
    """
    spec = {"name": attention} if isinstance(attention, str) else dict(attention)
    if spec.get("name") != "vca" or "softmax" in spec:
        return spec
    spec = {"contrast_grid": "half", "embed_std": 0.02, **spec, "softmax": "separate"}
    return {**spec, "contrast_grid": spec["contrast_grid"] or "half"}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute x (1 + scale) + shift: (B, N, D), (B, D), (B, D) -> (B, N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbedding(nn.Module):
    """Non-overlapping p x p patches, each mapped to D channels: (B, C, H*p, W*p) -> (B, H*W, D)."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches: (B, C, H*p, W*p) -> (B, H*W, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each token: (B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class AdaLN(nn.Sequential):
    """SiLU, Linear: the condition (B, D) as `count` vectors (B, D): shifts, scales and gates."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, count * dim))
        self.count = count

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """Compute the modulations: (B, D) -> count x (B, D)."""
        return super().forward(c).chunk(self.count, dim=1)


class Block(nn.Module):
    """x += gate attn(modulate(LN(x))); x += gate MLP(modulate(LN(x))); all of the condition."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = AdaLN(dim, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Apply the block: (B, N, D), (B, D) -> (B, N, D)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)  # 6 x (B, D)
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """modulate(LN(x)), then Linear to the p*p*C_out numbers of a patch."""

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.adaLN_modulation = AdaLN(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Compute the patches of the output: (B, N, D), (B, D) -> (B, N, p*p*C_out)."""
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c)))


class Transformer(nn.Module):
    """The network of DiT and SiT: `model(x_t, t, y)`, (B, C, H, W), (B,), (B,) -> (B, C_out, H, W).

    Args:
        input_size: Side of the square input, or (height, width), in latent pixels; a multiple of `patch_size`.
        patch_size: Side p of a patch.
        in_channels: Channels C of x_t.
        out_channels: Channels C_out of the output; `in_channels` if not given.
        hidden_size: Width D, a multiple of 4 and of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_ratio: Width of the MLP over D.
        num_classes: Labels are 0 ... num_classes - 1; `num_classes` itself is the null class.
        class_dropout_prob: Probability in training that a label becomes the null class; 0 means that there is none,
            and no guidance.
        attention: Name in `ATTENTIONS`, or `{"name": ..., option: value}` with the options of that class.

    Attributes:
        attention: `{"name": ..., option: value}` with every option, so that who writes it down need not know the
            defaults.
        null_class: Index of the null class, or None if the network has none.
        grad_checkpointing: Set it, to keep no activation inside a block for the backward pass, but compute the block
            again there: less memory, about a third more time.

    Raises:
        ValueError: Sizes that do not fit each other, or an unknown attention or option.
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        attention: str | Mapping[str, Any] = "vca",
    ) -> None:
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        for name, value in (("patch_size", patch_size), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name} is {value}; choose at least 1.")
        if height % patch_size or width % patch_size:
            raise ValueError(f"an input of {height}x{width} cannot be cut into patches of {patch_size}x{patch_size}.")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; a class-conditional model needs at least 1.")
        check_heads(hidden_size, num_heads)
        self.input_size = (height, width)
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = out_channels or in_channels
        self.num_classes = num_classes
        self.null_class = num_classes if class_dropout_prob > 0 else None
        self.grid_size = (height // patch_size, width // patch_size)
        self.grad_checkpointing = False
        self.attention = resolved_attention(attention)

        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedding(hidden_size)
        self.y_embedder = LabelEmbedding(num_classes, hidden_size, class_dropout_prob)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, self.grid_size)[None])  # (1, N, D), never trained
        self.blocks = nn.ModuleList(
            Block(hidden_size, self._attention(hidden_size, num_heads, index), mlp_ratio) for index in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict for noisy images at times t with labels y: (B, C, H, W), (B,), (B,) -> (B, C_out, H, W)."""
        if tuple(x_t.shape[1:]) != (self.in_channels, *self.input_size):
            raise ValueError(
                f"x_t is {tuple(x_t.shape)}; this model takes (B, {self.in_channels}, {self.input_size[0]}, "
                f"{self.input_size[1]})."
            )
        x = self.x_embedder(x_t) + self.pos_embed  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)  # (B, N, D)
            else:
                x = block(x, c)  # (B, N, D)
        return self.unpatchify(self.final_layer(x, c))  # (B, C_out, H, W)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Join patches (B, N, p*p*C_out), each in the order row, column, channel: (B, C_out, H, W)."""
        p = self.patch_size
        image = patches.unflatten(1, self.grid_size).unflatten(3, (p, p, self.out_channels))  # (B, H/p, W/p, p, p, C)
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _attention(self, dim: int, num_heads: int, layer_index: int) -> nn.Module:
        sizes = (dim, num_heads, self.grid_size)
        return create(ATTENTIONS, self.attention, "model.attention", *sizes, layer_index=layer_index)

    def _initialise(self) -> None:
        """Draw Xavier uniform, embeddings normal 0.02; biases, adaLN and output zero, so that the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.flatten(1))  # as the Linear layer that it is; a view, so in place
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        zeros = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in [*zeros, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        """Write the sizes, for `print(model)`."""
        return f"input_size={self.input_size}, tokens={math.prod(self.grid_size)}, null_class={self.null_class}"
