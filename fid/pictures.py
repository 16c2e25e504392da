"""Two pictures: the distance over training with its error bar, and the real images that samples are nearest to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fid.evaluator import Evaluator
from fid.files import written_aside
from fid.images import Images
from fid.scores import nearest


def curve(records: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Draws the distance of records against their training `step`, with two standard errors as a bar.

    A dashed line is the noise floor: what as many perfect samples are expected to have. Records of another network,
    protocol, reference or number of samples would make a curve of nothing, and are refused.

    Args:
        records: `Result.to_dict()` of each, with the `step` that was given to `Evaluator.compute`; in any order.
        path: File to write, of any format that matplotlib knows.
        title: A line above.

    Raises:
        ValueError: No records, one without a step, or records that do not compare.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    if not records:
        raise ValueError("no records to draw; name the JSON files of `python -m fid eval --json`.")
    without = [i for i, record in enumerate(records) if record.get("step") is None]
    if without:
        raise ValueError(
            f"record {without[0] + 1} of {len(records)} has no training step, so it has no place on a curve."
        )
    for what in ("extractor", "protocol", "num_samples"):
        if len(found := {str(record.get(what)) for record in records}) > 1:
            raise ValueError(f"the records differ in {what} ({', '.join(sorted(found))}); one curve holds one of them.")
    references = [record.get("reference") or {} for record in records]
    if len(found := {reference.get("sha256") or reference.get("path") for reference in references}) > 1:
        raise ValueError(f"the records have {len(found)} different references; one curve holds one of them.")
    records = sorted(records, key=lambda record: record["step"])
    name = "fid" if "fid" in records[0] else "fd"
    if any(record.get(name) is None for record in records):
        raise ValueError("a record has neither fid nor fd; a curve is of one of them.")
    steps, values = [r["step"] for r in records], [r[name] for r in records]
    errors = [2 * (r.get(f"{name}_se") or 0.0) for r in records]
    num = records[0]["num_samples"]

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.errorbar(
        steps, values, yerr=errors, marker="o", capsize=3, label=f"{records[0]['label']}, ± 2 standard errors"
    )
    floor = records[-1].get(f"{name}_noise_floor")
    if floor is not None:
        axes.axhline(floor, color="grey", linestyle="--", label=f"expected of {num} perfect samples, {floor:.3g}")
    best = min(range(len(values)), key=values.__getitem__)
    axes.annotate(
        f"{values[best]:.3g}",
        (steps[best], values[best] - errors[best]),
        textcoords="offset points",
        xytext=(0, -14),
        ha="center",
    )
    if max(values) > 5 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.set_ylim(0, 1.1 * max(v + e for v, e in zip(values, errors, strict=True)))
    axes.set_xlabel("training step")
    axes.set_ylabel(f"{records[0]['label']} of {num} samples")
    axes.set_title(title or records[0]["protocol"])
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with written_aside(path) as temporary:
            figure.savefig(temporary, dpi=150)
    except ValueError as error:  # matplotlib's, of a suffix that it does not know
        raise ValueError(f"cannot draw '{path}': {error}.") from error
    finally:
        pyplot.close(figure)


def read_records(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The records in JSON files, one a file or, in .jsonl files, one a line.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    records = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"the record '{path}' does not exist.")
        try:
            text = path.read_text(encoding="utf-8")
            records += [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text]) if line]
        except ValueError as error:
            raise ValueError(f"'{path}' is not a record of an evaluation: {error}.") from error
    if not all(isinstance(record, dict) and "num_samples" in record for record in records):
        raise ValueError(f"not all of {', '.join(map(str, paths))} are records of evaluations.")
    return records


def neighbours(
    evaluator: Evaluator, samples: Images, path: str | Path, k: int = 5, num: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the samples that lie nearest to a real image, each with its k nearest real images: do they repeat them?

    Args:
        evaluator: After `compute`, made with `keep_features=True` and a reference that has images.
        samples: The images that it was given.
        path: File to write.
        k: Neighbours of each sample.
        num: Number of samples, those with the smallest distance.

    All images of the reference are looked at, not only those that the metrics take; of a file of statistics, those that it
    keeps.

    Returns:
        Distances (num, k), and indices (num, k) of the real images in the reference.

    Raises:
        ValueError: Features of one of the sides were not kept.
    """
    reference = evaluator.reference_images
    mine = evaluator.collected.rows.get("features") if evaluator.collected else None
    if reference is None or mine is None:
        raise ValueError("neighbours need the reference's images, and keep_features=True of the evaluator.")
    distances, index = torch.empty(len(mine), 0), torch.empty(len(mine), 0, dtype=torch.int64)
    first, device = 0, evaluator.options.device
    for real in evaluator.reference_features():
        d, i = nearest(mine, real, min(k, len(real)), device)
        distances, order = torch.cat([distances, d], dim=1).sort(dim=1)  # (N, k) and more
        index = torch.cat([index, i + first], dim=1).gather(1, order)
        distances, index, first = distances[:, :k], index[:, :k], first + len(real)
    chosen = distances[:, 0].argsort()[:num]
    distances, index = distances[chosen], index[chosen]
    order = torch.from_numpy(evaluator.collected.columns["index"])[chosen]
    rows = samples.take(sorted(order.tolist()))
    shown = dict(zip(sorted(order.tolist()), rows, strict=True))
    wanted = sorted(set(index.flatten().tolist()))
    pictures = dict(zip(wanted, reference.take(wanted), strict=True))
    lines = []
    for i, row in enumerate(order.tolist()):
        cells = [(shown[row], f"sample {row}")]
        cells += [(pictures[j], f"{j}: {d:.3g}") for j, d in zip(index[i].tolist(), distances[i].tolist(), strict=True)]
        lines.append(cells)
    k = index.shape[1]
    _sheet(lines, Path(path), f"Samples nearest to {first:,} real images, and their {k} nearest (index: distance)")
    return distances.numpy(), index.numpy()


def _sheet(lines: list[list[tuple[Tensor, str]]], path: Path, title: str) -> None:
    """A labelled sheet; the first column is set apart."""
    height, width = lines[0][0][0].shape[1:]
    zoom = max(1, -(-128 // height))  # room for the labels
    cell, gap, text = (width * zoom, height * zoom), 6, 13
    font = ImageFont.load_default(text)
    columns = max(map(len, lines))
    size = (columns * (cell[0] + gap) + 3 * gap, 2 * gap + text + len(lines) * (cell[1] + text + 2 * gap))
    canvas = Image.new("RGB", (max(size[0], int(font.getlength(title)) + 2 * gap), size[1] + gap), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, gap // 2), title, fill="black", font=font)
    for i, line in enumerate(lines):
        for j, (image, label) in enumerate(line):
            left, top = (
                gap + j * (cell[0] + gap) + (2 * gap if j else 0),
                2 * gap + text + i * (cell[1] + text + 2 * gap),
            )
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(cell, Image.Resampling.NEAREST)
            canvas.paste(tile, (left, top))
            draw.text((left, top + cell[1] + 1), label, fill="black", font=font)
    with written_aside(path) as temporary:
        canvas.save(temporary, format="PNG")
