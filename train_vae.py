"""Train an autoencoder on one's own images, for --codec.path of the other programs: diffusers' `AutoencoderKL`.

    python train_vae.py --data.images IMAGES --out runs/vae
    python train_vae.py --data.name mnist --widths [8,16,16] --num_steps 400 --out runs/mnist/vae

The mean and the standard deviation of each channel of the latents go into its config, so that latents have scale 1
wherever it is loaded. Interrupted, the same command goes on where it was. docs/autoencoder.md says when one needs it.
"""

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import FilePath, Spec, Strict
from vca_engine.config.schema import Batch, Seed, Size, Steps
from vca_engine.files import hold, remove_temporary, require_free, set_usual_mode, written_aside
from vca_engine.images import to_uint8
from vca_engine.images.datasets import ImageDataset
from vca_engine.images.order import EndlessBatches
from vca_engine.images.pictures import grid, save_picture
from vca_engine.precision import chosen_device
from vca_engine.records import differences, listed, read_json, write_json
from vca_engine.signals import end_on_signals
from vca_engine.training.log import Log
from vca_engine.training.outputs import preview_file

WEIGHTS, CONFIG, RECORD, STATE = "diffusion_pytorch_model.safetensors", "config.json", "training.json", "training.pt"
NUM_SHOWN, NUM_MEASURED, MOST_COUNTED = 16, 256, 10_000  # images of a picture, of the errors, of mean and deviation
MAY_DIFFER = ("data.images", "device", "log_every", "picture_every", "checkpoint_every")


@dataclass(frozen=True)
class VaeArguments(Strict):
    """The autoencoder, its training and the images.

    Args:
        out: The folder to write, for --codec.path.
        data: Images by name with their options, as for train.py: images DIR, image_size, flip.
        widths: Channels of each level, the finest first; each level after the first halves the side of the latents.
            Multiples of 4.
        layers: Residual blocks of a level; its decoder has one more.
        latent_channels: Channels of the latents.
        num_steps: Optimizer steps in all.
        batch_size: Images of a step.
        lr: Highest learning rate of AdamW, to which it rises in the first tenth of the steps, and then falls to 0.
        kl_weight: Weight of the distance of the latents from a standard normal, beside the squared error of the pixels.
        device: cuda or cpu; auto is the GPU if there is one.
        log_every: Steps between two lines of metrics.jsonl.
        picture_every: Steps between two pictures of images beside their reconstructions, in previews/.
        checkpoint_every: Steps between two states from which the same command goes on.
        seed: Seed of initialisation, order and noise.
    """

    out: FilePath
    data: Spec = field(default_factory=lambda: {"name": "folder"})
    widths: Annotated[list[Size], Field(min_length=1, max_length=8)] = field(default_factory=lambda: [16, 32, 32])
    layers: Size = 1
    latent_channels: Size = 4
    num_steps: Steps = 3000
    batch_size: Batch = 16
    lr: Annotated[float, Field(gt=0, le=100)] = 3e-3
    kl_weight: Annotated[float, Field(ge=0, le=1000)] = 1e-4
    device: Literal["auto", "cuda", "cpu"] = "auto"
    log_every: Steps = 20
    picture_every: Steps = 500
    checkpoint_every: Steps = 200
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width % 4 for width in self.widths):
            raise ValueError(f"widths is {self.widths}; choose multiples of 4, e.g. [16,32,32].")


