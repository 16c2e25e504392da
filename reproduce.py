"""Reproduce the tables of the VCA paper: train and measure each row, and write it beside its published value.

    python reproduce.py --list                                    all rows: cost, published value, ours
    python reproduce.py fid --data.images DIR/train --fid.reference VIRTUAL_imagenet256_labeled.npz
    python reproduce.py recognition --data.images DIR/train --eval.data.images DIR/val --rows [deit_tiny_vca]
    python reproduce.py fid --estimate --tflops 400 --utilisation 0.4 --price 2     GPU-hours, disk, money
    python reproduce.py fid --data.images ... --fid.reference ... --submit          one SLURM job a row
    python reproduce.py ablation-stages --scale tiny              the same commands in minutes, on packaged digits
    python reproduce.py study --list                              the study of docs/study.md, python -m benchmarks.study

Each step of a row is a command that you can also type. It is printed, and its output goes to a file in the folder of
the row. Finished steps are not done again, so the same command goes on where it stopped. If a row fails, the others go
on. configs/paper.yaml has the rows.
"""

import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from vca import create, lookup
from vca_engine import assemble
from vca_engine.config.cli import ROOT, parse, report_errors
from vca_engine.config.paper import TINY, PaperRow, find_row, read_tables
from vca_engine.config.reading import FilePath, Spec, Strict
from vca_engine.config.schema import Config
from vca_engine.files import hold, write_text, written_aside
from vca_engine.images.datasets import DATASETS
from vca_engine.signals import STOPPED, run_logged
from vca_engine.training.cost import IMAGES_OF_FID, cost_of, estimate, flops_of_training, network_of
from vca_engine.training.distances import EVALUATIONS_FILE
from vca_engine.training.results import (
    NOT_YET,
    Measured,
    check_run,
    check_same_settings,
    list_rows,
    measured,
    plot_curves,
    write_table,
)

REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}  # by the side of the images
Positive = Annotated[float, Field(gt=0, le=1e9)]


@dataclass(frozen=True)
class EvaluationImages(Strict):
    """Images to evaluate recognisers on.

    Args:
        data: Images to evaluate on, --eval.data.images DIR.
    """

    data: Spec | None = None


@dataclass(frozen=True)
class ReferenceFiles(Strict):
    """Files that measure the images of generators.

    Args:
        reference: Statistics or images to compare with, e.g. VIRTUAL_imagenet256_labeled.npz of ADM.
        weights: File with Inception's weights; by default the one that python -m fid finds by itself.
    """

    reference: FilePath | None = None
    weights: FilePath | None = None


@dataclass(frozen=True, kw_only=True)
class ReproduceArguments(Strict):
    """A table to reproduce.

    Args:
        table: Name of the table: fid, fid-large, fid-512, recognition, ablation-stages or ablation-streams. May stand
            first, without --table.
        rows: Rows of the table to do, e.g. [dit_s2_vca,dit_s2_mhsa]; by default all.
        scale: paper; or tiny, which does the same with small networks and a few steps on digits from packages.
        data: Images to train on, --data.images DIR.
        eval: Images to evaluate recognisers on.
        fid: Files that measure the images of generators.
        settings: YAML file of more settings for train.py and cache_latents.py, such as train.accumulate or codec.path;
            settings that change the numbers are refused.
        latents: Beginning of the name of each folder of latents; all rows of an image size share one folder.
        out: Folder for the tables; by default results, or runs/tiny for --scale tiny.
        launcher: Command that starts the programs, e.g. "accelerate launch".
        estimate: Print the GPU-hours, the disk and the money that the rows take, and do nothing.
        images_per_second: Speed of training on one GPU, measured with the first row, for --estimate; the speeds of the
            other rows follow by their multiply-adds.
        tflops: Peak speed of the GPU, in 10^12 operations per second, if images_per_second is not given; the default is
            that of an H100 in bf16.
        utilisation: Share of tflops that training reaches.
        price: Price of a GPU-hour, for --estimate.
        submit: Write a script for SLURM with a job for each row, and give it to sbatch if there is one.
        list: List the rows, and do nothing.
    """

    table: str | None = None
    rows: list[str] | None = None
    scale: Literal["paper", "tiny"] = "paper"
    data: Spec | None = None
    eval: EvaluationImages = field(default_factory=EvaluationImages)
    fid: ReferenceFiles = field(default_factory=ReferenceFiles)
    settings: FilePath | None = None
    latents: FilePath = "runs/latents"
    out: FilePath | None = None
    launcher: str = "python"
    estimate: bool = False
    images_per_second: Positive | None = None
    tflops: Positive = 989.0
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.3
    price: Positive | None = None
    submit: bool = False
    list: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale == "tiny" and (self.data or self.eval.data or self.fid.reference or self.fid.weights):
            raise ValueError("--scale tiny has images and a reference of its own; leave --data, --eval and --fid out.")
        if self.scale == "tiny" and self.estimate:
            raise ValueError("--estimate is for the paper's scale; leave --scale tiny out.")
        for name in ("price", "images_per_second"):
            if getattr(self, name) and not self.estimate:
                raise ValueError(f"--{name} is for --estimate; add that, or leave it out.")


