"""Processes that share an evaluation; without a process group there is one, and each function gives what it has."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size(process_group: Any = None) -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def all_reduce(tensor: Tensor, process_group: Any = None) -> Tensor:
    """Add up a tensor (...) over all processes, on the CPU."""
    if rank_and_size(process_group)[1] == 1:
        return tensor
    total = tensor.to(_device_of_backend(process_group), copy=True).contiguous()
    dist.all_reduce(total, group=process_group)
    return total.cpu()


def all_gather(rows: Tensor, process_group: Any = None) -> list[Tensor]:
    """Collect the tensors (N, ...) of all processes, by rank, on the CPU; N may differ between them."""
    size = rank_and_size(process_group)[1]
    if size == 1:
        return [rows]
    device = _device_of_backend(process_group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(rows)], device=device), group=process_group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device)
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=process_group)
    return [part[: int(length)].cpu() for part, length in zip(gathered, lengths, strict=True)]


def from_first(value: Any, process_group: Any = None) -> Any:
    """Give all processes the picklable object that the first one has."""
    if rank_and_size(process_group)[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=process_group, group_src=0)
    return box[0]


def gather_objects(value: Any, process_group: Any = None) -> list[Any]:
    """Collect a picklable object from each process, by rank."""
    size = rank_and_size(process_group)[1]
    if size == 1:
        return [value]
    found = [None] * size
    dist.all_gather_object(found, value, group=process_group)
    return found


def fail_together(error: Exception | None, process_group: Any = None) -> None:
    """Raise the first error of any process in all of them; without it, those that have none would wait for ever."""
    for found in gather_objects(error, process_group):
        if found is not None:
            raise found


def _device_of_backend(process_group: Any) -> torch.device:
    nccl = dist.get_backend(process_group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
