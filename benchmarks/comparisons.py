"""Paired comparisons of the study's arms: tests, intervals, tables, sentences and the figure."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from vca_engine.files import write_text, written_aside
from vca_engine.sampling.figures import WIDE, new_figure, styled

QUESTIONS = {  # what is asked -> pairs of arms: the first has it, the second has not
    "The convolution": [("mhsa+conv", "mhsa"), ("vca", "vca-noconv")],
    "The pooling": [("agent", "mhsa+conv")],
    "The difference": [("vca", "vca-plain"), ("vca", "vca-stage1"), ("vca", "vca-stage2"), ("differential", "mhsa")],
    "The initialisation": [("vca", "vca-std0.02"), ("vca-separate", "vca-separate-std0.02")],
    "The softmax": [("vca", "vca-separate"), ("vca-std0.02", "vca-separate-std0.02")],
    "The streams": [("vca", "vca-embed"), ("vca", "vca-pool"), ("vca-plain", "agent")],
    "All of it": [("vca", "mhsa"), ("vca", "mhsa+conv"), ("vca", "agent"), ("vca", "linear")],
}
PAIRS = [pair for pairs in QUESTIONS.values() for pair in pairs]


class Measure(NamedTuple):
    """A number of a result.

    Attributes:
        key: Its name in the values.
        label: What tables call it.
        sign: 1 if more is better, -1 if less is.
        digits: After the point.
    """

    key: str
    label: str
    sign: int
    digits: int


OF_GENERATOR = (  # the first of each kind is the one that the sentences are about
    Measure("fd", "Frechet distance", -1, 2),
    Measure("loss", "held-out loss", -1, 4),
    Measure("accuracy_cfg1", "right at cfg 1, %", 1, 1),
    Measure("accuracy_cfg2", "right at cfg 2, %", 1, 1),
)
OF_RECOGNISER = (Measure("top1", "top-1, %", 1, 2), Measure("loss", "held-out loss", -1, 4))


class Comparison(NamedTuple):
    """Mean of the differences a - b of a measure over n seeds, its 95 % t interval, p, and p after Holm's correction."""

    mean: float
    low: float
    high: float
    p: float
    n: int
    holm: float = np.nan


def paired_t(differences: Sequence[float]) -> Comparison:
    """Test whether differences (n,) have the mean 0: t = mean / (s / sqrt n), n - 1 degrees of freedom, two-sided.

    Differences that are all equal have no spread to test with: p is 1 if they are 0, and 0 if not. Fewer than two have
    no p, NaN.
    """
    d = np.asarray(differences, dtype=np.float64)
    n, mean = len(d), float(d.mean()) if len(d) else np.nan
    if n < 2:
        return Comparison(mean, np.nan, np.nan, np.nan, n)
    error = d.std(ddof=1) / np.sqrt(n)
    if error == 0:
        return Comparison(mean, mean, mean, float(mean == 0), n)
    half = stats.t.ppf(0.975, n - 1) * error
    p = 2 * stats.t.sf(abs(mean) / error, n - 1)
    return Comparison(mean, float(mean - half), float(mean + half), float(p), n)


def holm(p: Sequence[float]) -> np.ndarray:
    """Correct m values of p for their number: the k-th smallest becomes max over j <= k of min(1, (m - j + 1) p_j).

    NaN, of tests that could not be made, are not counted, and stay.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    p = np.asarray(p, dtype=np.float64)
    corrected, order = np.full(len(p), np.nan), np.argsort(p)  # NaN last
    order = order[: np.isfinite(p).sum()]
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return corrected


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], rows: np.ndarray, seed: int, times: int = 200
) -> tuple[float, float]:
    """Compute the basic 95 % bootstrap interval of a statistic of rows (N, ...), as a function of the seed.

    It is [2 v - q_97.5, 2 v - q_2.5] of the value v and the quantiles q of resampled ones, so that a statistic which
    resampling moves, as it does the Frechet distance (upwards), is moved back.

    Source: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 5.2.
    """
    rng, value = np.random.default_rng(seed), statistic(rows)
    found = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(times)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(2 * value - high), float(2 * value - low)


def measures_of(runs: Sequence[dict[str, Any]]) -> tuple[Measure, ...]:
    """Give the measures of a stage's results."""
    return OF_RECOGNISER if any("top1" in run["values"] for run in runs) else OF_GENERATOR