@report_errors("train_vae.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, by default that of the process."""
    texts = {"prog": "train_vae.py", "description": __doc__}
    args = parse(VaeArguments, argv, **texts, parts=assemble.parts())
    end_on_signals()
    device, images, out = chosen_device(args.device), assemble.images(args), Path(args.out)
    for note in images.notes:
        print(f"note: {note}", file=sys.stderr)
    factor = 2 ** (len(args.widths) - 1)
    if images.image_size % factor:
        raise ValueError(
            f"images of {images.image_size}x{images.image_size} cannot be halved {len(args.widths) - 1} times; choose "
            f"--data.image_size with a multiple of {factor}, or fewer --widths."
        )
    settings = {**asdict(args), "images": images.fingerprint, "image_size": images.image_size}
    if not (out / RECORD).is_file():
        require_free(out)
    busy = f"another program trains in {str(out)!r}; wait for it, or choose another folder with --out."
    lock = hold(out / ".lock", busy)
    if (out / RECORD).is_file():
        check_same(settings, out)
    write_json(out / RECORD, settings)
    if (out / CONFIG).is_file():
        print(f"{out} is trained already; nothing to do.")
    else:
        remove_temporary(out)
        train(args, images, out, torch.device(device))
    if lock:
        lock.release()


def check_same(settings: dict[str, Any], out: Path) -> None:
    """Raise ValueError if a folder holds a training with other settings, or of other images."""
    found = differences(read_json(out / RECORD), settings)
    if other := {key: value for key, value in found.items() if key not in (*MAY_DIFFER, "out")}:
        raise ValueError(
            f"{str(out)!r} holds another training, with {listed(other, 'you gave')}; choose another folder with --out."
        )


def make_vae(args: VaeArguments, channels: int, image_size: int) -> nn.Module:
    """Make the autoencoder for images of so many channels and pixels a side."""
    from diffusers import AutoencoderKL  # slow to import: see docs/architecture.md, start-up

    levels = len(args.widths)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(args.widths),
        layers_per_block=args.layers,
        latent_channels=args.latent_channels,
        norm_num_groups=math.gcd(32, math.gcd(*args.widths) // 2),
        sample_size=image_size,
        mid_block_add_attention=False,
    )


def train(args: VaeArguments, images: ImageDataset, out: Path, device: torch.device) -> None:
    """Train from the start, or from the state in the folder, and write the autoencoder."""
    torch.manual_seed(args.seed)
    vae = make_vae(args, images.channels, images.image_size).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.num_steps, pct_start=0.1)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule}
    state = torch.load(out / STATE, weights_only=True, map_location=device) if (out / STATE).is_file() else None
    done = state["step"] if state else 0
    batches = batches_from(args, images, done)
    if state:  # after the above, which draws random numbers at every start
        print(f"goes on after step {done:,}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"].cpu())
    log, sums = Log(out, done), state["sums"] if state else []
    bar = tqdm(desc="autoencoder", unit="step", initial=done, total=args.num_steps)
    for step in range(done + 1, args.num_steps + 1):
        error, kl = losses(vae, next(batches).to(device))
        (error + args.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
        sums.append(torch.stack([error + args.kl_weight * kl, error, kl]).detach())
        if step % args.log_every == 0 or step == args.num_steps:
            loss, error, kl = torch.stack(sums).mean(0).tolist()
            if not math.isfinite(loss):
                raise ValueError(f"the loss of step {step:,} is not finite; start anew with a smaller --lr.")
            log.add(step, {"loss": loss, "error": error, "kl": kl})
            sums = []
            bar.set_postfix(error=f"{error:.4f}", refresh=False)
        if step % args.picture_every == 0 and step < args.num_steps:
            show(vae, images, step, log)
        if step % args.checkpoint_every == 0 and step < args.num_steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            with written_aside(out / STATE) as temporary:
                torch.save({**state, "step": step, "sums": sums, "random": torch.get_rng_state()}, temporary)
    bar.close()
    finish(vae.eval(), images, out)
    said = show(vae, images, args.num_steps, log)
    print(f"wrote {out}: {sum(p.numel() for p in vae.parameters()):,} parameters, {said}")


def batches_from(args: VaeArguments, images: ImageDataset, step: int) -> Iterator[Tensor]:
    """Give the images (B, C, H, W) of step after step, those after `step` ones."""
    options = {"seed": args.seed, "flip": images.flip, "start": step, "rank": 0, "num_processes": 1}
    labels = images.labels if assemble.is_balanced(args) else None
    order = EndlessBatches(len(images), args.batch_size, **options, labels=labels)
    loader = iter(DataLoader(images, batch_sampler=order))  # takes a random number, so here and not at the first batch
    return (x for x, _ in loader)


def losses(vae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the squared error of the pixels and the KL of a latent number, () each, for images (B, C, H, W)."""
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape).to(x.device)  # on the CPU, whose state of random numbers is kept
    error = (vae.decode(posterior.mean + posterior.std * noise).sample - x).square().mean()
    return error, posterior.kl().mean() / posterior.mean[0].numel()


def finish(vae: nn.Module, images: ImageDataset, out: Path) -> None:
    """Write the autoencoder with the scale of its latents; config.json comes last, and says that all is there."""
    mean, std = latent_statistics(vae, images)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=out) as folder:
        vae.save_pretrained(folder)
        set_usual_mode(Path(folder) / WEIGHTS, Path(folder) / CONFIG)
        for name in (WEIGHTS, CONFIG):
            (Path(folder) / name).replace(out / name)
    (out / STATE).unlink(missing_ok=True)


@torch.no_grad()
def latent_statistics(vae: nn.Module, images: ImageDataset) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of the latents of all images, of many of some, (C,) each."""
    z = torch.cat([vae.encode(x).latent_dist.mean.cpu() for x in some(vae, images, MOST_COUNTED)])
    return z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))


