"""Tensors that FSDP2 has cut into a shard a process: made whole to be saved or sampled with, and cut again.

torch.distributed.tensor is imported where it is used: see docs/architecture.md, start-up.
"""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor, of any shape, is cut into a shard a process."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Give the whole of a sharded tensor, of any shape, and another itself. All processes call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Make tensors whole one by one, sharded ones on the CPU; nothing where not `keep`. All processes call this."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu() if is_sharded(tensor) else full
    return found


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard a whole tensor, the same on all processes, like `parameter`, which has its shape, and on its device."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def agree(accelerator: Accelerator, value: Any, what: str) -> None:
    """Raise ValueError on all processes unless each has the same `value`, say because `what` is not on a shared disk."""
    if len({str(v) for v in gather_object([value])}) > 1:
        raise ValueError(
            f"the processes find different things in {what}; it has to be on a disk that all machines share."
        )
