"""Train a DiT, a SiT or a recogniser. Run the same command again to go on where it stopped.

    python train.py --config configs/digits_sit.yaml --train.lr 2e-3 --run_dir runs/mine
    python train.py --config sit_b2_vca --data.images DIR --dry-run      what it takes; a trial
    accelerate launch train.py --config sit_b2_vca --data.images DIR     on all GPUs

Order of the data, times, noise, dropped labels, and the views and mixtures of images that a recogniser learns from are
functions of the seed and of the image's position in the run. So a run that was stopped and resumed is the run that was
not, also on another number of processes: with the same number on a CPU bit for bit, else to rounding. Ctrl-C, SIGTERM,
SIGUSR1 and SIGHUP write a checkpoint and end it with exit code 75.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

import fid
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import FilePath
from vca_engine.config.schema import Config
from vca_engine.distributed import same_on_all_processes
from vca_engine.images.codecs import sample_posterior
from vca_engine.signals import STOPPED, GivenUpError, StopSignal
from vca_engine.training.dry_run import dry_run
from vca_engine.training.log import check_tracker
from vca_engine.training.outputs import Outputs, lock_folder, mend, unfinished
from vca_engine.training.resume import check_same_run, starting_point
from vca_engine.training.run import Run, make_accelerator
from vca_engine.training.step import clip, draws, learning_rate, nan_if_not_finite, step_unless
from vca_engine.weights import checkpoint
from vca_engine.weights.files import attention_of

USUAL = {  # what the first screen of --help lists
    "run": ("run_dir", "resume", "dry_run", "seed"),
    "images": ("data", "data.images", "data.image_size", "codec", "codec.path", "latents"),
    "network": ("process", "model.size", "model.name", "model.attention", "init"),
    "training": (
        *("train.num_steps", "train.batch_size", "train.lr", "train.precision"),
        "train.checkpoint_every",
    ),
    "pictures and numbers": (
        *("train.sample_every", "sample.sampler", "sample.cfg_scale"),
        *("fid.reference", "fid.every", "eval.data"),
    ),
}


@dataclass(frozen=True)
class TrainArguments(Config):
    """Options of a training.

    Args:
        resume: What to go on from; auto is the newest checkpoint in run_dir, if there is one; none wants none to be
            there; a run or checkpoint is what a new run_dir goes on from.
        dry_run: Say what the run takes, and try two steps of all of it; in a temporary folder, so that nothing is kept.
    """

    resume: FilePath = "auto"
    dry_run: bool = False


@report_errors("train.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Train, as the command line says."""
    texts = {"prog": "train.py", "description": __doc__, "usual": USUAL}
    choices = {f"fid.{name}": names for name, names in fid.CHOICES.items()}
    args = parse(TrainArguments, argv, **texts, parts=assemble.parts(), choices=choices)
    config = Config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Config)})
    assemble.check_settings(config)
    check_tracker(config.train.tracker)
    stop = StopSignal()
    accelerator = make_accelerator(config)
    start = starting_point(config, args.resume)
    record = checkpoint.read_record(start) if start else {"id": None, "step": 0}
    same_on_all_processes(accelerator, record["id"], f"run_dir {config.run_dir!r}")
    if start:
        if known := attention_of(start):
            config = assemble.with_attention_of(config, known)
        config = assemble.with_image_size(config, record["shape"].get("image_size"))
        check_same_run(config, start, accelerator.print)
    if args.dry_run:
        dry_run(config, accelerator, prepare, functools.partial(train, stop=stop), add_gradients)
        return
    done = record["step"]
    if done >= config.train.num_steps and not unfinished(config, done, outputs_due(config, done), accelerator):
        if accelerator.is_main_process:
            with lock_folder(Path(config.run_dir)) or contextlib.nullcontext():
                mend(Path(config.run_dir), assemble.ends_of_time(config), fid.curve)
        more = " A larger train.num_steps would go on." if config.train.schedule == "constant" else ""
        accelerator.print(f"done already: {done:,} steps in {config.run_dir}.{more}")
        if config.fid.every and not (Path(config.run_dir) / "fid.jsonl").exists():
            measure = f"python sample.py {config.run_dir} --num N --fid {config.fid.reference}"
            accelerator.print(f"Measure it with: {measure}")
        accelerator.end_training()
        return
    run, outputs = prepare(config, accelerator, start, args.resume)
    with outputs:
        stopped = train(run, outputs, stop)
    if stopped:
        what = "with a checkpoint" if run.step else "before anything was to be saved"
        accelerator.print(f"stopped at step {run.step}, {what}; run the same command to go on.")
        raise SystemExit(STOPPED)
    use = assemble.command_to_use(config.process["name"], run.folder)
    accelerator.print(f"done: {run.step:,} steps. {use}")


def prepare(
    config: Config, accelerator: Accelerator, start: Path | None = None, resume: str = "auto"
) -> tuple[Run, Outputs]:
    """Build and check all that a run needs before its first step."""
    run, measured = Run(config, accelerator, start), config.fid
    options = measured.evaluator_options()
    evaluator = fid.open_evaluator(**options, device=run.device) if measured.every else None
    return run, Outputs(run, resume, evaluator, fid.curve)


