"""Weights of one recogniser for another of the same width and depth: another image size, attention or other classes."""

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca_engine.weights.adapt import Adapted, interpolate_embeddings, rows_by_name
from vca_engine.weights.files import read_weights

# A key that each has: DeiT and Swin, PVT, CSwin.
RECOGNISER_MARKS = ("patch_embed.proj.weight", "patch_embed1.proj.weight", "stage1_conv_embed.0.weight")
HEAD = re.compile(r"head\.(fc\.)?(weight|bias)")
POSITIONS = re.compile(r"pos_embed\d?|.*\.relative_position_bias_table")  # maps of positions, as rows
OF_A_BLOCK = ".mlp.fc1.weight"  # of every block of all of them


def initialise_recogniser(network: nn.Module, path: str, class_names: Sequence[str]) -> Adapted:
    """Start a recogniser from the weights at `path`, as far as they fit.

    Rows of the head go by the names of the classes, where the weights know theirs; else they are taken if there are as
    many. Tables of positions and contrast embeddings are interpolated to another image size. What the weights lack,
    as of another attention, keeps its initial values.

    Args:
        network: As `classify.create` makes it; it gets the weights.
        path: A run or checkpoint of a recogniser, or a file with the state dict of a published one.
        class_names: Of the network's classes.

    Returns:
        What was loaded, changed, missing and unused; `str()` of it is a summary.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: It holds no weights, or those of another network.
    """
    found = read_weights(path, RECOGNISER_MARKS)
    own = network.state_dict()
    result = Adapted(state=own)
    try:
        _check_blocks(found.tensors, own)
        for key, initial in own.items():
            if key not in found.tensors:
                result.missing.append(key)
                continue
            tensor, what = found.tensors[key].to(initial), ""
            if HEAD.fullmatch(key) and tensor.shape[1:] == initial.shape[1:]:
                tensor, what = _head_rows(tensor, initial, found.class_names, class_names)
            elif tensor.shape == initial.shape or tensor.shape[-1] != initial.shape[-1]:
                pass
            elif POSITIONS.fullmatch(key):
                tensor, what = _interpolate_positions(key, tensor, initial.shape[-2])
            elif key.endswith((".positive_embed", ".negative_embed")):
                grid = network.get_submodule(key.rpartition(".")[0]).contrast_grid
                tensor, what = interpolate_embeddings(key, tensor, grid)
            if tensor.shape != initial.shape:
                raise ValueError(
                    f"{key} is {tuple(tensor.shape)} in the file and {tuple(initial.shape)} in the model; only another "
                    "image size or number of classes can be fitted."
                )
            result.take(key, tensor, what)
    except ValueError as error:
        raise ValueError(f"the weights at {str(path)!r} do not fit: {error}") from None
    result.unused = [key for key in found.tensors if key not in own]
    network.load_state_dict(result.state)
    return result


def _check_blocks(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise ValueError unless there are weights for each block of the model, and no more."""
    old, new = ({key for key in keys if key.endswith(OF_A_BLOCK)} for keys in (tensors, own))
    if not old & new:
        raise ValueError(f"it holds another network, without {min(new)}.")
    if old != new:
        key = min(old ^ new)
        where = "file" if key in old else "model"
        raise ValueError(f"{key} is in the {where} only; weights of another depth cannot be fitted.")


def _head_rows(
    tensor: Tensor, initial: Tensor, old_names: Sequence[str] | None, new_names: Sequence[str]
) -> tuple[Tensor, str]:
    """Fit rows of the head (old classes, ...) to `initial` (new classes, ...), and say what of them was taken."""
    if old_names is None and len(tensor) == len(initial):
        return tensor, ""
    rows = rows_by_name(old_names or (), new_names)
    if len(rows) == len(tensor) == len(initial) and all(old == new for old, new in rows):
        return tensor, ""
    result = initial.clone()
    for old, new in rows:
        result[new] = tensor[old]
    left = len(initial) - len(rows)
    what = f"{len(rows)} of {len(tensor)} classes"
    return result, f"{what}; {left} keep their initial values" if left else what


def _interpolate_positions(key: str, table: Tensor, num_tokens: int) -> tuple[Tensor, str]:
    """Interpolate (..., P+N, C) of a square map to (..., num_tokens, C), bicubic; P rows before it stay."""
    side = math.isqrt(num_tokens)
    prefix = num_tokens - side**2
    num_old = table.shape[-2] - prefix
    old = math.isqrt(num_old)
    if old**2 != num_old:
        raise ValueError(f"{key} has {num_old + prefix} rows, which are no square map, so it cannot be fitted.")
    image = table[..., prefix:, :].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, C, old, old)
    image = F.interpolate(image, (side, side), mode="bicubic", align_corners=False, antialias=True)
    rows = image.flatten(2).transpose(1, 2).reshape(*table.shape[:-2], side**2, -1)  # (..., N, C)
    return torch.cat([table[..., :prefix, :], rows], dim=-2), f"interpolated from {old}x{old} to {side}x{side}"
