"""Encode every image once, so that training reads latents instead of images.

    python cache_latents.py --config configs/sit_b2_vca.yaml --data.images DIR --latents /data/latents
    torchrun --nproc_per_node 8 cache_latents.py --config ...           write the same bytes with eight processes
    python cache_latents.py --config ... --check                        read all latents again, and draw check.png
    python cache_latents.py --config ... --data.images DIR --check-images      list all images that cannot be read

`--latents` names the folder; train.py with the same config reads it. After an interruption, the same command goes on.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import fid
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.schema import Config
from vca_engine.distributed import join_processes, on_main_process
from vca_engine.images import to_uint8
from vca_engine.images.datasets import ImageDataset
from vca_engine.images.encode import INFORMATIVE, ROUNDING, CacheWriter, Pixels, reopen, tidy
from vca_engine.images.labels import DataInfo
from vca_engine.images.latents import DamagedError, LatentDataset
from vca_engine.images.loader import load
from vca_engine.images.pictures import grid, save_picture

NUM_SHOWN = 16
USUAL = {  # of a config; --help lists nothing else
    "encoding": ("latents", "check", "seed", "train.num_workers"),
    "images": ("data", "data.images", "data.image_size", "data.flip", "codec", "codec.path"),
    "cache": ("cache.moments", "cache.precision", "cache.batch_size", "cache.shard_size", "cache.on_error"),
}


@dataclass(frozen=True)
class CacheArguments(Config):
    """Options of the encoding.

    Args:
        check: Do not encode, but check a finished cache: checksums, counts, finite numbers. Also draw 16 images beside
            their decoded latents.
        check_images: Do not encode, but read every image, and list those that cannot be read; needs no latents.
    """

    check: bool = False
    check_images: bool = False


@report_errors("cache_latents.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Encode the images that the command line names, or check a finished cache."""
    texts = {"prog": "cache_latents.py", "description": __doc__, "usual": USUAL}
    choices = {f"fid.{name}": names for name, names in fid.CHOICES.items()}
    args = parse(CacheArguments, argv, **texts, parts=assemble.parts(), choices=choices)
    if args.check_images:
        check_images(args)
        return
    if args.latents is None:
        raise ValueError("latents is not given; name the folder to write, --latents FOLDER.")
    assemble.check_settings(args)
    if args.check:
        check(args)
        return
    # The last shard of one process may take long while the others wait.
    state = join_processes(not torch.cuda.is_available(), timedelta(days=7))
    images = assemble.images(args)
    args = assemble.with_image_size(args, images.image_size)
    if state.is_main_process:
        for note in images.notes:
            print(f"note: {note}", file=sys.stderr)
    codec = assemble.codec(args, images.channels).to(state.device)
    settings = settings_of(args, images, codec, state.device.type)
    if Path(args.latents).exists():
        needed = {key: value for key, value in settings.items() if key not in (*INFORMATIVE, *ROUNDING)}
        try:
            LatentDataset(args.latents).check(needed)
            if state.is_main_process:
                tidy(Path(args.latents))
                print(f"{args.latents} is there already, made from the same data and codec; nothing to do.")
            return
        except DamagedError as error:
            state.wait_for_everyone()  # all have seen it
            if state.is_main_process:
                print(f"note: {error}", file=sys.stderr)
            on_main_process(state, lambda: reopen(args.latents, needed))
    if images.num_classes == 1 and state.is_main_process:
        print(f"note: there is one class only, {images.class_names[0]!r}.", file=sys.stderr)
    options = {"seed": args.seed, "num_workers": args.train.workers(), "state": state}
    writer = CacheWriter(args.latents, images, codec, settings, args.cache, **options)
    missing, started = writer.num_missing, time.perf_counter()
    manifest = writer.run()
    if state.is_main_process:
        rate = missing / (time.perf_counter() - started)
        size = sum(file.stat().st_size for file in Path(args.latents).iterdir()) / 1e9
        print(
            f"wrote {manifest['num_images']:,} latents{' and their mirror images' * images.flip} to {args.latents}: "
            f"{len(manifest['shards'])} shards, {size:.2g} GB, {rate:.1f} images/s, {len(manifest['skipped'])} skipped"
        )
        if empty := [name for name, count in manifest["class_counts"].items() if not count]:
            print(f"warning: no image of {', '.join(empty)} could be read.", file=sys.stderr)


