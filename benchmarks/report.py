"""What the benchmarks share: parts that take turns, and the JSON with the machine and the aims."""

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


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


def wall() -> float:
    """Seconds, when a GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
