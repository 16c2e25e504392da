"""Networks that turn images into the features which a distance compares."""

from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from vca_engine.files import sha256_of_weights


class FeatureExtractor(nn.Module):
    """A network that turns images into features; your own is a subclass with `dims` and `forward`.

        class Colours(fid.FeatureExtractor):
            dims = {"features": 3}

            def forward(self, images):                                  # uint8 (B, 3, H, W)
                return {"features": images.float().mean(dim=(2, 3))}    # (B, 3)

        fid.evaluate("samples", "real_images", Colours())

    To take images of different sizes it has to accept a list of (3, H, W), too. The evaluator runs it in IEEE float32,
    whatever autocast and TF32 are set; to have that elsewhere, decorate `forward` with
    `@vca_engine.precision.ieee_float32()`.
    """

    dims: dict[str, int]  # width of each output, `features` among them
    label = "Frechet distance"  # what the distance is called, as in a table
    preset: str | None = None  # the protocol, if there are several for this network
    metrics: tuple[str, ...] = ("fd",)  # what is computed unless something else is asked for
    reads_weights = True  # whether there is a file of weights to `load`

    @classmethod
    def load(cls, path: str | Path | None) -> Self:
        """Make the network with the weights of a file; None means the published ones, or that there are none."""
        return cls(path) if cls.reads_weights else cls()

    @property
    def dim(self) -> int:
        """Width D of `features`."""
        return self.dims["features"]

    @cached_property
    def name(self) -> str:
        """The name of the class and the `fingerprint` of the weights: statistics of different networks never meet."""
        return f"{type(self).__name__.lower()}-{fingerprint(self)}"


class Described(FeatureExtractor):
    """Any module from uint8 (B, 3, H, W) to {"features": (B, D), ...}, with what the evaluator wants to know of it.

    Args:
        module: The module; what it says of itself (`name`, `label`, `preset`, `metrics`, `dims`) is believed.
        device: Where an image is run through it if it has no `dims`, to see their widths.

    Raises:
        ValueError: It gives something else.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module = module
        if not hasattr(module, "dims"):
            try:
                with torch.no_grad():
                    found = module.to(device).eval()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device))
                dims = {output: rows.shape[1] for output, rows in found.items()}
            except Exception as error:  # anything may stand in it
                raise ValueError(
                    f"the extractor {type(module).__name__} failed on an image of 64x64 pixels ({error}); derive it"
                    " from fid.FeatureExtractor and give it dims."
                ) from error
        self.dims = getattr(module, "dims", None) or dims
        if "features" not in self.dims:
            raise ValueError(f"the extractor {type(module).__name__} gives {list(self.dims)}; it has to give features.")
        self.label = getattr(module, "label", self.label)
        self.preset = getattr(module, "preset", self.preset)
        self.metrics = getattr(module, "metrics", self.metrics)

    @cached_property
    def name(self) -> str:
        """The module's, or that of its class with the fingerprint of the weights."""
        return getattr(self.module, "name", f"{type(self.module).__name__.lower()}-{fingerprint(self)}")

    def forward(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Run the module: uint8 (B, 3, H, W), or a list of (3, H, W), -> output: (B, D)."""
        return self.module(images)


def as_extractor(network: nn.Module | str, device: torch.device) -> FeatureExtractor:
    """Take a `FeatureExtractor` as it is, and `Described` of any other module; refuse a name."""
    if isinstance(network, str):
        raise ValueError(f"the extractor is a name; make it first: fid.build_extractor({network!r}, weights).")
    return network if isinstance(network, FeatureExtractor) else Described(network, device)


def fingerprint(module: nn.Module) -> str:
    """Shorten the SHA-256 of all weights of a network to eight hexadecimal digits."""
    return sha256_of_weights(module)[:8]
