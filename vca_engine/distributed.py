"""Tensors that FSDP2 has cut into a shard a process: made whole to be saved or sampled with, and cut again."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process, which all have to call this; another tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors made whole one by one, sharded ones on the CPU; nothing where not `keep`. All processes call this."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, on the device of `parameter` and sharded as that is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def agree(accelerator: Accelerator, value: Any, what: str) -> None:
    """Raise ValueError on all processes unless each has the same `value`, say because `what` is not on a shared disk."""
    if len({str(v) for v in gather_object([value])}) > 1:
        raise ValueError(
            f"the processes find different things in {what}; it has to be on a disk that all machines share."
        )
