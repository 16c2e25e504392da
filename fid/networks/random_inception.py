"""Inception with random weights as an extractor: its architecture without a download, and without what it learned."""

from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from fid.networks.extractor import FeatureExtractor, fingerprint
from fid.networks.inception import inception_network, network_input
from vca_engine.precision import ieee_float32


class RandomInception(FeatureExtractor):
    """The 2048 pooled features of FID's Inception, with weights that are random and the same everywhere.

    Each weight of a convolution is drawn from a Gaussian of variance 2 / fan_in (He et al., arXiv:1502.01852), by
    numpy's generator, whose numbers do not depend on the machine; batch normalisations are the identity. Images are
    resized as by the preset `adm`. Random features tell more from less alike, but know no objects (Naeem et al.,
    arXiv:2002.09797, use those of VGG so); the distance is no FID.

    Args:
        seed: Of the weights; another one is another extractor.
    """

    reads_weights = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.dims = {"features": 2048}
        self.network = inception_network()
        del self.network.fc
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            for module in self.network.modules():
                if isinstance(module, nn.Conv2d):
                    drawn = rng.standard_normal(module.weight.shape, dtype=np.float32)
                    module.weight.copy_(torch.from_numpy(drawn)).mul_((2 / module.weight[0].numel()) ** 0.5)
        self.name = f"random-inception-{fingerprint(self)}"
        self.network.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    @ieee_float32()
    def forward(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Compute features (B, 2048) of uint8 (B, 3, H, W), or of a list of (3, H, W)."""
        x = network_input(images, "adm", 299)
        for block in self.network.children():  # in the order of the graph
            x = block(x)
        return {"features": x.flatten(1)}

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)
