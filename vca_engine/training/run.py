"""The parts of a training run, built and checked before its first step. `train.py` is the loop and the step."""

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from vca_engine import assemble
from vca_engine.config.schema import Config, to_dict
from vca_engine.distributed import full_tensor, on_main_process, part_at_exit
from vca_engine.images.labels import DataInfo
from vca_engine.images.latents import LatentDataset
from vca_engine.images.loader import load, to_device
from vca_engine.images.order import EndlessBatches, NumberedBatches
from vca_engine.precision import mixed_precision, set_tf32
from vca_engine.records import differences, listed
from vca_engine.sampling.guidance import guidance_of
from vca_engine.sampling.image_sampler import ImageSampler, Sample
from vca_engine.training.ema import Ema, constant, name_of, power
from vca_engine.training.meter import Meter
from vca_engine.training.resume import read_resumed_from
from vca_engine.weights import checkpoint
from vca_engine.weights.adapt import initialise
from vca_engine.weights.checkpoint import CHECKPOINTS
from vca_engine.weights.files import attention_of
from vca_engine.weights.recogniser import initialise_recogniser


def make_accelerator(config: Config) -> Accelerator:
    """Find the processes and devices, as the launcher and accelerate's config file say."""
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
    part_at_exit()
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # accelerate's would round weights, inputs and exchanged gradients to bf16; ours is autocast, as without shards.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    return accelerator


