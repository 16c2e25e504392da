"""Run train.py and sample.py several times inside the processes that torchrun started: imports cost more than the work.

    torchrun --nproc_per_node 2 tests/processes.py JOBS.json

JOBS is a list of [program, argv]: train, sample, classify, or sharded, which is train with FSDP2. accelerate shards on GPUs only,
unless told so here.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample
import train
from classify import __main__ as classify
from vca_engine.training import run


class Sharded(Accelerator):
    """With FSDP2 on a CPU, as configs/accelerate/fsdp8.yaml has it on GPUs."""

    def __init__(self, **options):
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)  # as accelerate does
        AcceleratorState._shared_state["fsdp_plugin"] = plugin


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    part, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *_: None
    for program, argv in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        run.Accelerator = Sharded if program == "sharded" else Accelerator
        {"sample": sample, "classify": classify}.get(program, train).main(argv)
    torch.distributed.destroy_process_group = part  # not earlier: a second group could not find its way


if __name__ == "__main__":
    main()
