"""Use a recogniser that train.py has trained.

    python -m classify eval runs/deit_tiny_vca --data.images DIR     top-1, top-5, each class, a picture of the mistakes
    python -m classify predict runs/deit_tiny_vca cat.jpg dog.jpg    the most probable classes
    python -m classify export runs/deit_tiny_vca --out model.onnx    an ONNX file, checked against the network
    python -m classify compare RUN RUN ... --out accuracy.png        a table over seeds, and their curves
    python -m classify COMMAND --help                                all its settings

A run holds the crop, size and normalisation of its images. A file of published weights can take the place of the run,
eval deit_tiny.pth --data.images DIR --crop 0.9; its classes are the folders of DIR in alphabetical order. `accelerate
launch -m classify eval ...` evaluates on all GPUs.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field

from classify.compare import compare
from classify.evaluation import Evaluation, evaluate, write_tables
from classify.pictures import draw_confusion
from classify.recogniser import Recogniser, read_picture
from vca import lookup
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.options import CheckpointOptions, WeightsOptions
from vca_engine.config.reading import FilePath, Spec, Strict
from vca_engine.config.schema import Batch, TrainConfig
from vca_engine.distributed import join_processes, on_main_process
from vca_engine.images.files import ImageFiles, UnreadableImageError
from vca_engine.images.pixels import read_image
from vca_engine.precision import chosen_device
from vca_engine.records import differences, listed, read_json, write_json

EVALUATION_RECORD = "eval.json"
FILES = (EVALUATION_RECORD, "classes.csv", "predictions.csv", "confusion.png")
MOST_CLASSES = 20  # of which each is printed
Crop = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class EvalArguments(WeightsOptions):
    """Evaluate a recogniser on images whose classes are known.

    Args:
        data: Images to evaluate on; give only the options that differ from training: --data.images DIR, --data.split
            test. The default is eval.data of the run. Classes are found by their names, but those of published weights
            are taken in order.
        crop: Share of the shorter side of an image that the network sees: 0.875 is 224 of 256 pixels; by default that
            of training.
        batch_size: Images that go through the network together, on each process.
        num_workers: Processes that read images, for each process; by default up to 4.
        out: Folder for eval.json, classes.csv, predictions.csv and confusion.png; by default eval-step-STEP in the
            run's folder.
    """

    data: Spec | None = None
    crop: Crop | None = None
    batch_size: Batch = 64
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    out: FilePath | None = None


@dataclass(frozen=True, kw_only=True)
class PredictArguments(WeightsOptions):
    """Print the most probable classes of images.

    Args:
        images: Image files, and folders or .zip files of images, which may stand without --images.
        crop: Share of the shorter side of an image that the network sees; by default that of training.
        top: Number of most probable classes to print.
        batch_size: Images that go through the network together.
        json: File to which the names and probabilities of these classes are also written.
    """

    images: list[FilePath]
    crop: Crop | None = None
    top: Annotated[int, Field(ge=1, le=1000)] = 5
    batch_size: Batch = 64
    json: FilePath | None = None


@dataclass(frozen=True, kw_only=True)
class ExportArguments(CheckpointOptions):
    """Write a recogniser as an ONNX file.

    Args:
        crop: Share of the shorter side of an image that the network sees, for the metadata; by default that of
            training.
        out: The ONNX file; by default step-STEP.onnx in the run's folder.
    """

    crop: Crop | None = None
    out: FilePath | None = None


@dataclass(frozen=True, kw_only=True)
class CompareArguments(Strict):
    """Compare the accuracies of runs over seeds: a table and a picture.

    Args:
        runs: Folders of the runs, which may stand without --runs. Runs that differ only in the seed are a group.
        out: Picture to write, .png, .pdf or .svg; a .json file beside it gets all numbers.
    """

    runs: list[FilePath] = field(default_factory=list)
    out: FilePath = "accuracy.png"


@report_errors("classify")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command whose name is the first word."""
    words = list(sys.argv[1:] if argv is None else map(str, argv))
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: python -m classify COMMAND ...\n\n{__doc__.strip()}")
        return
    arguments, run, unnamed = lookup(COMMANDS, words[0], "command")
    texts = {"prog": f"python -m classify {words[0]}", "description": arguments.__doc__.partition("\n")[0]}
    run(parse(arguments, words[1:], **texts, **unnamed, parts=assemble.parts()))


