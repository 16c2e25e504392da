r"""The study: what the gain of Visual-Contrast Attention is made of, on small images that packages ship.

    python -m benchmarks.study --list                       the stages, what is done, and the hours that are left
    python -m benchmarks.study --part 1/1                   all runs; interrupted, the same command goes on
    python -m benchmarks.study --part 2/4 --stages mnist-sit    a quarter of one stage, for one of four machines
    python -m benchmarks.study --table                      tables and sentences in docs/study.md, and docs/study.png

Each stage trains every arm with each learning rate on two seeds, takes the rate with the lowest mean loss on the tuning
images, and trains anew with it on five other seeds. Tuning and final images are two parts of the test split. A run is
one small file of results/study, with its settings and seconds. Copy the files of all machines there before --table, and
the classifiers and autoencoders that stand beside them before --part: distances in other features do not compare.
"""

import argparse
import contextlib
import functools
import itertools
import json
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

import cache_latents
import demo.classifier
import fid
import train
import train_vae
from benchmarks.comparisons import bootstrap_interval, write_report
from classify.recogniser import Recogniser
from demo.__main__ import VAE
from demo.score import nchw
from fid.training import accuracy
from vca import create
from vca_engine.config.cli import report_errors
from vca_engine.files import hold
from vca_engine.images.codecs import sample_posterior
from vca_engine.images.datasets import DATASETS, ImageDataset
from vca_engine.records import differences, listed, read_json, write_json
from vca_engine.sampling.pipeline import Pipeline
from vca_engine.signals import SIGNALS
from vca_engine.training.step import draws

ARMS: dict[str, dict[str, Any]] = {  # attention layers, all with a convolution but the first and the last two
    "mhsa": {"name": "mhsa"},
    "mhsa+conv": {"name": "mhsa", "dwc": True},
    "agent": {"name": "agent"},
    "linear": {"name": "linear"},
    "vca": {"name": "vca"},
    "vca-separate": {"name": "vca", "softmax": "separate"},
    "vca-std0.02": {"name": "vca", "embed_std": 0.02},
    "vca-separate-std0.02": {"name": "vca", "softmax": "separate", "embed_std": 0.02},
    "vca-stage1": {"name": "vca", "stages": ["differential", "plain"]},
    "vca-stage2": {"name": "vca", "stages": ["plain", "differential"]},
    "vca-plain": {"name": "vca", "stages": ["plain", "plain"]},
    "vca-embed": {"name": "vca", "positive": "embed", "negative": "embed"},
    "vca-pool": {"name": "vca", "positive": "pool", "negative": "pool"},
    "vca-noconv": {"name": "vca", "dwc": False},
    "differential": {"name": "differential"},
}
TUNING_SEEDS, SEEDS = (100, 101), range(20, 25)
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the times of training, at which the loss on held-out images is measured
NUM_DRAWN = {1.0: 400, 2.0: 100}  # images by the scale of guidance
RESULTS, WORK, REPORT = Path("results/study"), Path("runs/study"), Path("docs/study.md")
NEVER = "1000000"  # steps between outputs that no run needs


@dataclass(frozen=True)
class Stage:
    """A comparison of all arms on one data set.

    Attributes:
        config: File of settings.
        settings: More of them, as words of a command line.
        num_steps: Of training.
        rates: Learning rates to choose from; none takes those that `like` chose.
        like: Stage whose runs say how many steps each arm takes in the same CPU seconds; None is equal steps.
    """

    config: str
    settings: tuple[str, ...]
    num_steps: int
    rates: tuple[float, ...]
    like: str | None = None


