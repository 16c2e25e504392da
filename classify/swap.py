"""Another attention in the blocks of a network that is there already.

    model = timm.create_model("vit_small_patch14_dinov2", pretrained=True, img_size=224)
    swap_attention(model, "vca", blocks=range(6))

The layer takes over `qkv` and `proj`, so what a network has learned stays where the two layers agree.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Attention
from torch import nn

from classify.block import Block
from classify.cswin import CSwin, StripeBlock
from classify.pvt import PVT, SpatialReductionAttention
from vca import ATTENTIONS, create

AttentionSpec = str | Mapping[str, Any]  # a name in ATTENTIONS, or {"name": ..., option: value}
ALLOWED = (
    "swap_attention takes a Swin of timm, a PVT or CSwin of classify, or a vision transformer of timm with its plain "
    "Attention, e.g. timm.create_model('vit_small_patch16_224')"
)


@dataclass(frozen=True)
class Place:
    """A block, and what a layer in it has to know of the network around it.

    Attributes:
        blocks: The blocks of its stage.
        index: Its own in them.
        grid_size: (H, W) of the patch tokens.
        num_prefix_tokens: Tokens in front of the patches: a class token, registers.
    """

    blocks: nn.Sequential | nn.ModuleList
    index: int
    grid_size: tuple[int, int]
    num_prefix_tokens: int


def swap_attention(
    model: nn.Module, attention: AttentionSpec = "vca", *, blocks: Iterable[int] | None = None
) -> nn.Module:
    """Put another attention into blocks of a network, in place.

    The new layers look at the whole map of their stage: no windows, shift, mask, bias or spatial reduction. They take
    over `qkv` and `proj`; `mhsa` in a vision transformer therefore changes no output. They are built for the size of
    images that the network has now, so its `set_input_size` raises ValueError from now on.

    Args:
        model: A vision transformer of timm whose blocks have timm's plain `Attention` (ViT, DeiT, DINOv2, with or
            without registers), a Swin of timm, or a `PVT` or `CSwin`.
        attention: Name in `vca.ATTENTIONS`, or `{"name": ..., option: value}`.
        blocks: Which blocks, counted from 0 over the whole network; all if not given.

    Returns:
        The same model.

    Raises:
        ValueError: It has no such blocks, or an unknown attention or option.
    """
    there = range(len(find_blocks(model)))
    chosen = there if blocks is None else list(blocks) if isinstance(blocks, Iterable) else [None]
    if not all(index in there for index in chosen):
        raise ValueError(f"blocks is {blocks!r}; give numbers from 0 to {there[-1]}, e.g. [0, 1] or range(2).")
    return put_attention(model, dict.fromkeys(chosen, attention))


def put_attention(model: nn.Module, specs: Mapping[int, AttentionSpec]) -> nn.Module:
    """Put an attention of its own into each of some blocks, as `swap_attention` does: number of a block -> spec."""
    places = find_blocks(model)
    layers = {index: _layer(model, places[index], index, spec) for index, spec in specs.items()}
    for index, layer in layers.items():  # all are made before one is put, so that an error changes nothing
        blocks, i = places[index].blocks, places[index].index
        block = blocks[i]
        if isinstance(block, SwinTransformerBlock | StripeBlock):  # windows and stripes are the work of these
            blocks[i] = Block(layer, block.norm1, block.norm2, block.mlp, block.drop_path1, block.drop_path2)
        else:
            block.attn = layer
    if layers and hasattr(model, "set_input_size"):  # of timm; it would change all but the layers
        model.set_input_size = partial(_refuse_input_size, type(model).__name__)
    return model


def find_blocks(model: nn.Module) -> list[Place]:
    """List the blocks of a network, first to last.

    Raises:
        ValueError: It is of no kind that `swap_attention` takes.
    """
    if isinstance(model, SwinTransformer):
        stages = [(stage.blocks, stage.output_resolution, 0) for stage in model.layers]
    elif isinstance(model, PVT | CSwin):
        prefix = [0, 0, 0, int(isinstance(model, PVT) and model.cls_token is not None)]
        stages = [(s, (side, side), p) for s, side, p in zip(model.stages, model.sides, prefix, strict=True)]
    elif all(hasattr(model, name) for name in ("blocks", "num_prefix_tokens", "patch_embed")):
        stages = [(model.blocks, model.patch_embed.grid_size, model.num_prefix_tokens)]
    else:
        raise ValueError(f"{type(model).__name__} has no blocks of a vision transformer; {ALLOWED}.")
    return [Place(blocks, i, grid, p) for blocks, grid, p in stages for i in range(len(blocks))]


def _refuse_input_size(name: str, *given: Any, **options: Any) -> None:
    raise ValueError(
        f"set_input_size was called, but {name} has layers of swap_attention, which are built for one size: make the "
        "network anew, timm.create_model(..., img_size=SIZE) and then swap_attention, or classify.create(..., "
        "image_size=SIZE)."
    )


def _layer(model: nn.Module, place: Place, index: int, spec: AttentionSpec) -> nn.Module:
    """Make the layer that takes the place of the attention of block `index`."""
    block = place.blocks[place.index]
    old = block if isinstance(block, StripeBlock) else getattr(block, "attn", None)
    if reason := _obstacle(model, old):
        raise ValueError(f"{type(model).__name__}: block {index} {reason}; {ALLOWED}.")
    qkv = _joined(old) if isinstance(old, SpatialReductionAttention) else old.qkv
    sizes = (qkv.in_features, old.num_heads, place.grid_size)
    given = {"layer_index": index, "num_prefix_tokens": place.num_prefix_tokens, "qkv_bias": qkv.bias is not None}
    with torch.device(qkv.weight.device):
        layer = create(ATTENTIONS, spec, "attention", *sizes, **given).to(qkv.weight.dtype)
    layer.qkv, layer.proj = qkv, old.proj
    return layer.train(old.training)


def _obstacle(model: nn.Module, old: nn.Module | None) -> str:
    """Say what keeps an attention from being replaced, since it would be lost; "" if nothing does."""
    if getattr(model, "dynamic_img_size", False):
        return "gets images of any size (dynamic_img_size), and a layer is built for one"
    if old is None:
        return "has no attention called attn"
    if "rope" in inspect.signature(old.forward).parameters:
        return f"has {type(old).__name__}, which turns queries and keys by their position (rope)"
    if type(old) not in (Attention, WindowAttention, SpatialReductionAttention, StripeBlock):
        return f"has {type(old).__module__}.{type(old).__name__}"
    lost = [name for name in ("attn_drop", "proj_drop") if hasattr(old, name) and getattr(old, name).p > 0]
    if isinstance(old, Attention):  # of timm, with what else it may have
        names = ("q_norm", "k_norm", "gate", "norm")
        lost += [name for name in names if not isinstance(getattr(old, name, None), nn.Identity | None)]
    return f"has {' and '.join(lost)} in its attention" if lost else ""


def _joined(attention: SpatialReductionAttention) -> nn.Linear:
    """Join `q` and `kv` to one `qkv`."""
    q, kv = attention.q, attention.kv
    with torch.device(q.weight.device):
        qkv = nn.Linear(q.in_features, 3 * q.in_features).to(q.weight.dtype)
    with torch.no_grad():
        qkv.weight.copy_(torch.cat([q.weight, kv.weight]))
        qkv.bias.copy_(torch.cat([q.bias, kv.bias]))
    return qkv
