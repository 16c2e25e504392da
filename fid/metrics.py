"""The metrics by name: what each one needs of the samples and of the reference, and the numbers it gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fid import scores
from fid.features import FeatureExtractor
from fid.frechet import frechet_terms, jackknife, noise_floor
from fid.images import Images
from fid.moments import Moments, Statistics
from fid.references import Reference


@dataclass
class Side:
    """What is known of a set of images: statistics of some outputs of the extractor, the whole rows of others.

    Of a reference, `rows` may belong to other images than `statistics`: the file of ADM holds statistics of the training
    set and 10,000 of its images.
    """

    statistics: dict[str, Statistics] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)  # of samples: the same in groups, for error bars
    rows: dict[str, Tensor] = field(default_factory=dict)  # (N, D) each, in order of the image's index


@dataclass(frozen=True)
class Options:
    """What a user may choose in the metrics.

    Args:
        pr_compat: Arithmetic of precision and recall: `adm-fp16` rounds as the published script does, `fp32` does not.
        device: Where distances between rows are computed.
    """

    pr_compat: str = "adm-fp16"
    device: Any = "cpu"


@dataclass(frozen=True)
class Metric:
    """A metric: `compute(samples, reference, options)` gives its numbers by their names in the record.

    `output` is the extractor's output that it looks at; `samples` and `reference` say what it takes of each side.
    """

    compute: Callable[[Side, Side, Options], dict[str, Any]]
    output: str
    samples: str  # "statistics" or "rows"
    reference: str | None  # the same, or None


def _frechet(name: str, output: str, error_bar: bool = True) -> Callable[[Side, Side, Options], dict[str, Any]]:
    def compute(samples: Side, reference: Side, options: Options) -> dict[str, Any]:
        """Frechet distance; with its standard error and its limit for infinitely many samples where groups are there."""
        side, given = reference.statistics[output], samples.statistics[output]
        mean_term, cov_term = frechet_terms(side.mean, side.factor, given.mean, given.cov)
        value = mean_term + cov_term
        if not error_bar:
            return {name: value}
        found = {name: value, f"{name}_se": None, f"{name}_inf": None}
        parts = samples.moments[output].leave_one_out() if output in samples.moments else ()
        left_out = [sum(frechet_terms(side.mean, side.factor, part.mean, part.cov)) for part in parts]
        if left_out:
            found[f"{name}_se"], found[f"{name}_inf"] = jackknife(value, left_out)
        floor = noise_floor(side.factor, given.num) if given.num else None
        if floor is not None and side.num:  # the reference is a sample, too
            floor += noise_floor(side.factor, side.num)
        return {**found, f"{name}_noise_floor": floor, f"{name}_mean_term": mean_term, f"{name}_cov_term": cov_term}

    return compute


def _inception_score(samples: Side, reference: Side, options: Options) -> dict[str, Any]:
    """In the order of the files by 5,000, as ADM does, and shuffled into 10 parts, as torch-fidelity does."""
    logits = samples.rows["logits"]
    mean, std = scores.inception_score(logits, chunk=5000)
    shuffled, _ = scores.inception_score(logits, chunk=None, splits=min(10, len(logits)), seed=2020)
    return {"inception_score": mean, "inception_score_std": std, "inception_score_shuffled": shuffled}


def _precision_recall(samples: Side, reference: Side, options: Options) -> dict[str, Any]:
    """The share of samples near real images, and of real images near samples."""
    real, fake = reference.rows["features"], samples.rows["features"]
    precision, recall = scores.precision_recall(real, fake, k=3, arithmetic=options.pr_compat, device=options.device)
    sizes = {"k": 3, "num_real": len(real), "num_fake": len(fake), "arithmetic": options.pr_compat}
    return {"precision": precision, "recall": recall, "pr": sizes}


def _density_coverage(samples: Side, reference: Side, options: Options) -> dict[str, Any]:
    """The same two, less sensitive to outliers."""
    density, coverage = scores.density_coverage(
        reference.rows["features"], samples.rows["features"], k=5, device=options.device
    )
    return {"density": density, "coverage": coverage}


def _kid(samples: Side, reference: Side, options: Options) -> dict[str, Any]:
    """Kernel distance: unbiased, so small sets of different sizes compare."""
    real, fake = reference.rows["features"], samples.rows["features"]
    size = min(1000, len(real), len(fake))
    whole = size == len(real) == len(fake)  # then all subsets are the same
    mean, std = scores.kid(real, fake, subsets=1 if whole else 100, size=size, device=options.device)
    return {"kid": mean, "kid_std": None if whole else std, "kid_subset_size": size}


def _mind(samples: Side, reference: Side, options: Options) -> dict[str, Any]:
    """Distance of the marginals in random directions."""
    return {"mind": scores.mind(reference.rows["features"], samples.rows["features"], device=options.device)}


METRICS = {
    "fid": Metric(_frechet("fid", "features"), "features", "statistics", "statistics"),  # of Inception
    "fd": Metric(_frechet("fd", "features"), "features", "statistics", "statistics"),  # the same of any other extractor
    "sfid": Metric(_frechet("sfid", "spatial", error_bar=False), "spatial", "statistics", "statistics"),
    "is": Metric(_inception_score, "logits", "rows", None),
    "pr": Metric(_precision_recall, "features", "rows", "rows"),
    "dc": Metric(_density_coverage, "features", "rows", "rows"),
    "kid": Metric(_kid, "features", "rows", "rows"),
    "mind": Metric(_mind, "features", "rows", "rows"),
}


def choose_metrics(
    names: str | Sequence[str] | None, extractor: FeatureExtractor, reference: Reference | Images | None
) -> tuple[tuple[str, ...], list[str]]:
    """The metrics that can be had.

    Args:
        names: In `METRICS`. Not given means those of the extractor, less what the reference cannot give.
        extractor: The network.
        reference: What samples are to be compared with.

    Returns:
        Their names, and a warning of what was left out.

    Raises:
        ValueError: An unknown name, one that was given and cannot be had, or none that can.
    """
    if isinstance(names, str):
        names = [names]
    if unknown := [name for name in names or () if name not in METRICS]:
        raise ValueError(f"no metric is called {unknown[0]!r}; choose from {', '.join(METRICS)}.")
    chosen = tuple(extractor.metrics if names is None else names)
    impossible = {name: why for name in chosen if (why := _why_not(name, extractor, reference))}
    if not impossible:
        return chosen, []
    possible = tuple(name for name in chosen if name not in impossible)
    what, hint = "; ".join(f"{name}: {why}" for name, why in impossible.items()), ""
    if isinstance(reference, Reference) and extractor.label == "FID":
        hint = " sFID needs mu_s, sigma_s and P/R needs arr_0 (use VIRTUAL_imagenet256_labeled.npz)."
    if names is not None or not possible:
        raise ValueError(f"cannot compute {what}.{hint}")
    return possible, [f"left out {what}.{hint} Continuing with {', '.join(possible)}."]


def _why_not(name: str, extractor: FeatureExtractor, reference: Reference | Images | None) -> str | None:
    """Why a metric cannot be had; None if it can."""
    metric = METRICS[name]
    if metric.output not in extractor.dims:
        return f"{extractor.name} has no output {metric.output!r}"
    if name == "fid" and extractor.label != "FID":
        return f"it is defined by Inception; with {extractor.name} choose fd"
    if metric.reference and reference is None:
        return "there is no reference"
    if isinstance(reference, Reference):
        if metric.reference == "statistics" and metric.output not in reference.statistics:
            return f"'{reference.source}' has no statistics of {metric.output}"
        if metric.reference == "rows" and reference.images is None:
            return f"'{reference.source}' has no images (arr_0)"
    return None
