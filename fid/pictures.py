"""Two pictures: the distance over training with its error bar, and the real images that samples are nearest to."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fid.evaluator import MAX_REFERENCE_ROWS, Evaluator
from fid.images import Images
from fid.metrics.rows import nearest_rows
from vca_engine.files import written_aside
from vca_engine.images.pictures import save_picture, sheet
from vca_engine.records import read_json, read_lines


def curve(
    records: Sequence[dict[str, Any]] | dict[str, Sequence[dict[str, Any]]], path: str | Path, title: str = ""
) -> None:
    """Draw the distance of records against their training `step`, with two standard errors as a bar; a line each run.

    A dashed line is the noise floor: what as many perfect samples are expected to have. Records of another network,
    protocol, reference or number of samples would make a picture of nothing, and are refused.

    Args:
        records: `Result.to_dict()` of each, with the `step` that was given to `Evaluator.compute`, in any order; of
            several runs, by their names.
        path: File to write, of any format that matplotlib knows.
        title: A line above.

    Raises:
        ValueError: No records, one without a step, or records that do not compare.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = records if isinstance(records, dict) else {"": records}
    together = [record for run in runs.values() for record in run]
    name = _check_records(together)
    label, num = together[0].get("label", name), together[0]["num_samples"]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    ends = []  # of all lines, with their error bars above
    for run, found in runs.items():
        text = _plain(run) if len(runs) > 1 else f"{label}, ± 2 standard errors"
        ends.append(_draw_run(axes, found, name, text, own_colour=len(runs) > 1))
    floor = together[-1].get(f"{name}_noise_floor")
    if floor is not None:
        axes.axhline(floor, color="grey", linestyle="--", label=f"expected of {num} perfect samples, {floor:.3g}")
    _scale(axes, min(least for least, _ in ends), max(most for _, most in ends))
    axes.set_xlabel("training step")
    axes.set_ylabel(f"{label} of {num} samples{', ± 2 standard errors' if len(runs) > 1 else ''}")
    axes.set_title(_plain(title or str(together[0].get("protocol") or "")))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with written_aside(path) as temporary:
            figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)
    except ValueError as error:  # matplotlib's, of a suffix that it does not know
        raise ValueError(f"cannot draw '{path}': {error}.") from error
    finally:
        pyplot.close(figure)


def _draw_run(
    axes: Any, records: Sequence[dict[str, Any]], name: str, label: str, own_colour: bool
) -> tuple[float, float]:
    """Draw the line of a run and the number of its best point; return the least value, and the most with its error."""
    records = sorted(records, key=lambda record: record["step"])
    steps, values = [r["step"] for r in records], [r[name] for r in records]
    errors = [2 * (r.get(f"{name}_se") or 0.0) for r in records]
    line = axes.errorbar(steps, values, yerr=errors, marker="o", capsize=3, label=label)
    best = min(range(len(values)), key=values.__getitem__)
    axes.annotate(
        f"{values[best]:.3g}",
        (steps[best], values[best] - errors[best]),
        textcoords="offset points",
        xytext=(0, -14),
        ha="center",
        color=line[0].get_color() if own_colour else "black",
    )
    return min(values), max(v + e for v, e in zip(values, errors, strict=True))


def _scale(axes: Any, least: float, most: float) -> None:
    """Make the vertical axis logarithmic where values differ by far, or else begin at 0."""
    from matplotlib import ticker

    if most > 5 * least > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.set_ylim(0, 1.1 * most or 1.0)


def _check_records(records: Sequence[dict[str, Any]]) -> str:
    """Find which distance the records hold, `fid` or `fd`; a ValueError if they do not make one picture."""
    if not records:
        raise ValueError("no records to draw; name a run's folder, or the JSON files of `sample.py --fid`.")
    name = "fid" if "fid" in records[0] else "fd"
    for i, record in enumerate(records):
        where = f"'{record['file']}'" if "file" in record else f"record {i + 1}"
        if record.get("step") is None:
            raise ValueError(f"{where} has no training step, so it has no place on a curve.")
        for key in ("step", name, f"{name}_se", f"{name}_noise_floor"):
            if (value := record.get(key)) is not None and not _is_number(value):
                raise ValueError(f"{where} has the {key} {str(value)[:40]!r}; it must be a number.")
        if not isinstance(record.get("reference") or {}, dict) or not isinstance(record.get("label", ""), str):
            raise ValueError(f"{where} is not a record of an evaluation.")
    for what in ("extractor", "protocol", "num_samples"):
        if len(found := {str(record.get(what)) for record in records}) > 1:
            raise ValueError(
                f"the records differ in {what} ({', '.join(sorted(found))}); one picture holds one of them."
            )
    references = [record.get("reference") or {} for record in records]
    known = ("sha256", "pixels_sha256", "path")
    if len(found := {next((r[key] for key in known if r.get(key)), None) for r in references}) > 1:
        raise ValueError(f"the records have {len(found)} different references; one picture holds one of them.")
    if any(record.get(name) is None for record in records):
        raise ValueError("a record has neither fid nor fd; a curve is of one of them.")
    return name