def settings_of(args: CacheArguments, images: ImageDataset, codec: Any, device: str) -> dict[str, Any]:
    """List the settings, data and codec that the latents are made with, for the manifest."""
    return {
        **assemble.needed_latents(args, codec),
        "source": args.data.get("images"),
        "codec_path": args.codec.get("path"),
        "images": images.fingerprint,
        "image_size": images.image_size,
        "channels": images.channels,
        "flip": images.flip,
        "crop": "adm",
        "class_names": images.class_names,
        "moments": args.cache.moments and codec.posterior,
        "seed": args.seed if codec.posterior and not args.cache.moments else None,
        "precision": args.cache.precision,
        "shard_size": args.cache.shard_size,
        "on_error": args.cache.on_error,
        "batch_size": args.cache.batch_size,
        "device": device,
    }


def check_images(args: CacheArguments) -> None:
    """Read every image of the data once, as training does, and list those that cannot be read.

    Raises:
        ValueError: Some cannot; they are listed already.
    """
    images = assemble.images(args)
    for note in images.notes:
        print(f"note: {note}", file=sys.stderr)
    batches, broken = [[*range(k, min(k + 32, len(images)))] for k in range(0, len(images), 32)], 0
    workers = args.train.workers()
    read = load(Pixels(images, skip=True), batches, num_workers=workers, minutes=args.train.timeout, pin=False)
    with tqdm(total=len(images), unit="image", desc="read") as bar, contextlib.closing(read):
        for _, why in read:
            for text in filter(None, why):
                tqdm.write(text)
                broken += 1
            bar.update(len(why))
    if broken:
        raise ValueError(
            f"{broken:,} of {len(images):,} images cannot be read; mend or remove those that are listed. With a cache, "
            "--cache.on_error skip leaves them out."
        )
    print(f"all {len(images):,} images can be read: {DataInfo.of(images).describe_classes(images.labels)}")


def check(args: CacheArguments) -> None:
    """Read a finished cache, print whether it is complete, and draw check.png into it."""
    cache = LatentDataset(args.latents)
    with tqdm(total=len(cache), unit="image", desc="check") as bar:
        for num in cache.verify():
            bar.update(num)
    m = cache.manifest
    statistics = ", ".join(f"{a:.3g} ± {b:.3g}" for a, b in zip(m["mean"], m["std"], strict=True))
    print(
        f"{args.latents}: {len(cache):,} latents of {cache.num_classes:,} classes, {len(m['shards'])} shards, "
        f"{len(m['skipped'])} images skipped; checksums and counts are right, all numbers are finite.\n"
        f"channels: {statistics}"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = assemble.with_image_size(args, cache.image_size)
    try:
        images = assemble.images(args)
        codec = assemble.codec(args, images.channels).to(device)
    except FileNotFoundError as error:
        print(f"note: no picture, since what it needs is not there: {error}", file=sys.stderr)
        return
    cache.check({**assemble.needed_latents(args, codec), "images": images.fingerprint})
    file, error = picture(cache, images, codec, device)
    print(f"wrote {file}: {NUM_SHOWN} images beside their decoded latents, {error:.1f} grey levels apart on average")


def picture(cache: LatentDataset, images: ImageDataset, codec: Any, device: str) -> tuple[Path, float]:
    """Draw images, each beside its decoded latent; return the file and the mean difference, in grey levels."""
    kept = np.delete(np.arange(len(images)), [skip["index"] for skip in cache.manifest["skipped"]])
    chosen = np.linspace(0, len(cache) - 1, NUM_SHOWN).round().astype(int)
    latents = torch.stack([cache[int(i), False][0][: codec.channels].float() for i in chosen]).to(device)
    decoded = to_uint8(torch.cat([codec.decode(z) for z in latents.split(4)]))  # (16, H, W, 3)
    originals = np.stack([np.broadcast_to(images.pixels(int(kept[i])), decoded.shape[1:]) for i in chosen])
    pairs = np.stack([originals, decoded], axis=1)  # (16, 2, H, W, 3)
    file = cache.folder / "check.png"
    save_picture([grid(pairs.reshape(4, -1, *decoded.shape[1:]), [], ["image", "latent"] * 4, f"{cache.path}")], file)
    return file, float(np.abs(originals.astype(float) - decoded).mean())


if __name__ == "__main__":
    main()
