"""Training beside the bare network: what a step, a switch and a checkpoint cost.

    python -m benchmarks.train                                                       # one CPU core: about 15 minutes
    python -m benchmarks.train --device cuda --parts overhead,saving --out benchmarks/results/train_gpu.json
    python -m benchmarks.train --device cuda --parts speed --out benchmarks/results/train_speed_gpu.json

- overhead: a step of train.py over forward, loss, backward and torch's AdamW of the same network on one batch; the same
  without averages; and, within one step, each thing that the bare one does not do.
- speed: [images/s, MiB at the peak] of the default settings and with each switch, of a process of its own each.
- saving: a checkpoint and a snapshot beside `torch.save` of the same tensors, and as shares of training. The files lie
  in TMPDIR, which should be on the disk that matters; XL/2 takes 80 GB.

Contenders take turns, after a warm-up; numbers are medians. Latents and weights are random. A CPU has one thread, two
blocks and small batches, where what costs time for each weight (averages, norm, AdamW) weighs more than in a run of 256
images a step; steps are timed there by the seconds of the process, for others use it, too.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor

import train as program
from benchmarks.report import aim, child_command, peak_kib, run_parts, take_turns, wall
from vca_engine import assemble
from vca_engine.config.reading import from_dict
from vca_engine.config.schema import Config
from vca_engine.images.latents import CACHE_FORMAT
from vca_engine.training.outputs import Outputs
from vca_engine.training.run import Run, make_accelerator
from vca_engine.weights import checkpoint

SIDES = (32, 64)  # of the latents
PLAIN = "accumulate: 1"  # the default settings
SWITCHES = ("compile: true", "fused: false", "grad_checkpointing: true", "accumulate: 4")
OF_GPU = ("precision: no", "precision: no, tf32: false")  # a CPU emulates bf16, 40 times slower


def main() -> None:
    """Runs the parts that were asked for and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", help="S/2, and on a GPU B/2 and XL/2; overhead takes the first")
    parser.add_argument("--batch", type=int, help="256, and 32 of saving; on a CPU 16, and 4 of saving and speed")
    parser.add_argument("--repeats", type=int, help="15 of the overhead, 3 of saving, 1 of speed")
    parser.add_argument("--parts", default="overhead,speed,saving")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_cpu.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cpu = args.device == "cpu"
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measured(**json.loads(args.child))))
        return
    args.depth, args.models = 2 if cpu else None, args.models or ["S/2", *([] if cpu else ["B/2", "XL/2"])]
    run_parts(parser, {"overhead": overhead, "speed": speed, "saving": saving}, args, ("torch", "accelerate", "numpy"))


@contextmanager
def begun(folder: Path, model: dict[str, Any], side: int, **train: Any) -> Iterator[tuple[Run, Outputs]]:
    """Begin a run of a DiT on random cached latents, of `write_caches`."""
    values = {"run_dir": f"{folder}/run", "process": {"name": "diffusion"}, "codec": {"name": "pixels"}, "model": model}
    values |= {"data": {"name": "folder", "images": "none", "image_size": side}, "latents": f"{folder}/latents{side}"}
    values["train"] = {"tracker": "none", **train}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    config = from_dict(Config, values, "benchmarks/train.py")
    run, outputs = program.prepare(config, make_accelerator(config))
    with outputs:
        yield run, outputs


def write_caches(folder: Path) -> None:
    """Write random moments of 4 channels as `CacheWriter` leaves them, of a codec that only passes them on."""
    rng = np.random.default_rng(0)
    for side in SIDES:
        cache, about = folder / f"latents{side}", {"image_size": side, "flip": True}
        cache.mkdir()
        np.save(cache / "shard-00000.npy", rng.standard_normal((256, 2, 8, side, side), dtype=np.float32).astype("f2"))
        np.save(cache / "labels.npy", rng.integers(0, 1000, 256))
        made_of = {"data": {"name": "folder", **about}, "codec": {"name": "pixels"}}
        settings = {**about, **made_of, "class_names": [str(c) for c in range(1000)], "channels": 4}
        shards = [{"file": "shard-00000.npy", "num_images": 256, "sha256": ""}]
        manifest = {"version": CACHE_FORMAT, "settings": settings, "num_images": 256, "shape": [8, side, side]}
        (cache / "manifest.json").write_text(json.dumps({**manifest, "shards": shards}))


