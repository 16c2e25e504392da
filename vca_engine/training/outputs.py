"""Files that a training run writes: checkpoints, snapshots, previews, distances or accuracies, and the log."""

import contextlib
import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from vca_engine import assemble
from vca_engine.config.schema import Config, save_yaml, to_dict
from vca_engine.distributed import gather
from vca_engine.files import hold, is_older, remove_temporary, write_text
from vca_engine.images import NonFiniteError, to_uint8
from vca_engine.images.loader import load
from vca_engine.images.pictures import grid, save_film, save_picture, sheet
from vca_engine.sampling.classes import evenly_spaced_classes, find_class, random_label
from vca_engine.sampling.guidance import guidance_options_in_words
from vca_engine.signals import StopSignal
from vca_engine.training.distances import BEST_FILE, DISTANCES_FILE, EVALUATIONS_FILE, best_of, show_distances
from vca_engine.training.log import Log, plot_losses, read_metrics, start_tracker
from vca_engine.training.resume import CONFIG_FILE, write_resumed_from
from vca_engine.training.run import Run
from vca_engine.weights import checkpoint
from vca_engine.weights.checkpoint import SNAPSHOTS, folder_of

DATA_FILE, NUM_SHOWN, COLUMNS = "data.png", 24, 8  # the picture of the first batch, of so many images of it


