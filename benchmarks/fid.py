"""The evaluator beside pytorch-fid and torch-fidelity: the same images, the same random weights, one run.

    python -m benchmarks.fid                                                         # two CPU cores: about 20 minutes
    python -m benchmarks.fid --device cuda --images 4096 --out benchmarks/results/fid_cuda.json

Needs torch-fidelity. It reports

- throughput: images/s from PNG files, of ours also from an .npz, until mean and covariance are there, with networks built
  beforehand; pytorch-fid runs with its command's batch and workers, torch-fidelity with its own.
- frechet: seconds of a distance of two 2048-d Gaussians, by scipy's sqrtm, torch-fidelity's eigvals and `fid`.
- memory: peak resident memory of a process that evaluates 1,000 and 20,000 small images with a cheap network.

The contenders take turns, after a warm-up each; a number is the median of its repetitions, and all of them are kept in the
JSON, with the machine, its load, the versions, and whether each aim of the project is met.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_fid.fid_score as pytorch_fid
import pytorch_fid.inception as pytorch_fid_inception
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import metric_fid, utils

import fid
from benchmarks.report import aim, child_command, peak_kib, run_parts
from fid.frechet import factor, frechet_terms
from fid.networks.inception import inception_network


def main() -> None:
    """Runs the parts that were asked for and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=int, default=64, help="of the throughput, 256x256")
    parser.add_argument("--batch", type=int, help="ours; not given means 8 on a CPU and 64 on a GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dim", type=int, default=2048, help="of the Frechet distance")
    parser.add_argument("--sizes", type=int, nargs=2, default=[1000, 20_000], help="images, of the memory")
    parser.add_argument("--parts", default="throughput,frechet,memory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fid_cpu.json"))
    parser.add_argument("--child", nargs=3, metavar=("WHO", "IMAGES", "NUM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(peak_memory(args.child[0], Path(args.child[1]), int(args.child[2])))
        return
    args.batch = args.batch or (8 if args.device == "cpu" else 64)
    parts = {"throughput": throughput, "frechet": frechet, "memory": memory}
    run_parts(
        parser, parts, args, ("torch", "torchvision", "numpy", "scipy", "pillow", "pytorch-fid", "torch-fidelity")
    )


def throughput(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images per second, from files to mean and covariance."""
    torch.manual_seed(0)
    cpu, png, warm, weights = args.device == "cpu", folder / "png", folder / "warm", folder / "weights.pth"
    network = inception_network()  # of random weights
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), weights)
    noise = torch.rand(args.images, 3, 16, 16)
    x = 255 * F.interpolate(noise, size=(256, 256), mode="bicubic") + 4 * torch.randn(args.images, 3, 256, 256)
    images = x.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()  # a PNG packs them as a photograph
    write_images(images, png)
    write_images(images[: 8 if cpu else 64], warm)
    pytorch_fid_inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    theirs = pytorch_fid_inception.InceptionV3([3]).to(args.device)
    workers = min(len(os.sched_getaffinity(0)), 8)  # as its command chooses
    options = {"cuda": not cpu, "feature_extractor_weights_path": str(weights), "verbose": False}
    fidelity = utils.create_feature_extractor("inception-v3-compat", ["2048"], **options)

    def by_pytorch_fid(path: Path) -> np.ndarray:
        return pytorch_fid.calculate_activation_statistics([*path.iterdir()], theirs, 50, 2048, args.device, workers)[1]

    def by_fidelity(path: Path) -> np.ndarray:
        features = utils.extract_featuresdict_from_input_id(1, fidelity, input1=str(path), **options)
        return metric_fid.fid_featuresdict_to_statistics(features, "2048")["sigma"]

    def ours(path: Path, network: fid.Inception, batch: int = args.batch, suffix: str = "") -> np.ndarray:
        choices = {"device": args.device, "batch_size": batch, "progress": False}
        return fid.statistics(path.with_suffix(suffix), network, **choices).statistics["features"].cov

    like, adm = (fid.Inception(weights, preset) for preset in ("pytorch-fid", "adm"))
    contenders = {
        "pytorch-fid": by_pytorch_fid,
        "fid, preset pytorch-fid": partial(ours, network=like),
        "fid, preset pytorch-fid, batch 64": partial(ours, network=like, batch=64),
        "torch-fidelity": by_fidelity,
        "fid, preset adm": partial(ours, network=adm),
        "fid, preset adm, npz": partial(ours, network=adm, suffix=".npz"),
    }
    if not cpu:  # pytorch-fid lets a GPU use TF32
        tf32 = fid.Inception(weights, "pytorch-fid", tf32=True)
        contenders["fid, preset pytorch-fid, tf32"] = partial(ours, network=tf32)
    for run in contenders.values():
        run(warm)
    seconds, median, covs = take_turns({name: partial(run, png) for name, run in contenders.items()}, args.repeats)
    peers = {name: "torch-fidelity" if "adm" in name else "pytorch-fid" for name in contenders if "," in name}
    times = {name: median["pytorch-fid"] / value for name, value in median.items()}
    names, wanted = ("fid, preset pytorch-fid", "fid, preset adm"), 1.4 if cpu else 2.0
    return {
        "sizes": {"images": args.images, "side": 256, "our batch": args.batch, "workers of pytorch-fid": workers},
        "images per second": {name: args.images / value for name, value in median.items()},
        "times pytorch-fid": times,
        "difference of covariances": {
            f"{a} to {b}": float(np.abs(covs[a] - covs[b]).max() / np.abs(covs[b]).max()) for a, b in peers.items()
        },
        "seconds": seconds,
        "aims": [aim(f"images/s of {name} over pytorch-fid's", times[name], wanted) for name in names],
    }


def frechet(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a Frechet distance between full covariances whose eigenvalues fall as 1 / i."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.standard_normal((args.dim, args.dim)))[0] for _ in range(2)]
    cov1, cov2 = ((Q / np.arange(1, args.dim + 1)) @ Q.T for Q in bases)
    mean1, mean2 = rng.standard_normal((2, args.dim)) / args.dim**0.5
    H, sides = factor(cov1), ({"mu": mean1, "sigma": cov1}, {"mu": mean2, "sigma": cov2})

    def by_sqrtm() -> float:
        root = scipy.linalg.sqrtm(cov1 @ cov2)
        return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root).real)

    contenders = {
        "scipy sqrtm": by_sqrtm,
        "torch-fidelity": lambda: metric_fid.fid_statistics_to_metric(*sides, False)["frechet_inception_distance"],
        "fid": lambda: fid.frechet_distance(mean1, cov1, mean2, cov2),
        "fid, reference cached": lambda: sum(frechet_terms(mean1, H, mean2, cov2)),
    }
    seconds, median, values = take_turns(contenders, args.repeats)  # warm: `factor` has run
    times = {name: median["scipy sqrtm"] / value for name, value in median.items()}
    found = {"dim": args.dim, "median seconds": median, "times sqrtm": times, "values": values, "seconds": seconds}
    bounds = [("fid", 3.5), ("fid, reference cached", 7.0)]
    return {**found, "aims": [aim(f"speed of {name} over scipy's sqrtm", times[name], least) for name, least in bounds]}


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak resident memory, of a process of its own each."""
    images = np.random.default_rng(0).integers(0, 256, (max(args.sizes), 32, 32, 3), dtype=np.uint8)
    write_images(images, folder / "png")
    found: dict[str, Any] = {"sizes": {"images": args.sizes, "side": 32, "groups": 10}}
    for who, source in (("fid", "png.npz"), ("pytorch-fid", "png")):
        peaks = []
        for num in args.sizes:
            command = child_command("fid", "--child", who, folder / source, num)
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            peaks.append(int(output.split()[-1]) / 1024)
        found[who] = {"peak MiB": peaks, "ratio": peaks[1] / peaks[0]}
    # It grows by fuller buffers of rows, which have an end, and by some 200 bytes of record an image.
    return {**found, "aims": [aim("peak memory at more images over that at fewer", found["fid"]["ratio"], most=1.1)]}


class Projection(nn.Module):
    """A cheap network of Inception's width: a fixed random projection of the pixels, for `fid` and for pytorch-fid."""

    name, label, preset, metrics = "projection", "Frechet distance", None, ("fd",)
    dim, dims = 2048, {"features": 2048}

    def __init__(self) -> None:
        super().__init__()
        noise = torch.randn(3 * 32 * 32, self.dim, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(noise / 3072**0.5, requires_grad=False)

    def forward(self, images: Tensor) -> dict[str, Tensor] | list[Tensor]:
        """uint8 -> {"features": (B, D)}; float in [0, 1], as pytorch-fid gives -> [(B, D, 1, 1)]."""
        if images.dtype == torch.uint8:
            return {"features": (images.float() / 255).flatten(1) @ self.weight}
        return [(images.flatten(1) @ self.weight)[:, :, None, None]]


def peak_memory(who: str, source: Path, num: int) -> int:
    """KiB at the peak of this process, after an evaluation of `num` images up to the distance and its error."""
    sqrtm = scipy.linalg.sqrtm  # scipy 1.18 takes no `disp` any more
    scipy.linalg.sqrtm = lambda product, disp=True: (sqrtm(product), 0.0)  # as pytorch-fid calls it
    mean, cov = np.zeros(2048), np.eye(2048)
    if who == "fid":
        reference = fid.Reference("unit", "fid", {"features": fid.Statistics(mean, cov)}, None, None, None, None)
        fid.evaluate(source, reference, Projection(), num=num, metrics=("fd",), groups=10, device="cpu", progress=False)
    else:
        files = sorted(source.glob("*.png"))[:num]
        found = pytorch_fid.calculate_activation_statistics(files, Projection())
        pytorch_fid.calculate_frechet_distance(*found, mean, cov)
    return peak_kib()


def take_turns(jobs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict, dict, dict]:
    """Seconds of each job, their medians, and what it gave; by turns, so that a busy spell of the machine meets all."""
    seconds, given = {name: [] for name in jobs}, {}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            given[name] = job()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds, {name: float(np.median(times)) for name, times in seconds.items()}, given


def write_images(images: np.ndarray, folder: Path) -> None:
    """A PNG file each, numbered, and all of them in an .npz beside the folder."""
    folder.mkdir()
    np.savez(folder.with_suffix(".npz"), arr_0=images)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")


if __name__ == "__main__":
    main()
