"""What the benchmarks share: parts that take turns, and the JSON with the machine and the aims."""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def run_parts(parser: argparse.ArgumentParser, parts: dict[str, Callable], args: Any, packages: Sequence[str]) -> None:
    """Runs those of `parts` that --parts names, each in a folder of its own, and writes the JSON to --out."""
    chosen = args.parts.split(",")
    if not parts.keys() >= set(chosen):
        parser.error(f"--parts is {args.parts!r}; choose from {','.join(parts)}.")
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "cpu": model[1] if model else None,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
        "load_before": os.getloadavg(),
    }
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = parts[name](args, Path(folder))
        print(f"{name}: {json.dumps(found[name], indent=2)}", flush=True)
    found["load_after"] = os.getloadavg()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    for one in (one for name in chosen for one in found[name]["aims"]):
        print(f"{'met' if one['met'] else 'NOT MET'}: {one['aim']}: {one['value']:.3g}")


def use_device(args: argparse.Namespace, times: int) -> None:
    """Sets what --device means: a CPU has one thread and is timed by the seconds of the process, as others use it, too.

    A GPU makes `times` calls a turn, timed by the clock.
    """
    args.cpu = args.device == "cpu"
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    args.now, args.times = (time.process_time, 1) if args.cpu else (wall, times)


def child_command(benchmark: str, *words: Any) -> list[str]:
    """Give the command that runs a benchmark of this folder in a process of its own."""
    return [sys.executable, "-m", f"benchmarks.{benchmark}", *map(str, words)]


def aim(what: str, value: float, least: float = 0.0, most: float = float("inf")) -> dict[str, Any]:
    """An aim, and whether it is met."""
    bound = f">= {least}" if least else f"<= {most}"
    return {"aim": f"{what} {bound}", "value": value, "met": least <= value <= most}


def peak_kib() -> int:
    """Of the resident memory of this process. Not getrusage's, which starts from that of the process which started it."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_mib(args: argparse.Namespace, job: Callable) -> float:
    """MiB at the peak of two calls: of the GPU's memory, or of this process with all that it has imported."""
    job()
    job()
    return peak_kib() / 2**10 if args.cpu else torch.cuda.max_memory_allocated() / 2**20


def peak_of_child(benchmark: str, **job: str) -> float | str:
    """`peak_mib` of a process of its own, which has the same options and --child; else how it ended."""
    words = [*sys.argv[1:], "--child", json.dumps(job)]
    done = subprocess.run(child_command(benchmark, *words), capture_output=True, text=True)
    return f"exit code {done.returncode}" if done.returncode else json.loads(done.stdout.splitlines()[-1])


def take_turns(jobs: dict[str, Callable], repeats: int, times: int, now: Callable) -> tuple[dict, dict]:
    """Seconds a call of each job, and their medians; the first turn is the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat, (name, job) in itertools.product(range(repeats + 1), jobs.items()):
        start = now()
        for _ in range(times):
            job()
        if repeat:
            seconds[name].append((now() - start) / times)
    return seconds, {name: np.median(values) for name, values in seconds.items()}


def compare(
    args: argparse.Namespace, title: str, make: Callable, peak: Callable, base: str, others: Sequence[str]
) -> dict[str, Any]:
    """Each contender in turn with `base`, two at a time, for more of the largest do not fit a GPU.

    Args:
        args: Of the command line.
        title: Of what is printed.
        make: Name -> job.
        peak: Name -> MiB.
        base: Name of the one that all are compared with.
        others: Names of the others; one that ends in ", again" is a contender a second time.
    """
    found: dict[str, Any] = {}
    seconds_of_base: list[float] = []
    for name in others:
        try:
            seconds, median = take_turns(
                {key: make(key.removesuffix(", again")) for key in (base, name)}, args.rounds, args.times, args.now
            )  # nothing of the two is left
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
            continue
        seconds_of_base += seconds[base]
        over = np.quantile(np.divide(seconds[name], seconds[base]), [0.25, 0.5, 0.75])
        rate = args.batch / float(median[name])
        found[name] = {"images per second": rate, f"time over {base}, quartiles": over.tolist(), "seconds": seconds}
        print(f"{title}, {name}: {rate:.3g} images/s, {over.round(3)} of {base}'s", file=sys.stderr, flush=True)
    if seconds_of_base:
        found[base] = {"images per second": args.batch / float(np.median(seconds_of_base))}
    for name, row in found.items():
        if isinstance(row, dict) and "again" not in name:
            row["peak MiB"] = peak(name)
    return found


def training_job(args: argparse.Namespace, network: nn.Module, loss: Callable) -> Callable:
    """A step of train.py: `loss(model)`, backward, the norm of the gradient, AdamW, an average of the weights.

    bf16 on a GPU, and with --compile compiled blocks.
    """
    # Here, so that they are not in the memory that other benchmarks measure.
    from vca_engine.training.ema import Ema, constant
    from vca_engine.training.step import clip

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    average, steps, model = Ema(network, constant(0.9999, False)), itertools.count(1), prepared(args, network)

    def job() -> None:
        loss(model).backward()
        clip(network.parameters(), None)
        optimizer.step()
        optimizer.zero_grad()
        average.update(network, next(steps))

    return job


def prepared(args: argparse.Namespace, network: nn.Module) -> Callable:
    """The network as it is called: on a GPU in bf16, with --compile by compiled blocks; its output is float32."""
    from vca_engine import assemble  # as above
    from vca_engine.precision import set_tf32

    set_tf32(True)
    if args.compile:
        torch._dynamo.config.recompile_limit = 1000  # one `forward` for all contenders: after eight torch would give up
        for block in assemble.blocks(network):
            block.compile()

    def model(*given: Any) -> Any:
        with torch.autocast(args.device, torch.bfloat16, enabled=not args.cpu):
            return network(*given).float()

    return model


def wall() -> float:
    """Seconds, when a GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
