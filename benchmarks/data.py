"""Latents read and made, beside what the field does: one file a latent, and images decoded in every step.

    python -m benchmarks.data                                        # two CPU cores: about 6 minutes
    python -m benchmarks.data --device cuda --images 2048 --batch 32 --parts caching --out ...

It reports

- reading: images/s a core through a DataLoader in random order, files in the file cache: of `LatentDataset` (moments of
  4x32x32 latents), of one .npy a latent, and of JPEG files, decoded and cropped to 256 pixels.
- caching: images/s of encoding with the architecture of Stable Diffusion's autoencoder (random weights), and the share of
  the time that is not the autoencoder's.
- memory: peak resident memory of a process that caches 10,000 and 100,000 small images.

Contenders take turns, after a warm-up; a number is the median of its repetitions. Inputs are random.
"""

import argparse
import io
import json
import os
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.report import aim, child_command, peak_kib, run_parts
from vca_engine.config.schema import CacheConfig
from vca_engine.images.codecs import PixelCodec, VAECodec
from vca_engine.images.datasets import Folder
from vca_engine.images.encode import CacheWriter
from vca_engine.images.latents import CACHE_FORMAT, LatentDataset
from vca_engine.images.order import EndlessBatches

BATCH, SIDE = 256, 256


def main() -> None:
    """Runs the parts that were asked for and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--latents", type=int, default=16_384, help="of the reading")
    parser.add_argument("--jpegs", type=int, default=512, help="of the reading")
    parser.add_argument("--images", type=int, default=16, help="of the caching")
    parser.add_argument("--batch", type=int, default=4, help="of the caching")
    parser.add_argument("--sizes", type=int, nargs=2, default=[10_000, 100_000], help="images, of the memory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default="reading,caching,memory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data_cpu.json"))
    parser.add_argument("--child", nargs=2, metavar=("IMAGES", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(peak_memory(*args.child))
        return
    parts = {"reading": reading, "caching": caching, "memory": memory}
    run_parts(parser, parts, args, ("torch", "numpy", "pillow", "diffusers"))


# Reading


class OneFileEach(Dataset):
    """As others keep latents: an .npy with one float32 latent for each image."""

    def __init__(self, folder: Path, labels: np.ndarray) -> None:
        self.folder, self.labels = folder, labels

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int]:
        return torch.from_numpy(np.load(self.folder / f"{key[0]:06d}.npy")), int(self.labels[key[0]])


def reading(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images per second and core."""
    torch.set_num_threads(1)
    rng, num = np.random.default_rng(0), args.latents
    labels = rng.integers(0, 1000, num)
    write_cache(folder / "cache", labels)
    (folder / "single").mkdir()
    for i in range(num):
        np.save(folder / "single" / f"{i:06d}.npy", rng.standard_normal((4, 32, 32), dtype=np.float32))
    write_jpegs(folder / "jpeg", args.jpegs)
    contenders = {
        "LatentDataset": (LatentDataset(str(folder / "cache")), num),
        "one .npy a latent": (OneFileEach(folder / "single", labels), num),
        "JPEG, decoded and cropped": (Folder(images=str(folder / "jpeg"), image_size=SIDE), args.jpegs),
    }
    cores = len(os.sched_getaffinity(0))
    seconds: dict[str, dict[int, list[float]]] = {name: {0: [], cores: []} for name in contenders}
    for repeat in range(args.repeats + 1):
        for name, (data, size) in contenders.items():
            for workers in (0, cores):
                order = EndlessBatches(size, BATCH, seed=repeat, flip=True, start=0, rank=0, num_processes=1)
                batches = iter(
                    DataLoader(
                        data, batch_sampler=order, collate_fn=getattr(data, "collate", None), num_workers=workers
                    )
                )
                for _ in range(2):  # the workers are there
                    next(batches)
                count, start = max(2, size // BATCH), time.perf_counter()
                for _ in range(count):
                    next(batches)
                passed = (time.perf_counter() - start) / count / BATCH
                del batches
                if repeat:  # the first is the warm-up
                    seconds[name][workers].append(passed)
    rates = {
        name: {f"{workers} workers": 1 / float(np.median(times)) for workers, times in by.items()}
        for name, by in seconds.items()
    }
    ours, single, jpeg = rates.values()
    aims = [  # as training reads them: in its own process
        aim("latents/s of LatentDataset on one core", ours["0 workers"], 50_000),
        aim("LatentDataset over one .npy a latent", ours["0 workers"] / single["0 workers"], 10),
    ]
    return {
        "sizes": {"latents": num, "jpegs": args.jpegs, "batch": BATCH},
        "images per second": rates,
        "times one .npy a latent": {key: ours[key] / single[key] for key in ours},
        "times JPEG": {key: ours[key] / jpeg[key] for key in ours},
        "seconds an image": {name: {str(k): v for k, v in by.items()} for name, by in seconds.items()},
        "aims": aims,
    }


def write_cache(folder: Path, labels: np.ndarray, shard_size: int = 1024) -> None:
    """A cache of random moments, as `CacheWriter` leaves it."""
    folder.mkdir()
    rng, shards = np.random.default_rng(1), []
    for k in range(0, len(labels), shard_size):
        rows = rng.standard_normal((min(shard_size, len(labels) - k), 2, 8, 32, 32), dtype=np.float32).astype(
            np.float16
        )
        np.save(folder / f"shard-{k:05d}.npy", rows)
        shards.append({"file": f"shard-{k:05d}.npy", "num_images": len(rows), "sha256": ""})
    settings = {"class_names": [str(c) for c in range(1000)], "image_size": 256, "channels": 3, "flip": True}
    manifest = {"version": CACHE_FORMAT, "settings": settings, "shape": [8, 32, 32], "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    np.save(folder / "labels.npy", labels)


def write_jpegs(folder: Path, num: int) -> None:
    """Photograph-like noise of ImageNet's usual size, 500 x 375 pixels, in one class."""
    (folder / "class").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "class" / f"{i:05d}.jpg", quality=90)


# Caching


class Timed(nn.Module):
    """A codec that knows how long it took."""

    def __init__(self, codec: nn.Module) -> None:
        super().__init__()
        self.codec, self.seconds, self.posterior = codec, 0.0, codec.posterior
        self.channels, self.downsample = codec.channels, codec.downsample

    def moments(self, images: Tensor) -> Tensor:
        """See `vca_engine.images.codecs`."""
        start = time.perf_counter()
        found = self.codec.moments(images)
        if found.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return found


def caching(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images per second, and what of the time is not the autoencoder's."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    vae = AutoencoderKL(  # the config of stabilityai/sd-vae-ft-mse
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=SIDE,
    )
    vae.save_pretrained(folder / "vae")
    write_jpegs(folder / "jpeg", args.images)
    state = PartialState(cpu=args.device == "cpu")
    codec = Timed(VAECodec(3, path=str(folder / "vae")).to(state.device))
    images = Folder(images=str(folder / "jpeg"), image_size=SIDE)
    shares, rates = [], []
    for repeat in range(max(2, args.repeats // 2) + 1):
        options = {"seed": 0, "num_workers": 1 if args.device == "cpu" else 8, "state": state}
        cache = CacheConfig(batch_size=args.batch)
        writer = CacheWriter(str(folder / f"cache{repeat}"), images, codec, {}, cache, **options)
        codec.seconds, start = 0.0, time.perf_counter()
        writer.run()
        total = time.perf_counter() - start
        if repeat:
            shares.append(1 - codec.seconds / total)
            rates.append(args.images / total)
    share = float(np.median(shares))
    return {
        "sizes": {"images": args.images, "side": SIDE, "mirrored": True, "batch": args.batch},
        "images per second": float(np.median(rates)),
        "share that is not the autoencoder's": share,
        "all": {"images per second": rates, "shares": shares},
        "aims": [aim("overhead of caching over the autoencoder alone", share / (1 - share), most=0.05)],
    }


# Memory


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak resident memory, of a process of its own each."""
    rng, peaks = np.random.default_rng(0), []
    for num in args.sizes:
        with zipfile.ZipFile(folder / f"{num}.zip", "w") as archive:
            for i in range(num):
                content = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(content, format="PNG")
                archive.writestr(f"{i % 10}/{i:06d}.png", content.getvalue())
        command = child_command("data", "--child", folder / f"{num}.zip", folder / str(num))
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        peaks.append(int(output.split()[-1]) / 1024)
    ratio = peaks[1] / peaks[0]
    found = {"sizes": {"images": args.sizes, "side": 32}, "peak MiB": peaks, "ratio": ratio}
    return {**found, "aims": [aim("peak memory at more images over that at fewer", ratio, most=1.1)]}


def peak_memory(source: str, out: str) -> int:
    """KiB at the peak of this process, after caching a .zip of images as they are."""
    images = Folder(images=source, image_size=32)
    state = PartialState(cpu=True)
    CacheWriter(out, images, PixelCodec(3), {}, CacheConfig(), seed=0, num_workers=0, state=state).run()
    return peak_kib()


if __name__ == "__main__":
    main()
