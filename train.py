"""Train a DiT or SiT. Run the same command again to go on where it stopped.

    python train.py --config configs/digits_sit.yaml --train.lr 2e-3 --run_dir runs/mine
    python train.py --config configs/sit_b2_vca.yaml --data.images DIR --dry-run   what it takes, and whether it works
    accelerate launch train.py --config configs/sit_b2_vca.yaml --data.images DIR              (all GPUs)
    torchrun --nproc_per_node 8 train.py --config configs/sit_b2_vca.yaml --data.images DIR    (the same)

Order of the data, times, noise and dropped labels are functions of the seed and of the image's position in the run. So a
run that was stopped and resumed is the run that was not, also on another number of processes: with the same number on a
CPU bit for bit, else to rounding. Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint and end it with exit code 75.
"""

import contextlib
import dataclasses
import io
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

import fid
import vca
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.schema import Config
from vca_engine.distributed import agree
from vca_engine.signals import STOPPED, StopSignal
from vca_engine.training import dry_run as estimate
from vca_engine.training.log import check_tracker, read_metrics
from vca_engine.training.resume import check_same_run, starting_point
from vca_engine.training.run import Run, accelerator_of, peak_memory, preview_file
from vca_engine.weights import checkpoint
from vca_engine.weights.checkpoint import SNAPSHOTS
from vca_engine.weights.files import attention_of


@dataclass(frozen=True)
class Arguments(Config):
    """What to train.

    Args:
        resume: auto goes on from the newest checkpoint in run_dir, if there is one; none wants none to be there; a run or
            checkpoint is what a new run_dir goes on from.
        dry_run: Say what the run takes, try two steps of everything in a temporary folder, and keep nothing.
    """

    resume: str = "auto"
    dry_run: bool = False


@report_errors("train.py")
def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    args = parse(
        Arguments, argv, prog="train.py", description=__doc__, epilog=assemble.options_help(), parts=assemble.PARTS
    )
    config = Config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Config)})
    check_tracker(config.train.tracker)
    vca.lookup(fid.EXTRACTORS, config.fid.extractor, "fid.extractor")
    vca.lookup(fid.PRESETS, config.fid.preset, "fid.preset")
    stop = StopSignal()
    accelerator = accelerator_of(config)
    start = starting_point(config, args.resume)
    record = checkpoint.read_record(start) if start else {"id": None, "step": 0}
    agree(accelerator, record["id"], f"run_dir {config.run_dir!r}")
    if start:
        if known := attention_of(start):
            config = assemble.with_attention_of(config, known)
        check_same_run(config, start, accelerator.print)
    if args.dry_run:
        dry_run(config, accelerator, stop)
        return
    done = record["step"]
    if done >= config.train.num_steps and not owed(config, done, accelerator):
        more = " A larger train.num_steps would go on." if config.train.schedule == "constant" else ""
        accelerator.print(f"done already: {done:,} steps in {config.run_dir}.{more}")
        if config.fid.every and not (Path(config.run_dir) / "fid.jsonl").exists():
            measure = f"python sample.py --checkpoint {config.run_dir} --num N --fid {config.fid.reference}"
            accelerator.print(f"Measure it with: {measure}")
        accelerator.end_training()
        return
    with Run(config, accelerator, start, args.resume) as run:
        stopped = train(run, stop)
    if stopped:
        accelerator.print(f"stopped at step {run.step}, with a checkpoint; run the same command to go on.")
        raise SystemExit(STOPPED)
    accelerator.print(f"done: {run.step:,} steps. Sample with: python sample.py --checkpoint {run.folder}")


def train(run: Run, stop: StopSignal) -> bool:
    """The loop, from the run's step to its last. Gives whether a signal stopped it."""
    cfg, saved = run.cfg, run.step
    stop.begin(run.accelerator, cfg.timeout)
    stopped = run.step > 0 and not finish(run, stop)  # what was due at this step when it was killed
    bar = tqdm(total=cfg.num_steps, initial=run.step, desc="train", unit="step", disable=not run.log)
    batches = run.batches()
    with bar, contextlib.closing(batches):
        since, steps = time.perf_counter(), 0
        while run.step < cfg.num_steps and not stopped:
            for _ in range(cfg.accumulate):
                run.backward(*next(batches))
            run.update()
            steps += 1
            bar.update()
            stopped, last = stop.requested(run.step), run.step == cfg.num_steps
            if last or due(run.step, cfg.log_every):
                line = run.report(since, steps)
                shown = {"loss": line["loss"], "img/s": line["images_per_second"], "GiB": line["memory_gib"]}
                bar.set_postfix({k: "-" if v is None else f"{v:.4g}" for k, v in shown.items()}, refresh=False)
                since, steps = time.perf_counter(), 0
            paused = time.perf_counter()
            if last or due(run.step, cfg.snapshot_every):
                run.snapshot()  # before the checkpoint: a run that is killed between the two comes here again
            # With every FID, too, so that the best one is there to be used.
            if last or stopped or due(run.step, cfg.checkpoint_every) or "fid" in due_at(run.config, run.step):
                run.save(last=last or stopped)
                saved = run.step
            if not stopped or last:
                stopped = not finish(run, stop)
            since += time.perf_counter() - paused
        if stopped and saved < run.step:
            run.save(last=True)
    return stopped


def finish(run: Run, stop: StopSignal) -> bool:
    """Draw and measure what is due at the run's step and not there yet. Gives False if a signal stopped it."""
    what = owed(run.config, run.step, run.accelerator)
    if "preview" in what:
        run.preview()
    return run.measure(stop) if "fid" in what else True


