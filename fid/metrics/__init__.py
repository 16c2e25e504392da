"""The metrics by name: one entry of `METRICS` each, which `--metrics` chooses from."""

import time
from collections.abc import Sequence
from typing import Any

from fid.images import Images
from fid.metrics.density_coverage import DensityCoverage
from fid.metrics.frechet_distance import FrechetDistance
from fid.metrics.inception_score import InceptionScore
from fid.metrics.kid import KID
from fid.metrics.metric import Metric, Side
from fid.metrics.mind import MIND
from fid.metrics.precision_recall import PrecisionRecall
from fid.networks.extractor import FeatureExtractor
from fid.options import Options
from fid.references import Reference

METRICS: dict[str, Metric] = {  # printed in this order
    "fid": FrechetDistance("fid", "features"),  # of Inception
    "fd": FrechetDistance("fd", "features", title="any extractor"),
    "sfid": FrechetDistance("sfid", "spatial", main=False, heading="sFID"),
    "is": InceptionScore(),
    "pr": PrecisionRecall(),
    "dc": DensityCoverage(),
    "kid": KID(),
    "mind": MIND(),
}


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError if one of the names is not in `METRICS`."""
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"no metric is called {unknown[0]!r}; choose from {', '.join(METRICS)}.")


def choose_metrics(
    names: str | Sequence[str] | None, extractor: FeatureExtractor, reference: Reference | Images | None
) -> tuple[tuple[str, ...], list[str]]:
    """Choose the metrics that can be had.

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
    check_names(names or ())
    chosen = tuple(extractor.metrics if names is None else names)
    impossible = {name: why for name in chosen if (why := METRICS[name].why_not(extractor, reference))}
    if not impossible:
        return chosen, []
    possible = tuple(name for name in chosen if name not in impossible)
    what, hint = "; ".join(f"{name}: {why}" for name, why in impossible.items()), ""
    if isinstance(reference, Reference) and extractor.label == "FID":
        hint = " sFID needs mu_s, sigma_s and P/R needs arr_0 (use VIRTUAL_imagenet256_labeled.npz)."
    if names is not None or not possible:
        raise ValueError(f"cannot compute {what}.{hint}")
    return possible, [f"left out {what}.{hint} Continuing with {', '.join(possible)}."]


def outputs_of(names: Sequence[str], side: str, form: str, more: set[str]) -> list[str]:
    """List the extractor's outputs of which metrics take the `form`, statistics or rows, of a side, and `more`."""
    return sorted({METRICS[name].output for name in names if getattr(METRICS[name], side) == form} | more)


def compute_metrics(
    names: Sequence[str], asked: bool, samples: Side, reference: Side, options: Options
) -> tuple[dict[str, Any], list[str], dict[str, float]]:
    """Compute metrics of all samples.

    Args:
        names: In `METRICS`.
        asked: Whether somebody named them; else one that the samples are too few for is left out, with a warning.
        samples: The samples.
        reference: The reference.
        options: Choices of the evaluation.

    Returns:
        The numbers, warnings, and the seconds of each metric.

    Raises:
        ValueError: Too few samples for a metric that was asked for, or is the main one.
    """
    values, left_out, seconds = {}, [], {}
    for name in names:
        start = time.perf_counter()
        try:
            values |= METRICS[name].compute(samples, reference, options)
        except ValueError as error:
            if asked or METRICS[name].main:
                raise
            left_out.append(f"left out {name}: {error}")
        seconds[name] = time.perf_counter() - start
    return values, left_out, seconds