def overhead(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a step beside the bare network's, and of its parts."""
    write_caches(folder)
    cpu, model, repeats = args.device == "cpu", {"size": args.models[0], "depth": args.depth}, args.repeats or 15
    batch, now = args.batch or (16 if cpu else 256), time.process_time if cpu else wall
    with begun(folder, model, 32, batch_size=batch) as (run, _):
        ours = partial(program.take_step, run, batches := run.batches())
        jobs = {"bare": bare_step(run), "bare, another": bare_step(run), "a step": ours}
        jobs["without power averages"] = patch.object(run, "averages", {"ema": run.ema})(ours)
        jobs["without averages"] = patch.object(run, "averages", {})(ours)
        seconds, median = take_turns(jobs, repeats, 1 if cpu else 10, now)
        parts = parts_of(run, batches, repeats, now)
    over = {name: [*np.quantile(np.divide(one, seconds["bare"]), [0.25, 0.5, 0.75])] for name, one in seconds.items()}
    core = np.sum([parts.pop(name) for name in ("loss", "backward", "AdamW")], axis=0)  # (repeats,)
    parts["all but loss, backward and AdamW"] = np.subtract(parts.pop("step"), core)
    shares = {name: [*np.quantile(np.divide(one, core), [0.25, 0.5, 0.75])] for name, one in parts.items()}
    ratio = 1 + shares["all but loss, backward and AdamW"][1] if cpu else over["a step"][1]  # a CPU's turns are noisy
    return {
        "sizes": {**model, "parameters": run.num_parameters, "batch": batch, "latents": [4, 32, 32]},
        "precision": run.accelerator.mixed_precision,
        "median seconds": median,
        "over bare, quartiles": over,
        "in one step, over its loss, backward and AdamW, quartiles": shares,
        "seconds": seconds,
        "aims": [aim("time of a step over the bare network's", float(ratio), most=1.03)],
    }


def bare_step(run: Run) -> Callable:
    """Forward, loss, backward and AdamW of a network like the run's, always of the same batch and random draws."""
    device, bf16 = run.device, run.accelerator.mixed_precision == "bf16"
    network = assemble.network(run.config, run.info, run.codec).to(device)
    network.y_embedder.eval()  # the labels are as they are
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=run.cfg.fused)
    x, noise = torch.randn(2, run.cfg.batch_size, 4, 32, 32, device=device)
    y, t = torch.randint(1000, (2, run.cfg.batch_size), device=device)
    model = convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16, enabled=bf16)(network.forward))

    def job() -> None:
        run.process.loss(model, x, y, t=t, noise=noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return job


def parts_of(run: Run, batches: Iterator, repeats: int, now: Callable) -> dict[str, list[float]]:
    """Seconds of each part of a step, in each of `repeats` steps; a GPU finishes each before the next begins."""
    optimizer, meter = run.optimizer, run.meter
    places = [("loss", run.process, "loss"), ("backward", run.accelerator, "backward")]
    places += [("AdamW", optimizer, "step"), ("AdamW", optimizer, "zero_grad")]
    places += [("norm of the gradient", program, "clip"), ("finite check of the loss", program, "nan_if_not_finite")]
    places += [("random draws", program, "draws"), ("random draws", program, "draw")]
    places += [("meter", meter, "add"), ("meter", meter, "end_step")]
    places += [(name, ema, "update") for name, ema in run.averages.items()]
    found: dict[str, list[float]] = {name: [] for name in (*dict(p[:2] for p in places), "loader", "step")}

    def timed(name: str, function: Callable, *given: Any, **named: Any) -> Any:
        start = now()
        result = function(*given, **named)
        found[name][-1] += now() - start
        return result

    loader = iter(partial(timed, "loader", next, batches), None)
    with ExitStack() as stack:
        for name, owner, method in places:
            stack.enter_context(patch.object(owner, method, partial(timed, name, getattr(owner, method))))
        for _ in range(repeats):
            for values in found.values():
                values.append(0.0)
            timed("step", program.take_step, run, loader)
    return found


def speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """[images per second, MiB at the peak], of a process of its own each, or how that ended."""
    write_caches(folder)
    cpu, found, batch = args.device == "cpu", {}, args.batch or (4 if args.device == "cpu" else 256)
    for size, attention, side in itertools.product(args.models, ("mhsa", "vca"), SIDES):
        model = {"size": size, "depth": args.depth, "attention": {"name": attention}}
        runs: dict[str, list] = {name: [] for name in (PLAIN, *SWITCHES, *(() if cpu else OF_GPU))}
        for _, name in itertools.product(range(args.repeats or 1), runs):
            job = {"folder": str(folder), "model": model, "side": side, "batch_size": batch}
            job = json.dumps(job | yaml.safe_load(f"{{{name}}}"))
            command = child_command("train", "--device", args.device, "--child", job)
            done = subprocess.run(command, capture_output=True, text=True)
            said = [line for line in done.stderr.splitlines() if "Error" in line]
            error = (
                "out of memory" if "OutOfMemoryError" in done.stderr else f"exit code {done.returncode}: {said[-1:]}"
            )
            runs[name].append(error if done.returncode else json.loads(done.stdout.splitlines()[-1]))
            print(f"{size} {attention} {side}, {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
        good = {n: np.median(ones, axis=0) for n, ones in runs.items() if not any(isinstance(one, str) for one in ones)}
        found[f"{size}, {attention}, latents {side}"] = {
            **{name: good[name].tolist() if name in good else ones[-1] for name, ones in runs.items()},
            f"over {PLAIN}": {n: (value / good[PLAIN]).tolist() for n, value in good.items() if PLAIN in good},
            "all": runs,
        }
    return {"sizes": {"depth": args.depth, "batch": batch}, **found, "aims": []}


def measured(folder: str, model: dict[str, Any], side: int, **options: Any) -> list[float]:
    """Images per second, and MiB at the peak: of the GPU's memory, or of this process."""
    with begun(Path(folder), model, side, **options) as (run, _):
        cuda, one = run.device.type == "cuda", partial(program.take_step, run, run.batches())
        one()  # compiled, and the optimizer's state is there
        _, median = take_turns({"step": one}, 5, 5 if cuda else 1, wall if cuda else time.process_time)
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_kib() / 2**10
        return [run.cfg.batch_size / median["step"], peak]


def saving(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of what training writes, for whole networks, beside those of a step and of torch.save."""
    write_caches(folder)
    batch, found = args.batch or (4 if args.device == "cpu" else 32), {}
    for size in args.models:
        with begun(folder, {"size": size}, 32, batch_size=batch) as (run, outputs):
            _, of_step = take_turns({"step": partial(program.take_step, run, run.batches())}, 3, 1, wall)
            outputs.report(1.0, 4)  # a line to draw
            cfg, parts = run.cfg, {}
            with patch.object(checkpoint, "save", lambda *given, parts=parts: parts.update(given[2])):
                outputs.save()
            plain = partial(plainly_saved, parts, run.folder / "plain.pt")
            jobs = {"save": partial(outputs.save, last=True), "snapshot": outputs.snapshot, "torch.save": plain}
            seconds, median = take_turns(jobs, args.repeats or 3, 1, wall)  # each in the place of the one before
        num_bytes = sum(z.nbytes for tensors in parts.values() for z in tensors.values())
        found[size] = {
            "bytes": num_bytes,
            "median seconds": {**of_step, **median},
            "share of training, save": median["save"] / of_step["step"] / cfg.checkpoint_every,
            "share of training, snapshot": median["snapshot"] / of_step["step"] / cfg.snapshot_every,
            "bytes per second": {name: num_bytes / median[name] for name in ("save", "torch.save")},
            "speed of save over torch.save": np.median(np.divide(seconds["torch.save"], seconds["save"])),
            "seconds": seconds,
        }
    return {"sizes": {"batch": batch, "latents": [4, 32, 32]}, **found, "aims": []}


def plainly_saved(parts: dict[str, dict[str, Tensor]], file: Path) -> None:
    """All of it in one file of torch's, on the disk, and then in the place of the one before."""
    torch.save(parts, new := file.with_suffix(".new"))
    checkpoint._flush(new)
    new.replace(file)


if __name__ == "__main__":
    main()