class Run:
    """The parts of a run, at the step of the checkpoint that it goes on from.

    Args:
        config: Its settings.
        accelerator: Its processes, as `make_accelerator` gives them.
        start: The checkpoint to go on from; None begins.

    Attributes:
        config: Its settings, with the size of the images and every option of the attention; `cfg` is its group `train`.
        step: Optimizer steps done.
        data: Images, or cached latents; `info` says what a network has to know of them. `views` is what training reads
            of them, and `evaluated_data` what a recogniser is evaluated on, if it is.
        model: The network as it is trained, wrapped or sharded; `network` is the same without the wrapper.
        averages: Name of a file -> average of the weights; `ema` is the one that images are drawn with.
        averaged_network: A copy of the network, to be used within `averaged_weights`.
        image_sampler: Draws images with that; None of a recogniser.
        messages: Sentences to print at the start.

    Raises:
        ValueError: Something does not fit together; says what.
    """

    def __init__(self, config: Config, accelerator: Accelerator, start: Path | None = None) -> None:
        self.config, self.cfg, self.folder = config, config.train, Path(config.run_dir)
        self.is_generator = assemble.is_generator(config)
        self.accelerator, self.device, self.start = accelerator, accelerator.device, start
        set_tf32(self.cfg.tf32)
        self.data = LatentDataset(config.latents) if config.latents else assemble.images(config)
        self.info = DataInfo.of(self.data)
        self.config = config = assemble.with_image_size(config, self.info.image_size)
        self.codec = assemble.codec(config, self.info.channels).to(self.device)
        if self.cfg.channels_last and self.device.type == "cuda":
            self.codec.to(memory_format=torch.channels_last)
        if config.latents:
            self.data.check(assemble.needed_latents(config, self.codec))
            recorded = checkpoint.read_record(start)["config"]["data"] if start else {}
            if not start or recorded.get("images") != config.data.get("images"):
                on_main_process(accelerator.state, lambda: assemble.check_images_of_latents(config, self.data))
        self.step, self.messages = 0, [] if config.latents else [*self.data.notes]
        self.process = assemble.process(config)
        sampler = assemble.sampler(config, self.process) if self.is_generator else None
        network = self._make_network()
        self.views, self.evaluated_data = self.data, None
        if not self.is_generator:
            self.views = self.process.training_views(self.data, config.seed)
            if spec := assemble.spec_to_evaluate(config):
                self.evaluated_data = assemble.images_to_evaluate(spec, self.info)
                self.messages += [f"eval.data: {note}" for note in self.evaluated_data.notes]
        self.num_classes, self.num_parameters = network.num_classes, sum(p.numel() for p in network.parameters())

        record = checkpoint.read_record(start) if start else {"step": 0}
        if start:
            self._check_data(record)
            checkpoint.load_exactly(network, checkpoint.read(start, "model"), start)
            self.step = record["step"]
            if self.continues_another:
                self.messages.append(f"resumes {start}")
        elif config.init:
            start_from = initialise if self.is_generator else initialise_recogniser
            adapted = start_from(network, config.init, self.info.class_names)
            self.messages.append(f"starts from {config.init}: {adapted}")
        self.averaged_network = copy.deepcopy(network).eval().requires_grad_(False).to(self.device)
        self.image_sampler = self._make_image_sampler(sampler) if sampler else None
        _drop_weights(self.averaged_network)
        self._prepare(network)
        self.ema = Ema(self.network, constant(self.cfg.ema_decay, self.cfg.ema_warmup))
        widths = {name_of(std): Ema(self.network, power(std)) for std in self.cfg.ema_stds}
        self.averages = {"ema": self.ema, **widths}
        self.meter = Meter(accelerator)
        if start:
            for name, ema in self.averages.items():
                ema.load(checkpoint.read(start, name))
            checkpoint.load_optimizer(start, self.network, self.optimizer)
            self.meter.load(checkpoint.read(start, "meter")["rows"], record["skipped"])
        self.order = _make_order(self)
        if self.cfg.batch_size > len(self.data):
            given, num = self.cfg.batch_size, len(self.data)
            text = f"note: train.batch_size {given} is more than the {num:,} images; a step is {given / num:.2f} epochs"
            self.messages.append(text)
        if self.cfg.preload:
            self._preload()

    def __str__(self) -> str:
        return (
            f"{self.folder}: {type(self.averaged_network).__name__}, {self.num_parameters:,} parameters; "
            f"{self.cfg.num_steps:,} steps of {self.cfg.batch_size} images, {self.step:,} done; "
            f"{self.accelerator.num_processes} x {self.device.type}, precision {self.accelerator.mixed_precision}\n"
            f"data: {self.describe_data()}"
        )

    def describe_data(self) -> str:
        """Describe the images, their classes with the images of each, and the tokens that a generator makes of one."""
        side, network = self.info.image_size, self.averaged_network
        text = f"{len(self.data):,} images of {side}x{side} pixels, {self.info.describe_classes(self.data.labels)}"
        text += ", each class drawn equally often" if assemble.is_balanced(self.config) else ""
        if not self.is_generator:
            return text
        patch, places = network.patch_size, network.input_size[0]
        of = "pixels" if places == side else f"of latents of {places}x{places}"
        return f"{text}; {math.prod(network.grid_size):,} tokens, patches of {patch}x{patch} {of}"

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Read batches from this step on: images (B, C, H, W) or moments, labels (B,), and positions (B,)."""
        workers = self.cfg.workers(cached=self.config.latents is not None)
        pin = self.device.type == "cuda" and not self.cfg.preload
        loaded = load(self.views, self.order, num_workers=workers, minutes=self.cfg.timeout, pin=pin)
        return to_device(loaded, self.order, self.device)

    def first_images(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read the first images of the next batch, at most so many, as `batches` gives them."""
        keys = next(iter(self.order))[:most]
        x, y = next(load(self.views, [keys], num_workers=0, minutes=self.cfg.timeout, pin=False))
        positions = torch.tensor(self.order.positions(self.order.start)[: len(keys)])
        return x.to(self.device), y.to(self.device), positions.to(self.device)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Let `averaged_network` have the averaged weights, on every process, in the block. All processes call this."""
        if self.image_sampler:
            self.image_sampler.weights = f"ema of step {self.step}"
        for name, p in self.averaged_network.named_parameters():
            p.data = full_tensor(self.ema.weights[name])
        try:
            yield
        finally:
            _drop_weights(self.averaged_network)

    @property
    def continues_another(self) -> bool:
        """True if the run goes on from the checkpoint of another."""
        return self.start is not None and self.start.resolve().parent != (self.folder / CHECKPOINTS).resolve()

    def record(self) -> dict[str, Any]:
        """Describe the run for its checkpoints and snapshots: JSON values."""
        return {
            "config": to_dict(self.config),
            **self._made_of(),
            "num_parameters": self.num_parameters,
            "resumed_from": read_resumed_from(self.folder),
            **checkpoint.versions(),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Collect the tensors of a checkpoint, by the names of its files. All processes call this."""
        return {
            "model": self.network.state_dict(),
            "meter": {"rows": self.meter.rows()},
            "optimizer": checkpoint.optimizer_tensors(self.network, self.optimizer),
            **self.averaged_tensors(),
        }

    def averaged_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Collect the averages as state dicts, with the network's buffers."""
        keys = self.network.state_dict().keys()
        buffers = {name: b for name, b in self.network.named_buffers() if name in keys}
        return {name: {**buffers, **ema.weights} for name, ema in self.averages.items()}

    def _make_network(self) -> nn.Module:
        """Make the network of the config, and write every option of its attention into the config."""
        config = self.config
        if config.init and not self.start and (known := attention_of(config.init)):
            config = assemble.with_attention_of(config, known, "softmax")
        torch.manual_seed(config.seed)
        network = assemble.network(config, self.info, self.codec)
        model = dataclasses.replace(config.model, attention=network.attention)  # as it is, whatever becomes the default
        self.config = dataclasses.replace(config, model=model)
        return network

    def _make_image_sampler(self, sampler: Sample) -> ImageSampler:
        """Make what draws previews and the images to measure."""
        return ImageSampler(
            self.averaged_network,
            sampler,
            self.codec.decode,
            seed=self.config.sample.seed,
            guidance=guidance_of(self.config.sample),
            noise_level=self.process.noise_level,
        )

    def _prepare(self, network: nn.Module) -> None:
        """Bring the network to its device, wrap or shard it, and make its optimizer."""
        cfg = self.cfg
        if cfg.grad_checkpointing:
            assemble.recompute_blocks(network)
        if cfg.compile:
            for block in assemble.blocks(network):
                block.compile()  # in place, so the keys stay
        network = network.to(self.device)
        parameters = list(network.parameters())
        groups = [{"params": parameters}]
        if not self.is_generator:  # without weight decay of gains and biases
            groups = [{"params": [p for p in parameters if p.ndim > 1]}]
            groups += [{"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=cfg.fused
        )
        self.model, optimizer = self.accelerator.prepare(network, optimizer)
        self.network, self.optimizer = self.accelerator.unwrap_model(self.model), optimizer.optimizer
        self.model.train()
        if self.is_generator:
            self.network.y_embedder.eval()  # the step drops the labels

    def _preload(self) -> None:
        if not self.config.latents:
            raise ValueError("train.preload is for cached latents; name their folder with --latents.")
        if self.cfg.workers(cached=True):
            raise ValueError(f"train.preload needs no train.num_workers, but you gave {self.cfg.num_workers}.")
        self.data.preload(self.device)

    def _made_of(self) -> dict[str, Any]:
        """Describe the data and the codec, which are the same in all parts of a run."""
        return {"shape": to_dict(self.info), "codec": self.codec.identity, "num_images": len(self.data)}

    def _check_data(self, record: dict[str, Any]) -> None:
        """Raise ValueError if a checkpoint was trained on other data, or through another autoencoder."""
        now = self._made_of()
        if different := differences({key: record[key] for key in now}, now):
            raise ValueError(
                f"{str(self.start)!r} was trained on other data, or through another autoencoder: {listed(different)}; "
                "choose another --run_dir, or those data."
            )


def _make_order(run: Run) -> EndlessBatches:
    """Make the order in which this process reads the images of a run, from its step on."""
    if run.cfg.batch_size % run.cfg.accumulate:
        larger = run.cfg.accumulate * -(-run.cfg.batch_size // run.cfg.accumulate)  # rounded up
        raise ValueError(
            f"train.batch_size {run.cfg.batch_size} is not a multiple of train.accumulate {run.cfg.accumulate}; "
            f"choose another of the two, e.g. --train.batch_size {larger}."
        )
    order = (EndlessBatches if run.is_generator else NumberedBatches)(
        len(run.data),
        run.cfg.batch_size // run.cfg.accumulate,
        seed=run.config.seed,
        flip=run.data.flip,
        start=run.step * run.cfg.accumulate,
        rank=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
        labels=run.data.labels if assemble.is_balanced(run.config) else None,
    )
    if not run.is_generator:
        run.process.check_batch(len(order.positions(0)))
    return order


def _drop_weights(network: nn.Module) -> None:
    """Free the memory of a network's weights."""
    for p in network.parameters():
        p.data = torch.empty(0, device=p.device)
