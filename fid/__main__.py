"""Frechet distances between sets of images.

`stats` writes the statistics of a set of images; `eval` compares samples with such a file, or with other images. The
result goes to stdout, progress and warnings to stderr. Wrong input ends in a sentence and exit code 2.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fid.evaluate import evaluate, read, statistics
from fid.features import EXTRACTORS, FeatureExtractor
from fid.images import Images

IMAGES = "a folder (recursive), an .npz with arr_0, or an .npy of uint8 (N, H, W, 3)"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, by default that of the process."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _stats(args: argparse.Namespace) -> None:
    _check_output(args.out, ".npz")
    images = Images(args.images, args.num)
    made = statistics(images, _extractor(args), args.batch_size)
    made.save(args.out)
    print(f"{args.out}: {made.num} images of {args.images}, {made.extractor} features, {made.dim}-d")


def _eval(args: argparse.Namespace) -> None:
    if args.json:
        _check_output(args.json, ".json")
    sides = read(args.samples, args.num), read(args.ref)
    extractor = _extractor(args) if any(isinstance(side, Images) for side in sides) else None
    result = evaluate(*sides, extractor, args.batch_size)
    protocol = " by the protocol of pytorch-fid" if result.name.startswith("FID") else ""
    print(
        f"{result.name} {result.value:.2f}{protocol}  ({result.extractor} features, {result.dim}-d; "
        f"{_count(result.num_images)} against {result.reference}, {_count(result.reference_num_images)})"
    )
    for source, num in ((args.samples, result.num_images), (result.reference, result.reference_num_images)):
        if num is not None and num < result.dim:
            note = f"warning: {num} images of {source} in {result.dim} dimensions: the distance is biased upwards."
            print(note, file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(result), indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--extractor", choices=EXTRACTORS, default="inception", help="network of the features (default: %(default)s)")
    add("--weights", help="its file of weights; Inception is looked for, or downloaded, if not given")
    add("--num", type=int, help="take the first NUM images (of the samples, not of the reference); all if not given")
    add("--batch_size", type=int, default=64, help="images in a forward pass (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="where the network runs (default: cuda if there is one)")

    parser = argparse.ArgumentParser(prog="python -m fid", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="stats|eval")
    stats = commands.add_parser("stats", parents=[shared], help="write the statistics of images")
    stats.add_argument("images", metavar="IMAGES", help=IMAGES)
    stats.add_argument("--out", required=True, help="the .npz to write")
    stats.set_defaults(command=_stats)
    compare = commands.add_parser("eval", parents=[shared], help="compare samples with a reference")
    compare.add_argument("samples", metavar="SAMPLES", help=f"{IMAGES}, or an .npz of statistics")
    compare.add_argument("--ref", required=True, help="the reference: an .npz of statistics, or images")
    compare.add_argument("--json", help="also write the result to this file")
    compare.set_defaults(command=_eval)
    return parser


def _extractor(args: argparse.Namespace) -> FeatureExtractor:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return EXTRACTORS[args.extractor](args.weights).to(device)


def _check_output(path: str, suffix: str) -> None:
    """Before the work, not after it."""
    if Path(path).suffix != suffix or not Path(path).parent.is_dir():
        raise ValueError(f"cannot write '{path}': it must end in {suffix}, in a folder that exists.")


def _count(num: int | None) -> str:
    return "an unknown number of images" if num is None else f"{num} images"


if __name__ == "__main__":
    main()
