"""Training runs of recognisers beside each other: a table of accuracies over seeds, and their curves.

Runs whose settings differ in nothing but `seed` and `run_dir` are a group, which is called by what differs between
groups, e.g. attention vca. matplotlib and scipy are imported where they are used: see docs/architecture.md, start-up.
"""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vca_engine import assemble
from vca_engine.config.reading import from_dict
from vca_engine.config.schema import Config, to_dict
from vca_engine.files import written_aside
from vca_engine.records import differences, listed, read_json, write_json
from vca_engine.training.distances import EVALUATIONS_FILE
from vca_engine.training.log import read_metrics
from vca_engine.training.resume import CONFIG_FILE
from vca_engine.weights import checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_SUFFIXES = (".png", ".pdf", ".svg")
EXAMPLE = "python -m classify compare runs/own-0 runs/own-1 runs/vca-0 runs/vca-1"


@dataclass(frozen=True)
class EvaluatedRun:
    """A run of train.py with what its recogniser got right.

    Attributes:
        folder: Of the run.
        seed: Its seed.
        settings: All others but `run_dir`, nested.
        num_steps: Of the training.
        num_classes: That it tells apart.
        num_parameters: Of its network; None of a run of a version that did not say.
        evaluated_on: What has to be equal for two accuracies to be compared.
        lines: Step -> its line of eval.jsonl, in order.
    """

    folder: Path
    seed: int
    settings: dict[str, Any]
    num_steps: int
    num_classes: int
    num_parameters: int | None
    evaluated_on: dict[str, Any]
    lines: dict[int, dict[str, Any]]

    @property
    def step(self) -> int:
        """The last step at which it was evaluated."""
        return max(self.lines)

    @property
    def is_finished(self) -> bool:
        """True if that is the last step of the training."""
        return self.step >= self.num_steps


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: What distinguishes it from the other groups.
        runs: In the order of their seeds.
    """

    name: str
    runs: tuple[EvaluatedRun, ...]

    @property
    def steps(self) -> list[int]:
        """The steps at which each of its runs was evaluated; the last of them is the one of the table."""
        return sorted(set.intersection(*({*run.lines} for run in self.runs)))

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs."""
        return [run.seed for run in self.runs]

    @property
    def is_finished(self) -> bool:
        """True if all of its runs have come to their last step."""
        return all(run.is_finished for run in self.runs)

    def values(self, measure: str, step: int | None = None) -> list[float]:
        """List the accuracies of its runs in percent, top1 or top5, at a step; not given means the last."""
        return [run.lines[self.steps[-1] if step is None else step][measure] for run in self.runs]


def compare(runs: Sequence[str | Path], out: Path) -> str:
    """Compare runs: draw their accuracies against the training step, and write all numbers as JSON beside it.

    Args:
        runs: Folders of train.py.
        out: The picture to write, .png, .pdf or .svg; the other file has the same name and ends in .json.

    Returns:
        The table, as text.

    Raises:
        FileNotFoundError: There is no such folder.
        OSError: A file cannot be read or written.
        ValueError: A folder is no run of a recogniser with evaluations, two runs were evaluated on something else, or
            the JSON file is there already and holds no comparison.
    """
    if out.suffix not in PICTURE_SUFFIXES:
        raise ValueError(f"the picture {str(out)!r} has to end in one of {', '.join(PICTURE_SUFFIXES)}.")
    if not runs:
        raise ValueError(f"there is nothing to compare; name the folders of runs, e.g. {EXAMPLE}.")
    check_replaceable(out.with_suffix(".json"))
    found = [read_run(Path(folder)) for folder in runs]
    for run in found[1:]:
        if different := differences(found[0].evaluated_on, run.evaluated_on):
            raise ValueError(
                f"{str(found[0].folder)!r} and {str(run.folder)!r} were not evaluated on the same: "
                f"{listed(different, 'the other')}. Compare runs with the same eval.data and eval.crop."
            )
    groups = group_runs(found)
    pairs = [PairedDifference(a, b) for a, b in itertools.combinations(groups, 2) if are_paired(a, b)]
    figure = plot(groups)
    with written_aside(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:], dpi=150)
    write_json(out.with_suffix(".json"), to_record(groups, pairs))
    return render_table(groups, pairs)


