"""Pictures of what a trained model does. Now: its attention maps while it draws an image.

    python visualise.py runs/demo --maps                                 into runs/demo/maps, each as PNG and PDF
    python visualise.py runs/demo --maps --classes [3,8] --blocks [0,3] --heads [0,1,2] --times [0.9,0.5,0.1]
    python visualise.py runs/demo --maps --query [2,3] --out runs/maps   of the token in row 2, column 3

contrast-class-K-block-B-head-H-noise-T: where some contrast tokens look (Stage I), beside the image that the network
predicts at that noise level and the one that it ends with. query-class-K-block-B-head-H: which contrast tokens one
query uses (Stage II), and which tokens it reaches through them. layers: how large and how far apart the two streams of
each layer are, over depth, and over training where the run has snapshots. maps.json: how all of it was made.

The checkpoint is that of a model whose attention is vca or agent, as sample.py takes it.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from vca import Streams, VisualContrastAttention, contrast_layers, keep_inputs, maps_of, streams_of
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import FilePath, Spec, Strict
from vca_engine.config.schema import SampleConfig, Scale, Seed, require
from vca_engine.images.pictures import printable
from vca_engine.precision import chosen_device
from vca_engine.records import write_json
from vca_engine.sampling.figures import NARROW, WIDE, plot_rows, save_figure
from vca_engine.sampling.map_figures import Moment, contrast_rows, plot_streams, query_rows
from vca_engine.sampling.pipeline import Pipeline
from vca_engine.sampling.sample_record import alone_at, check_picture_record
from vca_engine.sampling.tables import on_the_way
from vca_engine.training.ema import name_of
from vca_engine.weights import checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class VisualiseArguments(Strict):
    """A model, and the maps of it that are wanted.

    Args:
        checkpoint: A run's folder, for its newest checkpoint, or one of its checkpoints/step-* folders; a folder that
            save_pretrained wrote. May stand first, without its name.
        maps: Draw attention maps.
        out: Folder of the pictures; not given means the folder maps in the run's folder.
        classes: Classes to draw an image of, by number or name; not given means the first one.
        blocks: Blocks, from 0; not given means the one in the middle.
        heads: Heads, from 0.
        times: Noise levels, 1 (noise) ... 0 (data); of each the evaluation of the network that is nearest.
        query: Row and column of the token whose maps of Stage II are drawn; not given means the one in the middle.
        weights: ema, the averaged weights; ema-0.05 and the like, the power-function averages; model, those of the last
            training step.
        seed: Of the images. Not given means as in the run's config, here and in what follows.
        sampler: Sampler by name with its options.
        cfg_scale: Guidance; 1 is none. The maps are those of the pass with the class.
        vae: Where the autoencoder is now, if not where it was in training.
        device: cuda or cpu; auto is the GPU if there is one.
    """

    checkpoint: FilePath
    maps: bool = False
    out: FilePath | None = None
    classes: list[str] | None = None
    blocks: list[int] | None = None
    heads: list[int] = dataclasses.field(default_factory=lambda: [0])
    times: list[float] = dataclasses.field(default_factory=lambda: [0.75, 0.5, 0.25])
    query: tuple[int, int] | None = None
    weights: str = "ema"
    seed: Seed | None = None
    sampler: Spec | None = None
    cfg_scale: Scale | None = None
    vae: FilePath | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.maps:
            raise ValueError("nothing to draw is named; type --maps.")
        assemble.check_sampler(self.sampler, "sampler")
        for name in ("classes", "blocks", "heads", "times"):
            require(getattr(self, name) != [], name, [], "name at least one, or leave it out")
        for level in self.times:
            require(0 <= level <= 1, "times", level, "choose noise levels from 0 (data) to 1 (noise)")


@report_errors("visualise.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the maps of the command line."""
    texts = {"prog": "visualise.py", "description": __doc__}
    args = parse(VisualiseArguments, argv, **texts, first="checkpoint", parts=assemble.parts())
    device = chosen_device(args.device)
    if Path(args.checkpoint).is_file():
        raise ValueError(
            f"{args.checkpoint!r} is a file, as published weights are, and these have no contrast tokens: their "
            "attention is mhsa. Give a run of train.py with attention vca or agent."
        )
    pipe = Pipeline.from_pretrained(args.checkpoint, weights=args.weights, vae=args.vae, device=device)
    layers = chosen_layers(pipe, args.blocks, args.heads)
    query = chosen_query(pipe.network.grid_size, args.query)
    sampling = pipe.config.sample.changed(sampler=args.sampler, cfg_scale=args.cfg_scale, seed=args.seed)
    labels, heads = (list(dict.fromkeys(many)) for many in (pipe.label_ids(args.classes or [0]), args.heads))
    folder = Path(args.out or pipe.folder / "maps")
    file, written = folder / "maps.json", []
    with alone_at(file, folder):
        check_picture_record(file)
        images, moments, nfe = watch_drawing(pipe, sampling, labels, layers, args.times)
        for name, figure in figures(pipe, images, moments, labels, heads, query):
            save_figure(figure, folder / name)
            written.append(name)
        record = {
            "picture": "maps",
            "figures": written,
            "classes": labels,
            "blocks": sorted(layers),
            "heads": heads,
            "noise_levels": [moment.level for moment in moments],
            "query": query,
            **pipe.settings(sampling),
            "nfe": nfe,
            **pipe.facts(),
        }
        write_json(file, record)
    levels = ", ".join(f"{moment.level:.2f}" for moment in moments)
    print(f"wrote {len(written)} figures, each as PNG and PDF, to {folder}; noise levels {levels}")