class Outputs:
    """Files of a run. The main process writes them; all processes call each method, for each has parts of the tensors.

    In the `with` block the run's folder is locked. A full disk is said, and stops training only at the last checkpoint.

    Args:
        run: The run.
        resume: What --resume said.
        evaluator: A `fid.Evaluator`, where the config measures a distance; a broken reference of it is found here.
        plot_distance: (lines of fid.jsonl, file, title) -> None; draws their curve.

    Attributes:
        main: True in the main process, which alone has a `log`.
    """

    def __init__(
        self,
        run: Run,
        resume: str = "auto",
        evaluator: Any = None,
        plot_distance: Callable[[list[dict[str, Any]], Path, str], None] | None = None,
    ) -> None:
        self.run, self.config, self.cfg, self.folder = run, run.config, run.cfg, run.folder
        self.resume, self.evaluator, self.plot_distance = resume, evaluator, plot_distance
        self.main = run.accelerator.is_main_process
        self.results_file = self.folder / (DISTANCES_FILE if run.is_generator else EVALUATIONS_FILE)
        rows = run.config.sample.classes or evenly_spaced_classes(range(run.num_classes))  # of the previews
        self.classes = [find_class(k, run.info.class_names) for k in rows]
        if evaluator:
            evaluator.prepare()
        self.log: Log | None = None  # there within the block
        self.results: list[dict[str, Any]] = []  # the lines of that file
        self.not_finite: set[str] = set()  # which of what was due could not be made of the weights
        self.lock: FileLock | None = None

    def __enter__(self) -> Self:
        """Take the run's folder, and say what begins."""
        run = self.run
        if self.main:
            self.lock = lock_folder(self.folder)
            save_yaml(self.config, self.folder / CONFIG_FILE)
            ends = assemble.ends_of_time(self.config)
            mend(self.folder, ends, self.plot_distance)
            self.results = read_metrics(self.results_file)
            if run.continues_another and self.resume != "auto":  # else it is noted already
                write_resumed_from(self.folder, self.resume, run.start)
        if self.cfg.tracker != "none":
            start_tracker(run.accelerator, self.cfg.tracker, self.folder, run.step, to_dict(self.config))
        if self.main:
            self.log = Log(self.folder, run.step, run.step < self.cfg.num_steps, run.accelerator.trackers, ends)
            print("\n".join([str(run), *run.messages]), flush=True)
            if not (run.step and (self.folder / DATA_FILE).exists()):
                self.log.attempt(DATA_FILE, _save_first_batch, run, self.folder / DATA_FILE)
        return self

    def __exit__(self, *error: object) -> None:
        """Close the log, and leave the folder to others."""
        if self.main:
            self.log.close()
        self.run.accelerator.trackers = []  # they are closed
        self.run.accelerator.end_training()
        if self.lock:
            self.lock.release()

    def report(self, since: float, steps: int) -> dict[str, Any]:
        """Write the line of this step, with the speed of so many steps since then (of `time.perf_counter`); return it.

        Raises:
            ValueError: Too many steps in a row had to be skipped; names the last checkpoint.
        """
        step = self.run.step
        partial = step % self.cfg.log_every > 0  # the last line, should the run end here for good
        values = self.run.meter.line(partial)
        rate = round(steps * self.cfg.batch_size / (time.perf_counter() - since), 2)  # the device is done, too
        before, most = values.pop("skipped_before"), values.pop("most_in_a_row")
        if not self.run.is_generator:
            del values["loss_by_t"]
        values |= {"partial": True} if partial else {}
        values |= {"lr": self.run.optimizer.param_groups[0]["lr"], "images": step * self.cfg.batch_size}
        values |= {"images_per_second": rate, "memory_gib": round(peak_memory(self.run.device) / 2**30, 3)}
        if self.main:
            self.log.add(step, values)
            if values["skipped"] > before:
                tqdm.write(
                    f"warning: {values['skipped'] - before} of the steps up to {step} skipped, since the loss or its "
                    "gradient was not finite"
                )
        if most >= self.cfg.max_skipped:
            raise ValueError(_too_many_skipped(most, step, self.cfg.max_skipped, checkpoint.steps(self.folder)))
        return values

    def save(self, last: bool = False) -> None:
        """Write the checkpoint of this step, and draw the loss.

        Raises:
            OSError: It is the last one, and cannot be written; another one may fail.
        """
        record = self.run.record() | {"skipped": [self.run.meter.skipped, self.run.meter.in_a_row]}
        parts = {name: gather(tensors, self.main) for name, tensors in self.run.tensors().items()}
        if self.main:
            try:
                checkpoint.save(folder_of(self.folder, self.run.step), self.run.step, parts, record)
            except OSError as error:
                if last:
                    raise
                self.log.warn("the checkpoint", error)
            else:
                self.log.attempt("what the removal of old checkpoints changes", self._prune)
            self.log.plot()
        self.run.accelerator.wait_for_everyone()

    def snapshot(self) -> None:
        """Write the power-function averages of this step."""
        averages = self.run.averaged_tensors()
        averages = {name: gather(tensors, self.main) for name, tensors in averages.items() if name != "ema"}
        if self.main and averages:
            record = self.run.record() | {"ema_stds": self.cfg.ema_stds}
            folder = folder_of(self.folder, self.run.step, SNAPSHOTS)
            self.log.attempt("the snapshot", checkpoint.save, folder, self.run.step, averages, record)

    def finish(self, due: list[str], stop: StopSignal) -> bool:
        """Write, draw and measure what is due at this step and not there yet. Return False if a signal stopped it."""
        missing = unfinished(self.config, self.run.step, due, self.run.accelerator)
        if "snapshot" in missing:
            self.snapshot()
        if "preview" in missing:
            self.preview()
        if "evaluation" in missing:
            return self.evaluate(stop)
        return self.measure(stop) if "fid" in missing else True

    def check_finished(self, due: list[str]) -> None:
        """Check that all that was due at the last step is there, if its images were finite. All processes call this.

        Raises:
            OSError: It is not, as a warning has said.
        """
        missing = unfinished(self.config, self.run.step, due, self.run.accelerator, self.not_finite)
        if missing:
            raise OSError(
                f"all {self.run.step:,} steps are done, but not the {' and the '.join(missing)} of the last; the "
                "warning says why. The same command makes up for it."
            )

    def preview(self) -> None:
        """Draw a grid with the averaged weights, a row a class."""
        with self.run.averaged_weights():
            if self.main:
                file = preview_file(self.folder, self.run.step)
                error = self.log.attempt(file.name, _save_preview, self.run, self.classes, file, self.log)
                self.not_finite |= {"preview"} if isinstance(error, NonFiniteError) else set()
        self.run.accelerator.wait_for_everyone()

    def measure(self, stop: StopSignal) -> bool:
        """Draw `fid.num` images with the averaged weights, as sample.py would, and measure them; no image is kept.

        Where images of any process are not finite, there is a warning in the place of a number. Return False if a
        signal stopped it.
        """
        run, num = self.run, self.config.fid.num
        with run.averaged_weights():
            stopped, failed = draw_into(self.evaluator, run, num, stop)
        if stopped:
            return False
        if failures := [text for text in gather_object([failed]) if text]:
            if self.main:
                self.log.warn(f"the FID of step {run.step}", failures[0])
                self.not_finite.add("fid")
            return True
        options = {"labels_mode": "random", "quantize": "dit", "step": run.step, "sample": describe_sample(run)}
        result = self.evaluator.compute(num, **options)
        if self.main:
            self._add_result(result.to_dict(), result.values, str(result))
        run.accelerator.wait_for_everyone()
        return True

    def evaluate(self, stop: StopSignal) -> bool:
        """Measure how often a recogniser's averaged weights are right. Return False if a signal stopped it."""
        with self.run.averaged_weights():
            counts = count_correct(self.run, stop)
        if counts is None:
            return False
        if self.main:
            result = accuracies(self.run, *counts.tolist())
            self._add_result(result, {name: result[name] for name in ("top1", "top5")})
        return True

    def _prune(self) -> None:
        """Remove old checkpoints, but for those of the best distances."""
        if self.cfg.keep_checkpoints:
            spare = {entry["step"] for entry in best_of(self.results).values()}
            checkpoint.prune(self.folder, self.cfg.keep_checkpoints, self.cfg.keep_every, spare)

    def _add_result(self, result: dict[str, Any], values: Mapping[str, Any], said: str = "") -> None:
        """Add a line, with its measures by name, to the results and to what shows them; print it as `said`."""
        self.results = [r for r in self.results if r["step"] < self.run.step] + [result]
        text = "".join(json.dumps(record) + "\n" for record in self.results)  # with those that a full disk refused
        self.log.attempt(self.results_file.name, write_text, self.results_file, text)
        self.log.add_scalars(self.run.step, {f"{name}-{result['num_samples']}": v for name, v in values.items()})
        self.log.attempt("best.json or fid.png", show_distances, self.folder, self.results, self.plot_distance)
        self.log.attempt("what the removal of old checkpoints changes", self._prune)  # of what was the best
        said = said or ", ".join(f"{name} {value:.2f} %" for name, value in values.items())
        tqdm.write(f"step {result['step']}, {result['num_samples']} images: {said}")


