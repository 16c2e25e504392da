"""Codecs between images and latents, and the cache of latents on disk.

A codec gives the mean and the standard deviation of a latent, normalised so that latents have a scale of about 1; training
draws from that normal distribution. `codec.moments(images)` -> (B, 2C, h, w), `codec.decode(latents)` -> images.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from runtime.data import Images, check_label_range


class PixelCodec(nn.Module):
    """No codec: the latents are the pixels.

    Args:
        channels: Channels of the images.
    """

    downsample = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.image_channels = self.channels = channels

    def moments(self, images: Tensor) -> Tensor:
        """Mean and zeros: (B, C, H, W) -> (B, 2C, H, W)."""
        return torch.cat([images, torch.zeros_like(images)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) itself."""
        return latents


class VAECodec(nn.Module):
    """A diffusers `AutoencoderKL`. Its config knows the scale: latent = (z - shift) * scale.

    scale is `scaling_factor`, over `latents_std` where that is given; shift is `latents_mean` or `shift_factor`, else 0.

    Args:
        channels: Channels of the images; must be those of the autoencoder.
        path: A folder saved by diffusers, or a name on the Hugging Face hub, e.g. stabilityai/sd-vae-ft-mse.

    Raises:
        FileNotFoundError: Neither a folder with an autoencoder nor a name that the hub can give.
        ValueError: The autoencoder takes other images.
    """

    def __init__(self, channels: int, *, path: str) -> None:
        super().__init__()
        try:
            vae = AutoencoderKL.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise FileNotFoundError(
                f"codec.path {path!r} is neither a folder saved by diffusers' AutoencoderKL nor a model that the hub "
                f"can give now: {reason}"
            ) from None
        self.vae = vae.eval().requires_grad_(False)
        config = vae.config
        self.image_channels, self.channels = config.in_channels, config.latent_channels
        if self.image_channels != channels:
            raise ValueError(
                f"the images have {channels} channel(s), the autoencoder {path!r} takes {self.image_channels}."
            )
        self.downsample = 2 ** (len(config.block_out_channels) - 1)
        shift = torch.tensor(config.get("latents_mean") or config.get("shift_factor") or 0.0)
        scale = config.scaling_factor / torch.tensor(config.get("latents_std") or 1.0)
        self.register_buffer("shift", shift.reshape(-1, 1, 1), persistent=False)  # (C or 1, 1, 1)
        self.register_buffer("scale", scale.reshape(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents: (B, 1 or 3, H, W) in [-1, 1] -> (B, 2C, H/f, W/f)."""
        z = self.vae.encode(images).latent_dist
        return torch.cat([(z.mean - self.shift) * self.scale, z.std * self.scale], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H/f, W/f) -> images (B, 1 or 3, H, W) in about [-1, 1]."""
        return self.vae.decode(latents / self.scale + self.shift).sample


CODECS = {"pixel": PixelCodec, "vae": VAECodec}


def draw(moments: Tensor) -> Tensor:
    """Latents from their mean and standard deviation: (B, 2C, h, w) -> (B, C, h, w)."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * torch.randn_like(mean)


class CachedLatents(Dataset):
    """The folder that `write_cache` made: (index, flip) -> moments (2C, h, w), label.

    Args:
        path: The folder.
        source: What the latents have to be made of, `{"data": ..., "codec": ...}`.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is not a cache, or made from something else.
    """

    def __init__(self, path: str, source: dict[str, Any]) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"latents {path!r} is not a folder; make it with: python cache_latents.py --config YOUR.yaml"
            )
        try:
            record = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
            self.moments = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in record["arrays"]]
            self.class_names: list[str] = record["class_names"]
            self.labels = check_label_range(np.load(folder / "labels.npy"), len(self.class_names))
            self.image_size: int = record["image_size"]
            self.channels: int = record["channels"]
            made_from = record["source"]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"latents {path!r} is not a folder made by cache_latents.py: {error}.") from None
        if made_from != source:
            raise ValueError(
                f"latents {path!r} were made from {made_from}, this run asks for {source}; choose another folder "
                f"and run cache_latents.py again."
            )
        self.num_classes = len(self.class_names)
        self.flip = len(self.moments) == 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int]:
        """(index, flip) -> moments (2C, h, w), label."""
        index, flip = key
        return torch.from_numpy(self.moments[int(flip)][index].copy()), int(self.labels[index])


def write_cache(
    path: str,
    images: Images,
    moments: Callable[[Tensor], Tensor],
    source: dict[str, Any],
    batch_size: int,
    workers: int,
) -> None:
    """Encode all images, and their mirror images if training may flip them; the folder appears when it is complete.

    Args:
        path: Folder to make.
        images: The dataset.
        moments: (B, C, H, W) images -> (B, 2C, h, w) on the CPU, float32.
        source: Kept with the cache, and compared when it is read.
        batch_size: Images encoded together.
        workers: Processes that read images.
    """
    folder = Path(path)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arrays = ["latents", "flipped"] if images.flip else ["latents"]
    bar = tqdm(total=len(images) * len(arrays), unit="image", desc="encode")
    for flip, name in enumerate(arrays):
        order = [
            [(i, bool(flip)) for i in range(k, min(k + batch_size, len(images)))]
            for k in range(0, len(images), batch_size)
        ]
        array = None
        position = 0
        for x, _ in DataLoader(images, batch_sampler=order, num_workers=workers):
            encoded = moments(x)  # (B, 2C, h, w)
            if array is None:
                shape = (len(images), *encoded.shape[1:])
                array = np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype=np.float32, shape=shape)
            array[position : position + len(x)] = encoded.numpy()
            position += len(x)
            bar.update(len(x))
        array.flush()
    bar.close()
    np.save(partial / "labels.npy", images.labels)
    record = {
        "source": source,
        "arrays": arrays,
        "class_names": images.class_names,
        "image_size": images.image_size,
        "channels": images.channels,
    }
    (partial / "cache.json").write_text(json.dumps(record), encoding="utf-8")
    partial.rename(folder)
