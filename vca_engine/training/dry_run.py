"""What a run will take: multiply-adds, memory, disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vca_engine.distributed import is_sharded


def multiply_adds(network: nn.Module) -> int:
    """Multiply-adds of the matrix products of one forward pass of one sample: what papers call the FLOPs of a DiT.

    Args:
        network: On the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import: see docs/architecture.md, start-up

    x, t, y = (
        torch.zeros(1, network.in_channels, *network.input_size, device="meta"),
        torch.zeros(1, device="meta"),
        torch.zeros(1, dtype=torch.long, device="meta"),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(x, t, y)
    return counter.get_total_flops() // 2


@dataclass
class Saved:
    """Bytes that a forward pass keeps for the backward pass."""

    num_bytes: int = 0


@contextmanager
def count_saved(network: nn.Module) -> Iterator[Saved]:
    """Counts the bytes that autograd keeps in the block, one forward pass, each piece of memory once, parameters not.

    What gradient checkpointing keeps is not seen; nor what a compiled block does.
    """
    found = Saved()
    seen = {p.untyped_storage().data_ptr() for p in network.parameters() if not is_sharded(p)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # alive as long as the graph, so no other has its address
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found.num_bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def gib(num_bytes: float) -> str:
    """`12.3 GiB`, or MiB below 1 GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def size_of(*folders: Path) -> int:
    """Bytes of the files in folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())
