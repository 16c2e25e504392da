"""A training run: what it consists of, a step of it, and what it writes. `train.py` is the loop around it."""

import contextlib
import copy
import dataclasses
import functools
import json
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

import fid
from vca_engine import assemble
from vca_engine.config.schema import Config, differences, save_yaml, to_dict
from vca_engine.distributed import gather, whole
from vca_engine.files import write_text
from vca_engine.images import NonFiniteError
from vca_engine.images.labels import DataInfo
from vca_engine.images.latents import LatentDataset
from vca_engine.images.loader import load
from vca_engine.images.order import EndlessBatches
from vca_engine.images.pictures import grid, save_picture
from vca_engine.precision import mixed_precision, set_tf32
from vca_engine.sampling.classes import find_class, random_label, spread
from vca_engine.sampling.guidance import guidance_of
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.seeds import mix, normal, uniform
from vca_engine.signals import StopSignal
from vca_engine.training.ema import Ema, constant, name_of, power
from vca_engine.training.log import Log, read_metrics, start_tracker
from vca_engine.training.meter import Meter
from vca_engine.training.resume import CONFIG_FILE, read_origin, write_origin
from vca_engine.training.step import clip, learning_rate, poison, step_unless
from vca_engine.weights import checkpoint
from vca_engine.weights.checkpoint import CHECKPOINTS, SNAPSHOTS, folder_of
from vca_engine.weights.files import attention_of

BEST_FILE = "best.json"


def accelerator_of(config: Config) -> Accelerator:
    """The processes and devices, as the launcher and accelerate's config file say."""
    cfg = config.train
    # Of DDP, about the depth-wise convolution, whose gradient has a dimension of one that no stride matters for.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else several processes on a CPU would not find each other
        mixed_precision=mixed_precision(cfg.precision),
        gradient_accumulation_steps=cfg.accumulate,
        log_with=None if cfg.tracker == "none" else cfg.tracker,
        project_dir=config.run_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=cfg.timeout))],
    )
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # accelerate's would round weights, inputs and exchanged gradients to bf16; ours is autocast, as without shards.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    return accelerator


