"""Dry run: two steps of everything in a temporary folder, and what a whole run takes in time, memory and disk."""

import contextlib
import dataclasses
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vca_engine import assemble
from vca_engine.config.schema import Config
from vca_engine.distributed import is_sharded
from vca_engine.files import written_aside
from vca_engine.signals import STOPPED
from vca_engine.training.cost import duration, files_kept, gib, memory_of_weights, multiply_adds
from vca_engine.training.log import read_metrics
from vca_engine.training.meter import Meter
from vca_engine.training.outputs import DATA_FILE, Outputs, peak_memory
from vca_engine.training.run import Run
from vca_engine.weights import checkpoint
from vca_engine.weights.checkpoint import SNAPSHOTS

FEW_IMAGES = 64  # of each process, to measure


def dry_run(
    config: Config,
    accelerator: Accelerator,
    prepare: Callable[[Config, Accelerator], tuple[Run, Outputs]],
    train: Callable[[Run, Outputs], bool],
    add_gradients: Callable[..., None],
) -> None:
    """Print what a run takes, after two steps of everything in a temporary folder. All processes call this.

    Args:
        config: Settings of the run.
        accelerator: Its processes.
        prepare: Builds a run and its outputs.
        train: Takes all steps of a run; returns whether a signal stopped it.
        add_gradients: (run, *batch) -> None; adds the gradients of a batch.

    Raises:
        ValueError: Something does not work, or the disk is too small for the checkpoints.
    """
    folder = Path(config.run_dir).absolute()
    parent = next(p for p in (folder, *folder.parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if not os.access(parent, os.W_OK):
        raise ValueError(f"run_dir {config.run_dir!r} cannot be made: {str(parent)!r} is not yours to write.")
    with tempfile.TemporaryDirectory(dir=parent, prefix=".dry-run-") as temporary:
        run, outputs = prepare(_two_steps(config, f"{temporary}/run", accelerator.num_processes), accelerator)
        if accelerator.is_main_process:
            print("".join(f"{message}\n" for message in run.messages), end="", flush=True)
        _check_memory(run, add_gradients)
        if run.evaluated_data:
            run.evaluated_data.labels = run.evaluated_data.labels[: FEW_IMAGES * accelerator.num_processes]
        with contextlib.redirect_stdout(io.StringIO()) as said, outputs:
            if train(run, outputs):
                raise SystemExit(STOPPED)
            peak = peak_memory(run.device)
            with count_saved(run.network) as saved:
                add_gradients(run, *next(run.batches()))
        if not accelerator.is_main_process:
            return
        checkpoints, snapshots = checkpoint.steps(run.folder), checkpoint.steps(run.folder, SNAPSHOTS)
        if not checkpoints or (config.train.ema_stds and not snapshots):
            raise ValueError(f"a step in {str(parent)!r} failed: {said.getvalue().strip()}")
        size, snapshot_size = size_of(*checkpoints), size_of(*snapshots)
        rate = read_metrics(run.folder / "metrics.jsonl")[-1]["images_per_second"]
        picture = _keep_picture(run.folder / DATA_FILE, folder)
    num, num_snapshots = files_kept(config)
    disk = num * size + num_snapshots * snapshot_size
    rows = _table_rows(config, run, rate) | {
        "memory": f"{_memory(config, run, saved.num_bytes)} of each process, whose measured peak is {gib(peak)}",
        "disk": f"{num} checkpoints of {gib(size)}, {num_snapshots} snapshots of {gib(snapshot_size)}: {gib(disk)}; "
        f"{gib(free)} are free",
    }
    but = f" but {picture}, what the first step sees: look at it" if picture else ""
    print(f"{config.run_dir}: every step works; nothing was kept{but}.")
    print("\n".join(f"  {name:<9} {text}" for name, text in rows.items()))
    if disk > free:
        raise ValueError(
            f"the checkpoints do not fit on the disk of {str(parent)!r}: they take {gib(disk)}, {gib(free)} are free; "
            "give train.keep_checkpoints, or larger periods of train.checkpoint_every and train.snapshot_every."
        )


def _keep_picture(picture: Path, folder: Path) -> Path | None:
    """Copy the picture of the first batch, if it could be drawn, into the folder that a run would have."""
    if not picture.is_file():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / DATA_FILE) as temporary:
        shutil.copyfile(picture, temporary)
    return folder / DATA_FILE


def _check_memory(run: Run, add_gradients: Callable[..., None]) -> None:
    """Compare what the first step is going to take with what is free, before it takes it. All processes call this.

    What a forward pass keeps is measured with two images and with four, between which it grows by the same for each
    image; what compiled blocks and gradient checkpointing keep is not seen.

    Raises:
        ValueError: It takes more than is free.
    """
    if run.cfg.compile:
        return
    cfg, world = run.cfg, run.accelerator.num_processes
    num, images, kept = cfg.batch_size // cfg.accumulate // world, run.first_images(4), {}
    for few in sorted({min(num, 2), min(num, 4)}):
        with count_saved(run.network) as saved:
            add_gradients(run, *(z[:few] for z in images))
        run.optimizer.zero_grad()
        kept[few] = saved.num_bytes
    run.accelerator.step, run.meter = 0, Meter(run.accelerator)  # as if there had been none
    least, most = min(kept), max(kept)
    each = (kept[most] - kept[least]) / max(1, most - least)
    shards = world if run.accelerator.is_fsdp2 else 1
    parts = memory_of_weights(run.config, run.num_parameters // shards)
    needed = parts["gradients"] + parts["optimizer"] + kept[most] + each * (num - most)
    on_cpu = run.device.type == "cpu"
    sharing = run.accelerator.num_processes if on_cpu else 1  # of the memory of this machine, so far as is known here
    if needed * sharing > (free := free_memory(run.device)):
        raise ValueError(
            f"a step does not fit into the memory: {num:,} images at a time take about {gib(needed * sharing)}, and "
            f"{gib(free)} are free. No step was tried. Give --train.accumulate, which cuts the batch into parts, "
            "--train.grad_checkpointing, a smaller --train.batch_size, or a smaller network."
        )


def free_memory(device: torch.device) -> int:
    """Count the bytes that are free on a GPU, or in the computer's memory, of which the caches of files count, too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _two_steps(config: Config, run_dir: str, num_processes: int) -> Config:
    """Shorten a config to two steps, in which everything happens once."""
    periods = {"num_steps": 2, "log_every": 1, "checkpoint_every": 2, "snapshot_every": 2, "sample_every": 2}
    periods["cooldown_steps"] = 0
    train = dataclasses.replace(config.train, **periods, tracker="none")
    measured = config.fid
    if measured.every:
        measured = dataclasses.replace(measured, num=min(measured.num, FEW_IMAGES * num_processes))
    return dataclasses.replace(config, run_dir=run_dir, train=train, fid=measured)


def _table_rows(config: Config, run: Run, rate: float) -> dict[str, str]:
    """Describe the network, the data, the steps and their time at so many images a second."""
    cfg, world = config.train, run.accelerator.num_processes
    images = cfg.num_steps * cfg.batch_size
    with torch.device("meta"):
        size = run.info.image_size
        image = None if run.is_generator else torch.zeros(1, run.info.channels, size, size)
        products = multiply_adds(assemble.network(config, run.info, run.codec), image)
    pictures = ", and previews" if run.is_generator else ""
    return {
        "network": f"{type(run.network).__name__}, {run.num_parameters:,} parameters, {products / 1e9:.2f} GFLOPs a "
        "sample (multiply-adds of a forward pass, as papers count)",
        "data": run.describe_data(),
        "run": f"{cfg.num_steps:,} steps of {cfg.batch_size} images ({world} processes x {cfg.accumulate} x "
        f"{cfg.batch_size // world // cfg.accumulate}): {images:,} images, {images / len(run.data):,.1f} epochs",
        "time": f"{rate:,.1f} images/s in the second step: {duration(images / rate)}{pictures}",
    }


def _memory(config: Config, run: Run, activations: int) -> str:
    """Describe the memory of each process, part by part."""
    about = "at least" if config.train.grad_checkpointing or config.train.compile else "about"
    shards = run.accelerator.num_processes if run.accelerator.is_fsdp2 else 1
    parts = memory_of_weights(config, run.num_parameters // shards) | {f"activations {about}": activations}
    return ", ".join(f"{name} {gib(num)}" for name, num in parts.items())


@dataclass
class Saved:
    """Bytes that a forward pass keeps for the backward pass."""

    num_bytes: int = 0


@contextmanager
def count_saved(network: nn.Module) -> Iterator[Saved]:
    """Count the bytes that autograd keeps in the block, one forward pass; each piece of memory once, parameters not.

    What gradient checkpointing keeps is not seen; nor what a compiled block does.
    """
    found = Saved()
    seen = {p.untyped_storage().data_ptr() for p in network.parameters() if not is_sharded(p)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # alive as long as the graph, so no other has its address
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found.num_bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def size_of(*folders: Path) -> int:
    """Count the bytes of the files in folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())
