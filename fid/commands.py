"""Whole evaluations in one call: of images, of two sets of statistics, and of what is to be a reference."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fid.distributed import gather_objects, rank_and_size
from fid.evaluator import Evaluator
from fid.frechet import noise_floor
from fid.images import Images
from fid.metrics import METRICS
from fid.metrics.frechet_distance import short_count
from fid.metrics.metric import Side
from fid.networks import EXTRACTORS, build_extractor
from fid.networks.extractor import FeatureExtractor
from fid.options import Options
from fid.references import Reference, check_protocol, describe, holds_statistics, load_ref, open_reference
from fid.result import Result, comparable_with, versions_of_packages
from vca_engine.records import read_json


def open_evaluator(
    reference: str | None,
    extractor: str = "inception",
    *,
    weights: str | Path | None = None,
    preset: str = "adm",
    metrics: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> Evaluator:
    """Make an evaluator by names, with its reference open and its network on `device`.

    Args:
        reference: File of statistics or images to compare with, see `open_reference`.
        extractor: Name in `EXTRACTORS`.
        weights: File of the extractor's weights.
        preset: Protocol of Inception, a name in `PRESETS`.
        metrics: Names in `METRICS`; not given means those of the preset.
        device: Of the network.

    Raises:
        FileNotFoundError: No such reference or weights.
        ValueError: An unknown name, or a reference that cannot be read.
    """
    label = getattr(EXTRACTORS.get(extractor), "label", "FID")
    opened = open_reference(reference, label)  # before the network: it fails sooner
    return Evaluator(opened, extractor=build_extractor(extractor, weights, preset), metrics=metrics, device=device)


def evaluate(
    samples: Any,
    ref: Any = None,
    extractor: FeatureExtractor | None = None,
    *,
    num: int | None = None,
    allow_fewer: bool = False,
    evaluator: Evaluator | None = None,
    record: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Measure samples against a reference, in one call.

    Args:
        samples: Images in any form that `Images` takes, or an iterator of uint8 batches, (B, 3, H, W) or (B, H, W, 3),
            or of pairs of them and their labels, as a DataLoader gives.
        ref: As `Evaluator` takes it.
        extractor: Another network than Inception.
        num: The first `num` samples; not given means all.
        allow_fewer: Take what there is if there are fewer than `num`.
        evaluator: One that is there already, in place of `ref`, `extractor` and `options`; it is reset first.
        record: More for the record; see `Evaluator.compute`. What sample.py wrote beside the samples is in it anyway.
        options: `mixed_sizes` and `drop_alpha`, of `Images`, and those of `Evaluator`.

    Raises:
        FileNotFoundError: No such samples, reference or weights.
        ValueError: What `Images` or `Evaluator` refuse, or fewer samples than `num`.
    """
    choices = {name: options.pop(name) for name in ("mixed_sizes", "drop_alpha") if name in options}
    reference = evaluator.reference if evaluator else open_reference(ref, getattr(extractor, "label", "FID"), **choices)
    if (found := statistics_in(samples)) is not None:
        if num is not None:
            raise ValueError(f"'{samples}' holds statistics, of which one cannot take the first {num} images.")
        return compare(found, reference, options.get("force", False))
    if isinstance(samples, str | Path | Tensor | np.ndarray):
        samples = Images(samples, **choices)
    if isinstance(samples, Images) and num is not None:
        if samples.num < num and not allow_fewer:
            raise ValueError(too_few(samples.source, samples.num, num, reference))
        samples = samples.first(min(num, samples.num))
    if evaluator is None:
        evaluator = Evaluator(reference, extractor=extractor, **options)
    evaluator.reset()
    evaluator.prepare()
    if isinstance(samples, Images):
        evaluator.feed(samples)
        return evaluator.compute(samples.num, **_record_of(samples, record or {}, num, evaluator.process_group))
    _feed_batches(evaluator, samples, num)
    if num is not None and not allow_fewer and len(evaluator.seen) < num:
        raise ValueError(too_few("the iterator", len(evaluator.seen), num, reference))
    return evaluator.compute(**(record or {}))


def _feed_batches(evaluator: Evaluator, batches: Iterable[Any], num: int | None) -> None:
    """Add batches, or pairs of them and their labels, up to `num` images."""
    for batch in batches:
        images, labels = batch if isinstance(batch, tuple | list) else (batch, None)
        left = len(images) if num is None else min(len(images), num - len(evaluator.seen))
        evaluator.update(images[:left], labels=None if labels is None else labels[:left])
        if len(evaluator.seen) == num:
            break


