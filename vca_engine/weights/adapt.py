"""Weights of one network for another of the same width and depth: other classes, resolution, attention or output."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vca.attention import interpolate
from vca.transformer import Transformer
from vca_engine.images.label_files import composed
from vca_engine.weights.diffusers import TABLE
from vca_engine.weights.files import read_weights


@dataclass
class Adapted:
    """Weights that `adapt` has fitted to a model, and what it did to them.

    Attributes:
        state: For `model.load_state_dict`, complete, in its shapes: what the weights lack has the model's own values.
        loaded: Names that were taken as they are.
        changed: Name -> what of it was taken, or what was done to it.
        missing: Names in the model only; they keep their initial values.
        unused: Names in the weights only.
    """

    state: dict[str, Tensor]
    loaded: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def take(self, key: str, tensor: Tensor, what: str) -> None:
        """Take a tensor (N, ...) of the shape that the model has; `what` says what was done to it, if anything was."""
        self.state[key] = tensor
        if what:
            self.changed[key] = what
        else:
            self.loaded.append(key)

    def __str__(self) -> str:
        """Write a line of counts, and a line each for what was changed, is missing and is unused."""
        taken = len(self.loaded) + len(self.changed)
        lines = [f"{taken} of {taken + len(self.missing)} tensors loaded"]
        for title, names in (
            ("changed", (f"{name} ({what})" for name, what in self.changed.items())),
            ("not in the file, so with their initial values", self.missing),
            ("not in the model, so unused", self.unused),
        ):
            if compact := _compact(names):
                lines.append(f"  {title}: {', '.join(compact)}")
        return "\n".join(lines)


def adapt(
    tensors: Mapping[str, Tensor],
    model: Transformer,
    *,
    num_classes: int | None = None,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Adapted:
    """Fit weights of a DiT or SiT to a model whose classes, resolution, attention or output may be others.

    The position table is always the model's own. Class rows are kept by index, the null row as the null row. Contrast
    embeddings are interpolated to the model's contrast grid; one of as many tokens is taken to be of that grid, any
    other to be square. An output of 2C channels gives its first C to one of C, and the reverse. All else that both
    have is taken as it is, in the dtype of the model.

    Args:
        tensors: Published key -> tensor.
        model: The model to fit them to; not changed.
        num_classes: Classes of the weights, without the null class. If neither this nor `names` is given, the table is
            taken to have a null row, as published ones do, or, if it has the model's size, the rows of the model.
        names: Class names of the weights and of the model. If they share any, rows go by name and not by index.

    Raises:
        ValueError: No weights of a DiT or SiT, of another width, depth, patch or input, or not finite.
    """
    own = model.state_dict()
    _check_depth(tensors, model)
    result = Adapted(state=own)
    for key in [key for key in own if key != "pos_embed"]:
        if key not in tensors:
            result.missing.append(key)
            continue
        initial, tensor, what = own[key], tensors[key].to(own[key]), ""
        if not tensor.isfinite().all():
            raise ValueError(f"{key} holds values that are not finite; the weights are of a run that has diverged.")
        if key == TABLE and tensor.shape[1:] == initial.shape[1:]:
            tensor, what = _class_rows(tensor, initial, model, num_classes, names)
        elif tensor.shape == initial.shape:
            pass
        elif key.startswith("final_layer.linear.") and tensor.shape[1:] == initial.shape[1:]:
            tensor, what = fit_channels(tensor, initial, model.patch_size**2)
        elif key.endswith((".positive_embed", ".negative_embed")) and tensor.shape[::2] == initial.shape[::2]:
            grid = model.get_submodule(key.rpartition(".")[0]).contrast_grid
            tensor, what = interpolate_embeddings(key, tensor, grid)
        if tensor.shape != initial.shape:
            raise ValueError(_misfit(key, tuple(tensor.shape), tuple(initial.shape)))
        result.take(key, tensor, what)
    result.unused = [key for key in tensors if key not in own]
    return result


def initialise(network: Transformer, path: str, class_names: list[str] | None = None) -> Adapted:
    """Start a network from the weights at `path`, as far as they fit; see `read_weights` and `adapt`.

    Args:
        network: The network, on any device; it gets the weights.
        path: A run or checkpoint of ours, a published file, a folder of diffusers, or a name on the hub.
        class_names: Of the network's labels; where the weights know theirs, class rows go by name.

    Returns:
        What was loaded, changed, missing and unused; `str()` of it is a summary.

    Raises:
        FileNotFoundError: There is no such path, or a folder lacks one of its files.
        ValueError: It holds no weights, or weights of a network of another size.
    """
    found = read_weights(path)
    num_classes = len(found.class_names) if found.class_names else None
    names = (found.class_names, class_names) if found.class_names and class_names else None
    try:
        adapted = adapt(found.tensors, network, num_classes=num_classes, names=names)
    except ValueError as error:
        raise ValueError(f"the weights at {str(path)!r} do not fit: {error}") from None
    network.load_state_dict(adapted.state)
    return adapted


def _check_depth(tensors: Mapping[str, Tensor], model: Transformer) -> None:
    """Raise ValueError unless there are weights for each block of the model, and no more."""
    found = {match[1] for key in tensors if (match := re.fullmatch(r"blocks\.(\d+)\.adaLN_modulation\.1\.weight", key))}
    if not found:
        raise ValueError("it holds no weights of a DiT or SiT: there is no blocks.0.adaLN_modulation.1.weight.")
    if len(found) != len(model.blocks):
        raise ValueError(
            f"blocks.*.adaLN_modulation.1.weight is there for {len(found)} blocks, and the model has "
            f"{len(model.blocks)}; weights of another depth cannot be converted, so choose the size of the file."
        )


def rows_by_name(old_names: Sequence[str], new_names: Sequence[str]) -> list[tuple[int, int]]:
    """List the number of each class in both lists, (old, new), for the classes that both have; in the new order."""
    number = {composed(name): old for old, name in reversed([*enumerate(old_names)])}
    return [(number[composed(name)], new) for new, name in enumerate(new_names) if composed(name) in number]


def _class_rows(
    tensor: Tensor,
    initial: Tensor,
    model: Transformer,
    num_classes: int | None,
    names: tuple[Sequence[str], Sequence[str]] | None,
) -> tuple[Tensor, str]:
    """Fit the table (old rows, D) to `initial` (new rows, D), and say what of it was taken."""
    old_names, new_names = names or ((), ())
    assert len(new_names) in (0, model.num_classes), "one name for each class of the model"
    if num_classes is None and names:
        num_classes = len(old_names)
    elif num_classes is None:
        num_classes = model.num_classes if len(tensor) == len(initial) else len(tensor) - 1
    if len(tensor) - num_classes not in (0, 1):
        raise ValueError(f"{TABLE} has {len(tensor)} rows, which do not belong to {num_classes} classes.")
    rows = rows_by_name(old_names, new_names) or [(i, i) for i in range(min(num_classes, model.num_classes))]
    kept = len(rows)
    if has_null := len(tensor) > num_classes and model.null_class is not None:
        rows.append((num_classes, model.null_class))
    old, new = torch.tensor(rows, dtype=torch.long).reshape(-1, 2).T
    if torch.equal(old, new) and len(rows) == len(tensor) == len(initial):
        return tensor, ""
    result = initial.clone()
    result[new] = tensor[old]
    what = f"{kept} of {num_classes} class rows"
    if has_null:
        what += " and the null row"
    if left := len(initial) - len(rows):
        what += f"; {left} keep their initial values"
    return result, what


def fit_channels(tensor: Tensor, initial: Tensor, num_pixels: int) -> tuple[Tensor, str]:
    """Give the last layer twice the channels, or half: the first half of twice is all of half.

    Args:
        tensor: (num_pixels * C_old, ...), in the order pixel, channel.
        initial: (num_pixels * C_new, ...), of which the channels are that `tensor` lacks.
        num_pixels: Of a patch.

    Returns:
        (num_pixels * C_new, ...), and what was done; `tensor` itself and "" if C_new is neither twice C_old nor half.
    """
    if len(tensor) not in (2 * len(initial), len(initial) / 2):
        return tensor, ""
    old = tensor.unflatten(0, (num_pixels, -1))  # (p*p, C_old, ...)
    new = initial.clone().unflatten(0, (num_pixels, -1))  # (p*p, C_new, ...)
    kept = min(old.shape[1], new.shape[1])
    new[:, :kept] = old[:, :kept]
    what = f"{kept} of {old.shape[1]} output channels"
    if new.shape[1] > kept:
        what += f"; {kept} keep their initial values"
    return new.flatten(0, 1), what


def interpolate_embeddings(key: str, embed: Tensor, grid: tuple[int, int]) -> tuple[Tensor, str]:
    """Interpolate (1, n, C) on a square grid to (1, a b, C), and say so."""
    side = math.isqrt(embed.shape[1])
    if side**2 != embed.shape[1]:
        raise ValueError(f"{key} has {embed.shape[1]} contrast tokens, not a square, so its grid is not known.")
    return interpolate(embed, (side, side), grid), f"interpolated from {side}x{side} to {grid[0]}x{grid[1]}"


def _misfit(key: str, old: tuple[int, ...], new: tuple[int, ...]) -> str:
    what = "another width"
    if key.startswith("final_layer.linear.") or (key == "x_embedder.proj.weight" and old[:1] == new[:1]):
        what = "another patch size or number of channels"
    return f"{key} is {old} in the file and {new} in the model; weights of {what} cannot be converted."


def _compact(names: Iterable[str]) -> list[str]:
    """Give each name once for all blocks: blocks.0.x, blocks.1.x -> blocks.*.x."""
    return list(dict.fromkeys(re.sub(r"\b(blocks|block\d|layers|stage\d)\.\d+\.", r"\1.*.", name) for name in names))
