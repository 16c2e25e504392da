"""What visualise.py draws: the right weights in the right places, files that open, or a sentence."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import new_process
from PIL import Image

import train
import visualise
from vca import VisualContrastAttention, keep_inputs, maps_of, streams_of
from vca_engine.sampling.figures import NARROW, Panel, Row, plot_rows
from vca_engine.sampling.map_figures import Moment, cell, contrast_rows, plot_streams, query_rows
from vca_engine.sampling.pipeline import Pipeline
from visualise import over_training, watch_drawing

SMALL = (
    "--data.name digits --codec.name pixels --process.name flow --model.hidden_size 16 --model.depth 2 --model.num_heads 2 "
    "--train.batch_size 8 --train.num_steps 4 --train.lr 1e-2 --train.num_workers 0 --train.tracker none "
    "--train.snapshot_every 2 --sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 5 "
    "--sample.per_class 1 --sample.cfg_scale 2"
)

pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Folders of runs, which the tests only read, by their attention."""
    made = {}

    def run(attention="vca"):
        if attention not in made:
            made[attention] = tmp_path_factory.mktemp("runs") / attention
            with new_process():
                train.main([*SMALL.split(), "--model.attention.name", attention, "--run_dir", str(made[attention])])
        return made[attention]

    return run


@pytest.fixture
def sentence(run_of, capsys):
    """What visualise.py says of a mistake, after it ended with exit code 2 and without a traceback."""

    def said(*extra, checkpoint=None):
        with pytest.raises(SystemExit) as stop:
            visualise.main([str(checkpoint or run_of()), *extra])
        assert stop.value.code == 2
        (line,) = re.findall(r"visualise\.py: .*", capsys.readouterr().err)
        return line

    return said


def test_a_run_becomes_figures_with_a_record(run_of, tmp_path, capsys):
    options = f"--maps --classes [8,8] --heads [1,1] --times 0.3 --query [0,3] --seed 5 --out {tmp_path}"
    visualise.main([str(run_of()), *options.split()])
    names = ["contrast-class-8-block-1-head-1-noise-0.25", "query-class-8-block-1-head-1", "layers"]
    files = {f"{name}.{ending}" for name in names for ending in ("png", "pdf")}
    assert {f.name for f in tmp_path.iterdir()} == {*files, "maps.json"}
    for name in names:
        width = np.asarray(Image.open(tmp_path / f"{name}.png")).shape[1]
        assert width == (975 if name.startswith("query") else 1650)  # 3.25 and 5.5 inches
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    record = json.loads((tmp_path / "maps.json").read_text())
    assert sorted(record["figures"]) == sorted(names)
    chosen = {"classes": [8], "blocks": [1], "heads": [1], "query": [0, 3], "noise_levels": [0.25]}
    assert {key: record[key] for key in chosen} == chosen
    assert (record["seed"], record["cfg_scale"], record["nfe"]) == (5, 2.0, 8.0)  # four steps of two passes
    assert "wrote 3 figures, each as PNG and PDF" in capsys.readouterr().out


def test_an_agent_has_maps_and_no_streams(run_of):
    visualise.main([str(run_of("agent")), "--maps", "--times", "0.5"])
    found = {f.stem for f in (run_of("agent") / "maps").glob("*.pdf")}
    assert found == {"contrast-class-0-block-1-head-0-noise-0.50", "query-class-0-block-1-head-0"}


def test_moments_are_those_of_the_pass_with_the_class(run_of):
    pipe = Pipeline.from_pretrained(run_of())
    layers = {block: pipe.network.blocks[block].attn for block in (0, 1)}
    labels, sample = [3, 8], pipe.config.sample
    images, moments, _ = watch_drawing(pipe, sample, labels, layers, [0.2, 1.0, 0.2])
    image_sampler = pipe.image_sampler(sample)
    assert np.array_equal(images, image_sampler(labels, range(2)))
    assert [moment.level for moment in moments] == [1.0, 0.25]

    noise, _ = image_sampler.begin(range(2))
    y, null = torch.tensor(labels), torch.tensor([10, 10])
    with keep_inputs(layers) as inputs, torch.no_grad():
        output = pipe.network(noise, torch.zeros(2), y)
    with torch.no_grad():
        other = pipe.network(noise, torch.zeros(2), null)
    clean = noise + other + 2 * (output - other)  # a velocity at t 0, guided: data = noise + velocity
    assert np.abs(moments[0].predicted.astype(int) - image_sampler.images(clean)).max() <= 1  # of 255, by rounding
    assert np.array_equal(moments[0].noisy, image_sampler.images(noise))
    for block, layer in layers.items():
        expected = maps_of(layer, inputs[block])
        # float32, in a batch of 2 and of 4
        torch.testing.assert_close(moments[0].maps[block].stage1, expected.stage1, rtol=0, atol=1e-5)
        torch.testing.assert_close(moments[0].maps[block].stage2, expected.stage2, rtol=0, atol=1e-5)


