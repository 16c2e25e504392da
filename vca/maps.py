"""The attention maps of layers with contrast tokens, which the layers themselves never hold in memory.

    with keep_inputs(contrast_layers(model)) as inputs:
        model(x_t, t, y)
    maps = maps_of(model.blocks[2].attn, inputs["blocks.2.attn"])
    maps.stage1            # (B, h, n, P+N), where the contrast tokens look, positive minus lambda1 negative
    maps.stage2[0, 1, 7]   # (n,), which of them token 7 of image 0 uses in head 1

Only the input of a layer is kept, by a hook that is gone after the block; the maps are computed from it by the plain
formula. Nothing in the layer is there for their sake, so it costs nothing when nobody asks.

Letters as in `vca/attention.py`: B batch, P prefix tokens, N = H W patch tokens, C channels, h heads, d = C / h, n = a
b contrast tokens.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vca.attention import Differential, VisualContrastAttention
from vca.layer import Attention

K = TypeVar("K")


@dataclass(frozen=True)
class Maps:
    """The maps of one layer for one input, of the letters of `VisualContrastAttention`.

    Rows of `stage1_positive` and `stage1_negative` sum to 1. With the softmax `joint`, rows of `stage2_positive` and
    `stage2_negative` sum to 1 together, with `separate` each. Where a stage is plain, it has no negative map and no
    lambda.

    Attributes:
        stage1_positive: softmax(t+ k^T / sqrt d), (B, h, n, P+N).
        stage1_negative: softmax(t- k^T / sqrt d), (B, h, n, P+N), or None.
        stage2_positive: A+, (B, h, P+N, n).
        stage2_negative: A-, (B, h, P+N, n), or None.
        lambda1: Of Stage I, (), or None.
        lambda2: Of Stage II, (), or None.
        stage1_norm: What Stage I is divided by, sqrt(mean((V+ - lambda1 V-)^2) + eps), (B, h, n, 1); 1 where it is
            plain.
        contrast_grid: (a, b), of which contrast token i is in row i // b and column i % b.
        grid_size: (H, W), of which patch token P + i is in row i // W and column i % W.
    """

    stage1_positive: Tensor
    stage1_negative: Tensor | None
    stage2_positive: Tensor
    stage2_negative: Tensor | None
    lambda1: Tensor | None
    lambda2: Tensor | None
    stage1_norm: Tensor
    contrast_grid: tuple[int, int]
    grid_size: tuple[int, int]

    @property
    def stage1(self) -> Tensor:
        """The map of the contrast tokens: the positive map - lambda1 the negative, (B, h, n, P+N)."""
        return _difference(self.stage1_positive, self.stage1_negative, self.lambda1)

    @property
    def stage2(self) -> Tensor:
        """The map of the queries: A+ - lambda2 A-, (B, h, P+N, n)."""
        return _difference(self.stage2_positive, self.stage2_negative, self.lambda2)

    def reach(self, query: int) -> Tensor:
        """Give the weights with which a query, through both stages, adds up the values of all tokens: (B, h, P+N).

        (A+ - lambda2 A-) V^ is this times v, but for the gain of each channel in the norm of Stage I. It is of one
        query, since N x N maps are what the layer avoids.

        Args:
            query: Number of its token, 0 ... P+N-1.
        """
        return (self.stage2[:, :, query, None] @ (self.stage1 / self.stage1_norm)).squeeze(2)


@dataclass(frozen=True)
class Streams:
    """How far apart the two streams of a layer are by its weights alone, whatever the input.

    Attributes:
        positive: Root mean square of e+, |e+| / sqrt(n C), which starts as `embed_std`; None if there is no e+.
        negative: The same of e-.
        cosine: Of e+ and e-, as vectors of n C numbers; None unless there are both.
        lambda1: Share of the negative stream that Stage I subtracts; None if it is plain.
        lambda2: The same of Stage II.
    """

    positive: float | None
    negative: float | None
    cosine: float | None
    lambda1: float | None
    lambda2: float | None


def contrast_layers(model: nn.Module) -> dict[str, VisualContrastAttention]:
    """Find the layers with contrast tokens by their names in a model, first to last.

    Raises:
        ValueError: It has none.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, VisualContrastAttention)}
    if not found:
        names = {type(layer).__name__ for layer in model.modules() if isinstance(layer, Attention)}
        kind = " and ".join(sorted(names)) or "of another kind"
        raise ValueError(
            f"{type(model).__name__} has no contrast tokens: its attention is {kind}; choose a model whose attention "
            "is vca or agent."
        )
    return found


