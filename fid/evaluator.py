"""The evaluator: images go in as uint8, the numbers of the literature come out with a record of how they were made."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fid.collective import fail_together, from_first, rank_and_size
from fid.collector import Collected, Collector
from fid.features import Described, FeatureExtractor
from fid.images import Images
from fid.inception import Inception
from fid.metrics import METRICS, Options, Side, choose_metrics
from fid.references import Reference, check_protocol, open_reference
from fid.result import Result, device_name, doubts, versions
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
        preset: Protocol of Inception: `adm`, `pytorch-fid` or `clean`.
        weights: Inception's file of weights; see `Inception`.
        extractor: Another network in place of Inception, a `FeatureExtractor` or any module from uint8 (B, 3, H, W) to
            {"features": (B, D), ...}; then `preset` and `weights` have no meaning.
        metrics: Names in `METRICS`. Not given means those of the preset, less what the reference cannot give, with a
            warning; given ones that it cannot give are refused.
        device: Where the network runs; not given means the GPU if there is one.
        batch_size: Images in a forward pass, of each process.
        groups: Number of groups for the error bar; each takes 34 MB. 0 leaves it out.
        tf32: Let Inception run in TF32, which moves its features by some 0.1 %.
        channels_last: Memory format of Inception; the numbers are the same to rounding.
        pr_compat: Arithmetic of precision and recall: `adm-fp16`, as the published numbers, or `fp32`.
        keep_features: Keep the features of all samples, and of up to 10,000 images of the reference, for `neighbours`.
        keep_statistics: Keep all that a reference of these samples needs, even if no metric needs it.
        force: Take a reference of another preset or of other weights all the same.
        progress: Show progress bars on stderr, where that is a terminal.
        process_group: The processes that share the work; not given means all of them.

    Raises:
        FileNotFoundError: No such reference or weights.
        ValueError: A reference that does not fit, or a metric that cannot be had.
    """

    def __init__(
        self,
        ref: str | Path | Tensor | Images | Reference | None = None,
        *,
        preset: str = "adm",
        weights: str | Path | None = None,
        extractor: FeatureExtractor | None = None,
        metrics: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        groups: int = 10,
        tf32: bool = False,
        channels_last: bool = True,
        pr_compat: str = "adm-fp16",
        keep_features: bool = False,
        keep_statistics: bool = False,
        force: bool = False,
        progress: bool = True,
        process_group: Any = None,
    ) -> None:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if groups < 0:
            raise ValueError(f"groups is {groups}; choose a number of groups, or 0 for no error bar.")
        if pr_compat not in ("adm-fp16", "fp32"):
            raise ValueError(f"pr_compat is {pr_compat!r}; choose adm-fp16 or fp32.")
        self.batch_size, self.groups = batch_size, groups
        self.keep_features, self.keep_statistics = keep_features, keep_statistics
        self.progress, self.process_group = progress, process_group
        label = getattr(extractor, "label", "FID")
        self.reference = open_reference(ref, label)  # before the network: it fails sooner
        if extractor is None:
            extractor = Inception(weights, preset, channels_last=channels_last, tf32=tf32)
        if isinstance(extractor, str):
            raise ValueError(f"the extractor is a name; make it first: fid.build_extractor({extractor!r}, weights).")
        if not isinstance(extractor, FeatureExtractor):
            extractor = Described(extractor, device)
        self.extractor = extractor.to(device).eval()
        self.options = Options(pr_compat, device)
        self._warnings: list[str] = []
        if isinstance(self.reference, Reference):
            self._warnings += check_protocol(self.reference, extractor.dims, extractor.preset, extractor.name, force)
        self._asked = metrics is not None
        self.metrics, left_out = choose_metrics(metrics, self.extractor, self.reference)
        self._warnings += left_out
        self.reference_images = self.reference.images if isinstance(self.reference, Reference) else self.reference
        self._reference_side: Side | None = None
        self._reference_collected: Collected | None = None  # of its images, if any were read
        self.reset()

    def reset(self) -> None:
        """Forgets all samples, for the next set; the reference stays, with the costly half of its distances."""
        self._collector = self._new_collector(self._moments(), self._rows("samples"))
        self._seconds, self._next = {"features": 0.0}, 0
        self.collected: Collected | None = None  # of all processes, after `compute`

    @property
    def seen(self) -> set[int]:
        """Indices of the images that this process has taken."""
        return self._collector.seen

    def update(self, images: Tensor | list[Tensor], index: Any = None, labels: Any = None) -> Self:
        """Adds a batch of samples.

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
        self._seconds["features"] += time.perf_counter() - start
        return self

    def feed(self, images: Images, update: Callable[..., Any] | None = None) -> None:
        """Adds this process's share of the images, with a progress bar. Collective: what fails in one fails in all."""
        rank, size = rank_and_size(self.process_group)
        share = sum(min(self.batch_size, images.num - k) for k in range(0, images.num, self.batch_size)[rank::size])
        with tqdm(
            total=share,
            desc=f"features of {images.source}",
            unit="image",
            disable=bool(rank) or not self.progress or None,
        ) as bar:
            error = None
            try:
                for index, batch in images.batches(self.batch_size, rank, size):
                    labels = None if images.labels is None else images.labels[index.numpy()]
                    (update or self.update)(batch, index, labels)
                    bar.update(len(batch))
            except (ValueError, OSError) as raised:
                error = raised
        fail_together(error, self.process_group)

    def compute(self, num: int | None = None, **record: Any) -> Result:
        """All metrics of what has been added so far. Collective: every process calls it and gets the same.

        Args:
            num: How many samples there should be.
            record: More for the record, of JSON's types: `labels_mode` (random, balanced), `quantize` (how pixels were
                rounded: `dit` means as `fid.quantize`), `step`, `sampler`, ...

        Raises:
            ValueError: Fewer than two samples, or other than `num`.
        """
        collected = self._collector.gather()
        if num is not None and collected.num != num:
            raise ValueError(f"{collected.num} samples were added, not {num}.")
        start = time.perf_counter()
        self.prepare()
        self._seconds["reference"] = time.perf_counter() - start
        self.collected, result, error = collected, None, None
        if rank_and_size(self.process_group)[0] == 0:
            try:
                values, left_out = self._values(collected)
                record["warnings"] = [*record.get("warnings", ()), *left_out]
                result = Result(values, self._record(collected, values, record))
            except ValueError as raised:
                error = raised
        fail_together(error, self.process_group)
        return from_first(result, self.process_group)

    def _values(self, collected: Collected) -> tuple[dict[str, Any], list[str]]:
        """The numbers, and a warning of each metric that nobody asked for and that these samples are too few for."""
        values, left_out = {}, []
        for name in self.metrics:
            start = time.perf_counter()
            try:
                values |= METRICS[name].compute(collected.side, self._reference_side, self.options)
            except ValueError as error:
                if self._asked or name in ("fid", "fd"):
                    raise
                left_out.append(f"left out {name}: {error}")
            self._seconds[name] = time.perf_counter() - start
        return values, left_out

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two results comparable, as it stands in the record: extractor, metrics and reference."""
        reference = self.reference
        described = None
        if isinstance(reference, Reference):
            described = {"path": reference.source, "sha256": reference.sha256, "kind": reference.kind}
            described |= {"num_images": reference.num_images, "protocol": reference.preset, "crop": reference.crop}
        elif reference is not None:
            described = {"path": reference.source, "sha256": None, "kind": reference.kind, "num_images": reference.num}
        return {"extractor": self.extractor.name, "metrics": list(self.metrics), "reference": described}

    def state_dict(self) -> dict[str, Any]:
        """What this process has gathered, as tensors; save it to go on later, in as many processes as there are then."""
        return self._collector.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Adds what `state_dict` gave. Several may be loaded one after the other, each in one process only.

        Raises:
            ValueError: It is of another extractor or other metrics, or holds images that are here already.
        """
        self._collector.load_state_dict(state)
        self._next = max([self._next, *(i + 1 for i in self.images_in(state))])

    def images_in(self, state: dict[str, Any]) -> set[int]:
        """The numbers of the images that a state holds."""
        return set(state["checks"]["index"].tolist())

    def reference_features(self) -> Iterator[Tensor]:
        """Features of all images of the reference, in order, 10,000 at a time; one process makes them by itself."""
        images, kept = self.reference_images, self.reference_rows.get("features", ())
        if images.num == len(kept):  # after `compute`, with keep_features
            yield kept
            return
        bar = tqdm(
            total=images.num, desc=f"features of {images.source}", unit="image", disable=not self.progress or None
        )
        collector = self._new_collector({}, ["features"])
        for index, batch in images.batches(self.batch_size):
            collector.update(batch, index)
            bar.update(len(batch))
            if len(collector.seen) >= MAX_REFERENCE_ROWS or int(index[-1]) == images.num - 1:
                yield collector.state_dict()["rows"]["features"]
                collector = self._new_collector({}, ["features"])
        bar.close()

    @property
    def reference_rows(self) -> dict[str, Tensor]:
        """Features of the reference's images after `compute`, where a metric needs them: output -> (M, D)."""
        return self._reference_side.rows if self._reference_side else {}

    def statistics(self) -> Reference:
        """The statistics of the samples, fit to be a reference. Collective."""
        found = {output: m.statistics() for output, m in self._collector.gather().moments.items()}
        num = next(iter(found.values())).num if found else None
        extractor = self.extractor
        return Reference("samples", "fid", found, num, None, extractor.name, extractor.preset)

    def _new_collector(
        self, moments: dict[str, int], rows: list[str], only_rows_of: np.ndarray | None = None
    ) -> Collector:
        options = {"device": self.options.device, "only_rows_of": only_rows_of, "process_group": self.process_group}
        return Collector(self.extractor, moments, rows, self.batch_size, **options)

    def _moments(self) -> dict[str, int]:
        """Outputs whose moments the metrics need of the samples, with groups where there is an error bar."""
        chosen = [METRICS[name] for name in self.metrics]
        outputs = {m.output for m in chosen if m.samples == "statistics"}
        if self.keep_statistics or not chosen:  # where nothing else is wanted, statistics are
            outputs |= {"features", "spatial"} & self.extractor.dims.keys()
        return {output: max(self.groups, 1) if output == "features" else 1 for output in sorted(outputs)}

    def _rows(self, side: str) -> list[str]:
        chosen = [METRICS[name] for name in self.metrics]
        outputs = {m.output for m in chosen if getattr(m, side) == "rows"}
        return sorted(outputs | ({"features"} if self.keep_features else set()))

    def differences(self, record: dict[str, Any]) -> list[str]:
        """What of `identity` a record was made with another one of; the same file of a reference may lie elsewhere."""

        def what(identity: dict[str, Any]) -> dict[str, Any]:
            reference = identity.get("reference") or {}
            return {**identity, "reference": reference.get("sha256") or reference.get("path")}

        mine, theirs = what(self.identity), what(record)
        return [name for name in mine if mine[name] != theirs.get(name)]

    def prepare(self) -> None:
        """Reads the images of the reference, once, so that a broken one is found before the samples are drawn.

        Collective. `compute` does it, too.
        """
        if self._reference_side is None:
            reference, rows = self.reference, self._rows("reference")
            if reference is None:
                self._reference_side = Side()
            elif isinstance(reference, Reference):
                self._reference_side = Side(dict(reference.statistics))
                if rows and reference.images is not None:
                    collected = self._collect(reference.images, {}, rows)
                    self._reference_side.rows, self._reference_collected = collected.rows, collected
            else:
                collected = self._collect(reference, dict.fromkeys(self._moments(), 1), rows)
                self._reference_side, self._reference_collected = collected.side, collected
                self._warnings += [f"reference: {text}" for text in reference.warnings()]

    def _collect(self, images: Images, moments: dict[str, int], rows: list[str]) -> Collected:
        """One pass over images of the reference; of no more than 10,000 of them the metrics get rows."""
        chosen = np.unique(np.linspace(0, images.num - 1, min(images.num, MAX_REFERENCE_ROWS)).round().astype(np.int64))
        collector = self._new_collector(moments, rows, chosen)
        self.feed(images, collector.update)
        return collector.gather()

    def _record(self, collected: Collected, values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        extractor, identity = self.extractor, self.identity
        reference = identity["reference"] or {"kind": None, "num_images": None}
        imagenet = reference["kind"] == "adm" and "imagenet256" in reference["path"].lower()
        known = {"reference": self._reference_collected, "num_real": reference["num_images"], "groups": self.groups}
        found = doubts(collected, values, extractor, imagenet, **known)
        if isinstance(self.reference, Images) and self._reference_collected:
            reference["pixels_sha256"] = self._reference_collected.fingerprint
        warnings = [*self._warnings, *more.pop("warnings", []), *found]
        labels, counts = {"mode": more.pop("labels_mode", None)}, collected.class_counts
        tf32 = getattr(extractor, "tf32", False)
        if counts is not None:
            folders = more.get("input", {}).get("kind") in ("folder", "zip")  # whose names need not be classes
            if labels["mode"] is None and not folders and counts.min() == counts.max() > 1:  # no draw is that even
                labels["mode"] = "balanced"
            labels |= {"min": int(counts.min()), "max": int(counts.max()), "classes": len(counts)}
        return {
            "label": extractor.label,
            "num_samples": collected.num,
            "protocol": extractor.preset or extractor.name,
            **identity,
            "weights": getattr(extractor, "weights", None),
            "labels": labels,
            "quantize": more.pop("quantize", None),
            "input": {
                "kind": "tensor",
                "size": collected.sizes[0] if len(collected.sizes) == 1 else collected.sizes[:10],
                "lossy": False,
                "duplicates": collected.num_duplicates,
                "constant": collected.num_constant,
                "class_sorted": collected.labels is not None and bool((np.diff(collected.labels) >= 0).all()),
                "mean_colour": collected.mean_colour.tolist(),
                **more.pop("input", {}),
            },
            "precision_mode": {"conv": "tf32" if tf32 else "ieee-fp32", "tf32": tf32, "moments": "fp64"},
            "groups": self.groups,
            "world_size": rank_and_size(self.process_group)[1],
            "batch_size": self.batch_size,
            "device": device_name(self.options.device),
            "seconds": {name: round(seconds, 3) for name, seconds in self._seconds.items()},
            "versions": versions(),
            **more,
            "warnings": warnings,
        }
