"""The evaluator: images go in as uint8, the numbers of the literature come out with a record of how they were made."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fid.collector import Collector, Summary, indices_in
from fid.distributed import fail_together, from_first, rank_and_size
from fid.images import Images
from fid.metrics import choose_metrics, compute_metrics, outputs_of
from fid.metrics.metric import Side
from fid.networks.extractor import FeatureExtractor, as_extractor
from fid.networks.inception import Inception
from fid.options import Options
from fid.references import Reference, check_protocol, describe, open_reference
from fid.result import Result, comparable_with, device_name, versions_of_packages
from fid.sanity import check_features, find_problems
from vca_engine.images import as_nchw

MAX_REFERENCE_ROWS = 10_000  # as many as ADM's reference holds images


class Evaluator:
    """Metrics of images against a reference, gathered batch by batch in any number of processes.

        evaluator = fid.Evaluator("VIRTUAL_imagenet256_labeled.npz")
        evaluator.update(images, index=[0, 1, 2, ...])       # uint8, as often as needed
        result = evaluator.compute()                         # result.fid, result.to_json("fid.json"), print(result)

    Args:
        ref: The reference: a file of statistics, images in any form that `Images` takes, a `Reference`, or None for
            metrics that need none.
        extractor: Another network in place of Inception, a `FeatureExtractor` or any module from uint8 (B, 3, H, W) to
            {"features": (B, D), ...}; then `preset` and `weights` have no meaning.
        preset: Protocol of Inception: `adm`, `pytorch-fid` or `clean`.
        weights: Inception's file of weights; see `Inception`.
        metrics: Names in `METRICS`. Not given means those of the preset, less what the reference cannot give, with a
            warning; given ones that it cannot give are refused.
        device: Where the network runs; not given means the GPU if there is one.
        process_group: The processes that share the work; not given means all of them.
        options: `batch_size`, `groups` and the others of `Options`.

    Raises:
        FileNotFoundError: No such reference or weights.
        ValueError: A reference that does not fit, or a metric that cannot be had.
    """

    def __init__(
        self,
        ref: str | Path | Tensor | Images | Reference | None = None,
        *,
        extractor: FeatureExtractor | None = None,
        preset: str = "adm",
        weights: str | Path | None = None,
        metrics: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.options, self.process_group = Options(device, **options), process_group
        self.reference = open_reference(ref, getattr(extractor, "label", "FID"))  # before the network: it fails sooner
        if extractor is None:
            extractor = Inception(weights, preset, channels_last=self.options.channels_last, tf32=self.options.tf32)
        self.extractor = extractor = as_extractor(extractor, device).to(device).eval()
        self.warnings: list[str] = []
        if isinstance(self.reference, Reference):
            made = extractor.dims, extractor.preset, extractor.name
            self.warnings += check_protocol(self.reference, *made, self.options.force)
        self.metrics, left_out = choose_metrics(metrics, self.extractor, self.reference)
        self.warnings += left_out
        self._asked = metrics is not None
        self.reference_images = self.reference.images if isinstance(self.reference, Reference) else self.reference
        self.reference_side: Side | None = None  # after `prepare` or `compute`
        self.reference_summary: Summary | None = None  # of its images, if any were read
        self.reset()

    def reset(self) -> None:
        """Forget all samples, for the next set; the reference stays, with the costly half of its distances."""
        self._collector = self.new_collector(self._groups(), self._rows("samples"))
        self.seconds, self._next = {"features": 0.0}, 0
        self.summary: Summary | None = None  # of the samples of all processes, after `compute`

    @property
    def seen(self) -> set[int]:
        """Indices of the images that this process has taken."""
        return self._collector.seen

    def update(self, images: Tensor | list[Tensor], index: Any = None, labels: Any = None) -> Self:
        """Add a batch of samples.

        Args:
            images: uint8, (B, 3, H, W) or (B, H, W, 3), of any device; or a list of (3, H, W) of different sizes.
            index: (B,), number of each image in the whole set, which decides its place in the Inception Score and its
                group. Not given counts on, which several processes cannot.
            labels: (B,), classes, for the record.

        Raises:
            ValueError: Not uint8 images, an index given twice, or features that are not finite.
        """
        start = time.perf_counter()
        if index is None:
            if rank_and_size(self.process_group)[1] > 1:
                raise ValueError("with several processes each image needs its index in the whole set; give index=.")
            index = range(self._next, self._next + len(images))
        images, index = images if isinstance(images, list) else as_nchw(images), torch.as_tensor(index).tolist()
        self._collector.update(images, index, labels)
        self._next = max([self._next, *(i + 1 for i in index)])
        self.seconds["features"] += time.perf_counter() - start
        return self

    def feed(self, images: Images) -> None:
        """Add this process's share of the images, with a progress bar. Collective: what fails in one fails in all."""
        feed(images, self.update, self.options, self.process_group)

    def compute(self, num: int | None = None, **record: Any) -> Result:
        """Compute all metrics of what has been added so far. Collective: every process calls it and gets the same.

        Args:
            num: How many samples there should be.
            record: More for the record, of JSON's types: `labels_mode` (random, balanced), `quantize` (how pixels were
                rounded: `dit` means as `fid.quantize`), `step`, `sampler`, ...

        Raises:
            ValueError: Fewer than two samples, or other than `num`.
        """
        summary = self._collector.gather()
        if num is not None and summary.num != num:
            raise ValueError(f"{summary.num} samples were added, not {num}.")
        start = time.perf_counter()
        self.prepare()
        self.seconds["reference"] = time.perf_counter() - start
        self.summary, result, error = summary, None, None
        if rank_and_size(self.process_group)[0] == 0:
            try:
                check_features(summary, self.extractor.name, "samples")
                sides = summary.side, self.reference_side
                values, left_out, seconds = compute_metrics(self.metrics, self._asked, *sides, self.options)
                self.seconds |= seconds
                record["warnings"] = [*record.get("warnings", ()), *left_out]
                result = Result(values, _record(self, values, record))
            except ValueError as raised:
                error = raised
        fail_together(error, self.process_group)
        return from_first(result, self.process_group)

    def prepare(self) -> None:
        """Read the images of the reference, once, so that a broken one is found before the samples are drawn.

        Collective. `compute` does it, too.

        Raises:
            ValueError: An image that cannot be read, or features that `check_features` refuses.
        """
        if self.reference_side is not None:
            return
        reference, rows = self.reference, self._rows("reference")
        if isinstance(reference, Images):
            self.reference_summary = self._summarise(reference, dict.fromkeys(self._groups(), 1), rows)
            self.reference_side = self.reference_summary.side
            self.warnings += [f"reference: {text}" for text in reference.warnings()]
            return
        side = Side(dict(reference.statistics) if reference else {})
        if rows and self.reference_images:
            self.reference_summary = self._summarise(self.reference_images, {}, rows)
            side.rows = self.reference_summary.rows
        self.reference_side = side

    @property
    def protocol(self) -> dict[str, Any]:
        """All that makes two results comparable, as it stands in the record: extractor, metrics and reference."""
        reference = describe(self.reference)
        return {"extractor": self.extractor.name, "metrics": list(self.metrics), "reference": reference}

    def differences(self, record: dict[str, Any]) -> list[str]:
        """List what a record was made with another one of: extractor, metrics, reference."""
        mine, theirs = self.protocol, record
        different = [name for name in ("extractor", "metrics") if mine[name] != theirs.get(name)]
        files = [found.get("reference") or {} for found in (mine, theirs)]
        one, other = (file.get("sha256") or file.get("path") for file in files)  # the same file may lie elsewhere
        return different + ["reference"] * (one != other)

    def state_dict(self) -> dict[str, Any]:
        """Return all that this process has gathered, as tensors with their checksum, for `load_state_dict`."""
        return self._collector.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what `state_dict` gave. Several may be loaded one after the other, each in one process only.

        Raises:
            ValueError: It is damaged, of another extractor or other metrics, or holds images that are here already.
        """
        self._collector.load_state_dict(state)
        self._next = max([self._next, *(i + 1 for i in self.images_in(state))])

    def images_in(self, state: dict[str, Any]) -> set[int]:
        """List the numbers of the images that a state holds; a ValueError says that it is damaged."""
        return set(indices_in(state))

    def statistics(self) -> Reference:
        """Compute the statistics of the samples, fit to be a reference. Collective.

        Raises:
            ValueError: Features that `check_features` refuses.
        """
        summary = self._collector.gather()
        check_features(summary, self.extractor.name, "images")
        found = summary.side.statistics
        num = next(iter(found.values())).num if found else None
        return Reference("samples", "fid", found, num, None, self.extractor.name, self.extractor.preset)

    def new_collector(self, groups: dict[str, int], rows: list[str], only_rows_of: Any = None) -> Collector:
        """Make a collector for another set of images, see `Collector`."""
        options = {"device": self.options.device, "only_rows_of": only_rows_of, "process_group": self.process_group}
        return Collector(self.extractor, groups, rows, self.options.batch_size, **options)

    def _rows(self, side: str) -> list[str]:
        return outputs_of(self.metrics, side, "rows", {"features"} if self.options.keep_features else set())

    def _groups(self) -> dict[str, int]:
        """List the outputs whose moments are kept of the samples: with groups where there is an error bar."""
        kept = {"features", "spatial"} & self.extractor.dims.keys()
        more = kept if self.options.keep_statistics or not self.metrics else set()  # if nothing is wanted, these are
        outputs = outputs_of(self.metrics, "samples", "statistics", more)
        return {output: max(self.options.groups, 1) if output == "features" else 1 for output in outputs}

    def _summarise(self, images: Images, groups: dict[str, int], rows: list[str]) -> Summary:
        """Go once over images of the reference; of no more than 10,000 of them the metrics get rows."""
        chosen = np.unique(np.linspace(0, images.num - 1, min(images.num, MAX_REFERENCE_ROWS)).round().astype(np.int64))
        collector = self.new_collector(groups, rows, chosen)
        feed(images, collector.update, self.options, self.process_group)
        summary = collector.gather()
        check_features(summary, self.extractor.name, "images of the reference")
        return summary


def feed(images: Images, update: Callable[..., Any], options: Options, process_group: Any = None) -> None:
    """Give this process's share of the images to `update`. Collective: what fails in one process fails in all."""
    (rank, size), batch_size, error = rank_and_size(process_group), options.batch_size, None
    share = sum(min(batch_size, images.num - k) for k in range(0, images.num, batch_size)[rank::size])
    hidden = bool(rank) or not options.progress or None
    with tqdm(total=share, desc=f"features of {images.source}", unit="image", disable=hidden) as bar:
        try:
            for index, batch in images.batches(batch_size, rank, size):
                labels = None if images.labels is None else images.labels[index.numpy()]
                update(batch, index, labels)
                bar.update(len(batch))
        except (ValueError, OSError) as raised:
            error = raised
    fail_together(error, process_group)


