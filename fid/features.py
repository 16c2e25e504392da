"""Networks that turn images into the features which a distance compares."""

import hashlib
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from pytorch_fid import inception as blocks
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import Inception3

from fid.images import check_uint8

WEIGHTS_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")


class FeatureExtractor(Protocol):
    """What statistics are made with: an `nn.Module` with these two attributes and this call.

    `name` holds a `fingerprint` of the weights, so that statistics of different networks are never compared; `dim` is
    the width D of `features`. To compute the same numbers under autocast or TF32, decorate `forward` with
    `@ieee_float32()`.
    """

    name: str
    dim: int

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) uint8 -> {"features": (B, D), ...}."""


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Float32 as IEEE defines it: no TF32, no autocast, no timing of kernels; what was set before comes back after.

    TF32 alone moves Inception's features by 0.7 %. A decorator, too.
    """
    if hasattr(torch.backends.cudnn, "conv"):  # torch >= 2.9; mixing the two ways to say it is an error there
        tf32 = [(torch.backends.cudnn.conv, "fp32_precision", "ieee")]
        tf32 += [(torch.backends.cuda.matmul, "fp32_precision", "ieee")]
    else:
        tf32 = [(torch.backends.cudnn, "allow_tf32", False), (torch.backends.cuda.matmul, "allow_tf32", False)]
    switches = [*tf32, (torch.backends.cudnn, "benchmark", False)]
    before = [getattr(owner, key) for owner, key, _ in switches]
    try:
        for owner, key, value in switches:
            setattr(owner, key, value)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for (owner, key, _), value in zip(switches, before, strict=True):
            setattr(owner, key, value)


