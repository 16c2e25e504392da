"""Encode every image of a config once, so that training reads latents instead of images.

    python cache_latents.py --config configs/sit_b2_vca.yaml --data.path DIR --latents /data/latents

The folder is `latents` of the config; train.py with the same config reads it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

import build
from runtime.config import Config, parse, report_errors
from runtime.latents import CachedLatents, write_cache


@report_errors("cache_latents.py")
def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    config = parse(Config, argv, prog="cache_latents.py", description=__doc__, epilog=build.options_help())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("cache_latents.py is one process; start it without a launcher.")
    if config.latents is None:
        raise ValueError("latents is not given; name the folder to write, --latents FOLDER.")
    if Path(config.latents).exists():
        CachedLatents(config.latents, build.source(config))
        print(f"{config.latents} is there already, made from the same data and codec; nothing to do.")
        return
    images = build.build_images(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = build.build_codec(config, images.channels).to(device)
    write_cache(
        config.latents,
        images,
        lambda x: codec.moments(x.to(device)).cpu(),
        build.source(config),
        batch_size=64,
        workers=config.train.num_workers,
    )
    print(f"wrote {len(images)} latents{' and their mirror images' * images.flip} to {config.latents}")


if __name__ == "__main__":
    main()
