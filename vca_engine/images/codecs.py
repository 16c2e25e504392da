"""Codecs between images and latents, normalised so that latents have a scale of about 1.

`codec.moments(images)` gives the mean and the standard deviation of each latent, (B, 2C, h, w), from which training
draws; where `codec.posterior` is false there is nothing to draw, and it gives the latent itself, (B, C, h, w).
`codec.decode(latents)` -> images.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vca_engine import hub
from vca_engine.config.reading import FilePath
from vca_engine.files import sha256_of_weights
from vca_engine.seeds import normal

VAE_FILE = "diffusion_pytorch_model"


class PixelCodec(nn.Module):
    """No codec: the latents are the pixels.

    Args:
        channels: Channels of the images.
    """

    downsample, posterior = 1, False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.image_channels = self.channels = channels
        self.identity: dict[str, Any] = {"name": "pixels"}

    def moments(self, images: Tensor) -> Tensor:
        """Give (B, C, H, W) back as it is."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Give (B, C, H, W) back as it is."""
        return latents


class VAECodec(nn.Module):
    """A diffusers `AutoencoderKL` or `AutoencoderTiny`. Its config knows the scale: latent = (z - shift) * scale.

    scale is `scaling_factor`, over `latents_std` where there is one; shift is `latents_mean` or `shift_factor`, or 0.

    Args:
        channels: Channels of the images, which must be those of the autoencoder; not given means whatever it takes.
        path: A folder saved by diffusers, or a name on the Hugging Face hub, e.g. stabilityai/sd-vae-ft-mse.

    Raises:
        FileNotFoundError: Neither a folder with an autoencoder nor a name that the hub can give.
        ValueError: The autoencoder takes other images, or is of another kind.
    """

    def __init__(self, channels: int | None = None, *, path: FilePath) -> None:
        super().__init__()
        try:
            kind, vae, shift, scale = _load_vae(_locate_vae(path))
        except Exception as error:  # of a config that is no autoencoder's diffusers raises almost anything
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise FileNotFoundError(
                f"codec.path {path!r} is neither a folder saved by diffusers' AutoencoderKL nor a model that the hub "
                f"can give now: {reason.rstrip('.')}. Name another folder, or download it where there is a network: "
                "--codec.path FOLDER"
            ) from None
        self.vae = vae.eval().requires_grad_(False)
        self.posterior = kind == "AutoencoderKL"
        config = vae.config
        self.image_channels, self.channels = config.in_channels, config.latent_channels
        if channels not in (None, self.image_channels):
            raise ValueError(
                f"the images have {channels} channel(s), the autoencoder {path!r} takes {self.image_channels}."
            )
        blocks = config.block_out_channels if self.posterior else config.encoder_block_out_channels
        self.downsample = 2 ** (len(blocks) - 1)
        self.register_buffer("shift", shift.reshape(-1, 1, 1), persistent=False)  # (C or 1, 1, 1)
        self.register_buffer("scale", scale.reshape(-1, 1, 1), persistent=False)
        scale, shift = (value.flatten().tolist() for value in (self.scale, self.shift))
        self.identity = {"name": "vae", "kind": kind, "weights": sha256_of_weights(vae), "scale": scale, "shift": shift}

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode (B, 1 or 3, H, W) in [-1, 1] to mean and standard deviation of the latents, (B, 2C, H/f, W/f).

        Of an AutoencoderTiny, the latents (B, C, H/f, W/f).
        """
        if not self.posterior:
            return (self.vae.encode(images).latents.float() - self.shift) * self.scale
        z = self.vae.encode(images).latent_dist
        return torch.cat([(z.mean.float() - self.shift) * self.scale, z.std.float() * self.scale], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, H/f, W/f) into images (B, 1 or 3, H, W) in about [-1, 1]."""
        return self.vae.decode(latents / self.scale + self.shift).sample


def _locate_vae(path: str) -> Path:
    """Find the folder of an autoencoder, downloading it where `path` is a name on the hub: .bin if it has no other."""
    folder = hub.find_or_download(path, ["config.json", f"{VAE_FILE}.safetensors"])
    return (
        folder
        if (folder / f"{VAE_FILE}.safetensors").exists()
        else hub.find_or_download(path, ["config.json", f"{VAE_FILE}.bin"])
    )


def _load_vae(folder: Path) -> tuple[str, nn.Module, Tensor, Tensor]:
    """Load an autoencoder: its class, itself, and the shift and scale of its latents, (C,) or ()."""
    from diffusers import AutoencoderKL, AutoencoderTiny  # slow to import: see docs/architecture.md, start-up

    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    kind = dict(AutoencoderKL.load_config(folder, local_files_only=True)).get("_class_name", "AutoencoderKL")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"it is a {kind}, not one of {', '.join(kinds)}")
    vae = kinds[kind].from_pretrained(folder, local_files_only=True)
    if any(p.is_meta for p in vae.parameters()):
        raise ValueError("its config.json asks for weights that its file has not")
    shift = torch.tensor(vae.config.get("latents_mean") or vae.config.get("shift_factor") or 0.0)
    scale = vae.config.scaling_factor / torch.tensor(vae.config.get("latents_std") or 1.0)
    return kind, vae, shift, scale


CODECS = {"pixels": PixelCodec, "vae": VAECodec}


def sample_posterior(moments: Tensor, channels: int, seed: int, positions: Tensor) -> Tensor:
    """Draw latents, each a function of (seed, position) and of its mean and standard deviation alone.

    Args:
        moments: (B, 2C, h, w); or (B, C, h, w), which are latents already.
        channels: C.
        seed: Of the noise.
        positions: (B,), where each image stands in the order of the run.

    Returns:
        (B, C, h, w) float32.
    """
    moments = moments.float().contiguous()  # what random numbers are drawn like must not depend on the encoder's layout
    if moments.shape[1] == channels:
        return moments
    mean, std = moments.chunk(2, dim=1)
    return mean + std * normal(seed, positions.to(mean.device), mean.shape[1:])
