"""Train a DiT or SiT. Run the same command again to go on where it stopped.

    python train.py --config configs/digits_sit.yaml --train.lr 2e-3 --run_dir runs/mine
    accelerate launch train.py --config configs/sit_b2_vca.yaml --data.images DIR              (all GPUs)
    torchrun --nproc_per_node 8 train.py --config configs/sit_b2_vca.yaml --data.images DIR    (the same)

Order of the data, times, noise and dropped labels are functions of (seed, step, rank), so a run that was stopped and
resumed is the run that was not: on a CPU bit for bit, on a GPU up to kernels that are not deterministic.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import build
import fid
from runtime import checkpoint
from runtime.config import Config, TrainConfig, differences, parse, read_yaml, report_errors, save_yaml, to_dict
from runtime.data import EndlessBatches
from runtime.ema import Ema
from runtime.files import write_text
from runtime.generation import check_guidance, check_labels, generate, random_label, spread
from runtime.images import save_grid
from runtime.latents import LatentDataset
from runtime.log import Log, read_metrics
from runtime.seeds import mix
from runtime.stop import StopSignal, leave_process_group

CONFIG_FILE = "config.yaml"
MAY_CHANGE = {  # settings that a resumed run may change, because no step that is done depends on them
    "run_dir",
    "sample",
    "fid",
    "data.images",  # moved data, a moved autoencoder or cache; said when it happens
    "codec.path",
    "latents",
    "cache",
    "train.num_workers",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
}


@report_errors("train.py")
def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    config = parse(Config, argv, prog="train.py", description=__doc__, epilog=build.options_help())
    check_run_dir(config)
    if (done := steps_done(config)) >= config.train.num_steps:
        more = " A larger train.num_steps would go on." if config.train.schedule == "constant" else ""
        print(f"done already: {done:,} steps in {config.run_dir}.{more}")
        if config.fid.every and not (Path(config.run_dir) / "fid.jsonl").exists():
            print(
                f"Measure it with: python sample.py --checkpoint {config.run_dir} --num N --fid {config.fid.reference}"
            )
        return
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else several processes on a CPU would not find each other
        mixed_precision=precision(config.train),
        gradient_accumulation_steps=config.train.accumulate,
    )
    run = Run(config, accelerator)
    with tqdm(total=run.cfg.num_steps, initial=run.step, desc="train", unit="step", disable=not run.log) as progress:
        train(run, progress)
    if run.log:
        run.log.close()
        if run.step < run.cfg.num_steps:
            print(f"stopped at step {run.step}, with a checkpoint; run the same command to go on.")
        else:
            print(f"done: {run.step:,} steps. Sample with: python sample.py --checkpoint {run.folder}")
    accelerator.end_training()


class Run:
    """What a run consists of, built and checked before the first step, at the step of its newest checkpoint."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.cfg, self.folder = config, config.train, Path(config.run_dir)
        self.accelerator = accelerator
        self.data = LatentDataset(config.latents) if config.latents else build.build_images(config)
        self.shape = build.shape_of(self.data)
        self.codec = build.build_codec(config, self.shape.channels).to(accelerator.device)
        if config.latents:
            self.data.check(build.needed_latents(config, self.codec))
        self.to_latents = build.to_latents(config, self.codec)
        self.process = build.build_process(config)
        self.sampler = build.build_sampler(config, self.process)

        torch.manual_seed(config.seed)
        self.network = build.build_model(config, self.shape, self.codec).to(accelerator.device)
        self.classes = config.sample.classes or spread(range(self.network.num_classes))  # columns of the previews
        check_labels(self.classes, self.network.num_classes)
        check_guidance(self.network, config.sample.cfg_scale, config.sample.guided_channels)
        self.ema = Ema(self.network, self.cfg.ema_decay, self.cfg.ema_warmup)
        self.evaluator = build.build_evaluator(config, accelerator.device) if config.fid.every else None
        if self.evaluator:
            self.evaluator.prepare()  # a broken reference is found before the first step
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.cfg.lr, betas=self.cfg.betas, weight_decay=self.cfg.weight_decay
        )
        self.step = steps_done(config)
        if self.step:
            newest = checkpoint.find(self.folder)
            if (before := checkpoint.read_record(newest)["shape"]) != to_dict(self.shape):
                text = ", ".join(
                    f"{k} {a!r} (now {b!r})" for k, (a, b) in differences(before, to_dict(self.shape)).items()
                )
                raise ValueError(f"run_dir {config.run_dir!r} was trained on other data: {text}.")
            checkpoint.load_weights(newest, "model", self.network)
            checkpoint.load_weights(newest, "ema", self.ema.model)
            checkpoint.load_optimizer(newest, self.network, optimizer)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.order = self._order()

        self.log = None
        if accelerator.is_main_process:
            save_yaml(config, self.folder / CONFIG_FILE)
            checkpoint.remove_partial(self.folder)
            self.log = Log(self.folder, self.step)
            print(self, flush=True)

    def __str__(self) -> str:
        num_parameters = sum(p.numel() for p in self.network.parameters())
        return (
            f"{self.folder}: {type(self.network).__name__}, {num_parameters:,} parameters; {len(self.data):,} images, "
            f"{self.network.num_classes:,} classes; {self.cfg.num_steps:,} steps of {self.cfg.batch_size} images, "
            f"{self.step:,} done; {self.accelerator.num_processes} x {self.accelerator.device.type}, precision "
            f"{self.accelerator.mixed_precision}"
        )

    def save(self) -> None:
        """Write the checkpoint of this step, and draw the loss."""
        if self.log:
            record = {"config": to_dict(self.config), "shape": to_dict(self.shape)}
            parts = {"model": self.network, "ema": self.ema.model, "optimizer": self.optimizer.optimizer}
            checkpoint.save(self.folder, self.step, **parts, record=record)
            if self.cfg.keep_checkpoints:
                checkpoint.prune(self.folder, self.cfg.keep_checkpoints)
            self.log.plot()
        self.accelerator.wait_for_everyone()

    def preview(self) -> None:
        """Draw a grid with the averaged weights, a column a class."""
        if self.log:
            s = self.config.sample
            labels = self.classes * s.rows
            options = {"seed": s.seed, "cfg_scale": s.cfg_scale, "guided_channels": s.guided_channels}
            images = generate(self.ema.model, self.sampler, self.codec.decode, labels, range(len(labels)), **options)
            images = images.reshape(s.rows, len(self.classes), *images.shape[1:])
            file = self.folder / "previews" / f"step-{self.step:08d}.png"
            names = [self.shape.class_names[k] for k in self.classes]
            title = f"step {self.step}, cfg {s.cfg_scale:g}"
            self.log.add_image(self.step, save_grid(images, names, file, title))
        self.accelerator.wait_for_everyone()

    def measure(self) -> None:
        """Draw `fid.num` images with the averaged weights, as sample.py would, and measure them; no image is kept."""
        num, sample, rank = self.config.fid.num, self.config.sample, self.accelerator.process_index
        size, world = self.evaluator.batch_size, self.accelerator.num_processes
        options = {"seed": sample.seed, "cfg_scale": sample.cfg_scale, "guided_channels": sample.guided_channels}
        self.evaluator.reset()
        for first in range(rank * size, num, world * size):
            index = range(first, min(first + size, num))
            labels = [random_label(sample.seed, i, self.network.num_classes) for i in index]
            images = generate(self.ema.model, self.sampler, self.codec.decode, labels, index, **options)
            self.evaluator.update(torch.from_numpy(images), index, labels)
        record = {"step": self.step, "sample": {**options, "sampler": sample.sampler, "weights": "ema", "num": num}}
        result = self.evaluator.compute(num, labels_mode="random", quantize="dit", **record)
        if self.log:
            file = self.folder / "fid.jsonl"
            records = [r for r in read_metrics(file) if r["step"] < self.step] + [result.to_dict()]
            write_text(file, "".join(json.dumps(record) + "\n" for record in records))
            same = ("extractor", "protocol", "num_samples", "reference")
            shown = [r for r in records if all(r[k] == records[-1][k] for k in same)]
            fid.curve(shown, self.folder / "fid.png", f"{self.folder.name}, {result.record['protocol']}")
            self.log.add_scalars(self.step, result.values)
            tqdm.write(f"step {self.step}: {result}")
        self.accelerator.wait_for_everyone()

    def report(self, losses: list[Tensor], steps: int, seconds: float) -> float:
        """Log the mean of the losses of the last `steps` steps over all processes, in one reduction, and return it.

        Raises:
            ValueError: One is not finite; says at which step. No checkpoint of these steps has been written.
        """
        values = self.accelerator.reduce(torch.stack(losses).double(), reduction="mean").cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            first = self.step - (len(losses) - 1 - int(bad[0])) // self.cfg.accumulate
            kept = checkpoint.steps(self.folder)
            where = f"the last checkpoint, {kept[-1]}, is untouched" if kept else "there was no checkpoint yet"
            raise ValueError(
                f"the loss is {float(values[bad[0]])} at step {first}; {where}. A lower train.lr, "
                f"train.max_grad_norm 1.0 or train.precision no may help."
            )
        loss = float(values.mean())
        if self.log:
            rate = round(steps * self.cfg.batch_size / seconds, 2)
            lr = self.optimizer.param_groups[0]["lr"]
            images = self.step * self.cfg.batch_size
            self.log.add(self.step, loss=loss, lr=lr, images=images, images_per_second=rate)
        return loss

    def _order(self) -> EndlessBatches:
        """What each batch of this process holds, from this step on."""
        if self.cfg.batch_size % self.cfg.accumulate:
            raise ValueError(
                f"train.batch_size {self.cfg.batch_size} is not a multiple of train.accumulate {self.cfg.accumulate}."
            )
        return EndlessBatches(
            len(self.data),
            self.cfg.batch_size // self.cfg.accumulate,
            seed=self.config.seed,
            flip=self.data.flip,
            start=self.step * self.cfg.accumulate,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )


