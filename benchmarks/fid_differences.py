"""How far the choices in which evaluators differ move Inception's features. These are no FIDs, but tell large from small.

    python -m benchmarks.fid_differences --out benchmarks/results/fid_differences_random.json
    python -m benchmarks.fid_differences --weights trained.pth --out benchmarks/results/fid_differences_trained.json

32 crops, 256 x 256, of the two photographs that come with scikit-learn, through a random network of the FID's architecture
or through given weights: the FID's, or what trained_inception.py makes. For each choice: the mean of |f' - f| / |f|, and of
|f' - f| over the spread of f between images, f the features of the preset `adm`.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from fid.networks.inception import inception_network
from fid.networks.resize import clean_bicubic, half_pixel_bilinear, tf1_bilinear
from vca_engine.precision import ieee_float32

NUM, SIZE = 32, 299


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="of the FID's Inception; not given means a random network")
    parser.add_argument("--out", help="the .json to write")
    args = parser.parse_args()
    exact = crops()  # float64, in [0, 255]
    images = exact.round().to(torch.uint8)
    network = trained_network(args.weights) if args.weights else random_network(images)

    def features(x: Tensor) -> Tensor:
        with torch.no_grad(), ieee_float32():
            return torch.cat([network(part).double() for part in x.split(8)])

    def scaled(x: Tensor) -> Tensor:
        return (x - 128) / 128

    expected = features(scaled(tf1_bilinear(images, SIZE)))
    align = F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", align_corners=True)
    choices: dict[str, Callable[[], Tensor]] = {
        "channels last": lambda: features(
            scaled(tf1_bilinear(images, SIZE)).contiguous(memory_format=torch.channels_last)
        ),
        "half-pixel resize": lambda: features(scaled(255 * half_pixel_bilinear(images, SIZE))),
        "aligned corners": lambda: features(scaled(align)),
        "bicubic resize (Pillow, in float)": lambda: features(scaled(clean_bicubic(images, SIZE))),
        "2x/255 - 1": lambda: features(2 * tf1_bilinear(images, SIZE) / 255 - 1),
        "pytorch-fid (both)": lambda: features(2 * half_pixel_bilinear(images, SIZE) - 1),
        "truncating to uint8": lambda: features(scaled(tf1_bilinear(exact.floor().to(torch.uint8), SIZE))),
        "JPEG, quality 95": lambda: features(scaled(tf1_bilinear(jpeg(images, 95), SIZE))),
        "JPEG, quality 75": lambda: features(scaled(tf1_bilinear(jpeg(images, 75), SIZE))),
        "TF32 convolutions (emulated)": lambda: with_rounding(
            network, 13, lambda: features(scaled(tf1_bilinear(images, SIZE)))
        ),
        "bf16 convolutions (emulated)": lambda: with_rounding(
            network, 16, lambda: features(scaled(tf1_bilinear(images, SIZE)))
        ),
    }
    spread = (expected - expected.mean(dim=0)).norm(dim=1).mean()
    table = {}
    for name, choice in choices.items():
        moved = (choice() - expected).norm(dim=1)
        table[name] = {
            "of_a_feature": float(f"{(moved / expected.norm(dim=1)).mean():.2g}"),
            "of_the_spread": float(f"{moved.mean() / spread:.2g}"),
        }
        print(f"{name:<36}{table[name]['of_a_feature']:>12}{table[name]['of_the_spread']:>12}", flush=True)
    if args.out:
        record = {
            "images": NUM,
            "network": Path(args.weights).name if args.weights else "random",
            "torch": torch.__version__,
            "choices": table,
        }
        Path(args.out).write_text(json.dumps(record, indent=2) + "\n")


def crops() -> Tensor:
    """(32, 3, 256, 256) float64 in [0, 255], not rounded: crops of photographs, brought to half their size."""
    found, rng = [], np.random.default_rng(0)
    for photograph in load_sample_images().images:  # (427, 640, 3) uint8
        whole = torch.from_numpy(photograph.copy()).permute(2, 0, 1).double()[None]
        for _ in range(NUM // 2):
            side = int(rng.integers(300, 420))
            top, left = int(rng.integers(427 - side)), int(rng.integers(640 - side))
            crop = whole[..., top : top + side, left : left + side]
            found.append(F.interpolate(crop, (256, 256), mode="bilinear", antialias=True))
    return torch.cat(found)


def random_network(images: Tensor) -> nn.Module:
    """The pooled features of a random network whose batch normalisation knows the images.

    Its filters are smooth, as trained ones are: white noise would answer most to what is finest in an image.
    """
    torch.manual_seed(0)
    network = inception_network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            weight = torch.randn_like(module.weight)
            for axis in (2, 3):
                if weight.shape[axis] > 1:
                    weight = smooth(weight, axis)
            module.weight.data = weight * (2 / weight[0].square().sum()) ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()((tf1_bilinear(images[::2], SIZE) - 128) / 128)
    network.fc = nn.Identity()
    return network.eval()


def trained_network(weights: str) -> nn.Module:
    """The pooled features of a network with these weights."""
    network = inception_network().eval()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network.fc = nn.Identity()
    return network


def smooth(weight: Tensor, axis: int) -> Tensor:
    """Kernels blurred along an axis by 1, 2, 1, with zeros around."""
    length = weight.shape[axis]
    near = torch.eye(length) * 2 + torch.diag(torch.ones(length - 1), 1) + torch.diag(torch.ones(length - 1), -1)
    return torch.tensordot(weight, near, dims=([axis], [0])).movedim(-1, axis)


def with_rounding(network: nn.Module, bits: int, run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives while inputs and weights of convolutions lose the last `bits` bits of float32, rounded to even."""

    def rounded(x: Tensor) -> Tensor:
        integer = x.contiguous().view(torch.int32)
        integer = integer + ((1 << (bits - 1)) - 1) + ((integer >> bits) & 1)
        return (integer & ~((1 << bits) - 1)).view(torch.float32)

    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    before = [module.weight.data for module in convolutions]
    hooks = [module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),)) for module in convolutions]
    for module in convolutions:
        module.weight.data = rounded(module.weight.data)
    try:
        return run()
    finally:
        for hook in hooks:
            hook.remove()
        for module, weight in zip(convolutions, before, strict=True):
            module.weight.data = weight


def jpeg(images: Tensor, quality: int) -> Tensor:
    """The images after JPEG."""
    found = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=quality)
        found.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(found)


if __name__ == "__main__":
    main()