def chosen_layers(
    pipe: Pipeline, blocks: Sequence[int] | None, heads: Sequence[int]
) -> dict[int, VisualContrastAttention]:
    """Find the layer of each block.

    Raises:
        ValueError: A model without contrast tokens, or a block or head that it has not.
    """
    layers = list(contrast_layers(pipe.network).values())
    blocks = [len(layers) // 2] if blocks is None else blocks
    for name, given, count in (("block", blocks, len(layers)), ("head", heads, layers[0].num_heads)):
        for number in given:
            require(0 <= number < count, name, number, f"this model has the {name}s 0 ... {count - 1}")
    return {block: layers[block] for block in blocks}


def chosen_query(grid: tuple[int, int], query: tuple[int, int] | None) -> tuple[int, int]:
    """Give row and column of a token; not given means in the middle.

    Raises:
        ValueError: The grid has no such token.
    """
    row, column = query or (grid[0] // 2, grid[1] // 2)
    there = 0 <= row < grid[0] and 0 <= column < grid[1]
    require(there, "query", query, f"choose a row 0 ... {grid[0] - 1} and a column 0 ... {grid[1] - 1} of the tokens")
    return row, column


def watch_drawing(
    pipe: Pipeline,
    sampling: SampleConfig,
    labels: Sequence[int],
    layers: dict[int, VisualContrastAttention],
    times: Sequence[float],
) -> tuple[np.ndarray, list[Moment], float]:
    """Draw image i of label i, and keep what some layers did at the evaluations nearest to some noise levels.

    Returns:
        The images, (K, H, W, 3) uint8; a moment for each of `times`, from noise to data; and the evaluations an image.

    Raises:
        ValueError: Two of the times have the same nearest evaluation, to two digits.
    """
    image_sampler = pipe.image_sampler(sampling)
    nearest: dict[float, tuple[float, Tensor, Tensor, dict[int, Tensor]]] = {}

    with keep_inputs(layers) as inputs:

        def keep(level: float, x_t: Tensor, t: Tensor, output: Tensor) -> None:
            for wanted in times:
                if wanted not in nearest or abs(level - wanted) < abs(nearest[wanted][0] - wanted):
                    # with guidance the batch is twice as large; the pass with the class comes first
                    mine = {block: x[: len(labels)] for block, x in inputs.items()}
                    nearest[wanted] = level, x_t, pipe.process.clean(output, x_t, t), mine

        watch = on_the_way(pipe.process.noise_level, keep)
        images = image_sampler.images(image_sampler.latents(labels, range(len(labels)), watch=watch))
    moments: list[Moment] = []
    for wanted in sorted(nearest, reverse=True):
        level, x_t, clean, mine = nearest[wanted]
        if moments and f"{moments[-1].level:.2f}" == f"{level:.2f}":  # as the figures and their files call them
            raise ValueError(
                f"times has {wanted:g}, but the evaluation of the network that is nearest to it, at {level:.2f}, is "
                "already that of another of them; leave it out, or choose a sampler with more steps."
            )
        maps = {block: maps_of(layers[block], x) for block, x in mine.items()}
        moments.append(Moment(level, image_sampler.images(x_t), image_sampler.images(clean), maps))
    return images, moments, image_sampler.nfe


def figures(
    pipe: Pipeline,
    images: np.ndarray,
    moments: Sequence[Moment],
    labels: Sequence[int],
    heads: Sequence[int],
    query: tuple[int, int],
) -> Iterator[tuple[str, "Figure"]]:
    """Make all figures of images (B, H, W, 3), each with the name of its file without the ending."""
    for (i, label), block, head in itertools.product(enumerate(labels), moments[0].maps, heads):
        name = f"class-{label}-block-{block}-head-{head}"
        title = f"class {printable(pipe.class_names[label].split(',')[0])}, block {block}, head {head}"
        for moment in moments:
            level = f"{moment.level:.2f}"
            pictures = {"input": moment.noisy[i], "predicted": moment.predicted[i], "drawn": images[i]}
            rows = contrast_rows(moment.maps[block], i, head, pictures)
            yield f"contrast-{name}-noise-{level}", plot_rows(rows, WIDE, f"{title}, noise level {level}")
        width = NARROW if len(moments) < 4 else WIDE
        yield f"query-{name}", plot_rows(query_rows(moments, block, i, head, query), width, title)
    over_depth = [streams_of(layer) for layer in contrast_layers(pipe.network).values()]
    if any(number is not None for number in dataclasses.astuple(over_depth[0])):  # of an agent there is nothing to tell
        training = over_training(pipe)
        yield "layers", plot_streams(over_depth, training if len(training) > 1 else [])


def over_training(pipe: Pipeline) -> list[tuple[int, list[Streams]]]:
    """Read step and streams of each layer from the narrowest average in each snapshot of the run, if it is one."""
    folder, found = Path(pipe.source["path"]), []
    if folder.parent.name not in (checkpoint.CHECKPOINTS, checkpoint.SNAPSHOTS):
        return []
    network = copy.deepcopy(pipe.network)
    for snapshot in checkpoint.steps(folder.parent.parent, checkpoint.SNAPSHOTS):
        record = checkpoint.read_record(snapshot)
        checkpoint.load_exactly(network, checkpoint.read(snapshot, name_of(min(record["ema_stds"]))), snapshot)
        found.append((record["step"], [streams_of(layer) for layer in contrast_layers(network).values()]))
    return found


if __name__ == "__main__":
    main()
