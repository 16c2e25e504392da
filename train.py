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

from tqdm import tqdm

import build
from run import Run, peak_memory, preview_file
from runtime import checkpoint, estimate
from runtime.checkpoint import SNAPSHOTS
from runtime.config import Config, parse, report_errors
from runtime.data import DeadWorkerError
from runtime.log import check_tracker, read_metrics
from runtime.resume import check_same_run, starting_point
from runtime.stop import STOPPED, StopSignal


@dataclass(frozen=True)
class Arguments(Config):
    """What to train.

    Args:
        resume: auto goes on from the newest checkpoint in run_dir, if there is one; none wants none to be there; a run or
            checkpoint is what a new run_dir goes on from.
        dry_run: Say what the run takes, try one step of everything in a temporary folder, and keep nothing.
    """

    resume: str = "auto"
    dry_run: bool = False


@report_errors("train.py")
def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    args = parse(Arguments, argv, prog="train.py", description=__doc__, epilog=build.options_help())
    config = Config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Config)})
    check_tracker(config.train.tracker)
    stop = StopSignal()
    if args.dry_run:
        dry_run(config, stop)
        return
    start = starting_point(config, args.resume)
    check_same_run(config, start)
    done = checkpoint.read_record(start)["step"] if start else 0
    if done >= config.train.num_steps and not owed(config, done):
        more = " A larger train.num_steps would go on." if config.train.schedule == "constant" else ""
        print(f"done already: {done:,} steps in {config.run_dir}.{more}")
        if config.fid.every and not (Path(config.run_dir) / "fid.jsonl").exists():
            print(
                f"Measure it with: python sample.py --checkpoint {config.run_dir} --num N --fid {config.fid.reference}"
            )
        return
    with Run(config, start) as run:
        stopped = train(run, stop)
    if run.main and stopped:
        print(f"stopped at step {run.step}, with a checkpoint; run the same command to go on.")
    elif run.main:
        print(f"done: {run.step:,} steps. Sample with: python sample.py --checkpoint {run.folder}")
    if stopped:
        raise SystemExit(STOPPED)


def train(run: Run, stop: StopSignal) -> bool:
    """The loop, from the run's step to its last. Gives whether a signal stopped it before."""
    cfg = run.cfg
    stop.begin(run.accelerator)
    stopped = run.step > 0 and not finish(run, stop)  # what was due at this step when it was killed
    if run.step >= cfg.num_steps:
        return stopped
    bar = tqdm(total=cfg.num_steps, initial=run.step, desc="train", unit="step", disable=not run.log)
    batches = run.batches()
    since, steps = time.perf_counter(), 0
    while run.step < cfg.num_steps and not stopped:
        try:
            for _ in range(cfg.accumulate):
                run.backward(*next(batches))
        except DeadWorkerError:
            if stop.received is None or run.accelerator.num_processes > 1:
                raise
            run.optimizer.zero_grad()
            stopped = True  # the signal went to every process, and took the worker first
        else:
            run.update()
            steps += 1
            bar.update()
            stopped = stop.requested(run.step) and run.step < cfg.num_steps
        last = run.step == cfg.num_steps
        if last or due(run.step, cfg.log_every):
            line = run.report(time.perf_counter() - since, steps)
            shown = {"loss": line["loss"], "img/s": line["images_per_second"], "GiB": line["memory_gib"]}
            bar.set_postfix({k: "-" if v is None else f"{v:.4g}" for k, v in shown.items()}, refresh=False)
            since, steps = time.perf_counter(), 0
        paused = time.perf_counter()
        if last or due(run.step, cfg.snapshot_every):
            run.snapshot()  # before the checkpoint: a run that is killed between the two comes here again
        if last or stopped or due(run.step, cfg.checkpoint_every):
            run.save(last=last or stopped)
        if not stopped:
            stopped = not finish(run, stop)
        since += time.perf_counter() - paused
    bar.close()
    return stopped and run.step < cfg.num_steps


def finish(run: Run, stop: StopSignal) -> bool:
    """Draw and measure what is due at the run's step and not there yet. Gives False if a signal stopped it."""
    if not due_at(run.config, run.step):
        return True
    what = owed(run.config, run.step)
    run.accelerator.wait_for_everyone()  # all have looked before one writes
    if "preview" in what:
        run.preview()
    return run.measure(stop) if "fid" in what else True


