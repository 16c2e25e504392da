"""Two pictures: the distance over training or a setting, and the real images that samples are nearest to."""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fid.evaluator import MAX_REFERENCE_ROWS, Evaluator
from fid.images import Images
from fid.metrics.rows import nearest_rows
from vca_engine.files import written_aside
from vca_engine.images.pictures import save_picture, sheet
from vca_engine.records import SHORT, read_json, read_lines, setting_of

SOFTWARE = "python -m fid curve"  # in the metadata of a PNG, by which a program knows its own
OF_GUIDANCE = ("guided_channels", "guidance_interval", "negative_class", "guide")
SETTINGS = {  # of the record of a sample, in which lines of a curve may differ -> how they are called there
    "step": "step",
    "weights.part": "",
    "sampler.name": "",
    "sampler.method": "",
    "sampler.num_steps": "num_steps",
    **{f"sampler.{name}": name for name in ("spacing", "eta", "order", "sde", "rtol", "atol", "time_shift")},
    **{f"sampler.{name}": name for name in ("diffusion", "diffusion_norm", "last_step", "last_step_size")},
    "cfg_scale": "cfg",
    "guided_channels": "guided channels",
    "guidance_interval": "interval",
    "negative_class": "away from class",
    "guide": "guide",
    "seed": "seed",
    "labels": "labels",
    "classes": "classes",
    "precision": "precision",
}
AXES = {"step": "training step", "cfg_scale": "guidance scale, cfg (1 is none)"}


