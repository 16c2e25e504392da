"""Choices of an evaluation, in one place with their defaults: all but what is measured, by what, against what."""

from dataclasses import dataclass
from typing import Any

from fid.metrics.rows import ARITHMETICS

MOST_IN_BATCH = 2**16
MOST_GROUPS = 100


@dataclass(frozen=True)
class Options:
    """Choices of an `Evaluator`, which takes each by its name.

    Args:
        device: Where the network runs, and distances between rows are computed.
        batch_size: Images in a forward pass, of each process; at most `MOST_IN_BATCH`.
        groups: Number of groups for the error bar, at most `MOST_GROUPS`; each takes 34 MB. 0 leaves it out.
        tf32: Let Inception run in TF32, which moves its features by some 0.1 %.
        channels_last: Memory format of Inception; the numbers are the same to rounding.
        pr_compat: Arithmetic of precision and recall: `adm-fp16`, as the published numbers, or `fp32`.
        keep_features: Keep the features of all samples, and of up to 10,000 images of the reference, for `neighbours`.
        keep_statistics: Keep all that a reference of these samples needs, even if no metric needs it.
        force: Take a reference of another preset or of other weights all the same.
        progress: Show progress bars on stderr, where that is a terminal.

    Raises:
        ValueError: A batch or a number of groups out of bounds, or another arithmetic.
    """

    device: Any = "cpu"
    batch_size: int = 64
    groups: int = 10
    tf32: bool = False
    channels_last: bool = True
    pr_compat: str = "adm-fp16"
    keep_features: bool = False
    keep_statistics: bool = False
    force: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= MOST_IN_BATCH:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1, and at most {MOST_IN_BATCH}.")
        if not 0 <= self.groups <= MOST_GROUPS:
            raise ValueError(
                f"groups is {self.groups}; choose a number of groups, at most {MOST_GROUPS}, or 0 for no error bar."
            )
        if self.pr_compat not in ARITHMETICS:
            raise ValueError(f"pr_compat is {self.pr_compat!r}; choose {' or '.join(ARITHMETICS)}.")
