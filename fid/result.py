"""What an evaluation gives: the numbers, the record of how they were made, and what looks wrong in them."""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fid.collector import Collected
from fid.features import FeatureExtractor
from vca_engine.files import written_aside

VERSION = 1  # of the numbers: it changes when any of them can
FEW_IMAGES = 10_000  # in a reference
IMAGENET_VALIDATION_FID = 1.68  # of the 50,000 validation images at 256 x 256 against ADM's reference
NAMES = {  # number -> how a table calls it, and its digits
    "sfid": ("sFID", 2),
    "inception_score": ("IS", 1),
    "precision": ("P", 2),
    "recall": ("R", 2),
    "density": ("D", 2),
    "coverage": ("C", 2),
    "kid": ("KID", 5),
    "mind": ("MIND", 4),
}


@dataclass(frozen=True)
class Result:
    """The numbers, as attributes (`result.fid`), and the record of how they were made.

    Args:
        values: Name -> number; None where it cannot be said, as the error of a value without groups.
        record: All of the JSON record but the values.
    """

    values: dict[str, Any]
    record: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("values", "record"):  # asked for while it is being unpickled
            raise AttributeError(name)
        if name in self.values:
            return self.values[name]
        raise AttributeError(f"this result has no {name!r}; it has {', '.join(self.values)}.")

    @property
    def warnings(self) -> list[str]:
        """What may make the numbers wrong, or not comparable."""
        return self.record["warnings"]

    def to_dict(self) -> dict[str, Any]:
        """The whole record, of JSON's types."""
        return {"schema": 1, **self.values, **self.record}

    def to_json(self, path: str | Path) -> None:
        """Writes the record; whole or not at all."""
        with written_aside(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: The file holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            split = list(found).index("label")  # of the record's first key; the values stand before it
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"'{path}' is not a record of an evaluation: {error}.") from error
        items = list(found.items())
        return cls(dict(items[1:split]), dict(items[split:]))

    def __str__(self) -> str:
        """One line fit for a table."""
        record, values, parts = self.record, self.values, []
        for name in [name for name in ("fid", "fd") if name in values]:
            error, floor = values[f"{name}_se"], values[f"{name}_noise_floor"]
            text = f"{record['label']}{_suffix(record)} {_short(values[name])}"
            if error is not None:
                text += f" ± {error:.2f}" if values[name] >= 1 else f" ± {error:.2g}"
            parts.append(text + (f" (noise floor {_short(floor)})" if floor is not None else ""))
        parts += [f"{label} {values[n]:.{digits}f}" for n, (label, digits) in NAMES.items() if n in values]
        reference = record["reference"]
        against = "no reference" if reference is None else f"against {reference['path']}"
        if reference and reference["kind"] == "adm":
            against = "ADM ref"
        mode = (record["labels"] or {}).get("mode")
        samples = f"{record['num_samples'] or 'an unknown number of'} {f'{mode}-label ' if mode else ''}samples"
        return f"{'  '.join(parts)}  ({against}, {record['protocol'] or 'unknown protocol'}, {samples})"


def _short(value: float) -> str:
    """Two decimals, as tables have them, or three digits of what is small."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _suffix(record: dict[str, Any]) -> str:
    """FID is of 50,000 samples; of others it is FID-10K, FID-1234."""
    num = record["num_samples"]
    if num in (None, 50_000) or record["label"] != "FID":
        return ""
    return f"-{short_count(num)}"


def short_count(num: int) -> str:
    """10000 -> 10K, 1234 -> 1234."""
    return f"{num // 1000}K" if num % 1000 == 0 else str(num)


def doubts(
    collected: Collected,
    values: dict[str, Any],
    extractor: FeatureExtractor,
    is_imagenet256: bool,
    reference: Collected | None,
    num_real: int | None = None,
    groups: int = 0,
) -> list[str]:
    """What looks wrong in the samples or in the numbers, a sentence each.

    Args:
        collected: What is known of the samples.
        values: The numbers.
        extractor: The network.
        is_imagenet256: Whether the reference is ADM's of ImageNet at 256 x 256.
        reference: What is known of the reference's images, if any were read.
        num_real: Images that the reference is made of, if that is known.
        groups: For the error bar.
    """
    num, found = collected.num, []
    if "fid" in values and num != 50_000:
        found.append(f"FID of {num} samples; the literature's is of 50000, and the two are not comparable.")
    if num < extractor.dim and ({"fid", "fd"} & values.keys()):
        found.append(f"{num} samples in {extractor.dim} dimensions: the distance is biased far upwards.")
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
    if collected.num_duplicates:
        found.append(
            f"{collected.num_duplicates} of {num} samples are exact duplicates of others (a seed used twice?)."
        )
    if collected.num_constant:
        found.append(f"{collected.num_constant} of {num} samples have one colour everywhere.")
    if collected.labels is not None and num > 1 and len(np.unique(collected.labels)) > 1:
        if (np.diff(collected.labels) >= 0).all() and "inception_score" in values and num > 5000:
            found.append("samples are in the order of their classes: the Inception Score in file order is far too low.")
        counts = collected.class_counts
        if counts.max() > 2 * counts.min() + 10:
            found.append(f"labels are unbalanced: {counts.min()} to {counts.max()} samples a class.")
    ordered, shuffled = values.get("inception_score"), values.get("inception_score_shuffled")
    if ordered is not None and num > 5000 and abs(ordered - shuffled) > 0.05 * shuffled:
        found.append(f"the Inception Score is {ordered:.1f} in file order and {shuffled:.1f} shuffled: sorted samples?")
    if reference is not None:
        if collected.sizes != reference.sizes and len(collected.sizes) == len(reference.sizes) == 1:
            (height, width), (real_height, real_width) = collected.sizes[0], reference.sizes[0]
            found.append(f"samples are {width}x{height}, the reference's images {real_width}x{real_height} pixels.")
        mine, real = collected.mean_colour, reference.mean_colour
        swapped = num >= 20 and np.abs(mine[::-1] - real).max() < 0.5 * np.abs(mine - real).max()
        if np.abs(mine - real).max() > (5 if swapped else 25):
            why = "red and blue swapped?" if swapped else "a wrong range of values?"
            text = " against ".join(str([round(float(c)) for c in colour]) for colour in (mine, real))
            found.append(f"the mean colour is far from the reference's, {text} ({why}).")
    weights = getattr(extractor, "weights", None)
    if weights and not weights.get("published", True):
        found.append(f"'{weights['path']}' holds other weights than the published ones: compare with nobody else.")
    if is_imagenet256 and values.get("fid", np.inf) < IMAGENET_VALIDATION_FID:
        found.append("the FID is below that of the real ImageNet-256 validation set, 1.68: it no longer ranks images.")
    return found


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def versions() -> dict[str, Any]:
    """What the numbers may depend on."""
    return {"fid": VERSION, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
