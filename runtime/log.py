"""What a run says of itself: metrics.jsonl, TensorBoard, loss.png."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch.utils.tensorboard import SummaryWriter

from runtime.files import write_text, written_aside

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Log:
    """Metrics of a run, one JSON object a line, also in TensorBoard. Lines after `step`, which a resumed run repeats, go.

    Args:
        run_dir: The run's folder.
        step: Optimizer steps already done.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self.file = run_dir / "metrics.jsonl"
        self.plot_file = run_dir / "loss.png"
        self.lines = [line for line in read_metrics(self.file) if line["step"] <= step]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.board = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        """Write one line."""
        line = {"step": step, **values}
        self.lines.append(line)
        with open(self.file, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        self.add_scalars(step, values)

    def add_scalars(self, step: int, values: dict[str, Any]) -> None:
        """Show those of the values that are numbers in TensorBoard."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, step)

    def add_image(self, step: int, image: np.ndarray) -> None:
        """Show an image (H, W, 3) uint8 in TensorBoard."""
        self.board.add_image("samples", image, step, dataformats="HWC")

    def plot(self) -> None:
        """Draw loss.png: the logged means, and their running mean."""
        self.board.flush()
        if not self.lines:
            return
        steps = np.array([line["step"] for line in self.lines])
        loss = np.array([line["loss"] for line in self.lines])
        window = 2 * (len(loss) // 40) + 1
        kernel = np.ones(window)
        smooth = np.convolve(loss, kernel, "same") / np.convolve(np.ones_like(loss), kernel, "same")
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.plot(steps, loss, color="tab:blue", alpha=0.35, linewidth=1, label="loss")
        axes.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"running mean of {window}")
        low, high = np.quantile(loss, [0, 0.98])
        # Without the loss of the first steps, which would hide the rest.
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low) + 1e-9)
        axes.set(xlabel="optimizer step", ylabel="training loss", title=f"{self.plot_file.parent.name}: training loss")
        axes.grid(alpha=0.3)
        axes.legend()
        with written_aside(self.plot_file) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
        plt.close(figure)

    def close(self) -> None:
        """Finish the TensorBoard file."""
        self.board.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that was cut off is dropped; [] if there is no file."""
    lines = []
    if file.is_file():
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
