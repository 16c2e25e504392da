"""Train a small diffusers `AutoencoderKL` on the images of a config: the miniature of Stable Diffusion's autoencoder.

    python -m demo.autoencoder --config configs/mnist_sit.yaml

1x32x32 images become 4x8x8 latents, whose mean and standard deviation per channel go into the autoencoder's config, so
that latents have scale 1 wherever it is loaded. It is written to `codec.path`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.schema import Config
from vca_engine.images.order import EndlessBatches

VAE_STEPS, VAE_BATCH_SIZE, VAE_LEARNING_RATE, KL_WEIGHT = 400, 32, 5e-3, 1e-3

USUAL = {
    "autoencoder": ("data", "data.images", "data.image_size", "codec.path", "seed")
}  # all that it uses of a config


@report_errors("demo.autoencoder")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, by default that of the process."""
    texts = {"prog": "python -m demo.autoencoder", "description": __doc__, "usual": USUAL}
    config = parse(Config, argv, **texts, parts=assemble.parts())
    folder = Path(config.codec.get("path", ""))
    if config.codec["name"] != "vae" or folder.exists():
        raise ValueError(f"codec is {config.codec}; give the vae codec a path that does not exist yet.")
    images = assemble.images(config)
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(
        in_channels=images.channels,
        out_channels=images.channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=images.image_size,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LEARNING_RATE, total_steps=VAE_STEPS, pct_start=0.1)
    order = EndlessBatches(len(images), VAE_BATCH_SIZE, seed=config.seed, flip=False, start=0, rank=0, num_processes=1)
    batches = iter(DataLoader(images, batch_sampler=order))
    bar = tqdm(range(VAE_STEPS), desc="autoencoder", unit="step")
    for _ in bar:
        x, _ = next(batches)
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(error=f"{error.item():.4f}", refresh=False)
    vae.eval()
    mean, std = latent_statistics(vae, images)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0)
    partial = folder.with_name(folder.name + ".partial")
    vae.save_pretrained(partial)
    partial.rename(folder)
    print(f"wrote {folder}: {sum(p.numel() for p in vae.parameters()):,} parameters, last error {error.item():.4f}")


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, images: torch.utils.data.Dataset) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of the latents of all images, (C,) each."""
    indices = [(i, False) for i in range(len(images))]
    z = torch.cat([vae.encode(x).latent_dist.mean for x, _ in DataLoader(images, batch_size=250, sampler=indices)])
    return z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))


if __name__ == "__main__":
    main()