def values_of(runs: Sequence[dict[str, Any]], arm: str, key: str) -> dict[int, float]:
    """Collect a measure of an arm: seed -> value; a training that failed has none."""
    own = [run for run in runs if run["settings"]["arm"] == arm and not run["failed"]]
    return {run["settings"]["seed"]: run["values"][key] for run in own}


def compare(runs: Sequence[dict[str, Any]], key: str) -> dict[tuple[str, str], Comparison]:
    """Compare all pairs of arms of a stage in one measure, seed by seed, with Holm's correction for all of them."""
    found = []
    for pair in PAIRS:
        a, b = (values_of(runs, arm, key) for arm in pair)
        found.append(paired_t([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]))
    corrected = holm([one.p for one in found])
    return {
        pair: one._replace(holm=float(p)) for pair, one, p in zip(PAIRS, found, corrected, strict=True) if one.n > 1
    }


def table_of_arms(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Write a row for each arm: mean ± standard deviation of the seeds, in Markdown."""
    measures = measures_of(runs)
    images = ["± of the images"] if measures is OF_GENERATOR else []
    header = ["arm", "parameters", "rate", "seeds", *(m.label for m in measures), *images, "CPU s of training"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for arm in dict.fromkeys(run["settings"]["arm"] for run in runs):
        own = [run for run in runs if run["settings"]["arm"] == arm]
        good = [run for run in own if not run["failed"]]
        seeds = f"{len(good)}" if len(good) == len(own) else f"{len(good)}, {len(own) - len(good)} failed"
        parameters = f"{good[0]['values']['parameters']:,}" if good else "-"
        cells = [f"`{arm}`", parameters, f"{own[0]['settings']['rate']:g}", seeds]
        for m in measures:
            cells.append(spread([run["values"][m.key] for run in good], m.digits))
        if images:
            half = [np.ptp(run["values"]["fd_interval"]) / 2 for run in good]
            cells.append(f"{np.mean(half):.2f}" if half else "-")
        cells.append(f"{np.median([run['seconds']['train_cpu'] for run in own]):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float], digits: int) -> str:
    """Write mean ± standard deviation of values."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def table_of_comparisons(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Write a row for each pair of arms: difference, its 95 % interval and p after Holm, by measure, in Markdown."""
    measures = measures_of(runs)
    header = ["question", "arms", *(m.label for m in measures)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    found = {m.key: compare(runs, m.key) for m in measures}
    for question, pairs in QUESTIONS.items():
        for pair in pairs:
            if pair in found[measures[0].key]:
                cells = [question, f"`{pair[0]}` - `{pair[1]}`"]
                lines.append(f"| {' | '.join(cells + [cell(found[m.key][pair], m) for m in measures])} |")
    return lines


def cell(one: Comparison, m: Measure) -> str:
    """Write a comparison; bold where p after Holm is below .05."""
    text = f"{one.mean:+.{m.digits}f} ({one.low:+.{m.digits}f} to {one.high:+.{m.digits}f}), p {written_p(one.holm)}"
    return f"**{text}**" if one.holm < 0.05 else text


def written_p(p: float) -> str:
    """Write a p value."""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def sentences(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Say of each question what the first measure tells, and of which pairs nothing can be said."""
    first, lines, unclear = measures_of(runs)[0], [], []
    found = compare(runs, first.key)
    for question, pairs in QUESTIONS.items():
        clauses = []
        for pair in pairs:
            if pair not in found:
                continue
            one = found[pair]
            if one.holm < 0.05:
                verdict = "better" if first.sign * one.mean > 0 else "worse"
                text = (
                    f"`{pair[0]}` is {verdict} than `{pair[1]}` ({one.mean:+.{first.digits}f}, p {written_p(one.holm)})"
                )
                clauses.append(text)
            else:
                interval = f"{one.low:+.{first.digits}f} to {one.high:+.{first.digits}f}"
                if one.low * one.high > 0:  # beyond doubt if this were the only comparison
                    verdict = "better" if first.sign * one.mean > 0 else "worse"
                    alone = f"seems {verdict} than `{pair[1]}` ({interval}), not beyond doubt"
                    clauses.append(f"`{pair[0]}` {alone} (p {written_p(one.holm)})")
                else:
                    clauses.append(f"`{pair[0]}` and `{pair[1]}` cannot be told apart ({interval})")
                unclear.append(f"`{pair[0]}` and `{pair[1]}`")
        if clauses:
            lines.append(f"* {question}: {'; '.join(clauses)}.")
    if lines:
        lines.append(f"* In {len(unclear)} of {len(found)} comparisons nothing can be said of {first.label}.")
    return lines


def check_comparable(name: str, runs: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if results of a stage are measured by different classifiers, or through different codecs."""
    for key in ("classifier", "codec"):
        if len(found := {str(run["values"].get(key)) for run in runs if not run["failed"]}) > 1:
            raise ValueError(f"results of {name} have {len(found)} different values of {key}, which do not compare.")


def report_of(stages: dict[str, Sequence[dict[str, Any]]]) -> str:
    """Write the tables and sentences of all stages in Markdown; of a stage without results, the command for it."""
    lines = []
    for name, runs in stages.items():
        check_comparable(name, runs)
        lines += [f"### {name}", ""]
        if not runs:
            lines += [f"Not complete. `python -m benchmarks.study --part 1/1 --stages {name}`", ""]
            continue
        for block in (table_of_arms(runs), table_of_comparisons(runs), sentences(runs)):
            lines += [*block, ""]
    return "\n".join(lines)


@styled
def write_figure(stages: dict[str, Sequence[dict[str, Any]]], file: Path) -> None:
    """Draw every seed of every arm as a dot and their mean as a line, a row of two panels for each stage."""
    shown = {name: runs for name, runs in stages.items() if runs}
    figure, axes = new_figure(WIDE, 2.5 * len(shown), len(shown), 2)
    for (name, runs), line in zip(shown.items(), axes, strict=True):
        arms = list(dict.fromkeys(run["settings"]["arm"] for run in runs))[::-1]
        for ax, m in zip(line, measures_of(runs), strict=False):
            for row, arm in enumerate(arms):
                values = [*values_of(runs, arm, m.key).values()]
                ax.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6, markeredgewidth=0)
                if values:
                    ax.plot([np.mean(values)] * 2, [row - 0.35, row + 0.35], color="black", linewidth=1)
            ax.set_yticks(range(len(arms)), arms if ax is line[0] else [])
            ax.set_ylim(-0.7, len(arms) - 0.3)
            ax.grid(axis="x", alpha=0.3)
            ax.set_xlabel(f"{m.label}, {'more' if m.sign > 0 else 'less'} is better")
        line[0].set_title(name, loc="left")
    with written_aside(file) as temporary:
        figure.savefig(temporary, format="png", dpi=200)


def write_report(stages: dict[str, Sequence[dict[str, Any]]], file: Path) -> None:
    """Put the report between the two marks in a Markdown file, and the figure beside it.

    Raises:
        ValueError: The file has no marks; or results do not compare.
    """
    begin, end = "<!-- results: written by --table -->\n", "<!-- end of the results -->"
    before, found, rest = file.read_text().partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{str(file)!r} lacks the lines {begin.strip()!r} and {end!r}, between which results go.")
    report, rest = report_of(stages), rest[rest.index(end) :]
    write_text(file, f"{before}{begin}\n{report}\n{rest}")
    if any(stages.values()):
        write_figure(stages, file.with_suffix(".png"))
