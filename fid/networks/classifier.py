"""A small classifier as an extractor, trained on one's own classes: for images that Inception does not know."""

from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fid.networks.extractor import FeatureExtractor, fingerprint
from vca_engine.files import checksum_of, sha256_of_weights, written_aside
from vca_engine.images import check_uint8
from vca_engine.precision import ieee_float32


class Classifier(FeatureExtractor):
    """A small convolutional network, trained by whoever needs it: 64 features and the logits.

    For grey images

        x = mean over RGB / 127.5 - 1
        h = ReLU(BN(conv 3x3, 32, stride 2)(ReLU(BN(conv 5x5, 16, stride 2, or 1 below 16 pixels)(x))))
        features = ReLU(fc(AdaptiveAvgPool_4x4(h)));   logits = fc(features)

    and for colours x = RGB / 127.5 - 1 and h of blocks ReLU(BN(conv 3x3, stride 2)) of 32, 64, 128, ... 128 channels,
    as many as it takes to halve the side to 8 pixels or less, but at least two.

    Distances in its features compare only with those of the same weights.

    Args:
        num_classes: Width of the logits.
        image_size: Side of the images, in pixels; at least 8. Other sizes than this one are taken as well.
        accuracy: On validation images, in [0, 1], if known; kept in the file.
        channels: 1, of grey images, or 3, of colours.
        made_of: How it was trained, in words, if known; kept in the file.

    Raises:
        ValueError: `image_size` below 8, or other `channels`.
    """

    dim = 64

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 28,
        accuracy: float | None = None,
        channels: int = 1,
        made_of: str | None = None,
    ) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}; the classifier takes sides of at least 8 pixels.")
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; choose 1 for grey images, or 3 for colours.")
        self.num_classes, self.image_size, self.accuracy = num_classes, image_size, accuracy
        self.channels, self.made_of = channels, made_of
        blocks = _blocks_of_grey(image_size) if channels == 1 else _blocks_of_colours(image_size)
        last = next(block.out_channels for block in reversed(blocks) if isinstance(block, nn.Conv2d))
        self.trunk = nn.Sequential(
            *blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(last * 4 * 4, self.dim), nn.ReLU()
        )
        self.head = nn.Linear(self.dim, num_classes)

    @property
    def dims(self) -> dict[str, int]:
        """Width of each output."""
        return {"features": self.dim, "logits": self.num_classes}

    @property
    def name(self) -> str:
        """`classifier` and the fingerprint of the weights as they are now: it may be in training."""
        return f"classifier-{fingerprint(self)}"

    @ieee_float32()
    def forward(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Compute features (B, 64) and logits (B, num_classes) of uint8 (B, 3, H, W), or of a list of (3, H, W)."""
        if isinstance(images, list):
            found = [self(image[None]) for image in images]
            return {output: torch.cat([rows[output] for rows in found]) for output in self.dims}
        check_uint8(images)
        x = images.float()
        x = (x.mean(dim=1, keepdim=True) if self.channels == 1 else x) / 127.5 - 1  # (B, channels, H, W)
        features = self.trunk(x)  # (B, 64)
        return {"features": features, "logits": self.head(features)}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata holds the arguments of the constructor, and a checksum."""
        metadata = {"num_classes": self.num_classes, "image_size": self.image_size, "accuracy": self.accuracy}
        metadata |= {"channels": None if self.channels == 1 else self.channels, "made_of": self.made_of}
        metadata = {key: str(value) for key, value in metadata.items() if value is not None}
        content = save(self.state_dict(), {**metadata, "checksum": self._checksum(metadata)})
        with written_aside(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | Path | None) -> Self:
        """Read what `save` wrote, in evaluation mode.

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
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"'{path}' is no safetensors file, as `Classifier.save` writes, or is cut short: {error}."
            ) from error
        try:
            accuracy = float(metadata["accuracy"]) if "accuracy" in metadata else None
            sizes = int(metadata["num_classes"]), int(metadata["image_size"])
            classifier = cls(*sizes, accuracy, int(metadata.get("channels", 1)), metadata.get("made_of"))
            classifier.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"'{path}' does not hold a classifier written by `Classifier.save`.") from error
        known = metadata.pop("checksum", None)  # earlier versions wrote none
        if known is not None and known != classifier._checksum(metadata):
            raise ValueError(f"the classifier's weights '{path}' are damaged: they do not have their checksum.")
        return classifier.eval()

    def _checksum(self, metadata: dict[str, str]) -> str:
        """Compute the checksum of the weights and of what a file says of them."""
        return checksum_of(f"{sorted(metadata.items())} {sha256_of_weights(self)}".encode())


def _blocks_of_grey(image_size: int) -> list[nn.Module]:
    return [
        nn.Conv2d(1, 16, kernel_size=5, stride=2 if image_size >= 16 else 1, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    ]


def _blocks_of_colours(image_size: int) -> list[nn.Module]:
    """Make blocks that halve the side until it is 8 or less, two at least; the first leaves a side of 8 as it is."""
    blocks, before, side, width = [], 3, image_size, 32
    while len(blocks) < 6 or side > 8:
        stride = 2 if side > 8 or blocks else 1
        blocks += [nn.Conv2d(before, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before, width, side = width, min(2 * width, 128), -(-side // stride)
    return blocks
