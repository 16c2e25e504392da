"""Train the small classifier that judges the samples, on the training images of a config; it never sees a sample.

python -m demo.classifier --data.name mnist --out runs/mnist/classifier.safetensors
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fid import Classifier
from vca import create
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import FilePath, Spec, Strict
from vca_engine.config.schema import Seed
from vca_engine.images.datasets import DATASETS, ImageDataset

EPOCHS, BATCH_SIZE, LEARNING_RATE = 10, 64, 5e-3


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
    torch.manual_seed(args.seed)
    classifier = Classifier(train.num_classes, train.image_size)
    fit(classifier, pixels(train), torch.from_numpy(train.labels), shift=train.image_size // 16)
    classifier.accuracy = accuracy(classifier, pixels(test), torch.from_numpy(test.labels))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}")
    classifier.save(partial)
    partial.rename(out)
    print(f"wrote {out}: {classifier.accuracy:.1%} of {len(test)} test images right")


def pixels(images: ImageDataset) -> Tensor:
    """Stack all images: (N, 3, H, W) uint8."""
    array = np.stack([images.pixels(i) for i in range(len(images))])  # (N, H, W, C)
    return torch.from_numpy(array).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


def fit(classifier: Classifier, images: Tensor, labels: Tensor, shift: int) -> None:
    """Minimise the cross-entropy on images (N, 3, H, W) uint8, each moved by up to `shift` pixels either way."""
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    classifier.train()
    for _ in tqdm(range(steps), desc="classifier", unit="step"):
        batch = torch.randint(len(images), (BATCH_SIZE,))
        dx, dy = torch.randint(-shift, shift + 1, (2,)).tolist()
        x = images[batch].roll((dy, dx), dims=(2, 3))
        F.cross_entropy(classifier(x)["logits"], labels[batch]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    classifier.eval()


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Compute the share of images (N, 3, H, W) uint8 whose class is recognised."""
    right = [
        (classifier(x)["logits"].argmax(1) == y).sum()
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    ]
    return sum(right).item() / len(images)


if __name__ == "__main__":
    main()