def run_eval(args: EvalArguments) -> None:
    """Evaluate a recogniser, write the tables, the picture and the record, and print the numbers."""
    state = join_processes(chosen_device(args.device) == "cpu")
    recogniser = Recogniser.from_pretrained(args.checkpoint, **args.loading(), crop=args.crop, device=state.device)
    config, step = recogniser.config, recogniser.source.get("step") or 0
    given = dataclasses.replace(config, eval=dataclasses.replace(config.eval, data=args.data or config.eval.data))
    spec = assemble.spec_to_evaluate(given)
    if spec is None:
        raise ValueError(f"{args.checkpoint!r} has no eval.data; name images to evaluate on: --data.images DIR.")
    published = recogniser.source["kind"] == "published file"  # whose classes have no names
    data = assemble.images_to_evaluate(spec, recogniser.info, "data", by_name=not published)
    recogniser.info = dataclasses.replace(recogniser.info, class_names=data.class_names)
    out = Path(args.out or recogniser.folder / f"eval-step-{step:08d}")
    asked = {
        "weights": {"sha256": recogniser.sha256, "part": recogniser.source["part"], "step": step},
        "data": {**spec, "fingerprint": data.fingerprint},
        "views": recogniser.describe_views(),
        **{name: getattr(args, name) for name in ("precision", "tf32", "compile")},
    }
    on_main_process(state, lambda: check_free(out, asked))
    if state.is_main_process:
        print_notes(data.notes)
    workers = TrainConfig(num_workers=args.num_workers).workers()
    options = {"batch_size": args.batch_size, "num_workers": workers, "state": state}
    evaluation = evaluate(recogniser, data, **options, progress=state.is_main_process)
    if not state.is_main_process:
        return
    found, rate = evaluation.accuracies(), round(evaluation.images_per_second, 2)
    facts = {"images_per_second": rate, **recogniser.facts(), "processes": state.num_processes}
    title = f"{recogniser.folder.resolve().name}, step {step:,}: top-1 {found['top1']:.2f} % of {len(data):,} images"
    write_tables(evaluation, data, out)
    draw_confusion(evaluation.confusion(), recogniser.class_names, out / "confusion.png", title)
    write_json(out / EVALUATION_RECORD, {**found, **asked, **facts})
    print(
        f"{recogniser}\n\n{render_evaluation(evaluation)}\n\n{rate:,.1f} images/s of the network. Wrote {out}: "
        f"{', '.join(FILES)}"
    )


