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
    python sample.py runs/demo --likelihood                     bits per dimension of a flow

The checkpoint is a run or one of its checkpoints, a .pt of the published DiT or SiT, a folder of diffusers' DiT, or a name
on the Hugging Face hub. Of --num images, number i is a function of (checkpoint, settings, seed, i) and nothing else, bit
for bit on one kind of device, whatever the batch size and the number of processes; run the same command again to go on
where it stopped. Beside each output stands a record of how it was made.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

import fid
import vca
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import Spec, Strict, Word, from_dict
from vca_engine.config.schema import Config, SampleConfig, require, to_dict
from vca_engine.files import write_text
from vca_engine.images.pictures import save_picture
from vca_engine.sampling.classes import random_label, spread
from vca_engine.sampling.likelihood import bits_of, unit
from vca_engine.sampling.pictures import Table, class_grid, interpolations, trajectories
from vca_engine.sampling.pipeline import Pipeline, chosen_device
from vca_engine.sampling.writers import EvaluatorSink, note, open_sink, partial_of, read_notes, same_as_before
from vca_engine.signals import end_on_sigterm, uninterrupted

ALL_DRAWN = ("samples", "trajectory", "interpolate", "sweep", "num")
ONLY_FOR = {  # option -> what it is for; samples is a grid
    "per_class": ("samples",),
    "columns": ("trajectory", "interpolate"),
    "labels": ("num",),
    "batch_size": ("num",),
    "data": ("likelihood",),
    **dict.fromkeys(("classes", "guided_channels", "guidance_interval", "negative_class", "guide"), ALL_DRAWN),
}
SHORT = {"cfg": "cfg_scale", "steps": "sampler.num_steps"}  # of --sweep