@dataclass(frozen=True)
class Plan:
    """A row with its settings and commands.

    Args:
        row: The row.
        config: The settings of the row, with those of the user.
        file: File that gets the number of the row.
        num: Number of drawn images that are measured; None for a recogniser.
        steps: Name of a step -> its command, and whether it is done.
    """

    row: PaperRow
    config: Config
    file: Path
    num: int | None
    steps: dict[str, tuple[list[str], bool]]


@report_errors("reproduce.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    words = list(sys.argv[1:] if argv is None else map(str, argv))
    if words[:1] == ["study"]:
        raise SystemExit(subprocess.run([sys.executable, "-m", "benchmarks.study", *words[1:]], cwd=ROOT).returncode)
    args = parse(ReproduceArguments, words, prog="reproduce.py", description=__doc__, first="table")
    rows = chosen_rows(args)
    if args.list:
        configs = {row: config_of("--config", row.name) for row in rows}
        for line in list_rows(configs, results(rows, args)):
            print(line, flush=True)
    elif args.estimate:
        print_estimate(rows, args)
    elif args.submit:
        check_places(rows, args)
        submit(rows, args, words)
    else:
        check_places(rows, args)
        if args.scale == "tiny":  # matrices this small gain nothing from a second thread
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            rows = [row for row in rows if args.rows or fits(row)]
        if failed := run_rows(rows, args):
            raise SystemExit(f"reproduce.py: not done: {', '.join(failed)}; the same command tries again.")


def chosen_rows(args: ReproduceArguments, *, whole: bool = False) -> list[PaperRow]:
    """List the rows of the table that the user wants, or all rows of the table.

    Raises:
        ValueError: There is no such table or row; names the nearest.
    """
    tables = read_tables()
    if args.table is None and not args.list:
        raise ValueError(f"no table is named; choose one of {sorted(tables)}, e.g. python reproduce.py fid --estimate.")
    rows = lookup(tables, args.table, "table") if args.table else {n: r for t in tables.values() for n, r in t.items()}
    names = [lookup(rows, name, "a row").name for name in (not whole and args.rows) or rows]
    return [find_row(name + TINY * (args.scale == "tiny")) for name in names]


def fits(row: PaperRow) -> bool:
    """Say whether the network of a row fits the size of its images, which tiny ones may not; if not, print why."""
    try:
        network_of(config_of("--config", row.name))
    except ValueError as error:
        print(f"{row.name}: left out: {error}", flush=True)
        return False
    return True


def words_of(row: PaperRow, args: ReproduceArguments) -> list[str]:
    """Give the options that pass the settings of a row to train.py and cache_latents.py."""
    words = ["--config", row.name] + (["--config", args.settings] if args.settings else [])
    given = {"data": args.data} | ({"eval.data": args.eval.data} if row.measure == "top-1" else {})
    return words + [word for k, spec in given.items() for o, v in (spec or {}).items() for word in (f"--{k}.{o}", v)]


def config_of(*words: str) -> Config:
    """Read settings from the words of a command line."""
    return parse(Config, words, prog="reproduce.py", description="", parts=assemble.parts())


def check_places(rows: Sequence[PaperRow], args: ReproduceArguments) -> None:
    """Check before the first step that images and reference exist.

    Raises:
        ValueError: They do not exist; says what to type.
    """
    for row in rows if args.scale == "paper" else ():
        config = config_of(*words_of(row, args))
        needed = {"--data.images": config.data.get("images")}
        if row.measure == "top-1":
            needed["--eval.data.images"] = (config.eval.data or {}).get("images")
        elif args.fid.reference is None or not Path(args.fid.reference).exists():
            given = "is not given" if args.fid.reference is None else f"{args.fid.reference!r} is not there"
            name = REFERENCES[int(config.data["image_size"])]
            raise ValueError(f"the reference of the FID {given}; type --fid.reference {name}, a file of ADM.")
        for option, place in needed.items():
            if not (place and Path(place).exists()):
                raise ValueError(
                    f"the images of ImageNet, {place!r}, are not there; type {option} DIR. A trial without "
                    f"them: python reproduce.py {args.table} --scale tiny."
                )


def plan_of(row: PaperRow, args: ReproduceArguments) -> Plan:
    """Find the settings of a row, and list its commands.

    Raises:
        ValueError: The user's settings change the numbers of the row, or its run was made with other settings.
    """
    words, launch = words_of(row, args), shlex.split(args.launcher)
    own, config = config_of("--config", row.name), config_of(*words)
    check_same_settings(own, config, repr(args.settings or shlex.join(words)))
    if config.run_dir != own.run_dir:
        raise ValueError(f"{args.settings!r} has run_dir {config.run_dir!r}; each row has its own, {own.run_dir!r}.")
    if args.scale == "tiny":
        network_of(config)  # raises ValueError if it does not fit such small images
    step, folder = check_run(config), Path(config.run_dir)
    if row.measure == "top-1":
        file = folder / EVALUATIONS_FILE
        steps = {"train": ([*launch, "train.py", *words], measured(config, file) is not None)}
        return Plan(row, config, file, None, steps)
    steps, num, reference = {}, IMAGES_OF_FID, args.fid.reference
    if args.scale == "tiny":
        num, reference, weights = config.fid.num, config.fid.reference, config.fid.weights
        command = ["python", "-m", "demo.classifier", "--data.name", config.data["name"], "--out", weights]
        steps["classifier"] = command, Path(weights).exists()
    if config.latents is None:
        words += ["--latents", f"{args.latents}_{config.data['image_size']}"]
    file, draw = folder / f"fid-{num}.json", ["sample.py", config.run_dir, "--num", str(num), "--fid", reference]
    draw += ["--fid_weights", args.fid.weights] if args.fid.weights else []
    steps["latents"] = [*launch, "cache_latents.py", *words], Path(config_of(*words).latents).exists()
    steps["train"] = [*launch, "train.py", *words], step >= config.train.num_steps
    steps["sample"] = [*launch, *draw, "--out", str(file)], measured(config, file, num) is not None
    return Plan(row, config, file, num, steps)


def run_rows(rows: Sequence[PaperRow], args: ReproduceArguments) -> list[str]:
    """Do all rows, write the table after each, draw the curves at the end, and list the rows that failed."""
    failed = []
    for i, row in enumerate(rows):
        say = functools.partial(print, f"[{i + 1}/{len(rows)}] {row.name}:", flush=True)
        try:
            folder = config_of("--config", row.name).run_dir
            busy = f"another reproduce.py is at work in {folder!r}; it is left alone."
            with hold(Path(folder, ".reproduce.lock"), busy) or contextlib.nullcontext():
                run_row(plan_of(row, args), say)
        except (ValueError, OSError) as error:
            say(error)
            failed.append(row.name)
        write_results(args)
    draw_curves(args)
    return failed


def run_row(plan: Plan, say: Callable[..., None]) -> None:
    """Do the unfinished steps of a row; each is a program, whose output goes to a file in the folder of the row.

    Raises:
        ValueError: A program failed; says where its output is.
        SystemExit: A signal came; the exit code says that the same command goes on.
    """
    if plan.config.fid.reference and not Path(plan.config.fid.reference).exists():
        save_images(plan.config.data["name"], Path(plan.config.fid.reference))
    for name, (command, done) in plan.steps.items():
        if done:
            say(f"{name} was done before")
            continue
        log, began = Path(plan.config.run_dir, f"{name}.log"), time.monotonic()
        say(f"{name}, output in {log}\n$ {shlex.join(command)}")
        code = run_logged([sys.executable if word == "python" else word for word in command], log)
        if code == STOPPED:
            raise SystemExit(STOPPED)
        if code:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ValueError(f"{name} failed with exit code {code}: {said[-1] if said else ''} See {str(log)!r}.")
        say(f"{name} took {time.monotonic() - began:,.0f} s")
    found = measured(plan.config, plan.file, plan.num)
    if found is None:
        raise ValueError(f"all is done, but there is no number in {str(plan.file)!r}; see the logs beside it.")
    say(f"{found.name} {found.value:.2f}")


def save_images(name: str, file: Path) -> None:
    """Write the test images of a packaged data set as an array (N, H, W, 3) uint8, for a reference."""
    images = create(DATASETS, {"name": name, "split": "test"}, "data").images
    with written_aside(file) as temporary, temporary.open("wb") as opened:
        np.save(opened, images.repeat(3, axis=-1))


def results(rows: Sequence[PaperRow], args: ReproduceArguments) -> dict[PaperRow, Measured | str]:
    """Find the number of each row, or the reason why there is none; see `write_table`."""
    found = {}
    for row in rows:
        try:
            plan = plan_of(row, args)
            found[row] = measured(plan.config, plan.file, plan.num) or NOT_YET
        except (ValueError, OSError) as error:
            found[row] = str(error)
    return found


def folder_of_tables(args: ReproduceArguments) -> Path:
    """Give the folder for tables, curves and scripts."""
    return Path(args.out or ("runs/tiny" if args.scale == "tiny" else "results"))


def write_results(args: ReproduceArguments) -> None:
    """Write the whole table."""
    title, about = f"{args.table}: reproduced beside published", "Rows without a number were not run here."
    if args.scale == "tiny":
        title = f"{args.table} at a tiny scale: NOT the paper's numbers"
        about = "Small networks after a few steps on handwritten digits: they show that the commands work, no more."
    found = results(chosen_rows(args, whole=True), args)
    write_table(folder_of_tables(args) / f"{args.table}.md", title, about, found)


def draw_curves(args: ReproduceArguments) -> None:
    """Draw the curves of all rows of the table that were measured during training."""
    rows = chosen_rows(args, whole=True)
    plot_curves(
        folder_of_tables(args) / args.table, {row.name: Path(config_of("--config", row.name).run_dir) for row in rows}
    )


def print_estimate(rows: Sequence[PaperRow], args: ReproduceArguments) -> None:
    """Print the GPU-hours, the disk and the money that rows take, and the assumptions."""
    configs = {row.name: config_of("--config", row.name) for row in rows}
    speed, how = args.tflops * 1e12 * args.utilisation, f"{args.utilisation:.0%} of {args.tflops:g} TFLOP/s, assumed"
    if args.images_per_second:
        first, config = next(iter(configs.items()))
        per_image = flops_of_training(config, cost_of(config)) / config.train.num_steps / config.train.batch_size
        speed = args.images_per_second * per_image
        how = f"{args.images_per_second:g} images/s of one GPU in training of {first}; others by their multiply-adds"
    print(*estimate(configs, speed, args.price), f"Speed: {how}.", sep="\n")


def submit(rows: Sequence[PaperRow], args: ReproduceArguments, words: Sequence[str]) -> None:
    """Make a script for SLURM out of configs/slurm.sh, with a job for each row; give it to sbatch if there is one.

    Args:
        rows: The rows.
        args: The command line.
        words: The words of the command line, as typed.
    """
    head, rest = (ROOT / "configs" / "slurm.sh").read_text(encoding="utf-8").split("srun ", 1)
    command, tail = rest.split("code=$?", 1)
    command = re.sub(r"\\\n\s*", "", command).replace("python train.py", "python").rpartition(" train ")[0]
    options = [line for line in head.splitlines() if line[:2] != "# " and "--job-name" not in line]
    names = [row.name.removesuffix(TINY) for row in rows]
    again = shlex.join([*words, "--submit", "false"])
    lines = [
        options[0],
        "# A job a row, made by reproduce.py --submit of configs/slurm.sh; goes on by itself when its time is up.",
        f"#SBATCH --job-name={args.table}",
        f"#SBATCH --array=0-{len(names) - 1}",
        *options[1:],
        f"rows=({' '.join(names)})",
        f"launcher={shlex.quote(f'srun {command} python')}",
        f'python reproduce.py {again} --rows "[${{rows[SLURM_ARRAY_TASK_ID]}}]" --launcher "$launcher"',
    ]
    file = folder_of_tables(args) / f"{args.table}.sh"
    write_text(file, "\n".join(lines) + f"\ncode=$?{tail}")
    for row in rows:
        if row.measure == "FID-50K" and not (latents := plan_of(row, args).steps["latents"])[1]:
            print(f"First make the latents, once: {shlex.join(latents[0])}")
            break
    if shutil.which("sbatch"):
        subprocess.run(["sbatch", str(file)], check=True)
    else:
        print(f"wrote {file}: {len(names)} jobs; there is no sbatch here, so type where there is: sbatch {file}")


if __name__ == "__main__":
    main()
