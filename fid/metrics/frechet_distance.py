"""FID, sFID and the same distance of any other extractor; the formula is in `fid.frechet`."""

from typing import Any

from fid.frechet import frechet_terms, jackknife, noise_floor
from fid.images import Images
from fid.metrics.metric import Metric, Side
from fid.networks.extractor import FeatureExtractor
from fid.options import Options
from fid.references import Reference


class FrechetDistance(Metric):
    """The Frechet distance between Gaussians fitted to an output of the extractor.

    Args:
        name: Of the number in the record.
        output: The output.
        main: Give its standard error and its limit for infinitely many samples, where groups are there, the noise
            floor, and its two terms; without it, there is no result.
        heading: In the line for a table, of one that is not `main`.
        title: What it is called where its name does not say it.
    """

    samples = reference = "statistics"

    def __init__(self, name: str, output: str, main: bool = True, heading: str = "", title: str = "") -> None:
        self.name, self.output, self.main, self.title = name, output, main, title
        parts = ("_se", "_inf", "_noise_floor", "_mean_term", "_cov_term") if main else ()
        self.numbers = (name, *(f"{name}{part}" for part in parts))
        self.columns = {name: (heading, 2)}

    def compute(self, samples: Side, reference: Side, options: Options) -> dict[str, Any]:
        """Compute the distance and, of a `main` one, its error."""
        name, side, given = self.name, reference.statistics[self.output], samples.statistics[self.output]
        mean_term, cov_term = frechet_terms(side.mean, side.factor, given.mean, given.cov)
        value = mean_term + cov_term
        if not self.main:
            return {name: value}
        found = {name: value, f"{name}_se": None, f"{name}_inf": None}
        parts = samples.sums[self.output].leave_one_out() if self.output in samples.sums else ()
        left_out = [sum(frechet_terms(side.mean, side.factor, part.mean, part.cov)) for part in parts]
        if left_out:
            found[f"{name}_se"], found[f"{name}_inf"] = jackknife(value, left_out)
        floor = noise_floor(side.factor, given.num) if given.num else None
        if floor is not None and side.num:  # the reference is a sample, too
            floor += noise_floor(side.factor, side.num)
        return {**found, f"{name}_noise_floor": floor, f"{name}_mean_term": mean_term, f"{name}_cov_term": cov_term}

    def cells(self, values: dict[str, Any], record: dict[str, Any]) -> list[str]:
        """Write the distance with its error and its noise floor."""
        if not self.main or self.name not in values:
            return super().cells(values, record)
        value, error = values[self.name], values[f"{self.name}_se"]
        floor, num = values[f"{self.name}_noise_floor"], record["num_samples"]
        size = "" if num in (None, 50_000) or record["label"] != "FID" else f"-{short_count(num)}"
        text = f"{record['label']}{size} {_two_decimals(value)}"
        if error is not None:
            text += f" ± {error:.2f}" if value >= 1 else f" ± {error:.2g}"
        return [text + (f" (noise floor {_two_decimals(floor)})" if floor is not None else "")]

    def why_not(self, extractor: FeatureExtractor, reference: Reference | Images | None) -> str | None:
        """Say why the distance cannot be had; None if it can."""
        if self.name == "fid" and self.output in extractor.dims and extractor.label != "FID":
            return f"it is defined by Inception; with {extractor.name} choose fd"
        return super().why_not(extractor, reference)


def short_count(num: int) -> str:
    """Write 10000 as 10K, 1234 as 1234."""
    return f"{num // 1000}K" if num % 1000 == 0 else str(num)


def _two_decimals(value: float) -> str:
    """Write two decimals, as tables have them, or three digits of what is small."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