def fingerprint(module: nn.Module) -> str:
    """Eight hexadecimal digits of the SHA-256 of all weights and of the statistics of batch normalisation."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        if not key.endswith("num_batches_tracked"):  # older files lack it, and it changes no output
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()[:8]


class Classifier(nn.Module):
    """A small convolutional network for small grey images, trained by whoever needs it: 64 features and the logits.

        x = mean over RGB / 127.5 - 1
        h = ReLU(BN(conv 3x3, 32, stride 2)(ReLU(BN(conv 5x5, 16, stride 2, or 1 below 16 pixels)(x))))
        features = ReLU(fc(AdaptiveAvgPool_4x4(h)));   logits = fc(features)

    Distances in its features compare only with those of the same weights.

    Args:
        num_classes: Width of the logits.
        image_size: Side of the images, in pixels; at least 8. Other sizes than this one are taken as well.
        accuracy: On validation images, in [0, 1], if known; kept in the file.

    Raises:
        ValueError: `image_size` below 8.
    """

    dim = 64

    def __init__(self, num_classes: int = 10, image_size: int = 28, accuracy: float | None = None) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}; the classifier takes sides of at least 8 pixels.")
        self.num_classes, self.image_size, self.accuracy = num_classes, image_size, accuracy
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, stride=2 if image_size >= 16 else 1, padding=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, self.dim),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.dim, num_classes)

    @property
    def name(self) -> str:
        """`classifier-` and the fingerprint of the weights as they are now."""
        return f"classifier-{fingerprint(self)}"

    @ieee_float32()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> features (B, 64) and logits (B, num_classes)."""
        check_uint8(images)
        x = images.float().mean(dim=1, keepdim=True) / 127.5 - 1  # (B, 1, H, W)
        features = self.trunk(x)  # (B, 64)
        return {"features": features, "logits": self.head(features)}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file whose metadata holds the arguments of the constructor."""
        metadata = {"num_classes": self.num_classes, "image_size": self.image_size, "accuracy": self.accuracy}
        save_file(self.state_dict(), path, {key: str(value) for key, value in metadata.items() if value is not None})

    @classmethod
    def load(cls, path: str | Path | None) -> Self:
        """Reads what `save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: No file there, or none given: there are no published weights to fall back on.
            ValueError: A damaged file, or not that of a classifier.
        """
        if path is None:
            raise FileNotFoundError("the classifier has no published weights: name a trained one's file (--weights).")
        if not Path(path).is_file():
            raise FileNotFoundError(f"the classifier's weights '{path}' do not exist.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata, state = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"'{path}' is no safetensors file, or is cut short: {error}.") from error
        try:
            accuracy = float(metadata["accuracy"]) if "accuracy" in metadata else None
            classifier = cls(int(metadata["num_classes"]), int(metadata["image_size"]), accuracy)
            classifier.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"'{path}' does not hold a classifier written by `Classifier.save`.") from error
        return classifier.eval()


class Inception(nn.Module):
    """The Inception-v3 of 2015 with which the FID is defined, its 2048 pooled features, as pytorch-fid computes them.

    Images become x / 255, are resized to 299 x 299 (bilinear, half-pixel centres), then 2 x - 1. The network is always
    in evaluation mode and its weights need no gradient.

    Args:
        weights: File of weights, with the keys of pytorch-fid and torch-fidelity. If not given: the file that
            $FID_INCEPTION_WEIGHTS names, or else the cache of torch.hub, or else a download (95 MB).

    Raises:
        FileNotFoundError: None of these has them.
        ValueError: The file holds something else.

    Source: Heusel et al., arXiv:1706.08500; https://github.com/mseitzer/pytorch-fid.
    """

    dim = 2048

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path, state = _inception_weights(weights)
        self.network = _inception_network()
        try:
            self.network.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0].rstrip(":") + " (for a classifier add --extractor classifier)"
            if isinstance(state, dict) and len(state.get("fc.weight", ())) == 1000:
                reason = "it is torchvision's ImageNet network (1000 classes), the FID needs the graph of 2015 (1008)"
            raise ValueError(f"'{path}' does not hold the FID's Inception: {reason}.") from error
        self.network.fc = nn.Identity()  # leaves the pooled features as the output
        self.requires_grad_(False).eval()

    @property
    def name(self) -> str:
        """`inception-pytorch-fid-` (the protocol) and the fingerprint of the weights."""
        return f"inception-pytorch-fid-{fingerprint(self)}"

    @ieee_float32()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> features (B, 2048)."""
        check_uint8(images)
        x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
        return {"features": self.network(2 * x - 1)}

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever module it is part of: with batch statistics the features mean nothing."""
        return super().train(False)


EXTRACTORS = {"inception": Inception, "classifier": Classifier.load}  # name -> made from a weights file or None


def _inception_network() -> Inception3:
    """Torchvision's Inception with the pooling of the graph of 2015, as `pytorch_fid.inception.fid_inception_v3`."""
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


def _inception_weights(given: str | Path | None) -> tuple[Path, dict[str, Tensor]]:
    """The file of weights that was found or downloaded, and its state dict."""
    given = given or os.environ.get("FID_INCEPTION_WEIGHTS")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    tried = [Path(given)] if given else [cache / name for name in WEIGHTS_FILES]
    options = {"map_location": "cpu", "weights_only": True}
    for path in tried:
        if path.is_file():
            try:
                return path, torch.load(path, **options)
            except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
                raise ValueError(f"'{path}' is not a PyTorch file of weights, or is cut short.") from error
    try:
        if given:
            raise FileNotFoundError("no such file")
        return tried[0], torch.hub.load_state_dict_from_url(blocks.FID_WEIGHTS_URL, check_hash=True, **options)
    except (OSError, RuntimeError) as error:  # offline, or a download of another hash
        raise FileNotFoundError(
            f"the weights of the FID's Inception were not found ({error}); tried {', '.join(map(str, tried))}. Get "
            f"{WEIGHTS_FILES[0]} (95 MB) from {blocks.FID_WEIGHTS_URL} where there is a network, "
            "and name the file with --weights or $FID_INCEPTION_WEIGHTS."
        ) from error
