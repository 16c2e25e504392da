"""Pictures by a trained model: a grid of classes, a trajectory, an interpolation or a sweep, each with its record."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vca_engine.config.reading import Spec
from vca_engine.files import written_aside
from vca_engine.images.pictures import encode_picture
from vca_engine.records import with_checksum
from vca_engine.sampling.classes import evenly_spaced_classes
from vca_engine.sampling.drawing import Drawing
from vca_engine.sampling.sample_record import alone_at, check_picture_record
from vca_engine.sampling.sweep import sweep, swept, swept_name
from vca_engine.sampling.tables import Table, class_grid, interpolations, trajectories


def draw_picture(
    drawing: Drawing,
    kind: str,
    out: str | None = None,
    *,
    num_columns: int = 10,
    swept_values: str = "",
    sampler: Spec | None = None,
) -> None:
    """Draw a picture of the classes of `drawing.sampling`, with its record beside it and in it.

    Args:
        drawing: What draws.
        kind: samples, which is a grid, trajectory, interpolate or sweep.
        out: A .png or .gif file; not given means KIND.png in the folder of the model.
        num_columns: Of a trajectory or an interpolation.
        swept_values: Of a sweep: `KEY=V1,V2,...`.
        sampler: Of a sweep: the options of a sampler that were given beside.

    Raises:
        ValueError: `out` is no picture, or something else is there, or another program is writing it.
    """
    file = Path(out or drawing.pipe.folder / f"{kind}.png")
    record_file = _record_file(file)
    with alone_at(record_file, file):
        _check_free(file, record_file)
        table, record, evaluations = _draw(drawing, kind, num_columns, swept_values, sampler)
        _save(table, file, record_file, drawing.title, record)
    print(f"wrote {file}: {drawing.title}{evaluations}")


def _draw(
    drawing: Drawing, kind: str, num_columns: int, swept_values: str, sampler: Spec | None
) -> tuple[Table, dict[str, Any], str]:
    """Draw, see `draw_picture`; gives a table, its record, and in words the evaluations of each row, if they differ."""
    pipe, sampling, image_sampler, names = (
        drawing.pipe,
        drawing.sampling,
        drawing.image_sampler,
        drawing.pipe.class_names,
    )
    classes, before = pipe.label_ids(sampling.classes or []), time.perf_counter()
    labels = classes or (evenly_spaced_classes(range(len(names))) if kind in ("samples", "sweep") else [0])
    record, rows = {"picture": kind, "classes": labels}, []
    if kind == "sweep":
        drawing.caption.pop(swept_name(swept_values).split(".")[0], None)
        table, rows = sweep(drawing, swept(swept_values, sampling, sampler), labels)
        record |= {"sweep": swept_values, "rows": rows}
    elif kind == "interpolate":
        drawing.caption["seed"] += f" to {sampling.seed + 1}"
        table = interpolations(image_sampler, labels, names, (sampling.seed, sampling.seed + 1), num_columns)
    elif kind == "trajectory":
        drawing.caption["seed"] += "; columns are noise levels"
        table = trajectories(image_sampler, pipe.process.clean, labels, names, num_columns)
    else:
        table = class_grid(image_sampler, labels, names, sampling.per_class, sampling.group_size)
    rate, nfe = round(image_sampler.drawn / (time.perf_counter() - before), 3), image_sampler.nfe
    record |= {key: value for key, value in drawing.settings().items() if not rows or key not in rows[0]}
    if not rows:  # which differ in it
        drawing.add_evaluations(nfe)
    record |= drawing.facts(nfe, num=image_sampler.drawn, images_per_second=rate)
    evaluations = [f"{row['row']}: {row['nfe']:g} evaluations" for row in rows]
    return table, record, f"; {', '.join(evaluations)}" if rows else ""


def _record_file(picture: Path) -> Path:
    """Name the file of a picture's record.

    Raises:
        ValueError: The file is no picture.
    """
    if picture.suffix.lower() not in (".png", ".gif"):
        raise ValueError(
            f"--out is {str(picture)!r}; a picture is a .png or a .gif. With --num, it is a folder, or ends in .npz or "
            ".npy."
        )
    return picture.with_suffix(".json" if picture.suffix.lower() == ".png" else ".gif.json")


def _check_free(picture: Path, file: Path) -> None:
    """Raise ValueError if a picture, or its record `file`, is there and is something else."""
    check_picture_record(file)
    if picture.exists() and not file.exists():
        raise ValueError(f"{str(picture)!r} is there already and was not made by sample.py; choose another --out.")


def _save(table: Table, file: Path, record_file: Path, title: str, record: Mapping[str, Any]) -> None:
    text = with_checksum(record)
    animated = file.suffix.lower() == ".gif"
    frames = table.frames(title, animated=animated)
    content = encode_picture(frames, animated, text, milliseconds=1000 if table.film == "rows" else 250)
    with written_aside(file) as picture, written_aside(record_file) as beside:
        picture.write_bytes(content)
        beside.write_text(text, encoding="utf-8")
        file.unlink(missing_ok=True)  # so that at no moment it stands beside the record of another
