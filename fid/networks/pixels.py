"""The pixels themselves as an extractor, coarsely: a distance that needs no network and no download."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fid.networks.extractor import FeatureExtractor
from vca_engine.images import uint8_batches


class Pixels(FeatureExtractor):
    """The colours of an image, averaged over a grid of cells: 192 numbers in [0, 1].

        features[c, i, j] = mean over cell (i, j) of x[c] / 255

    Of a side that is no multiple of the grid, neighbouring cells share pixels; an image smaller than the grid repeats
    them. The distance sees colours, brightness and coarse layout; it does not see sharpness, texture or objects.

    Args:
        side: Cells along each side.
    """

    reads_weights = False

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        self.side, self.dims = side, {"features": 3 * side**2}

    @property
    def name(self) -> str:
        """`pixels` and the grid, which is all that there is to know."""
        return f"pixels-{self.side}x{self.side}"

    def forward(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Compute features (B, 3 side side) of uint8 (B, 3, H, W), or of a list of (3, H, W)."""
        found = [F.adaptive_avg_pool2d(batch.float() / 255, self.side) for batch in uint8_batches(images)]
        return {"features": torch.cat(found).flatten(1)}
