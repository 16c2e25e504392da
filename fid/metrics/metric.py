"""A metric: what it needs of the samples and of the reference, the numbers it gives, and how they are printed."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fid.images import Images
from fid.moments import Statistics, Sums
from fid.networks.extractor import FeatureExtractor
from fid.options import Options
from fid.references import Reference


@dataclass
class Side:
    """A set of images as metrics see it: statistics of some outputs of the extractor, the whole rows of others.

    Of a reference, `rows` may belong to other images than `statistics`: the file of ADM holds statistics of the
    training set and 10,000 of its images.
    """

    statistics: dict[str, Statistics] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)  # of samples: the same in groups, for error bars
    rows: dict[str, Tensor] = field(default_factory=dict)  # (N, D) each, in order of the image's index


class Metric:
    """One metric of `METRICS`; a subclass has these attributes and `compute`.

    Attributes:
        output: The extractor's output that it looks at.
        samples: What it takes of the samples, `statistics` or `rows`.
        reference: The same of the reference; None where it needs none.
        numbers: Names of the numbers that `compute` gives, as they stand in the record.
        columns: Those that are printed: name -> heading in the line for a table, and digits.
        title: What it is called where its name in `METRICS` does not say it.
        main: Whether it is the distance that a result is about; without it there is no result.
    """

    output: str = "features"
    samples: str = "rows"
    reference: str | None = "rows"
    numbers: tuple[str, ...] = ()
    columns: ClassVar[dict[str, tuple[str, int]]] = {}
    title: str = ""
    main: bool = False

    def compute(self, samples: Side, reference: Side, options: Options) -> dict[str, Any]:
        """Compute the numbers, by their names."""
        raise NotImplementedError

    def cells(self, values: dict[str, Any], record: dict[str, Any]) -> list[str]:
        """Write the numbers that are printed, as parts of a line."""
        return [
            f"{label} {values[name]:.{digits}f}" for name, (label, digits) in self.columns.items() if name in values
        ]

    def why_not(self, extractor: FeatureExtractor, reference: Reference | Images | None) -> str | None:
        """Say why the metric cannot be had; None if it can."""
        if self.output not in extractor.dims:
            return f"{extractor.name} has no output {self.output!r}"
        if self.reference and reference is None:
            return "there is no reference"
        if isinstance(reference, Reference):
            if self.reference == "statistics" and self.output not in reference.statistics:
                return f"'{reference.source}' has no statistics of {self.output}"
            if self.reference == "rows" and reference.images is None:
                return f"'{reference.source}' has no images (arr_0)"
        return None