def due_at(config: Config, step: int) -> list[str]:
    """`preview` and `fid`, if they are due at `step`."""
    last = step == config.train.num_steps
    found = ["preview"] if last or due(step, config.train.sample_every) else []
    return found + (["fid"] if config.fid.every and (last or due(step, config.fid.every)) else [])


def owed(config: Config, step: int) -> list[str]:
    """Those of `due_at` that are not in the run's folder."""
    folder = Path(config.run_dir)
    lines = read_metrics(folder / "fid.jsonl")
    done = {
        "preview": preview_file(folder, step).exists(),
        "fid": any((line["step"], line["num_samples"]) == (step, config.fid.num) for line in lines),
    }
    return [what for what in due_at(config, step) if not done[what]]


def dry_run(config: Config, stop: StopSignal) -> None:
    """Print what a run takes, and do two steps of everything in a temporary folder.

    Raises:
        ValueError: Something does not work, or the disk is too small for the checkpoints.
    """
    cfg, gib = config.train, estimate.gib
    parent = next(p for p in Path(config.run_dir).absolute().parents if p.is_dir())
    free = shutil.disk_usage(parent).free
    if not os.access(parent, os.W_OK):
        raise ValueError(f"run_dir {config.run_dir!r} cannot be made: {str(parent)!r} is not yours to write.")
    periods = {"num_steps": 2, "log_every": 1, "checkpoint_every": 2, "snapshot_every": 2, "sample_every": 2}
    with tempfile.TemporaryDirectory(dir=parent, prefix=".dry-run-") as folder:
        trial = dataclasses.replace(
            config,
            run_dir=f"{folder}/run",
            sample=dataclasses.replace(config.sample, rows=1, classes=(config.sample.classes or [0])[:1]),
            train=dataclasses.replace(cfg, **periods, tracker="none"),
            fid=dataclasses.replace(config.fid, num=2),
        )
        run = Run(trial)
        multiply_adds = estimate.multiply_adds(run.network) if run.main else 0
        with contextlib.redirect_stdout(io.StringIO()) as said, estimate.count_saved(run.network) as saved, run:
            train(run, stop)
        if not run.main:
            return
        checkpoints, snapshots = checkpoint.steps(run.folder), checkpoint.steps(run.folder, SNAPSHOTS)
        if not checkpoints or (cfg.ema_stds and not snapshots):
            raise ValueError(f"a step in {str(parent)!r} failed: {said.getvalue().strip()}")
        size, snapshot_size = estimate.size_of(*checkpoints), estimate.size_of(*snapshots)
        rate = read_metrics(run.folder / "metrics.jsonl")[-1]["images_per_second"]

    world, num_images = run.accelerator.num_processes, cfg.num_steps * cfg.batch_size
    weights = 4 * sum(p.numel() for p in run.network.parameters()) // (world if run.accelerator.is_fsdp2 else 1)
    memory = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        f"{len(run.averages)} averages": len(run.averages) * weights,
        "activations about": saved.num_bytes / (2 * cfg.accumulate),
    }
    num_kept = len(cfg.kept()) + bool(cfg.keep_checkpoints)  # one more is written before an old one goes
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
        + f" of each process, whose measured peak is {gib(peak_memory(run.device))}",
        "disk": f"{num_kept} checkpoints of {gib(size)}, {num_snapshots} snapshots of {gib(snapshot_size)}: {gib(disk)}; "
        f"{gib(free)} are free",
    }
    print(f"{config.run_dir}: it works; nothing was kept.")
    print("\n".join(f"  {name:<9} {text}" for name, text in rows.items()))
    if disk > free:
        raise ValueError(
            f"the checkpoints do not fit on the disk of {str(parent)!r}: they take {gib(disk)}, {gib(free)} are free; give "
            "train.keep_checkpoints, or larger periods of train.checkpoint_every and train.snapshot_every."
        )


def due(step: int, *periods: int) -> bool:
    """Whether one of the periods ends at `step`."""
    return any(step % every == 0 for every in periods)


if __name__ == "__main__":
    main()
