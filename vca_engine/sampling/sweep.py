"""A grid over a setting, `KEY=V1,V2,...`: a row of images for each value, all from the same noise."""

import dataclasses
import re
from decimal import Decimal
from typing import Any

import numpy as np
from tqdm import tqdm

from vca_engine import assemble
from vca_engine.config.reading import Spec, Word, from_dict
from vca_engine.config.schema import SampleConfig, to_dict
from vca_engine.records import SHORT
from vca_engine.sampling.drawing import Drawing
from vca_engine.sampling.tables import Table

MOST_VALUES = 1000
NUMBER = r"-?\d{1,9}(?:\.\d{1,9})?"
NOT_SWEPT = ("classes", "per_class", "guidance_interval")  # what is in the grid; and two numbers with a comma


def swept_name(text: str) -> str:
    """Give the setting of `KEY=V1,V2,...`, `cfg_scale` or `sampler.OPTION` say."""
    key = text.partition("=")[0].strip()
    return SHORT.get(key, key)


def swept(text: str, sampling: SampleConfig, sampler: Spec | None) -> list[tuple[str, SampleConfig]]:
    """Give a label and the settings for each value of `KEY=V1,V2,...`.

    Args:
        text: The setting and its values; `1:5` among them means 1,2,3,4,5, and `1:2:0.25` steps of 0.25.
        sampling: All other settings.
        sampler: The options of a sampler that were given beside; each of several samplers gets these, and else its own.

    Raises:
        ValueError: No such setting, no value, or one that is not allowed.
    """
    key, _, values = text.partition("=")
    name = swept_name(text)
    allowed = [f.name for f in dataclasses.fields(SampleConfig) if f.name not in (*NOT_SWEPT, "sampler")]
    if name.split(".")[0] not in (*allowed, "sampler") or not values.strip(" ,"):
        raise ValueError(
            f"--sweep is {text!r}; write a setting and its values, e.g. cfg=1,1.5,4 or cfg=1:5. Settings: "
            f"{', '.join(SHORT)}, {', '.join(allowed)}, sampler.OPTION."
        )
    found = []
    for word in [each for part in values.strip(" ,").split(",") for each in _counted(part.strip())]:
        value, fields = Word(word), to_dict(sampling)
        if name == "sampler.name":
            fields["sampler"] = {**(sampler or {}), "name": value}
        elif name.startswith("sampler."):
            fields["sampler"] = {**(sampling.sampler or {}), name.partition(".")[2]: value}
        else:
            fields[name] = value
        label = f"{key.strip().rpartition('.')[2]} {word}"
        row = from_dict(SampleConfig, fields, "--sweep", assemble.parts())
        assemble.check_sampler(row.sampler, "--sweep: sampler")
        found.append((label, row))
    return found


def _counted(word: str) -> list[str]:
    """Write out FIRST:LAST or FIRST:LAST:STEP, of which LAST is one of the values if it is reached; STEP is 1 or given.

    Raises:
        ValueError: Numbers that no value lies between, or more values than `MOST_VALUES`.
    """
    if not re.fullmatch(rf"{NUMBER}:{NUMBER}(:{NUMBER})?", word):
        return [word]
    first, last, step = (Decimal(part) for part in (word + ":1").split(":")[:3])
    num = int((last - first) / step) + 1 if step else 0
    if not 1 <= num <= MOST_VALUES or (last - first) * step < 0:
        raise ValueError(
            f"--sweep has the values {word!r}; write FIRST:LAST or FIRST:LAST:STEP, at most {MOST_VALUES} values, e.g. "
            "1:5 or 1:2:0.25."
        )
    return [f"{(first + k * step).normalize():f}" for k in range(num)]


def sweep(
    drawing: Drawing, values: list[tuple[str, SampleConfig]], labels: list[int]
) -> tuple[Table, list[dict[str, Any]]]:
    """Draw a row for each value of `swept`, a column for each label.

    Returns:
        The table, and how each row was drawn.
    """
    images, rows, pipe, counted = [], [], drawing.pipe, drawing.image_sampler
    samplers = [drawing.image_sampler_of(sampling) for _, sampling in values]  # all, before the first image is drawn
    bar = tqdm(zip(values, samplers, strict=True), desc="sweep", unit="value", total=len(values))
    for (label, sampling), image_sampler in bar:
        images.append(image_sampler.all(labels, sampling.group_size))  # (C, H, W, 3)
        config = dataclasses.replace(pipe.config, sample=sampling)
        rows.append({"row": label, **assemble.describe_sampling(config), "nfe": image_sampler.nfe})
        counted.evaluations += image_sampler.evaluations
        counted.drawn += image_sampler.drawn
    columns = [pipe.class_names[k].split(",")[0] for k in labels]
    return Table(np.stack(images), [row["row"] for row in rows], columns, film="rows"), rows
