"""Train a `Classifier` on one's own classes, whose features then give a number without any download."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fid.images import Images
from fid.networks.classifier import Classifier

EPOCHS, BATCH_SIZE, LEARNING_RATE = 10, 64, 5e-3
LEAST_STEPS, MOST_STEPS = 600, 6000  # of `train_extractor`: enough for a few hundred images, minutes for many
MOST_BYTES = 2**32  # of all images, which are in memory


def train_extractor(
    images: Images,
    *,
    num: int | None = None,
    held_out: float = 0.1,
    num_steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Classifier, int]:
    """Train a classifier on images with classes, and measure its accuracy on a share of them that it does not see.

    Args:
        images: Square, of one size, with `labels`.
        num: How many of them to take, evenly of all classes; not given means all.
        held_out: Share of these, evenly of all classes, on which the accuracy is measured.
        num_steps: Steps of training, of 64 images; not given means 10 epochs, but 600 at least and 6000 at most.
        seed: Of the choice of images, the initialisation and the order.
        device: Where it trains.
        progress: Show progress bars on stderr, where that is a terminal.

    Returns:
        The classifier, of grey images if none of them has colours, with its accuracy; and the number of images held
        out.

    Raises:
        ValueError: Images without classes, not square, of several sizes or too many; or a class is left with none to
            train on.
    """
    _check_images(images)
    chosen, held = _split(images.labels, num, held_out, seed)
    side = images.take([0])[0].shape
    if side[1] != side[2] or side[1] < 8:
        raise ValueError(
            f"the images of '{images.source}' are {side[2]}x{side[1]} pixels; the classifier takes squares of at least "
            "8 pixels. Pass --crop SIZE."
        )
    if (size := 3 * side[1] ** 2 * len(chosen)) > MOST_BYTES:
        fitting = MOST_BYTES * len(chosen) // size
        raise ValueError(f"the images take {size / 1e9:.1f} GB; take fewer with --num {fitting}, or a smaller --crop.")
    x, y = _read(images, chosen, progress), torch.from_numpy(images.labels[chosen])
    colours = not (x[:, :1] == x).all()
    classifier = train_classifier(
        (x[~held], y[~held]),
        (x[held], y[held]),
        int(images.labels.max()) + 1,
        channels=3 if colours else 1,
        num_steps=num_steps or min(max(EPOCHS * (len(x) // BATCH_SIZE), LEAST_STEPS), MOST_STEPS),
        seed=seed,
        device=device,
        progress=progress,
    )
    num_held = int(held.sum())
    classifier.made_of = f"{len(x) - num_held} images of {images.source}, {num_held} more held out, seed {seed}"
    return classifier, num_held


def _check_images(images: Images) -> None:
    if images.labels is None or len(np.unique(images.labels)) < 2:
        raise ValueError(
            f"'{images.source}' has no classes to train on: give a folder or .zip with a folder for each class, at "
            "least two, or an .npz with labels in arr_1."
        )
    if images.mixed_sizes:
        raise ValueError("the classifier is trained on images of one size; bring them to it with --crop SIZE.")


def _split(labels: np.ndarray, num: int | None, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose `num` images and hold out a share of them, both evenly of all classes: indices (num,), held out (num,)."""
    if not 0 < share <= 0.5:
        raise ValueError(f"the share held out is {share:g}; choose one above 0, and at most 0.5 (--held-out 0.1).")
    if num is not None and not 2 <= num <= len(labels):
        raise ValueError(f"--num is {num}; choose at least 2, and at most the {len(labels)} images that are there.")
    order = np.lexsort((np.random.default_rng(seed).permutation(len(labels)), labels))  # by class, in it by chance
    chosen = order if num is None else order[np.linspace(0, len(order) - 1, num).round().astype(int)]
    places = np.arange(len(chosen))
    held = np.floor((places + 1) * share) > np.floor(places * share)  # evenly over that order
    rising = chosen.argsort()
    chosen, held = chosen[rising], held[rising]
    if not held.any() or len(np.unique(labels[chosen[~held]])) < len(np.unique(labels)):
        raise ValueError(
            f"{len(chosen)} images of {len(np.unique(labels))} classes are too few to hold {share:g} of them out and "
            "have each class to train on; give more images, or another --held-out."
        )
    return chosen, held


def _read(images: Images, chosen: np.ndarray, progress: bool) -> Tensor:
    """Read the images with these rising indices (N,): (N, 3, H, W) uint8."""
    hidden, parts = not progress or None, []
    for part in tqdm(np.array_split(chosen, -(-len(chosen) // 1000)), desc=f"reads {images.source}", disable=hidden):
        found = images.take(part.tolist())
        if odd := [i for i, image in zip(part, found, strict=True) if image.shape != found[0].shape]:
            raise ValueError(f"image {odd[0]} of '{images.source}' has another size; make them one with --crop SIZE.")
        parts.append(torch.stack(found))
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"the images of '{images.source}' differ in size; make them one with --crop SIZE.")
    return torch.cat(parts)


def train_classifier(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    *,
    channels: int = 1,
    num_steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Classifier:
    """Train a classifier and measure its accuracy.

    Args:
        train: Images (N, 3, H, H) uint8 and their classes (N,), which it learns.
        test: The same, on which the accuracy is measured.
        num_classes: Number of classes.
        channels: 1 to see grey images only, 3 for colours.
        num_steps: Steps of training; not given means 10 epochs.
        seed: Of initialisation and order; on one kind of device the same seed gives the same weights.
        device: Where it trains.
        progress: Show a progress bar on stderr, where that is a terminal.
    """
    image_size = train[0].shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(num_classes, image_size, channels=channels).to(device)
        steps = num_steps or EPOCHS * (len(train[0]) // BATCH_SIZE)
        _fit(classifier, *train, shift=image_size // 16, num_steps=steps, progress=progress)
    classifier.accuracy = accuracy(classifier, *test)
    return classifier


def _fit(classifier: Classifier, images: Tensor, labels: Tensor, *, shift: int, num_steps: int, progress: bool) -> None:
    """Minimise the cross-entropy on images (N, 3, H, W) uint8, each moved by up to `shift` pixels either way."""
    device = next(classifier.parameters()).device
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
    classifier.train()
    for _ in tqdm(range(num_steps), desc="classifier", unit="step", disable=not progress or None):
        batch = torch.randint(len(images), (BATCH_SIZE,))
        dx, dy = torch.randint(-shift, shift + 1, (2,)).tolist()
        x = images[batch].roll((dy, dx), dims=(2, 3))
        F.cross_entropy(classifier(x.to(device))["logits"], labels[batch].to(device)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    classifier.eval()


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Compute the share of images (N, 3, H, W) uint8 whose class is recognised, of the classes (N,)."""
    device = next(classifier.parameters()).device
    right = [
        (classifier(x.to(device))["logits"].argmax(1).cpu() == y).sum()
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    ]
    return sum(right).item() / len(images)