@dataclass(frozen=True)
class Arguments(Strict):
    """What to draw.

    Args:
        checkpoint: A run's folder, for its newest checkpoint, or one of its checkpoints/step-* folders; a published .pt; a
            folder of diffusers' DiT; a name on the hub. May stand first, without its name.
        num: Number of images; not given draws a grid.
        out: Grid and other pictures: a .png or .gif file, else samples.png, trajectory.png, ... in the run's folder. With
            num: a folder for PNG files, or a file.npz or file.npy, else the folder samples in the run's folder. With fid:
            also a file.json for the record alone, which is the default (fid-step-STEP-SAMPLER-cfg-SCALE-num-NUM.json in the
            run's folder); then no image is kept. With likelihood: a file.json.
        cfg_scale: Guidance; 1 is none. Not given means as in the run's config, here and in what follows.
        guided_channels: Guide the first channels only.
        guidance_interval: Noise levels, 0 (data) ... 1 (noise), at which there is guidance, e.g. [0,0.7].
        negative_class: A class, by number or name, to be guided away from, instead of no class; with a guide, the guide's.
        guide: A worse checkpoint to be guided away from (autoguidance), with cfg_scale.
        guide_weights: Its weights: ema, by default, ...
        sampler: Sampler by name with its options.
        classes: Classes to draw, by number or name, e.g. [3,7] or [goldfish,tench]; not given means all, for a grid or a
            sweep as in the run's config, or 10 evenly spaced ones, and for a trajectory or an interpolation the first one.
        labels: With num, labels that are uniformly random, as for published FIDs and by default, or balanced, the classes
            in turn.
        per_class: Images of each class in a grid.
        seed: Of all that is drawn.
        batch_size: With num, images that each process hands over at once to the disk or the evaluator, at least a group; 64
            by default. It is group_size that decides how many are drawn at once.
        group_size: Images drawn together; see the config. Another one changes images by rounding.
        trajectory: Draw the way of an image of each of the classes from noise to data, and below it the predicted clean
            image.
        interpolate: Draw the way from the first noise of this seed to that of the next; what a sampler draws later is the
            same.
        columns: Columns of these two, 10 by default.
        sweep: A grid over a setting, a row each value, e.g. cfg=1,1.5,4, steps=10,50,250, seed=0,1,
            sampler.method=euler,heun.
        likelihood: Of real images under a flow, in bits per dimension, of as many as num says, else of 1000.
        data: Those images, if not the ones of training, e.g. --data.images DIR, --data.split test.
        weights: ema, the averaged weights; ema-0.05 and the like, the power-function averages; model, those of the last
            training step.
        process: diffusion or flow, with its options, where published weights do not say it.
        fid: With num, measure the images against this reference: a file of statistics, or images.
        fid_extractor: Network of the features, e.g. inception or dinov2, python -m fid eval --help lists them; not given
            means as in the run's config.
        fid_preset: Protocol of Inception, e.g. adm or clean, likewise.
        fid_weights: Its file of weights; not given means as in the run's config.
        fid_metrics: Names of metrics, e.g. [fid,is]; not given means as in the run's config.
        vae: Where the autoencoder is now, if not where it was in training, or for published weights another than theirs.
        precision: no, the weights' float32, or bf16.
        tf32: Let GPUs round the inputs of float32 products to TF32.
        compile: Compile each block with torch.compile.
        device: cuda or cpu; auto is the GPU if there is one.
    """

    checkpoint: str
    num: int | None = None
    out: str | None = None
    cfg_scale: float | None = None
    guided_channels: int | None = None
    guidance_interval: tuple[float, float] | None = None
    negative_class: str | None = None
    guide: str | None = None
    guide_weights: str | None = None
    sampler: Spec | None = None
    classes: list[str] | str | None = None
    labels: Literal["random", "balanced"] | None = None
    per_class: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    group_size: int | None = None
    trajectory: bool = False
    interpolate: bool = False
    columns: int | None = None
    sweep: str | None = None
    likelihood: bool = False
    data: Spec | None = None
    weights: str = "ema"
    process: Spec | None = None
    fid: str | None = None
    fid_extractor: str | None = None
    fid_preset: str | None = None
    fid_weights: str | None = None
    fid_metrics: list[str] | None = None
    vae: str | None = None
    precision: Literal["no", "bf16"] = "no"
    tf32: bool = True
    compile: bool = False
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def __post_init__(self) -> None:
        require(self.num is None or self.num > 0, "num", self.num, "choose at least 1 image")
        require(self.seed is None or self.seed >= 0, "seed", self.seed, "choose at least 0")
        require(self.classes not in ([], ""), "classes", self.classes, "name at least one class, or leave it out")
        require(self.batch_size is None or self.batch_size > 0, "batch_size", self.batch_size, "choose at least 1")
        require(self.columns is None or self.columns > 1, "columns", self.columns, "choose at least 2")
        require(self.fid is None or self.num is not None, "fid", self.fid, "say of how many images with --num")
        require(self.fid is None or self.num > 1, "num", self.num, "a distance needs at least 2 images")
        chosen = [name for name in ("trajectory", "interpolate", "sweep", "likelihood", "fid") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"--{chosen[0]} and --{chosen[1]} are two different things; choose one.")
        if self.num is not None and chosen and chosen[0] not in ("likelihood", "fid"):
            raise ValueError(f"--{chosen[0]} draws a picture, and --num many images; choose one.")
        kind = "likelihood" if self.likelihood else self.picture or "num"
        for name, kinds in ONLY_FOR.items():
            if getattr(self, name) is not None and kind not in kinds:
                raise ValueError(f"--{name} changes nothing here: it is for {' and '.join(kinds)}; leave it out.")
        if self.guide_weights and not self.guide:
            raise ValueError("--guide_weights is given, but no --guide; leave it out.")

    @property
    def picture(self) -> str | None:
        """What picture is wanted; None where it is something else."""
        chosen = [name for name in ("trajectory", "interpolate", "sweep") if getattr(self, name)]
        return chosen[0] if chosen else (None if self.num or self.likelihood else "samples")


@report_errors("sample.py")
def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    texts = {"prog": "sample.py", "description": __doc__, "epilog": assemble.sampler_help()}
    args = parse(Arguments, argv, **texts, first="checkpoint", parts=assemble.PARTS)
    if args.fid_extractor is not None:
        vca.lookup(fid.EXTRACTORS, args.fid_extractor, "fid_extractor")
    if args.fid_preset is not None:
        vca.lookup(fid.PRESETS, args.fid_preset, "fid_preset")
    on_cpu = chosen_device(args.device) == "cpu"
    state = PartialState(cpu=on_cpu, timeout=timedelta(hours=2))  # while one process writes, the others wait
    sampling = Sampling(args, state)
    if args.likelihood:
        sampling.measure_likelihood()
    elif args.num:
        sampling.draw_many()
    elif state.is_main_process:
        sampling.draw_picture()
    state.wait_for_everyone()


