"""Pictures of what a trained model does. Now: its attention maps while it draws an image.

    python visualise.py runs/demo --maps                                 into runs/demo/maps, each as PNG and PDF
    python visualise.py runs/demo --maps --classes [3,8] --blocks [0,3] --heads [0,1,2] --times [0.9,0.5,0.1]
    python visualise.py runs/demo --maps --query [2,3] --out runs/maps   of the token in row 2, column 3

contrast-class-K-block-B-head-H-noise-T: where some contrast tokens look (Stage I), beside the image that the network
predicts at that noise level and the one that it ends with. query-class-K-block-B-head-H: which contrast tokens one query
uses (Stage II), and which tokens it reaches through them. layers: how large and how far apart the two streams of each layer
are, over depth, and over training where the run has snapshots. maps.json: how all of it was made.

The checkpoint is that of a model whose attention is vca or agent, as sample.py takes it.
"""

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from torch import Tensor

from vca import Maps, Streams, VisualContrastAttention, contrast_layers, keep_inputs, lambda_init, maps_of, streams_of
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import Spec, Strict
from vca_engine.config.schema import SampleConfig, require
from vca_engine.files import write_text
from vca_engine.sampling.figures import NARROW, WIDE, Panel, Row, draw_rows, new_figure, save_figure, styled
from vca_engine.sampling.pictures import on_the_way
from vca_engine.sampling.pipeline import Pipeline, chosen_device
from vca_engine.training.ema import name_of
from vca_engine.weights import checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = {  # axis -> field of `Streams` -> how it is called
    "root mean square": {"positive": "$e^+$", "negative": "$e^-$"},
    "cosine of $e^+$ and $e^-$": {"cosine": ""},
    r"$\lambda$": {"lambda1": r"$\lambda_1$", "lambda2": r"$\lambda_2$"},
}


