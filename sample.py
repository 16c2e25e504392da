"""Draw images from a checkpoint, which knows everything but what you want to see.

    python sample.py --checkpoint runs/demo                                       a labelled grid, runs/demo/samples.png
    python sample.py --checkpoint runs/demo --classes [3,7] --rows 8 --cfg_scale 3 --out runs/3_7.png
    python sample.py --checkpoint runs/demo --num 1000 --out runs/demo/png        1000 PNG files
    python sample.py --checkpoint runs/demo --num 1000 --out runs/demo/1000.npz   one file, arr_0 images, arr_1 labels
    accelerate launch sample.py --checkpoint runs/sit_b2_vca --num 50000 --out 50k.npz   on all GPUs
    accelerate launch sample.py --checkpoint runs/sit_b2_vca --num 50000 --fid VIRTUAL_imagenet256_labeled.npz   their FID

Image i is a function of (seed, i), whatever the batch size and the number of processes (adaptive ODE solvers choose their
steps for a whole batch, and depend on it within their tolerances); run the same command again to go on where it stopped.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

import build
import fid
from runtime import checkpoint
from runtime.config import Config, Spec, from_dict, parse, report_errors, require
from runtime.generation import check_guidance, check_labels, generate, random_label, spread
from runtime.images import save_grid
from runtime.sink import EvaluatorSink, open_sink, partial_of
from runtime.stop import uninterrupted


@dataclass(frozen=True)
class Arguments:
    """What to draw.

    Args:
        checkpoint: A run's folder, for its newest checkpoint, or one of its checkpoints/step-* folders.
        num: Number of images; not given draws a grid.
        out: Grid: a PNG file, else samples.png in the run's folder. Images: a folder for PNG files, or a file.npz, else
            the folder samples in the run's folder. With fid: also a file.json for the record alone, which is the default
            (fid-step-STEP-cfg-SCALE-num-NUM.json in the run's folder); then no image is kept.
        cfg_scale: Classifier-free guidance; 1 is none. Not given means as in the run's config.
        guided_channels: Guide the first channels only; not given means as in the run's config.
        sampler: Sampler by name with its options; not given means as in the run's config.
        classes: Classes to draw, by number, e.g. [3,7]; not given means all, or for a grid as in the run's config.
        labels: With num, labels that are uniformly random, as for published FIDs, or balanced, the classes in turn.
        rows: Rows of the grid.
        seed: Not given means as in the run's config.
        batch_size: Images drawn together on each process.
        weights: ema, the averaged weights; ema-0.05 and the like, the power-function averages; model, those of the last
            training step.
        fid: With num, measure the images against this reference: a file of statistics, or images.
        fid_extractor: Network of the features; not given means as in the run's config, which is inception.
        fid_preset: Protocol of Inception: adm, pytorch-fid or clean; not given means as in the run's config.
        fid_weights: Its file of weights; not given means as in the run's config.
        fid_metrics: Names of metrics, e.g. [fid,is]; not given means as in the run's config.
        vae: Where the autoencoder is now, if not where it was in training.
        device: cuda or cpu; auto is the GPU if there is one.
    """

    checkpoint: str
    num: int | None = None
    out: str | None = None
    cfg_scale: float | None = None
    guided_channels: int | None = None
    sampler: Spec | None = None
    classes: list[int] | None = None
    labels: Literal["random", "balanced"] = "random"
    rows: int | None = None
    seed: int | None = None
    batch_size: int = 64
    weights: str = "ema"
    fid: str | None = None
    fid_extractor: Literal["inception", "dinov2", "classifier"] | None = None
    fid_preset: Literal["adm", "pytorch-fid", "clean"] | None = None
    fid_weights: str | None = None
    fid_metrics: list[str] | None = None
    vae: str | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def __post_init__(self) -> None:
        require(self.num is None or self.num > 0, "num", self.num, "choose at least 1 image")
        require(self.seed is None or self.seed >= 0, "seed", self.seed, "choose at least 0")
        require(self.batch_size > 0, "batch_size", self.batch_size, "choose at least 1")
        require(self.fid is None or self.num is not None, "fid", self.fid, "say of how many images with --num")
        require(self.fid is None or self.num > 1, "num", self.num, "a distance needs at least 2 images")


@report_errors("sample.py")
def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    args = parse(Arguments, argv, prog="sample.py", description=__doc__, epilog=build.sampler_help())
    folder = checkpoint.find(args.checkpoint)
    record = checkpoint.read_record(folder)
    config = with_arguments(from_dict(Config, record["config"], str(folder / checkpoint.RECORD)), args)
    shape = build.Shape(**record["shape"])

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but PyTorch finds no GPU here; use cpu.")
    state = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    codec = build.build_codec(config, shape.channels)
    model = build.build_model(config, shape, codec)
    classes = args.classes or list(range(model.num_classes))
    check_labels([*classes, *(config.sample.classes or [])], model.num_classes)
    check_guidance(model, config.sample.cfg_scale, config.sample.guided_channels)
    sampler = build.build_sampler(config, build.build_process(config))
    if args.weights not in (there := checkpoint.weights_in(folder)):
        raise ValueError(f"--weights is {args.weights!r}; {str(folder)!r} has {there}.")
    checkpoint.load_weights(folder, args.weights, model)
    model, codec = model.eval().to(state.device), codec.to(state.device)

    sample = config.sample
    options = {"cfg_scale": sample.cfg_scale, "guided_channels": sample.guided_channels, "seed": sample.seed}
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else folder

    def draw(indices: Sequence[int], labels: Sequence[int]) -> Any:
        return generate(model, sampler, codec.decode, labels, indices, **options)

    if args.num is None:
        if state.is_main_process:
            classes = sample.classes or spread(classes)
            out = Path(args.out or run_dir / "samples.png")
            if out.suffix.lower() != ".png":
                raise ValueError(
                    f"--out is {args.out!r}; a grid is a .png file. With --num, it is a folder or an .npz."
                )
            title = f"step {record['step']}, cfg {sample.cfg_scale:g}, seed {sample.seed}"
            names = [shape.class_names[k] for k in classes]
            draw_grid(draw, classes, sample.rows, args.batch_size, names, out, title)
            print(f"wrote {out}: {title}")
        return

    label = {
        "random": lambda i: classes[random_label(sample.seed, i, len(classes))],
        "balanced": lambda i: classes[i % len(classes)],
    }[args.labels]
    settings = {
        "checkpoint": {"run": config.run_dir, "step": record["step"], "id": record["id"], "weights": args.weights},
        "sampler": sample.sampler,
        **options,
        "labels": args.labels,
        "classes": classes if args.classes else "all",
    }
    evaluator = build.build_evaluator(config, state.device) if args.fid else None
    name = f"fid-step-{record['step']:08d}-cfg-{sample.cfg_scale:g}-num-{args.num}.json" if args.fid else "samples"
    sink = open_sink(Path(args.out or run_dir / name), args.num, settings, state, evaluator)
    missing = sink.missing()
    if evaluator and missing:
        evaluator.prepare()  # a broken reference is found before the images are drawn
    state.wait_for_everyone()  # all have looked before one writes
    todo = [i for i in missing if i % state.num_processes == state.process_index]
    counts = {"total": args.num, "initial": args.num - len(missing)}
    bar = tqdm(desc="sample", unit="image", disable=not state.is_main_process, **counts)
    try:
        for k in range(0, len(todo), args.batch_size):
            indices = todo[k : k + args.batch_size]
            labels = [label(i) for i in indices]
            images = draw(indices, labels)
            with uninterrupted():
                sink.write(indices, images, labels)
            bar.update(min(len(indices) * state.num_processes, args.num - bar.n))
    except OSError as error:
        raise OSError(f"{error}. What was drawn is kept; run the same command to go on.") from error
    finally:  # whatever happens, these images need not be drawn again
        if isinstance(sink, EvaluatorSink) and todo:
            sink.save()
    bar.close()
    state.wait_for_everyone()
    out = sink.finish() if state.is_main_process else sink.file
    state.wait_for_everyone()
    if evaluator:
        measure(evaluator, out, args, {"step": record["step"], "sample": {**settings, "num": args.num}})
    if state.is_main_process and (missing or not evaluator):
        print(f"wrote {out}: {args.num} images, step {record['step']}, cfg {sample.cfg_scale:g}")
    state.wait_for_everyone()


def measure(evaluator: fid.Evaluator, out: Path, args: Arguments, record: dict[str, Any]) -> None:
    """Compute the metrics of what was drawn, print them, and write their record to `out`, or beside kept images.

    Every process calls it. Kept images are read again, so that those of an earlier, interrupted command count, too.
    """
    file = out if out.suffix == ".json" else out.with_name(out.name + ".fid.json")
    record = {"labels_mode": args.labels, "quantize": "dit", **record}
    if file == out and out.exists():
        result = fid.Result.from_json(out)
        if different := evaluator.differences(result.record):
            raise ValueError(
                f"{str(out)!r} holds another measurement: {', '.join(different)} differ; choose another --out."
            )
    elif file == out:
        result = evaluator.compute(args.num, **record)
    else:
        result = fid.evaluate(str(out), num=args.num, evaluator=evaluator, record=record)
    if PartialState().is_main_process:
        result.to_json(file)
        shutil.rmtree(partial_of(file), ignore_errors=True)
        for text in result.warnings:
            print(f"warning: {text}", file=sys.stderr)
        print(result)


def with_arguments(config: Config, args: Arguments) -> Config:
    """The run's config with what the command line says of sampling."""
    names = ("cfg_scale", "guided_channels", "sampler", "classes", "rows", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "name" not in given.get("sampler", {"name": None}):  # only options: of the sampler that the run has
        given["sampler"] = {**(config.sample.sampler or {}), **given["sampler"]}
    names = ("extractor", "preset", "weights", "metrics")
    measured = {name: getattr(args, f"fid_{name}") for name in names if getattr(args, f"fid_{name}") is not None}
    if args.fid is not None:
        measured["reference"] = args.fid
    elif measured:
        raise ValueError(f"fid_{next(iter(measured))} is given, but no reference; name it with --fid.")
    codec = config.codec
    if args.vae is not None:
        if codec["name"] != "vae":
            raise ValueError(f"--vae is given, but this run's codec is {codec['name']!r}.")
        codec = {**codec, "path": args.vae}
    sample = dataclasses.replace(config.sample, **given)
    return dataclasses.replace(config, sample=sample, fid=dataclasses.replace(config.fid, **measured), codec=codec)


def draw_grid(
    draw: Any, classes: Sequence[int], rows: int, batch_size: int, names: Sequence[str], out: Path, title: str
) -> None:
    """A grid of `rows` images of each class, a column a class; image i stands at row i // columns."""
    labels = list(classes) * rows
    images = []
    for k in tqdm(range(0, len(labels), batch_size), desc="sample", unit="batch"):
        stop = min(k + batch_size, len(labels))
        images.append(draw(range(k, stop), labels[k:stop]))
    grid = np.concatenate(images)
    save_grid(grid.reshape(rows, len(classes), *grid.shape[1:]), names, out, title)


if __name__ == "__main__":
    main()