def mend(folder: Path, ends: tuple[str, str], plot_distance: Callable[..., None] | None = None) -> None:
    """Finish what a process that was killed had begun to write or to delete, as far as that takes no network.

    Args:
        folder: Of the run; nobody else is at work there.
        ends: What is at the first time t and at the last one, see `plot_losses`.
        plot_distance: See `Outputs`.
    """
    checkpoint.recover(folder)
    previews = folder / "previews"
    for place in (folder, previews):
        remove_temporary(place)
    try:
        if is_older(folder / "loss.png", folder / "metrics.jsonl"):
            plot_losses(read_metrics(folder / "metrics.jsonl"), folder / "loss.png", ends)
        if is_older(previews / "progress.gif", *previews.glob("step-*.png")):
            save_film(previews)
        distances, evaluations = folder / DISTANCES_FILE, folder / EVALUATIONS_FILE
        if is_older(folder / "fid.png", distances) or is_older(folder / BEST_FILE, distances):
            show_distances(folder, read_metrics(distances), plot_distance)
        if is_older(folder / BEST_FILE, evaluations):
            show_distances(folder, read_metrics(evaluations))
    except OSError as error:
        tqdm.write(f"warning: {error}")


def _save_first_batch(run: Run, file: Path) -> None:
    save_picture([draw_first_batch(run)], file)


