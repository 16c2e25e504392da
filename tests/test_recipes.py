"""The recipes of docs/extending.md run as they are printed, and timm's other vision transformers take the layer, too."""

import re
from pathlib import Path

import pytest
import timm
import torch

from vca import ATTENTIONS, VisualContrastAttention

TEXT = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "import torch" in block]


@pytest.mark.parametrize("recipe", RECIPES, ids=["alone", "timm", "diffusers"])
def test_a_recipe_runs_and_gives_the_shape_that_it_says(recipe):
    names = {}
    exec(recipe, names)
    name, batch, shape = re.search(r"(\w+) = .*# \((B), ([^)]*)\)", recipe).groups()
    sizes = [2 if size == batch else eval(size) for size in (batch, *shape.split(", "))]
    assert list(names[name].shape) == sizes
    assert names[name].isfinite().all()
    (names[name].square().sum()).backward()
    layers = [m for m in names.get("model", names.get("attention")).modules() if isinstance(m, VisualContrastAttention)]
    assert layers
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layers[0].parameters())


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
