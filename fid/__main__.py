"""Numbers for sets of generated images, by a stated protocol.

    python -m fid eval SAMPLES --ref VIRTUAL_imagenet256_labeled.npz    FID, sFID, IS, precision, recall of ADM's tables
    python -m fid stats IMAGES --out ref.npz --crop 256                a reference of your own images
    python -m fid compare a.npz b.npz                                  two files of statistics, no network
    python -m fid curve runs/mine/fid.jsonl --out fid.png              FID against training step, or --x cfg
    python -m fid train-extractor IMAGES --out FILE.safetensors        a network for --extractor classifier
    python -m fid selfcheck                                            are the weights and the arithmetic right here?
    torchrun --nproc_per_node 8 -m fid -- eval SAMPLES --ref REF       the same number on all GPUs

SAMPLES and IMAGES: a folder (recursive) or .zip of image files, an .npz with arr_0, or an .npy, uint8 (N, H, W, 3).
REF: a file of statistics (ours, ADM's, pytorch-fid's, EDM's, torch-fidelity's), or images. Numbers go to stdout,
progress and warnings to stderr. Exit code 0: done; 2: wrong input or usage; 3: no weights or no reference (torchrun
makes both 1).
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fid.commands import compare, evaluate, sample_record_file, statistics, statistics_in
from fid.distributed import rank_and_size
from fid.evaluator import Evaluator
from fid.images import Images
from fid.metrics import METRICS, check_names
from fid.metrics.rows import ARITHMETICS
from fid.networks import EXTRACTORS, build_extractor
from fid.networks.inception import PRESETS, Inception
from fid.networks.resize import tf1_bilinear
from fid.pictures import curve, neighbours, read_records
from fid.references import load_ref, open_reference, save_reference
from fid.result import Result, versions_of_packages
from fid.sanity import ROUNDING
from fid.training import train_extractor
from vca_engine.files import expanded, written_aside
from vca_engine.terminal import steady_output

MOST_NEIGHBOURS = 50
MOST_IMAGES = 10**12


class MissingError(FileNotFoundError):
    """Weights or a reference that are not there."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, by default that of the process."""
    with steady_output():
        args = _parser().parse_args(argv)
        try:
            with _processes(getattr(args, "device", None)):
                args.command(args)
        except MissingError as error:
            _fail(error, 3)
        except OSError as error:
            system = error.filename is not None and error.strerror
            _fail(f"'{error.filename}' cannot be used: {error.strerror}." if system else error, 2)
        except ValueError as error:
            _fail(error, 2)
        except (MemoryError, RuntimeError) as error:
            no_room = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not no_room and "can't allocate memory" not in str(error):  # what torch says of a processor's
                raise
            _fail("the memory is too small for this; choose a smaller --batch, --num, --crop or --keep-images.", 2)
        except KeyboardInterrupt:
            _fail("interrupted.", 130)


def _eval(args: argparse.Namespace) -> None:
    _check_eval(args)
    if (found := statistics_in(args.samples)) is not None:
        of_images = (args.num, args.metrics, args.save_stats, args.save_features, args.neighbours or None)
        if any(value is not None for value in of_images):
            raise ValueError(f"'{args.samples}' holds statistics, not images: they give a distance, and nothing else.")
        _report(_missing(lambda: compare(found, args.ref, args.force)), args)
        return
    _check_num(args)
    choices = {"mixed_sizes": args.mixed_sizes, "drop_alpha": args.drop_alpha}
    samples = Images(args.samples, **choices)  # before the network: it fails sooner
    reference = _missing(lambda: open_reference(args.ref, EXTRACTORS[args.extractor].label, **choices))
    if args.neighbours and getattr(reference, "images", reference) is None:
        raise ValueError(f"--neighbours needs the reference's images, and '{args.ref}' has none (arr_0).")
    evaluator = _missing(
        lambda: Evaluator(
            reference,
            extractor=build_extractor(args.extractor, args.weights, args.preset, args.tf32),
            metrics=_metrics(args),
            device=_device(args.device),
            batch_size=args.batch,
            groups=args.groups,
            pr_compat=args.pr_compat,
            keep_features=bool(args.neighbours or args.save_features),
            keep_statistics=bool(args.save_stats),
            force=args.force,
            progress=not args.quiet,
        )
    )
    result = evaluate(samples, num=args.num, allow_fewer=args.allow_fewer, evaluator=evaluator)
    failed = _write_record(result, args)
    if args.save_stats:
        failed += _attempt(lambda: _save_statistics(args, evaluator))
    if rank_and_size()[0] == 0:
        if args.save_features:
            failed += _attempt(lambda: _save_features(args, evaluator))
        _print(result, args)  # before a picture that may take as long as all the rest
        if args.neighbours:
            failed += _attempt(lambda: _draw_neighbours(args, evaluator, samples))
    _raise(failed)


