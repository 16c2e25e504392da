"""Warnings of what looks wrong in the samples, or makes their numbers incomparable."""

from typing import Any

import numpy as np

from fid.collector import Summary
from fid.networks.extractor import FeatureExtractor

FEW_IMAGES = 10_000  # in a reference
ROUNDING = 1e-6  # relative spread of features that float32 makes of one and the same, with room
IMAGENET_VALIDATION_FID = 1.68  # of the 50,000 validation images at 256 x 256 against ADM's reference


def check_features(images: Summary, extractor: str, what: str) -> None:
    """Check that features tell images apart; those of a network without a signal, as of zeros, give a distance of 0.

    Args:
        images: All that is known of the images.
        extractor: Name of the network.
        what: The images in words.

    Raises:
        ValueError: They are 0 for all images, or the same to rounding for images that are not all the same.
    """
    for output in sorted({*images.sums, *images.rows}) if images.num > 1 else ():
        if output in images.rows:
            rows = images.rows[output].double().numpy()
            mean, variance = rows.mean(axis=0), rows.var(axis=0).sum()
        else:
            found = images.side.statistics[output]
            mean, variance = found.mean, np.trace(found.cov)
        length = np.linalg.norm(mean)
        alike = variance <= (ROUNDING * length) ** 2
        if alike and (length == 0 or images.num_duplicates < images.num - 1):
            kind = "only zeros" if length == 0 else "the same numbers"
            raise ValueError(
                f"{extractor} gives {kind} ({output}) for all {images.num} {what}, so a distance would say nothing: "
                "give it other weights, or choose another extractor."
            )


def find_problems(
    values: dict[str, Any],
    samples: Summary,
    extractor: FeatureExtractor,
    groups: int,
    reference: dict[str, Any] | None,
    real: Summary | None,
) -> list[str]:
    """Look for what is wrong, and say it in a sentence each.

    Args:
        values: The numbers.
        samples: All that is known of the samples.
        extractor: The network.
        groups: For the error bar.
        reference: As the record describes it.
        real: All that is known of the reference's images, if any were read.
    """
    reference = reference or {"kind": None, "num_images": None}
    found = _in_numbers(values, samples.num, extractor.dim, groups, reference["num_images"]) + _in(samples, values)
    if real is not None:
        found += _between(samples, real)
    weights = getattr(extractor, "weights", None)
    if weights and not weights.get("published", True):
        found.append(f"'{weights['path']}' holds other weights than the published ones: compare with nobody else.")
    imagenet = reference["kind"] == "adm" and "imagenet256" in reference["path"].lower()
    if imagenet and values.get("fid", np.inf) < IMAGENET_VALIDATION_FID:
        found.append("the FID is below that of the real ImageNet-256 validation set, 1.68: it no longer ranks images.")
    return found


def _in_numbers(values: dict[str, Any], num: int, dim: int, groups: int, num_real: int | None) -> list[str]:
    found = []
    if "fid" in values and num != 50_000:
        found.append(f"FID of {num} samples; the literature's is of 50000, and the two are not comparable.")
    if num < dim and ({"fid", "fd"} & values.keys()):
        found.append(f"{num} samples in {dim} dimensions: the distance is biased far upwards.")
    if num_real is not None and num_real < FEW_IMAGES:
        found.append(
            f"the reference is of {num_real} images only: it is noisy itself, which the error bar does not show."
        )
    for name in ("fid", "fd"):
        if values.get(f"{name}_noise_floor") and values[name] < 0.5 * values[f"{name}_noise_floor"]:
            found.append("the distance is far below the noise floor: are these the reference's own images?")
        if name in values and values[f"{name}_se"] is None and groups > 1:
            found.append(f"{num} samples are too few for {groups} groups: there is no error bar.")
    if values.get("kid_subset_size", 1000) < 1000:
        found.append(f"KID is of subsets of {values['kid_subset_size']}, the literature's of 1000.")
    return found


def _in(samples: Summary, values: dict[str, Any]) -> list[str]:
    num, found = samples.num, []
    if samples.num_duplicates:
        found.append(f"{samples.num_duplicates} of {num} samples are exact duplicates of others (a seed used twice?).")
    if samples.num_constant:
        found.append(f"{samples.num_constant} of {num} samples have one colour everywhere.")
    if samples.labels is not None and num > 1 and len(np.unique(samples.labels)) > 1:
        if samples.class_sorted and "inception_score" in values and num > 5000:
            found.append("samples are in the order of their classes: the Inception Score in file order is far too low.")
        counts = samples.class_counts
        if counts.max() > 2 * counts.min() + 10:
            found.append(f"labels are unbalanced: {counts.min()} to {counts.max()} samples a class.")
    ordered, shuffled = values.get("inception_score"), values.get("inception_score_shuffled")
    if ordered is not None and num > 5000 and abs(ordered - shuffled) > 0.05 * shuffled:
        found.append(f"the Inception Score is {ordered:.1f} in file order and {shuffled:.1f} shuffled: sorted samples?")
    return found


def _between(samples: Summary, real: Summary) -> list[str]:
    found = []
    if samples.sizes != real.sizes and len(samples.sizes) == len(real.sizes) == 1:
        (height, width), (real_height, real_width) = samples.sizes[0], real.sizes[0]
        found.append(f"samples are {width}x{height}, the reference's images {real_width}x{real_height} pixels.")
    colours = samples.mean_colour, real.mean_colour
    far = np.abs(colours[0] - colours[1]).max()
    swapped = samples.num >= 20 and np.abs(colours[0][::-1] - colours[1]).max() < 0.5 * far
    if far > (5 if swapped else 25):
        why = "red and blue swapped?" if swapped else "a wrong range of values?"
        text = " against ".join(str([round(float(c)) for c in colour]) for colour in colours)
        found.append(f"the mean colour is far from the reference's, {text} ({why}).")
    return found
