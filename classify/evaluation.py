"""How often a recogniser is right: of each image the five best classes, and what follows from them."""

import contextlib
import csv
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from classify.recogniser import Recogniser
from vca_engine.files import write_text
from vca_engine.images.datasets import ImageDataset
from vca_engine.images.loader import load


@dataclass
class Evaluation:
    """The answers of a recogniser to images with known classes.

    Args:
        class_names: Of the K classes.
        labels: (N,) int64.
        best: (N, 5) int64, the best classes of each image, the best first, fewer of fewer classes; -1 where the
            network's output is not finite.
        probabilities: (N,) float32, of the first of them.
        images_per_second: Of the network alone, all processes together, in whole batches without the first of each,
            where there are others: the first warms up, and one of another size may be compiled anew.
    """

    class_names: list[str]
    labels: np.ndarray
    best: np.ndarray
    probabilities: np.ndarray
    images_per_second: float

    @property
    def right(self) -> np.ndarray:
        """Say of each image whether its class is the first, and whether it is among the first five: (N, 2) bool."""
        right = self.best == self.labels[:, None]
        return np.stack([right[:, 0], right.any(axis=1)], axis=1)

    def accuracies(self) -> dict[str, Any]:
        """Give top-1 and top-5 in percent, top-1's standard error, and the mean of the classes' own top-1.

        The standard error is that of a share of N images, 100 sqrt(p (1 - p) / N): other images of the same kind.
        """
        num, (first, five) = len(self.labels), self.right.mean(axis=0)
        images, right = np.bincount(self.labels), np.bincount(self.labels, weights=self.right[:, 0])  # of each class
        return {
            "top1": round(100 * float(first), 4),
            "top5": round(100 * float(five), 4),
            "top1_se": round(100 * float(np.sqrt(first * (1 - first) / num)), 4),
            "mean_class_top1": round(100 * float((right[images > 0] / images[images > 0]).mean()), 4),
            "num_samples": num,
            "not_finite": int((self.best[:, 0] < 0).sum()),
        }

    def confusion(self) -> np.ndarray:
        """Count images of class i that are taken for class j, (K, K) int64; those of no finite output are in none."""
        num = len(self.class_names)
        found = np.zeros((num, num), dtype=np.int64)
        finite = self.best[:, 0] >= 0
        np.add.at(found, (self.labels[finite], self.best[finite, 0]), 1)
        return found

    def classes(self) -> list[dict[str, Any]]:
        """Give a row for each class: name, images, top-1 and top-5 in percent, and what it is most often taken for."""
        num = len(self.class_names)
        images = np.bincount(self.labels, minlength=num)
        first, five = (np.bincount(self.labels, weights=right, minlength=num) for right in self.right.T)
        wrong = self.confusion()
        np.fill_diagonal(wrong, 0)
        rows = []
        for k, name in enumerate(self.class_names):
            other, share = int(wrong[k].argmax()), 100 / max(1, images[k])
            rows.append(
                {
                    "class": name,
                    "images": int(images[k]),
                    "top1": round(share * first[k], 2) if images[k] else None,
                    "top5": round(share * five[k], 2) if images[k] else None,
                    "taken_for": self.class_names[other] if wrong[k, other] else None,
                    "so_often": int(wrong[k, other]) or None,
                }
            )
        return rows


def evaluate(
    recogniser: Recogniser,
    data: ImageDataset,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    state: PartialState | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate all images of a dataset, whose labels are those of the recogniser. All processes call this, and share.

    Args:
        recogniser: Of `Recogniser.from_pretrained`.
        data: As `vca_engine.assemble.images_to_evaluate` opens it.
        batch_size: Images that go through the network together, on each process.
        num_workers: Processes that read images, for each process.
        state: The processes; not given means this one alone.
        progress: Show a bar.
    """
    rank, world = (state.process_index, state.num_processes) if state else (0, 1)
    indices = range(rank, len(data), world)
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    device, found, seconds = recogniser.device, [], []
    options = {"num_workers": num_workers, "minutes": 30, "pin": device.type == "cuda"}
    loaded = load(recogniser.views(data), batches, **options)
    bar = tqdm(total=len(data), desc="eval", unit="image", disable=not progress)
    with bar, contextlib.closing(loaded):
        for x, y in loaded:
            x = x.to(device)
            started = _now(device)
            logits = recogniser.logits(x)
            seconds.append((_now(device) - started, len(y)))
            best = recogniser.process.best_classes(logits)  # (B, 5)
            found.append((y.numpy(), best.cpu().numpy(), logits.softmax(dim=1).amax(dim=1).cpu().numpy()))
            bar.update(min(len(y) * world, len(data) - bar.n))
    timed = [batch for batch in seconds[1:] if batch[1] == batch_size] or seconds[1:] or seconds
    rate = sum(num for _, num in timed) / sum(time for time, _ in timed) if timed else 0.0
    parts = [(indices, *(np.concatenate(z) for z in zip(*found, strict=True)))] if found else []
    if world > 1:
        parts, rate = gather_object(parts), sum(gather_object([rate]))
    order = np.concatenate([part[0] for part in parts]).argsort()
    labels, best, probabilities = (np.concatenate([part[k] for part in parts])[order] for k in (1, 2, 3))
    return Evaluation(recogniser.class_names, labels, best, probabilities, rate)


def write_tables(evaluation: Evaluation, data: ImageDataset, folder: Path) -> None:
    """Write classes.csv, a row for each class, and predictions.csv, a row for each image."""
    names = evaluation.class_names
    _write_csv(folder / "classes.csv", evaluation.classes())
    _write_csv(
        folder / "predictions.csv",
        [
            {
                "image": data.name(i),
                "class": names[label],
                "taken_for": names[best[0]] if best[0] >= 0 else None,
                "probability": f"{probability:.4f}",
                "top5": " | ".join(names[k] for k in best if k >= 0),
            }
            for i, (label, best, probability) in enumerate(
                zip(evaluation.labels, evaluation.best, evaluation.probabilities, strict=True)
            )
        ],
    )


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def _now(device: torch.device) -> float:
    """Give the seconds of a clock, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