SMALL = ("--model.hidden_size", "48", "--model.depth", "4", "--model.num_heads", "3", "--train.batch_size", "32")
PATCH1, PATCH2, PATCH4 = (("--model.patch_size", side) for side in "124")
ODE, DDPM = (("--sample.sampler.num_steps", num) for num in ("13", "25"))  # of the ODE points of time: 12 steps
LATENTS = ("--codec.path", f"{RESULTS}/mnist-vae", "--latents", f"{WORK}/mnist-latents")
PIXELS = ("--codec", "{name: pixels}", "--latents=")
RATES, RATES_MNIST, RATES_DEIT = (1e-2, 1.6e-2), (4e-3, 1e-2, 1.6e-2), (1.6e-3, 4e-3, 1e-2)
STAGES = {
    "digits-sit": Stage("configs/digits_sit.yaml", (*SMALL, *PATCH1, *ODE), 200, RATES),
    "digits-deit": Stage("configs/digits_deit.yaml", (*SMALL, *PATCH2), 300, RATES_DEIT),
    "digits-sit-seconds": Stage("configs/digits_sit.yaml", (*SMALL, *PATCH1, *ODE), 200, (), like="digits-sit"),
    "digits-dit": Stage("configs/digits_dit.yaml", (*SMALL, *PATCH1, *DDPM), 200, RATES),
    "mnist-sit": Stage("configs/mnist_sit.yaml", (*SMALL, *PATCH1, *ODE, *LATENTS), 600, RATES_MNIST),
    "mnist-dit": Stage("configs/mnist_dit.yaml", (*SMALL, *PATCH1, *DDPM, *LATENTS), 600, RATES_MNIST),
    "mnist-deit": Stage("configs/digits_deit.yaml", ("--data", "mnist", *SMALL, *PATCH4), 600, RATES_DEIT),
    "mnist-pixels-sit": Stage("configs/mnist_sit.yaml", (*SMALL, *PATCH2, *ODE, *PIXELS), 600, RATES_MNIST),
}


@dataclass(frozen=True)
class Training:
    """One training of the study, and its evaluation: of the tuning if `rate` is given, else with the chosen rate."""

    stage: str
    arm: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """Its file below results/study, without .json."""
        return f"{self.stage}/{self.arm}{f'-tuning-{self.rate:g}' if self.rate else ''}-seed-{self.seed}"


def all_trainings(stages: Sequence[str] = tuple(STAGES)) -> list[Training]:
    """List all trainings of some stages in their order: the tuning of a stage, then seed by seed all arms."""
    found = []
    for stage in stages:
        found += [Training(stage, arm, s, rate) for rate in STAGES[stage].rates for s in TUNING_SEEDS for arm in ARMS]
        found += [Training(stage, arm, seed) for seed in SEEDS for arm in ARMS]
    return found


def in_part(trainings: Sequence[Training], part: int, parts: int) -> list[Training]:
    """Choose those of part 1 ... parts. All trainings of an arm of a stage are in one, which so can tune by itself."""
    number = {unit: i for i, unit in enumerate(dict.fromkeys((one.stage, one.arm) for one in trainings))}
    return [one for one in trainings if number[one.stage, one.arm] % parts == part - 1]


class NotYetError(ValueError):
    """A training needs the result of another, which is not there."""