@dataclass(frozen=True)
class Arguments(Strict):
    """What to look at.

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

    checkpoint: str
    maps: bool = False
    out: str | None = None
    classes: list[str] | None = None
    blocks: list[int] | None = None
    heads: list[int] = dataclasses.field(default_factory=lambda: [0])
    times: list[float] = dataclasses.field(default_factory=lambda: [0.75, 0.5, 0.25])
    query: tuple[int, int] | None = None
    weights: str = "ema"
    seed: int | None = None
    sampler: Spec | None = None
    cfg_scale: float | None = None
    vae: str | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def __post_init__(self) -> None:
        require(self.maps, "maps", self.maps, "there is nothing else to draw yet: add --maps")
        for name in ("classes", "blocks", "heads", "times"):
            require(getattr(self, name) != [], name, [], "name at least one, or leave it out")
        for level in self.times:
            require(0 <= level <= 1, "times", level, "choose noise levels from 0 (data) to 1 (noise)")


class Moment(NamedTuple):
    """What the network did at one evaluation.

    Attributes:
        level: Noise level, 1 (noise) ... 0 (data).
        noisy: What it was given, decoded, (K, H, W, 3) uint8.
        predicted: The clean images that it predicts.
        maps: Of each block that was asked for.
    """

    level: float
    noisy: np.ndarray
    predicted: np.ndarray
    maps: dict[int, Maps]


@report_errors("visualise.py")
def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    args = parse(Arguments, argv, prog="visualise.py", description=__doc__, first="checkpoint", parts=assemble.PARTS)
    device = chosen_device(args.device)
    if Path(args.checkpoint).is_file():
        raise ValueError(
            f"{args.checkpoint!r} is a file, as published weights are, and these have no contrast tokens: their attention "
            "is mhsa. Give a run of train.py with attention vca or agent."
        )
    pipe = Pipeline.from_pretrained(args.checkpoint, weights=args.weights, vae=args.vae, device=device)
    layers = chosen_layers(pipe, args.blocks, args.heads)
    query = chosen_query(pipe.network.grid_size, args.query)
    sample = pipe.config.sample.changed(sampler=args.sampler, cfg_scale=args.cfg_scale, seed=args.seed)
    labels, heads = (list(dict.fromkeys(many)) for many in (pipe.label_ids(args.classes or [0]), args.heads))
    images, moments, nfe = watch_drawing(pipe, sample, labels, layers, args.times)

    folder, written = Path(args.out or pipe.folder / "maps"), []
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
        **pipe.settings(sample),
        "nfe": nfe,
        **pipe.facts(),
    }
    write_text(folder / "maps.json", json.dumps(record, indent=2))
    levels = ", ".join(f"{moment.level:.2f}" for moment in moments)
    print(f"wrote {len(written)} figures, each as PNG and PDF, to {folder}; noise levels {levels}")


def chosen_layers(
    pipe: Pipeline, blocks: Sequence[int] | None, heads: Sequence[int]
) -> dict[int, VisualContrastAttention]:
    """Block -> its layer.

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
    """Row and column of a token; not given means in the middle.

    Raises:
        ValueError: The grid has no such token.
    """
    row, column = query or (grid[0] // 2, grid[1] // 2)
    there = 0 <= row < grid[0] and 0 <= column < grid[1]
    require(there, "query", query, f"choose a row 0 ... {grid[0] - 1} and a column 0 ... {grid[1] - 1} of the tokens")
    return row, column


def watch_drawing(
    pipe: Pipeline,
    sample: SampleConfig,
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
    drawer = pipe.drawer(sample)
    nearest: dict[float, tuple[float, Tensor, Tensor, dict[int, Tensor]]] = {}

    with keep_inputs(layers) as inputs:

        def keep(level: float, x_t: Tensor, t: Tensor, output: Tensor) -> None:
            for wanted in times:
                if wanted not in nearest or abs(level - wanted) < abs(nearest[wanted][0] - wanted):
                    # with guidance the batch is twice as large; the pass with the class comes first
                    mine = {block: x[: len(labels)] for block, x in inputs.items()}
                    nearest[wanted] = level, x_t, pipe.process.clean(output, x_t, t), mine

        watch = on_the_way(pipe.process.noise_level, keep)
        images = drawer.images(drawer.latents(labels, range(len(labels)), watch=watch))
    moments: list[Moment] = []
    for wanted in sorted(nearest, reverse=True):
        level, x_t, clean, mine = nearest[wanted]
        if moments and f"{moments[-1].level:.2f}" == f"{level:.2f}":  # as the figures and their files call them
            raise ValueError(
                f"times has {wanted:g}, but the evaluation of the network that is nearest to it, at {level:.2f}, is already "
                "that of another of them; leave it out, or choose a sampler with more steps."
            )
        maps = {block: maps_of(layers[block], x) for block, x in mine.items()}
        moments.append(Moment(level, drawer.images(x_t), drawer.images(clean), maps))
    return images, moments, drawer.nfe


def figures(
    pipe: Pipeline,
    images: np.ndarray,
    moments: Sequence[Moment],
    labels: Sequence[int],
    heads: Sequence[int],
    query: tuple[int, int],
) -> Iterator[tuple[str, "Figure"]]:
    """All figures, each with the name of its file without the ending."""
    for (i, label), block, head in itertools.product(enumerate(labels), moments[0].maps, heads):
        name = f"class-{label}-block-{block}-head-{head}"
        title = f"class {pipe.class_names[label].split(',')[0]}, block {block}, head {head}"
        for moment in moments:
            level = f"{moment.level:.2f}"
            pictures = {"input": moment.noisy[i], "predicted": moment.predicted[i], "drawn": images[i]}
            rows = contrast_rows(moment.maps[block], i, head, pictures)
            yield f"contrast-{name}-noise-{level}", draw_rows(rows, WIDE, f"{title}, noise level {level}")
        width = NARROW if len(moments) < 4 else WIDE
        yield f"query-{name}", draw_rows(query_rows(moments, block, i, head, query), width, title)
    over_depth = [streams_of(layer) for layer in contrast_layers(pipe.network).values()]
    if any(number is not None for number in dataclasses.astuple(over_depth[0])):  # of an agent there is nothing to tell
        training = over_training(pipe)
        yield "layers", draw_streams(over_depth, training if len(training) > 1 else [])


def contrast_rows(maps: Maps, i: int, head: int, pictures: Mapping[str, np.ndarray]) -> list[Row]:
    """Where up to six contrast tokens look: the positive and negative maps of Stage I, and their difference.

    The outline is the part of the image that a token stands for, from which its query is pooled (unless t is `embed`).

    Args:
        maps: Of the block.
        i: Which image of the batch.
        head: Which head.
        pictures: What is shown at the left, (H, W, 3) uint8 each: in each row one; all of them if Stage I is plain.
    """
    (a, b), grid = maps.contrast_grid, maps.grid_size
    chosen = list(itertools.product(middles(a, 2), middles(b, 3)))
    tokens = [row * b + column for row, column in chosen]
    marks = [cell(row, column, maps.contrast_grid, grid) for row, column in chosen]
    titles = [f"token ({row}, {column})" for row, column in chosen]
    images = [Panel(image, name) for name, image in pictures.items()]

    def of(weights: Tensor) -> np.ndarray:
        return on_grid(weights[i, head, tokens], grid)  # (K, H, W)

    def row(left: list[Panel], values: np.ndarray, names: list[str], label: str, limit: float, **kind: bool) -> Row:
        return Row([*left, *map(Panel, values, names, marks)], label, limit, grid, "token", **kind)

    positive, untitled = of(maps.stage1_positive), [""] * len(tokens)
    if maps.stage1_negative is None:
        return [row(images, positive, titles, "positive", positive.max())]
    negative, both = of(maps.stage1_negative), of(maps.stage1)
    limit, difference = max(positive.max(), negative.max()), f"positive\n{minus(maps.lambda1)} negative"
    return [
        row(images[:1], positive, titles, "positive", limit),
        row(images[1:2], negative, untitled, "negative", limit),
        row(images[2:], both, untitled, difference, np.abs(both).max(), signed=True),
    ]


def query_rows(moments: Sequence[Moment], block: int, i: int, head: int, query: tuple[int, int]) -> list[Row]:
    """Which contrast tokens one query uses, A+, A- and A+ - lambda2 A-, and which tokens it reaches through them.

    Args:
        moments: A column each.
        block: Which block.
        i: Which image of the batch.
        head: Which head.
        query: Row and column of the token, which is outlined.
    """
    maps = [moment.maps[block] for moment in moments]
    grid, contrast_grid = maps[0].grid_size, maps[0].contrast_grid
    token = maps[0].stage2.shape[2] - grid[0] * grid[1] + query[0] * grid[1] + query[1]
    mark = (*query, 1, 1)

    def row(weights: list[Tensor], label: str, among: list[Tensor], **kind: bool) -> Row:
        """On the contrast grid; the colours reach as far as the largest of `among`."""
        weights = [each[i, head, token] for each in weights]  # (n,) each
        panels = [Panel(on_grid(each, contrast_grid), f"sum {float(each.sum()):.2f}") for each in weights]
        limit = max(float(each[i, head, token].abs().max()) for each in among)
        return Row(panels, label, limit, contrast_grid, "contrast", **kind)

    images = [Panel(m.predicted[i], f"noise {m.level:.2f}", mark) for m in moments]
    positive, both = [m.stage2_positive for m in maps], [m.stage2 for m in maps]
    if maps[0].stage2_negative is None:
        rows = [row(positive, "$A^+$", positive)]
    else:
        negative = [m.stage2_negative for m in maps]
        rows = [
            row(positive, "$A^+$", positive + negative),
            row(negative, "$A^-$", positive + negative),
            row(both, f"$A^+$ {minus(maps[0].lambda2)} $A^-$", both, signed=True),
        ]
    reached = [on_grid(m.reach(token)[i, head], grid) for m in maps]
    limit, panels = max(np.abs(each).max() for each in reached), [Panel(each, "", mark) for each in reached]
    return [
        Row(images, "", 0.0, grid, "token"),
        *rows,
        Row(panels, "through Stage I,\nweight of a value", limit, grid, "token", signed=True),
    ]


def over_training(pipe: Pipeline) -> list[tuple[int, list[Streams]]]:
    """Step and streams of each layer, of the narrowest average in each snapshot of the run; none of what is no run."""
    folder, found = Path(pipe.origin["path"]), []
    if folder.parent.name not in (checkpoint.CHECKPOINTS, checkpoint.SNAPSHOTS):
        return []
    network = copy.deepcopy(pipe.network)
    for snapshot in checkpoint.steps(folder.parent.parent, checkpoint.SNAPSHOTS):
        record = checkpoint.read_record(snapshot)
        checkpoint.load_weights(snapshot, name_of(min(record["ema_stds"])), network)
        found.append((record["step"], [streams_of(layer) for layer in contrast_layers(network).values()]))
    return found


@styled
def draw_streams(over_depth: Sequence[Streams], training: Sequence[tuple[int, Sequence[Streams]]]) -> "Figure":
    """The sizes of e+ and e-, their cosine, and both lambdas: over the blocks, and below over training, if it is known."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(WIDE, 3.4 if training else 1.9, 1 + bool(training), 3)
    blocks = np.arange(len(over_depth))
    colours = ScalarMappable(BoundaryNorm(np.arange(len(blocks) + 1) - 0.5, 256), "viridis")
    for column, (label, lines) in enumerate(LINES.items()):
        top, *below = axes[:, column]
        for (number, name), style, marker in zip(lines.items(), ("-", "--"), "os", strict=False):
            if getattr(over_depth[0], number) is None:
                continue
            values = [getattr(streams, number) for streams in over_depth]
            top.plot(blocks, values, style, color="black", marker=marker, label=name)
            for ax, block in itertools.product(below, blocks):
                course = [(step, getattr(streams[block], number)) for step, streams in training]
                ax.plot(*np.transpose(course), style, color=colours.to_rgba(block))
        if "lambda1" in lines and top.lines:
            start = [lambda_init(block) for block in blocks]
            top.plot(blocks, start, ":", color="grey", label=r"$\lambda_\mathrm{init}$")
        if top.get_legend_handles_labels()[0]:
            top.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1, handlelength=2.5)
        top.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for ax, place in zip(axes[:, column], ("block", "training step"), strict=False):
            ax.set(xlabel=place, ylabel=label)
            ax.axhline(0, color="grey", linewidth=0.5, zorder=0)
    if training:
        bar = figure.colorbar(colours, cax=axes[1, 2].inset_axes([1.06, 0, 0.05, 1]), label="block")
        bar.set_ticks(MaxNLocator(6, integer=True))
        bar.minorticks_off()
    return figure


def minus(scale: Tensor) -> str:
    """-scale as a text with its sign; a learned lambda may be negative, and then the streams are added."""
    return f"$-$ {float(scale):.2f}" if scale >= 0 else f"$+$ {-float(scale):.2f}"


def middles(side: int, most: int) -> list[int]:
    """At most so many of `side` cells, in the middle of as many equal parts."""
    parts = min(side, most)
    return [(2 * i + 1) * side // (2 * parts) for i in range(parts)]


def cell(row: int, column: int, contrast_grid: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """What adaptive average pooling takes for one contrast token: first row, first column, rows and columns of tokens."""
    sides = list(zip((row, column), contrast_grid, grid, strict=True))
    starts = [i * side // cells for i, cells, side in sides]
    ends = [-(-(i + 1) * side // cells) for i, cells, side in sides]  # rounded up
    return *starts, *(end - start for start, end in zip(starts, ends, strict=True))


def on_grid(weights: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """(..., P + rows * columns) -> (..., rows, columns), without prefix tokens."""
    return weights[..., -grid[0] * grid[1] :].unflatten(-1, grid).cpu().numpy()


if __name__ == "__main__":
    main()