def _metrics(args: argparse.Namespace) -> list[str] | None:
    """Split the names of --metrics."""
    return None if args.metrics is None else [name.strip().lower() for name in args.metrics.split(",")]


def _check_eval(args: argparse.Namespace) -> None:
    """Refuse before the work what could only fail after it."""
    check_names(_metrics(args) or ())
    if args.picture is not None and not args.neighbours:
        raise ValueError("--picture is where --neighbours K draws; give both.")
    args.picture = args.picture or ("neighbours.png" if args.neighbours else None)
    inputs = (args.samples, args.ref, args.weights, sample_record_file(args.samples))
    _check_output(args.json if args.json != "-" else None, ".json", *inputs)
    _check_output(args.save_stats, ".npz", *inputs)
    _check_output(args.save_features, ".npy", *inputs)
    _check_output(args.picture, ".png", *inputs)
    if args.neighbours > MOST_NEIGHBOURS:
        raise ValueError(f"--neighbours is {args.neighbours}; a picture has room for {MOST_NEIGHBOURS}.")
    if args.ref is None and args.metrics is None:
        raise ValueError("there is no reference; name it with --ref, or ask for what needs none: --metrics is.")


def _save_statistics(args: argparse.Namespace, evaluator: Evaluator) -> None:
    made = evaluator.statistics()  # every process calls it
    if rank_and_size()[0] == 0:
        save_reference(args.save_stats, made)


def _save_features(args: argparse.Namespace, evaluator: Evaluator) -> None:
    with written_aside(args.save_features) as temporary, temporary.open("wb") as file:
        np.save(file, evaluator.summary.rows["features"].numpy())


def _draw_neighbours(args: argparse.Namespace, evaluator: Evaluator, samples: Images) -> None:
    neighbours(evaluator, samples, args.picture, k=args.neighbours)
    searched, all_of = evaluator.reference_images.num, evaluator.protocol["reference"]["num_images"]
    of = f": of the {searched:,} images that the reference keeps, not of all that it is made of"
    print(f"wrote {args.picture}{of if searched != all_of else ''}", file=sys.stderr)


def _stats(args: argparse.Namespace) -> None:
    _check_output(args.out, ".npz", args.images, args.weights)
    _check_num(args)
    if args.mixed_sizes and args.keep_images and args.crop is None:
        raise ValueError("--keep-images needs images of one size; bring them to it with --crop.")
    choices = {"mixed_sizes": args.mixed_sizes, "drop_alpha": args.drop_alpha, "crop": args.crop}
    images = Images(args.images, **choices)
    if args.num is not None:
        if images.num < args.num:
            raise ValueError(f"only {images.num} of {args.num} images in {args.images}.")
        images = images.first(args.num)
    extractor = _missing(lambda: build_extractor(args.extractor, args.weights, args.preset, args.tf32))
    made = statistics(images, extractor, device=_device(args.device), batch_size=args.batch, progress=not args.quiet)
    if rank_and_size()[0] == 0:
        kept = None
        if args.keep_images:
            chosen = np.linspace(0, images.num - 1, min(images.num, args.keep_images)).round().astype(int)
            kept = np.stack([image.permute(1, 2, 0).numpy() for image in images.take(sorted(set(chosen.tolist())))])
        save_reference(args.out, made, kept)
        _warn(images.warnings())
        with_images = f", {len(kept)} images for precision and recall" if kept is not None else ""
        print(f"{args.out}: {made.num_images} images of {args.images}, {made.extractor} features{with_images}")


def _compare(args: argparse.Namespace) -> None:
    _check_output(args.json if args.json != "-" else None, ".json", args.a, args.b)
    samples = load_ref(args.a)
    _report(_missing(lambda: compare(samples, args.b, args.force)), args)