def _record(evaluator: Evaluator, values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Make the record of the numbers of all samples, with what the caller has to add to it."""
    extractor, protocol, options, samples = (
        evaluator.extractor,
        evaluator.protocol,
        evaluator.options,
        evaluator.summary,
    )
    reference, real = protocol["reference"], evaluator.reference_summary
    problems = find_problems(values, samples, extractor, options.groups, reference, real)
    if isinstance(evaluator.reference, Images) and real:
        reference["pixels_sha256"] = real.fingerprint
    warnings = [*evaluator.warnings, *more.pop("warnings", []), *problems]
    labels, counts = {"mode": more.pop("labels_mode", None)}, samples.class_counts
    tf32 = getattr(extractor, "tf32", False)
    if counts is not None:
        folders = more.get("input", {}).get("kind") in ("folder", "zip")  # whose names need not be classes
        if labels["mode"] is None and not folders and counts.min() == counts.max() > 1:  # no draw is that even
            labels["mode"] = "balanced"
        labels |= {"min": int(counts.min()), "max": int(counts.max()), "classes": len(counts)}
    return {
        "label": extractor.label,
        "num_samples": samples.num,
        "protocol": extractor.preset or extractor.name,
        **protocol,
        "compares": comparable_with(extractor.label, extractor.name),
        "weights": getattr(extractor, "weights", None),
        "labels": labels,
        "quantize": more.pop("quantize", None),
        "input": {
            "kind": "tensor",
            "size": samples.sizes[0] if len(samples.sizes) == 1 else samples.sizes[:10],
            "lossy": False,
            "duplicates": samples.num_duplicates,
            "constant": samples.num_constant,
            "class_sorted": samples.class_sorted,
            "mean_colour": samples.mean_colour.tolist(),
            **more.pop("input", {}),
        },
        "precision_mode": {"conv": "tf32" if tf32 else "ieee-fp32", "tf32": tf32, "moments": "fp64"},
        "groups": options.groups,
        "world_size": rank_and_size(evaluator.process_group)[1],
        "batch_size": options.batch_size,
        "device": device_name(options.device),
        "seconds": {name: round(seconds, 3) for name, seconds in evaluator.seconds.items()},
        "versions": versions_of_packages(),
        **more,
        "warnings": warnings,
    }
