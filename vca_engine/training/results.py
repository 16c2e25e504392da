"""What finished runs have measured, beside what is published: a table in Markdown, and curves over the steps."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vca_engine import assemble
from vca_engine.config.paper import PaperRow
from vca_engine.config.reading import from_dict
from vca_engine.config.schema import Config, to_dict
from vca_engine.files import is_older, write_text
from vca_engine.records import differences, listed, read_json
from vca_engine.sampling.figures import WIDE, new_figure, save_figure, styled
from vca_engine.training.cost import cost_of, gib, memory_of_weights, network_of
from vca_engine.training.distances import DISTANCES_FILE, EVALUATIONS_FILE, measure_of
from vca_engine.training.log import read_metrics
from vca_engine.training.resume import MAY_CHANGE
from vca_engine.weights import checkpoint

# Settings that change no number: those that a resumed run may change, but for how images are drawn and measured.
PLACES = (MAY_CHANGE - {"sample", "fid", "eval"}) | {f"fid.{key}" for key in ("reference", "weights", "every", "num")}
PLACES |= {"eval.data.images", "eval.every"}


NOT_YET, REFUSED = "not yet run", "refused"


@dataclass(frozen=True)
class Measured:
    """A number that a run has.

    Args:
        name: fid, fd of another network than Inception, or top1.
        value: The number.
        error: Its standard error; None if it is not known.
        num: Images that it is of.
        file: Where it stands.
    """

    name: str
    value: float
    error: float | None
    num: int
    file: Path


def check_same_settings(config: Config, other: Config, what: str) -> None:
    """Check that two configs train and measure the same, wherever their files lie.

    Args:
        config: Of a row.
        other: With settings of a user, or of what is there already.
        what: What the message calls that.

    Raises:
        ValueError: They do not; names the settings.
    """
    if config == other:
        return
    old, new = to_dict(config), to_dict(other)
    attentions = [network_of(each).attention for each in (config, other)]  # with every option
    for settings, attention in zip((old, new), attentions, strict=True):
        settings["model"]["attention"] = attention
    found = differences(old, new)
    prefixes = tuple(f"{key}." for key in PLACES)
    found = {key: both for key, both in found.items() if not f"{key}.".startswith(prefixes)}
    if found:
        raise ValueError(f"{what} has other settings than the row: {listed(found, 'there')}.")


def check_run(config: Config) -> int:
    """Check that what is in the folder of a row is a run of its settings; return how many steps that has done.

    Raises:
        ValueError: It is another run, or its checkpoint is damaged.
    """
    found = checkpoint.steps(Path(config.run_dir))
    if not found:
        return 0
    record = checkpoint.read_record(found[-1])
    other = from_dict(Config, record["config"], str(found[-1] / checkpoint.RECORD))
    if other.data["name"] != config.data["name"]:
        given, there = config.data["name"], other.data["name"]
        raise ValueError(f"{config.run_dir!r} has other settings than the row: data.name {given!r} (there {there!r}).")
    other = assemble.with_image_size(other, record["shape"].get("image_size"))
    check_same_settings(config, other, repr(config.run_dir))
    return record["step"]


def measured(config: Config, file: Path, num: int | None = None) -> Measured | None:
    """Find the number of a row; None if there is none yet.

    Args:
        config: Of the row.
        file: Of a generator, the record that sample.py writes; of a recogniser, its eval.jsonl.
        num: Images of that record.

    Raises:
        ValueError: What is there was drawn with other settings, or is damaged.
    """
    last = config.train.num_steps
    if not assemble.is_generator(config):
        line = next((line for line in read_metrics(file) if line["step"] == last), None)
        if line is None:
            return None
        share = line["top1"] / 100
        return Measured("top1", line["top1"], 100 * math.sqrt(share * (1 - share) / line["num_samples"]), num, file)
    if not file.is_file():
        return None
    record = read_json(file)
    expected = {"num_samples": num, "step": last, "sample": {**assemble.describe_sampling(config), "labels": "random"}}
    expected["sample"] |= {"classes": "all", "negative_class": None, "guide": None}
    given = {**record, "sample": {key: (record.get("sample") or {}).get(key) for key in expected["sample"]}}
    if found := differences(expected, {key: given.get(key) for key in expected}):
        raise ValueError(f"{str(file)!r} was drawn with other settings than the row's: {listed(found, 'there')}.")
    name = measure_of(record)
    return Measured(name, record[name], record.get(f"{name}_se"), num, file)


def write_table(file: Path, title: str, about: str, rows: Mapping[PaperRow, Measured | str]) -> None:
    """Write the table of rows in Markdown: reproduced, its standard error, published, the difference, and the record.

    Args:
        file: It; a .md file.
        title: Its heading.
        about: What to know when one reads it.
        rows: PaperRow -> what it has measured, `NOT_YET`, or the sentence that says why it is refused.
    """
    head = "config, network, measure, reproduced, standard error, VCA paper, difference, paper of the model, record"
    head = head.split(", ")
    lines = [f"# {title}", "", about, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, result in rows.items():
        done = isinstance(result, Measured)
        cells = [f"`{row.name}`", row.title, row.measure]
        cells += [_value(result), _signed(result.error if done else None)]
        difference = result.value - row.published if done and row.published is not None else None
        cells += [_signed(row.published, 1), _signed(difference, 2, "+"), _signed(row.original, 1)]
        lines.append("| " + " | ".join([*cells, f"`{result.file}`" if done else ""]) + " |")
    refused = {row: result for row, result in rows.items() if _value(result) == REFUSED}
    lines += ["" for _ in refused][:1] + [f"* `{row.name}` is refused: {result}" for row, result in refused.items()]
    write_text(file, "\n".join(lines) + "\n")


def list_rows(configs: Mapping[PaperRow, Config], found: Mapping[PaperRow, Measured | str]) -> Iterator[str]:
    """Write a line for each row: what its network is and takes, the published value, and ours; and what these are."""
    head = ("parameters", "GMAC", "contrast", "memory", "published", "ours")
    yield f"{'config':<24}" + "".join(f"{word:>13}" for word in head)
    for row, config in configs.items():
        cost = cost_of(config)
        memory = gib(sum(memory_of_weights(config, cost.parameters).values()))
        published = "not known" if row.published is None else f"{row.published:g}"
        contrast = ",".join(map(str, cost.contrast_tokens)) or "-"
        cells = (
            f"{cost.parameters:,}",
            f"{cost.multiply_adds / 1e9:.2f}",
            contrast,
            memory,
            published,
            _value(found[row]),
        )
        yield f"{row.name:<24}" + "".join(f"{cell:>13}" for cell in cells)
    yield (
        "GMAC: 10^9 multiply-adds of a forward pass of one sample, counted by torch. contrast: numbers of contrast\n"
        "tokens. memory: of weights, gradients, optimizer and averages, by arithmetic; activations come on top.\n"
        "published: FID-50K or top-1 in the VCA paper."
    )


def _value(result: Measured | str) -> str:
    """Write the number of a row, or a word in its place."""
    return f"{result.value:.2f}" if isinstance(result, Measured) else result if result == NOT_YET else REFUSED


def _signed(value: float | None, digits: int = 2, sign: str = "") -> str:
    """Write a number of a table; a dash if there is none."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