def _curve(args: argparse.Namespace) -> None:
    _check_output(args.out, "", *args.records)
    curve(read_records(args.records, lambda text: _warn([text])), args.out, args.title, args.x)
    print(f"wrote {args.out}")


def _train_extractor(args: argparse.Namespace) -> None:
    if rank_and_size()[1] > 1:
        raise ValueError("train-extractor is of one process; start it without torchrun.")
    _check_output(args.out, ".safetensors", args.images)
    images = Images(args.images, drop_alpha=args.drop_alpha, crop=args.crop).with_classes()
    choices = {"num": args.num, "held_out": args.held_out, "num_steps": args.steps, "seed": args.seed}
    classifier, num = train_extractor(images, **choices, device=_device(args.device), progress=not args.quiet)
    classifier.save(args.out)
    _warn(images.warnings())
    counts = np.bincount(images.labels)
    chance = counts.max() / images.num
    if classifier.accuracy < 1.5 * chance:
        _warn(["it is hardly better than always naming the largest class: its features say little about the images."])
    right = f"{classifier.accuracy:.1%} of {num} held-out images right"
    print(f"{args.out}: {right} (always the largest of {(counts > 0).sum()} classes: {chance:.1%}), {classifier.name}")


def _selfcheck(args: argparse.Namespace) -> None:
    """Print what must be the same on every machine."""
    row = torch.tensor([0, 1, 4, 9, 16], dtype=torch.uint8).expand(1, 3, 5, 5)
    found = tf1_bilinear(row, 7)[0, 0, 0]
    expected = torch.tensor([0, 5 / 7, 16 / 7, 33 / 7, 58 / 7, 13, 16])
    right = torch.allclose(found, expected, rtol=1e-6)
    print(f"resize      {'ok' if right else f'WRONG: {found.tolist()}'} (TensorFlow 1 bilinear, 5 -> 7 pixels)")
    images = _synthetic(), 255 - _synthetic()
    for preset in PRESETS:
        extractor = _missing(lambda preset=preset: Inception(args.weights, preset)).to(_device(args.device))
        if preset == "adm":
            weights = extractor.weights
            kind = "the published ones" if weights["published"] else "NOT the published ones"
            print(f"weights     {weights['path']}\n            sha256 {weights['sha256']}: {kind}")
        device = next(extractor.parameters()).device
        features, other = (extractor(image.to(device))["features"][0].double().cpu() for image in images)
        if (features - other).norm() <= ROUNDING * features.norm():
            kind = "only zeros" if not features.any() else "the same numbers"
            raise ValueError(
                f"{extractor.name} gives {kind} for the synthetic image and its negative: the weights in "
                f"'{extractor.weights['path']}' cannot measure anything; give others with --weights."
            )
        values = " ".join(f"{value:.5f}" for value in features[:4].tolist())
        print(f"{preset:<11} pool3 of the synthetic image: norm {features.norm():.5f}, first four {values}")
    digest = hashlib.sha256(_synthetic().numpy()).hexdigest()[:8]
    print(f"image       {digest}   versions {json.dumps(versions_of_packages())}")
    if not right:
        raise ValueError("the resize is wrong on this machine; no number made here can be trusted.")