class Run:
    """What a run consists of, built and checked before the first step, at the step of the checkpoint it goes on from.

    Args:
        config: Its settings.
        accelerator: Its processes, as `accelerator_of` gives them.
        start: The checkpoint to go on from; None begins.
        resume: What --resume said.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, start: Path | None = None, resume: str = "auto"
    ) -> None:
        self.config, self.cfg, self.folder = config, config.train, Path(config.run_dir)
        self.log: Log | None = None  # of the main process, once the run has its folder
        self.lock: FileLock | None = None
        self.accelerator, self.start, self.resume = accelerator, start, resume
        self.device, self.main = accelerator.device, accelerator.is_main_process
        set_tf32(self.cfg.tf32)

        self.data = LatentDataset(config.latents) if config.latents else assemble.images(config)
        self.shape = DataInfo.of(self.data)
        self.codec = assemble.codec(config, self.shape.channels).to(self.device)
        if self.cfg.channels_last and self.device.type == "cuda":
            self.codec.to(memory_format=torch.channels_last)
        if config.latents:
            self.data.check(assemble.needed_latents(config, self.codec))
        self.to_latents = assemble.to_latents(config, self.codec)
        self.process = assemble.process(config)
        self.sampler = assemble.sampler(config, self.process)

        if config.init and not start and (known := attention_of(config.init)):
            config = assemble.with_attention_of(config, known, "softmax")
        torch.manual_seed(config.seed)
        network = assemble.network(config, self.shape, self.codec)
        model = dataclasses.replace(config.model, attention=network.attention)  # as it is, whatever becomes the default
        self.config = config = dataclasses.replace(config, model=model)
        self.num_classes, self.num_parameters = network.num_classes, sum(p.numel() for p in network.parameters())
        rows = config.sample.classes or spread(range(self.num_classes))  # of the previews
        self.classes = [find_class(k, self.shape.class_names) for k in rows]
        self.guidance = guidance_of(config.sample)
        self.guidance.check(network)
        c = config.fid
        self.evaluator = (
            fid.open_evaluator(
                c.reference, c.extractor, weights=c.weights, preset=c.preset, metrics=c.metrics, device=self.device
            )
            if c.every
            else None
        )
        if self.evaluator:
            self.evaluator.prepare()  # a broken reference is found before the first step

        self.step, self.notes = 0, []
        if start:
            record = checkpoint.read_record(start)
            self._check_data(record)
            checkpoint.load_weights(start, "model", network)
            self.step = record["step"]
            if self._borrowed:
                self.notes.append(f"resumes {start}")
        elif config.init:
            self.notes.append(
                f"starts from {config.init}: {assemble.initialise(network, config.init, self.shape.class_names)}"
            )
        self._prepare(network)
        self.meter = Meter(accelerator)
        if start:
            for name, ema in self.averages.items():
                ema.load(checkpoint.read(start, name))
            checkpoint.load_optimizer(start, self.network, self.optimizer)
            self.meter.load(checkpoint.read(start, "meter")["rows"], record["skipped"])
        self.order = self._order()
        if self.cfg.preload:
            self._preload()

    def _prepare(self, network: nn.Module) -> None:
        """The network on its device, wrapped or sharded, its optimizer and averages, and a copy to draw with."""
        cfg = self.cfg
        self.copy = copy.deepcopy(network).eval().requires_grad_(False).to(self.device)
        self.drawer = ImageSampler(
            self.copy,
            self.sampler,
            self.codec.decode,
            seed=self.config.sample.seed,
            guidance=self.guidance,
            noise_level=self.process.noise_level,
        )
        self._return_weights()
        network.grad_checkpointing = cfg.grad_checkpointing
        if cfg.compile:
            for block in network.blocks:
                block.compile()  # in place, so the keys stay
        network = network.to(self.device)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=cfg.fused
        )
        self.model, optimizer = self.accelerator.prepare(network, optimizer)
        self.network, self.optimizer = self.accelerator.unwrap_model(self.model), optimizer.optimizer
        self.model.train()
        self.network.y_embedder.eval()  # `backward` drops the labels
        self.ema = Ema(self.network, constant(cfg.ema_decay, cfg.ema_warmup))
        self.averages = {"ema": self.ema} | {name_of(std): Ema(self.network, power(std)) for std in cfg.ema_stds}

    def __enter__(self) -> Self:
        """Take the run's folder, and say what begins. All processes call this."""
        if self.main:
            self._lock()
            save_yaml(self.config, self.folder / CONFIG_FILE)
            checkpoint.recover(self.folder)
            if self._borrowed and self.resume != "auto":  # else it is noted already
                write_origin(self.folder, self.resume, self.start)
        if self.cfg.tracker != "none":
            start_tracker(self.accelerator, self.cfg.tracker, self.folder, self.step, to_dict(self.config))
        if self.main:
            goes_on = self.step < self.cfg.num_steps
            self.log = Log(self.folder, self.step, goes_on, self.accelerator.trackers)
            print("\n".join([str(self), *self.notes]), flush=True)
        return self

    def __exit__(self, *error: object) -> None:
        """Close the log, and leave the folder to others."""
        if self.log:
            self.log.close()
        self.accelerator.trackers = []  # they are closed
        self.accelerator.end_training()
        if self.lock:
            self.lock.release()

    def __str__(self) -> str:
        return (
            f"{self.folder}: {type(self.copy).__name__}, {self.num_parameters:,} parameters; {len(self.data):,} images, "
            f"{self.num_classes:,} classes; {self.cfg.num_steps:,} steps of {self.cfg.batch_size} images, "
            f"{self.step:,} done; {self.accelerator.num_processes} x {self.device.type}, precision "
            f"{self.accelerator.mixed_precision}"
        )

    # A step

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of this process on its device: images or moments, labels, and positions in the run, (B,) each.

        The next batch is on its way while a step runs.
        """
        workers = self.cfg.workers(cached=self.config.latents is not None)
        pin = self.device.type == "cuda" and not self.cfg.preload
        loader = load(self.data, self.order, num_workers=workers, minutes=self.cfg.timeout, pin=pin)
        ahead = None
        for number, batch in enumerate(loader, self.order.start):
            x, y = (z.to(self.device, non_blocking=True) for z in batch)
            where = self.order.positions(number)
            if ahead:
                yield ahead
            ahead = x, y, torch.arange(where.start, where.stop, device=self.device)

    def backward(self, x: Tensor, y: Tensor, positions: Tensor) -> None:
        """Add the gradients of a batch; all that is random is a function of (seed, position)."""
        seed = self.config.seed
        x = self.to_latents(x, positions)  # (B, C, h, w)
        noise = normal(mix(seed, 1), positions, x.shape[1:])
        u = uniform(mix(seed, 2), positions, 2)
        t, y = self.process.times(u[:, 0]), self.network.y_embedder.drop(y, u[:, 1])
        with self.accelerator.accumulate(self.model):
            losses = self.process.loss(self._forward, x, y, t=t, noise=noise)  # (B,)
            self.accelerator.backward(poison(losses.mean()))
        self.meter.add(losses.detach(), t / self.process.end_time)

    def update(self) -> None:
        """Take an optimizer step with the gradients, unless they are not finite, and let the averages follow."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, self.step)
        norm = clip(self.network.parameters(), self.cfg.max_grad_norm)
        skipped = ~norm.isfinite()
        step_unless(self.optimizer, skipped)
        self.optimizer.zero_grad()
        self.step += 1
        for ema in self.averages.values():
            ema.update(self.network, self.step)
        self.meter.end_step(norm, skipped)

    # What is written

    def report(self, since: float, steps: int) -> dict[str, Any]:
        """Write the line of this step, with the speed of so many steps since then (of `time.perf_counter`); return it.

        Raises:
            ValueError: Too many steps in a row had to be skipped; names the last checkpoint.
        """
        partial = self.step % self.cfg.log_every > 0  # the last line, should the run end here for good
        values = self.meter.line(partial)
        rate = round(steps * self.cfg.batch_size / (time.perf_counter() - since), 2)  # the device is done, too
        before, most = values.pop("skipped_before"), values.pop("most_in_a_row")
        values |= {"partial": True} if partial else {}
        values |= {"lr": self.optimizer.param_groups[0]["lr"], "images": self.step * self.cfg.batch_size}
        values |= {"images_per_second": rate, "memory_gib": round(peak_memory(self.device) / 2**30, 3)}
        if self.log:
            self.log.add(self.step, values)
            if values["skipped"] > before:
                tqdm.write(
                    f"warning: {values['skipped'] - before} of the steps up to {self.step} skipped, since the loss or its "
                    "gradient was not finite"
                )
        if most >= self.cfg.max_skipped:
            kept = checkpoint.steps(self.folder)
            where = f"the last checkpoint, {kept[-1]}, is good" if kept else "there is no checkpoint yet"
            raise ValueError(
                f"the loss or its gradient was not finite in {most} steps in a row, up to step {self.step} "
                f"(train.max_skipped {self.cfg.max_skipped}); {where}. A new run with a lower train.lr, train.max_grad_norm "
                f"1.0 or train.precision no may help{f'; it can start from --init {kept[-1]}' if kept else ''}."
            )
        return values

    def save(self, last: bool = False) -> None:
        """Write the checkpoint of this step, and draw the loss. All processes call this.

        Raises:
            OSError: It is the last one, and cannot be written; another one may fail.
        """
        record = self._record() | {"skipped": [self.meter.skipped, self.meter.in_a_row]}
        parts = {"model": self.network.state_dict(), "meter": {"rows": self.meter.rows()}}
        parts["optimizer"] = checkpoint.optimizer_tensors(self.network, self.optimizer)
        parts = {name: gather(tensors, self.main) for name, tensors in {**parts, **self._averaged()}.items()}
        if self.log:
            final = folder_of(self.folder, self.step)
            try:
                checkpoint.save(final, self.step, parts, record)
            except OSError as error:
                if last:
                    raise
                self.log.warn("the checkpoint", error)
            else:
                self.log.attempt("what the removal of old checkpoints changes", self._prune)
            self.log.plot()
        self.accelerator.wait_for_everyone()

    def snapshot(self) -> None:
        """Write the power-function averages of this step. All processes call this."""
        averages = {name: gather(t, self.main) for name, t in self._averaged().items() if name != "ema"}
        if self.log and averages:
            record = self._record() | {"ema_stds": self.cfg.ema_stds}
            final = folder_of(self.folder, self.step, SNAPSHOTS)
            self.log.attempt("the snapshot", checkpoint.save, final, self.step, averages, record)

    def preview(self) -> None:
        """Draw a grid with the averaged weights, a row a class. All processes call this."""
        with self.averaged():
            if self.log:
                self.log.attempt(preview_file(self.folder, self.step).name, self._draw_preview)
        self.accelerator.wait_for_everyone()

    def measure(self, stop: StopSignal) -> bool:
        """Draw `fid.num` images with the averaged weights, as sample.py would, and measure them; no image is kept.

        Where images of any process are not finite, there is a warning in the place of a number.

        Returns:
            Whether it came to its end, before a stop signal. All processes call this.
        """
        num, rank, world = self.config.fid.num, self.accelerator.process_index, self.accelerator.num_processes
        s = self.config.sample
        self.evaluator.reset()
        self.drawer.evaluations, self.drawer.drawn, failed = 0, 0, None
        with self.averaged():
            for first in range(0, num, world * s.group_size):
                if stop.requested():
                    return False
                group = first // s.group_size + rank
                index = range(group * s.group_size, min((group + 1) * s.group_size, num))
                if index and not failed:
                    label = functools.partial(random_label, s.seed, num_classes=self.num_classes)
                    try:
                        images = self.drawer.group(group, s.group_size, label, range(len(index)))
                    except NonFiniteError as error:  # the other processes do not know of it, and go on
                        failed = str(error)
                        continue
                    self.evaluator.update(torch.from_numpy(images), index, [label(i) for i in index])
        if failures := [text for text in gather_object([failed]) if text]:
            if self.log:
                self.log.warn(f"the FID of step {self.step}", failures[0])
            return True
        sample = {
            "weights": {"part": "ema", "step": self.step},
            **assemble.describe_sampling(self.config),
            "codec": self.codec.identity,
            **{"labels": "random", "classes": "all", "num": num, "nfe": self.drawer.nfe},
            **{"precision": "no", "tf32": self.cfg.tf32 and self.device.type == "cuda"},
        }
        result = self.evaluator.compute(num, labels_mode="random", quantize="dit", step=self.step, sample=sample)
        if self.log:
            self.log.attempt("fid.jsonl", self._write_result, result)
            self.log.attempt("what the removal of old checkpoints changes", self._prune)  # of what was the best
            tqdm.write(f"step {self.step}, {num} images: {result}")
        self.accelerator.wait_for_everyone()
        return True

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The drawer has the averaged weights, whole, on every process, in the block. All processes call this."""
        self.drawer.weights = f"ema of step {self.step}"
        for name, p in self.copy.named_parameters():
            p.data = whole(self.ema.weights[name])
        try:
            yield
        finally:
            self._return_weights()

    # Parts of the above

    def _draw_preview(self) -> None:
        s, file = self.config.sample, preview_file(self.folder, self.step)
        images = self.drawer.all([k for k in self.classes for _ in range(s.per_class)], s.group_size)
        images = images.reshape(len(self.classes), s.per_class, *images.shape[1:])
        names = [self.shape.class_names[k] for k in self.classes]
        picture = grid(images, names, title=f"step {self.step}, cfg {s.cfg_scale:g}")
        save_picture([picture], file)
        self.log.add_preview(self.step, picture)

    def _return_weights(self) -> None:
        for p in self.copy.parameters():
            p.data = torch.empty(0, device=self.device)

    def _averaged(self) -> dict[str, dict[str, Tensor]]:
        """The averages as state dicts, with the network's buffers."""
        keys = self.network.state_dict().keys()
        buffers = {name: b for name, b in self.network.named_buffers() if name in keys}
        return {name: {**buffers, **ema.weights} for name, ema in self.averages.items()}

    def _record(self) -> dict[str, Any]:
        """What checkpoints and snapshots say of themselves."""
        return {
            "config": to_dict(self.config),
            "shape": to_dict(self.shape),
            "codec": self.codec.identity,
            "num_images": len(self.data),
            "resumed_from": read_origin(self.folder),
            **checkpoint.origin(),
        }

    def _prune(self) -> None:
        if self.cfg.keep_checkpoints:
            best = read_best(self.folder)
            spare = {entry["step"] for entry in best.values()}
            checkpoint.prune(self.folder, self.cfg.keep_checkpoints, self.cfg.keep_every, spare)

    def _write_result(self, result: fid.Result) -> None:
        """Add a measurement to fid.jsonl, fid.png, the tracker and best.json."""
        file = self.folder / "fid.jsonl"
        records = [r for r in read_metrics(file) if r["step"] < self.step] + [result.to_dict()]
        write_text(file, "".join(json.dumps(record) + "\n" for record in records))
        same = ("extractor", "protocol", "num_samples", "reference")
        shown = [r for r in records if all(r[k] == records[-1][k] for k in same)]
        num = self.config.fid.num
        self.log.add_scalars(self.step, {f"{name}-{num}": value for name, value in result.values.items()})
        if name := next((n for n in ("fid", "fd") if n in result.values), None):
            fid.curve(shown, self.folder / "fid.png", f"{self.folder.name}, {result.record['protocol']}")
            least = min(shown, key=lambda r: r[name])
            best = {**read_best(self.folder), f"{name}-{num}": {"value": least[name], "step": least["step"]}}
            write_text(self.folder / BEST_FILE, json.dumps(best, indent=2) + "\n")

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

    def _preload(self) -> None:
        if not self.config.latents:
            raise ValueError("train.preload is for cached latents; name their folder with --latents.")
        if self.cfg.workers(cached=True):
            raise ValueError(f"train.preload needs no train.num_workers, but you gave {self.cfg.num_workers}.")
        self.data.preload(self.device)

    @property
    def _borrowed(self) -> bool:
        """Whether the run goes on from another's checkpoint."""
        return self.start is not None and self.start.resolve().parent != (self.folder / CHECKPOINTS).resolve()

    def _forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network, wrapped or sharded, in the precision of the run, with a float32 output."""
        with self.accelerator.autocast():
            return self.model(x_t, t, y).float()

    def _check_data(self, record: dict[str, Any]) -> None:
        """Raise ValueError if a checkpoint was trained on other data, or through another autoencoder."""
        keys = ("shape", "num_images", "codec")
        now = {"shape": to_dict(self.shape), "num_images": len(self.data), "codec": self.codec.identity}
        if different := differences({k: record[k] for k in keys}, now):
            text = ", ".join(f"{k} {a!r} (now {b!r})" for k, (a, b) in different.items())
            raise ValueError(f"{str(self.start)!r} was trained on other data, or through another autoencoder: {text}.")

    def _lock(self) -> None:
        """Two programs in one folder would take turns to ruin it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder run_dir {str(self.folder)!r}: {error}") from error
        self.lock = FileLock(self.folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another train.py is at work in run_dir {str(self.folder)!r}; wait for it, or stop it."
            ) from None
        except (OSError, NotImplementedError):  # a file system without locks
            self.lock = None


def preview_file(folder: Path, step: int) -> Path:
    """The preview of a step."""
    return folder / "previews" / f"step-{step:08d}.png"


def read_best(folder: Path) -> dict[str, dict[str, Any]]:
    """best.json of a run: name of a distance -> its best value and the step of that."""
    file = folder / BEST_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has had on the GPU, or in the computer's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