def some(vae: nn.Module, images: ImageDataset, most: int) -> Iterator[Tensor]:
    """Give at most so many images, evenly chosen, in batches (B, C, H, W) that are not large in memory."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), most)).round().astype(int)
    size = max(1, min(250, 2**20 // images.image_size**2))
    loader = DataLoader(images, batch_size=size, sampler=[(int(i), False) for i in chosen])
    return (x.to(vae.device) for x, _ in loader)


@torch.no_grad()
def show(vae: nn.Module, images: ImageDataset, step: int, log: Log) -> str:
    """Draw images beside their reconstructions, loss.png anew, and say how far they are apart."""
    with torch.random.fork_rng([]):  # a DataLoader takes a random number
        pairs = [(to_uint8(x), to_uint8(reconstruct(vae, x))) for x in some(vae, images, NUM_MEASURED)]
    originals, found = (np.concatenate(each) for each in zip(*pairs, strict=True))  # (N, H, W, 3)
    said = f"{np.abs(originals.astype(float) - found).mean():.1f} grey levels apart"
    if images.channels == 3:
        said += f", hues {hue_error(originals, found):.4f} of the circle apart"
    chosen = np.linspace(0, len(found) - 1, NUM_SHOWN).round().astype(int)
    shown = np.stack([originals[chosen], found[chosen]], axis=1)  # (16, 2, H, W, 3)
    title = f"step {step:,}: {said}"
    picture = grid(shown.reshape(4, -1, *found.shape[1:]), [], ["image", "decoded"] * 4, title)
    log.attempt("the picture", save_picture, [picture], preview_file(log.run_dir, step))
    log.add_preview(step, picture)
    log.plot()
    return said


@torch.no_grad()
def reconstruct(vae: nn.Module, x: Tensor) -> Tensor:
    """Encode and decode images (B, C, H, W), by the mean of the latents."""
    return vae.decode(vae.encode(x).latent_dist.mean).sample


def hue_error(images: np.ndarray, others: np.ndarray) -> float:
    """Compute the mean distance of hues, from 0 to 0.5 of the colour circle; pixels count by the chroma of `images`.

    The hue is the angle of (2 R - G - B, sqrt(3) (G - B)), the chroma max - min of the three.

    Args:
        images: (N, H, W, 3) uint8.
        others: The same.
    """
    hues = []
    for r, g, b in (np.moveaxis(each.astype(float), -1, 0) for each in (images, others)):
        hues.append(np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b) / (2 * math.pi))
    distance = np.abs(hues[0] - hues[1])
    distance = np.minimum(distance, 1 - distance)
    chroma = np.ptp(images.astype(float), axis=-1)
    return float((chroma * distance).sum() / max(chroma.sum(), 1.0))


if __name__ == "__main__":
    main()
