"""Weights of diffusers' DiT under the keys of the published DiT, which are those of this program."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
IN_EACH_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
REPEATED = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a diffusers `DiTTransformer2DModel` with the keys of `DiT(attention="mhsa")`.

    Queries, keys and values become one matrix, and the embedders, which diffusers repeats in each block, one of each.
    The position table is left out: every model computes its own. diffusers divides the exponents of the time
    frequencies by 127, the published DiT and this program by 128. Weights that were trained as DiT and converted, like
    those on the hub, are thus restored; with any that were trained in diffusers, the outputs differ a little.

    Args:
        tensors: diffusers' key -> tensor.

    Returns:
        Published key -> tensor, in the order of the blocks.

    Raises:
        ValueError: A tensor of another kind of model, part of an attention is missing, or the embedders of the blocks
            differ, so that no single one can replace them.

    Source: `DiTTransformer2DModel` and `AdaLayerNormZero` of diffusers 0.42.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, parameter = key.rpartition(".")
        block, inner = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?(.*)", layer).groups()
        if key == "pos_embed.pos_embed":
            continue
        if block is None and inner in OUTSIDE:
            converted[f"{OUTSIDE[inner]}.{parameter}"] = tensor
        elif block and inner in IN_EACH_BLOCK:
            converted[f"blocks.{block}.{IN_EACH_BLOCK[inner]}.{parameter}"] = tensor
        elif block and inner in REPEATED:
            first = converted.setdefault(f"{REPEATED[inner]}.{parameter}", tensor)
            if not torch.equal(first, tensor):
                raise ValueError(
                    f"{key} differs from that of another block; a DiT has one embedder for all blocks, so these "
                    f"weights, which were trained apart, cannot be converted."
                )
        elif block and inner in QKV:
            parts = [f"transformer_blocks.{block}.{name}.{parameter}" for name in QKV]
            if absent := [part for part in parts if part not in tensors]:
                raise ValueError(f"{key} is there, but {' and '.join(absent)} is not; the weights are incomplete.")
            if inner == QKV[0]:
                converted[f"blocks.{block}.attn.qkv.{parameter}"] = torch.cat([tensors[part] for part in parts])
        else:
            raise ValueError(f"{key} is nothing that a DiT has; only a DiTTransformer2DModel can be converted.")
    return converted