@pytest.fixture(params=["joint", "separate"])
def maps(request):
    """Of two images, two heads, 4x6 tokens and 2x3 contrast tokens, after one prefix token."""
    options = {"contrast_grid": (2, 3), "num_prefix_tokens": 1, "softmax": request.param, "layer_index": 1}
    return maps_of(VisualContrastAttention(8, 2, (4, 6), **options).requires_grad_(False), torch.randn(2, 25, 8))


def test_panels_of_stage_1_hold_the_weights_and_where_the_token_is_from(maps):
    pictures = {name: np.zeros((8, 12, 3), np.uint8) for name in ("input", "predicted", "drawn")}
    rows = contrast_rows(maps, 1, 0, pictures)
    assert [row.panels[0].title for row in rows] == ["input", "predicted", "drawn"]
    assert [panel.title for panel in rows[0].panels[1:]] == [f"token ({r}, {c})" for r in (0, 1) for c in (0, 1, 2)]
    limit = max(maps.stage1_positive[1, 0, :, 1:].max(), maps.stage1_negative[1, 0, :, 1:].max())
    assert [row.signed for row in rows] == [False, False, True]  # also where lambda is negative
    assert rows[0].limit == rows[1].limit == pytest.approx(float(limit))
    for token in range(6):
        row, column = divmod(token, 3)
        values = [line.panels[1 + token].values for line in rows]
        for i, j in np.ndindex(4, 6):
            key = 1 + 6 * i + j
            assert values[0][i, j] == maps.stage1_positive[1, 0, token, key]
            assert values[1][i, j] == maps.stage1_negative[1, 0, token, key]
            expected = maps.stage1_positive[1, 0, token, key] - maps.lambda1 * maps.stage1_negative[1, 0, token, key]
            assert values[2][i, j] == pytest.approx(float(expected), abs=1e-7)
        assert rows[2].panels[1 + token].mark == (2 * row, 2 * column, 2, 2)


def test_panels_of_stage_2_hold_what_a_query_uses_and_reaches(maps):
    picture = np.zeros((2, 8, 12, 3), np.uint8)
    rows = query_rows([Moment(0.5, picture, picture, {7: maps})], 7, 1, 1, (2, 5))
    query = 1 + 6 * 2 + 5
    (image,), (positive,), (negative,), (both,), (reached,) = (row.panels for row in rows)
    assert image.mark == reached.mark == (2, 5, 1, 1)
    assert positive.values.shape == both.values.shape == (2, 3)
    assert np.array_equal(positive.values.flatten(), maps.stage2_positive[1, 1, query])
    assert np.array_equal(negative.values.flatten(), maps.stage2_negative[1, 1, query])
    assert positive.title == f"sum {positive.values.sum():.2f}"
    assert reached.values.shape == (4, 6)
    assert np.array_equal(reached.values.flatten(), maps.reach(query)[1, 1, 1:])
    assert [row.signed for row in rows] == [False, False, False, True, True]
    assert rows[3].limit == pytest.approx(np.abs(both.values).max())


def test_outlines_are_what_adaptive_pooling_takes():
    for grid, cells in (((7, 5), (3, 2)), ((16, 16), (8, 8)), ((3, 4), (3, 3))):
        for row, column in np.ndindex(cells):
            tokens = torch.zeros(1, *grid).requires_grad_()
            torch.nn.functional.adaptive_avg_pool2d(tokens, cells)[0, row, column].backward()
            top, left, height, width = cell(row, column, cells, grid)
            expected = torch.zeros(grid, dtype=torch.bool)
            expected[top : top + height, left : left + width] = True
            assert torch.equal(tokens.grad[0] != 0, expected)