def due_at(config: Config, step: int) -> list[str]:
    """`preview` and `fid`, if they are due at `step`."""
    last = step == config.train.num_steps
    found = ["preview"] if last or due(step, config.train.sample_every) else []
    return found + (["fid"] if config.fid.every and (last or due(step, config.fid.every)) else [])


def owed(config: Config, step: int, accelerator: Accelerator) -> list[str]:
    """Those of `due_at` that are not in the run's folder, as the main process sees it. All processes call this."""
    folder, due = Path(config.run_dir), due_at(config, step)
    if due and accelerator.is_main_process:
        lines = read_metrics(folder / "fid.jsonl")
        done = {
            "preview": preview_file(folder, step).exists(),
            "fid": any((line["step"], line["num_samples"]) == (step, config.fid.num) for line in lines),
        }
        due = [what for what in due if not done[what]]
    return broadcast_object_list([due])[0] if due_at(config, step) else []


def dry_run(config: Config, accelerator: Accelerator, stop: StopSignal) -> None:
    """Print what a run takes, and do two steps of everything in a temporary folder.

    Raises:
        ValueError: Something does not work, or the disk is too small for the checkpoints.
    """
    cfg, gib, world = config.train, estimate.gib, accelerator.num_processes
    folder = Path(config.run_dir).absolute()
    parent = next(p for p in (folder, *folder.parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if not os.access(parent, os.W_OK):
        raise ValueError(f"run_dir {config.run_dir!r} cannot be made: {str(parent)!r} is not yours to write.")
    periods = {"num_steps": 2, "log_every": 1, "checkpoint_every": 2, "snapshot_every": 2, "sample_every": 2}
    with tempfile.TemporaryDirectory(dir=parent, prefix=".dry-run-") as folder:
        trial = dataclasses.replace(
            config,
            run_dir=f"{folder}/run",
            train=dataclasses.replace(cfg, **periods, tracker="none"),
            fid=dataclasses.replace(config.fid, num=min(config.fid.num, 64 * world)),
        )
        run = Run(trial, accelerator)
        with contextlib.redirect_stdout(io.StringIO()) as said, run:
            if train(run, stop):
                raise SystemExit(STOPPED)
            peak = peak_memory(run.device)
            with estimate.count_saved(run.network) as saved:
                run.backward(*next(run.batches()))
        if not run.main:
            return
        checkpoints, snapshots = checkpoint.steps(run.folder), checkpoint.steps(run.folder, SNAPSHOTS)
        if not checkpoints or (cfg.ema_stds and not snapshots):
            raise ValueError(f"a step in {str(parent)!r} failed: {said.getvalue().strip()}")
        size, snapshot_size = estimate.size_of(*checkpoints), estimate.size_of(*snapshots)
        rate = read_metrics(run.folder / "metrics.jsonl")[-1]["images_per_second"]
        with torch.device("meta"):
            multiply_adds = estimate.multiply_adds(assemble.network(config, run.shape, run.codec))

    num_images, about = cfg.num_steps * cfg.batch_size, "at least" if cfg.grad_checkpointing or cfg.compile else "about"
    weights = 4 * sum(p.numel() for p in run.network.parameters()) // (world if accelerator.is_fsdp2 else 1)
    memory = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        f"{len(run.averages)} averages": len(run.averages) * weights,
        f"activations {about}": saved.num_bytes,
    }
    # One more is written before an old one goes, and the best FID's is spared.
    num_kept = len(cfg.kept()) + bool(cfg.keep_checkpoints) + bool(cfg.keep_checkpoints and config.fid.every)
    num_snapshots = math.ceil(cfg.num_steps / cfg.snapshot_every) * bool(cfg.ema_stds)
    disk = num_kept * size + num_snapshots * snapshot_size
    rows = {
        "network": f"{type(run.network).__name__}, {run.num_parameters:,} parameters, {multiply_adds / 1e9:.2f} GFLOPs a "
        "sample (multiply-adds of a forward pass, as papers count)",
        "data": f"{len(run.data):,} images of {run.num_classes:,} classes, {run.shape.image_size}x{run.shape.image_size}",
        "run": f"{cfg.num_steps:,} steps of {cfg.batch_size} images ({world} processes x {cfg.accumulate} x "
        f"{cfg.batch_size // world // cfg.accumulate}): {num_images:,} images, {num_images / len(run.data):,.1f} epochs",
        "time": f"{rate:,.1f} images/s in the second step: {num_images / rate / 3600:,.1f} hours, and previews",
        "memory": ", ".join(f"{name} {gib(num)}" for name, num in memory.items())
        + f" of each process, whose measured peak is {gib(peak)}",
        "disk": f"{num_kept} checkpoints of {gib(size)}, {num_snapshots} snapshots of {gib(snapshot_size)}: {gib(disk)}; "
        f"{gib(free)} are free",
    }
    print(f"{config.run_dir}: every step works; nothing was kept.")
    print("\n".join(f"  {name:<9} {text}" for name, text in rows.items()))
    if disk > free:
        raise ValueError(
            f"the checkpoints do not fit on the disk of {str(parent)!r}: they take {gib(disk)}, {gib(free)} are free; give "
            "train.keep_checkpoints, or larger periods of train.checkpoint_every and train.snapshot_every."
        )


def due(step: int, every: int) -> bool:
    """Whether a period of so many steps ends at `step`."""
    return step % every == 0


if __name__ == "__main__":
    main()