@contextlib.contextmanager
def keep_inputs(layers: Mapping[K, VisualContrastAttention]) -> Iterator[dict[K, Tensor]]:
    """Keep what each layer was last called with, while the block runs.

    A model that `torch.compile` has compiled does not see hooks that come later: use it before it is compiled.

    Args:
        layers: By names, such as `contrast_layers` gives, or by anything else.

    Yields:
        Name -> (B, P+N, C), without gradient; filled as the layers are called.
    """
    inputs: dict[K, Tensor] = {}

    def hook_of(name: K) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
        def keep(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs[name] = (args[0] if args else kwargs["x"]).detach()

        return keep

    handles = [layer.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def maps_of(layer: VisualContrastAttention, x: Tensor, grid: tuple[int, int] | None = None) -> Maps:
    """Compute the maps of a layer for its input, in float32 at least.

    Args:
        layer: Of any options.
        x: (B, P+N, C).
        grid: (H, W) of its patch tokens; not given means that for which the layer was built.
    """
    grid = layer.grid_size if grid is None else grid
    contrast_grid = layer.contrast_grid_of(grid)
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        x = x.to(layer.qkv.weight.dtype)
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (z.to(dtype) for z in layer.heads(x))  # 3 x (B, h, P+N, d)
        n, scale = math.prod(contrast_grid), layer.head_dim**-0.5
        tokens = layer.contrast_tokens(q, grid)  # (B, h, 2n, d), or (B, h, n, d) where both stages are plain
        to_keys = (scale * tokens @ k.mT).softmax(dim=-1)  # (B, h, 2n or n, P+N)
        to_tokens = scale * q @ tokens.mT  # (B, h, P+N, 2n or n)
        if layer.stage2 and layer.softmax == "joint":
            positive, negative = to_tokens.softmax(dim=-1).split(n, dim=-1)
        else:
            parts = [part.softmax(dim=-1) for part in to_tokens.split(n, dim=-1)]
            positive, negative = parts[0], parts[-1]
        lambdas = [stage.scale(dtype) if stage else None for stage in (layer.stage1, layer.stage2)]
        stage1 = to_keys[:, :, :n], to_keys[:, :, n:] if layer.stage1 else None
        gathered = _difference(*stage1, lambdas[0]) @ v  # (B, h, n, d)
        return Maps(
            *stage1,
            positive,
            negative if layer.stage2 else None,
            *lambdas,
            _norm_of(layer.stage1, gathered),
            contrast_grid,
            grid,
        )


@torch.no_grad()
def streams_of(layer: VisualContrastAttention) -> Streams:
    """Sum up the embeddings and lambdas of a layer as numbers."""
    embeddings = [layer.positive_embed, layer.negative_embed]
    sizes = [None if e is None else float(e.double().square().mean().sqrt()) for e in embeddings]
    cosine = None
    if None not in sizes:
        cosine = float(torch.cosine_similarity(*(e.double().flatten() for e in embeddings), dim=0))
    return Streams(*sizes, cosine, *(float(s.scale()) if s else None for s in (layer.stage1, layer.stage2)))


def _difference(positive: Tensor, negative: Tensor | None, scale: Tensor | None) -> Tensor:
    return positive if negative is None else positive - scale * negative


def _norm_of(stage: Differential | None, contrast: Tensor) -> Tensor:
    """Compute the norm of each row: (B, h, n, d) -> (B, h, n, 1)."""
    if stage is None:
        return torch.ones_like(contrast[..., :1])
    return (contrast.square().mean(dim=-1, keepdim=True) + stage.norm.eps).sqrt()
