"""From images to statistics, and from two sets of statistics to a distance."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fid.features import FeatureExtractor
from fid.frechet import frechet_distance
from fid.images import Images
from fid.moments import Moments, Statistics, holds_statistics, load_statistics

Source = str | Path | Tensor | Images | Statistics


@dataclass(frozen=True)
class Result:
    """A distance, with what one has to know to compare it with another."""

    name: str  # "FID", "FID-1000" (Inception features of other than 50,000 images), or "Frechet distance"
    value: float
    extractor: str
    dim: int  # of the features
    num_images: int | None
    reference: str
    reference_num_images: int | None


@torch.no_grad()
def statistics(
    images: str | Path | Tensor | Images, extractor: FeatureExtractor, batch_size: int = 64, num: int | None = None
) -> Statistics:
    """Mean and covariance of the features of images, with a progress bar on stderr where that is a terminal.

    Every batch that the network sees has `batch_size` images (the last one is padded, and the padding's features are
    dropped), since convolutions of another shape may run in another kernel that rounds otherwise.

    Args:
        images: As `Images` takes them.
        extractor: On the device where it is to run.
        batch_size: Images in a forward pass.
        num: The first `num` of the images; all of them if not given.

    Raises:
        FileNotFoundError: No such images.
        ValueError: Images that are not uniform uint8, fewer than 2 or than `num`, or features that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    images = images if isinstance(images, Images) else Images(images, num)
    device = next(extractor.parameters()).device
    moments = Moments(extractor.dim)
    was_training = extractor.training
    extractor.eval()
    try:
        with tqdm(total=images.num, desc=f"features of {images.source}", unit="image", disable=None) as progress:
            for batch in images.batches(batch_size):  # (B, 3, H, W)
                padded = F.pad(batch, (0, 0, 0, 0, 0, 0, 0, batch_size - len(batch)))
                features = extractor(padded.to(device))["features"]  # (batch_size, D)
                moments.update(features[: len(batch)])
                progress.update(len(batch))
    finally:
        extractor.train(was_training)
    return Statistics(moments.mean, moments.cov, moments.num, extractor.name, images.source)


def evaluate(
    samples: Source,
    reference: Source,
    extractor: FeatureExtractor | None = None,
    batch_size: int = 64,
    num: int | None = None,
) -> Result:
    """The Frechet distance between samples and a reference.

    Args:
        samples: Images, or an .npz of their statistics.
        reference: The same; all its images are used.
        extractor: Makes the statistics of images; not needed for two sets of statistics.
        batch_size: Images in a forward pass.
        num: The first `num` of the samples; all of them if not given.

    Raises:
        FileNotFoundError: No such images or statistics.
        ValueError: Statistics of different extractors, or what `statistics` refuses.
    """
    samples, reference = read(samples, num), read(reference)
    if extractor is None and (isinstance(samples, Images) or isinstance(reference, Images)):
        raise ValueError("an extractor is needed to make statistics of images; only two statistics go without one.")
    (name1, dim1), (name2, dim2) = _features(samples, extractor), _features(reference, extractor)
    if dim1 != dim2 or (name1 and name2 and name1 != name2):
        raise ValueError(
            f"'{samples.source}' has features of {name1 or 'an extractor without a name'} ({dim1}-d), "
            f"'{reference.source}' of {name2 or 'an extractor without a name'} ({dim2}-d); use the same for both."
        )
    if isinstance(reference, Images):
        reference = statistics(reference, extractor, batch_size)
    if isinstance(samples, Images):
        samples = statistics(samples, extractor, batch_size)
    value = frechet_distance(reference.mean, reference.cov, samples.mean, samples.cov)
    used = name1 or name2 or "unknown"
    name = "Frechet distance"
    if used.startswith("inception-"):
        name = "FID" if samples.num in (None, 50_000) else f"FID-{samples.num}"
    return Result(name, value, used, dim1, samples.num, reference.source, reference.num)


def read(source: Source, num: int | None = None) -> Images | Statistics:
    """What `source` names; images are opened and counted, but not read yet. `num` as in `Images`."""
    if isinstance(source, Images | Statistics):
        return source
    if isinstance(source, Tensor) or not holds_statistics(source):
        return Images(source, num)
    if num is not None:
        raise ValueError(f"'{source}' holds statistics, of which one cannot take the first {num} images.")
    return load_statistics(source)


def _features(side: Images | Statistics, extractor: FeatureExtractor | None) -> tuple[str | None, int]:
    """Name and width of the features that `side` has or will have."""
    return (side.extractor, side.dim) if isinstance(side, Statistics) else (extractor.name, extractor.dim)
