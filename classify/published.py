"""Published weights of a recogniser in the form of a checkpoint of ours: a record, and tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vca_engine.weights.files import read_weights
from vca_engine.weights.published import names_of_classes
from vca_engine.weights.recogniser import HEAD, RECOGNISER_MARKS

SIDES = (224, 384, 448, 512)  # of published networks, in pixels
BUFFERS = ("relative_position_index", "attn_mask")  # of Swin, in files of old: they follow from its sizes


def read_published_recogniser(path: Path, process: None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read published weights of a recogniser with its own attention, and find by their shapes which one it is.

    Args:
        path: A file with the state dict of a network in `MODELS`, under timm's or the published keys.
        process: Not used: what has these keys is a recogniser.

    Returns:
        The record, as `checkpoint.read_record` gives it, and the tensors, exactly those of the network.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    tensors = read_weights(path, RECOGNISER_MARKS).tensors
    tensors = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] not in BUFFERS}
    head = next((len(tensor) for key, tensor in tensors.items() if HEAD.fullmatch(key)), None)
    channels = next(tensors[key].shape[1] for key in RECOGNISER_MARKS if key in tensors)
    name, image_size = _network_of(tensors, {"num_classes": head or 1, "in_channels": channels}, path)
    model = {"name": name, "attention": {"name": "own"}}
    record = {
        "config": {
            **{"run_dir": "", "process": {"name": "classify"}, "codec": {"name": "pixels"}, "model": model},
            "data": {"name": "folder", "image_size": image_size},
        },
        "shape": {"image_size": image_size, "channels": channels, "class_names": names_of_classes(head)},
        "origin": {"path": str(path), "kind": "published file", "part": "ema", "step": None, "id": None},
    }
    return record, tensors


def _network_of(tensors: Mapping[str, Tensor], sizes: Mapping[str, int], path: Path) -> tuple[str, int]:
    """Find the name and the image size of the network in `MODELS` that has exactly these tensors."""
    from classify.models import MODELS, create  # slow to import: see docs/architecture.md, start-up

    shapes, nearest = {key: tensor.shape for key, tensor in tensors.items()}, {}
    for name, recogniser in MODELS.items():
        for side in (side for side in SIDES if recogniser.fits(side, own=True)):
            with torch.device("meta"):
                network = create(name, "own", image_size=side, **sizes)
            own = {key: tensor.shape for key, tensor in network.state_dict().items()}
            if own == shapes:
                return name, side
            different = len({*own.items()} ^ {*shapes.items()})
            nearest[name] = min(nearest.get(name, different), different)
            if own.keys() != shapes.keys():
                break  # nor will it be one of another size
    raise ValueError(
        f"{str(path)!r} holds a network that is none of {sorted(MODELS)} with its own attention, of {SIDES} pixels; "
        f"{min(nearest, key=nearest.get)} is nearest. A network that train.py has trained is used from its run."
    )
