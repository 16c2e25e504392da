"""Measurements during a run: fid.jsonl or eval.jsonl, a line each; best.json, and of distances fid.png, made of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vca_engine.files import write_text

DISTANCES_FILE, EVALUATIONS_FILE, BEST_FILE = "fid.jsonl", "eval.jsonl", "best.json"

DISTANCES = ("fid", "fd")  # the smaller the better


def show_distances(
    folder: Path, results: list[dict[str, Any]], plot_distance: Callable[..., None] | None = None
) -> None:
    """Write best.json and fid.png of a run; of a recogniser best.json only.

    Args:
        folder: Of the run.
        results: The lines of fid.jsonl or eval.jsonl.
        plot_distance: (lines of fid.jsonl, file, title) -> None; draws their curve.
    """
    if best := best_of(results):
        write_text(folder / BEST_FILE, json.dumps(best, indent=2) + "\n")
    if results and plot_distance and measure_of(results[-1]) in DISTANCES:
        shown = [r for r in results if _kind(r) == _kind(results[-1])]
        plot_distance(shown, folder / "fid.png", f"{folder.resolve().name}, {results[-1]['protocol']}")


def best_of(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Find the least distance, or the highest accuracy, of each name and number of images: value, step.

    Only those by the protocol of the last are compared.
    """
    best = {}
    lasts = {(name, r["num_samples"]): r for r in results if (name := measure_of(r))}
    for (name, num), last in lasts.items():
        choose = min if name in DISTANCES else max
        found = choose((r for r in results if _kind(r) == _kind(last)), key=lambda r: r[name])
        best[f"{name}-{num}"] = {"value": found[name], "step": found["step"]}
    return best


def measure_of(result: dict[str, Any]) -> str | None:
    """Name the measure that a line has: fid, or fd of another network than Inception; or top1, of a recogniser."""
    return next((name for name in (*DISTANCES, "top1") if isinstance(result.get(name), int | float)), None)


def _kind(result: dict[str, Any]) -> tuple[Any, ...]:
    """Collect the parts of a result that have to be equal for its distance to be compared with another's."""
    return measure_of(result), *(result.get(k) for k in ("extractor", "protocol", "num_samples", "reference"))
