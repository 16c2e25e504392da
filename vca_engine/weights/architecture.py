"""Finds out of a state dict with the published keys which network it belongs to."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vca.transformer import SIZES
from vca_engine.weights.diffusers import TABLE

PATCHES, OUTPUT = "x_embedder.proj.weight", "final_layer.linear"
MHSA_KEYS = {f"{layer}.{p}" for layer in ("qkv", "proj", "dwc") for p in ("weight", "bias")}
MHSA_KEYS |= {"q_norm.weight", "k_norm.weight"}


def keywords_of(
    tensors: Mapping[str, Tensor],
    *,
    input_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> dict[str, Any]:
    """Find the keywords of `vca.Transformer` with which weights of a network with `mhsa` attention load as they are.

    Args:
        tensors: Published key -> tensor, in the published shapes.
        input_size: Side of the input, or (height, width); needed where there is no `pos_embed`, (1, N, D), or where
            that is not of a square.
        num_heads: Heads leave no trace in the tensors; needed where width and depth are of none of the `SIZES`.
        num_classes: Classes without the null class; if not given, the last row of the label table is taken to be that
            of the null class, as in published weights.

    Returns:
        `input_size`, `patch_size`, `in_channels`, `out_channels`, `hidden_size`, `depth`, `num_heads`, `mlp_ratio`,
        `num_classes`, `class_dropout_prob` (0.1, the published one, or 0 where there is no null row) and `attention`.

    Raises:
        ValueError: No weights of a DiT or SiT, another attention, or something has to be given.
    """
    for key in (PATCHES, TABLE, "blocks.0.mlp.fc1.weight", f"{OUTPUT}.weight"):
        if key not in tensors:
            raise ValueError(f"it holds no weights of a DiT or SiT: there is no {key}.")
    attention = _attention(tensors)
    hidden_size, in_channels, patch_size, _ = tensors[PATCHES].shape
    depth = len({match[1] for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))})
    hidden_dim, rows = len(tensors["blocks.0.mlp.fc1.weight"]), len(tensors[TABLE])
    ratio = hidden_dim / hidden_size  # of which int(hidden_size * ratio) is hidden_dim, to rounding
    if num_classes is None:
        num_classes = rows - 1
    if num_classes < 1 or rows - num_classes not in (0, 1):
        raise ValueError(f"{TABLE} has {rows} rows, which do not belong to {num_classes} classes.")
    return {
        "input_size": _input_size(tensors, patch_size, input_size),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": len(tensors[f"{OUTPUT}.weight"]) // patch_size**2,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads or _num_heads(hidden_size, depth),
        "mlp_ratio": ratio if int(hidden_size * ratio) == hidden_dim else math.nextafter(ratio, math.inf),
        "num_classes": num_classes,
        "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
        "attention": attention,
    }


def process_of(tensors: Mapping[str, Tensor]) -> str:
    """Tell trained weights of a SiT, `flow`, from those of a DiT, `diffusion`, whose keys and shapes are the same.

    A SiT gives C channels; or 2C, of which it drops the second half, and then the rows of that half have never had a
    gradient and are exactly zero, as they were initialised. Those of a DiT, which give its variance, are trained.

    Args:
        tensors: Published key -> tensor. `final_layer.linear` has p*p*C_out rows in the order row, column, channel.

    Raises:
        ValueError: No weights of a DiT or SiT, not C or 2C output channels, or a last layer that is all zero.
    """
    for key in (PATCHES, f"{OUTPUT}.weight", f"{OUTPUT}.bias"):
        if key not in tensors:
            raise ValueError(f"it holds no weights of a DiT or SiT: there is no {key}.")
    _, channels, patch_size, _ = tensors[PATCHES].shape
    weight, bias = (tensors[f"{OUTPUT}.{p}"].unflatten(0, (patch_size**2, -1)) for p in ("weight", "bias"))
    if weight.shape[1] == channels:
        return "flow"
    if weight.shape[1] != 2 * channels:
        raise ValueError(
            f"the weights take {channels} channels and give {weight.shape[1]}; a SiT gives {channels} or "
            f"{2 * channels}, a DiT {2 * channels}."
        )
    if not weight.any() and not bias.any():
        raise ValueError(f"{OUTPUT} is all zero, so the weights are untrained: say whether they are of a DiT or SiT.")
    return "diffusion" if weight[:, channels:].any() or bias[:, channels:].any() else "flow"


def _input_size(
    tensors: Mapping[str, Tensor], patch_size: int, given: int | tuple[int, int] | None
) -> int | tuple[int, int]:
    if "pos_embed" not in tensors:
        if given is None:
            raise ValueError("there is no pos_embed, so the size of the input is not known; give input_size.")
        return given
    num_tokens = tensors["pos_embed"].shape[1]
    if given is None:
        side = math.isqrt(num_tokens)
        if side**2 != num_tokens:
            raise ValueError(f"pos_embed has {num_tokens} tokens, which are not a square; give input_size.")
        return side * patch_size
    height, width = (given, given) if isinstance(given, int) else given
    if (height // patch_size) * (width // patch_size) != num_tokens:
        raise ValueError(f"input_size is {given}, but pos_embed has {num_tokens} tokens, of {patch_size}x{patch_size}.")
    return given


def _num_heads(hidden_size: int, depth: int) -> int:
    for size in SIZES.values():
        if (size["hidden_size"], size["depth"]) == (hidden_size, depth):
            return size["num_heads"]
    raise ValueError(
        f"width {hidden_size} and {depth} blocks are none of the sizes {', '.join(SIZES)}, and the weights do not show "
        f"the number of heads; give num_heads."
    )


def _attention(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Find the options of `mhsa`, each of which adds or takes away a tensor."""
    prefix = "blocks.0.attn."
    keys = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
    if "qkv.weight" not in keys:
        raise ValueError(f"it holds no weights of a DiT or SiT: there is no {prefix}qkv.weight.")
    if other := sorted(keys - MHSA_KEYS):
        raise ValueError(
            f"{prefix}{other[0]} is of another attention than mhsa; weights of vca attention carry options that cannot "
            f"be seen, so give the run's folder."
        )
    seen = {"qkv_bias": "qkv.bias" in keys, "qk_norm": "q_norm.weight" in keys, "dwc": "dwc.weight" in keys}
    usual = {"qkv_bias": True, "qk_norm": False, "dwc": False}
    return {"name": "mhsa", **{option: value for option, value in seen.items() if value != usual[option]}}
