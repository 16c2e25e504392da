"""Several processes: joined and left, tensors cut into shards by FSDP2 and put together, a check that all agree.

torch.distributed.tensor is imported where it is used: see docs/architecture.md, start-up.
"""

import atexit
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed


def join_processes(on_cpu: bool, timeout: timedelta = timedelta(hours=2)) -> PartialState:
    """Join the processes that a launcher started, which wait so long for each other; they part as the program ends."""
    state = PartialState(cpu=on_cpu, timeout=timeout)
    part_at_exit()
    return state


def part_at_exit() -> None:
    """Leave the group of processes when Python ends; with its threads alive, Python may abort after all is done."""
    atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor, of any shape, is cut into a shard a process."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Put a sharded tensor (N, ...) together on every process; pass another on. All processes call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Put sharded tensors together one by one, on the CPU; keep none where not `keep`. All processes call this."""
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if keep:
            found[name] = full.cpu() if is_sharded(tensor) else full
    return found


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Bring a tensor (N, ...), the same on all processes, to the device of `parameter`, sharded as that is."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def same_on_all_processes(accelerator: Accelerator, value: Any, what: str) -> None:
    """Raise ValueError on all processes unless each has the same `value`; `what` may not be on a shared disk."""
    if len({str(v) for v in gather_object([value])}) > 1:
        raise ValueError(
            f"the processes find different things in {what}; it has to be on a disk that all machines share."
        )


def on_main_process(state: PartialState, work: Callable[[], None]) -> None:
    """Do some work on the main process, while the others wait; a mistake that it finds ends all. All processes call it.

    Raises:
        ValueError or OSError: That of the work.
    """
    found: list[Exception | None] = [None]
    if state.is_main_process:
        try:
            work()
        except (ValueError, OSError) as error:
            found = [error]
    if state.num_processes > 1:
        broadcast_object_list(found)
    if found[0]:
        raise found[0]