class Study:
    """The results that are there, and the way to further ones.

    Args:
        results: Folder of the results, the classifiers and the autoencoder.
        work: Folder for what a run needs while it lasts.
    """

    def __init__(self, results: Path = RESULTS, work: Path = WORK) -> None:
        self.results, self.work = results, work

    def file(self, one: Training) -> Path:
        """Name the file of a result."""
        return self.results / f"{one.name}.json"

    def read(self, one: Training) -> dict[str, Any] | None:
        """Read a result; None if it is not there.

        Raises:
            ValueError: It is damaged, or of other settings than those of today.
        """
        file = self.file(one)
        if not file.exists():
            return None
        found = read_json(file)
        if changed := differences(found["settings"], self.settings(one)):
            raise ValueError(f"{str(file)!r} is of other settings: {listed(changed)}; move it, and run the part again.")
        return found

    def rate_of(self, one: Training) -> float:
        """Choose the learning rate of an arm: that with the lowest mean loss on the tuning images.

        Raises:
            NotYetError: Its tuning is not done.
        """
        stage = STAGES[one.stage].like or one.stage
        losses = dict.fromkeys(STAGES[stage].rates, 0.0)
        for rate, seed in itertools.product(losses, TUNING_SEEDS):
            found = self.read(tuning := Training(stage, one.arm, seed, rate))
            if found is None:
                raise NotYetError(f"{one.name} needs {tuning.name}")
            losses[rate] += np.inf if found["failed"] else found["values"]["loss_tuning"]
        return min(losses, key=losses.get)

    def steps_of(self, one: Training) -> int:
        """Count the steps of a training: those of its stage, or as many as take the CPU seconds of mhsa.

        Raises:
            NotYetError: The runs whose seconds say it are not all there.
            ValueError: They were timed on different processors.
        """
        stage = STAGES[one.stage]
        if not stage.like:
            return stage.num_steps
        timed = {arm: [self.read(Training(stage.like, arm, seed)) for seed in SEEDS] for arm in ("mhsa", one.arm)}
        if any(found is None for runs in timed.values() for found in runs):
            raise NotYetError(f"{one.name} needs all seeds of {stage.like} with mhsa and with {one.arm}")
        if len(processors := {found["cpu"] for runs in timed.values() for found in runs}) > 1:
            raise ValueError(f"{one.name} takes its steps from seconds on {sorted(processors)}; time them on one.")
        median = {arm: np.median([found["seconds"]["train_cpu"] for found in runs]) for arm, runs in timed.items()}
        return round(stage.num_steps * median["mhsa"] / median[one.arm])

    def settings(self, one: Training) -> dict[str, Any]:
        """Collect the settings of a training, JSON values; errors as of `rate_of` and `steps_of`."""
        stage, rate = STAGES[one.stage], one.rate or self.rate_of(one)
        of_run = ["--train.lr", f"{rate:g}", "--train.num_steps", str(self.steps_of(one)), "--seed", str(one.seed)]
        of_run += ["--model.attention", json.dumps(ARMS[one.arm])]
        outputs = ["--train.ema_stds", "[]", "--train.tracker", "none", "--train.checkpoint_every", NEVER]
        of_kind = ["--sample.per_class", "1", "--train.sample_every", NEVER]
        if one.stage.endswith("deit"):
            of_kind = ["--eval.every", "null", "--eval.data", "null"]
        command = ["--config", stage.config, *stage.settings, *of_run, *outputs, *of_kind]
        return {"stage": one.stage, "arm": one.arm, "seed": one.seed, "rate": rate, "command": command}

    def do(self, one: Training) -> bool:
        """Train, evaluate and write the result, unless it is there or another process is at it; say whether it was done.

        Raises:
            NotYetError: It needs a result that is not there.
        """
        if self.read(one) is not None:
            return False
        settings, folder = self.settings(one), self.work / one.name
        try:
            lock = hold(folder.with_name(f"{folder.name}.lock"), "busy")
        except ValueError:
            print(f"{one.name}: another process is at it", flush=True)
            return False
        try:
            if self.file(one).exists():  # of a process that held the lock a moment ago
                return False
            self.prepare(one.stage)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed; begun anew, its seconds are right
            record = {"settings": settings, **self.train_and_measure(one, settings["command"], folder)}
            write_json(self.file(one), record)
        finally:
            if lock:
                lock.release()
        shutil.rmtree(folder)
        return True

    def train_and_measure(self, one: Training, command: Sequence[str], folder: Path) -> dict[str, Any]:
        """Train in this process, and evaluate: values, seconds, the processor, and why it failed, if it did."""
        started, cpu_started = time.perf_counter(), time.process_time()
        failed = call(train.main, [*command, "--run_dir", str(folder)], folder / "log.txt")
        trained, cpu = time.perf_counter(), time.process_time() - cpu_started
        measure = measure_recogniser if one.stage.endswith("deit") else self.measure_generator
        values = {} if failed else measure(one, folder)
        seconds = {"train": trained - started, "train_cpu": cpu, "evaluate": time.perf_counter() - trained}
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        about = {
            "cpu": model[1] if model else "unknown",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        return {"failed": failed, "values": values, "seconds": {k: round(v, 2) for k, v in seconds.items()}, **about}

    def prepare(self, name: str) -> None:
        """Make the classifier of a stage's data set, and its autoencoder and latents, if it needs them.

        Raises:
            ValueError: Another process makes them.
        """
        of_latents = ["--config", STAGES[name].config, *LATENTS]
        wanted = [] if name.endswith("deit") else [(self.classifier_file(name), demo.classifier, None)]
        if LATENTS[-1] in STAGES[name].settings:
            of_vae = ["--data.name", name.partition("-")[0], *VAE, "--out", LATENTS[1]]
            wanted += [(Path(LATENTS[1]) / "config.json", train_vae, of_vae)]
            wanted += [(Path(LATENTS[3]), cache_latents, of_latents)]
        missing = [one for one in wanted if not one[0].exists()]
        busy = f"another process prepares {name}; type the same command when it is done."
        lock = hold(self.work / "prepare.lock", busy) if missing else None
        for file, program, options in missing:
            print(f"making {file}", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            options = options or ["--data.name", name.partition("-")[0], "--out", str(file)]
            call(program.main, options, self.work / "prepare.txt")
        if lock:
            lock.release()

    def classifier_file(self, name: str) -> Path:
        """Name the file of the classifier of a stage's data set."""
        return self.results / f"{name.partition('-')[0]}-classifier.safetensors"

    def measure_generator(self, one: Training, folder: Path) -> dict[str, Any]:
        """Draw images with and without guidance, and measure them and the loss on held-out images."""
        pipe = Pipeline.from_pretrained(folder, device="cpu")
        classifier = fid.Classifier.load(self.classifier_file(one.stage))
        images, (tuning, final) = held_out(pipe.config.data)
        losses = losses_by_time(pipe, images, final)
        values = {
            "loss_tuning": float(np.mean([*losses_by_time(pipe, images, tuning).values()])),
            "loss": float(np.mean([*losses.values()])),
            "loss_by_t": losses,
        }
        if not one.rate:
            reference = features_of(classifier, demo.classifier.pixels(images)[final.start :])
            for scale, num in NUM_DRAWN.items():
                labels = [i % images.num_classes for i in range(num)]
                drawn = nchw(pipe(labels, guidance_scale=scale, seed=0, output_type="np", group_size=100).images)
                values[f"accuracy_cfg{scale:g}"] = 100 * accuracy(classifier, drawn, torch.tensor(labels))
                if scale == 1:
                    rows, distance = features_of(classifier, drawn), functools.partial(distance_to, reference)
                    values |= {"fd": distance(rows), "fd_interval": bootstrap_interval(distance, rows, seed=0)}
        parameters = sum(p.numel() for p in pipe.network.parameters())
        return {**values, "parameters": parameters, "classifier": classifier.name, "codec": pipe.codec.identity}


@torch.no_grad()
def measure_recogniser(one: Training, folder: Path) -> dict[str, Any]:
    """Measure a recogniser on held-out images: top-1 in percent, and cross-entropy."""
    recogniser = Recogniser.from_pretrained(folder, device="cpu", crop=1.0)
    images, (tuning, final) = held_out(recogniser.config.data)
    logits = recogniser.logits(torch.stack([recogniser.views(images)[i][0] for i in range(len(images))]))  # (N, K)
    y = torch.from_numpy(images.labels)
    losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")  # (N,)
    values = {
        "loss_tuning": losses[tuning.start : tuning.stop].mean().item(),
        "loss": losses[final.start :].mean().item(),
    }
    right = (logits.argmax(dim=1) == y)[final.start :].float().mean().item()
    return {**values, "top1": 100 * right, "parameters": sum(p.numel() for p in recogniser.network.parameters())}


def held_out(data: dict[str, Any]) -> tuple[ImageDataset, tuple[range, range]]:
    """Open the test split of a data set; two fifths of it choose learning rates, the rest is measured on."""
    images = create(DATASETS, {**data, "split": "test"}, "data")
    cut = 2 * len(images) // 5
    return images, (range(cut), range(cut, len(images)))


@torch.no_grad()
def losses_by_time(pipe: Pipeline, images: ImageDataset, indices: range) -> dict[str, float]:
    """Compute the mean loss of images at `QUANTILES` of the times of training, with noise that is that of the image.

    Returns:
        t / end time -> loss.
    """
    found: dict[str, float] = {}
    for batch in torch.tensor(indices).split(100):
        pairs = [images[i, False] for i in batch.tolist()]
        x, y = torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
        latents = sample_posterior(pipe.codec.moments(x), pipe.codec.channels, 0, batch)  # (B, C, h, w)
        noise, _ = draws(0, batch, latents.shape[1:])
        for u in QUANTILES:
            t = pipe.process.times(torch.full((len(x),), u, dtype=torch.float64))  # (B,)
            loss = pipe.process.loss(pipe.network, latents, y, t=t, noise=noise).sum().item() / len(indices)
            key = f"{(t[0] / pipe.process.end_time).item():.3f}"
            found[key] = found.get(key, 0.0) + loss
    return found


@torch.no_grad()
def features_of(classifier: fid.Classifier, images: Tensor) -> np.ndarray:
    """Compute features (N, 64) float64 of images (N, 3, H, W) uint8."""
    return torch.cat([classifier(x)["features"] for x in images.split(250)]).double().numpy()


def distance_to(reference: np.ndarray, rows: np.ndarray) -> float:
    """Compute the Frechet distance of features (N, D) to those of a reference (M, D)."""
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (reference, rows)]
    return fid.frechet_distance(*moments[0], *moments[1])


def call(program: Any, argv: Sequence[str], log: Path) -> str | None:
    """Run a program's main in this process, as in a new one, with what it prints in a file.

    Returns:
        The sentence with which a training ended whose loss was not finite; None if all went well.

    Raises:
        ValueError: The program refused; with its sentence.
        SystemExit: A signal ended it.
    """
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            program(argv)
        except SystemExit as end:
            if end.code != 2:
                raise
        else:
            return None
        finally:  # the program's own would let a signal pass that comes later
            for number, handler in handlers.items():
                signal.signal(number, handler)
    sentence = log.read_text().strip().splitlines()[-1]
    if "not finite" in sentence:
        return sentence
    raise ValueError(f"{sentence} (in {str(log)!r})")


def describe(study: Study) -> str:
    """Write a line for each stage: what is done, and the hours that are left by the mean of the measured seconds."""
    lines = [f"{'stage':<20}{'done':>10}{'s a tuning run':>16}{'s a final run':>15}{'hours left':>12}"]
    for stage in STAGES:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        left = {True: 0, False: 0}
        for one in all_trainings([stage]):
            file = study.file(one)
            left[bool(one.rate)] += not file.exists()
            if file.exists():
                known = read_json(file)["seconds"]
                seconds[bool(one.rate)].append(known["train"] + known["evaluate"])
        means = {kind: np.mean(values) if values else np.nan for kind, values in seconds.items()}
        hours = sum(num * means[kind] for kind, num in left.items() if num) / 3600
        done = f"{len(seconds[True]) + len(seconds[False])}/{len(all_trainings([stage]))}"
        lines.append(f"{stage:<20}{done:>10}{means[True]:>16.1f}{means[False]:>15.1f}{hours:>12.1f}")
    return "\n".join(lines)


def part_of(text: str) -> tuple[int, int]:
    """Read `k/n`, for argparse."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write k/n with k from 1 to n, e.g. 1/4")
    return int(found[1]), int(found[2])


@report_errors("python -m benchmarks.study")
def main(argv: Sequence[str] | None = None) -> None:
    """Do a part of the study, or show it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="show the stages, what is done, and the hours left")
    parser.add_argument("--part", type=part_of, help="k/n: do the k-th of n parts")
    parser.add_argument("--stages", default=",".join(STAGES), help="names with commas; not given means all, in order")
    parser.add_argument("--table", action="store_true", help=f"write {REPORT} and its figure from the results")
    args = parser.parse_args(argv)
    stages = args.stages.split(",")
    if unknown := [name for name in stages if name not in STAGES]:
        raise ValueError(f"--stages has {unknown[0]!r}; choose from {','.join(STAGES)}.")
    if not (args.list or args.part or args.table):
        parser.error("say what to do: --list, --part k/n or --table")
    study = Study()
    if args.list:
        print(describe(study))
    if args.part:
        torch.set_num_threads(1)
        for one in in_part(all_trainings(stages), *args.part):
            started = time.perf_counter()
            try:
                if study.do(one):
                    print(f"{one.name}: {time.perf_counter() - started:.1f} s", flush=True)
            except NotYetError as error:
                print(f"left out: {error}", flush=True)
    if args.table:
        finals = {name: [study.read(one) for one in all_trainings([name]) if one.rate is None] for name in STAGES}
        # A part of the seeds would have tests of its own, some of them by two seeds.
        write_report({name: runs if all(runs) else [] for name, runs in finals.items()}, REPORT)


if __name__ == "__main__":
    main()
