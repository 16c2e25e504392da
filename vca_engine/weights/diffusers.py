"""diffusers' DiT and ours: weights either way between its keys and the published ones, and its configs.

diffusers divides the exponents of the time frequencies by 127, the published DiT and this program by 128, and no config
of diffusers changes that. Until its `time_proj.downscale_freq_shift` is set to 0, a converted network so gives other
outputs than it was trained to. With random weights (DiT-S/4 and B/4, adaLN and last layer normal, std 0.02; two seeds
each) they differ by less than 0.01% (t = 1), 0.3 to 0.8% (t = 100), 1.6 to 4.7% (t = 500) and 3 to 7% (t = 999) of
their norm, and the outputs at t = 999 from those at t = 500 by 3.5 to 9%: so it is as wrong as another time.
With it set they are equal. Not measured with trained weights.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_vca.diffusion import BETAS, Diffusion, linear_betas
from dit_vca.model import DiT
from vca import SelfAttention, Transformer

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
TABLE = "y_embedder.embedding_table.weight"
NULL_ROW = 1000  # what `DiTPipeline` takes for the null class, whatever the model


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of a diffusers `DiTTransformer2DModel` the keys of `DiT(attention="mhsa")`.

    Queries, keys and values become one matrix, and the embedders, which diffusers repeats in each block, one of each.
    The position table is left out: every model computes its own. Weights that were trained as DiT and converted, like
    those on the hub, are restored; with any that were trained in diffusers, the outputs differ, since its time
    frequencies do. Of a table that `with_null_row` has filled up, the copies are left out again.

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
    table = converted.get(TABLE)
    if table is not None and len(table) == NULL_ROW + 1:
        others = (table != table[-1]).any(1).nonzero()
        converted[TABLE] = table[: int(others.max()) + 2] if len(others) else table
    return converted


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of `DiT(attention="mhsa")` the keys of a `DiTTransformer2DModel`: undo `from_diffusers`.

    The embedders are repeated in each block; repeated tensors, and queries, keys and values, share their memory. The
    position table is left out, since diffusers computes it and does not save it.

    Args:
        tensors: Published key -> tensor.

    Returns:
        diffusers' key -> tensor.

    Raises:
        ValueError: A tensor that diffusers' DiT has not, as those of vca attention.

    Source: `DiTTransformer2DModel` and `AdaLayerNormZero` of diffusers 0.42.
    """
    outside, in_each_block, repeated = (
        {v: k for k, v in names.items()} for names in (OUTSIDE, IN_EACH_BLOCK, REPEATED)
    )
    blocks = dict.fromkeys(match[1] for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key)))
    if not blocks:
        raise ValueError("these are no weights of a DiT: there are no blocks.")
    converted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, parameter = key.rpartition(".")
        block, inner = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", layer).groups()
        if key == "pos_embed":
            continue
        if block is None and inner in outside:
            converted[f"{outside[inner]}.{parameter}"] = tensor
        elif block is None and inner in repeated:
            converted |= {f"transformer_blocks.{i}.{repeated[inner]}.{parameter}": tensor for i in blocks}
        elif block and inner in in_each_block:
            converted[f"transformer_blocks.{block}.{in_each_block[inner]}.{parameter}"] = tensor
        elif block and inner == "attn.qkv":
            parts = zip(QKV, tensor.chunk(3), strict=True)
            converted |= {f"transformer_blocks.{block}.{name}.{parameter}": part for name, part in parts}
        else:
            raise ValueError(
                f"{key} is nothing that a DiTTransformer2DModel has; only a DiT with mhsa can be converted."
            )
    return converted


def with_null_row(table: Tensor) -> Tensor:
    """Fill up a label table (C + 1, D) of C <= 1000 classes to what `DiTPipeline` needs, (1001, D).

    Its guidance takes row 1000 for the null class, so rows C ... 1000 are all copies of the null row.
    """
    return torch.cat([table, table[-1:].expand(NULL_ROW + 1 - len(table), -1)])


def diffusers_config(model: Transformer) -> dict[str, Any]:
    """Find the keywords of the `DiTTransformer2DModel` that takes `to_diffusers(model.state_dict())`.

    Raises:
        ValueError: Something of the model that diffusers' DiT cannot be: says what.
    """
    if not isinstance(model, DiT):
        raise ValueError(f"a {type(model).__name__} cannot be a DiTTransformer2DModel, only a DiT can.")
    block, (height, width) = model.blocks[0], model.input_size
    attention, mlp, dim = block.attn, block.mlp.fc1, model.pos_embed.shape[2]
    if not isinstance(attention, SelfAttention):
        raise ValueError(f"diffusers' DiT has no {type(attention).__name__}, only attention mhsa.")
    if attention.dwc is not None or not isinstance(attention.q_norm, nn.Identity):
        raise ValueError("diffusers' DiT has mhsa without its options dwc and qk_norm, one of which this model has.")
    if mlp.out_features != 4 * dim:
        raise ValueError(
            f"diffusers' DiT has an MLP of 4 times its width; that of this model is {mlp.out_features}/{dim}."
        )
    if height != width:
        raise ValueError(f"diffusers' DiT takes square inputs; this model takes {height}x{width}.")
    num_rows = model.y_embedder.embedding_table.num_embeddings
    return {
        "num_attention_heads": attention.num_heads,
        "attention_head_dim": dim // attention.num_heads,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "num_layers": len(model.blocks),
        "attention_bias": attention.qkv.bias is not None,
        "sample_size": height,
        "patch_size": model.patch_size,
        "num_embeds_ada_norm": num_rows - 1,  # diffusers adds the null row itself
        "norm_eps": block.norm2.eps,
    }


def scheduler_config(diffusion: Diffusion) -> dict[str, Any]:
    """Find the keywords of the `DDIMScheduler` of a process, exact where the number of steps divides that of training.

    Its default spacing starts below the last step, and it would clip latents.
    """
    betas, steps = diffusion.betas, diffusion.num_timesteps
    if torch.equal(betas, linear_betas(steps)):
        schedule = {"beta_schedule": "linear", "beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    else:
        schedule = {"trained_betas": betas.tolist()}
    return {"num_train_timesteps": steps, "timestep_spacing": "trailing", "clip_sample": False, **schedule}


def process_of_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give the process, a name with options, of a scheduler of diffusers with this config.

    Raises:
        ValueError: One that this program has not.
    """
    num, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    if config.get("trained_betas"):
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        betas = torch.linspace(*ends, num, dtype=torch.float64)
    else:
        betas = BETAS["cosine"](num) if kind == "squaredcos_cap_v2" else torch.zeros(num)
    name = next((n for n, make in BETAS.items() if torch.allclose(make(num), betas.double(), rtol=1e-3)), None)
    if name is None or config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(
            f"the scheduler has betas {kind!r} and predicts {config.get('prediction_type')!r}; known are the betas "
            f"{sorted(BETAS)} of this program, and the noise (epsilon)."
        )
    return {"name": "diffusion", "betas": name, "num_timesteps": num}
