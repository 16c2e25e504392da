"""Draw images from a checkpoint, which knows everything but what you want to see.

    python sample.py runs/demo                                       a labelled grid, runs/demo/samples.png
    python sample.py runs/demo --classes [3,7] --per_class 4 --cfg_scale 3 --out runs/3_7.png
    python sample.py runs/demo --num 1000 --out runs/demo/png        1000 PNG files
    python sample.py runs/demo --num 1000 --out runs/demo/1000.npz   one file, arr_0 images, arr_1 labels; or .npy
    accelerate launch sample.py runs/sit_b2_vca --num 50000 --out 50k.npz   on all GPUs
    accelerate launch sample.py runs/sit_b2_vca --num 50000 --fid VIRTUAL_imagenet256_labeled.npz   their FID
    python sample.py runs/demo --trajectory                     from noise to data: runs/demo/trajectory.png
    python sample.py runs/demo --interpolate --out runs/demo/interpolation.gif
    python sample.py runs/demo --sweep cfg=1,1.5,4                   a grid over a setting: runs/demo/sweep.png
    python sample.py runs/demo --num 5000 --fid REF --sweep cfg=1,1.5,2      FID over it: a table, runs/demo/fid-cfg.png
    python sample.py runs/demo --likelihood                     bits per dimension of a flow

The checkpoint is a run or one of its checkpoints, a .pt of the published DiT or SiT, a folder of diffusers' DiT, or a
name on the Hugging Face hub. Of --num images, number i is a function of (checkpoint, settings, seed, i) and nothing
else, bit for bit on one kind of device, whatever the batch size and the number of processes; run the same command again
to go on where it stopped. Beside each output stands a record of how it was made. Sampler, guidance, seed and group size
are as in the run's config, unless they are given.
"""

import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from accelerate import PartialState
from pydantic import Field
from tqdm import tqdm

import fid
from fid.pictures import is_curve
from fid.result import table_of
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.options import ModelOptions, SampleOptions, with_options
from vca_engine.config.reading import FilePath, Spec
from vca_engine.config.schema import NEED_GUIDANCE, Batch, FidConfig, SampleConfig, require
from vca_engine.distributed import join_processes
from vca_engine.precision import chosen_device
from vca_engine.sampling.classes import find_class, random_label
from vca_engine.sampling.drawing import Drawing
from vca_engine.sampling.likelihood import likelihood_settings, measure_likelihood
from vca_engine.sampling.pictures import draw_picture
from vca_engine.sampling.pipeline import Pipeline
from vca_engine.sampling.sample_record import add_to_record, alone_at, partial_of, read_sample_record
from vca_engine.sampling.sweep import swept, swept_name
from vca_engine.sampling.writers import Writer, writer_of
from vca_engine.signals import end_on_signals, uninterrupted

IN_FID_FILE = ("cfg_scale", "sampler.name", "sampler.num_steps")  # settings that the name of a record holds


