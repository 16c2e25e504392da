r"""Attention layers beside full attention: time and memory by the number of tokens, and how far they are from the floor.

    python -m benchmarks.attention --rounds 2 --grids 8 16                            # a look: a minute
    python -m benchmarks.attention --passes "forward + backward" --rounds 10          # one busy CPU core: 7 minutes
    python -m benchmarks.attention --device cuda --compile --grids 8 16 24 32 48 64 96 128 \
        --widths 384 768 1152 --contrast 16 64 256 N/4 --out benchmarks/results/attention_gpu.json
    python -m benchmarks.attention --draw                                             # the plot of --out anew

Every attention of `vca.ATTENTIONS` in its forms; `mhsa, again` is `mhsa` a second time: how far its ratios are from 1 is
how noisy the others are. All of a cell (width, grid) take turns, after a warm-up; a ratio is that to `mhsa` of the same
round, both with torch.compile or both without; numbers are medians, `fastest` is the ratio of the fastest rounds. Batch
times tokens is constant while a batch has more than one image.

- forward: without gradients. forward + backward: gradients of the input and of all parameters for one of the output.
- A CPU has one thread and float32, and is timed by the seconds of the process, for others use it, too; a GPU has autocast
  to bf16. Memory is that of the tensors which the call makes, at their peak.
- floor: the larger of FLOPs / rate of a large matrix product and bytes / rate of a large copy, both measured here. FLOPs are
  those of the products, softmax without what a kernel computes again, backward twice forward. Bytes are those that any such
  layer moves when all between its products is fused, see `least_bytes`.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import aim, run_parts, take_turns, use_device
from vca import ATTENTIONS

HEADS = {384: 6, 768: 12, 1152: 16}  # of S, B and XL
PASSES = ("forward", "forward + backward")
EVERYTHING = {
    "grids": [8, 16, 32, 64, 128],
    "widths": [*HEADS],
    "contrast": ["16", "64", "256", "N/4"],
    "passes": PASSES,
}
AIMS = {16: (1.10, 1.10), 32: (0.55, 0.60), 64: (0.18, 0.20), 128: (0.06, 0.07)}  # vca, n 64 over mhsa: CPU, GPU
STYLES = {"n 16": ":", "n 256": "-.", "n N/4": "--"}
COLOURS = {"mhsa": "black", "differential": "tab:purple", "linear": "tab:green", "agent": "tab:blue", "vca": "tab:red"}


def main() -> None:
    """Measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--grids", type=int, nargs="+", default=[8, 16, 32, 64], help="sides of the maps of tokens")
    parser.add_argument("--widths", type=int, nargs="+", default=[384], choices=HEADS, help="channels")
    parser.add_argument("--contrast", nargs="+", default=["64", "N/4"], help="contrast tokens: squares, or N/4")
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
    parser.add_argument("--tokens", type=int, help="of a batch: 4096, on a GPU 65536")
    parser.add_argument("--compile", action="store_true", help="everything with torch.compile, too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=10, help="seconds a call: what would take longer is left out")
    parser.add_argument("--parts", default="layer", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_cpu.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/attention_speed.png"))
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the plot of --out")
    args = parser.parse_args()
    use_device(args, 10)
    torch._dynamo.config.recompile_limit = 1000  # one `forward` for all forms
    args.tokens = args.tokens or (4096 if args.cpu else 65536)
    if not args.draw:
        run_parts(parser, {"layer": layer}, args, ("torch", "numpy"))
    draw(json.loads(args.out.read_text()), args.plot)


def forms_of(contrast: list[str], side: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> attention and its options, of those whose contrast grid fits the grid of tokens."""
    forms: dict[str, tuple[str, dict[str, Any]]] = {
        "mhsa": ("mhsa", {}),
        "mhsa, again": ("mhsa", {}),
        "mhsa, dwc": ("mhsa", {"dwc": True}),
        "differential": ("differential", {}),
        "linear": ("linear", {}),
    }
    for n in contrast:
        grid = side // 2 if n == "N/4" else math.isqrt(int(n))
        if grid <= side:
            options = {"contrast_grid": (grid, grid)}
            forms[f"vca, n {n}"] = ("vca", options)
            forms[f"vca separate, n {n}"] = ("vca", {**options, "softmax": "separate"})
            forms[f"agent, n {n}"] = ("agent", options)
    return forms


def layer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cells, and what follows from them."""
    rates = {"FLOPs per second": matmul_rate(args), "bytes per second": copy_rate(args)}
    cells: dict[str, Any] = {}
    for width, side in itertools.product(args.widths, args.grids):
        cells[f"C {width}, {side}x{side}"] = cell(args, rates, width, side)
        print(f"C {width}, {side}x{side}: {brief(cells[f'C {width}, {side}x{side}'])}", file=sys.stderr, flush=True)
    controls = [row["over mhsa, quartiles"] for _, _, name, row in rows_of(cells) if "again" in name]
    return {
        "precision": "float32" if args.cpu else "autocast to bfloat16",
        "rounds": args.rounds,
        "calls a turn": args.times,
        "torch.compile": args.compile,
        "not run": {key: [v for v in every if v not in getattr(args, key)] for key, every in EVERYTHING.items()},
        **rates,
        "mhsa over mhsa": {
            "medians of the cells, from and to": [min(c[1] for c in controls), max(c[1] for c in controls)],
            "quartiles of the rounds, from and to": [min(c[0] for c in controls), max(c[2] for c in controls)],
        },
        "slopes": slopes(cells),
        "tokens from which it is faster than mhsa": crossings(cells),
        "cells": cells,
        "aims": list(aims(args, cells)),
    }


def cell(args: argparse.Namespace, rates: dict[str, float], width: int, side: int) -> dict[str, Any]:
    """All forms of one width and grid: rows by pass and name, and what was left out and why."""
    batch, forms = max(1, args.tokens // side**2), forms_of(args.contrast, side)
    x = torch.randn(batch, side**2, width, device=args.device, requires_grad=True)
    gradient, found = torch.randn_like(x), {"tokens": side**2, "batch": batch, "left out": {}}
    for what in args.passes:
        jobs, rows = {}, {}
        torch._dynamo.reset()
        for (name, (attention, options)), compiled in itertools.product(forms.items(), {False, args.compile}):
            build = partial(ATTENTIONS[attention], width, HEADS[width], side, layer_index=3, **options)
            row = floor(args, rates, build, x, what)
            name = f"{name}, compiled" if compiled else name
            if row["floor, seconds"] > args.limit:
                found["left out"][f"{what}: {name}"] = f"at least {row['floor, seconds']:.0f} s a call"
                continue
            module = build().to(args.device)
            call = torch.compile(module, dynamic=False) if compiled else module
            job = partial(call_once, call, list(module.parameters()), x, gradient, what)
            try:
                job()  # compiled, and what is made once is made
                rows[name] = {"peak MiB": peak_mib(args.device, job), **row}
            except torch.OutOfMemoryError:
                found["left out"][f"{what}: {name}"] = "out of memory"
                continue
            jobs[name] = job
        seconds, median = take_turns(jobs, args.rounds, args.times, args.now)
        for name, row in rows.items():
            base = "mhsa, compiled" if name.endswith("compiled") else "mhsa"
            over = np.divide(seconds[name], seconds[base])
            row |= {
                "milliseconds an image": 1000 * float(median[name]) / batch,
                "over mhsa, quartiles": np.quantile(over, [0.25, 0.5, 0.75]).tolist(),
                "over mhsa, fastest": min(seconds[name]) / min(seconds[base]),
                "memory over mhsa": row["peak MiB"] / rows[base]["peak MiB"],
                "over the floor": float(median[name]) / row["floor, seconds"],
                "seconds": seconds[name],
            }
        found[what] = rows
    return found


def call_once(module: Callable, parameters: list[nn.Parameter], x: Tensor, gradient: Tensor, what: str) -> None:
    """One forward pass, or forward and backward."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        if what == "forward":
            with torch.no_grad():
                module(x)
            return
        y = module(x)
    torch.autograd.grad(y, [x, *parameters], gradient.to(y.dtype))


# The floor


def floor(args: argparse.Namespace, rates: dict[str, float], build: Callable, x: Tensor, what: str) -> dict[str, Any]:
    """FLOPs and bytes of a call, and the seconds that they take at the measured rates."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # shapes only
        build()(torch.empty(x.shape))
    flops = counter.get_total_flops() * (1 if what == "forward" else 3)
    num_bytes = least_bytes(*x.shape, 4 if args.cpu else 2, what)
    seconds = {"FLOPs": flops / rates["FLOPs per second"], "bytes": num_bytes / rates["bytes per second"]}
    limit = max(seconds, key=seconds.get)
    return {"FLOPs": flops, "bytes": num_bytes, "floor, seconds": seconds[limit], "floor is of": limit}


def least_bytes(batch: int, tokens: int, width: int, size: int, what: str) -> int:
    """Bytes to and from memory of a layer of this call when nothing but its products reads or writes it.

    In units of B N C numbers. Forward: read x (1), write and read q, k, v (6), write and read what `proj` takes (2), write y
    (1). Backward: read the gradient of y twice (2) and what `proj` took (1), write and read its gradient (2), read q, k, v
    and the output of the attention (4), write those of q, k, v once and read them twice (9), read x (1), write its gradient
    (1). The 4 C^2 weights are read, backward also their gradients written. The contrast tokens are not counted.
    """
    units, weights = (10, 4) if what == "forward" else (10 + 20, 4 + 8)
    return size * (units * batch * tokens * width + weights * width**2)


def matmul_rate(args: argparse.Namespace) -> float:
    """FLOPs per second of a large matrix product in the precision of the run, the fastest of several."""
    n, dtype = (1024, torch.float32) if args.cpu else (8192, torch.bfloat16)
    a, b = torch.randn(2, n, n, device=args.device, dtype=dtype)
    out = torch.empty_like(a)
    seconds, _ = take_turns({"": partial(torch.mm, a, b, out=out)}, 20, 1 if args.cpu else 5, args.now)
    return 2 * n**3 / min(seconds[""])


def copy_rate(args: argparse.Namespace) -> float:
    """Bytes read and written per second by a large copy, the fastest of several."""
    a = torch.zeros(2**26 if args.cpu else 2**29, device=args.device)  # 256 MiB, or 2 GiB: beyond any cache
    b = torch.zeros_like(a)
    seconds, _ = take_turns({"": partial(b.copy_, a)}, 20, 1 if args.cpu else 5, args.now)
    return 2 * a.nbytes / min(seconds[""])


def peak_mib(device: str, job: Callable) -> float:
    """MiB of the tensors of a call at their peak, without those that were there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return float(np.cumsum(changes).max()) / 2**20


# What follows


def rows_of(cells: dict[str, Any]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Cell, pass, name and row of all that was measured."""
    return [(k, what, name, row) for k, c in cells.items() for what in PASSES for name, row in c.get(what, {}).items()]


def series(cells: dict[str, Any], value: Callable[[dict[str, Any]], float]) -> dict[str, tuple[list, list]]:
    """`C 384, forward: mhsa` -> tokens, rising, and values."""
    found: dict[str, tuple[list, list]] = {}
    for key, what, name, row in sorted(rows_of(cells), key=lambda one: cells[one[0]]["tokens"]):
        tokens, values = found.setdefault(f"{key.split(',')[0]}, {what}: {name}", ([], []))
        tokens.append(cells[key]["tokens"])
        values.append(value(row))
    return found


def slopes(cells: dict[str, Any]) -> dict[str, float]:
    """Exponent p of time ~ tokens^p, fitted to the three largest grids: 2 is quadratic, 1 linear."""
    times = series(cells, lambda row: row["milliseconds an image"])
    logs = {name: np.log([tokens[-3:], values[-3:]]) for name, (tokens, values) in times.items()}
    return {name: float(np.polyfit(*log, 1)[0]) for name, log in logs.items() if log.shape[1] == 3}


def crossings(cells: dict[str, Any]) -> dict[str, float | str]:
    """Tokens at which the median ratio falls below 1, between two grids by a straight line in logarithms."""
    found: dict[str, float | str] = {}
    for name, (tokens, ratios) in series(cells, lambda row: row["over mhsa, quartiles"][1]).items():
        if ": mhsa" in name:
            continue
        above = [i for i, ratio in enumerate(ratios) if ratio >= 1]
        last = above[-1] if above else -1
        if last == len(ratios) - 1:
            found[name] = f"not up to {tokens[-1]}"
        elif last < 0:
            found[name] = f"at most {tokens[0]}"
        else:
            (r0, r1), (t0, t1) = np.log(ratios[last : last + 2]), np.log(tokens[last : last + 2])
            found[name] = float(np.exp(t0 + (t1 - t0) * r0 / (r0 - r1)))
    return found


def aims(args: argparse.Namespace, cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Forward + backward of vca at C 384 and n 64 over that of mhsa, and memory at 4096 tokens."""
    found, name = [], "vca, n 64, compiled" if not args.cpu and args.compile else "vca, n 64"
    for side, most in AIMS.items():
        row = cells.get(f"C 384, {side}x{side}", {}).get(PASSES[1], {}).get(name)
        if row:
            found.append(aim(f"{name} over mhsa at {side**2}", row["over mhsa, quartiles"][1], most=most[not args.cpu]))
        if row and side == 64:
            found.append(aim(f"memory of {name} over mhsa at {side**2}", row["memory over mhsa"], most=1.2))
    return found


def brief(found: dict[str, Any]) -> str:
    """Median ratios of a cell, in one line."""
    ratios = {w: {n: round(r["over mhsa, quartiles"][1], 3) for n, r in found.get(w, {}).items()} for w in PASSES}
    return json.dumps(ratios | {"left out": found["left out"]})


def draw(found: dict[str, Any], plot: Path) -> None:
    """Time an image and its ratio to mhsa by the number of tokens, forward + backward of the smallest width."""
    cells, machine = (
        found["layer"]["cells"],
        f"one thread of {found['cpu']}" if found["device"] == "cpu" else found["device"],
    )
    channels = min(int(key.split(",")[0].removeprefix("C ")) for key in cells)
    start, compiled = f"C {channels}, {PASSES[1]}: ", any(name.endswith("compiled") for _, _, name, _ in rows_of(cells))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    for axes, value in (
        (left, lambda row: row["milliseconds an image"]),
        (right, lambda row: row["over mhsa, quartiles"][1]),
    ):
        for key, (tokens, values) in series(cells, value).items():
            name = key.removeprefix(start)
            if not key.startswith(start) or name.startswith(("mhsa,", "vca separate")) or compiled != ("comp" in name):
                continue
            slope = found["layer"]["slopes"].get(key)
            label = name + (f"  (N$^{{{slope:.2f}}}$)" if slope else "")
            style = next((style for n, style in STYLES.items() if n in name), "-")
            axes.plot(tokens, values, style, marker="o", ms=4, color=COLOURS[name.split(",")[0]], label=label)
        tokens = sorted({one["tokens"] for one in cells.values()})
        axes.set(xscale="log", yscale="log", xlabel="tokens N; pixels at patch 2 behind an autoencoder of 8")
        axes.set_xticks(tokens, [f"{t:,}\n{16 * math.isqrt(t)} px" for t in tokens])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set(ylabel="milliseconds an image", title=f"Forward + backward of one layer, C {channels}")
    left.legend(frameon=False, fontsize=9, title="exponent, three largest N", title_fontsize=9)
    ticks = [0.1, 0.2, 0.5, 1, 2]
    right.set_yticks(ticks, [str(t) for t in ticks])
    right.axhline(1, color="grey", lw=1)
    right.set(ylabel="time over that of mhsa", title=f"{found['layer']['precision']}, {machine}")
    figure.savefig(plot, dpi=150)
    print(f"Wrote {plot}")


if __name__ == "__main__":
    main()
