"""The Inception-v3 of 2015, with which the FID is defined, and the protocols by which images are given to it.

torchvision and pytorch_fid are slow to import, and so are imported where the network is made.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from filelock import FileLock
from torch import Tensor, nn

from fid.networks.extractor import FeatureExtractor, fingerprint
from fid.networks.resize import clean_bicubic, half_pixel_bilinear, tf1_bilinear
from vca_engine.files import sha256_of
from vca_engine.images import uint8_batches
from vca_engine.precision import ieee_float32

WEIGHTS_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
PUBLISHED = "6726825d"  # how the SHA-256 of the file begins
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class Preset:
    """A protocol: how images become the network's input, and what is reported unless something else is asked for.

    Args:
        prepare: uint8 (B, 3, H, W) and the side of the result -> float32 (B, 3, size, size).
        metrics: Names in `METRICS`.
    """

    prepare: Callable[[Tensor, int], Tensor]
    metrics: tuple[str, ...]


PRESETS = {
    "adm": Preset(lambda images, size: (tf1_bilinear(images, size) - 128) / 128, ("fid", "sfid", "is", "pr")),
    "pytorch-fid": Preset(lambda images, size: 2 * half_pixel_bilinear(images, size) - 1, ("fid",)),
    "clean": Preset(lambda images, size: (clean_bicubic(images, size) - 128) / 128, ("fid",)),
}


class Inception(FeatureExtractor):
    """Features of the Inception-v3 of 2015, its weights converted by pytorch-fid.

    It is always in evaluation mode, its weights need no gradient, and it computes in IEEE float32, whatever autocast or
    TF32 is set around it. `weights` says which file it has, and whether that is the published one.

    Args:
        weights: File of weights, with the keys of pytorch-fid and torch-fidelity; another network's too, if the shapes
            fit. If not given: the file that $FID_INCEPTION_WEIGHTS names, or else the published one in the cache of
            torch.hub, under either of its names, or else its download (95 MB).
        preset: `adm`: TensorFlow's resize, (x - 128) / 128. `pytorch-fid`: half-pixel resize, 2 x / 255 - 1. `clean`:
            Pillow's bicubic resize, (x - 128) / 128.
        channels_last: Memory format of the network; on a CPU 1.5 times as fast, and equal to rounding.
        tf32: Let a GPU compute in TF32, which moves the features by some 0.1 %.
        size: Side of the network's input, in pixels. Other than 299 the features are no FID's; for tests of other code.

    Raises:
        FileNotFoundError: No weights at any of these places.
        ValueError: The file holds something else or is damaged, or there is no such preset.

    Source: Szegedy et al., arXiv:1512.00567; Heusel et al., arXiv:1706.08500; https://github.com/mseitzer/pytorch-fid.
    """

    label = "FID"

    def __init__(
        self,
        weights: str | Path | None = None,
        preset: str = "adm",
        *,
        channels_last: bool = True,
        tf32: bool = False,
        size: int = 299,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; choose one of {', '.join(PRESETS)}.")
        self.preset, self.tf32, self.size = preset, tf32, size
        path = _find_weights(weights)
        self.network, digest = _load(path)
        self.weights = {"path": str(path), "sha256": digest, "published": digest.startswith(PUBLISHED)}
        self.classifier = self.network.fc.weight  # (1008, 2048); the bias is left out, as ADM does
        del self.network.fc
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    @cached_property
    def name(self) -> str:
        """`inception`, the preset, and the fingerprint of the weights."""
        return f"inception-{self.preset}-{fingerprint(self)}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of this preset, unless others are asked for."""
        return PRESETS[self.preset].metrics

    @property
    def dims(self) -> dict[str, int]:
        """Width of each output."""
        side = self.size
        for lost in (1, 3, 3, 1):  # at the borders, before each of the four halvings down to Mixed_6
            side = (side - lost) // 2
        return {"features": 2048, "spatial": SPATIAL_CHANNELS * side**2, "logits": len(self.classifier)}

    def forward(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Compute the features of images.

        Args:
            images: uint8 (B, 3, H, W), or a list of (3, H, W) of different sizes, each resized on its own.

        Returns:
            `features`: (B, 2048), pool_3. `spatial`: (B, 2023), the first 7 channels of Mixed_6d's 1x1 branch after
            batch normalisation and ReLU, flattened as (height, width, channel). `logits`: (B, 1008), without bias.
        """
        with ieee_float32(self.tf32):
            x = network_input(images, self.preset, self.size)  # (B, 3, 299, 299)
            for name, block in self.network.named_children():  # in the order of the graph
                if name == "Mixed_6d":  # one small branch a second time, 0.4 % of the work
                    spatial = block.branch1x1(x)[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)
                x = block(x)
            features = x.flatten(1)  # (B, 2048)
            spatial = spatial.permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
            return {"features": features, "spatial": spatial, "logits": features @ self.classifier.T}

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever module contains this: with batch statistics the features mean nothing."""
        return super().train(False)


def network_input(images: Tensor | list[Tensor], preset: str, size: int) -> Tensor:
    """Prepare uint8 (B, 3, H, W), or a list of (3, H, W), as a preset says: (B, 3, size, size) float32."""
    return torch.cat([PRESETS[preset].prepare(batch, size) for batch in uint8_batches(images)])


def inception_network() -> nn.Module:
    """Make torchvision's Inception with the pooling of the graph of 2015, as `pytorch_fid` does."""
    from pytorch_fid import inception as blocks
    from torchvision.models import Inception3

    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    network.Mixed_5b = blocks.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = blocks.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = blocks.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = blocks.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = blocks.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = blocks.FIDInceptionE_1(1280)
    network.Mixed_7c = blocks.FIDInceptionE_2(2048)
    return network


def _find_weights(given: str | Path | None) -> Path:
    """Find the file of weights, or download it if there is none: one process does, while the others wait."""
    given = given or os.environ.get("FID_INCEPTION_WEIGHTS")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    tried = [Path(given)] if given else [cache / name for name in WEIGHTS_FILES]
    for path in tried:
        if path.is_file():
            return path
    from pytorch_fid.inception import FID_WEIGHTS_URL

    try:
        if given:
            raise FileNotFoundError("that is a folder" if tried[0].is_dir() else "no such file")
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{tried[0]}.lock"):
            if not tried[0].is_file():  # another process may have had the lock before
                torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(tried[0]), hash_prefix=PUBLISHED)
    except (OSError, RuntimeError) as error:  # offline, or a download of another hash
        raise FileNotFoundError(
            f"FID Inception weights not found ({error}). Tried: {', '.join(map(str, tried))}. Get {WEIGHTS_FILES[0]} "
            f"(95 MB) from the pytorch-fid release 'fid_weights' ({FID_WEIGHTS_URL}) on a machine with "
            "internet, and pass --weights or set $FID_INCEPTION_WEIGHTS."
        ) from error
    return tried[0]