def _is_number(value: Any) -> bool:
    """Tell whether a value of a record can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e15  # NaN is not


def _plain(text: str) -> str:
    """Let matplotlib write a text as it is, not as a formula, with bytes that are no text as escapes."""
    return text.replace("$", r"\$").encode(errors="backslashreplace").decode()


def read_records(
    paths: Sequence[str | Path], warn: Callable[[str], Any] = warnings.warn
) -> dict[str, list[dict[str, Any]]]:
    """Read records, by their folders: a JSON file each or, in .jsonl files, a line each. A folder means all it has.

    Args:
        paths: Files and folders.
        warn: Is given a sentence for each file with lines that are damaged, and so are left out.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
        ValueError: It is damaged, or holds something else.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted([*path.glob("fid.jsonl"), *path.glob("fid-step-*.json")]) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(f"the folder '{path}' has no fid.jsonl and no fid-step-*.json.")
        files += inside
    records: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"the record '{path}' {'is no file' if path.exists() else 'does not exist'}.")
        found = _read_log(path, warn) if path.suffix == ".jsonl" else [read_json(path)]
        if not all("num_samples" in record for record in found):
            kind = " It is of a likelihood." if any("bits_per_dim" in record for record in found) else ""
            raise ValueError(f"'{path}' is not a record of an evaluation, as `fid eval` writes.{kind}")
        records.setdefault(str(path.parent), []).extend({**record, "file": str(path)} for record in found)
    return records


def _read_log(path: Path, warn: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Read the records in a file of one a line; say how many lines are damaged."""
    found = read_lines(path)
    if damaged := sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) - len(found):
        warn(f"left out of '{path}', since they cannot be read: {damaged} {'lines' if damaged > 1 else 'line'}.")
    if damaged and not found:
        raise ValueError(f"'{path}' is damaged: none of its lines can be read.")
    return found


def neighbours(
    evaluator: Evaluator, samples: Images, path: str | Path, k: int = 5, num: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the samples that lie nearest to a real image, each with its k nearest real images: do they repeat them?

    Args:
        evaluator: After `compute`, made with `keep_features=True` and a reference that has images.
        samples: The images that it was given.
        path: File to write.
        k: Neighbours of each sample.
        num: Number of samples, those with the smallest distance.

    All images of the reference are looked at, not only those that the metrics take; of a file of statistics, those that
    it keeps.

    Returns:
        Distances (num, k), and indices (num, k) of the real images in the reference.

    Raises:
        ValueError: Features of one of the sides were not kept.
    """
    reference = evaluator.reference_images
    mine = evaluator.summary.rows.get("features") if evaluator.summary else None
    if reference is None or mine is None:
        raise ValueError("neighbours need the reference's images, and keep_features=True of the evaluator.")
    distances, index = torch.empty(len(mine), 0), torch.empty(len(mine), 0, dtype=torch.int64)
    first, device = 0, evaluator.options.device
    for real in _features_of(evaluator, reference):
        d, i = nearest_rows(mine, real, min(k, len(real)), device)
        distances, order = torch.cat([distances, d], dim=1).sort(dim=1)  # (N, k) and more
        index = torch.cat([index, i + first], dim=1).gather(1, order)
        distances, index, first = distances[:, :k], index[:, :k], first + len(real)
    chosen = distances[:, 0].argsort()[:num]
    distances, index = distances[chosen], index[chosen]
    order = torch.from_numpy(evaluator.summary.columns["index"])[chosen]
    shown, pictures = _arrays(samples, order.tolist()), _arrays(reference, index.flatten().tolist())
    lines = []
    for i, row in enumerate(order.tolist()):
        cells = [(shown[row], f"sample {row}")]
        cells += [(pictures[j], f"{j}: {d:.3g}") for j, d in zip(index[i].tolist(), distances[i].tolist(), strict=True)]
        lines.append(cells)
    k = index.shape[1]
    title = f"Samples nearest to {first:,} real images, and their {k} nearest (index: distance)"
    save_picture([sheet(lines, title)], Path(path))
    return distances.numpy(), index.numpy()


def _features_of(evaluator: Evaluator, images: Images) -> Iterator[Tensor]:
    """Yield features (M, D) of all images of the reference, in order, 10,000 at a time; one process makes them."""
    kept = evaluator.reference_side.rows.get("features", ())
    if images.num == len(kept):
        yield kept
        return
    hidden = not evaluator.options.progress or None
    bar = tqdm(total=images.num, desc=f"features of {images.source}", unit="image", disable=hidden)
    collector = evaluator.new_collector({}, ["features"])
    for index, batch in images.batches(evaluator.options.batch_size):
        collector.update(batch, index)
        bar.update(len(batch))
        if len(collector.seen) >= MAX_REFERENCE_ROWS or int(index[-1]) == images.num - 1:
            yield collector.state_dict()["rows"]["features"]
            collector = evaluator.new_collector({}, ["features"])
    bar.close()


def _arrays(images: Images, wanted: list[int]) -> dict[int, np.ndarray]:
    """Read the images (H, W, 3) uint8 with these indices, by their indices."""
    indices = sorted(set(wanted))
    return {i: image.permute(1, 2, 0).numpy() for i, image in zip(indices, images.take(indices), strict=True)}