def train(run: Run, progress: tqdm) -> None:
    """The loop: from the run's step to its last, or to a stop signal."""
    accelerator, cfg, model, optimizer = run.accelerator, run.cfg, run.model.train(), run.optimizer
    stop = StopSignal(accelerator)
    workers = {"num_workers": cfg.workers(cached=run.config.latents is not None), "worker_init_fn": leave_process_group}
    pin = accelerator.device.type == "cuda"
    batches = iter(
        DataLoader(run.data, batch_sampler=run.order, collate_fn=run.data.collate, pin_memory=pin, **workers)
    )
    losses: list[Tensor] = []
    since, since_step = time.perf_counter(), run.step
    stopped = False
    while run.step < cfg.num_steps and not stopped:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, run.step)
        for part in range(cfg.accumulate):
            x, y = (z.to(accelerator.device) for z in next(batches))
            x = run.to_latents(x, torch.tensor(run.order.positions(run.step * cfg.accumulate + part)))
            torch.manual_seed(mix(run.config.seed, run.step, part, accelerator.process_index))
            with accelerator.accumulate(model):
                loss = run.process.loss(model, x, y).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and cfg.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        run.step += 1
        run.ema.update(run.network, run.step)
        progress.update()

        stopped = stop.requested(run.step)
        last = stopped or run.step == cfg.num_steps
        measured = run.evaluator and (due(run.step, run.config.fid.every) or run.step == cfg.num_steps)
        if last or measured or due(run.step, cfg.log_every, cfg.checkpoint_every, cfg.sample_every):
            mean = run.report(losses, run.step - since_step, time.perf_counter() - since)
            losses.clear()
            progress.set_postfix(loss=f"{mean:.4f}", refresh=False)
            if last or due(run.step, cfg.checkpoint_every):
                run.save()
            if run.step == cfg.num_steps or due(run.step, cfg.sample_every):
                run.preview()
            if measured:
                run.measure()
            since, since_step = time.perf_counter(), run.step


