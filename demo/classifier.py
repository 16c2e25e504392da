"""Train the small classifier that judges the samples, on the training images of a config; it never sees a sample.

python -m demo.classifier --data.name mnist --out runs/mnist/classifier.safetensors
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fid.training import train_classifier
from vca import create
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import FilePath, Spec, Strict
from vca_engine.config.schema import Seed
from vca_engine.images.datasets import DATASETS, ImageDataset


@dataclass(frozen=True)
class ClassifierArguments(Strict):
    """The images to train on.

    Args:
        data: Images by name, mnist or digits.
        out: File to write.
        seed: Seed of initialisation and order.
    """

    data: Spec
    out: FilePath
    seed: Seed = 0


@report_errors("demo.classifier")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, by default that of the process."""
    texts = {"prog": "python -m demo.classifier", "description": __doc__}
    args = parse(ClassifierArguments, argv, **texts, parts={"data": DATASETS})
    train, test = (create(DATASETS, {**args.data, "split": split}, "data") for split in ("train", "test"))
    pairs = [(pixels(images), torch.from_numpy(images.labels)) for images in (train, test)]
    classifier = train_classifier(*pairs, train.num_classes, seed=args.seed)
    classifier.save(args.out)
    print(f"wrote {args.out}: {classifier.accuracy:.1%} of {len(test)} test images right")


def pixels(images: ImageDataset) -> Tensor:
    """Stack all images: (N, 3, H, W) uint8."""
    array = np.stack([images.pixels(i) for i in range(len(images))])  # (N, H, W, C)
    return torch.from_numpy(array).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


if __name__ == "__main__":
    main()
