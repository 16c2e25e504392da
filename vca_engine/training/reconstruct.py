"""Averages of any width, rebuilt after the training from snapshots.

    python -m vca_engine.training.reconstruct runs/sit_b2_vca --std 0.07       writes a checkpoint folder for sample.py
    python -m vca_engine.training.reconstruct runs/sit_b2_vca --std 0.07 --step 200000 --out runs/wide

A power-function average of relative width std at step t weighs the weights after step j by

    c_j = (j/t)^(gamma+1) - ((j-1)/t)^(gamma+1),   which is the recursion  w_ema <- beta w_ema + (1 - beta) w,
    beta_t = (1 - 1/t)^(gamma+1),   std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)),

and any other is a combination of snapshots, by least squares between these profiles, with coefficients that sum to 1.

Source: Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv:2312.02696, section
3 and appendix C (equations 121 to 127).
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vca_engine import assemble
from vca_engine.config.cli import report_errors
from vca_engine.files import typed_path
from vca_engine.training.ema import gamma_of, name_of
from vca_engine.weights import checkpoint

MAX_CELLS = 20_000  # of the axis of steps on which profiles are compared; up to so many steps it is exact

# Error of a profile above which the user is warned. Up to here the rebuilt average of random walks, of 60 to 400,000
# steps and 1 to 20 snapshots, was off by at most 7 % of the distance between the true average and the last weights. At
# an error of 5 % it was off by up to 18 %.
LARGE_ERROR = 0.03


def profile(step: int, gamma: float, edges: np.ndarray) -> np.ndarray:
    """Share the average at `step` among the cells between `edges` (K+1,), steps from 0: (K,), which sum to 1."""
    cumulative = (np.minimum(edges, step) / step) ** (gamma + 1)
    return np.diff(cumulative)


class Combination(NamedTuple):
    """Combination of snapshots to an average, and how near its profile is to the wanted one.

    Attributes:
        coefficients: (S,), which sum to 1.
        error: L2 distance between the combined profile and the wanted one, relative to the latter.
        std: The relative width that the combination has; None where the steps that it counts as negative outweigh the
            rest.
    """

    coefficients: np.ndarray
    error: float
    std: float | None


def solve(snapshots: Sequence[tuple[int, float]], step: int, std: float) -> Combination:
    """Combine snapshots to the average of width `std` at `step`.

    The least squares leave the sum of the coefficients free. It is 1 if the snapshots can express the profile; in
    general they are divided by it, so that weights that never change stay as they are.

    Args:
        snapshots: (step, width) of each.
        step: The step to average up to, at most that of the last snapshot.
        std: The width that is asked for.
    """
    last = max(step, *(at for at, _ in snapshots))
    kinks = [at for at, _ in snapshots] + [step]
    edges = np.unique(np.concatenate([np.linspace(0, last, min(last, MAX_CELLS) + 1).round(), kinks]))  # (K + 1,)
    shares = np.stack([profile(at, gamma_of(s), edges) for at, s in snapshots])  # (S, K)
    wanted = profile(step, gamma_of(std), edges)  # (K,)
    scale = np.diff(edges) ** -0.5  # a profile's L2 norm over steps: sum of (share / width)^2 width
    coefficients = np.linalg.lstsq((shares * scale).T, wanted * scale, rcond=None)[0]
    coefficients /= coefficients.sum()

    combined = coefficients @ shares  # (K,), sums to 1
    error = np.linalg.norm((combined - wanted) * scale) / np.linalg.norm(wanted * scale)
    middles = (edges[1:] + edges[:-1]) / 2 / step
    variance = combined @ (middles - combined @ middles) ** 2
    return Combination(coefficients, float(error), math.sqrt(variance) if variance > 0 else None)


@dataclass(frozen=True)
class Reconstruction:
    """Result of `reconstruct`.

    Attributes:
        folder: The checkpoint.
        step: The step that it ends at.
        num_snapshots: How many files were combined.
        stored: The widths of these.
        error: How far its profile is from the wanted one, and
        std: the width that it has; see `Combination`.
    """

    folder: Path
    step: int
    num_snapshots: int
    stored: list[float]
    error: float
    std: float | None


def reconstruct(run_dir: Path, std: float, step: int | None = None, out: Path | None = None) -> Reconstruction:
    """Rebuild the average of relative width `std` from the snapshots of a run, as a checkpoint folder with an `ema`.

    Args:
        run_dir: The run's folder.
        std: Relative width, e.g. 0.07.
        step: The snapshot to end at; the last if not given.
        out: Folder to write; RUN/reconstructed/step-STEP-std-STD if not given.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: It has no snapshots, or none of that step, or the width is none.
    """
    gamma_of(std)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run at {str(run_dir)!r}: there is no such folder.")
    folders = checkpoint.steps(run_dir, checkpoint.SNAPSHOTS)
    if not folders:
        raise ValueError(
            f"{str(run_dir)!r} has no snapshots of power-function averages; they are written every "
            "train.snapshot_every steps and at the end, unless train.ema_stds is []."
        )
    records = {int(f.name.removeprefix("step-")): checkpoint.read_record(f) for f in folders}
    step = max(records) if step is None else step
    if step not in records:
        raise ValueError(f"there is no snapshot of step {step}; there are those of {sorted(records)}.")
    files = [
        (at, width, folder / f"{name_of(width)}.safetensors")
        for (at, record), folder in zip(records.items(), folders, strict=True)
        for width in record["ema_stds"]
        if at <= step
    ]
    coefficients, error, found = solve([(at, width) for at, width, _ in files], step, std)
    tensors = dict(_combined([file for *_, file in files], coefficients))
    description = {"std": std, "snapshots": len(files), "profile_error": error, "profile_std": found}
    record = {**records[step], "ema": description}
    del record["format"], record["step"], record["id"], record["ema_stds"]
    folder = out or run_dir / "reconstructed" / f"step-{step:08d}-std-{std:g}"
    if folder.exists() and not (folder / checkpoint.RECORD).is_file():
        raise ValueError(f"{str(folder)!r} is there already and is no checkpoint; choose another --out.")
    checkpoint.save(folder, step, {"ema": tensors}, record)
    return Reconstruction(folder, step, len(files), sorted({width for _, width, _ in files}), error, found)


def _combined(files: Sequence[Path], coefficients: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """Yield name, weighted sum (...) of the files' tensors; what never changes, as a buffer, stays as it is."""
    try:
        opened = [safe_open(file, framework="pt") for file in files]
        for key in list(opened[-1].keys()):
            last, changes = opened[-1].get_tensor(key), False
            total = torch.zeros_like(last, dtype=torch.float64)
            for coefficient, file in zip(coefficients.tolist(), opened, strict=True):
                tensor = file.get_tensor(key)
                total += coefficient * tensor.double()
                changes = changes or not torch.equal(tensor, last)
            yield key, total.to(last.dtype) if changes else last
    except (OSError, SafetensorError) as error:
        raise ValueError(f"a snapshot is missing or damaged: {error}.") from None