def check_replaceable(file: Path) -> None:
    """Raise ValueError if something else than a comparison stands where the numbers will be written."""
    known: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError):  # a damaged file, or one of something else
        known = read_json(file)
    if file.exists() and "paired_differences" not in known:
        raise ValueError(
            f"{str(file)!r}, where the numbers beside the picture would be written, is there already and holds no "
            "comparison; choose another --out."
        )


def read_run(folder: Path) -> EvaluatedRun:
    """Read what a run was, and its evaluations.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is no run of train.py, none of a recogniser, was never evaluated, or is damaged.
    """
    name = str(folder)
    if not folder.exists():
        raise FileNotFoundError(f"the run {name!r} does not exist; name folders of train.py, e.g. {EXAMPLE}.")
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{name!r} is no run of train.py: it has no {CONFIG_FILE}; name the run_dir of a training.")
    place = checkpoint.newest(folder)
    if place is None:
        raise ValueError(f"{name!r} has no checkpoint yet; let its training come to the first evaluation.")
    record = checkpoint.read_record(place)
    config = from_dict(Config, record["config"], str(place / checkpoint.RECORD))
    config = assemble.with_image_size(config, record["shape"].get("image_size"))
    if assemble.is_generator(config):
        raise ValueError(
            f"{name!r} is of a generator, process {config.process['name']}, and here accuracies of recognisers are "
            "compared. For its FID: python -m fid curve."
        )
    lines = [line for line in read_metrics(folder / EVALUATIONS_FILE) if _is_evaluation(line)]
    if config.eval.data is None or not lines:
        raise ValueError(
            f"{name!r} has no evaluations, a file {EVALUATIONS_FILE}: it was trained without images to evaluate on, or "
            "has not come to its first evaluation. Train it with --eval.data.images DIR, and --eval.every N for more "
            "than one at the end."
        )
    kept = ("num_samples", "protocol", "weights")
    evaluated_on = {"eval.data": {"name": config.data["name"], **config.eval.data}}
    evaluated_on |= {key: lines[-1].get(key) for key in kept}
    settings = to_dict(config)
    return EvaluatedRun(
        folder=folder,
        seed=settings.pop("seed"),
        settings={key: value for key, value in settings.items() if key != "run_dir"},
        num_steps=config.train.num_steps,
        num_classes=len(record["shape"].get("class_names", ())),
        num_parameters=record.get("num_parameters"),
        evaluated_on=evaluated_on,
        # Others are of before eval.data or eval.crop was changed.
        lines={x["step"]: x for x in lines if all(x.get(key) == lines[-1].get(key) for key in kept)},
    )


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    """Say whether a line of eval.jsonl holds the accuracies that train.py writes."""
    numbers = [line.get(name) for name in ("top1", "top5", "num_samples")]
    return all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)


def group_runs(runs: Sequence[EvaluatedRun]) -> list[Group]:
    """Put runs together that differ in nothing but their seed, in the order in which the first of each is given.

    Raises:
        ValueError: Two of a group have the same seed, or no step at which all of them were evaluated.
    """
    found: list[list[EvaluatedRun]] = []
    for run in runs:
        same = next((group for group in found if not differences(group[0].settings, run.settings)), None)
        if same is None:
            found.append([run])
            continue
        if twin := next((other for other in same if other.seed == run.seed), None):
            raise ValueError(
                f"{str(twin.folder)!r} and {str(run.folder)!r} have the same settings and the same seed, {run.seed}, "
                "so they are one run twice; leave one of them out."
            )
        same.append(run)
    names = name_groups([group[0].settings for group in found])
    groups = [Group(name, tuple(sorted(g, key=lambda run: run.seed))) for name, g in zip(names, found, strict=True)]
    for group in groups:
        if not group.steps:
            folders = ", ".join(repr(str(run.folder)) for run in group.runs)
            raise ValueError(f"{folders} were evaluated at no step in common; let them come to their end.")
    return groups


