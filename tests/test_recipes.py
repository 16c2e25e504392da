"""Each block of code of docs/layer.md runs as it is printed, and timm's other vision transformers take the layer, too."""

import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from diffusers import DiTTransformer2DModel
from timm.models.vision_transformer_sam import VisionTransformerSAM

import train
from vca import ATTENTIONS, SelfAttention, VisualContrastAttention

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "layer.md").read_text(encoding="utf-8")
TIMM, DIFFUSERS, DETECTOR, ALONE, HELD_OUT = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("recipe", [TIMM, DIFFUSERS, DETECTOR, ALONE], ids=["timm", "diffusers", "detector", "alone"])
def test_a_recipe_runs_and_gives_the_shapes_that_it_says(recipe):
    names = {}
    exec(recipe, names)
    said = re.findall(r"^(\w+) = .*# \(((?:B|1), [^)]*)\)", recipe, re.MULTILINE)
    assert said
    shapes = {name: [2 if side == "B" else eval(side) for side in shape.split(", ")] for name, shape in said}
    for name, shape in shapes.items():  # where a name is used twice, the last
        assert list(names[name].shape) == shape
        assert names[name].isfinite().all()
    names[name].square().mean().backward()
    layers = [m for m in names.get("model", names.get("attention")).modules() if isinstance(m, VisualContrastAttention)]
    assert layers
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layers[0].parameters())


def adapter(recipe, name):
    """The class of a recipe, with full attention in the place of the layer, which then changes no output."""
    names = {"VisualContrastAttention": SelfAttention}
    imports, _, rest = recipe.partition("\n\n\n")
    exec(imports.replace("from vca import VisualContrastAttention", ""), names)
    exec(rest[: rest.index("\n\n\n")], names)
    return names[name]


def test_the_adapter_for_diffusers_takes_over_what_was_learned():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    with torch.no_grad():
        before = model(*x).sample
        for index, block in enumerate(model.transformer_blocks):
            block.attn1 = adapter(DIFFUSERS, "Attention1")(block.attn1, 4, index)
        after = model(*x).sample
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # one product of three in float32, the others of one


@pytest.mark.parametrize("size", [(64, 64), (48, 112)])
def test_the_adapter_for_maps_is_the_attention_that_was_there_at_every_size(size):
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 24, "num_heads": 2, "depth": 2, "window_size": 0, "neck_chans": 0}
    model = VisionTransformerSAM(**sizes).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        before = model.forward_features(x)
        for index, block in enumerate(model.blocks):
            block.attn = adapter(DETECTOR, "MapAttention")(block.attn, (4, 4), index)
        after = model.forward_features(x)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # the same sums in float32


def test_a_run_of_full_attention_is_trained_on_and_measured(tmp_path, monkeypatch):
    """By the commands of the page and its block of code, with a small network in few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = re.findall(r"^    python train.py (.*)$", TEXT, re.MULTILINE)
    small = "--model.hidden_size 16 --model.depth 1 --model.num_heads 2 --train.tracker none --sample.per_class 1"
    for command in commands:
        steps = "--train.num_steps 3 --train.warmup_steps 0 --sample.sampler.num_steps 2"
        train.main(f"{command} {small} {steps}".split())
    names = {}
    exec(HELD_OUT, names)
    assert [type(b.attn) for b in names["pipe"].network.blocks] == [VisualContrastAttention]
    assert (
        0.5 < float(names["loss"]) < 5
    )  # of a network that has learned nothing: images and noise have a variance of 1


def test_the_table_of_costs_is_what_was_measured():
    cells = json.loads((ROOT / "benchmarks" / "results" / "attention_cpu.json").read_text())["layer"]["cells"]
    table = TEXT.partition("## What it costs")[2]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    rows = {name: values for name, *values in lines}
    for column, tokens in enumerate([64, 256, 1024, 4096, 16384]):
        found = next(cell for cell in cells.values() if cell["tokens"] == tokens)
        contrast = VisualContrastAttention(8, 1, math.isqrt(tokens), layer_index=0).num_contrast_tokens
        name = "vca, n N/4" if tokens == 64 else "vca, n 64"
        forward, both = found["forward"][name], found["forward + backward"][name]
        for row, value in {
            "contrast tokens": contrast,
            "time, forward": forward["over mhsa, quartiles"][1],
            "time, forward and backward": both["over mhsa, quartiles"][1],
            "memory at the peak, forward and backward": both["memory over mhsa"],
        }.items():
            printed = rows[row][column]
            digits = len(printed.partition(".")[2])
            assert float(printed) == round(value, digits)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_base_patch16_clip_quickgelu_224", 1),
        ("vit_small_patch16_36x1_224", 1),
    ],
)
def test_vision_transformers_of_timm_take_every_attention(model, prefix, name):
    size = 14 * 4 if "patch14" in model else 16 * 4
    net = timm.create_model(model, img_size=size, num_classes=3, depth=2, embed_dim=48, num_heads=3)
    assert net.num_prefix_tokens == prefix
    for index, block in enumerate(net.blocks):
        options = {"layer_index": index, "num_prefix_tokens": prefix}
        block.attn = ATTENTIONS[name](48, 3, net.patch_embed.grid_size, **options)
    out = net(torch.randn(2, 3, size, size))
    assert out.shape == (2, 3)
    assert out.isfinite().all()