@report_errors("python -m vca_engine.training.reconstruct")
def main(argv: Sequence[str] | None = None) -> None:
    """Rebuild an average, as the command line says."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m vca_engine.training.reconstruct", description=__doc__, formatter_class=form
    )
    parser.add_argument("run", type=typed_path, help="the run's folder")
    width = "relative width, e.g. 0.07: the share of the training that the average spans"
    parser.add_argument("--std", type=float, required=True, help=width)
    parser.add_argument("--step", type=int, help="the snapshot to end at; the last if not given")
    parser.add_argument(
        "--out", type=typed_path, help="folder to write; RUN/reconstructed/step-STEP-std-STD if not given"
    )
    args = parser.parse_args(argv)
    made = reconstruct(args.run, args.std, args.step, args.out)
    use = assemble.command_to_use(checkpoint.read_record(made.folder)["config"]["process"]["name"], made.folder)
    print(
        f"wrote {made.folder}: width {args.std:g} at step {made.step}, from {made.num_snapshots} snapshots, whose "
        f"profile is {made.error:.2%} from the wanted one. {use}"
    )
    if made.error > LARGE_ERROR:
        width = "subtracts more than it averages" if made.std is None else f"has width {made.std:.3g}"
        print(
            f"warning: the snapshots up to step {made.step} cannot express width {args.std:g}: what comes nearest "
            f"{width}, and its shares of the steps are off by {made.error:.0%}. Choose a width nearer to the stored "
            f"ones ({', '.join(f'{std:g}' for std in made.stored)}), or train with a smaller train.snapshot_every for "
            "more.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