def draw_first_batch(run: Run) -> np.ndarray:
    """Draw the first images that the next step sees, with their classes, as a picture (H, W, 3) uint8.

    They are as training reads them: cropped, mirrored, augmented, but not mixed; cached latents are decoded.
    """
    x, y, _ = run.first_images(NUM_SHOWN)
    if run.config.latents:
        x = torch.cat([run.codec.decode(z) for z in x[:, : run.codec.channels].float().split(4)])  # (B, C, H, W)
    if not run.is_generator:
        x = run.views.to_pixels(x)
    names = [run.info.class_names[k] for k in y.tolist()]
    cells = list(zip(to_uint8(x), names, strict=True))
    lines = [cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)]
    what = "decoded latents" if run.config.latents else "images"
    flips = ", half of them mirrored" if run.data.flip else ""
    title = f"{what} that step {run.step + 1:,} trains on: {len(cells)} of {run.cfg.batch_size:,}{flips}"
    return sheet(lines, title, apart=False)


def _save_preview(run: Run, classes: list[int], file: Path, log: Log) -> None:
    picture = draw_preview(run, classes)
    save_picture([picture], file)
    log.add_preview(run.step, picture)


def draw_preview(run: Run, classes: list[int]) -> np.ndarray:
    """Draw a grid of images, a row a class, with the weights that the sampler has now, as a picture (H, W, 3) uint8."""
    s = run.config.sample
    images = run.image_sampler.all([k for k in classes for _ in range(s.per_class)], s.group_size)
    images = images.reshape(len(classes), s.per_class, *images.shape[1:])  # (rows, columns, H, W, 3)
    names = [run.info.class_names[k] for k in classes]
    guidance = guidance_options_in_words(s) if s.cfg_scale != 1.0 else []
    return grid(images, names, title=", ".join([f"step {run.step}, cfg {s.cfg_scale:g}", *guidance]))


def draw_into(evaluator: Any, run: Run, num: int, stop: StopSignal) -> tuple[bool, str | None]:
    """Draw the images that sample.py would, with the weights that the sampler has now, into an evaluator.

    Args:
        evaluator: A `fid.Evaluator`; it begins anew, and gets this process's share.
        run: The run.
        num: Images of all processes.
        stop: A signal ends it early.

    Returns:
        Whether a signal stopped it; and why this process's images are not finite, if they are not.
    """
    s, rank, world = run.config.sample, run.accelerator.process_index, run.accelerator.num_processes
    label = functools.partial(random_label, s.seed, num_classes=run.num_classes)
    evaluator.reset()
    run.image_sampler.evaluations = run.image_sampler.drawn = 0
    failed = None
    for first in range(0, num, world * s.group_size):
        if stop.share():
            return True, failed
        group = first // s.group_size + rank
        index = range(group * s.group_size, min((group + 1) * s.group_size, num))
        if index and not failed:
            try:
                images = run.image_sampler.group(group, s.group_size, label, range(len(index)))
            except NonFiniteError as error:  # the other processes do not know of it, and go on
                failed = str(error)
                continue
            evaluator.update(torch.from_numpy(images), index, [label(i) for i in index])
    return False, failed


def describe_sample(run: Run) -> dict[str, Any]:
    """Say what the images that a run measures are, as sample.py does: JSON values."""
    return {
        "weights": {"part": "ema", "step": run.step},
        **assemble.describe_sampling(run.config),
        "codec": run.codec.identity,
        **{"labels": "random", "classes": "all", "num": run.config.fid.num, "nfe": run.image_sampler.nfe},
        **{"precision": "no", "tf32": run.cfg.tf32 and run.device.type == "cuda"},
    }


def accuracies(run: Run, first: int, first_five: int, num: int) -> dict[str, Any]:
    """Make a line of eval.jsonl from the counts of `count_correct`."""
    options = run.config.eval
    return {
        "step": run.step,
        **{"top1": round(100 * first / num, 4), "top5": round(100 * first_five / num, 4), "num_samples": num},
        "weights": "ema",
        "reference": {key: value for key, value in options.data.items() if key != "images"},
        "protocol": f"crop {options.crop:g}, bicubic",
    }