class Sampling:
    """What the arguments ask for, built and checked before anything is drawn."""

    def __init__(self, args: Arguments, state: PartialState) -> None:
        self.args, self.state, self.started = args, state, time.perf_counter()
        pipe = self.pipe = self._load(args.checkpoint, args.weights, args.process)
        sample = self.sample = with_arguments(pipe.config.sample, args)
        if args.likelihood:
            sample = self.sample = _for_likelihood(pipe, sample, args)
        self.config = to_measure(pipe.config, args)
        words = args.classes
        if isinstance(words, str):  # a name with a comma, or several
            words = [words] if words in pipe.class_names else words.split(",")
        self.classes = None if words is None else pipe.label_ids(words)
        self.others = {
            "negative": None if args.negative_class is None else pipe.label_ids([args.negative_class])[0],
            "guide": self._load(args.guide, args.guide_weights or "ema") if args.guide else None,
        }
        if sample.cfg_scale == 1.0 and not args.sweep and (args.guided_channels or args.guidance_interval):
            raise ValueError(
                "cfg_scale is 1.0, which is no guidance; leave --guided_channels and --guidance_interval out."
            )
        self.drawer = pipe.drawer(sample, **({} if args.sweep else self.others))  # checks sampler and guidance
        self.step = pipe.origin.get("step")
        sampler = assemble.describe_sampling(dataclasses.replace(pipe.config, sample=sample))["sampler"]
        words = [sampler["name"], *([sampler["method"]] if sampler["name"] == "ode" else []), sampler["num_steps"]]
        self.drawn_by = " ".join(map(str, words))
        self.caption = {"step": f"step {self.step}"} if self.step is not None else {}
        self.caption |= {"weights": pipe.origin["part"]} if pipe.origin["part"] != "ema" else {}
        self.caption |= {
            "sampler": self.drawn_by,
            "cfg_scale": f"cfg {sample.cfg_scale:g}",
            "seed": f"seed {sample.seed}",
        }

    @property
    def title(self) -> str:
        """What is written above a picture, and on the terminal."""
        return ", ".join(self.caption.values())

    def _load(self, path: str, weights: str, process: Spec | None = None) -> Pipeline:
        names = ("vae", "precision", "tf32", "compile")
        options = {name: getattr(self.args, name) for name in names}
        return Pipeline.from_pretrained(path, weights=weights, process=process, device=self.state.device, **options)

    def settings(self) -> dict[str, Any]:
        """What, beside its number and label, makes an image what it is; of the main process, the only one that asks."""
        return self.pipe.settings(self.sample, **self.others) if self.state.is_main_process else {}

    def facts(self, nfe: float | None, **more: Any) -> dict[str, Any]:
        """What else the record says."""
        times = {
            "seconds": round(time.perf_counter() - self.started, 3),
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        }
        guide = {"guide_checkpoint": self.others["guide"].origin} if self.others["guide"] else {}
        return {"nfe": nfe, **more, **times, "num_processes": self.state.num_processes, **self.pipe.facts(), **guide}

    def draw_picture(self) -> None:
        """A grid, a trajectory, an interpolation or a sweep, with its record beside it and in it."""
        args, sample, pipe, drawer = self.args, self.sample, self.pipe, self.drawer
        out = Path(args.out or pipe.folder / f"{args.picture}.png")
        if out.suffix.lower() not in (".png", ".gif"):
            raise ValueError(
                f"--out is {args.out!r}; a picture is a .png or a .gif. With --num, it is a folder, or ends in .npz or .npy."
            )
        file = out.with_suffix(".json" if out.suffix.lower() == ".png" else ".gif.json")
        if file.exists() and "picture" not in _read_json(file):
            raise ValueError(
                f"{str(file)!r}, where the record would stand, is of something else; choose another --out."
            )
        if out.exists() and not file.exists():
            raise ValueError(f"{str(out)!r} is there already and was not made by sample.py; choose another --out.")
        labels, names = self.classes or pipe.label_ids(sample.classes or []), pipe.class_names
        columns, what = args.columns or 10, {"picture": args.picture, "classes": labels}
        labels = labels or (spread(range(len(names))) if args.picture in ("samples", "sweep") else [0])
        before = time.perf_counter()
        if args.picture == "sweep":
            self.caption.pop(swept_name(args.sweep).split(".")[0], None)
            table, rows = self._sweep(labels)
            what |= {"sweep": args.sweep, "rows": rows}
        elif args.picture == "interpolate":
            self.caption["seed"] += f" to {sample.seed + 1}"
            table = interpolations(drawer, labels, names, (sample.seed, sample.seed + 1), columns)
        elif args.picture == "trajectory":
            self.caption["seed"] += "; columns are noise levels"
            table = trajectories(drawer, pipe.process.clean, labels, names, columns)
        else:
            table = class_grid(drawer, labels, names, sample.per_class, sample.group_size)
        rate = round(drawer.drawn / (time.perf_counter() - before), 3)
        frames = table.frames(self.title, animated=out.suffix.lower() == ".gif")
        nfe = drawer.nfe
        settings = {key: value for key, value in self.settings().items() if key not in what.get("rows", [{}])[0]}
        facts = self.facts(nfe, num=drawer.drawn, images_per_second=rate)
        text = json.dumps({**what, **settings, **facts}, indent=2)
        save_picture(frames, out, text, milliseconds=1000 if args.picture == "sweep" else 250)
        write_text(file, text)
        each = ", ".join(f"{row['nfe']:g}" for row in what.get("rows", [{"nfe": nfe}]))
        print(f"wrote {out}: {self.title}; {each} network evaluations an image")

    def _sweep(self, labels: list[int]) -> tuple[Table, list[dict[str, Any]]]:
        """A row for each value of the setting, a column for each label, all with the same noise; and how each was drawn."""
        images, rows = [], []
        for name, sample in tqdm(swept(self.args.sweep, self.sample, self.args), desc="sweep", unit="value"):
            drawer = self.pipe.drawer(sample, **(self.others if sample.cfg_scale != 1.0 else {}))
            images.append(drawer.all(labels, sample.group_size))
            config = dataclasses.replace(self.pipe.config, sample=sample)
            rows.append({"row": name, **assemble.describe_sampling(config), "nfe": drawer.nfe})
            self.drawer.evaluations += drawer.evaluations
            self.drawer.drawn += drawer.drawn
        names = [row["row"] for row in rows]
        return Table(
            np.stack(images), names, [self.pipe.class_names[k].split(",")[0] for k in labels], film="rows"
        ), rows

    def draw_many(self) -> None:
        """`num` numbered images into files or into the evaluator, those that are not there yet. All processes call this."""
        args, state, size = self.args, self.state, self.sample.group_size
        settings = {**self.settings(), "labels": args.labels or "random", "classes": self.classes or "all"}
        evaluator = self._evaluator() if args.fid else None
        if evaluator:
            check_measured(evaluator, self._place(), args.num)
        sink = open_sink(self._place(), args.num, settings, state, self.pipe.shape.image_size, evaluator)
        missing = set(sink.missing())
        if evaluator and missing:
            evaluator.prepare()  # a broken reference is found before the images are drawn
        state.wait_for_everyone()  # all have looked before one writes
        groups = sorted({i // size for i in missing})[state.process_index :: state.num_processes]
        together, before = max(1, (args.batch_size or 64) // size), time.perf_counter()
        end_on_sigterm()
        bar = tqdm(desc="sample", unit="image", total=args.num, disable=not state.is_main_process)
        bar.update(args.num - len(missing))
        try:
            for k in range(0, len(groups), together):
                images, indices = [], []
                for group in groups[k : k + together]:
                    places = [i for i in range(size) if group * size + i in missing]
                    images.append(self.drawer.group(group, size, self._label, places))
                    indices += [group * size + i for i in places]
                with uninterrupted():
                    sink.write(indices, np.concatenate(images), [self._label(i) for i in indices])
                bar.update(min(len(indices) * state.num_processes, args.num - bar.n))
        except OSError as error:
            raise OSError(f"{error}. What was drawn is kept; run the same command to go on.") from error
        finally:  # whatever happens, these images need not be drawn again
            bar.close()
            if isinstance(sink, EvaluatorSink) and groups:
                sink.save()
        rate = round(len(missing) / (time.perf_counter() - before), 3)
        nfe, out = self._nfe(), sink.file
        if state.is_main_process:
            if missing:
                note(out, self.facts(nfe, images_per_second=rate, drawn_by_this_command=len(missing)))
            sink.finish([self._label(i) for i in range(args.num)])
        state.wait_for_everyone()
        if evaluator:
            measure(evaluator, out, args, self.step)
        if state.is_main_process and not missing:
            print(f"{out}: its {args.num} images are there already")
        elif state.is_main_process:
            drawn = f"{nfe:g} network evaluations an image, {rate:g} images/s"
            print(f"wrote {out}: {args.num} images, {self.title}; {drawn}")

    def _evaluator(self) -> fid.Evaluator:
        try:
            c = self.config.fid
            return fid.open_evaluator(
                c.reference,
                c.extractor,
                weights=c.weights,
                preset=c.preset,
                metrics=c.metrics,
                device=self.state.device,
            )
        except (ValueError, OSError) as error:  # which names an option of python -m fid
            raise type(error)(str(error).replace("--weights", "--fid_weights")) from None

    def _place(self) -> Path:
        name = "samples"
        if self.args.fid:
            step = "" if self.step is None else f"step-{self.step:08d}-"
            name = f"fid-{step}{self.drawn_by.replace(' ', '-')}-cfg-{self.sample.cfg_scale:g}-num-{self.args.num}.json"
        return Path(self.args.out or self.pipe.folder / name)

    def _label(self, i: int) -> int:
        """The class of image i."""
        classes = self.classes or range(self.pipe.network.num_classes)
        if self.args.labels == "balanced":
            return classes[i % len(classes)]
        return classes[random_label(self.sample.seed, i, len(classes))]

    def _nfe(self) -> float | None:
        """Network evaluations an image, over all processes, which all call this."""
        evaluations, drawn = np.array(gather_object([(self.drawer.evaluations, self.drawer.drawn)])).sum(axis=0)
        return float(evaluations / drawn) if drawn else None

    def measure_likelihood(self) -> None:
        """Bits per dimension of real images under the flow, printed and stored. All processes call this."""
        args, state, pipe, size = self.args, self.state, self.pipe, self.sample.group_size
        out = Path(args.out or pipe.folder / "likelihood.json")
        if out.suffix != ".json":
            raise ValueError(f"--out is {args.out!r}; a likelihood is a .json file.")
        data = args.data or {}
        spec = data if "name" in data else {**pipe.config.data, **data}
        images = assemble.images(dataclasses.replace(pipe.config, data=spec))
        if (images.image_size, images.class_names) != (pipe.shape.image_size, pipe.class_names):
            raise ValueError(
                f"the images have {images.image_size} pixels and {images.num_classes} classes, the model "
                f"{pipe.shape.image_size} and {len(pipe.class_names)}, or the classes have other names."
            )
        num = min(args.num or 1000, len(images))
        if args.num and args.num > num and state.is_main_process:
            print(f"there are {num} images, not {args.num}", file=sys.stderr)
        settings = {key: value for key, value in self.settings().items() if key != "quantize"}  # no pixel is made
        asked = {"of": unit(pipe.codec), "num": num, "data": spec, **settings}
        if state.is_main_process and out.exists():
            same_as_before(out, asked, out)
            print(f"{out}: {_read_json(out)['bits_per_dim']:.3f} bits per dimension, measured before")
        state.wait_for_everyone()
        if out.exists():
            return
        indices = np.linspace(0, len(images) - 1, num).round().astype(int).tolist()
        batches = [indices[k : k + size] for k in range(0, num, size)][state.process_index :: state.num_processes]
        found = {}
        for batch in tqdm(batches, desc="likelihood", unit="batch", disable=not state.is_main_process):
            bits = bits_of(images, batch, self.drawer, self.drawer.sample.bits_per_dim, pipe.codec)
            found |= dict(zip(batch, bits, strict=True))
        found = {i: bits for part in gather_object([found]) for i, bits in part.items()}
        nfe, values = self._nfe(), np.array([found[i] for i in indices])
        if state.is_main_process:
            error = values.std(ddof=1) / num**0.5 if num > 1 else None
            result = {"bits_per_dim": values.mean(), "standard_error": error, **asked, **self.facts(nfe)}
            each = {"images": indices, "bits_per_dim_of_each": values.tolist()}
            write_text(out, json.dumps({**result, **each}, indent=2))
            plus = "" if error is None else f" ± {error:.3f}"
            print(
                f"{values.mean():.3f}{plus} bits per dimension of {unit(pipe.codec)} ({num} images, {nfe:g} network "
                "evaluations each)"
            )
            print(f"wrote {out}")


def with_arguments(sample: SampleConfig, args: Arguments) -> SampleConfig:
    """The run's settings of drawing with what the command line says."""
    names = ("cfg_scale", "guided_channels", "guidance_interval", "sampler", "per_class", "seed", "group_size")
    return sample.changed(**{name: getattr(args, name) for name in names})


def _for_likelihood(pipe: Pipeline, sample: SampleConfig, args: Arguments) -> SampleConfig:
    """The same without guidance, and by the ODE with its own defaults: what is good enough to draw is not to measure."""
    if pipe.config.process["name"] != "flow":
        raise ValueError("--likelihood integrates the ODE of a flow, and this model is a diffusion.")
    if args.cfg_scale not in (None, 1.0):
        raise ValueError(f"cfg_scale is {args.cfg_scale}; a guided flow has no likelihood, so leave it out.")
    spec = {"name": "ode", **(args.sampler or {})}
    if spec["name"] != "ode":
        raise ValueError(f"sampler.name is {spec['name']!r}; a likelihood needs ode.")
    return dataclasses.replace(sample, sampler=spec, cfg_scale=1.0, guided_channels=None, guidance_interval=None)


def swept_name(text: str) -> str:
    """The setting of `KEY=V1,V2,...`."""
    key = text.partition("=")[0].strip()
    return SHORT.get(key, key)


def swept(text: str, sample: SampleConfig, args: Arguments) -> list[tuple[str, SampleConfig]]:
    """What `--sweep KEY=V1,V2,...` means: a label and the settings for each value."""
    key, _, values = text.partition("=")
    name = swept_name(text)
    allowed = ("cfg_scale", "guided_channels", "seed", "group_size", "sampler")
    if name.split(".")[0] not in allowed or not values.strip(" ,"):
        raise ValueError(
            f"--sweep is {text!r}; write a setting and its values, e.g. cfg=1,1.5,4. Settings: {', '.join(SHORT)}, "
            f"{', '.join(allowed)}.name, sampler.OPTION."
        )
    found = []
    for word in values.strip(" ,").split(","):
        value, fields = Word(word.strip()), to_dict(sample)
        if name in ("sampler", "sampler.name"):  # each with the options that were given beside, and else its own
            fields["sampler"] = {**(args.sampler or {}), "name": value}
        elif name.startswith("sampler."):
            fields["sampler"] = {**(sample.sampler or {}), name.partition(".")[2]: value}
        else:
            fields[name] = value
        label = f"{key.strip().rpartition('.')[2]} {word.strip()}"
        found.append((label, from_dict(SampleConfig, fields, "--sweep", assemble.PARTS)))
    return found


def to_measure(config: Config, args: Arguments) -> Config:
    """The run's config with what the command line says of measuring."""
    names = ("extractor", "preset", "weights", "metrics")
    measured = {name: getattr(args, f"fid_{name}") for name in names if getattr(args, f"fid_{name}") is not None}
    if args.fid is not None:
        measured["reference"] = args.fid
    elif measured:
        raise ValueError(f"fid_{next(iter(measured))} is given, but no reference; name it with --fid.")
    return dataclasses.replace(config, fid=dataclasses.replace(config.fid, **measured))


def check_measured(evaluator: fid.Evaluator, out: Path, num: int) -> None:
    """Raise ValueError if another measurement stands where that of `out` will be written."""
    file = measured_at(out)
    if file.exists():
        record = fid.Result.from_json(file).record
        different = evaluator.differences(record) + ["num"] * (record["num_samples"] != num)
        if different:
            raise ValueError(
                f"{str(file)!r} holds another measurement: {', '.join(different)} differ; choose another --out, or move it."
            )


def measured_at(out: Path) -> Path:
    """Where the record of a measurement is: `out` itself, or FILE.npz.fid.json, FOLDER.fid.json beside kept images."""
    return out if out.suffix == ".json" else out.with_name(out.name + ".fid.json")


def measure(evaluator: fid.Evaluator, out: Path, args: Arguments, step: int | None) -> None:
    """Compute the metrics of what was drawn, print them, and write their record to `out`, or beside kept images.

    Every process calls it. Kept images are read again, so that those of an earlier, interrupted command count, too; then the
    record is that which stands beside them.
    """
    file, record = measured_at(out), {"labels_mode": args.labels or "random", "quantize": "dit", "step": step}
    if known := file.exists():
        result = fid.Result.from_json(file)
    elif file == out:
        result = evaluator.compute(args.num, **record, sample=read_notes(out))
    else:
        result = fid.evaluate(str(out), num=args.num, evaluator=evaluator, record=record)
    if PartialState().is_main_process:
        if not known:
            result.to_json(file)
        shutil.rmtree(partial_of(file), ignore_errors=True)
        for text in result.warnings:
            print(f"warning: {text}", file=sys.stderr)
        print(result)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    main()