def _synthetic() -> torch.Tensor:
    """Make an image (1, 3, 256, 256), the same everywhere, of smooth waves and of hard edges, in integers only."""
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.stack([(x * y) // 255, (x * x + 3 * y) % 256, ((x // 16 + y // 16) % 2) * 200 + x // 8])
    return image.to(torch.uint8)[None]


def _report(result: Result, args: argparse.Namespace) -> None:
    """Write the record, then print it."""
    failed = _write_record(result, args)
    if rank_and_size()[0] == 0:
        _print(result, args)
    _raise(failed)


def _write_record(result: Result, args: argparse.Namespace) -> list[str]:
    """Write --json, if it is given; return the sentence of why that failed, if it did."""
    wanted = args.json not in (None, "-") and rank_and_size()[0] == 0
    return _attempt(lambda: result.to_json(args.json)) if wanted else []


def _print(result: Result, args: argparse.Namespace) -> None:
    _warn(result.warnings)
    print(json.dumps(result.to_dict(), indent=2) if args.json == "-" else result, flush=True)


def _attempt(write: Callable[[], None]) -> list[str]:
    """Write one of several files; return the sentence of why that failed, if it did, so that the others are written."""
    try:
        write()
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def _raise(failed: list[str]) -> None:
    if failed:
        raise OSError("\n".join(failed))


def _count(text: str) -> int:
    """Read a whole number from 0, as argparse wants it."""
    if not (text.isdecimal() and len(text) <= 9):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 0 to 999,999,999")
    return int(text)


def _steps(text: str) -> int:
    """Read a number of steps, from 2 on: a schedule has a rise and a fall."""
    if _count(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} steps are too few; choose 2 or more")
    return int(text)


def _path(text: str) -> str:
    """Take a path, with ~ as the shell takes it; refuse one of no letters, which an unset variable gives."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path; leave the option out, or name a file or folder")
    return expanded(text)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m fid", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="eval|stats|compare|curve|train-extractor|selfcheck")
    network, output, quiet = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    _add_network(network)
    output.add_argument("--json", type=_path, metavar="FILE", help="write the record; - prints it in place of the line")
    output.add_argument(
        "--force", action="store_true", help="compare what was made by different protocols all the same"
    )
    quiet.add_argument("--quiet", action="store_true", help="no progress bar")

    text = "metrics of samples against a reference"
    _add_eval(commands.add_parser("eval", parents=[network, output, quiet], help=text))
    _add_stats(commands.add_parser("stats", parents=[network, quiet], help="make a reference of images"))

    command = commands.add_parser("compare", parents=[output], help="distance of two files of statistics")
    command.add_argument("a", type=_path, metavar="SAMPLES.npz")
    command.add_argument("b", type=_path, metavar="REF.npz")
    command.set_defaults(command=_compare)

    command = commands.add_parser("curve", help="draw FID against training step or guidance")
    text = "a run's folder or its fid.jsonl, or records of sample.py --fid; each folder has a line for each sampler, "
    text += "guidance and average"
    command.add_argument("records", nargs="+", type=_path, metavar="RECORD", help=text)
    command.add_argument(
        "--out", default="fid.png", type=_path, metavar="FILE", help="the picture (default: %(default)s)"
    )
    text = (
        "what the horizontal axis is: step, or a setting of sampling: cfg, steps, seed, sampler.OPTION (default: step)"
    )
    command.add_argument("--x", default="step", metavar="SETTING", help=text)
    command.add_argument("--title", default="", help="a line above it")
    command.set_defaults(command=_curve)

    text = "train a small classifier on images with classes, for --extractor classifier"
    _add_train_extractor(commands.add_parser("train-extractor", parents=[quiet], help=text))

    command = commands.add_parser("selfcheck", help="check weights and arithmetic on this machine")
    command.add_argument("--weights", type=_path, metavar="FILE", help="file of Inception's weights")
    command.add_argument("--device", choices=("cpu", "cuda"), help="where the network runs")
    command.set_defaults(command=_selfcheck)
    return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
    """Add the options of what computes features, and of what images it gets."""
    add = parser.add_argument
    add("--extractor", choices=EXTRACTORS, default="inception", help="network of the features (default: %(default)s)")
    text = "its file of weights, which random-inception and pixels have none of; not given, for inception: "
    text += "$FID_INCEPTION_WEIGHTS, torch.hub's cache, a download"
    add("--weights", type=_path, metavar="FILE", help=text)
    add("--preset", choices=PRESETS, default="adm", help="protocol of Inception (default: %(default)s)")
    add("--batch", type=int, default=64, metavar="B", help="images in a forward pass (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="where the network runs (default: cuda if there is one)")
    add("--tf32", action="store_true", help="faster on a GPU, and some 0.1 %% off in the features")
    add("--num", type=int, metavar="N", help="take the first N images; with fewer the command fails")
    add("--mixed-sizes", action="store_true", help="take images of different sizes, each resized on its own")
    add("--drop-alpha", action="store_true", help="take the colours of transparent pixels as stored, not on white")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("samples", type=_path, metavar="SAMPLES", help="images, or a file of statistics")
    add("--ref", type=_path, metavar="REF", help="the reference: a file of statistics, or images")
    names = ", ".join(f"{name} ({metric.title})" if metric.title else name for name, metric in METRICS.items())
    default = "; ".join(f"{name}: {','.join(preset.metrics)}" for name, preset in PRESETS.items())
    add("--metrics", metavar="NAMES", help=f"with commas between them, of {names} (default: of the preset {default})")
    text = "groups for the error bar, 0 for none (default: %(default)s)"
    add("--groups", type=_count, default=10, metavar="K", help=text)
    text = "arithmetic of P and R (default: %(default)s)"
    add("--pr-compat", choices=tuple(ARITHMETICS), default="adm-fp16", help=text)
    add("--allow-fewer", action="store_true", help="go on if there are fewer than --num images")
    add("--save-stats", type=_path, metavar="FILE", help="write the statistics of the samples to this .npz")
    add(
        "--save-features",
        type=_path,
        metavar="FILE",
        help="write the features of the samples, (N, D) float32, to this .npy",
    )
    text = "draw the samples nearest to a real image, with K of those"
    add("--neighbours", type=_count, default=0, metavar="K", help=text)
    add("--picture", type=_path, metavar="FILE", help="where to (default: neighbours.png)")
    parser.set_defaults(command=_eval)


def _add_stats(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", type=_path, metavar="IMAGES", help="the images, usually those of the training set")
    add("--out", required=True, type=_path, metavar="FILE", help="the .npz to write")
    add("--crop", type=int, metavar="SIZE", help="crop and resize as in training: ADM's centre crop to SIZE pixels")
    add(
        "--keep-images", type=_count, default=0, metavar="K", help="keep K images in the file, for precision and recall"
    )
    parser.set_defaults(command=_stats)


def _add_train_extractor(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "a folder or .zip with a folder for each class or a file of labels (labels.csv), or an .npz"
    add("images", type=_path, metavar="IMAGES", help=text)
    add("--out", required=True, type=_path, metavar="FILE", help="the .safetensors to write")
    add("--crop", type=int, metavar="SIZE", help="crop and resize as in training: ADM's centre crop to SIZE pixels")
    add("--num", type=_count, metavar="N", help="take N of the images, evenly of all classes (default: all)")
    text = "share of the images on which the accuracy is measured (default: %(default)s)"
    add("--held-out", type=float, default=0.1, metavar="SHARE", help=text)
    text = "steps of training, of 64 images (default: 10 epochs, but at least 600 and at most 6000)"
    add("--steps", type=_steps, metavar="N", help=text)
    add("--seed", type=_count, default=0, help="of choice, initialisation and order (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="where it is trained (default: cuda if there is one)")
    add("--drop-alpha", action="store_true", help="take the colours of transparent pixels as stored, not on white")
    parser.set_defaults(command=_train_extractor)


@contextmanager
def _processes(device: str | None) -> Iterator[None]:
    """Join the process group under torchrun; else do nothing."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu.")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _missing(make):  # noqa: ANN001, ANN202
    """Call `make`; a file that is not there ends in exit code 3."""
    try:
        return make()
    except FileNotFoundError as error:
        raise MissingError(str(error)) from error


def _check_num(args: argparse.Namespace) -> None:
    if args.num is not None and not 1 <= args.num <= MOST_IMAGES:
        raise ValueError(f"--num is {str(args.num)[:40]}; choose a number of images from 1 to {MOST_IMAGES:,}.")


def _check_output(path: str | None, suffix: str, *inputs: str | Path | None) -> None:
    """Refuse a path that cannot be written, or that is one of the inputs: before the work, not after it."""
    if path is None:
        return
    file = Path(path)
    if not path.lower().endswith(suffix) or not file.parent.is_dir():
        raise ValueError(f"cannot write '{path}': it must end in {suffix or 'a name'}, in a folder that exists.")
    if file.exists() and not file.is_file():
        raise ValueError(f"cannot write '{path}': it is {'a folder' if file.is_dir() else 'no ordinary file'}.")
    if file.exists() and any(Path(given).exists() and file.samefile(given) for given in inputs if given is not None):
        raise ValueError(f"cannot write '{path}': this command reads it; choose another name.")
    if not os.access(file.parent, os.W_OK):
        raise ValueError(f"cannot write '{path}': its folder is read-only.")


def _warn(warnings: Sequence[str]) -> None:
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)


def _fail(error: Exception | str, code: int) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node; the process group is gone by now
        print(f"python -m fid: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
