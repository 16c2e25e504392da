"""One pass over images: features of a network, and whatever in the images themselves would make a number wrong."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fid.distributed import all_gather, fail_together, rank_and_size
from fid.metrics.metric import Side
from fid.moments import Moments, Sums
from fid.networks.extractor import FeatureExtractor
from vca_engine.files import checksum_of
from vca_engine.images import check_uint8
from vca_engine.precision import ieee_float32
from vca_engine.seeds import splitmix64

CHECKS = {  # a column each of what is kept of every image
    "index": torch.int64,
    "label": torch.int64,  # -1 if not given
    "digest": torch.int64,  # of its pixels
    "constant": torch.int64,  # 1 if it has one colour everywhere
    "height": torch.int64,
    "width": torch.int64,
}


class Collector:
    """Moments of some outputs of an extractor, and rows of others, gathered over batches and processes.

    Every batch that the network sees has `batch_size` images, however they came: what is left over waits, and is padded
    at the end, and the padding's features are dropped. Convolutions of another shape may run in another kernel that
    rounds otherwise.

    Args:
        extractor: The network.
        moments: Outputs of which mean and covariance are kept, with their number of groups.
        rows: Outputs that are kept as they are, 4 D bytes an image.
        batch_size: Images in a forward pass.
        device: Where the extractor is.
        only_rows_of: (N,) indices; of other images no rows are kept. Not given means of all.
        process_group: Of the processes that share the work; all of them if not given.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        moments: dict[str, int],
        rows: Sequence[str],
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        only_rows_of: np.ndarray | None = None,
        process_group: Any = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.extractor, self.batch_size, self.device, self.process_group = extractor, batch_size, device, process_group
        self.only_rows_of = only_rows_of
        self.moments = {output: Moments(extractor.dims[output], groups) for output, groups in moments.items()}
        self.rows: dict[str, list[Tensor]] = {output: [] for output in rows}
        self.row_index: list[Tensor] = []
        self.checks: dict[str, list[Tensor]] = {name: [] for name in CHECKS}
        self.pixel_sum = torch.zeros(3, dtype=torch.float64)  # of the mean colours of the images
        self.seen: set[int] = set()
        self.waiting: list[tuple[Tensor, int, int]] = []  # images (3, H, W) without their features yet, index, label

    def update(self, images: Tensor | list[Tensor], index: Tensor | Sequence[int], labels: Any = None) -> None:
        """Add a batch.

        Args:
            images: uint8 (B, 3, H, W) of any device and any B, or a list of (3, H, W) of different sizes.
            index: (B,), the number of each image in the whole set; each may come once.
            labels: (B,) class numbers, if there are any.

        Raises:
            ValueError: Not uint8, an index a second time, or features that are not finite; says of which image.
        """
        index = torch.as_tensor(index, dtype=torch.int64).tolist()
        if len(index) != len(images) or (labels is not None and len(labels) != len(images)):
            raise ValueError(f"{len(images)} images came with {len(index)} indices; give one for each, and a label.")
        twice = [i for i in index if i in self.seen]
        if twice or len(set(index)) < len(index):
            raise ValueError(f"image {(twice or index)[0]} was given twice; number each image once.")
        for part in [images] if isinstance(images, Tensor) else [image[None] for image in images]:
            check_uint8(part)
        labels = [-1] * len(index) if labels is None else torch.as_tensor(labels, dtype=torch.int64).tolist()
        images = images.to(self.device) if isinstance(images, Tensor) else [image.to(self.device) for image in images]
        self.waiting += zip(images, index, labels, strict=True)
        self.seen.update(index)
        while len(self.waiting) >= self.batch_size:
            self._take(self.batch_size)
        new = max(0, len(self.waiting) - len(index))  # the first that came now; the caller may write into it again
        self.waiting[new:] = [(image.clone(), *rest) for image, *rest in self.waiting[new:]]

    @torch.no_grad()
    def _take(self, num: int) -> None:
        """Gather the first `num` of the waiting images, which stay there if that fails."""
        images, *columns = zip(*self.waiting[:num], strict=True)
        index, labels = (torch.tensor(column) for column in columns)
        found = self._features(images, index)
        for output, moments in self.moments.items():
            moments.update(found[output], index)
        keep = torch.ones(num, dtype=torch.bool)
        if self.only_rows_of is not None:
            keep = torch.from_numpy(np.isin(index.numpy(), self.only_rows_of))
        if self.rows and keep.any():
            self.row_index.append(index[keep])
            for output, kept in self.rows.items():
                kept.append(found[output].float()[keep])
        for group in [torch.stack(images)] if _of_one_shape(images) else [image[None] for image in images]:
            self._look_at(group)
        self.checks["index"].append(index)
        self.checks["label"].append(labels)
        for parts in (self.row_index, *self.rows.values(), *self.checks.values()):
            _merge_last(parts)
        del self.waiting[:num]

    def _features(self, images: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        """Compute the outputs that are gathered, (B, D) each on the CPU, of images (3, H, W) numbered `index` (B,)."""
        num, wanted = len(images), {*self.moments, *self.rows}
        padded = [*images, *[images[-1]] * (self.batch_size - num)]
        with ieee_float32(getattr(self.extractor, "tf32", False)):
            found = self.extractor(torch.stack(padded) if _of_one_shape(images) else padded)
        if not isinstance(found, dict) or not wanted <= found.keys():
            got = list(found) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"the extractor gave {got}; it has to give a dict with {sorted(wanted)}.")
        found = {output: found[output][:num].detach() for output in wanted}
        for rows in found.values():
            if not (finite := rows.isfinite().all(dim=1).cpu()).all():
                rank = rank_and_size(self.process_group)[0]
                raise ValueError(
                    f"non-finite features for sample index {int(index[~finite][0])} (rank {rank}); its pixels are "
                    "finite, so look at the extractor's weights and its precision."
                )
        return {output: rows.cpu() for output, rows in found.items()}

    def _look_at(self, images: Tensor) -> None:
        """Note what the images (B, 3, H, W) themselves tell."""
        height, width = images.shape[2:]
        one_colour = (images.amin((2, 3)) == images.amax((2, 3))).all(dim=1)
        self.checks["digest"].append(digests(images).cpu())
        self.checks["constant"].append(one_colour.long().cpu())
        for name, side in (("height", height), ("width", width)):
            self.checks[name].append(torch.full((len(images),), side))
        means = images.sum(dim=(2, 3), dtype=torch.int64).double() / (height * width)  # (B, 3)
        self.pixel_sum += means.sum(dim=0).cpu()

    def _take_all(self) -> None:
        if self.waiting:
            self._take(len(self.waiting))

    def state_dict(self) -> dict[str, Any]:
        """Return all that this process gathered, as tensors and their checksum, for `load_state_dict` to go on from."""
        self._take_all()
        state = {
            "extractor": self.extractor.name,
            "moments": {output: moments.state_dict() for output, moments in self.moments.items()},
            "rows": {output: _cat(rows, self.extractor.dims[output]) for output, rows in self.rows.items()},
            "row_index": _cat(self.row_index),
            "checks": {name: _cat(parts) for name, parts in self.checks.items()},
            "pixel_sum": self.pixel_sum.clone(),
        }
        return {**state, "checksum": _state_checksum(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what another collector gathered; any number of them, of any number of processes.

        Raises:
            ValueError: It is damaged, was made with another extractor or for other metrics, or holds an image that is
                here already.
        """
        index = indices_in(state)
        if state["extractor"] != self.extractor.name:
            raise ValueError(f"the state was made with {state['extractor']}, not with {self.extractor.name}.")
        if state["moments"].keys() != self.moments.keys() or state["rows"].keys() != self.rows.keys():
            raise ValueError("the state was gathered for other metrics; choose the same ones.")
        if not self.seen.isdisjoint(index):
            raise ValueError("the state holds images that are here already; load each state once.")
        for output, moments in self.moments.items():
            moments.load_state_dict(state["moments"][output])
        for output, rows in self.rows.items():
            rows.append(state["rows"][output])
        self.row_index.append(state["row_index"])
        for name, parts in self.checks.items():
            parts.append(state["checks"][name])
        self.pixel_sum = self.pixel_sum + state["pixel_sum"]
        self.seen.update(index)

    def gather(self) -> "Summary":
        """Give each process what all of them have; this collector stays as it is. Collective.

        Raises:
            ValueError: Features that are not finite, in any of them, or an image that two of them have.
        """
        error = None
        try:
            self._take_all()
        except ValueError as raised:
            error = raised
        fail_together(error, self.process_group)
        sums = {output: mine.reduced(self.process_group) for output, mine in self.moments.items()}
        checks = {name: self._gather(parts) for name, parts in self.checks.items()}
        numbers, counts = checks["index"].unique(return_counts=True)
        if len(numbers) < len(checks["index"]):
            raise ValueError(
                f"image {int(numbers[counts.argmax()])} was given by two processes; number each image once."
            )
        order, row_order = checks["index"].argsort(), self._gather(self.row_index).argsort()
        rows = {o: self._gather(parts, self.extractor.dims[o])[row_order] for o, parts in self.rows.items()}
        pixel_sum = sum(all_gather(self.pixel_sum[None], self.process_group))[0]
        columns = {name: column[order].numpy() for name, column in checks.items()}
        return Summary(sums, rows, columns, (pixel_sum / max(len(order), 1)).numpy())

    def _gather(self, parts: list[Tensor], dim: int | None = None) -> Tensor:
        return torch.cat(all_gather(_cat(parts, dim), self.process_group))


class Summary:
    """All that is kept of a whole set of images, in the order of their indices.

    Args:
        sums: Output of the extractor -> the sums of its moments.
        rows: Output -> (N, D).
        columns: Name in `CHECKS` -> (N,).
        mean_colour: (3,), in [0, 255].
    """

    def __init__(
        self, sums: dict[str, Sums], rows: dict[str, Tensor], columns: dict[str, np.ndarray], mean_colour: np.ndarray
    ) -> None:
        self.sums, self.rows, self.columns, self.mean_colour = sums, rows, columns, mean_colour
        self.num = len(columns["index"])
        digests = columns["digest"]
        self.num_duplicates = self.num - len(np.unique(digests))
        self.num_constant = int(columns["constant"].sum())
        self.sizes = np.unique(np.stack([columns["height"], columns["width"]], axis=1), axis=0).tolist()
        self.labels = columns["label"] if (columns["label"] >= 0).any() else None

    @property
    def class_counts(self) -> np.ndarray | None:
        """Images of each class that has any, (K,); None without labels."""
        return None if self.labels is None else np.unique(self.labels[self.labels >= 0], return_counts=True)[1]

    @property
    def class_sorted(self) -> bool:
        """True if the images are in the order of their classes."""
        return self.labels is not None and bool((np.diff(self.labels) >= 0).all())

    @property
    def fingerprint(self) -> str:
        """Hash of the pixels of all images, in order."""
        return hashlib.sha256(self.columns["digest"].tobytes()).hexdigest()

    @cached_property
    def side(self) -> Side:
        """The images as metrics see them."""
        return Side({output: sums.statistics() for output, sums in self.sums.items()}, self.sums, self.rows)


def indices_in(state: dict[str, Any]) -> list[int]:
    """List the numbers of the images in what `Collector.state_dict` gave, in the order in which they came.

    Raises:
        ValueError: It is something else, or does not have its checksum; states of earlier versions have none.
    """
    parts = {"extractor", "moments", "rows", "row_index", "checks", "pixel_sum"}
    if not isinstance(state, dict) or not parts <= state.keys():
        raise ValueError("this is no state of an evaluator.")
    content = {name: state[name] for name in parts}
    if state.get("checksum", "") not in ("", _state_checksum(content)):
        raise ValueError("the state is damaged: it does not have its checksum.")
    return state["checks"]["index"].tolist()


def _state_checksum(state: dict[str, Any]) -> str:
    """Compute the checksum of tensors in dicts, by that of each."""

    def describe(part: Any) -> Any:
        if isinstance(part, Tensor):
            array = part.detach().cpu().contiguous().numpy()
            return [str(part.dtype), list(part.shape), checksum_of(memoryview(array.reshape(-1)).cast("B"))]
        return {name: describe(value) for name, value in part.items()} if isinstance(part, dict) else part

    return checksum_of(json.dumps(describe(state), sort_keys=True).encode())


def digests(images: Tensor) -> Tensor:
    """Hash the pixels of each image, uint8 (B, 3, H, W) -> (B,) int64: sums weighted by random numbers, modulo 2^64.

    In integers, so it is the same on any device. Two different images have the same with a probability below 1e-15.
    """
    weights = _weights(images[0].numel(), images.device)
    return torch.cat([(part.flatten(1).long() * weights).sum(dim=1) for part in images.split(8)])


def _of_one_shape(images: Sequence[Tensor]) -> bool:
    return len({image.shape for image in images}) == 1


_cached: dict[torch.device, Tensor] = {}


def _weights(num: int, device: torch.device) -> Tensor:
    """Return the first `num` of an endless row, (num,) int64; as many as were asked for at most are kept."""
    if len(_cached.get(device, ())) < num:
        _cached[device] = splitmix64(torch.arange(num)).to(device)
    return _cached[device][:num]


def _merge_last(parts: list[Tensor], most: int = 32, large: int = 1024) -> None:
    """Make one of many short tensors at the end, whose order stays; each is copied once.

    Thousands of them would lie scattered, and keep the C library from using again, or giving back, what lies between.
    """
    first = len(parts)
    while first and len(parts[first - 1]) < large:
        first -= 1
    if len(parts) - first >= most:
        parts[first:] = [torch.cat(parts[first:])]


def _cat(parts: list[Tensor], dim: int | None = None) -> Tensor:
    if parts:
        return torch.cat(parts)
    return torch.zeros(0, dtype=torch.int64) if dim is None else torch.zeros(0, dim)
