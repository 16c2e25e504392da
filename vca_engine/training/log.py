"""Log of a run: metrics.jsonl, a tracker, pictures of the loss, and the film of its previews."""

import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tqdm import tqdm

from vca_engine.files import write_text, written_aside
from vca_engine.images import NonFiniteError
from vca_engine.images.pictures import save_film
from vca_engine.records import read_lines

PROJECT = "vca-diffusion"  # of W&B and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise


class Log:
    """Metrics of a run, one JSON object a line, and in a tracker.

    Lines that a resumed run repeats go: those after `step`, and the `partial` one that ended a run which now goes on.

    A disk that is full stops nothing: what could not be written is said, and written later.

    Args:
        run_dir: The run's folder.
        step: Optimizer steps already done.
        goes_on: Whether there are more.
        trackers: Those of accelerate, started.
        ends: What is at the first time t and at the last one, see `plot_losses`.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        goes_on: bool = True,
        trackers: Sequence[GeneralTracker] = (),
        ends: tuple[str, str] = ("", ""),
    ) -> None:
        self.run_dir, self.file, self.ends = run_dir, run_dir / "metrics.jsonl", ends
        lines = [line for line in read_metrics(self.file) if line["step"] <= step]
        self.lines = [line for line in lines if not (goes_on and line.get("partial"))]
        self._rewrite()
        self.whole = True  # whether the file holds all lines
        self.trackers = trackers

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Write one line; `loss_by_t` may be a list, one value for each bin of t."""
        line = {"step": step, **values}
        self.lines.append(line)
        self.attempt("metrics.jsonl", self._append if self.whole else self._rewrite)
        bins = values.get("loss_by_t", [])
        by_t = {f"loss_by_t/{k / len(bins):g}-{(k + 1) / len(bins):g}": v for k, v in enumerate(bins)}
        self.add_scalars(step, {**values, **by_t})

    def add_scalars(self, step: int, values: dict[str, Any]) -> None:
        """Show those of the values that are numbers in the tracker."""
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        for tracker in self.trackers:
            self._track(tracker, tracker.log, numbers, step=step)

    def add_preview(self, step: int, image: np.ndarray) -> None:
        """Show a preview (H, W, 3) uint8 in the tracker, and make previews/progress.gif anew."""
        for tracker in self.trackers:
            self._track(tracker, show_image, tracker, image, step)
        self.attempt("progress.gif", save_film, self.run_dir / "previews")

    def plot(self) -> None:
        """Draw loss.png anew."""
        self.attempt("loss.png", plot_losses, self.lines, self.run_dir / "loss.png", self.ends)

    def attempt(self, what: str, write: Callable[..., Any], *args: Any) -> Exception | None:
        """Call `write(*args)`. If the disk does not take it, or images are not finite, warn; return that error."""
        try:
            write(*args)
        except (OSError, NonFiniteError) as error:
            self.warn(what, error)
            return error
        return None

    def warn(self, what: str, error: Exception | str) -> None:
        """Say that something could not be written, and that training goes on."""
        tqdm.write(f"warning: {what} could not be written, training goes on: {error}")

    def close(self) -> None:
        """Finish the trackers."""
        for tracker in self.trackers:
            self._track(tracker, tracker.finish)

    def _track(self, tracker: GeneralTracker, show: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Call `show`; after an error, whatever a tracker may raise, it is left out until the run is started again."""
        try:
            show(*args, **options)
        except Exception as error:
            first = str(error).partition("\n")[0] or type(error).__name__
            self.trackers = [other for other in self.trackers if other is not tracker]
            tqdm.write(f"warning: {tracker.name} shows no more of this run, whose metrics.jsonl has all of it: {first}")

    def _append(self) -> None:
        self.whole = False
        with open(self.file, "a", encoding="utf-8") as f:
            f.write(json.dumps(self.lines[-1]) + "\n")
        self.whole = True

    def _rewrite(self) -> None:
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.whole = True


def plot_losses(lines: Sequence[dict[str, Any]], file: Path, ends: tuple[str, str] = ("", "")) -> None:
    """Draw the logged means of the loss and their running mean; beside it, of a generator, that in each bin of t.

    Args:
        lines: Of metrics.jsonl.
        file: The picture to write, in the folder of the run.
        ends: What is at the first time t and at the last one, noise or data.

    Raises:
        OSError: It could not be written.
    """
    lines = [line for line in lines if _is_finite(line.get("loss"))]
    if not lines:
        return
    import matplotlib  # slow to import: see docs/architecture.md, start-up

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps, loss = np.array([line["step"] for line in lines]), np.array([line["loss"] for line in lines])
    window = 2 * (len(loss) // 40) + 1
    by_t = [row if isinstance(row := line.get("loss_by_t"), list) else [] for line in lines]
    num = max(map(len, by_t))
    if num:
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5))
        figure.subplots_adjust(left=0.06, right=0.87, bottom=0.12, top=0.92, wspace=0.16)
        table = np.full((len(lines), num), np.nan)
        for values, row in zip(table, by_t, strict=True):
            values[: len(row)] = [value if _is_finite(value) else np.nan for value in row]
        _plot_by_t(right, steps, table, window, ends)
    else:
        figure, left = plt.subplots(figsize=(7, 4.5), layout="constrained")
    style = {"color": "tab:blue", "marker": "." if len(loss) < 3 else None}
    left.plot(steps, loss, **style, alpha=0.35 if window > 1 else 1, linewidth=1, label="loss")
    if window > 1:
        left.plot(steps, smooth(loss, window), color="tab:blue", linewidth=2, label=f"running mean of {window}")
    low, high = np.quantile(loss, [0, 0.98])
    # Without the loss of the first steps, which would hide the rest.
    room = high - low or abs(high) or 1.0
    left.set_ylim(low - 0.05 * room, high + 0.15 * room)
    left.set_title(f"{file.resolve().parent.name}: training loss")
    for axes in figure.axes:
        axes.set(xlabel="optimizer step", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    left.legend(fontsize="small", loc="upper right")

    try:
        with written_aside(file) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    finally:
        plt.close(figure)


def _plot_by_t(axes: Any, steps: np.ndarray, table: np.ndarray, window: int, ends: tuple[str, str]) -> None:
    """Draw the running mean of a table (lines, bins) of losses, at steps (lines,), in each bin of t."""
    from matplotlib import colormaps, ticker

    num = table.shape[1]
    said = {0: ends[0], num - 1: ends[1]}
    for k, colour in enumerate(colormaps["viridis"](np.linspace(0, 0.95, num))):
        there = ~np.isnan(table[:, k])
        if there.any():
            label, marker = f"t {k / num:g} to {(k + 1) / num:g}", "." if there.sum() < 3 else None
            label += f": {said[k]}" if said.get(k) else ""
            line = {"color": colour, "linewidth": 1.5, "marker": marker, "label": label}
            axes.plot(steps[there], smooth(table[there, k], window), **line)
    low, high = axes.dataLim.intervaly
    if 0 < 5 * low <= high:  # then at least two of these ticks are in it
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(f"in ten parts of the range of t{f', running mean of {window}' if window > 1 else ''}")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _is_finite(value: Any) -> bool:
    """Say whether a value of a log, which others may have written, is a number that can be drawn."""
    return isinstance(value, int | float) and abs(value) < sys.float_info.max


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Take the running mean (N,) of values (N,), over fewer than `window`, an odd number, at the ends."""
    kernel, here = np.ones(window), slice(window // 2, window // 2 + len(values))
    return np.convolve(values, kernel)[here] / np.convolve(np.ones_like(values), kernel)[here]


def start_tracker(accelerator: Accelerator, kind: str, run_dir: Path, step: int, config: dict[str, Any]) -> None:
    """Begin, or go on with, the run in one of accelerate's trackers. All processes call this; the main one does it.

    Raises:
        OSError: The tracker cannot write.
    """
    name, file = run_dir.resolve().name, run_dir / ".tracker-id"
    if accelerator.is_main_process and not file.is_file():
        write_text(file, uuid.uuid4().hex[:8])
    key = f"{name}-{file.read_text()}" if accelerator.is_main_process else name
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": name, "id": key, "resume": "allow", "dir": str(run_dir), "config": config},
        "trackio": {"name": key, "resume": "allow", "config": config},
    }
    threading.excepthook = _say_in_a_line
    project = "tensorboard" if kind == "tensorboard" else os.environ.get(f"{kind.upper()}_PROJECT", PROJECT)
    try:
        accelerator.init_trackers(project, init_kwargs={kind: options[kind]})
    except OSError as error:
        raise OSError(
            f"train.tracker {kind!r} cannot write to {str(run_dir)!r}: {error.strerror or error}; make room, or choose "
            "--train.tracker none."
        ) from error


def _say_in_a_line(args: threading.ExceptHookArgs) -> None:
    """Say why a thread ended, as TensorBoard's do on a full disk; without a traceback if the system is why."""
    if isinstance(args.exc_value, OSError):
        tqdm.write(f"warning: {args.exc_value}")
    else:
        threading.__excepthook__(args)


def show_image(tracker: GeneralTracker, image: np.ndarray, step: int) -> None:
    """Show an image (H, W, 3) uint8 in a tracker, each of which wants it in another way."""
    if tracker.name == "trackio":
        import trackio  # only who asks for it has it

        tracker.log({"samples": trackio.Image(image)}, step=step)
    else:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": image[None]}, step=step, **layout)


def check_tracker(name: str) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    if name not in ("none", "tensorboard") and find_spec(name) is None:
        raise ValueError(f"train.tracker is {name!r}, which is not installed; run: pip install {name}")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl or fid.jsonl that are whole and name their step; [] if there is no file."""
    return [line for line in read_lines(file) if type(line.get("step")) is int]
