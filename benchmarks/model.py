r"""Whole networks: images a second and memory of training and sampling, by attention, beside the published trainer's step.

    python -m benchmarks.model --rounds 2 --attentions mhsa vca                       # a look
    python -m benchmarks.model                                                        # one CPU core: S/2 at 256 pixels
    python -m benchmarks.model --device cuda --compile --batch 64 --out benchmarks/results/model_gpu.json \
        --cases S/2:256 B/2:256
    python -m benchmarks.model --device cuda --compile --batch 16 --out benchmarks/results/model_large_gpu.json \
        --cases XL/2:256 S/2:512 B/2:512 XL/2:512 S/2:1024

- training: a step of what train.py does to a DiT: the hybrid loss, backward, the norm of the gradient, AdamW, an average of
  the weights; bf16 on a GPU, and with --compile compiled blocks.
- sampling: one evaluation of the network with guidance, so of twice the images.
- profile: the share of each operator in a training step of the first case.
- as published: the same training step after the structure that the published trainer of DiT is described to have, written
  anew: float32, the attention of timm, an average updated by a loop over the weights, the loss read at each step.

Contenders of a case take turns with `mhsa`, after a warm-up; numbers are medians, ratios those to `mhsa` of the same round.
`mhsa, again` is the control. Memory is that of a process of its own each. Weights and latents are random. A case is
SIZE/PATCH:PIXELS, of which the latents have an eighth. A CPU has one thread, and is timed by the seconds of the process, for
others use it, too.
"""

import argparse
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.layers
import torch
from torch import nn

from benchmarks.report import aim, compare, peak_mib, peak_of_child, prepared, run_parts, training_job, use_device
from dit_vca.diffusion import Diffusion
from vca import ATTENTIONS, Transformer, parse_size

ALL = ("S/2:256", "B/2:256", "XL/2:256", "S/2:512", "B/2:512", "XL/2:512", "S/2:1024")
PUBLISHED = "mhsa, as published"


def main() -> None:
    """Measures, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cases", nargs="+", default=["S/2:256"], metavar="SIZE/PATCH:PIXELS")
    parser.add_argument("--attentions", nargs="+", default=[*ATTENTIONS], choices=[*ATTENTIONS])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--depth", type=int, help="fewer blocks than the size has")
    parser.add_argument("--compile", action="store_true", help="compiled blocks, but of the step as published")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", default="training,sampling,profile")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/model_cpu.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    use_device(args, 5)
    if args.child:
        part, case, name = json.loads(args.child).values()
        print(json.dumps(peak_mib(args, JOBS[part](args, case, name))))
        return
    run_parts(parser, {"training": training, "sampling": sampling, "profile": shares}, args, ("torch", "timm", "numpy"))


def training(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Training steps of each case."""
    found = {case: compare_attentions(args, "training", case) for case in args.cases}
    speed = {case: one[PUBLISHED]["time over mhsa, quartiles"][1] for case, one in found.items() if PUBLISHED in one}
    least = 1.0 if args.cpu else 3.0
    aims = [aim(f"speed of mhsa over {PUBLISHED}, {k}", v, least) for k, v in speed.items()]
    return {**found, "not run": [case for case in ALL if case not in args.cases], "aims": aims}


def sampling(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Evaluations of the network with guidance, of each case."""
    return {**{case: compare_attentions(args, "sampling", case) for case in args.cases}, "aims": []}


def shares(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Operators by their share of a training step of the first case, and that of what is neither product nor attention."""
    found, kind = {}, "CPU" if args.cpu else "CUDA"
    for name in ("mhsa", "vca"):
        job = train_job(args, args.cases[0], name)
        job()
        with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
            for _ in range(3):
                job()
        times = {e.key: e.self_cpu_time_total if args.cpu else e.self_device_time_total for e in profile.key_averages()}
        total = sum(times.values())
        part = {
            key: value / total for key, value in sorted(times.items(), key=lambda one: -one[1]) if value > 0.005 * total
        }
        core = re.compile(r"mm$|gemm|nvjet|cutlass|attention|flash|fmha|sdpa", re.IGNORECASE)
        found[name] = {"the rest": 1 - sum(v for key, v in part.items() if core.search(key)), "shares": part}
    return {"case": args.cases[0], **found, "aims": []}


def compare_attentions(args: argparse.Namespace, part: str, case: str) -> dict[str, Any]:
    """Each contender in turn with `mhsa`."""
    others = ["mhsa, again", *(name for name in args.attentions if name != "mhsa")]
    others += [PUBLISHED] if part == "training" else []
    depth = args.depth or parse_size(case.split(":")[0])["depth"]
    found = compare(
        args,
        f"{part}, {case}",
        lambda name: JOBS[part](args, case, name),
        lambda name: peak_of_child("model", part=part, case=case, name=name),
        "mhsa",
        others,
    )
    return {"batch": args.batch, "depth": depth, **found}


def network_of(args: argparse.Namespace, case: str, attention: str) -> Transformer:
    """A DiT on latents of an eighth of the pixels, with random weights: as it begins, its output is 0."""
    size, pixels = case.split(":")
    sizes = parse_size(size) | ({"depth": args.depth} if args.depth else {})
    torch.manual_seed(0)
    network = Transformer(**sizes, input_size=int(pixels) // 8, out_channels=8, attention=attention)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network


def inputs_of(args: argparse.Namespace, network: Transformer, batch: int) -> tuple:
    """Latents, noise, labels and times."""
    x, noise = torch.randn(2, batch, 4, *network.input_size, device=args.device)
    y, t = torch.randint(1000, (2, batch), device=args.device)
    return x, noise, y, t


def train_job(args: argparse.Namespace, case: str, name: str) -> Callable:
    """A training step with one average of the weights."""
    if name == PUBLISHED:
        return published_job(args, case)
    network = network_of(args, case, name).to(args.device)
    process, (x, noise, y, t) = Diffusion(), inputs_of(args, network, args.batch)
    return training_job(args, network, lambda model: process.loss(model, x, y, t=t, noise=noise).mean())


def published_job(args: argparse.Namespace, case: str) -> Callable:
    """A training step after the structure of the published trainer; the loss and the rest of the network are ours."""
    network = network_of(args, case, "mhsa")
    for block in network.blocks:
        own = block.attn
        block.attn = timm.layers.Attention(own.proj.in_features, num_heads=own.num_heads, qkv_bias=True)
        block.attn.load_state_dict(own.state_dict())
    network.to(args.device)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    process, (x, noise, y, t) = Diffusion(), inputs_of(args, network, args.batch)

    def job() -> float:
        loss = process.loss(network, x, y, t=t, noise=noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights = dict(network.named_parameters())
            for key, value in average.named_parameters():
                value.mul_(0.9999).add_(weights[key], alpha=0.0001)
        return loss.item()

    return job


def sample_job(args: argparse.Namespace, case: str, name: str) -> Callable:
    """One evaluation with guidance: the network sees each image twice, once with the null class."""
    network = network_of(args, case, name).to(args.device).eval()
    x, _, y, t = inputs_of(args, network, args.batch)
    given = x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, network.null_class)])
    model = prepared(args, network)

    @torch.no_grad()
    def job() -> None:
        model(*given)

    return job


JOBS = {"training": train_job, "sampling": sample_job}


if __name__ == "__main__":
    main()