@styled
def plot_curves(path: Path, folders: Mapping[str, Path]) -> None:
    """Draw the distance or the accuracy of runs against the step, as path.png and path.pdf, where there is news.

    Args:
        path: Without an ending.
        folders: What a line is called -> the folder of the run.
    """
    files = [(name, folder / file) for name, folder in folders.items() for file in (DISTANCES_FILE, EVALUATIONS_FILE)]
    if not is_older(path.with_name(f"{path.name}.png"), *(file for _, file in files)):
        return
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, file in files:
        for line in read_metrics(file):
            if measure := measure_of(line):
                curves.setdefault(measure, {}).setdefault(name, []).append(line)
    if not curves:
        return
    height = max(2.4, 0.12 * max(map(len, curves.values())))  # inches; a line of a legend takes 0.12
    figure, axes = new_figure(WIDE * len(curves), height, 1, len(curves))
    for ax, (measure, runs) in zip(axes[0], curves.items(), strict=True):
        for i, (name, lines) in enumerate(runs.items()):  # matplotlib has ten colours
            style = {"linestyle": ("-", "--", ":")[i // 10 % 3], "marker": "."}
            ax.plot([line["step"] for line in lines], [line[measure] for line in lines], label=name, **style)
        ax.set_xlabel("training step")
        ax.set_ylabel({"fid": "FID", "fd": "Frechet distance", "top1": "top-1, %"}[measure])
        ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    save_figure(figure, path)