def name_groups(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each of several nested settings by the values that are not the same in all of them.

    The options of a part, e.g. of an attention, follow from its name where each name has but one value of them.
    """
    first = settings[0]
    if len(settings) == 1:
        model = first["model"]
        return [f"{model['name']}, attention {model['attention']['name']}"]
    varying = sorted({key for other in settings[1:] for key in differences(first, other)})
    shown = []
    for key in varying:
        part = f"{key.rpartition('.')[0]}.name"
        found = {(_value(each, part), _value(each, key)) for each in settings}
        if key == part or part not in varying or len(found) > len({name for name, _ in found}):
            shown.append(key)
    shown.sort(key=lambda key: not key.endswith(".name"))
    texts = [
        [(key.removeprefix("model.").removesuffix(".name"), _value(each, key)) for key in shown] for each in settings
    ]
    return [", ".join(f"{key} {value}" for key, value in row if value is not None) for row in texts]


def _value(settings: Any, key: str) -> str | None:
    """Write the value of a dotted key as it stands in a file of settings; None where there is no such key."""
    for part in key.split("."):
        if not isinstance(settings, dict) or part not in settings:
            return None
        settings = settings[part]
    return settings if isinstance(settings, str) else json.dumps(settings)


def are_paired(first: Group, second: Group) -> bool:
    """Say whether two groups have the same seeds, at least two of them, and stand at the same step or at their ends."""
    comparable = first.steps[-1] == second.steps[-1] or (first.is_finished and second.is_finished)
    return comparable and first.seeds == second.seeds and len(first.seeds) > 1


@dataclass(frozen=True)
class PairedDifference:
    """How much more a second group gets right than a first, seed by seed: differences in top-1, in points.

    Attributes:
        first: The one that is subtracted.
        second: The other, with the same seeds; see `are_paired`.
    """

    first: Group
    second: Group

    @property
    def values(self) -> list[float]:
        """The difference of each seed."""
        return [b - a for a, b in zip(self.first.values("top1"), self.second.values("top1"), strict=True)]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def standard_error(self) -> float:
        """The standard error of the mean: s / sqrt(n), of n differences with the standard deviation s."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean, by Student's t with n - 1 degrees of freedom; None if all values are equal.

        They are if none is half an image away from another: then nothing is known of the spread.
        """
        from scipy.special import stdtrit

        if max(self.values) - min(self.values) < 50 / self.first.runs[0].evaluated_on["num_samples"]:
            return None
        half = float(stdtrit(len(self.values) - 1, 0.975)) * self.standard_error
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        name = f"{self.second.name} minus {self.first.name}: {self.mean:+.2f} points"
        if self.interval is None:
            return f"{name} with each of {len(self.values)} seeds, so no spread is known, and no interval."
        low, high = self.interval
        verdict = "it can be told from 0" if low > 0 or high < 0 else "it cannot be told from 0"
        return (
            f"{name}, standard error {self.standard_error:.2f} ({len(self.values)} seeds, paired); 95 % t interval "
            f"{low:+.2f} to {high:+.2f}: {verdict}."
        )


def render_table(groups: Sequence[Group], pairs: Sequence[PairedDifference]) -> str:
    """Write the table as text, with what has to be known to read it."""
    seen = groups[0].runs[0].evaluated_on
    images = ", ".join(str(value) if key == "name" else f"{key} {value}" for key, value in seen["eval.data"].items())
    with_top5 = has_top5(groups)
    rows = [["", "parameters", "seeds", "step", "top-1", *["top-5"] * with_top5, "top-1 of each seed"]]
    for group in groups:
        number = group.runs[0].num_parameters
        each = ", ".join(f"{v:.2f} ({seed})" for seed, v in zip(group.seeds, group.values("top1"), strict=True))
        cells = [f"{group.steps[-1]:,}", spread_of(group.values("top1"))]
        cells += [spread_of(group.values("top5"))] * with_top5
        rows.append([group.name, "not known" if number is None else f"{number:,}", str(len(group.runs)), *cells, each])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"Accuracy in % on {seen['num_samples']:,} images ({images}; {seen['protocol']}; weights {seen['weights']})",
        "",
    ]
    for name, *cells, last in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded, last]))
    return "\n".join([*lines, "", *map(str, pairs), *[""] * bool(pairs), *notes_on(groups, len(pairs))])


def notes_on(groups: Sequence[Group], num_pairs: int) -> list[str]:
    """List the sentences that a table of these groups, and so many paired differences, needs."""
    notes, several = [], [group for group in groups if len(group.runs) > 1]
    if several:
        notes.append("± is the standard deviation over seeds.")
    if single := [group.name for group in groups if len(group.runs) == 1]:
        notes.append(f"One seed, so no spread is known: {'; '.join(single)}.")
    if num_pairs < math.comb(len(several), 2):
        notes.append("There is no paired difference where the seeds are not the same, or steps differ before the end.")
    if num_pairs > 1:
        notes.append(
            f"There are {num_pairs} intervals, each of which misses its true value in 1 of 20 cases by chance."
        )
    if len({group.steps[-1] for group in groups}) > 1:
        steps = "; ".join(f"{group.name} at {group.steps[-1]:,}" for group in groups)
        notes.append(f"The groups stand at different steps: {steps}.")
    for run in (run for group in groups for run in group.runs if not run.is_finished):
        notes.append(f"Not finished: {str(run.folder)!r} is at step {run.step:,} of {run.num_steps:,}.")
    return notes


def has_top5(groups: Sequence[Group]) -> bool:
    """Say whether being among the first five says something: with five classes or fewer all are."""
    return all(run.num_classes > 5 for group in groups for run in group.runs)


def spread_of(values: Sequence[float]) -> str:
    """Write mean and standard deviation of accuracies; of one, itself."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def to_record(groups: Sequence[Group], pairs: Sequence[PairedDifference]) -> dict[str, Any]:
    """Collect all numbers as JSON values."""
    return {
        "evaluated_on": groups[0].runs[0].evaluated_on,
        "groups": [
            {
                "name": group.name,
                "num_parameters": group.runs[0].num_parameters,
                "step": group.steps[-1],
                **{name: _summary(group.values(name)) for name in ("top1", *["top5"] * has_top5(groups))},
                "runs": [
                    {
                        **{"folder": str(run.folder), "seed": run.seed, "step": run.step},
                        **{"finished": run.is_finished, "top1": run.lines[group.steps[-1]]["top1"]},
                    }
                    for run in group.runs
                ],
            }
            for group in groups
        ],
        "paired_differences": [
            {
                **{"of": pair.second.name, "minus": pair.first.name, "top1": pair.mean, "num_seeds": len(pair.values)},
                **{"standard_error": pair.standard_error, "interval": pair.interval},
            }
            for pair in pairs
        ],
    }


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def plot(groups: Sequence[Group]) -> "Figure":
    """Draw top-1 against the training step: a thin line for each seed, a thick one for the mean of each group."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, group in enumerate(groups):
        colour, steps = f"C{number}", group.steps
        for run in group.runs:
            values = [line["top1"] for line in run.lines.values()]
            axes.plot([*run.lines], values, color=colour, linewidth=0.8, alpha=0.6)
        means = [statistics.fmean(group.values("top1", step)) for step in steps]
        num = len(group.runs)
        label = f"{group.name}: {spread_of(group.values('top1'))} % ({num} seed{'s' * (num > 1)})"
        axes.plot(steps, means, color=colour, linewidth=2.5, marker="o", markersize=4, label=label)
    seen = groups[0].runs[0].evaluated_on
    axes.set(xlabel="training step", ylabel=f"top-1 of {seen['num_samples']:,} images, %")
    axes.set_title("thick: mean over seeds; thin: each seed", fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    for text in figure.legend(loc="outside lower center").get_texts():  # below the axes, where it covers no curve
        text.set_parse_math(False)  # a path in the name may hold a $
    return figure