@torch.no_grad()
def count_correct(run: Run, stop: StopSignal) -> Tensor | None:
    """Count images of all processes by what the averaged weights, which the network has now, say of them.

    Args:
        run: Of a recogniser.
        stop: A signal ends it early.

    Returns:
        (3,): those whose class is the first, is among the first five, and all; None if a signal stopped it.
    """
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    num, size = len(run.evaluated_data), run.cfg.batch_size // run.cfg.accumulate // world
    batches = [range(first, min(first + size, num)) for first in range(rank * size, num, world * size)]
    views = run.process.evaluation_views(run.evaluated_data, run.config.eval.crop)
    options = {"num_workers": run.cfg.workers(), "minutes": run.cfg.timeout, "pin": run.device.type == "cuda"}
    counts = torch.zeros(3, dtype=torch.int64, device=run.device)
    with contextlib.closing(load(views, batches, **options)) as loaded:
        for _ in range(0, num, world * size):
            if stop.share():
                return None
            if batch := next(loaded, None):  # the last round may be of fewer processes
                x, y = (z.to(run.device, non_blocking=True) for z in batch)
                counts += run.process.count_correct(run.averaged_network(x).float(), y)
    return run.accelerator.reduce(counts, reduction="sum")


def lock_folder(folder: Path) -> FileLock | None:
    """Make a run's folder, and keep other programs out of it: two would take turns to ruin it.

    Returns:
        The lock, taken; None on a file system without locks.

    Raises:
        ValueError: Another program is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot make the folder run_dir {str(folder)!r}: {error.strerror or error}; choose another --run_dir."
        ) from error
    return hold(folder / ".lock", f"another train.py is at work in run_dir {str(folder)!r}; wait for it, or stop it.")


def _too_many_skipped(num: int, step: int, max_skipped: int, checkpoints: list[Path]) -> str:
    """Say that so many steps in a row were not finite, and how to go on."""
    where, init = "there is no checkpoint yet", ""
    if checkpoints:
        where = f"the last checkpoint, {checkpoints[-1]}, is good"
        init = f"; it can start from --init {checkpoints[-1]}"
    return (
        f"the loss or its gradient was not finite in {num} steps in a row, up to step {step} (train.max_skipped "
        f"{max_skipped}); {where}. A new run with a lower train.lr, train.max_grad_norm 1.0 or train.precision no may "
        f"help{init}."
    )


def unfinished(
    config: Config, step: int, due: list[str], accelerator: Accelerator, but: Collection[str] = ()
) -> list[str]:
    """List what of `due` at `step` the main process does not find. All processes call this.

    Args:
        config: Of the run.
        step: Optimizer steps done.
        due: Of `snapshot`, `preview`, `fid` and `evaluation`.
        accelerator: The processes.
        but: Those of `due` not to look for, in the main process.
    """
    if not due:
        return []
    if accelerator.is_main_process:
        folder = Path(config.run_dir)
        lines = read_metrics(folder / DISTANCES_FILE)
        evaluated = [line["step"] for line in read_metrics(folder / EVALUATIONS_FILE)]
        done = {
            "snapshot": (folder_of(folder, step, SNAPSHOTS) / checkpoint.RECORD).is_file(),
            "preview": preview_file(folder, step).exists(),
            "evaluation": step in evaluated,
            "fid": any((line["step"], line.get("num_samples")) == (step, config.fid.num) for line in lines),
        }
        due = [name for name in due if not (done[name] or name in but)]
    return broadcast_object_list([due])[0]


def preview_file(folder: Path, step: int) -> Path:
    """Name the preview of a step."""
    return folder / "previews" / f"step-{step:08d}.png"


def peak_memory(device: torch.device) -> int:
    """Count the bytes that this process has had at most: on the GPU, or in the computer's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
