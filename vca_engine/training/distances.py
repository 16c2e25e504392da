"""Distances measured during a run: fid.jsonl, which is a line a measurement, and best.json and fid.png, made of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vca_engine.files import write_text

DISTANCES_FILE, BEST_FILE = "fid.jsonl", "best.json"


def show_distances(
    folder: Path, results: list[dict[str, Any]], plot_distance: Callable[..., None] | None = None
) -> None:
    """Write best.json and fid.png of a run.

    Args:
        folder: Of the run.
        results: The lines of fid.jsonl.
        plot_distance: (lines of fid.jsonl, file, title) -> None; draws their curve.
    """
    if best := best_of(results):
        write_text(folder / BEST_FILE, json.dumps(best, indent=2) + "\n")
    if results and plot_distance and distance_of(results[-1]):
        shown = [r for r in results if _kind(r) == _kind(results[-1])]
        plot_distance(shown, folder / "fid.png", f"{folder.resolve().name}, {results[-1]['protocol']}")


def best_of(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Find the least distance of each name and number of images, of those by the protocol of the last: value, step."""
    best = {}
    for last in results:
        if name := distance_of(last):
            least = min((r for r in results if _kind(r) == _kind(last)), key=lambda r: r[name])
            best[f"{name}-{last['num_samples']}"] = {"value": least[name], "step": least["step"]}
    return best


def distance_of(result: dict[str, Any]) -> str | None:
    """Name the distance that a line of fid.jsonl has: fid, or fd of another network than Inception."""
    return next((name for name in ("fid", "fd") if isinstance(result.get(name), int | float)), None)


def _kind(result: dict[str, Any]) -> tuple[Any, ...]:
    """Collect the parts of a result that have to be equal for its distance to be compared with another's."""
    return distance_of(result), *(result.get(k) for k in ("extractor", "protocol", "num_samples", "reference"))