def precision(cfg: TrainConfig) -> str:
    """What accelerate calls it: `auto` is bf16 on a GPU that has it; a CPU emulates bf16, many times slower."""
    if cfg.precision != "auto":
        return cfg.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Of the step after `step` done ones: linear warm-up, then constant or cosine to 0."""
    warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    if cfg.schedule == "constant":
        return cfg.lr * warmup
    progress = max(0.0, step - cfg.warmup_steps) / max(1, cfg.num_steps - cfg.warmup_steps)
    return cfg.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def due(step: int, *periods: int) -> bool:
    """Whether one of the periods ends at `step`."""
    return any(step % every == 0 for every in periods)


def steps_done(config: Config) -> int:
    """Steps of the newest checkpoint in the run's folder."""
    folder = Path(config.run_dir)
    return checkpoint.read_record(checkpoint.find(folder))["step"] if checkpoint.steps(folder) else 0


def check_run_dir(config: Config) -> None:
    """A run folder belongs to one run, whose settings may change in `MAY_CHANGE` only.

    num_steps may change, too, but not under a schedule that depends on it.

    Raises:
        ValueError: The folder holds another run.
    """
    folder = Path(config.run_dir)
    if folder.is_file():
        raise ValueError(f"run_dir {config.run_dir!r} is a file; choose a folder.")
    if checkpoint.steps(folder):
        old = checkpoint.read_record(checkpoint.find(folder))["config"]
    elif (folder / CONFIG_FILE).is_file():  # stopped before its first checkpoint
        old = read_yaml(folder / CONFIG_FILE)
    else:
        return
    may_change = MAY_CHANGE | ({"train.num_steps"} if config.train.schedule == "constant" else set())
    changed = differences(old, to_dict(config))
    for key in sorted(changed.keys() & {"data.images", "codec.path", "latents"}):
        print(f"note: {key} was {changed[key][0]!r} in this run, now {changed[key][1]!r}; it must hold the same.")
    changed = {k: v for k, v in changed.items() if k not in may_change and k.split(".")[0] not in may_change}
    if changed:
        text = ", ".join(f"{key} {a!r} (you gave {b!r})" for key, (a, b) in changed.items())
        why = " Under the cosine schedule every step depends on num_steps." if "train.num_steps" in changed else ""
        raise ValueError(
            f"run_dir {config.run_dir!r} holds another run, with {text}; give its settings to go on with it, or another "
            f"--run_dir.{why}"
        )


if __name__ == "__main__":
    main()