def curve(
    records: Sequence[dict[str, Any]] | dict[str, Sequence[dict[str, Any]]],
    path: str | Path,
    title: str = "",
    x: str = "step",
) -> None:
    """Draw the distance of records, with two standard errors as a bar, against their training step or a setting.

    Each run has a line for each sampler, guidance, average of the weights and whatever else differs among the records;
    without guidance (cfg 1) a point belongs to every line that differs in guidance alone. The least number of each line
    is written, and where it is. A dashed line is the noise floor: what as many perfect samples are expected to have.
    Records of another network, protocol, reference or number of samples would make a picture of nothing, and are
    refused.

    Args:
        records: `Result.to_dict()` of each, with the `step` that was given to `Evaluator.compute`, in any order; of
            several runs, by their names. How the images were drawn is in their `sample`, as sample.py writes it.
        path: File to write, of any format that matplotlib knows.
        title: A line above.
        x: `step`, or a setting of `sample`: `cfg`, `steps`, `seed`, `sampler.OPTION`.

    Raises:
        ValueError: No records, one without a place on the axis, or records that do not compare.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, x = records if isinstance(records, dict) else {"": records}, SHORT.get(x, x)
    together = [record for run in runs.values() for record in run]
    name = _check_records(together, x)
    label, num = together[0].get("label", name), together[0]["num_samples"]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    lines = lines_of(runs, x)
    for text, found in lines.items():
        _draw_line(axes, [(_place(record, x), record) for record in found], name, text or label)
    floor = together[-1].get(f"{name}_noise_floor")
    if floor is not None:
        axes.axhline(floor, color="grey", linestyle="--", label=f"expected of {num} perfect samples, {floor:.3g}")
    _scale(axes, min(r[name] for r in together), max(r[name] + 2 * (r.get(f"{name}_se") or 0) for r in together))
    axes.set_xlabel(AXES.get(x, x))
    axes.set_ylabel(f"{label} of {num} samples")
    axes.set_title(_plain(title or str(together[0].get("protocol") or "")))
    axes.grid(alpha=0.3)
    if len(lines) > 4:  # it would hide them
        figure.set_figheight(4 + 0.25 * len(lines))
        ncols = 1 if len(max(lines, key=len)) > 30 else 2
        figure.legend(loc="outside lower left", ncols=ncols, title="± 2 standard errors")
    else:
        axes.legend(title="± 2 standard errors")
    try:
        with written_aside(path) as temporary:
            kind = Path(path).suffix[1:]
            figure.savefig(temporary, format=kind, dpi=150, metadata={"Software": SOFTWARE} if kind == "png" else None)
    except ValueError as error:  # matplotlib's, of a suffix that it does not know
        raise ValueError(f"cannot draw '{path}': {error}.") from error
    finally:
        pyplot.close(figure)


def is_curve(file: Path) -> bool:
    """Say whether a file is a PNG that `curve` has drawn."""
    try:
        with Image.open(file) as picture:
            return picture.info.get("Software") == SOFTWARE
    except OSError:  # no picture
        return False


def lines_of(runs: dict[str, Sequence[dict[str, Any]]], x: str) -> dict[str, list[dict[str, Any]]]:
    """Sort records into the lines of a curve: what the line is called -> its records.

    A line is called by its run, if there are several, and by the settings in which it differs from another line; one
    line alone has no name.

    Args:
        runs: Records by the names of their runs.
        x: The setting on the axis, in which records of one line differ.
    """
    keys = [key for key in SETTINGS if key != x and not (x == "sampler.name" and key.startswith("sampler."))]
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run, records in runs.items():
        rows = [({key: _words(record, key) for key in keys}, record) for record in records]
        for row, record in rows:
            owners = [row]
            if x == "cfg_scale" and _place(record, x) == 1.0:  # then the options of guidance mean nothing
                alike = [r for r, other in rows if all(r[key] == row[key] for key in keys if key not in OF_GUIDANCE)]
                owners = [r for r, other in rows if r in alike and _place(other, x) != 1.0] or owners
            for line in {(run, *other.values()) for other in owners}:
                found.setdefault(line, []).append(record)
    of_sampler = 1 + keys.index("sampler.name") if "sampler.name" in keys else 0
    varying = []
    for i, key in enumerate(["run", *keys]):  # options of a sampler are compared with those of the same sampler
        same = of_sampler if key.startswith("sampler.") and key != "sampler.name" else None
        parts = {(line[same] if same else None, line[i]) for line in found}
        if len(parts) > len({part for part, _ in parts}):
            varying.append(i)
    titles = ["run", *(SETTINGS[key] or key for key in keys)]
    without = "without " + ", ".join(titles[i] for i in varying) if varying else ""
    named = {", ".join(line[i] for i in varying if line[i]) or without: records for line, records in found.items()}
    return dict(sorted(named.items(), key=lambda item: [_natural(word) for word in re.split("[ ,]", item[0])]))


def _words(record: dict[str, Any], key: str) -> str:
    """Write a setting of a record for the name of a line; nothing where the record does not have it."""
    value = record.get("step") if key == "step" else setting_of(record.get("sample") or {}, key)
    if value is None:
        return ""
    if isinstance(value, dict):  # a guide
        value = f"step {value.get('step')}" if value.get("step") is not None else str(value.get("sha256"))[:8]
    if isinstance(value, list | tuple):
        value = f"[{', '.join(f'{each:g}' if isinstance(each, float) else str(each) for each in value)}]"
    return f"{SETTINGS[key]} {value:g}" if isinstance(value, float) else f"{SETTINGS[key]} {value}".strip()


def _natural(word: str) -> tuple[float, str]:
    """Give a key by which 10 comes after 9, and words after numbers."""
    try:
        return float(word), ""
    except ValueError:
        return np.inf, word


def _place(record: dict[str, Any], x: str) -> Any:
    """Find where a record is on the axis: a number, or a word."""
    return record.get("step") if x == "step" else setting_of(record.get("sample") or {}, x)


def _draw_line(axes: Any, points: list[tuple[Any, dict[str, Any]]], name: str, label: str) -> None:
    """Draw the numbers called `name` of records at their places, and say in the legend where they are least."""
    if all(_is_number(place) for place, _ in points):
        points = sorted(points, key=lambda point: point[0])
    else:
        points = [(str(place), record) for place, record in points]
    places, values = [place for place, _ in points], [record[name] for _, record in points]
    errors = [2 * (record.get(f"{name}_se") or 0.0) for _, record in points]
    best = min(range(len(values)), key=values.__getitem__)
    place = f"{places[best]:g}" if _is_number(places[best]) else places[best]
    text = f"{label}: least {values[best]:.3g} at {place}"
    axes.errorbar(places, values, yerr=errors, marker="o", capsize=3, label=_plain(text))


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


def _check_records(records: Sequence[dict[str, Any]], x: str) -> str:
    """Find which distance the records hold, `fid` or `fd`; a ValueError if they do not make one picture over `x`."""
    if not records:
        raise ValueError("no records to draw; name a run's folder, or the JSON files of `sample.py --fid`.")
    name = "fid" if "fid" in records[0] else "fd"
    for i, record in enumerate(records):
        where = f"'{record['file']}'" if "file" in record else f"record {i + 1}"
        if _place(record, x) is None:
            what = "training step" if x == "step" else f"{x} in its sample"
            raise ValueError(f"{where} has no {what}, so it has no place on a curve.")
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