def _load(path: Path) -> tuple[nn.Module, str]:
    """Make the network with the weights of a file; return it and the file's SHA-256."""
    digest = sha256_of(path)
    if path.name in WEIGHTS_FILES and not digest.startswith(PUBLISHED):
        raise ValueError(f"'{path}' is damaged: its SHA-256 does not begin with {PUBLISHED}; remove it.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other formats make the unpickler raise almost anything
        raise ValueError(
            f"'{path}' is not a PyTorch file of weights alone (a state dict, not a module), or is cut short."
        ) from error
    network = inception_network()
    try:
        network.load_state_dict(state)
    except Exception as error:  # of a file of something else, almost anything
        head = state.get("fc.weight") if isinstance(state, dict) else None
        if isinstance(head, Tensor) and head.shape[:1] == (1000,):
            raise ValueError(
                f"'{path}' is torchvision's ImageNet Inception (1000 classes); FID needs the 2015 graph with 1008."
            ) from error
        lines = [line.strip() for line in str(error).splitlines()]
        reason = (lines[1] if len(lines) > 1 else lines[0])[:200].rstrip(":. ")
        raise ValueError(
            f"'{path}' does not hold the FID's Inception: {reason} (for another network name it with --extractor)."
        ) from error
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise ValueError(f"'{path}' holds weights that are not finite.")
    return network, digest