@dataclass(frozen=True, kw_only=True)
class SampleArguments(SampleOptions, ModelOptions):
    """A request for images; settings of drawing that are not given are as in the run's config.

    Args:
        num: Number of images; not given draws a grid.
        out: Grid and other pictures: a .png or .gif file, else samples.png, trajectory.png, ... in the run's folder.
            With num: a folder for PNG files, or a file.npz or file.npy, else the folder samples in the run's folder.
            With fid: also a file.json for the record alone, which is the default
            (fid-step-STEP-SAMPLER-cfg-SCALE-num-NUM.json in the run's folder); then no image is kept. With likelihood:
            a file.json.
        negative_class: A class, by number or name, to be guided away from, instead of no class; with a guide, the
            guide's.
        guide: A worse checkpoint to be guided away from (autoguidance), with cfg_scale.
        guide_weights: Its weights: ema, by default, ...
        classes: Classes to draw, by number or name, e.g. [3,7] or [goldfish,tench]; not given means all, for a grid or
            a sweep as in the run's config, or 10 evenly spaced ones, and for a trajectory or an interpolation the first
            one.
        labels: With num, labels that are uniformly random, as for published FIDs and by default, or balanced, the
            classes in turn.
        batch_size: With num, images that each process hands over at once to the disk or the evaluator, at least a
            group; 64 by default. It is group_size that decides how many are drawn at once.
        trajectory: Draw the way of an image of each of the classes from noise to data, and below it the predicted clean
            image.
        interpolate: Draw the way from the first noise of this seed to that of the next; what a sampler draws later is
            the same.
        columns: Columns of these two, 10 by default.
        sweep: A grid over a setting, a row each value, e.g. cfg=1,1.5,4, cfg=1:5 (1,2,3,4,5), cfg=1:2:0.25,
            steps=10,50,250, seed=0,1, sampler.method=euler,heun. With num and fid: each value is measured, and --out is
            the .png of the distances; the records are in its folder.
        likelihood: Measure the likelihood of real images under a flow, in bits per dimension, of as many as num says,
            else of 1000.
        data: Those images, if not the ones of training, e.g. --data.images DIR, --data.split test.
        fid: With num, measure the images against this reference: a file of statistics, or images.
        fid_extractor: Network of the features. Not given means as in the run's config, here and in what follows.
        fid_preset: Protocol of Inception.
        fid_weights: The network's file of weights.
        fid_metrics: Names of metrics, which python -m fid eval --help explains.
    """

    num: Annotated[int, Field(ge=1, le=10**7)] | None = None
    out: FilePath | None = None
    negative_class: str | None = None
    guide: FilePath | None = None
    guide_weights: str | None = None
    labels: Literal["random", "balanced"] | None = None
    batch_size: Batch | None = None
    trajectory: bool = False
    interpolate: bool = False
    columns: Annotated[int, Field(ge=2, le=1000)] | None = None
    sweep: str | None = None
    likelihood: bool = False
    data: Spec | None = None
    fid: FilePath | None = None
    fid_extractor: str | None = None
    fid_preset: str | None = None
    fid_weights: FilePath | None = None
    fid_metrics: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sampling = with_options(SampleConfig(), self)
        assemble.check_sampler(self.sampler, "sampler")
        if self.sweep:
            swept(self.sweep, sampling, self.sampler)
        require(self.fid is None or self.num is not None, "fid", self.fid, "say of how many images with --num N")
        require(self.fid is None or self.num > 1, "num", self.num, "a distance needs at least 2 images")
        chosen = [name for name in ("trajectory", "interpolate", "sweep", "likelihood", "fid") if getattr(self, name)]
        if len(chosen) > 1 and chosen != ["sweep", "fid"]:
            raise ValueError(f"--{chosen[0]} and --{chosen[1]} are two different things; choose one.")
        if self.num is not None and self.picture not in (None, "samples"):
            hint = ", or measure each value with --fid REF" if self.sweep else ""
            raise ValueError(f"--{self.picture} draws a picture, and --num many images; choose one{hint}.")
        if self.of_fid and not self.fid:
            raise ValueError(f"fid_{next(iter(self.of_fid))} is given, but no reference; name it with --fid.")
        if self.guide_weights and not self.guide:
            raise ValueError("--guide_weights is given, but no --guide; leave it out.")
        many = self.num is not None and not self.likelihood
        self._require_effect("per_class", self.picture == "samples", "is for a grid, which has a row for each class")
        self._require_effect("columns", self.trajectory or self.interpolate, "is for --trajectory and --interpolate")
        self._require_effect("labels", many, "is for --num N: a grid has a row for each class")
        self._require_effect("batch_size", many, "is for --num N: a picture is drawn by groups, --group_size")
        self._require_effect("data", self.likelihood, "is for --likelihood")
        for name in ("classes", "negative_class", "guide", *NEED_GUIDANCE):
            self._require_effect(
                name, not self.likelihood, "is for drawing, and a likelihood is of images that are there"
            )

    def _require_effect(self, name: str, effect: bool, why: str) -> None:
        if getattr(self, name) is not None and not effect:
            raise ValueError(f"--{name} {why}; leave it out.")

    @property
    def of_fid(self) -> dict[str, Any]:
        """The fields of FidConfig that are given."""
        given = {name: getattr(self, f"fid_{name}") for name in ("extractor", "preset", "weights", "metrics")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def picture(self) -> str | None:
        """The picture that is wanted: samples, which is the grid, or another; None where it is something else."""
        chosen = [name for name in ("trajectory", "interpolate", "sweep") if getattr(self, name) and not self.fid]
        return chosen[0] if chosen else (None if self.num or self.likelihood else "samples")


@report_errors("sample.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Draw what the command line asks for."""
    texts = {"prog": "sample.py", "description": __doc__, "first": "checkpoint"}
    choices = {f"fid_{name}": names for name, names in fid.CHOICES.items()}
    args = parse(SampleArguments, argv, **texts, parts=assemble.parts(drawing=True), choices=choices)
    on_cpu = chosen_device(args.device) == "cpu"
    state = join_processes(on_cpu)  # while one process writes, the others wait
    drawing = make_drawing(args, state)
    if args.likelihood:
        measure_likelihood(drawing, args.out, args.num, args.data or {})
    elif args.num and args.sweep:
        measure_sweep(drawing, args)
    elif args.num:
        evaluator = evaluator_of(drawing.pipe.config.fid, args, state) if args.fid else None
        name = fid_file(drawing, args.num) if args.fid else "samples"
        draw_many(drawing, args, Path(args.out or drawing.pipe.folder / name), evaluator)
    elif state.is_main_process:
        options = {"num_columns": args.columns or 10, "swept_values": args.sweep, "sampler": args.sampler}
        draw_picture(drawing, args.picture, args.out, **options)
    state.wait_for_everyone()


def make_drawing(args: SampleArguments, state: PartialState) -> Drawing:
    """Load the model and its guide, and check all that can be checked before anything is drawn."""
    pipe = Pipeline.from_pretrained(args.checkpoint, **args.loading(), device=state.device)
    if args.likelihood:
        return Drawing(pipe, likelihood_settings(pipe.config, args), state)
    sampling, guide = with_options(pipe.config.sample, args), None
    pipe.label_ids(args.classes or [])
    negative = None if args.negative_class is None else find_class(args.negative_class, pipe.class_names)
    if args.guide:
        loading = args.loading() | {"weights": args.guide_weights or "ema", "process": None}
        guide = Pipeline.from_pretrained(args.guide, **loading, device=state.device)
    if sampling.cfg_scale == 1.0 and not args.sweep and any(getattr(args, name) for name in NEED_GUIDANCE):
        given = " and ".join(f"--{name}" for name in NEED_GUIDANCE if getattr(args, name))
        raise ValueError(f"cfg_scale is 1.0, which is no guidance; leave {given} out, or type --cfg_scale 4.")
    return Drawing(pipe, sampling, state, guide=guide, negative=negative, sweep=bool(args.sweep))


def measure_sweep(drawing: Drawing, args: SampleArguments) -> None:
    """Measure each value of --sweep as a command of its own would; then print a table of them, and draw the distances.

    All processes call this. What is measured already is taken from its record.
    """
    key, own = swept_name(args.sweep), drawing.pipe.config.sample
    picture = Path(args.out or drawing.pipe.folder / f"fid-{args.sweep.partition('=')[0].strip()}.png")
    if picture.suffix.lower() != ".png":
        raise ValueError(f"--out is {str(picture)!r}; with --fid and --sweep it is a .png of the distances.")
    if picture.exists() and not is_curve(picture):
        raise ValueError(f"{str(picture)!r} is there already, and is no picture of distances; choose another --out.")
    rows = []
    for label, sampling in swept(args.sweep, drawing.sampling, args.sampler):
        if sampling.cfg_scale == 1.0:  # where a command of its own may not name what needs guidance
            sampling = dataclasses.replace(sampling, **{name: getattr(own, name) for name in NEED_GUIDANCE})
        rows.append((label, drawing.with_settings(sampling)))  # all, before the first image is drawn
    evaluator, results = evaluator_of(drawing.pipe.config.fid, args, drawing.state), []
    for label, row in rows:
        more = "" if key in IN_FID_FILE else f"-{label.replace(' ', '-').replace('/', '-')}"
        evaluator.reset()
        results.append(draw_many(row, args, picture.parent / fid_file(row, args.num, more), evaluator))
    if drawing.state.is_main_process:
        print(table_of({label: result for (label, _), result in zip(rows, results, strict=True)}))
        fid.curve([result.to_dict() for result in results], picture, x=key)
        print(f"wrote {picture}")


def draw_many(drawing: Drawing, args: SampleArguments, out: Path, evaluator: fid.Evaluator | None) -> fid.Result | None:
    """Draw `num` images into files or the evaluator, as far as they are missing, and measure them.

    All processes call this; with an evaluator each gets the result.
    """
    pipe, state = drawing.pipe, drawing.state
    classes = pipe.label_ids(args.classes or [])
    label = functools.partial(label_of, args.labels, classes or range(len(pipe.class_names)), drawing.sampling.seed)
    settings = {**drawing.settings(), "labels": args.labels or "random", "classes": classes or "all"}
    writer = writer_of(out, args.num, state, pipe.info.image_size, evaluator)
    with alone_at(writer.record, out, is_main=state.is_main_process):
        if evaluator:
            check_measured(evaluator, out, args.num)
        if state.is_main_process:
            writer.open(settings)
        state.wait_for_everyone()
        missing = writer.missing()
        if evaluator and missing:
            evaluator.prepare()  # a broken reference is found before the images are drawn
        state.wait_for_everyone()  # all have looked before one writes
        before = time.perf_counter()
        draw_missing(drawing, writer, missing, label, args.batch_size or 64)
        rate, nfe = round(len(missing) / (time.perf_counter() - before), 3), drawing.nfe_of_all()
        if state.is_main_process:
            if missing:
                add_to_record(out, drawing.facts(nfe, images_per_second=rate, drawn_by_this_command=len(missing)))
            writer.finish([label(i) for i in range(args.num)])
        state.wait_for_everyone()
        result = measure(evaluator, out, args, drawing) if evaluator else None
        state.wait_for_everyone()
    if state.is_main_process and not missing:
        print(f"{out}: its {args.num} images are there already")
    elif state.is_main_process:
        drawing.add_evaluations(nfe)
        print(f"wrote {out}: {args.num} images, {drawing.title}; {rate:g} images/s")
    return result


def label_of(mode: str | None, classes: Sequence[int], seed: int, i: int) -> int:
    """Give the class of image i: by default random, or of the classes in turn."""
    return classes[i % len(classes) if mode == "balanced" else random_label(seed, i, len(classes))]


def draw_missing(
    drawing: Drawing, writer: Writer, missing: Sequence[int], label: Callable[[int], int], batch_size: int
) -> None:
    """Draw images by whole groups, and write about `batch_size` of them at once.

    All processes call this, and share them.
    """
    state, size, num = drawing.state, drawing.sampling.group_size, writer.num
    wanted, together = set(missing), max(1, batch_size // size)
    groups = sorted({i // size for i in wanted})[state.process_index :: state.num_processes]
    end_on_signals()
    bar = tqdm(desc="sample", unit="image", total=num, disable=not state.is_main_process)
    bar.update(num - len(wanted))
    try:
        for k in range(0, len(groups), together):
            images, indices = [], []
            for group in groups[k : k + together]:
                places = [i for i in range(size) if group * size + i in wanted]
                images.append(drawing.image_sampler.group(group, size, label, places))  # (places, H, W, 3)
                indices += [group * size + i for i in places]
            with uninterrupted():
                writer.write(indices, np.concatenate(images), [label(i) for i in indices])
            bar.update(min(len(indices) * state.num_processes, num - bar.n))
    except OSError as error:
        raise OSError(f"{error}. What was drawn is kept; run the same command to go on.") from error
    finally:  # whatever happens, these images need not be drawn again
        bar.close()
        if groups:
            writer.save()


def evaluator_of(config: FidConfig, args: SampleArguments, state: PartialState) -> fid.Evaluator:
    """Make the evaluator of the run's config, with what the command line says."""
    other = args.fid_extractor not in (None, config.extractor)  # than the run's, whose weights and metrics are not its
    measured = dataclasses.replace(FidConfig() if other else config, reference=args.fid, **args.of_fid)
    try:
        return fid.open_evaluator(**measured.evaluator_options(), device=state.device)
    except (ValueError, OSError) as error:  # which names an option of python -m fid
        raise type(error)(str(error).replace("--weights", "--fid_weights")) from None


def fid_file(drawing: Drawing, num: int, more: str = "") -> str:
    """Name the record of a measurement of images that are not kept; `more` is the rest of the name."""
    step, part = drawing.step, drawing.pipe.source["part"]
    weights = "" if step is None else f"step-{step:08d}-{f'{part}-' if part != 'ema' else ''}"
    cfg = f"cfg-{drawing.sampling.cfg_scale:g}"
    return f"fid-{weights}{drawing.drawn_by.replace(' ', '-')}-{cfg}-num-{num}{more}.json"


def measured_at(out: Path) -> Path:
    """Name the record of a measurement: `out` itself, or FILE.npz.fid.json, FOLDER.fid.json beside kept images."""
    return out if out.suffix.lower() == ".json" else out.with_name(out.name + ".fid.json")


def check_measured(evaluator: fid.Evaluator, out: Path, num: int) -> None:
    """Raise ValueError if another measurement stands where that of `out` will be written."""
    file = measured_at(out)
    if file.exists():
        record = fid.Result.from_json(file).record
        different = evaluator.differences(record) + ["num"] * (record["num_samples"] != num)
        if different:
            raise ValueError(
                f"{str(file)!r} holds another measurement: {', '.join(different)} differ; choose another --out, or "
                "move it."
            )


def measure(evaluator: fid.Evaluator, out: Path, args: SampleArguments, drawing: Drawing) -> fid.Result:
    """Compute the metrics of what was drawn, print them, and write their record to `out`, or beside kept images.

    Every process calls it. Kept images are read again, so that those of an earlier, interrupted command count, too;
    then the record is that which stands beside them.
    """
    file = measured_at(out)
    record = {"labels_mode": args.labels or "random", "quantize": "dit", "step": drawing.step}
    if known := file.exists():
        result = fid.Result.from_json(file)
    elif file == out:
        result = evaluator.compute(args.num, **record, sample=read_sample_record(out))
    else:
        result = fid.evaluate(str(out), num=args.num, evaluator=evaluator, record=record)
    if drawing.state.is_main_process:
        if not known:
            result.to_json(file)
        shutil.rmtree(partial_of(file), ignore_errors=True)
        for text in result.warnings:
            print(f"warning: {text}", file=sys.stderr)
        print(result)
    return result


if __name__ == "__main__":
    main()