def train(run: Run, outputs: Outputs, stop: StopSignal) -> bool:
    """Take all steps from the run's to its last. Return whether a signal stopped it."""
    config, cfg, saved = run.config, run.cfg, run.step
    stop.begin(run.accelerator, cfg.timeout)
    # First of all, what was due at this step when the run was killed.
    stopped = run.step > 0 and not outputs.finish(outputs_due(config, run.step), stop)
    bar = tqdm(total=cfg.num_steps, initial=run.step, desc="train", unit="step", disable=not outputs.main)
    with bar, contextlib.closing(run.batches()) as batches:
        since, steps = time.perf_counter(), 0
        while run.step < cfg.num_steps and not stopped:
            try:
                take_step(run, batches, stop)
            except GivenUpError:
                stopped = True
                break
            steps += 1
            bar.update()
            if is_due(run.step, 10):
                stop.share()
            stopped, last, due = stop.requested, run.step == cfg.num_steps, outputs_due(config, run.step)
            if last or is_due(run.step, cfg.log_every):
                line = outputs.report(since, steps)
                shown = {"loss": line["loss"], "img/s": line["images_per_second"], "GiB": line["memory_gib"]}
                bar.set_postfix({k: "-" if v is None else f"{v:.4g}" for k, v in shown.items()}, refresh=False)
                since, steps = time.perf_counter(), 0
            paused = time.perf_counter()
            if "snapshot" in due:
                outputs.snapshot()  # before the checkpoint: a run that is killed between the two comes here again
            # With every FID and evaluation, too, so that the best one is there to be used.
            if last or stopped or is_due(run.step, cfg.checkpoint_every) or {"fid", "evaluation"} & {*due}:
                outputs.save(last=last or stopped)
                saved = run.step
            if due and (last or not stopped):
                stopped = not outputs.finish(due, stop)
            since += time.perf_counter() - paused
        if stopped and saved < run.step:
            outputs.save(last=True)
    if not stopped:
        outputs.check_finished(outputs_due(config, run.step))
    return stopped


def take_step(run: Run, batches: Iterator[tuple[Tensor, Tensor, Tensor]], stop: StopSignal | None = None) -> None:
    """Take one step of the optimizer, unless the gradient is not finite, and let the averages follow.

    Args:
        run: The run.
        batches: Those of the run: images (B, C, H, W) or moments, labels (B,), positions (B,).
        stop: Signals that may end it; None lets it end by itself.

    Raises:
        GivenUpError: A signal came before the gradients were complete; nothing of the step was done.
    """
    with stop.giving_up() if stop else contextlib.nullcontext():
        for _ in range(run.cfg.accumulate):
            add_gradients(run, *next(batches))
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.cfg, run.step)
    norm = clip(run.network.parameters(), run.cfg.max_grad_norm)  # ()
    skipped = ~norm.isfinite()  # (); on the device, which no step waits for
    step_unless(run.optimizer, skipped)
    run.optimizer.zero_grad()
    run.step += 1
    for ema in run.averages.values():
        ema.update(run.network, run.step)
    run.meter.end_step(norm, skipped)


def add_gradients(run: Run, x: Tensor, y: Tensor, positions: Tensor) -> None:
    """Add the gradients of a batch. All that is random is a function of (seed, position).

    Args:
        run: The run.
        x: Images (B, C, H, W); or moments of latents (B, 2C, h, w), where these are cached.
        y: Labels (B,).
        positions: (B,), where the images stand in the order of the run.
    """
    accelerator = run.accelerator

    def forward(*inputs: Tensor) -> Tensor:
        with accelerator.autocast():
            return run.model(*inputs).float()

    losses_of = losses_of_generator if run.is_generator else losses_of_recogniser
    with accelerator.accumulate(run.model):
        losses, share = losses_of(run, forward, x, y, positions)  # (B,), (B,)
        accelerator.backward(nan_if_not_finite(losses.mean()))
    run.meter.add(losses.detach(), share)


def losses_of_generator(
    run: Run, forward: Callable[..., Tensor], x: Tensor, y: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the losses (B,) at random times, and how far from 0 to their end these are (B,); see `add_gradients`."""
    process, seed = run.process, run.config.seed
    moments = x if run.config.latents else run.codec.moments(x)  # (B, 2C, h, w)
    latents = sample_posterior(moments, run.codec.channels, seed, positions)  # (B, C, h, w)
    noise, u = draws(seed, positions, latents.shape[1:])  # (B, C, h, w), (B, 2)
    t, y = process.times(u[:, 0]), run.network.y_embedder.drop(y, u[:, 1])  # (B,), (B,)
    return process.loss(forward, latents, y, t=t, noise=noise), t / process.end_time


def losses_of_recogniser(
    run: Run, forward: Callable[..., Tensor], x: Tensor, y: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the losses (B,) of images mixed with their neighbours, and zeros (B,), for there are no times."""
    run.process.draw_paths(run.network, run.config.seed, positions)
    losses = run.process.loss(forward, x, y, seed=run.config.seed, step=run.step)
    return losses, torch.zeros_like(losses)


def outputs_due(config: Config, step: int) -> list[str]:
    """List which of `snapshot`, `preview` and `fid`, or `evaluation`, are due at `step`."""
    cfg, last = config.train, step == config.train.num_steps
    found = ["snapshot"] if cfg.ema_stds and (last or is_due(step, cfg.snapshot_every)) else []
    if not assemble.is_generator(config):
        due = last or (config.eval.every is not None and is_due(step, config.eval.every))
        return found + (["evaluation"] if config.eval.data and due else [])
    found += ["preview"] if last or is_due(step, cfg.sample_every) else []
    return found + (["fid"] if config.fid.every and (last or is_due(step, config.fid.every)) else [])


def is_due(step: int, every: int) -> bool:
    """Say whether a period of so many steps ends at `step`."""
    return step % every == 0


if __name__ == "__main__":
    main()
