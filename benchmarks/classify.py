"""Whole recognisers: images a second and memory of inference and training, with their own attention and with VCA.

    python -m benchmarks.classify --models deit_tiny --sizes 224 --rounds 2           # a look
    python -m benchmarks.classify                                                     # one CPU core: 11 minutes
    python -m benchmarks.classify --device cuda --compile --batch 64 --rounds 15 \
        --out benchmarks/results/classify_gpu.json

- inference: one evaluation of a batch.
- training: a step of what train.py does to a recogniser, without the views and mixtures of images: drop path of 0.1,
  smoothed cross-entropy, backward, the norm of the gradient, AdamW, an average of the weights.

bf16 on a GPU, and with --compile compiled blocks. `vca` takes turns with the network's own attention, `own`, after a
warm-up; numbers are medians, ratios those to `own` of the same round. `own, again` is the control. Memory is that of a
process of its own each. Weights and images are random. A CPU has one thread, and is timed by the seconds of the
process, for others use it, too.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import compare, peak_mib, peak_of_child, prepared, run_parts, training_job, use_device
from classify import MODELS, Classification, create


def main() -> None:
    """Measures, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=[k for k in MODELS if k.endswith("tiny")], choices=[*MODELS])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448], help="sides of the images in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compiled blocks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="inference,training")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/classify_cpu.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    use_device(args, 5)
    if args.child:
        part, name, size, attention = json.loads(args.child).values()
        print(json.dumps(peak_mib(args, JOBS[part](args, name, size, attention))))
        return
    run_parts(parser, {"inference": inference, "training": training}, args, ("torch", "timm", "numpy"))


def inference(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Evaluations of each network."""
    return compare_all(args, "inference")


def training(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Training steps of each network."""
    return compare_all(args, "training")


def compare_all(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """Each network at each size, with `vca` and with its own attention in turns."""
    found: dict[str, Any] = {"batch": args.batch, "compile": args.compile}
    for name, size in itertools.product(args.models, args.sizes):

        def make(attention: str, name: str = name, size: int = size) -> Callable:
            return JOBS[part](args, name, size, attention)

        def peak(attention: str, name: str = name, size: int = size) -> float | str:
            return peak_of_child("classify", part=part, name=name, size=size, attention=attention)

        found[f"{name}:{size}"] = compare(args, f"{part}, {name}:{size}", make, peak, "own", ["own, again", "vca"])
    return {**found, "aims": []}


def inference_job(args: argparse.Namespace, name: str, size: int, attention: str) -> Callable:
    """One evaluation of a batch."""
    network, x, _ = network_of(args, name, size, attention)
    model = prepared(args, network.eval())

    @torch.no_grad()
    def job() -> None:
        model(x)

    return job


def train_job(args: argparse.Namespace, name: str, size: int, attention: str) -> Callable:
    """A training step of a batch whose dropped branches are always the same."""
    network, x, y = network_of(args, name, size, attention)
    process = Classification(mixup=0.0, cutmix=0.0)
    process.draw_paths(network, 0, torch.arange(args.batch, device=args.device))
    return training_job(args, network.train(), lambda model: process.loss(model, x, y, seed=0, step=0).mean())


def network_of(args: argparse.Namespace, name: str, size: int, attention: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A recogniser with random weights, images (B, 3, size, size) and labels (B,)."""
    torch.manual_seed(0)
    network = create(name, attention, image_size=size, drop_path_rate=0.1).to(args.device)
    x = torch.randn(args.batch, 3, size, size, device=args.device)
    return network, x, torch.randint(1000, (args.batch,), device=args.device)


JOBS = {"inference": inference_job, "training": train_job}


if __name__ == "__main__":
    main()