def _record_of(samples: Images, record: dict[str, Any], num: int | None, process_group: Any) -> dict[str, Any]:
    """Add to a record all that is known of the samples' files, with warnings. Collective."""
    record = {**sample_record_of(samples.source), **record}
    promised = record.get("sample", {}).get("num")
    first = rank_and_size(process_group)[0] == 0
    said = [text for part in gather_objects(samples.warnings(first), process_group) for text in part]
    said += record.pop("warnings", [])
    if promised and num is None and promised != samples.num:
        said.append(f"'{samples.source}' has {samples.num} images, and what stands beside it says {promised}.")
    if samples.lossy:
        said.append(f"images of '{samples.source}' are in a lossy format, which moves every distance.")
    described = {"kind": samples.kind, "path": samples.source, "lossy": samples.lossy}
    return {"input": described, "warnings": list(dict.fromkeys(said)), **record}


def sample_record_of(source: str) -> dict[str, Any]:
    """Read how samples were made, for the record of their metrics: `sample` and `labels_mode`.

    sample.py writes it beside them; {} where there is nothing of that kind, `warnings` where it cannot be read.
    """
    file = sample_record_file(source)
    try:
        if not file.is_file():
            return {}
        found = read_json(file)
    except (OSError, ValueError) as error:
        return {"warnings": [f"how the samples were made is left out: {error}"]}
    if not {"sampler", "seed", "labels"} <= found.keys():
        return {}
    return {"sample": found, "labels_mode": found["labels"]}


def sample_record_file(source: str) -> Path:
    """Name the file that sample.py writes beside samples: FILE.json, or FOLDER/samples.json."""
    path = Path(source)
    return path / "samples.json" if path.is_dir() else path.with_name(f"{path.name}.json")


def statistics_in(samples: Any) -> Reference | None:
    """Read the statistics that `samples` names, if it is a file of them and holds no images."""
    if isinstance(samples, str | Path) and holds_statistics(samples):
        found = load_ref(samples)
        return found if found.images is None else None
    return None


def compare(a: str | Path | Reference, b: Any, force: bool = False) -> Result:
    """Compute the Frechet distance between two sets of statistics, without a network.

    Args:
        a: File of statistics, of the samples.
        b: The same, of the reference.
        force: Compare statistics of different protocols or extractors all the same.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not statistics, or of different extractors.
    """
    a, b = a if isinstance(a, Reference) else load_ref(a), open_reference(b)
    if b is None:
        raise ValueError("there is no reference to compare with; name it with --ref.")
    if not isinstance(b, Reference):
        raise ValueError(
            f"'{a.source}' holds statistics, '{b.source}' images: run `python -m fid stats` on these first."
        )
    one = a.statistics["features"]
    dims = {output: given.dim for output, given in a.statistics.items()}
    warnings = check_protocol(b, dims, a.preset, a.extractor, force, f"'{a.source}' is")
    if a.preset is None and a.extractor is None:
        warnings.append(f"'{a.source}' does not say by which protocol it was made.")
    inception = one.dim == 2048 and (a.extractor or b.extractor or "inception").startswith("inception")
    values, sides = {}, (Side(dict(a.statistics)), Side(dict(b.statistics)))
    for name in ("fid" if inception else "fd", "sfid"):
        if METRICS[name].output in a.statistics.keys() & b.statistics.keys():
            values |= METRICS[name].compute(*sides, Options())
    described, label = describe(b), "FID" if inception else FeatureExtractor.label
    del described["crop"]
    record = {
        "label": label,
        "num_samples": a.num_images,
        "protocol": a.preset or b.preset or a.extractor or b.extractor,
        "extractor": a.extractor or b.extractor,
        "compares": comparable_with(label, a.extractor or b.extractor),
        "reference": described,
        "labels": None,
        "input": {"kind": a.kind, "path": a.source, "sha256": a.sha256},
        "versions": versions_of_packages(),
        "warnings": warnings,
    }
    return Result(values, record)


def statistics(
    images: Any, extractor: FeatureExtractor | None = None, *, num: int | None = None, **options: Any
) -> Reference:
    """Compute the statistics of images, fit to be a reference.

    Args:
        images: As `Images` takes them.
        extractor: The network; not given means Inception.
        num: The first `num` images; not given means all.
        options: Of `Evaluator`: preset, weights, device, batch_size, ...
    """
    images = images if isinstance(images, Images) else Images(images, num)
    evaluator = Evaluator(None, extractor=extractor, metrics=(), groups=0, **options)
    evaluator.feed(images)
    return replace(evaluator.statistics(), source=images.source, crop=images.crop)


def too_few(what: str, found: int, num: int, reference: Any = None) -> str:
    """Write the sentence for fewer samples than asked for, with the difference that is due to their number alone."""
    names = f"FID-{short_count(found)} is not comparable with FID-{short_count(num)}"
    bias = ""
    if isinstance(reference, Reference) and found > 0:
        H = reference.statistics["features"].factor
        bias = f" (expected bias about +{noise_floor(H, found) - noise_floor(H, num):.2g})"
    return f"only {found} of {num} samples in {what}. {names}{bias}. Choose --num {found}, or pass --allow-fewer."