def test_figures_show_the_values_in_colours_that_are_centred_on_zero():
    values, image = np.array([[-1.0, 0.25], [0.0, 0.5]]), np.zeros((4, 4, 3), np.uint8)
    signed = Row([Panel(image, "one"), Panel(values)], "both", 1.0, (2, 2), "token", signed=True)
    plain = Row([Panel(image), Panel(np.abs(values))], "positive", 2.0, (2, 2), "contrast")
    figure = plot_rows([signed, plain], NARROW, "class $5, $x_{")
    figure.canvas.draw()  # a name is text, and no formula
    shown = [ax.images[0] for ax in figure.axes[:4]]
    assert np.array_equal(shown[1].get_array(), values)
    assert shown[1].get_clim() == (-1, 1)
    assert shown[1].cmap(0.5)[:3] == pytest.approx((0.967, 0.968, 0.969), abs=1e-2)  # zero is white
    assert shown[3].get_clim() == (0, 2)
    assert figure.get_size_inches()[0] == NARROW
    assert figure.get_suptitle() == "class $5, $x_{"
    assert [ax.get_ylabel() for ax in figure.axes[::2][:2]] == ["token row", "contrast row"]
    bars = [child for ax in figure.axes[:4] for child in ax.child_axes]
    assert [bar.get_ylabel() for bar in bars] == ["both", "positive"]  # one a row


def test_streams_over_training_are_those_of_the_snapshots(run_of):
    pipe = Pipeline.from_pretrained(run_of())
    found = over_training(pipe)
    assert [step for step, _ in found] == [2, 4]
    last = Pipeline.from_pretrained(run_of() / "snapshots" / "step-00000004", weights="ema-0.05")
    assert found[1][1] == [streams_of(block.attn) for block in last.network.blocks]
    assert found[0][1] != found[1][1]
    assert all(math.isfinite(streams.cosine) for streams in found[0][1])


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({}, [2, 1, 3]),  # and where lambda starts
        ({"negative": "pool"}, [1, 0, 3]),
        ({"stages": ("differential", "plain")}, [2, 1, 2]),
        ({"stages": ("plain", "plain")}, [1, 0, 0]),
    ],
)
def test_streams_are_drawn_as_far_as_there_are_some(options, lines, recwarn):
    layers = [VisualContrastAttention(8, 2, 4, layer_index=i, **options) for i in range(3)]
    found = [streams_of(layer) for layer in layers]
    figure = plot_streams(found, [(10, found), (20, found)])
    drawn = [[line for line in ax.lines if len(line.get_xdata()) == 3] for ax in figure.axes[:3]]
    assert list(map(len, drawn)) == lines
    assert list(drawn[0][0].get_ydata()) == [streams.positive for streams in found]
    below = [len(ax.lines) - 1 for ax in figure.axes[3:6]]  # a line each block; one is zero
    assert below == [3 * lines[0], 3 * lines[1], 3 * max(0, lines[2] - 1)]
    assert not list(recwarn)


def test_of_a_saved_pipeline_there_is_no_training(run_of, tmp_path):
    Pipeline.from_pretrained(run_of()).save_pretrained(tmp_path / "saved")
    assert over_training(Pipeline.from_pretrained(tmp_path / "saved")) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "nothing to draw is named; type --maps"),
        ("--maps --blocks 2", "block is 2; this model has the blocks 0 ... 1"),
        ("--maps --blocks [0,-1]", "block is -1; this model has the blocks 0 ... 1"),
        ("--maps --heads [0,2]", "head is 2; this model has the heads 0 ... 1"),
        ("--maps --query [4,0]", "query is (4, 0); choose a row 0 ... 3 and a column 0 ... 3"),
        ("--maps --times [0.5,1.5]", "times is 1.5; choose noise levels from 0 (data) to 1 (noise)"),
        ("--maps --times []", "times is []; name at least one, or leave it out"),
        (
            "--maps --times [0.5,0.55]",
            "times has 0.5, but the evaluation of the network that is nearest to it, at 0.50,",
        ),
        ("--maps --classes [3,cat]", "class 'cat' is no class of this model"),
    ],
)
def test_mistakes_get_a_sentence(sentence, options, said):
    assert said in sentence(*options.split())


def test_models_without_contrast_tokens_get_a_sentence(sentence, run_of, tmp_path):
    said = sentence("--maps", checkpoint=run_of("mhsa"))
    assert "SiT has no contrast tokens: its attention is SelfAttention; choose a model whose attention is vca" in said
    torch.save({"x": torch.zeros(1)}, tmp_path / "DiT-XL-2-256x256.pt")
    said = sentence("--maps", checkpoint=tmp_path / "DiT-XL-2-256x256.pt")
    assert "is a file, as published weights are, and these have no contrast tokens" in said
    assert "there is no such file or folder" in sentence("--maps", checkpoint=tmp_path / "nowhere")