def check_free(out: Path, asked: dict[str, Any]) -> None:
    """Raise ValueError if `out` already holds another evaluation, or other files of these names."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {str(out)!r}, which is a file; choose a folder.")
    if not (out / EVALUATION_RECORD).exists():
        if there := [name for name in FILES if (out / name).exists()]:
            raise ValueError(f"{str(out / there[0])!r} is there already; choose another --out.")
        return
    known = read_json(out / EVALUATION_RECORD)
    if different := differences({key: known.get(key) for key in asked}, asked):
        raise ValueError(f"{str(out)!r} holds an evaluation with {listed(different, most=40)}; choose another --out.")


def render_evaluation(evaluation: Evaluation) -> str:
    """Write the accuracies as text, and those of the classes: of all if they are few, else of the worst."""
    found, rows = evaluation.accuracies(), [row for row in evaluation.classes() if row["images"]]
    text = f"top-1 {found['top1']:.2f} ± {found['top1_se']:.2f} %"
    text += f", top-5 {found['top5']:.2f} %" if len(evaluation.class_names) > 5 else ""
    text += f", {found['num_samples']:,} images; mean of the classes' own top-1 {found['mean_class_top1']:.2f} %"
    if found["not_finite"]:
        text += f"\n{found['not_finite']:,} images have an output that is not finite, and count as wrong"
    worst = ""
    if len(rows) > MOST_CLASSES:
        rows, worst = sorted(rows, key=lambda row: row["top1"])[:10], "the 10 worst of all classes:\n"
    width = min(40, max(len("class"), *(len(row["class"]) for row in rows)))
    lines = [f"{'class':<{width}}  images   top-1  most often taken for"]
    for row in rows:
        taken = f"{row['taken_for']} ({row['so_often']})" if row["taken_for"] else ""
        lines.append(f"{row['class'][:width]:<{width}}  {row['images']:>6}  {row['top1']:>6.2f}  {taken}".rstrip())
    return f"{text}\n\n{worst}" + "\n".join(lines)


def run_predict(args: PredictArguments) -> None:
    """Print the most probable classes of images.

    Raises:
        ValueError: An image cannot be read; raised after all other images are printed and written.
    """
    if args.json and Path(args.json).is_dir():
        raise ValueError(f"--json is {args.json!r}, which is a folder; name a file.")
    device = chosen_device(args.device)
    recogniser = Recogniser.from_pretrained(args.checkpoint, **args.loading(), crop=args.crop, device=device)
    pictures, found, left_out = list(pictures_at(args.images)), [], []
    names, num = recogniser.class_names, min(args.top, len(recogniser.class_names))
    for first in range(0, len(pictures), args.batch_size):
        batch = []
        for name, read in pictures[first : first + args.batch_size]:
            try:
                batch.append((name, read()))
            except UnreadableImageError as error:
                left_out.append(str(error))
        if not batch:
            continue
        best = recogniser([image for _, image in batch]).topk(num, dim=1)  # (B, num) each
        for (name, _), values, classes in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            # Of an output that is not finite all probabilities are NaN.
            likely = {names[k]: p for k, p in zip(classes, values, strict=True) if math.isfinite(p)}
            found.append({"image": name, "classes": likely})
            text = ", ".join(f"{k} {100 * p:.1f} %" for k, p in likely.items())
            print(f"{name}: {text or 'the output of the network is not finite'}", flush=True)
    if args.json:
        weights = {"sha256": recogniser.sha256, **recogniser.source}
        facts = {"left_out": left_out, "weights": weights, "views": recogniser.describe_views()}
        write_json(args.json, {"predictions": found, **facts})
    if left_out:
        others = f" The other {len(found):,} of {len(pictures):,} images are done." if found else ""
        more = f" So it is with {len(left_out) - 3:,} more." if len(left_out) > 3 else ""
        raise ValueError(" ".join(left_out[:3]) + more + others)


def print_notes(notes: Sequence[str]) -> None:
    """Print notes on the images, e.g. how many have a format that cannot be read."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def pictures_at(paths: Sequence[str]) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """Yield the name of each image and a function that reads it: of files, and of all in folders and .zip files."""
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no image {path!r}; check the path.")
        if Path(path).is_dir() or path.lower().endswith(".zip"):
            files = ImageFiles(path)
            print_notes(files.warnings())
            yield from ((files.path(name), partial(files.decode, name, read_image)) for name in files.names)
        else:
            yield path, partial(read_picture, path)


def run_export(args: ExportArguments) -> None:
    """Write the ONNX file, and print how far its logits are from the network's."""
    recogniser = Recogniser.from_pretrained(args.checkpoint, weights=args.weights, crop=args.crop, device="cpu")
    out = Path(args.out or recogniser.folder / f"step-{recogniser.source.get('step') or 0:08d}.onnx")
    if out.suffix.lower() != ".onnx":
        raise ValueError(f"--out is {str(out)!r}; an export is a .onnx file.")
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already; choose another --out, or remove it.")
    difference = recogniser.export_onnx(out)
    size = recogniser.info.image_size
    print(
        f"wrote {out}: image (batch, {recogniser.info.channels}, {size}, {size}) -> logits (batch, "
        f"{len(recogniser.class_names)}); onnxruntime's logits differ by at most {difference:.1e} from PyTorch's"
    )


def run_compare(args: CompareArguments) -> None:
    """Print the table, and draw the picture."""
    out = Path(args.out)
    print(compare(args.runs, out))
    print(f"\nwrote {out} and {out.with_suffix('.json')}")


COMMANDS = {  # name -> settings, function, and the settings that take the words without a name
    "eval": (EvalArguments, run_eval, {"first": "checkpoint"}),
    "predict": (PredictArguments, run_predict, {"first": "checkpoint", "others": "images"}),
    "export": (ExportArguments, run_export, {"first": "checkpoint"}),
    "compare": (CompareArguments, run_compare, {"others": "runs"}),
}


if __name__ == "__main__":
    main()
