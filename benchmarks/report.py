"""What the benchmarks share: running the parts that were asked for, and the JSON with the machine and the aims."""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def aim(what: str, value: float, least: float = 0.0, most: float = float("inf")) -> dict[str, Any]:
    """An aim, and whether it is met."""
    bound = f">= {least}" if least else f"<= {most}"
    return {"aim": f"{what} {bound}", "value": value, "met": least <= value <= most}


def peak_kib() -> int:
    """Of the resident memory of this process. Not getrusage's, which starts from that of the process which started it."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
